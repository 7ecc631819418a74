"""The training loop and the scripts: what is trained, what is frozen, what a resumed run gives, what is written."""
import argparse
import copy
import json
import math
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import sample
import train_cpo
import train_sft
from nanocpo import cli
from nanocpo.cli import command, pick_device
from nanocpo.criteria import Criteria, CriteriaError, Prompt
from nanocpo.data import Batch, from_painter
from nanocpo.evaluate import evaluate, unfit
from nanocpo.losses import sft_loss
from nanocpo.model import Model, load_checkpoint, load_model, save_atomic
from nanocpo.train import Recipe, changed, draw_t, drop_caption, finished, fit, load_data, noised, summarize
from nanocpo.unet import UNetConfig

TINY = UNetConfig(channels=(16, 32), depth=(0, 0), heads=(2, 2), groups=8, context_dim=16, vector_dim=16)
DATA = from_painter(count=60, seed=1)
CRITERIA = DATA.criteria


def tiny_model(seed=0):
    torch.manual_seed(seed)
    return Model(CRITERIA, sorted(set(DATA.captions)), TINY, text_dim=16)


@pytest.fixture
def tiny(monkeypatch):
    """The scripts train a model of this size from nothing, not the toy's."""
    monkeypatch.setattr(train_sft, "Model", partial(Model, unet=TINY, text_dim=16))


def plain(captions):
    return [CRITERIA.prompt(caption) for caption in captions]


def sft_step(model, generator):
    batch = DATA.batch(torch.randint(len(DATA), (8,), generator=generator).numpy())
    xt, t, _, goal = noised(model, batch.images, generator)
    return *sft_loss(model(xt, t, plain(batch.captions)), goal), t


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def cpo_arguments(*flags):
    parser = argparse.ArgumentParser()
    train_cpo.add_common_arguments(parser)
    train_cpo.add_sft_arguments(parser)
    train_cpo.add_cpo_arguments(parser)
    return parser.parse_args(["--batch", "8", "--steps", "4", "--sample-every", "0", "--device", "cpu", *flags])


# ---------------------------------------------------------------- the loop

def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    a, b, c = (fit(tiny_model(), sft_step, Recipe(5, 1e-3), tmp_path / f"{i}.pt", name="x", seed=seed)[0]
               for i, seed in enumerate((3, 3, 4)))
    assert same(a, b) and not same(a, c)


def test_resumed_run_equals_uninterrupted_run(tmp_path):
    whole = fit(tiny_model(), sft_step, Recipe(12, 1e-3), tmp_path / "whole.pt", name="x")[0]
    calls = []

    def stops(model, generator):
        calls.append(1)
        if len(calls) == 9:                                       # two steps after the checkpoint of step 7: they are lost
            raise KeyboardInterrupt
        return sft_step(model, generator)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_model(), stops, Recipe(12, 1e-3), tmp_path / "cut.pt", name="x", save_every=7)
    assert not finished(tmp_path / "cut.pt")
    log = tmp_path / "cut.jsonl"
    log.write_text(log.read_text().replace('"seconds": ', '"seconds": 1000'))        # as if it had taken longer
    model = tiny_model(seed=99)                                   # everything must come from the file, not from this start
    again = fit(model, sft_step, Recipe(12, 1e-3), tmp_path / "cut.pt", name="x", resume=True, save_every=7)[0]
    assert same(whole, again) and finished(tmp_path / "cut.pt")
    logs = [[json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in ("whole", "cut")]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]] == list(range(1, 13))
    assert logs[0][-1]["loss"] == logs[1][-1]["loss"] and logs[1][-1]["seconds"] >= 1000           # they are counted on
    with pytest.raises(ValueError, match="cut.pt belongs to another run .steps.; resume"):
        fit(tiny_model(), sft_step, Recipe(13, 1e-3), tmp_path / "cut.pt", name="x", resume=True)


@pytest.mark.parametrize("name, other", [("lr", dict(recipe=Recipe(3, 2e-3))), ("seed", dict(seed=1)), ("data", dict(run={"data": "b"}))])
def test_only_the_same_run_is_resumed(tmp_path, name, other):
    common = dict(recipe=Recipe(3, 1e-3), name="x", seed=0, run={"data": "a"})
    start = lambda **flags: fit(tiny_model(), sft_step, path=tmp_path / "x.pt", **common | flags)
    start()
    start(resume=True)
    with pytest.raises(ValueError, match=f"x.pt belongs to another run .{name}.; resume"):
        start(resume=True, **other)


def test_a_run_of_another_tree_is_not_resumed(tmp_path):
    fit(tiny_model(), sft_step, Recipe(1, 1e-3), tmp_path / "x.pt", name="x")
    model = tiny_model()
    tree = CRITERIA.to_dict()
    tree["children"].reverse()                                    # the same shapes, other meanings
    model.criteria = Criteria(tree)
    with pytest.raises(ValueError, match="another run .tree."):
        fit(model, sft_step, Recipe(1, 1e-3), tmp_path / "x.pt", name="x", resume=True)


def test_a_torn_line_of_the_log_is_left_out_on_resuming(tmp_path):
    fit(tiny_model(), sft_step, Recipe(3, 1e-3), tmp_path / "x.pt", name="x")
    log = tmp_path / "x.jsonl"
    log.write_text(log.read_text()[:-40])
    fit(tiny_model(), sft_step, Recipe(3, 1e-3), tmp_path / "x.pt", name="x", resume=True)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2]


def test_a_window_without_a_sample_that_counts_is_logged_as_null(tmp_path):
    def nothing_counts(model, generator):
        loss, logs, t = sft_step(model, generator)
        return loss, logs | {"valid": torch.zeros(8)}, t
    _, line = fit(tiny_model(), nothing_counts, Recipe(2, 1e-3), tmp_path / "x.pt", name="x")
    assert line["loss"] is None and line["valid"] == 0


def test_without_resume_a_run_starts_anew(tmp_path):
    fit(tiny_model(), sft_step, Recipe(2, 1e-3), tmp_path / "x.pt", name="x")
    fit(tiny_model(), sft_step, Recipe(3, 1e-3), tmp_path / "x.pt", name="x")
    steps = [json.loads(line)["step"] for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_one_step_moves_every_parameter_and_lowers_the_loss_on_a_fixed_batch(tmp_path):
    def fixed(model, generator):
        return sft_step(model, torch.Generator().manual_seed(7))
    model = tiny_model()
    before, start = fixed(model, None)[0].item(), model.frozen_copy()
    fit(model, fixed, Recipe(1, 1e-3, warmup=1), tmp_path / "x.pt", name="x")
    moved = {name: not torch.equal(p, q) for (name, p), q in zip(model.named_parameters(), start.parameters())}
    still = [name for name, yes in moved.items() if not yes]
    assert not still, still
    assert fixed(model, None)[0].item() < before


def test_accumulation_is_the_mean_over_batches(tmp_path):
    """One step on six pictures, and on three batches of two: the same gradient and the same log."""
    model, t, noise, found = tiny_model(), torch.tensor([1, 200, 400, 600, 800, 990]), torch.randn(6, 12, 16, 16), []
    for batches in ([[0, 1, 2, 3, 4, 5]], [[0, 1], [2, 3], [4, 5]]):
        left = iter(batches)

        def step(model, generator):
            i = next(left)
            batch = DATA.batch(i)
            xt, times, _, goal = noised(model, batch.images, generator, t[i], noise[i])
            return *sft_loss(model(xt, times, plain(batch.captions)), goal), times
        trained = copy.deepcopy(model)
        _, line = fit(trained, step, Recipe(1, 1e-3, clip=1e9), tmp_path / "x.pt", name="x", accumulate=len(batches))
        assert next(left, None) is None                           # all were drawn
        found.append(([p.grad for p in trained.parameters() if p.grad is not None], [x for x in line["per_t"]["loss"] if x is not None]))
    (whole, log), (parts, other) = found
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert len(log) == 6 and log == pytest.approx(other, rel=1e-4)


def test_average_follows_with_the_stated_decay(tmp_path):
    """(1 + step) / (10 + step), at most Recipe.ema."""
    seen, model = [], tiny_model()
    weights = lambda: model.unet.conv_in.weight.detach().clone()

    def step(model, generator):
        seen.append(weights())
        return sft_step(model, generator)
    average, _ = fit(model, step, Recipe(4, 1e-2, warmup=1, ema=0.25), tmp_path / "x.pt", name="x")
    by_hand = seen[0]
    for decay, now in zip((1 / 10, 2 / 11, 0.25, 0.25), (*seen[1:], weights()), strict=True):
        by_hand = decay * by_hand + (1 - decay) * now
    torch.testing.assert_close(average.unet.conv_in.weight, by_hand)
    assert torch.equal(load_model(tmp_path / "x.pt").unet.conv_in.weight, average.unet.conv_in.weight)


def test_the_optimizer_gets_the_rate_of_the_schedule(tmp_path):
    recipe = Recipe(10, 1e-3, warmup=2)
    fit(tiny_model(), sft_step, recipe, tmp_path / "x.pt", name="x")
    rates = {group["lr"] for group in load_checkpoint(tmp_path / "x.pt")["optimizer"]["param_groups"]}
    assert rates == {recipe.lr_at(9)} and recipe.lr_at(9) == pytest.approx(1e-3 / 7)


def test_a_stage_trains_as_its_flags_say(tmp_path, monkeypatch):
    monkeypatch.setattr(train_sft, "fit", lambda *arguments, **named: (arguments, named))
    args = cpo_arguments("--resume", "--bf16", "--accumulate", "2", "--seed", "3", "--save-every", "7", "--out", str(tmp_path))
    (model, step, recipe, path), named = train_sft.run_stage(args, tiny_model(), "step", "x", 9, 1e-3, {})
    assert (step, recipe.steps, recipe.lr, path) == ("step", 9, 1e-3, tmp_path / "x.pt")
    assert [named[key] for key in ("resume", "bf16", "accumulate", "seed", "save_every", "sample_every")] == [True, True, 2, 3, 7, 0]
    flawed, mixed = (load_data(cpo_arguments("--data", regime, "--count", "200", "--seed", "3")) for regime in ("flawed", "mixed"))
    assert (mixed.annotations < 0).sum(1).min() < 4 and mixed.digest() == from_painter(count=200, regime="mixed", seed=3).digest()
    assert flawed.digest() == from_painter(count=200, seed=3).digest()


def test_gradient_is_clipped_and_a_broken_one_stops_the_run(tmp_path):
    def scaled(factor):
        def step(model, generator):
            loss, logs, t = sft_step(model, generator)
            return loss * factor, logs, t
        return step
    for factor, expected in ((1e3, 0.5), (1e-3, None)):           # the gradient that the optimiser saw is still there
        model = tiny_model()
        fit(model, scaled(factor), Recipe(1, 1e-3, clip=0.5), tmp_path / "x.pt", name="x")
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
        assert norm == pytest.approx(expected, rel=1e-3) if expected else norm < 0.1
    for path, kept in ((tmp_path / "x.pt", "last checkpoint stays in .*x.pt"), (tmp_path / "y.pt", "No checkpoint was written yet")):
        with pytest.raises(FloatingPointError, match=f"x, step 0.*{kept}"):
            fit(tiny_model(), scaled(float("nan")), Recipe(3, 1e-3), path, name="x")


def test_learning_rate_warms_up_holds_and_falls_to_zero():
    recipe = Recipe(100, 2.0, warmup=10, constant=0.5)
    assert recipe.lr_at(0) == pytest.approx(0.2) and recipe.lr_at(9) == recipe.lr_at(50) == 2.0
    assert recipe.lr_at(75) == pytest.approx(1.0) and recipe.lr_at(99) == pytest.approx(0.04)


def test_log_has_means_per_timestep_bin_over_the_samples_that_count():
    t = torch.tensor([0, 99, 100, 999])
    logs = {"loss": torch.tensor([1.0, 3.0, 5.0, 7.0]), "valid": torch.tensor([True, True, True, False])}
    line = summarize([(t, logs)], 1000)
    assert line["loss"] == 3.0 and line["valid"] == 0.75
    assert line["per_t"]["loss"] == [2.0, 5.0] + [None] * 8


def test_t_is_stratified_over_the_whole_range_and_leans_to_the_noisy_half():
    t = draw_t(8, 1000, torch.Generator().manual_seed(0))
    edges = [1000 * (i / 8) ** 0.7 for i in range(9)]
    assert t.dtype == torch.int64 and all(math.floor(low) <= x <= high for low, high, x in zip(edges, edges[1:], t.tolist()))
    t = draw_t(40000, 1000, torch.Generator().manual_seed(0))
    assert t.min() == 0 and t.max() == 999
    assert abs((t >= 500).float().mean() - (1 - 0.5 ** (1 / 0.7))) < 0.01 and abs(t.float().mean() - 1000 / 1.7) < 2
    assert abs(draw_t(40000, 1000, torch.Generator(), 0.4).float().mean() - 1000 / 1.4) < 2


def test_noised_draws_t_over_the_whole_range_and_uses_what_it_is_given():
    model, generator = tiny_model(), torch.Generator().manual_seed(0)
    images = DATA.batch([0] * 60).images.repeat(200, 1, 1, 1)
    t = noised(model, images[:12000], generator)[1]
    assert t.min() == 0 and t.max() == 999
    xt, t, noise, goal = noised(model, images[:2], generator, torch.tensor([5, 5]), torch.ones(2, 12, 16, 16))
    assert t.tolist() == [5, 5] and torch.equal(noise, torch.ones(2, 12, 16, 16)) and torch.equal(xt[0], xt[1])
    x0 = model.latents.encode(images[:2])
    torch.testing.assert_close(model.diffusion.x0_and_eps(goal, xt, t)[0], x0, rtol=0, atol=1e-5)


def test_bfloat16_is_for_the_models_and_not_for_the_noised_pictures():
    once = lambda: noised(tiny_model(), DATA.batch(range(8)).images, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        low = once()
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(low, once(), strict=True))


def test_captions_are_dropped_with_the_stated_probability():
    dropped = drop_caption(["a boat"] * 10000, torch.Generator().manual_seed(0), 0.1)
    assert abs(dropped.count("") / 10000 - 0.1) < 0.01 and set(dropped) == {"", "a boat"}


def test_device_is_picked_once_and_can_be_named():
    assert pick_device("cpu").type == "cpu" and pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(argparse.ArgumentTypeError, match="torch cannot use nonsense"):
        pick_device("nonsense")


def test_what_the_user_can_mend_is_told_in_one_line_and_a_bug_with_its_traceback(monkeypatch):
    def fails(error):
        def main():
            raise error
        return main
    for error in (CriteriaError("no dimension"), FileNotFoundError("no file"), FloatingPointError("diverged")):
        with pytest.raises(SystemExit, match=f"^error: {error}$"):
            command(fails(error))
    with pytest.raises(SystemExit, match=r"^error: the GPU's memory is full: a smaller --batch .*\(Tried to allocate 2 GiB\)$"):
        command(fails(torch.cuda.OutOfMemoryError("Tried to allocate 2 GiB. GPU 0 has a total capacity of 1 GiB")))
    for bug in (KeyError("a bug"), json.JSONDecodeError("no JSON, no file named", "", 0), UnicodeDecodeError("utf-8", b"x", 0, 1, "bad")):
        with pytest.raises(type(bug)):
            command(fails(bug))
    monkeypatch.setattr(cli.sys, "flags", argparse.Namespace(dev_mode=True))         # python -X dev
    with pytest.raises(CriteriaError):
        command(fails(CriteriaError("no dimension")))


# ---------------------------------------------------------------- the prompts of both stages

def test_sft_prompts_are_subsets_of_the_annotation_and_every_kind_occurs():
    batch = DATA.batch(np.arange(60).repeat(20))
    prompts = train_sft.attribute_prompts(CRITERIA, batch, torch.Generator().manual_seed(0))
    kinds = {"whole": 0, "part": 0, "all positive": 0, "all negative": 0, "caption only": 0, "nothing": 0}
    for prompt, caption, annotation in zip(prompts, batch.captions, batch.annotations):
        full = CRITERIA.prompt(caption, annotation)
        assert set(prompt.positive) <= set(full.positive) and set(prompt.negative) <= set(full.negative)
        assert prompt.caption in (caption, "")
        size = len(prompt.positive) + len(prompt.negative)
        kinds["whole"] += size == len(full.positive) + len(full.negative)
        kinds["part"] += 0 < size < len(full.positive) + len(full.negative)
        kinds["all positive"] += prompt.positive == full.positive and not prompt.negative
        kinds["all negative"] += prompt.negative == full.negative and not prompt.positive
        kinds["caption only"] += size == 0 and prompt.caption != ""
        kinds["nothing"] += size == 0 and prompt.caption == ""
    # of 1,200: 50 % whole, 20 % a random part, 10 % each all of one side and no attribute at all, a tenth of these without caption
    assert kinds["whole"] > 540 and all(kinds[side] > 80 for side in ("part", "all positive", "all negative", "caption only")), kinds
    assert kinds["nothing"] >= 8


def test_base_prompts_are_captions_only():
    batch = DATA.batch(np.arange(60))
    prompts = train_sft.caption_prompts(CRITERIA, batch, torch.Generator().manual_seed(0))
    assert not any(prompt.positive or prompt.negative for prompt in prompts)
    assert 45 < sum(prompt.caption == caption for prompt, caption in zip(prompts, batch.captions)) < 60


@pytest.mark.parametrize("pairs, win, lose", [
    ("own", [1, 0, 0, 1], [0, -1, 0, 0]), ("completed", [1, 1, 0, 1], [0, -1, 0, 0]), ("opposite", [1, 1, 0, 1], [-1, -1, 0, -1]),
    ("all", [1, 1, 1, 1], [-1, -1, -1, -1])])
def test_preference_prompts_by_hand(pairs, win, lose):
    criteria = CRITERIA.select(["Horizon", "Color Relations"])
    batch = Batch(None, ["a boat"], np.array([[1, -1, 0, 1]], np.int8))
    got = train_cpo.preference_prompts(criteria, batch, [0, 1, 2, 3], pairs)
    assert got == ([criteria.prompt("a boat", win)], [criteria.prompt("a boat", lose)])
    assert batch.annotations.tolist() == [[1, -1, 0, 1]]          # the data is not written to
    flipped = train_cpo.preference_prompts(criteria, Batch(None, ["a boat"], -batch.annotations), [0, 1, 2, 3], pairs)
    assert (flipped == got) == (pairs in ("opposite", "all"))     # where the verdicts' signs do not matter, nor do wrong ones


def test_branch_prompts_share_their_context():
    batch = DATA.batch(range(60))
    columns = CRITERIA.columns("Color Relations")
    phrases = {p for i in columns for p in (CRITERIA.leaves[i].positive, CRITERIA.leaves[i].negative)}
    for pairs in ("own", "completed", "opposite", "all"):
        for win, lose in zip(*train_cpo.preference_prompts(CRITERIA, batch, columns, pairs)):
            assert set(win.positive) - phrases == set(lose.positive) - phrases
            assert set(win.negative) - phrases == set(lose.negative) - phrases
            assert not set(win.negative) & phrases and not set(lose.positive) & phrases
            assert win.caption == lose.caption


def test_stage_1_trains_on_the_training_part(tmp_path, monkeypatch):
    seen, original = [], train_sft.sft_step
    monkeypatch.setattr(train_sft, "sft_step", lambda args, data, prompts: seen.append(data.digest()) or original(args, data, prompts))
    args = cpo_arguments("--out", str(tmp_path), "--base-steps", "1", "--sft-steps", "1")
    train_sft.ensure_models(args, DATA)
    assert seen == [DATA.split("train").digest()] * 2


# ---------------------------------------------------------------- stage 2

@pytest.mark.parametrize("method", ["cpo", "dpo", "sft"])
def test_only_the_target_moves(tmp_path, method):
    base, auxiliary = tiny_model().frozen_copy(), tiny_model(seed=5).frozen_copy()
    copies = base.frozen_copy(), auxiliary.frozen_copy()
    args = cpo_arguments("--out", str(tmp_path), "--method", method)
    target, line = train_cpo.align(args, DATA, base, auxiliary)
    assert same(base, copies[0]) and same(auxiliary, copies[1])
    assert target is not base and not same(target, base)
    assert all(p.grad is None and not p.requires_grad for model in (base, auxiliary) for p in model.parameters())
    assert not base.training and not auxiliary.training


@pytest.mark.parametrize("method", ["cpo", "esd", "dpo", "sft"])
def test_only_the_training_part_is_aligned_on(tmp_path, method):
    """All other pictures have a caption that no model knows, so that one of them would stop the run."""
    data = replace(DATA, captions=[caption if i % 10 < 8 else "a ghost" for i, caption in enumerate(DATA.captions)])
    base, auxiliary = tiny_model().frozen_copy(), tiny_model(seed=5).frozen_copy()
    args = cpo_arguments("--out", str(tmp_path), "--method", method, "--best", "1")
    train_cpo.align(args, data, base, auxiliary)
    with pytest.raises(ValueError, match="unknown caption 'a ghost'"):
        train_cpo.method_step(args, data.split("test"), base, auxiliary)(tiny_model(), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("criteria", [None, ["Color Relations"]])
def test_sft_keeps_the_pictures_with_the_fewest_negative_attributes(criteria):
    negative = (DATA.annotations[:, CRITERIA.columns(criteria)] < 0).sum(1)
    most = np.sort(negative)[5]                                   # of the best tenth of 60
    assert (negative > most).sum() > 20
    data = replace(DATA, captions=[c if n <= most else "a ghost" for c, n in zip(DATA.captions, negative)])
    args = cpo_arguments("--method", "sft", "--best", "0.1", *(["--criteria", *criteria] if criteria else []))
    for seed in range(3):
        train_cpo.method_step(args, data, None, None)(tiny_model(), torch.Generator().manual_seed(seed))


def test_first_cpo_step_has_loss_log_2_and_a_gradient():
    base, auxiliary = tiny_model().frozen_copy(), tiny_model(seed=5).frozen_copy()
    target = base.frozen_copy().requires_grad_(True)
    step = train_cpo.cpo_step(cpo_arguments(), DATA, base, auxiliary, list(range(len(CRITERIA))))
    loss, logs, t = step(target, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6) and logs["margin"].abs().max() < 1e-6
    assert {"winner", "winner_ref", "loser", "loser_ref", "margin", "accuracy", "weight", "lam", "gap"} <= set(logs)
    loss.backward()
    assert sum(p.grad.abs().sum() for p in target.parameters() if p.grad is not None) > 0


def test_a_cpo_step_takes_rule_strength_and_beta_from_the_flags():
    base, auxiliary, target = (tiny_model(seed).frozen_copy() for seed in range(3))

    def logs(*flags):
        step = train_cpo.cpo_step(cpo_arguments(*flags), DATA, base, auxiliary, list(range(len(CRITERIA))))
        return step(target, torch.Generator().manual_seed(0))[1]
    assert logs()["lam"].tolist() == pytest.approx([0.55] * 8)            # the default: constant
    assert logs("--stabilizer", "none")["lam"].tolist() == [1] * 8 and logs("--criteria", "Finish")["lam"].tolist() == [0] * 8
    torch.testing.assert_close(logs("--beta", "4")["margin"], 2 * logs("--beta", "2")["margin"])


def test_a_branch_is_pulled_more_gently_unless_told_otherwise():
    parser = argparse.ArgumentParser()
    train_cpo.add_cpo_arguments(parser)
    flags = ("", "--criteria Tone", "--strength 0 --beta 9", "--criteria Tone --strength 0.9 --beta 2")
    assert [train_cpo.strength_and_beta(parser.parse_args(f.split())) for f in flags] == [(0.55, None), (0, 1), (0, 9), (0.9, 2)]


def test_a_branch_is_learned_at_pictures_that_are_right_in_it(monkeypatch):
    """--paint: what the auxiliary paints when the branch is positive and the rest as annotated; and the step draws from these."""
    args, columns = cpo_arguments("--criteria", "Tone", "--paint", "7"), CRITERIA.columns(["Tone"])
    base, auxiliary, asked = tiny_model().frozen_copy(), tiny_model(seed=5).frozen_copy(), []

    def sampled(prompts, steps, seed):
        asked.extend(prompts)
        return torch.full((len(prompts), 3, 32, 32), 0.5)
    monkeypatch.setattr(auxiliary, "sample", sampled)
    train = DATA.split("train")
    new = train_cpo.painted(args, train, auxiliary, columns)
    others = [i for i in range(len(CRITERIA)) if i not in columns]
    assert len(new) == 7 and new.captions == train.captions[:7] and (new.images == 191).all()
    assert (new.annotations[:, columns] == 1).all() and (new.annotations[:, others] == train.annotations[:7, others]).all()
    assert (train.annotations[:7, columns] < 0).any()             # the data themselves stay
    assert asked == [CRITERIA.prompt(c, a) for c, a in zip(new.captions, new.annotations)]

    def drawn(*flags):
        step, seen = train_cpo.method_step(cpo_arguments(*flags), train, base, auxiliary), []
        with monkeypatch.context() as patch:
            patch.setattr(train_cpo, "noised", lambda model, images, *rest: seen.append(images) or noised(model, images, *rest))
            step(base, torch.Generator().manual_seed(0))
        return seen[0]
    grey = lambda images: (images - 0.5).abs().max() < 0.01
    assert grey(drawn("--criteria", "Tone", "--paint", "7"))
    assert not grey(drawn("--criteria", "Tone", "--paint", "0")) and not grey(drawn("--paint", "7"))


def test_cpo_leans_to_noisy_timesteps_as_told():
    base = tiny_model().frozen_copy()
    for lean, low, high in ((0.01, 950, 999), (100, 0, 300)):     # u^100 is near 0 for seven of eight u
        step = train_cpo.cpo_step(cpo_arguments("--lean", str(lean)), DATA, base, base, [0])
        t = step(base.frozen_copy(), torch.Generator().manual_seed(0))[2]
        assert ((t >= low) & (t <= high)).sum() >= 7


def test_cpo_shows_attributes_to_the_auxiliary_only():
    base, auxiliary = tiny_model().frozen_copy(), tiny_model(seed=5).frozen_copy()
    target, seen = base.frozen_copy(), {}
    for name, model in (("base", base), ("target", target), ("auxiliary", auxiliary)):
        def keep(module, arguments, name=name, model=model):
            prompts = arguments[2]
            seen[name] = prompts if torch.is_tensor(prompts) else model.text.tokens(prompts), arguments[0], arguments[1]
        model.register_forward_pre_hook(keep)
    train_cpo.cpo_step(cpo_arguments(), DATA, base, auxiliary, list(range(len(CRITERIA))))(target, torch.Generator().manual_seed(0))
    assert (seen["base"][0][:, 1:] == 0).all() and (seen["target"][0][:, 1:] == 0).all()
    win, lose = seen["auxiliary"][0].chunk(2)
    assert (win[:, 1:] == 1).any() and not (win[:, 1:] == 2).any() and (lose[:, 1:] == 2).any() and not (lose[:, 1:] == 1).any()
    for part in (1, 2):                                           # all four predictions at the same x_t and t
        first, second = seen["auxiliary"][part].chunk(2)
        assert torch.equal(first, second) and torch.equal(first, seen["target"][part]) and torch.equal(first, seen["base"][part])


def test_dpo_pairs_share_caption_t_and_noise_and_the_winner_has_fewer_negatives():
    base, seen = tiny_model().frozen_copy(), {}
    target = base.frozen_copy()
    target.register_forward_pre_hook(lambda module, arguments: seen.update(xt=arguments[0], t=arguments[1], tokens=arguments[2]))
    data = DATA.split("train")
    train_cpo.dpo_step(cpo_arguments(), data, base, list(range(len(CRITERIA))))(target, torch.Generator().manual_seed(0))
    (t_win, t_lose), (tokens_win, tokens_lose) = seen["t"].chunk(2), seen["tokens"].chunk(2)
    assert torch.equal(t_win, t_lose) and torch.equal(tokens_win, tokens_lose)
    xt_win, xt_lose = seen["xt"].chunk(2)
    a, s = base.diffusion.scales(t_win, xt_win)
    x0 = base.latents.encode(data.batch(range(len(data))).images)
    badness = (data.annotations < 0).sum(1)
    for i in range(len(t_win)):                                   # with the same noise the difference is a * (x0_win - x0_lose)
        difference = (xt_win[i] - xt_lose[i]) / a[i]
        pair = ((x0[:, None] - x0[None]) - difference).abs().amax((2, 3, 4))
        j = pair.argmin().item()
        assert pair.flatten()[j] < 1e-2 and badness[j // len(x0)] < badness[j % len(x0)]


def test_each_dpo_picture_is_compared_with_its_own_reference():
    """A target that is the reference has equal errors on both sides, picture by picture, and the loss log 2."""
    base = tiny_model().frozen_copy()
    loss, logs, _ = train_cpo.dpo_step(cpo_arguments(), DATA.split("train"), base, list(range(12)))(base, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)
    for side in ("winner", "loser"):
        torch.testing.assert_close(logs[side], logs[f"{side}_ref"])
    assert not torch.allclose(logs["winner"], logs["loser"])


def test_unfit_checkpoints_are_refused(tiny, tmp_path):
    train_sft.main(["--out", str(tmp_path), "--count", "40", "--base-steps", "1", "--sft-steps", "1", "--batch", "4", "--sample-every", "0"])
    args = cpo_arguments("--out", str(tmp_path))
    other = from_painter(Criteria.load().select("Composition"), 20)
    with pytest.raises(ValueError, match="base.pt.*another tree"):
        train_sft.ensure_models(args, other)
    strange = from_painter(count=20)
    strange.captions[0] = "a cow"
    with pytest.raises(ValueError, match="base.pt.*captions"):
        train_sft.ensure_models(args, strange)


# ---------------------------------------------------------------- the scripts, 20 steps each

def test_scripts_from_nothing_to_a_report(tmp_path, capsys):
    common = ["--out", str(tmp_path), "--count", "100", "--batch", "4", "--device", "cpu", "--sample-every", "20"]
    report = train_cpo.main([*common, "--base-steps", "20", "--sft-steps", "20", "--steps", "20", "--samples", "16", "--sampling-steps", "3"])
    assert list(report["rows"]) == ["base", "auxiliary", "auxiliary_prompted", "auxiliary_guided", "target"]
    for row in report["rows"].values():
        assert {"neg", "neg_ci", "pos", "caption", "diversity", "frechet", "by_root", "by_leaf"} <= set(row)
        assert row["neg"] + row["pos"] == pytest.approx(len(CRITERIA))
        assert sum(row["by_root"].values()) == pytest.approx(row["neg"])
    assert report["real_positive"]["neg"] < 0.5
    assert json.loads((tmp_path / "report.json").read_text()) == report
    files = ["base.pt", "auxiliary.pt", "target.pt", "base.jsonl", "target.jsonl", "report.png", "samples/target_00020.png"]
    assert all((tmp_path / name).stat().st_size > 0 for name in files)
    assert "target" in capsys.readouterr().out

    images = sample.main(["--checkpoint", str(tmp_path / "target.pt"), "--caption", "a boat", "--count", "2", "--steps", "2", "--judge",
                          "--device", "cpu", "--out", str(tmp_path / "grid.png")])
    assert images.shape == (2, 32, 32, 3) and (tmp_path / "grid.png").stat().st_size > 0
    guided = sample.main(["--checkpoint", str(tmp_path / "auxiliary.pt"), "--caption", "a boat", "--count", "2", "--steps", "2", "--positive",
                          "all", "--negative", "all", "--guidance", "2", "--device", "cpu", "--out", str(tmp_path / "grid.png")])
    assert not np.array_equal(guided, images)


def test_what_is_there_is_used_again(tiny, tmp_path):
    common = ["--out", str(tmp_path), "--count", "100", "--batch", "4", "--device", "cpu", "--sample-every", "0"]
    report = train_cpo.main([*common, "--base-steps", "2", "--sft-steps", "2", "--steps", "2", "--samples", "16", "--sampling-steps", "3"])
    before = (tmp_path / "base.pt").read_bytes(), (tmp_path / "auxiliary.pt").read_bytes()
    line = train_cpo.main([*common, "--criteria", "Color Relations", "--name", "colour", "--steps", "20", "--paint", "4", "--samples", "0"])
    assert line["step"] == 20 and (tmp_path / "colour.pt").exists()
    assert before == ((tmp_path / "base.pt").read_bytes(), (tmp_path / "auxiliary.pt").read_bytes())       # used, not remade

    kept = json.loads((tmp_path / "rows.json").read_text())              # the rows of base and auxiliary are not measured twice
    assert list(kept["rows"]) == ["base", "auxiliary", "auxiliary_prompted", "auxiliary_guided"]
    kept["rows"]["base"]["neg"] = 99
    (tmp_path / "rows.json").write_text(json.dumps(kept))
    for seed, neg in (("0", 99), ("1", report["rows"]["base"]["neg"])):   # with another seed everything is measured anew
        again = train_cpo.main([*common, "--name", "again", "--steps", "2", "--samples", "16", "--sampling-steps", "3", "--seed", seed])
        assert again["rows"]["base"]["neg"] == pytest.approx(neg, abs=4) and list(again["rows"])[-1] == "again"


def test_the_report_asks_each_model_in_its_way(tmp_path, monkeypatch):
    """The target sees plain captions; the rows that are kept belong to one base and one auxiliary."""
    asked, (base, auxiliary, target) = {}, (tiny_model(seed).frozen_copy() for seed in range(3))

    def spy(models, *settings):
        asked.clear()
        asked.update(models)
        return evaluate(models, *settings)
    monkeypatch.setattr(train_cpo, "evaluate", spy)
    args = cpo_arguments("--out", str(tmp_path), "--samples", "4", "--sampling-steps", "2")
    train_cpo.report(args, base, auxiliary, target, 0)
    of_auxiliary = {"auxiliary": "plain", "auxiliary_prompted": "prompted", "auxiliary_guided": "guided"}
    stage_1 = {"base": (base, "plain")} | {name: (auxiliary, kind) for name, kind in of_auxiliary.items()}
    assert asked == stage_1 | {"target": (target, "plain")}
    train_cpo.report(args, base, auxiliary, target, 0)
    assert asked == {"target": (target, "plain")}
    train_cpo.report(args, base, base, target, 0)                         # another auxiliary
    assert list(asked) == [*stage_1, "target"]
    train_cpo.report(changed(args, seed=1), base, base, target, 0)        # another seed
    assert list(asked) == [*stage_1, "target"]


def test_samples_go_towards_the_positive_and_away_from_the_negative(tmp_path, monkeypatch):
    seen, model = [], tiny_model()
    save_atomic(tmp_path / "x.pt", {"config": model.config, "criteria": CRITERIA.to_dict(), "model": model.state_dict(),
                                    "ema": model.state_dict(), "step": 1, "steps": 1})
    monkeypatch.setattr(Model, "sample", lambda self, *asked: seen.append(asked) or torch.zeros(len(asked[0]), 3, 32, 32))
    flags = ["--checkpoint", str(tmp_path / "x.pt"), "--caption", "a boat", "--count", "1", "--positive", "Level", "--negative", "blurred edges",
             "--seed", "4", "--steps", "9", "--eta", "0.5", "--device", "cpu", "--out", str(tmp_path / "x.png")]
    for guidance in ("2", "1"):
        sample.main([*flags, "--guidance", guidance])
    good, bad = ("level horizon",), ("blurred edges",)
    assert seen[0] == ([Prompt("a boat", good)], [Prompt("a boat", (), bad)], 2.0, 9, 0.5, 4)
    assert seen[1][0] == [Prompt("a boat", good, bad)]                    # without guidance one prompt carries both sides


def test_own_tree_and_captions_train_without_a_report(tiny, tmp_path, capsys):
    tree = {"name": "Mine", "children": [{"name": "Mood", "positive": "calm", "negative": "restless"}]}
    data = from_painter(count=12)
    rows = [{"file_name": f"{i:06d}.png", "caption": "a view", "positive": ["calm"] if i % 2 else [], "negative": [] if i % 2 else
             ["restless"]} for i in range(12)]
    data.export(tmp_path / "mine")
    (tmp_path / "mine" / "criteria.json").write_text(json.dumps(tree))
    (tmp_path / "mine" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = train_cpo.main(["--data", str(tmp_path / "mine"), "--out", str(tmp_path / "out"), "--base-steps", "2", "--sft-steps", "2", "--steps",
                           "2", "--batch", "4", "--sample-every", "0", "--device", "cpu"])
    assert line["step"] == 2 and (tmp_path / "out" / "target.pt").exists() and not (tmp_path / "out" / "report.json").exists()
    assert "no report" in capsys.readouterr().out
    model = load_model(tmp_path / "out" / "target.pt")
    with pytest.raises(ValueError, match="no measure for Mood, a view"):
        evaluate({"x": (model, "plain")}, 4)
    with pytest.raises(ValueError, match="--judge: the critic has no measure for Mood, a view"):
        sample.main(["--checkpoint", str(tmp_path / "out" / "target.pt"), "--judge"])


def test_exported_folder_trains_to_the_same_bytes_as_the_painter(tiny, tmp_path):
    from_painter(count=40, seed=0).export(tmp_path / "paintings")
    flags = ["--base-steps", "3", "--sft-steps", "3", "--batch", "8", "--sample-every", "0", "--device", "cpu"]
    a = train_sft.main(["--out", str(tmp_path / "a"), "--count", "40", *flags])
    b = train_sft.main(["--out", str(tmp_path / "b"), "--data", str(tmp_path / "paintings"), *flags])
    assert same(a[0], b[0]) and same(a[1], b[1])


def test_base_and_auxiliary_are_used_again_only_for_the_same_data(tiny, tmp_path, capsys):
    from_painter(count=12).export(tmp_path / "data")
    flags = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--base-steps", "1", "--sft-steps", "1", "--batch", "4",
             "--sample-every", "0", "--device", "cpu"]
    base, auxiliary = train_sft.main(flags)
    again = train_sft.main([*flags, "--sft-steps", "2"])
    assert same(base, again[0]) and same(auxiliary, again[1])
    assert "auxiliary.pt is used as it is (steps 1, not 2); delete it" in (out := capsys.readouterr().out) and "base.pt is" not in out
    train_sft.main([*flags[:2], "--out", str(tmp_path / "other"), *flags[4:], "--seed", "1"])
    with pytest.raises(ValueError, match="auxiliary.pt was made with another base than"):
        train_sft.main([*flags, "--base", str(tmp_path / "other" / "base.pt")])
    listing = tmp_path / "data" / "metadata.jsonl"
    listing.write_text("\n".join(listing.read_text().splitlines()[::-1]))
    with pytest.raises(ValueError, match="base.pt was made with another data than"):
        train_sft.main(flags)


def test_a_half_trained_auxiliary_is_no_teacher(tiny, tmp_path):
    args = cpo_arguments("--out", str(tmp_path), "--base-steps", "1", "--sft-steps", "2")
    train_sft.ensure_models(args, DATA)
    path = tmp_path / "auxiliary.pt"
    save_atomic(path, load_checkpoint(path) | {"step": 1})                # as if it had been killed
    train_sft.ensure_models(args, DATA)
    assert finished(path)


def test_a_report_is_only_written_of_the_painters_kind_of_picture(tmp_path):
    data = from_painter(count=64, seed=3)
    assert unfit(data) == ""
    noise = np.random.default_rng(0).integers(0, 256, data.images.shape, np.uint8)
    assert re.match("the critic agrees with [3-7].% of the annotations only", unfit(replace(data, images=noise)))
    assert unfit(replace(data, captions=["a cat"] * 64)) == "the critic has no measure for a cat"


@pytest.mark.parametrize("flags, words", [
    ("--name base", "name 'base'"), ("--name ./base", "no name for files"), ("--name Auxiliary_guided", "is taken by"),
    ("--strength 1", "'constant' needs less than 1"), ("--method esd --strength 2", "'constant' needs less than 1"),
    ("--method esd --stabilizer none --strength 1", "'constant' needs less than 1"),
    ("--samples 1", "two pictures"), ("--steps 0", "--steps: must be above 0, not 0"), ("--beta -1", "--beta: must be above 0"),
    ("--lr x", "--lr: invalid float value"), ("--batch 0", "--batch: must be above 0"), ("--seed -1", "--seed: must be above -1"),
    ("--lora x.safetensors", "--lora needs --weights"), ("--device nonsense", "--device: torch cannot use nonsense")])
def test_flags_that_make_no_sense_are_refused_before_anything_is_trained(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit):
        train_cpo.main([*flags.split(), "--out", str(tmp_path / "out")])
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_unknown_branch_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(CriteriaError, match="no dimension 'Colour'"):
        train_cpo.main(["--criteria", "Colour", "--count", "8", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
