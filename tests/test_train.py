"""The training loop, the flow of both stages and the scripts: what is trained, what is frozen, what
a resumed run gives, what is written."""
import copy
import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from toy_tiny import CRITERIA, DATA, plain, same, settings_of, tiny_model

import sample
import train_cpo
import train_sft
from nanocpo.criteria import Criteria, CriteriaError, Prompt
from nanocpo.losses import sft_loss
from nanocpo.method import add_noise, attribute_prompts, sft_step
from nanocpo.model import Model, load_model
from nanocpo.run import stages
from nanocpo.run.settings import METHODS
from nanocpo.run.stages import alignment_step, sft_loss_step, stage_1, stage_2
from nanocpo.toy.evaluate import evaluate
from nanocpo.toy.export import export
from nanocpo.toy.paintings import from_painter
from nanocpo.toy.world import Toy
from nanocpo.train import Recipe, TrainingState, fit
from nanocpo.utils.log import summarize
from nanocpo.utils.checkpoint import is_finished, load_checkpoint, save_checkpoint
from nanocpo.utils.muon import Muon


def denoise(model, generator):
    prompts = lambda criteria, batch, generator: plain(batch.captions)
    return sft_step(model, CRITERIA, DATA.draw(8, generator), prompts, generator, lean=0.7)


# ---------------------------------------------------------------- the loop

def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    a, b, c = (
        fit(tiny_model(), denoise, Recipe(5, 1e-3), tmp_path / f"{i}.pt", name="x", seed=seed)[0]
        for i, seed in enumerate((3, 3, 4)))
    assert same(a, b) and not same(a, c)


def test_resumed_run_equals_uninterrupted_run(tmp_path):
    whole = fit(tiny_model(), denoise, Recipe(12, 1e-3), tmp_path / "whole.pt", name="x")[0]
    calls = []

    def stops(model, generator):
        calls.append(1)
        if len(calls) == 9:  # two steps after the checkpoint of step 7: they are lost
            raise KeyboardInterrupt
        return denoise(model, generator)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_model(), stops, Recipe(12, 1e-3), tmp_path / "cut.pt", name="x", save_every=7)
    assert not is_finished(load_checkpoint(tmp_path / "cut.pt"))
    log = tmp_path / "cut.jsonl"
    # as if it had taken longer
    log.write_text(log.read_text().replace('"seconds": ', '"seconds": 1000'))
    model = tiny_model(seed=99)  # everything must come from the file, not from this start
    again = fit(model, denoise, Recipe(12, 1e-3), tmp_path / "cut.pt", name="x", resume=True,
                save_every=7)[0]
    assert same(whole, again) and is_finished(load_checkpoint(tmp_path / "cut.pt"))
    logs = [[json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
            for name in ("whole", "cut")]
    assert ([line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
            == list(range(1, 13)))
    # they are counted on
    assert logs[0][-1]["loss"] == logs[1][-1]["loss"] and logs[1][-1]["seconds"] >= 1000
    with pytest.raises(ValueError,
                       match="cut.pt belongs to another run .steps.; resume with the same"):
        fit(tiny_model(), denoise, Recipe(13, 1e-3), tmp_path / "cut.pt", name="x", resume=True)


@pytest.mark.parametrize("name, other", [
    ("lr", dict(recipe=Recipe(3, 2e-3))), ("seed", dict(seed=1)),
    ("data", dict(made_of={"data": "b"}))])
def test_only_the_same_run_is_resumed(tmp_path, name, other):
    common = dict(recipe=Recipe(3, 1e-3), name="x", seed=0, made_of={"data": "a"})
    start = lambda **flags: fit(tiny_model(), denoise, path=tmp_path / "x.pt", **common | flags)
    start()
    start(resume=True)
    with pytest.raises(ValueError,
                       match=f"x.pt belongs to another run .{name}.; resume with the same "
                                         "flags"):
        start(resume=True, **other)


def test_a_run_of_another_tree_is_not_resumed(tmp_path):
    fit(tiny_model(), denoise, Recipe(1, 1e-3), tmp_path / "x.pt", name="x")
    model = tiny_model()
    tree = CRITERIA.to_dict()
    tree["children"].reverse()                                    # the same shapes, other meanings
    model.criteria = Criteria(tree)
    with pytest.raises(ValueError, match="belongs to another run .tree.;"):
        fit(model, denoise, Recipe(1, 1e-3), tmp_path / "x.pt", name="x", resume=True)


def test_a_torn_line_of_the_log_is_left_out_on_resuming(tmp_path):
    fit(tiny_model(), denoise, Recipe(3, 1e-3), tmp_path / "x.pt", name="x")
    log = tmp_path / "x.jsonl"
    log.write_text(log.read_text()[:-40])
    fit(tiny_model(), denoise, Recipe(3, 1e-3), tmp_path / "x.pt", name="x", resume=True)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2]


def test_a_window_without_a_sample_that_counts_is_logged_as_null(tmp_path):
    def nothing_counts(model, generator):
        loss, logs, t = denoise(model, generator)
        return loss, logs | {"valid": torch.zeros(8)}, t
    _, line = fit(tiny_model(), nothing_counts, Recipe(2, 1e-3), tmp_path / "x.pt", name="x")
    assert line["loss"] is None and line["valid"] == 0


def test_without_resume_a_run_starts_anew(tmp_path):
    fit(tiny_model(), denoise, Recipe(2, 1e-3), tmp_path / "x.pt", name="x")
    fit(tiny_model(), denoise, Recipe(3, 1e-3), tmp_path / "x.pt", name="x")
    steps = [json.loads(line)["step"] for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_one_step_moves_every_parameter_and_lowers_the_loss_on_a_fixed_batch(tmp_path):
    def fixed(model, generator):
        return denoise(model, torch.Generator().manual_seed(7))
    model = tiny_model()
    before, start = fixed(model, None)[0].item(), model.frozen_copy()
    fit(model, fixed, Recipe(1, 1e-3, warmup=1), tmp_path / "x.pt", name="x")
    moved = {name: not torch.equal(p, q)
             for (name, p), q in zip(model.named_parameters(), start.parameters())}
    still = [name for name, yes in moved.items() if not yes]
    assert not still, still
    assert fixed(model, None)[0].item() < before


def test_accumulation_is_the_mean_over_batches(tmp_path):
    """One step on six pictures, and on three batches of two: the same gradient and the same log."""
    model, t, noise, found = (tiny_model(), torch.tensor([1, 200, 400, 600, 800, 990]),
                              torch.randn(6, 12, 16, 16), [])
    for batches in ([[0, 1, 2, 3, 4, 5]], [[0, 1], [2, 3], [4, 5]]):
        left = iter(batches)

        def step(model, generator):
            i = next(left)
            batch = DATA.batch(i)
            xt, x0, _ = add_noise(model, batch, t[i], generator, noise[i])
            goal = model.diffusion.goal(x0, t[i], noise[i])
            return *sft_loss(model(xt, t[i], plain(batch.captions)), goal), t[i]
        trained = copy.deepcopy(model)
        _, line = fit(trained, step, Recipe(1, 1e-3, clip=1e9), tmp_path / "x.pt", name="x",
                      accumulate=len(batches))
        assert next(left, None) is None                           # all were drawn
        found.append(([p.grad for p in trained.parameters() if p.grad is not None],
                      [x for x in line["per_t"]["loss"] if x is not None]))
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
        return denoise(model, generator)
    average, _ = fit(model, step, Recipe(4, 1e-2, warmup=1, ema=0.25), tmp_path / "x.pt", name="x")
    by_hand = seen[0]
    for decay, now in zip((1 / 10, 2 / 11, 0.25, 0.25), (*seen[1:], weights()), strict=True):
        by_hand = decay * by_hand + (1 - decay) * now
    torch.testing.assert_close(average.unet.conv_in.weight, by_hand)
    assert torch.equal(load_model(tmp_path / "x.pt").unet.conv_in.weight,
                       average.unet.conv_in.weight)


def test_the_optimizer_gets_the_rate_of_the_schedule(tmp_path):
    recipe = Recipe(10, 1e-3, warmup=2)
    fit(tiny_model(), denoise, recipe, tmp_path / "x.pt", name="x")
    rates = {group["lr"]
             for group in load_checkpoint(tmp_path / "x.pt")["optimizer"]["param_groups"]}
    assert rates == {recipe.lr_at(9)} and recipe.lr_at(9) == pytest.approx(1e-3 / 7)


def test_gradient_is_clipped_and_a_broken_one_stops_the_run(tmp_path):
    def scaled(factor):
        def step(model, generator):
            loss, logs, t = denoise(model, generator)
            return loss * factor, logs, t
        return step
    # the gradient that the optimiser saw is still there
    for factor, expected in ((1e3, 0.5), (1e-3, None)):
        model = tiny_model()
        fit(model, scaled(factor), Recipe(1, 1e-3, clip=0.5), tmp_path / "x.pt", name="x")
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
        assert norm == pytest.approx(expected, rel=1e-3) if expected else norm < 0.1
    for path, kept in ((tmp_path / "x.pt", "last checkpoint stays in .*x.pt"),
                       (tmp_path / "y.pt", "No checkpoint was written yet")):
        with pytest.raises(FloatingPointError, match=f"x, step 0.*{kept}"):
            fit(tiny_model(), scaled(float("nan")), Recipe(3, 1e-3), path, name="x")


def test_gradients_are_clipped_before_the_step_and_not_after_it(tmp_path):
    """AdamW's first mean is a tenth of the gradient that it was given."""
    def strong(model, generator):
        loss, logs, t = denoise(model, generator)
        return loss * 1e3, logs, t
    fit(tiny_model(), strong, Recipe(1, 1e-3, muon=False, clip=0.5), tmp_path / "x.pt", name="x")
    state = load_checkpoint(tmp_path / "x.pt")["optimizer"]["state"].values()
    given = torch.cat([one["mean"].flatten() for one in state]).norm().item()
    assert given == pytest.approx(0.1 * 0.5, rel=1e-3)


def test_bf16_runs_the_models_in_bfloat16(tmp_path):
    def train(bf16):
        seen = []

        def step(model, generator):
            hook = model.unet.conv_in.register_forward_hook(
                lambda module, inputs, output: seen.append(output.dtype))
            loss, logs, t = denoise(model, generator)
            hook.remove()
            return loss, logs, t
        model, _ = fit(tiny_model(), step, Recipe(2, 1e-3), tmp_path / "x.pt", name="x", bf16=bf16)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        return set(seen), model.digest()
    (wide, first), (half, second), (_, again) = train(False), train(True), train(True)
    assert (wide, half) == ({torch.float32}, {torch.bfloat16}) and second == again != first


def test_auxiliary_and_target_start_as_the_base_and_are_not_it(tmp_path, monkeypatch):
    begun = {}
    monkeypatch.setattr(stages, "fit", lambda model, *rest, name, **named: (
        begun.update({name: model}) or (model.frozen_copy(), {})))
    world = Toy(settings_of("--out", str(tmp_path)), DATA)
    base, auxiliary = tiny_model(3).frozen_copy(), tiny_model(4).frozen_copy()
    stages.ready_auxiliary(world, base)
    monkeypatch.setattr(stages, "alignment_step", lambda *arguments: None)
    stage_2(world, base, auxiliary)
    assert list(begun) == ["auxiliary", "target"]
    for model in begun.values():
        assert same(model, base) and model is not base
        assert all(p.requires_grad for p in model.parameters())


def test_a_diverging_run_names_the_step_though_numbers_are_read_later(tmp_path):
    """The log is written every 20 steps; the gradient is broken in step 27."""
    calls = []

    def step(model, generator):
        calls.append(1)
        loss, logs, t = denoise(model, generator)
        return loss * (float("nan") if len(calls) == 28 else 1), logs, t
    with pytest.raises(FloatingPointError, match="x, step 27: the gradient is nan"):
        fit(tiny_model(), step, Recipe(200, 1e-3), tmp_path / "x.pt", name="x", save_every=25)
    assert load_checkpoint(tmp_path / "x.pt")["step"] == 25
    assert len(calls) == 40


def test_learning_rate_warms_up_holds_and_falls_to_zero():
    recipe = Recipe(100, 2.0, warmup=10, plateau=0.5)
    assert recipe.lr_at(0) == pytest.approx(0.2) and recipe.lr_at(9) == recipe.lr_at(50) == 2.0
    assert recipe.lr_at(75) == pytest.approx(1.0) and recipe.lr_at(99) == pytest.approx(0.04)


def test_log_has_means_per_timestep_bin_over_the_samples_that_count():
    t = torch.tensor([0, 99, 100, 999])
    logs = {"loss": torch.tensor([1.0, 3.0, 5.0, 7.0]),
            "valid": torch.tensor([True, True, True, False])}
    line = summarize([(t, logs)], 1000)
    assert line["loss"] == 3.0 and line["valid"] == 0.75
    assert line["per_t"]["loss"] == [2.0, 5.0] + [None] * 8
    third = summarize([(torch.tensor([5, 5, 5]), {"loss": torch.tensor([0.0, 0.0, 2.0])})], 1000)
    assert third["loss"] == third["per_t"]["loss"][0] == 0.666667 and third["valid"] == 1.0
    most = {"loss": torch.ones(3), "valid": torch.tensor([True, True, False])}
    assert summarize([(torch.tensor([5, 5, 5]), most)], 1000)["valid"] == 0.6667


# ---------------------------------------------------------------- the flow of both stages

def test_stage_1_trains_on_the_training_part(tmp_path, monkeypatch):
    seen, original = [], stages.sft_loss_step
    monkeypatch.setattr(stages, "sft_loss_step", lambda settings, data, prompts: (
        seen.append(data.digest()) or original(settings, data, prompts)))
    settings = settings_of("--out", str(tmp_path), "--base-steps", "1", "--sft-steps", "1")
    stage_1(Toy(settings, DATA))
    assert seen == [DATA.split("train").digest()] * 2


@pytest.mark.parametrize("method", METHODS)
def test_only_the_target_moves(tmp_path, method):
    base, auxiliary = tiny_model().frozen_copy(), tiny_model(seed=5).frozen_copy()
    copies = base.frozen_copy(), auxiliary.frozen_copy()
    settings = settings_of("--out", str(tmp_path), "--method", method)
    target, line = stage_2(Toy(settings, DATA), base, auxiliary)
    assert same(base, copies[0]) and same(auxiliary, copies[1])
    assert target is not base and not same(target, base)
    assert all(p.grad is None and not p.requires_grad for model in (base, auxiliary)
               for p in model.parameters())
    assert not base.training and not auxiliary.training


def test_stage_1_takes_muon_and_stage_2_adamw(tmp_path, tiny):
    train_cpo.main(["--out", str(tmp_path), "--device", "cpu", "--count", "40", "--batch", "4",
                    "--base-steps", "1", "--sft-steps", "1", "--steps", "1", "--samples", "0"])
    matrices = {name: len(load_checkpoint(tmp_path / f"{name}.pt")["optimizer"]["param_groups"][0]
                          ["params"]) for name in ("base", "auxiliary", "target")}
    assert matrices["base"] == matrices["auxiliary"] > 20 and matrices["target"] == 0


@pytest.mark.parametrize("method", [*METHODS, "stage 1"])
def test_nothing_in_a_step_waits_for_the_gpu(tmp_path, method, monkeypatch):
    """On torch's "meta" device tensors have a shape and no numbers: whatever needs one on the CPU,
    .item(), .cpu(), if, raises there."""
    monkeypatch.setattr(torch, "autocast", lambda *type_, **named: nullcontext())  # knows no meta
    model, base, auxiliary = (tiny_model().to("meta") for _ in range(3))
    settings = settings_of("--method", "cpo" if method == "stage 1" else method, "--paint", "0")
    step = (sft_loss_step(settings, DATA, attribute_prompts) if method == "stage 1"
            else alignment_step(settings, DATA, base, auxiliary))
    state = TrainingState(model, copy.deepcopy(model), Muon(model, 1e-3, method == "stage 1"),
                          torch.Generator().manual_seed(0))
    loss, logs, _ = step(model, state.generator)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    state.step(1e-3, 0.9)
    assert {x.device.type for x in (loss, norm, *logs.values())} == {"meta"}
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()                                     # so a wait would have been noticed


@pytest.mark.parametrize("method", METHODS)
def test_only_the_training_part_is_aligned_on(tmp_path, method):
    """All other pictures have a caption that no model knows, so that one of them would stop
    the run."""
    data = replace(DATA, captions=[caption if i % 10 < 8 else "a ghost"
                                   for i, caption in enumerate(DATA.captions)])
    base, auxiliary = tiny_model().frozen_copy(), tiny_model(seed=5).frozen_copy()
    settings = settings_of("--out", str(tmp_path), "--method", method, "--best", "1")
    stage_2(Toy(settings, data), base, auxiliary)
    with pytest.raises(ValueError, match="unknown caption 'a ghost'"):
        alignment_step(settings, data.split("test"), base, auxiliary)(
            tiny_model(), torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- the scripts, 20 steps each

def test_scripts_from_nothing_to_a_report(tmp_path, capsys):
    common = ["--out", str(tmp_path), "--count", "100", "--batch", "4", "--device", "cpu",
              "--sample-every", "20"]
    report = train_cpo.main([*common, "--base-steps", "20", "--sft-steps", "20", "--steps", "20",
                             "--samples", "16", "--sampling-steps", "3"])
    assert list(report["rows"]) == ["base", "auxiliary", "auxiliary_prompted",
                                    "auxiliary_guided", "target"]
    for row in report["rows"].values():
        assert {"neg", "neg_ci", "pos", "caption", "diversity", "frechet", "by_root",
                "by_leaf"} <= set(row)
        assert row["neg"] + row["pos"] == pytest.approx(len(CRITERIA))
        assert sum(row["by_root"].values()) == pytest.approx(row["neg"])
    assert report["real_positive"]["neg"] < 0.5
    assert json.loads((tmp_path / "report.json").read_text()) == report
    files = ["base.pt", "auxiliary.pt", "target.pt", "base.jsonl", "target.jsonl", "report.png",
             "samples/target_00020.png"]
    assert all((tmp_path / name).stat().st_size > 0 for name in files)
    assert "target" in capsys.readouterr().out

    images = sample.main(["--checkpoint", str(tmp_path / "target.pt"), "--caption", "a boat",
                          "--count", "2", "--steps", "2", "--judge", "--device", "cpu",
                          "--out", str(tmp_path / "grid.png")])
    assert images.shape == (2, 32, 32, 3) and (tmp_path / "grid.png").stat().st_size > 0
    guided = sample.main(["--checkpoint", str(tmp_path / "auxiliary.pt"), "--caption", "a boat",
                          "--count", "2", "--steps", "2", "--positive", "all", "--negative", "all",
                          "--guidance", "2", "--device", "cpu",
                          "--out", str(tmp_path / "grid.png")])
    assert not np.array_equal(guided, images)


def test_samples_go_towards_the_positive_and_away_from_the_negative(tmp_path, monkeypatch):
    seen, model = [], tiny_model()
    save_checkpoint(tmp_path / "x.pt", {"config": model.config, "criteria": CRITERIA.to_dict(),
                                        "model": model.state_dict(), "ema": model.state_dict(),
                                        "step": 1, "steps": 1})
    monkeypatch.setattr(Model, "sample", lambda self, *asked, axes: (
        seen.append((*asked, axes)) or torch.zeros(len(asked[0]), 3, 32, 32)))
    flags = ["--checkpoint", str(tmp_path / "x.pt"), "--caption", "a boat", "--count", "1",
             "--positive", "Level", "--negative", "blurred edges", "--seed", "4", "--steps", "9",
             "--eta", "0.5", "--device", "cpu", "--out", str(tmp_path / "x.png")]
    for guidance in ("2", "1"):
        sample.main([*flags, "--guidance", guidance])
    good, bad = ("level horizon",), ("blurred edges",)
    assert seen[0] == ([Prompt("a boat", good)], [Prompt("a boat", (), bad)], 2.0, 9, 0.5, 4, [])
    # without guidance one prompt carries both sides
    assert seen[1][0] == [Prompt("a boat", good, bad)]
    # a knob is all leaves of its branch, good and bad
    sample.main([*flags, "--axis", "Finish=1.5", "Tone=0"])
    (scale, up, down), (off, *_) = seen[2][6]
    finish = CRITERIA.columns("Finish")
    assert (scale, off) == (1.5, 0.0) and up == [Prompt("a boat", tuple(
        CRITERIA.leaves[i].positive for i in finish))]
    assert down == [Prompt("a boat", (), tuple(CRITERIA.leaves[i].negative for i in finish))]
    with pytest.raises(CriteriaError, match="no dimension 'Mood'"):
        sample.main([*flags, "--axis", "Mood=1"])


def test_own_tree_and_captions_train_without_a_report(tiny, tmp_path, capsys):
    tree = {"name": "Mine",
            "children": [{"name": "Mood", "positive": "calm", "negative": "restless"}]}
    data = from_painter(count=12)
    rows = [{"file_name": f"{i:06d}.png", "caption": "a view",
             "positive": ["calm"] if i % 2 else [],
             "negative": [] if i % 2 else ["restless"]} for i in range(12)]
    export(data, tmp_path / "mine")
    (tmp_path / "mine" / "criteria.json").write_text(json.dumps(tree))
    (tmp_path / "mine" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = train_cpo.main(["--data", str(tmp_path / "mine"), "--out", str(tmp_path / "out"),
                           "--base-steps", "2", "--sft-steps", "2", "--steps", "2", "--batch", "4",
                           "--sample-every", "0", "--device", "cpu"])
    assert (line["step"] == 2 and (tmp_path / "out" / "target.pt").exists()
            and not (tmp_path / "out" / "report.json").exists())
    assert "no report" in capsys.readouterr().out
    model = load_model(tmp_path / "out" / "target.pt")
    with pytest.raises(ValueError, match="no measure for Mood, a view"):
        evaluate({"x": (model, "plain")}, 4)
    with pytest.raises(ValueError, match="--judge: the critic has no measure for Mood, a view"):
        sample.main(["--checkpoint", str(tmp_path / "out" / "target.pt"), "--judge"])


def test_exported_folder_trains_to_the_same_bytes_as_the_painter(tiny, tmp_path):
    export(from_painter(count=40, seed=0), tmp_path / "paintings")
    flags = ["--base-steps", "3", "--sft-steps", "3", "--batch", "8", "--sample-every", "0",
             "--device", "cpu"]
    a = train_sft.main(["--out", str(tmp_path / "a"), "--count", "40", *flags])
    b = train_sft.main(["--out", str(tmp_path / "b"),
                        "--data", str(tmp_path / "paintings"), *flags])
    assert same(a[0], b[0]) and same(a[1], b[1])
