"""The report without a critic: its numbers by hand in a world of one value, and on tiny models
where nothing may differ."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from nanocpo.criteria import Criteria, Prompt
from nanocpo.data import Paintings
from nanocpo.diffusion import Diffusion
from nanocpo.folder.expert import agreement, calibrate, held_out, in_context, told
from nanocpo.method import cpo_step
from nanocpo.run.flags import parse_training
from nanocpo.sd.report import errors, log_ratio, report, table
from nanocpo.utils.report import interval
from sd_tiny import moved, random_data

CRITERIA = Criteria.load().select("Color Relations")                             # short prompts
MIDDLES = [50, 150, 250, 350, 450, 550, 650, 750, 850, 950]


class OneValue:
    """A model that believes a picture under the prompt "m" to be the constant m: its best
    prediction is a closed formula."""
    device = torch.device("cpu")

    def __init__(self, prediction):
        self.diffusion, self.text, self.seen = Diffusion("scaled_linear", prediction), self, []

    def tokens(self, prompts):
        return torch.tensor([float(prompt) for prompt in prompts])

    def __call__(self, xt, t, means):
        self.seen.append((xt, t.tolist()))
        a, s = self.diffusion.scales(t, xt)
        noise = (xt - a * means.view(-1, 1, 1, 1)) / s
        return (noise if self.diffusion.prediction == "eps"
                else a * noise - s * means.view(-1, 1, 1, 1))


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_errors_and_log_ratio_by_hand(prediction):
    # the error of believing m of x is (m - x)^2 SNR_t, and for v (m - x)^2 / (1 - alpha_bar_t)
    model, pictures = OneValue(prediction), [
        torch.full((4, 4, 4), x, dtype=torch.float64) for x in (1.0, -0.5, 0.0)]
    alpha_bar = model.diffusion.alpha_bar[MIDDLES].numpy()
    weight = alpha_bar / (1 - alpha_bar) if prediction == "eps" else 1 / (1 - alpha_bar)
    got = errors(model, pictures, ["1"] * 3, ["-1"] * 3, seed=4)
    assert [t for _, t in model.seen] == [[t, t] for t in MIDDLES] * 3 and got.shape == (3, 10, 2)
    want = np.array([[0, 4], [2.25, 0.25], [1, 1]])[:, None] * weight[:, None]
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)
    # positive prompt "1", negative "-1": 4 x times the mean weight, so its sign is the picture's
    np.testing.assert_allclose(log_ratio(got), np.array([4, -2, 0]) * weight.mean(),
                               rtol=1e-6, atol=1e-6)
    both = [xt[0] for xt, _ in model.seen]
    # both prompts see the same noise,
    assert all(torch.equal(xt[0], xt[1]) for xt, _ in model.seen)
    errors(model, pictures, ["0"] * 3, seed=4)
    # and so does another model
    assert all(torch.equal(x, xt[0]) for x, (xt, _) in zip(both, model.seen[30:]))


def flags(out, *more):
    """The toy's Settings but for what is small here."""
    return parse_training("", ["--out", str(out), "--batch", "4", "--samples", "3",
                               "--sampling-steps", "2", "--lean", "1", *more],
                          ("common", "cpo", "report"))


def step(settings, held, base, auxiliary, columns):
    """The log of stage 2 on held-out pictures, as the world makes it."""
    how = settings.cpo.filled()
    return lambda target, generator: cpo_step(
        target, base, auxiliary, CRITERIA, held.draw(settings.common.batch, generator), generator,
        columns=columns, pairs=how.pairs, lean=how.lean, beta=how.beta, stabilizer=how.stabilizer,
        strength=how.strength)


def test_held_out_pictures_are_never_trained_on():
    data = Paintings(CRITERIA, np.arange(400), [str(i) for i in range(400)],
                     np.zeros((400, len(CRITERIA)), np.int8))
    held = held_out(data)
    assert held.images[:4].tolist() == [8, 9, 18, 19] and len(held) == 32
    assert not set(held.captions) & set(data.split("train").captions)


def test_equal_models_differ_nowhere(tmp_path, capsys):
    data, base = random_data(CRITERIA, 20)
    auxiliary, target, settings = (moved(base.with_adapter(2)).frozen_copy(),
                                   base.with_adapter(2).frozen_copy(), flags(tmp_path))
    columns = CRITERIA.columns("Hue")
    held = held_out(data)
    got = report(settings, held, base, auxiliary, target, columns,
                 step(settings, held, base, auxiliary, columns))
    assert got == json.loads((tmp_path / "report.json").read_text()) and got["held_out"] == 4
    assert (got["errors"]["base"] == got["errors"]["target"]
            and len(got["errors"]["base"]["per_t"]) == 10)
    assert got["errors"]["base"]["mean"] == pytest.approx(np.mean(got["errors"]["base"]["per_t"]))
    # told or not, adapted or not: that differs
    assert len({row["mean"] for row in got["errors"].values()}) == 3
    assert (got["log_ratio"]["base"] == got["log_ratio"]["target"]
            and got["log_ratio"]["base"]["mean"] != 0)
    assert got["log_ratio"]["difference"] == {"mean": 0, "ci": [0, 0]}
    assert ((got["cpo"]["margin"], got["cpo"]["accuracy"]) == (0, 0)
            and got["cpo"]["loss"] == pytest.approx(np.log(2), abs=1e-5))
    assert (got["cpo"]["winner"] == got["cpo"]["winner_ref"] > 0
            and None not in got["cpo"]["per_t"]["winner"])
    assert 0 <= got["agreement"] <= 1
    counts = got["counted"]["negative"]
    assert counts["base"] == counts["target"] and 0 < counts["base"]["mean"] < len(CRITERIA)
    assert counts["difference"] == {"mean": 0, "ci": [0, 0]}
    assert "the teacher judges its pupil. Of " in table(got)
    picture = np.asarray(Image.open(tmp_path / "report.png"))
    rows = picture.shape[0] // 2
    # the two rows below their titles
    assert (picture[26:26 + 48] == picture[rows + 24:rows + 24 + 48]).all()
    assert table(got) in capsys.readouterr().out and "no exact critic" in table(got)


def test_another_target_shows(tmp_path):
    data, base = random_data(CRITERIA, 20)
    auxiliary, settings = (moved(base.with_adapter(2)).frozen_copy(),
                           flags(tmp_path, "--name", "other.one"))
    held = held_out(data)
    got = report(settings, held, base, auxiliary, auxiliary, [0],
                 step(settings, held, base, auxiliary, [0]))
    assert ((tmp_path / "report_other.one.json").is_file()
            and (tmp_path / "report_other.one.png").is_file())
    assert (got["errors"]["target"]["mean"] != got["errors"]["base"]["mean"]
            and got["cpo"]["margin"] != 0)
    rows = got["log_ratio"]
    assert (rows["difference"]["mean"]
            == pytest.approx(rows["target"]["mean"] - rows["base"]["mean"], abs=1e-12) != 0)
    assert rows["difference"]["ci"][0] < rows["difference"]["mean"] < rows["difference"]["ci"][1]
    # which prompts are compared: the chosen leaf's two sides for samples, the annotation and its
    # opposite for held-out pictures
    leaf, captions = CRITERIA.leaves[0], ["a boat", "a tree", "a boat"]
    sides = ([Prompt(c, (leaf.positive,)) for c in captions],
             [Prompt(c, (), (leaf.negative,)) for c in captions])
    with torch.no_grad():
        images = base.sample(captions, guidance=settings.report.guidance, steps=2).clamp(-1, 1)
        latents = [base.latents.encode(image[None])[0] for image in images]
        assert rows["base"]["mean"] == pytest.approx(
            log_ratio(errors(auxiliary, latents, *sides)).mean(), abs=1e-12)
        own, opposite = ([CRITERIA.prompt(c, sign * a)
                          for c, a in zip(held.captions, held.annotations)] for sign in (1, -1))
        right = errors(auxiliary, held.images, own, opposite)
        plain = errors(base, held.images, [Prompt(c) for c in held.captions], own)
    assert got["agreement"] == np.mean(right[..., 1].mean(1) > right[..., 0].mean(1))
    assert got["errors"]["auxiliary_told"]["mean"] == pytest.approx(right[..., 0].mean())
    assert ([got["errors"][name]["mean"] for name in ("base", "base_told")]
            == pytest.approx(plain.mean((0, 1)), rel=1e-6))
    assert abs(plain[..., 0].mean() / plain[..., 1].mean() - 1) > 1e-5
    # the auxiliary's count: verdicts on both models' samples, with the cuts and the agreement of
    # the held-out pictures
    with torch.no_grad():
        scores = in_context(auxiliary, held, 2, size=4)
        for name, model in (("base", base), ("target", auxiliary)):
            images = model.sample(captions, guidance=settings.report.guidance,
                                  steps=2).clamp(-1, 1)
            x = np.fromiter((base.latents.encode(image[None])[0] for image in images), object)
            sampled = type(held)(CRITERIA, x, captions, np.zeros((3, len(CRITERIA)), np.int8))
            negative = (in_context(auxiliary, sampled, 2, size=4)
                        <= calibrate(scores, held.annotations)).sum(1)
            mean, ci = interval(negative)
            assert got["counted"]["negative"][name] == {"mean": mean, "ci": ci}
            assert f"{name:11} {mean:.2f} ({ci[0]:.2f} to {ci[1]:.2f})" in table(got)
    how_well = agreement(scores, held.annotations, CRITERIA)
    assert got["counted"]["agreement"] == how_well
    assert how_well["verdicts"] == 4 * len(CRITERIA) and told(how_well) in table(got)


def test_without_an_auxiliary_or_held_out_pictures(tmp_path):
    data, base = random_data(CRITERIA, 10)
    got = report(flags(tmp_path), held_out(data), base, None, base, [0])
    assert (got["held_out"] == 2 and set(got["errors"]) == {"base", "target", "base_told"}
            and not {"cpo", "log_ratio", "agreement", "counted"} & set(got))
    auxiliary = moved(base.with_adapter(2)).frozen_copy()
    got = report(flags(tmp_path, "--verdict-draws", "0"), held_out(data.take(range(8))), base,
                 auxiliary, base, [0])
    assert "counted" not in got and "#A_neg" not in table(got)
    got = report(flags(tmp_path), held_out(data.take(range(8))), base, auxiliary, base, [0])
    assert got["counted"]["agreement"]["share"] is None
    assert "No verdict was there to check the auxiliary by." in table(got)
    assert (got["held_out"] == 0 and got["errors"] == {} and "cpo" not in got
            and set(got["log_ratio"]) == {"base", "target", "difference"})
