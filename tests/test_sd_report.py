"""The report without a critic: its numbers by hand in a world of one value, and on tiny models where nothing may differ."""
import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image

import train_cpo
from nanocpo import lora
from nanocpo.criteria import Criteria, Prompt
from nanocpo.data import Paintings
from nanocpo.diffusion import Diffusion
from nanocpo.model import fingerprint, load_checkpoint
from nanocpo.sd import finetune
from nanocpo.sd.finetune import LatentPaintings
from nanocpo.sd.model import SDModel
from nanocpo.sd.report import errors, held_out, log_ratio, report, table
from sd_tiny import moved, tiny
from train_cpo import add_cpo_arguments, cpo_step

CRITERIA = Criteria.load().select("Color Relations")                             # short prompts
MIDDLES = [50, 150, 250, 350, 450, 550, 650, 750, 850, 950]


class OneValue:
    """A model that believes a picture under the prompt "m" to be the constant m: its best prediction is a closed formula."""
    device = torch.device("cpu")

    def __init__(self, prediction):
        self.diffusion, self.text, self.latents, self.seen = Diffusion("scaled_linear", prediction), self, self, []

    def tokens(self, prompts):
        return torch.tensor([float(prompt) for prompt in prompts])

    def encode(self, images):
        return images

    def __call__(self, xt, t, means):
        self.seen.append((xt, t.tolist()))
        a, s = self.diffusion.scales(t, xt)
        noise = (xt - a * means.view(-1, 1, 1, 1)) / s
        return noise if self.diffusion.prediction == "eps" else a * noise - s * means.view(-1, 1, 1, 1)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_errors_and_log_ratio_by_hand(prediction):
    # the error of believing m of x is (m - x)^2 SNR_t, and for v (m - x)^2 / (1 - alpha_bar_t)
    model, pictures = OneValue(prediction), [torch.full((4, 4, 4), x, dtype=torch.float64) for x in (1.0, -0.5, 0.0)]
    alpha_bar = model.diffusion.alpha_bar[MIDDLES].numpy()
    weight = alpha_bar / (1 - alpha_bar) if prediction == "eps" else 1 / (1 - alpha_bar)
    got = errors(model, pictures, ["1"] * 3, ["-1"] * 3, seed=4)
    assert [t for _, t in model.seen] == [[t, t] for t in MIDDLES] * 3 and got.shape == (3, 10, 2)
    want = np.array([[0, 4], [2.25, 0.25], [1, 1]])[:, None] * weight[:, None]
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)
    # positive prompt "1", negative "-1": 4 x times the mean weight, so its sign is the picture's
    np.testing.assert_allclose(log_ratio(got), np.array([4, -2, 0]) * weight.mean(), rtol=1e-6, atol=1e-6)
    both = [xt[0] for xt, _ in model.seen]
    assert all(torch.equal(xt[0], xt[1]) for xt, _ in model.seen)                     # both prompts see the same noise,
    errors(model, pictures, ["0"] * 3, seed=4)
    assert all(torch.equal(x, xt[0]) for x, (xt, _) in zip(both, model.seen[30:]))    # and so does another model


def world(count):
    """(data: random latents of one shape, captions in turn, every leaf judged at random; a tiny base that knows them)."""
    base = tiny()
    rng, images = np.random.default_rng(0), np.empty(count, object)
    for i in range(count):
        images[i] = torch.from_numpy(rng.normal(size=(4, 6, 6))).float()
    states = rng.choice(np.array([-1, 1], np.int8), (count, len(CRITERIA)))
    base.text.criteria, base.text.captions = CRITERIA, ["a boat", "a tree"]
    return LatentPaintings(CRITERIA, images, [f"a {('boat', 'tree')[i % 2]}" for i in range(count)], states), SDModel(base.base)


def flags(out, *more):
    parser = argparse.ArgumentParser()
    add_cpo_arguments(parser)
    args = parser.parse_args(["--samples", "3", "--sampling-steps", "2", "--lean", "1", *more])
    return argparse.Namespace(**vars(args) | {"out": str(out), "seed": 0, "batch": 4})


def test_held_out_pictures_are_never_trained_on():
    data = Paintings(CRITERIA, np.arange(400), [str(i) for i in range(400)], np.zeros((400, len(CRITERIA)), np.int8))
    held = held_out(data)
    assert held.images[:4].tolist() == [8, 9, 18, 19] and len(held) == 32
    assert not set(held.captions) & set(data.split("train").captions)


def test_equal_models_differ_nowhere(tmp_path, capsys):
    data, base = world(20)
    auxiliary, target, args = moved(base.with_adapter(2)).frozen_copy(), base.with_adapter(2).frozen_copy(), flags(tmp_path)
    columns = CRITERIA.columns("Hue")
    held = held_out(data)
    got = report(args, held, base, auxiliary, target, columns, cpo_step(args, held, base, auxiliary, columns))
    assert got == json.loads((tmp_path / "report.json").read_text()) and got["held_out"] == 4
    assert got["errors"]["base"] == got["errors"]["target"] and len(got["errors"]["base"]["per_t"]) == 10
    assert got["errors"]["base"]["mean"] == pytest.approx(np.mean(got["errors"]["base"]["per_t"]))
    assert len({row["mean"] for row in got["errors"].values()}) == 3                  # told or not, adapted or not: that differs
    assert got["log_ratio"]["base"] == got["log_ratio"]["target"] and got["log_ratio"]["base"]["mean"] != 0
    assert got["log_ratio"]["difference"] == {"mean": 0, "ci": [0, 0]}
    assert (got["cpo"]["margin"], got["cpo"]["accuracy"]) == (0, 0) and got["cpo"]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert got["cpo"]["winner"] == got["cpo"]["winner_ref"] > 0 and None not in got["cpo"]["per_t"]["winner"]
    assert 0 <= got["agreement"] <= 1
    picture = np.asarray(Image.open(tmp_path / "report.png"))
    rows = picture.shape[0] // 2
    assert (picture[26:26 + 48] == picture[rows + 24:rows + 24 + 48]).all()           # the two rows below their titles
    assert table(got) in capsys.readouterr().out and "no exact critic" in table(got)


def test_another_target_shows(tmp_path):
    data, base = world(20)
    auxiliary, args = moved(base.with_adapter(2)).frozen_copy(), flags(tmp_path, "--name", "other.one")
    held = held_out(data)
    got = report(args, held, base, auxiliary, auxiliary, [0], cpo_step(args, held, base, auxiliary, [0]))
    assert (tmp_path / "report_other.one.json").is_file() and (tmp_path / "report_other.one.png").is_file()
    assert got["errors"]["target"]["mean"] != got["errors"]["base"]["mean"] and got["cpo"]["margin"] != 0
    rows = got["log_ratio"]
    assert rows["difference"]["mean"] == pytest.approx(rows["target"]["mean"] - rows["base"]["mean"], abs=1e-12) != 0
    assert rows["difference"]["ci"][0] < rows["difference"]["mean"] < rows["difference"]["ci"][1]
    # which prompts are compared: the chosen leaf's two sides for samples, the annotation and its opposite for held-out pictures
    leaf, captions = CRITERIA.leaves[0], ["a boat", "a tree", "a boat"]
    sides = [Prompt(c, (leaf.positive,)) for c in captions], [Prompt(c, (), (leaf.negative,)) for c in captions]
    with torch.no_grad():
        images = base.sample(captions, guidance=args.guidance, steps=2).clamp(-1, 1)
        assert rows["base"]["mean"] == pytest.approx(log_ratio(errors(auxiliary, images, *sides)).mean(), abs=1e-12)
        own, opposite = ([CRITERIA.prompt(c, sign * a) for c, a in zip(held.captions, held.annotations)] for sign in (1, -1))
        right = errors(auxiliary, held.images, own, opposite)
        plain = errors(base, held.images, [Prompt(c) for c in held.captions], own)
    assert got["agreement"] == np.mean(right[..., 1].mean(1) > right[..., 0].mean(1))
    assert got["errors"]["auxiliary_told"]["mean"] == pytest.approx(right[..., 0].mean())
    assert [got["errors"][name]["mean"] for name in ("base", "base_told")] == pytest.approx(plain.mean((0, 1)), rel=1e-6)
    assert abs(plain[..., 0].mean() / plain[..., 1].mean() - 1) > 1e-5


def test_without_an_auxiliary_or_held_out_pictures(tmp_path):
    data, base = world(10)
    got = report(flags(tmp_path), held_out(data), base, None, base, [0])
    assert got["held_out"] == 2 and set(got["errors"]) == {"base", "target", "base_told"} and not {"cpo", "log_ratio", "agreement"} & set(got)
    auxiliary = moved(base.with_adapter(2)).frozen_copy()
    got = report(flags(tmp_path), held_out(data.take(range(8))), base, auxiliary, base, [0])
    assert got["held_out"] == 0 and got["errors"] == {} and "cpo" not in got and set(got["log_ratio"]) == {"base", "target", "difference"}


# ---- stage 2 as train_cpo.py runs it, on the world above

STAGE_2 = ["--weights", "unused", "--device", "cpu", "--steps", "1", "--sft-steps", "1", "--sampling-steps", "1", "--accumulate", "1", "--rank", "2"]


@pytest.fixture
def opened(monkeypatch):
    """(data, base) in the place of what --weights and --data would open."""
    pytest.importorskip("safetensors")
    data, base = world(20)
    monkeypatch.setattr(finetune, "start", lambda args: (data, base))
    return data, base


def test_each_part_of_the_data_has_its_use(opened, tmp_path, monkeypatch):
    """Sixteen of the twenty pictures train the auxiliary and the target; the report's log is of the four that are held out, taken once."""
    drawn, taken, batch, take = [], [], LatentPaintings.batch, LatentPaintings.take
    monkeypatch.setattr(LatentPaintings, "batch", lambda self, indices: drawn.append(len(self)) or batch(self, indices))
    monkeypatch.setattr(LatentPaintings, "take", lambda self, indices: taken.append(list(indices)) or take(self, indices))
    got = train_cpo.main([*STAGE_2, "--out", str(tmp_path), "--samples", "2", "--criteria", "Hue"])
    assert drawn[:2] == [16, 16] and len(drawn) > 2 and set(drawn[2:]) == {4}
    assert taken.count([8, 9, 18, 19]) == 1 and got["held_out"] == 4 and got["cpo"]["margin"] is not None


def test_the_files_hold_the_averaged_adapter(opened, tmp_path):
    train_cpo.main([*STAGE_2, "--out", str(tmp_path), "--samples", "0"])
    model, state = opened[1].with_adapter(2), load_checkpoint(tmp_path / "target.pt")
    assert any(not torch.equal(state["ema"][name], x) for name, x in state["model"].items())
    model.load_state_dict(state["ema"])
    for file in ("target", "target_kohya"):
        got = lora.load(tmp_path / f"{file}.safetensors", {"unet": opened[1].base.parts.unet})["unet"]
        assert got.keys() == model.adapter.pairs().keys()
        assert all(torch.equal(x, y) for name, pair in model.adapter.pairs().items() for x, y in zip(got[name], pair))


@pytest.mark.parametrize("method", ["esd", "sft"])
def test_every_method_ends_with_a_report(opened, tmp_path, method):
    lora.save(moved(opened[1].with_adapter(2)).adapter, tmp_path / "judge.safetensors")
    got = train_cpo.main([*STAGE_2, "--out", str(tmp_path), "--samples", "2", "--method", method, "--lora", str(tmp_path / "judge.safetensors")])
    assert got["cpo"]["margin"] is not None and got["cpo"]["winner"] > 0


def test_a_stage_trains_as_its_flags_say(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    seen, (data, base) = {}, world(10)
    monkeypatch.setattr(finetune, "fit", lambda model, step, recipe, path, **named: seen.update(named) or (model, {}))
    args = argparse.Namespace(out=str(tmp_path), rank=2, seed=3, accumulate=3, batch=1, resume=True, save_every=7, sample_every=5)
    finetune.train(args, data, base, None, "x", 1, 1e-3, {"made": "of"})
    assert (seen["accumulate"], seen["seed"], seen["resume"], seen["save_every"], seen["sample_every"]) == (3, 3, True, 7, 5)
    parts = base.base.parts
    assert seen["run"]["base"] == fingerprint(parts.unet, *parts.encoders) and seen["run"]["made"] == "of"


def test_an_auxiliary_without_its_checkpoint_is_used(opened, tmp_path, capsys):
    # brought from elsewhere, or its .pt was deleted: training would overwrite it
    path = tmp_path / "auxiliary.safetensors"
    lora.save(moved(opened[1].with_adapter(2)).adapter, path)
    before = path.read_bytes()
    train_cpo.main([*STAGE_2, "--out", str(tmp_path), "--samples", "0"])
    assert path.read_bytes() == before and not path.with_suffix(".pt").exists() and (tmp_path / "target.safetensors").is_file()
    assert f"{path}: used as it is; delete it to train another" in capsys.readouterr().out
