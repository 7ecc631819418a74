"""Min-SNR weights of supervised training, and runs that are not made longer."""
import json

import pytest
import torch

import train_sft
from nanocpo.diffusion import Diffusion
from nanocpo.losses import sft_loss
from nanocpo.run.stages import min_snr


def test_all_predictions_weigh_the_picture_s_error_alike():
    """min(SNR, gamma) times the error of x0, whether eps, v or a flow is predicted."""
    generator, t = torch.Generator().manual_seed(0), torch.tensor([0, 100, 400, 800, 999])
    x0, noise, wrong = (torch.randn(5, 2, 3, 3, generator=generator, dtype=torch.float64)
                        for _ in range(3))
    for prediction in ("eps", "v", "flow"):
        model = Diffusion("scaled_linear", prediction)
        xt = model.q_sample(x0, t, noise)
        _, logs = sft_loss(wrong, model.goal(x0, t, noise))
        error = (model.x0_and_eps(wrong, xt, t)[0] - x0).square().flatten(1).mean(1)
        snr = model.alpha_bar[t] / (1 - model.alpha_bar[t])
        weights = min_snr(model, t, 5.0)
        assert snr[0] > 5 > snr[2]
        torch.testing.assert_close(weights.double() * logs["loss"], snr.clamp(max=5) * error,
                                   rtol=1e-5, atol=0)
        weighted, again = sft_loss(wrong, model.goal(x0, t, noise), weights)
        assert float(weighted) == pytest.approx(float((weights * logs["loss"]).mean()))
        assert torch.equal(again["loss"], logs["loss"])           # the log stays what it was
    zero = Diffusion("scaled_linear", "v", zero_snr=True)
    assert min_snr(zero, t, 5.0)[-1] == 0 and min_snr(zero, t, 5.0).isfinite().all()


def toy(out, *more):
    return train_sft.main(["--out", str(out), "--count", "40", "--batch", "4", "--base-steps", "1",
                           "--sft-steps", "1", "--sample-every", "0", "--device", "cpu", *more])


def test_the_flag_weighs_stage_1_and_a_finished_run_is_not_made_longer(tmp_path):
    plain, weighted = (toy(tmp_path / name, *more)[1]
                       for name, more in (("plain", []), ("weighted", ["--min-snr", "0.01"])))
    assert plain.digest() != weighted.digest()
    first = [json.loads((tmp_path / name / "base.jsonl").read_text().splitlines()[0])
             for name in ("plain", "weighted")]
    # the same first batch; only its gradient differs
    assert (first[0]["loss"] == first[1]["loss"]
            and first[0]["gradient_norm"] > 2 * first[1]["gradient_norm"])
    toy(tmp_path / "plain", "--resume")
    with pytest.raises(ValueError, match="auxiliary.pt is finished after 1 steps, and what is "
                                         "finished is not made longer; --sft-steps 1 uses it"):
        toy(tmp_path / "plain", "--resume", "--sft-steps", "2")
