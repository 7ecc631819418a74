"""The study commands, end to end on tiny models; and the small rules of theirs that decide what a
table says."""
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nanocpo.study.lab as lab
import nanocpo.study.second_opinion as second_opinion
import nanocpo.study.studies as study
from nanocpo.diffusion import guide
from nanocpo.model import Model, load_model
from nanocpo.study.mixture import NEGATIVE, PLAIN, POSITIVE, flawed_world
from nanocpo.study.plots import bar_chart, line_chart, matrix_chart, ticks
from nanocpo.toy.paintings import from_painter
from nanocpo.toy.world import Toy
from nanocpo.unet import UNetConfig
from nanocpo.utils.checkpoint import save_checkpoint

TINY = UNetConfig(channels=(16, 32), depth=(0, 0), heads=(2, 2), groups=8, context_dim=16,
                  vector_dim=16)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder with a finished tiny base and auxiliary, different from one another."""
    folder, data = tmp_path_factory.mktemp("out"), from_painter(count=60)
    for seed, name in enumerate(("base", "auxiliary")):
        torch.manual_seed(seed)
        model = Model(data.criteria, sorted(set(data.captions)), TINY, text_dim=16)
        torch.nn.init.normal_(model.unet.conv_out.weight, std=0.1)  # models that differ visibly
        made_of = {"data": "flawed", "tree": model.criteria.to_dict()}
        if name == "auxiliary":
            made_of["base"] = load_model(folder / "base.pt").digest()
        save_checkpoint(folder / f"{name}.pt",
                        model.content() | {"model": model.state_dict(), "ema": model.state_dict(),
                                           "step": 1, "steps": 1, "made_of": made_of})
    return folder


def run(out, name, *flags):
    """One study with everything small; returns the JSON that it published and the Markdown."""
    results = out / "results"
    study.main([name, "--out", str(out), "--results", str(results), "--count", "60", "--batch", "4",
                "--steps", "2", "--samples", "8", "--search-samples", "8", "--curve-samples", "8",
                "--sampling-steps", "2", "--batches", "1", "--device", "cpu", *flags])
    assert Image.open(results / f"{name}.png").size[0] > 400
    return json.loads((results / f"{name}.json").read_text()), (results / f"{name}.md").read_text()


def test_methods_searches_then_measures_and_is_never_repeated(out, monkeypatch, capsys):
    flags = ["--seeds", "1", "2", "--only", "CPO constant", "Diffusion-DPO"]
    summary, text = run(out, "methods", *flags)
    assert list(summary["rows"]) == ["base", "auxiliary prompted", "auxiliary guided",
                                     "Diffusion-DPO", "CPO constant"]
    assert all(len(results) == 2 for results in summary["rows"].values())
    dpo, cpo = summary["rows"]["Diffusion-DPO"][0], summary["rows"]["CPO constant"][0]
    assert (dpo["images"] == cpo["images"] == 8 and dpo["made_of"]["batch"] == 2
            and dpo["made_of"]["seed"] == 1)
    chosen = summary["chosen"]["CPO constant"]
    searched = [json.loads(path.read_text())["made_of"]
                for path in (out / "study" / "methods").glob("search_*.json")]
    # what is chosen on is not what is reported
    assert len(searched) == 9 and {s["seed"] for s in searched} == {101}
    assert [s["batch"] for s in searched
            if s["kind"] == "align" and s["method"] == "dpo"] == [2] * 4
    assert chosen in study.METHODS["CPO constant"][1] and cpo["made_of"]["lr"] == chosen["lr"]
    assert ("| CPO constant |" in text and " ± " in text and "setting 4" in text
            and '--only "CPO constant" "Diffusion-DPO" --seeds 1 2`;' in text)
    assert (not list((out / "study" / "methods").glob("*.pt"))
            and list((out / "study" / "methods").glob("CPO_constant_1.png")))
    monkeypatch.setitem(lab.KINDS, "align",
                        lambda lab, args: pytest.fail("a finished run was repeated"))
    monkeypatch.setitem(lab.KINDS, "sample",
                        lambda lab, args: pytest.fail("a finished run was repeated"))
    assert run(out, "methods", *flags) == (summary, text)
    with pytest.raises(ValueError,
                       match="search_base.json belongs to another run .steps.; delete it"):
        run(out, "methods", *flags, "--steps", "3")
    with pytest.raises(ValueError, match="CPO magic.*CPO none"):
        run(out, "methods", "--only", "CPO magic")


def test_run_that_stopped_goes_on(out, monkeypatch):
    """A killed study keeps its finished runs, and no half a file."""
    flags, calls, make = (
        ["--seeds", "1", "--only", "75 % judged", "5 % wrong"], [], lab.KINDS["align"])

    def dies(lab, args):
        calls.append(args.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return make(lab, args)
    monkeypatch.setattr(lab, "ready_auxiliary",
                        lambda world, base, exactly: load_model(out / "auxiliary.pt"))
    monkeypatch.setitem(lab.KINDS, "align", dies)
    with pytest.raises(KeyboardInterrupt):
        run(out, "annotation", *flags)
    assert ([p.name for p in (out / "study" / "annotation").glob("*_CPO_*.json")]
            == ["75___judged__CPO_1.json"])
    summary, text = run(out, "annotation", *flags)
    assert (calls == ["75___judged__CPO_1"] + ["75___judged__CPO___pairs_all_1"] * 2
            + ["5___wrong__CPO_1"])
    assert (list(summary["rows"])
            == ["base", *(f"75 % judged: {kind}"
                          for kind in ("auxiliary guided", "CPO", "CPO --pairs all")),
                "5 % wrong: auxiliary guided", "5 % wrong: CPO"]
            and "| 75 % judged: CPO --pairs all |" in text)


def test_an_auxiliary_of_degraded_annotations_must_agree_in_every_setting(tiny, tmp_path):
    """Its length is part of a run's record: it may not be another one's."""
    args = Namespace(out=str(tmp_path), seed=0, device="cpu", base_steps=1, sft_steps=1, batch=2,
                     count=40)
    degraded = lab.changed(args, judged=0.25, wrong=0.0)
    first = lab.Lab(args).taught(degraded)[1]
    assert first.digest() == lab.Lab(args).taught(degraded)[1].digest()
    with pytest.raises(ValueError, match="auxiliary.pt belongs to another run .steps.; choose"):
        lab.Lab(lab.changed(args, sft_steps=2)).taught(degraded)


def test_gap_is_measured_on_the_whole_tree(out, capsys):
    with pytest.raises(SystemExit):
        run(out, "gap", "--criteria", "Composition")
    assert "gap is measured on the whole tree" in capsys.readouterr().err


def test_a_run_of_degraded_annotations_has_data_and_auxiliary_of_its_own(tmp_path, monkeypatch):
    args = Namespace(out=str(tmp_path), seed=0, device="cpu", name="x", method="cpo", steps=1,
                     batch=1, accumulate=1)
    room, degraded = lab.Lab(args), Namespace(
        **vars(args), judged=0.25, wrong=0.0, model="auxiliary", prompt="guided")
    room.world = Toy(lab.settings_of(args), from_painter(count=200))
    room.models = {"base": "base", "auxiliary": "the folder's"}
    share = lambda data: round((data.annotations != 0).mean() / 0.05) * 0.05

    def align(lab, args, data, auxiliary):
        (tmp_path / "x.pt").write_text("")
        return f"{share(data):.2f}, {auxiliary}", {"seconds": 1}
    monkeypatch.setattr(lab, "ready_auxiliary",
                        lambda world, base, exactly: f"taught by {share(world.data):.2f}")
    monkeypatch.setattr(lab, "align", align)
    monkeypatch.setattr(lab, "measured", lambda lab, args, model, kind="plain": model)
    assert lab.align_run(room, degraded)["row"] == "0.25, taught by 0.25"
    assert lab.align_run(room, args)["row"] == "0.90, the folder's"
    assert lab.sample_run(room, degraded)["row"] == "taught by 0.25"
    assert (lab.sample_run(room, Namespace(model="auxiliary", prompt="plain"))["row"]
            == "the folder's")
    assert lab.sample_run(room, Namespace(model="base", prompt="plain"))["row"] == "base"


def test_an_error_of_a_command_is_one_line(tmp_path):
    """Of this one, as of all: they end with the same cli.command."""
    found = subprocess.run([sys.executable, "-m", "nanocpo.study", "annotation",
                            "--only", "everything", "--out", str(tmp_path)],
                           capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert (found.returncode == 1
            and found.stderr.startswith("error: --only everything: no such row")
            and found.stderr.count("\n") == 1)


def test_speed_decoupling_and_guidance(out, monkeypatch):
    summary, text = run(out, "speed", "--seeds", "1", "--only", "none", "none, slower", "constant")
    assert [p["step"] for p in summary["curves"]["none"][0]] == [0, 1, 2] and "| constant |" in text
    summary, text = run(out, "decoupling", "--seeds", "1", "--only", "k 0", "--paint", "4",
                        "--validation", "101")
    assert (list(summary["relative"]) == summary["roots"]
            and all(len(row) == len(summary["roots"]) for row in summary["relative"].values()))
    assert (set(summary["chosen"].values()) == {"k 0"} and "| Color Relations (k 0) |" in text
            and "--only \"k 0\" --seeds 1 --validation 101`;" in text
            and "Largest own share" in text)
    monkeypatch.setattr(study, "GUIDANCE", (1.0, 2.0))
    summary, text = run(out, "guidance", "--seeds", "1")
    assert ([row[0]["neg"] for scales in summary["rows"].values() for row in scales.values()]
            and "1 call" in text)
    files = {p.stem for p in (out / "study" / "guidance").glob("*.json")}
    assert len(files) == 4                                        # no two runs of one name


def test_decoupling_chooses_each_branch_dose_on_all_validation_seeds(out, monkeypatch):
    """Made-up rows: k 0 is best at seed 101 and worst at 102, k -0.1 second at both; for Finish k
    -0.05 is best."""
    moved = {("Finish", -0.05): (1.0, 1.0), **{(None, k): v for k, v in {
        0.0: (1.0, 1.3), -0.05: (0.88, 0.86), -0.1: (1.06, 1.06)}.items()}}

    def made_up(lab, runs):
        def row(flags):
            if "criteria" not in flags:
                return dict.fromkeys(roots, 2.0)                  # the base
            own, = flags["criteria"]
            first, second = moved.get((own, flags["strength"]), moved[None, flags["strength"]])
            return {root: 0.4 if root == own else 2 * {101: first, 102: second}.get(
                flags["seed"], 1.04) for root in roots}
        return [{"row": {"by_root": row(flags), "caption": 0.9}} for _, _, flags in runs]
    roots = [root.name for root in from_painter(count=1).criteria.roots]
    monkeypatch.setattr(study.Lab, "run", made_up)
    summary, text = run(out, "decoupling", "--seeds", "4", "5")
    assert summary["chosen"] == dict.fromkeys(roots, "k -0.1") | {"Finish": "k -0.05"}
    assert (summary["scores"]["Composition"]
            == pytest.approx({"k 0": 1.5, "k -0.05": 1.3, "k -0.1": 0.6}))
    assert (summary["relative"]["Finish"]
            == [[1.04, 1.04]] * (len(roots) - 1) + [[0.2, 0.2]] and roots[-1] == "Finish")
    assert ("Largest own share 0.20, largest change of another 0.04." in text
            and "seeds 101, 102" in text and "--seeds 4 5`" in text)


def test_runs_shared_among_processes_are_those_made_one_by_one(out, monkeypatch):
    """--jobs starts processes of their own, which load data and models for themselves."""
    monkeypatch.setattr(study, "GUIDANCE", (2.0,))
    alone, _ = run(out, "guidance", "--seeds", "7")
    for file in (out / "study" / "guidance").glob("*_7.json"):
        file.unlink()
    shared, _ = run(out, "guidance", "--seeds", "7", "--jobs", "2")
    for name, scales in alone["rows"].items():
        (a,), (b,) = scales["2.0"], shared["rows"][name]["2.0"]
        assert a["neg"] == b["neg"] and a["frechet"] == pytest.approx(b["frechet"], rel=1e-3)


def test_gap_keeps_the_guarantees_on_free_outputs(out, monkeypatch):
    """The theorems of (E13, E14) in the training code itself: no sample's winner error rises, no
    loser's falls, when outputs are free."""
    for name in ("SGD", "Muon"):  # two kinds are enough to see the table
        monkeypatch.delitem(lab.OPTIMIZERS, name)
    summary, text = run(out, "gap", "--step-size", "1e-5")
    assert set(summary["gaps"]) == {"own", "completed", "opposite"} and "at the base" in text
    for effect in summary["effects"]:
        if effect["optimizer"] == "free outputs":
            if effect["rule"] in ("winner", "safeguard", "balance", "clamped"):
                assert effect["winner rose"] == 0, effect
            if effect["rule"] == "balance":
                assert effect["loser fell"] == 0, effect
    assert any(e["winner rose"] or e["loser fell"] for e in summary["effects"]
               if e["optimizer"] == "Adam"), summary["effects"]
    assert len(summary["effects"]) == 6 * 2 * 2


def test_a_row_is_measured_with_the_run_s_own_settings(monkeypatch):
    seen = []
    monkeypatch.setattr(lab, "save_grid", lambda *arguments, **settings: None)
    monkeypatch.setattr(lab, "evaluate", lambda models, *rest: seen.append((models, *rest)) or (
        {"rows": {"row": {"neg": 1}}, "real_positive": {"diversity": 0}},
        {"row": np.zeros((1, 32, 32, 3))}))
    args = Namespace(samples=8, seed=5, sampling_steps=3, guidance=4.0, out="o", name="n")
    assert lab.measured(None, args, "model", "guided") == {"neg": 1, "real_diversity": 0}
    assert seen == [({"row": ("model", "guided")}, 8, 5, 3, 4.0)]


def test_a_curve_is_never_resumed_and_a_run_counts_its_log_s_seconds(tmp_path, monkeypatch):
    args, seen = (Namespace(out=str(tmp_path), name="x", every=2, method="cpo", steps=4, batch=3,
                            accumulate=2, resume=True), [])

    def align(lab, args, data, auxiliary, watch=None):
        seen.append((args.resume, getattr(args, "sample_every", None)))
        (tmp_path / "x.pt").write_text("")
        if watch:
            watch("average", 2)
        return "target", {"seconds": 70.5}
    monkeypatch.setattr(lab, "align", align)
    monkeypatch.setattr(lab, "measured", lambda lab, args, model: dict.fromkeys(
        ("neg", "caption", "diversity", "frechet"), model))
    room = lab.Lab(args)
    room.world, room.models = Namespace(data=None), {"base": None, "auxiliary": None}
    (point,) = lab.curve_run(room, args)["curve"]
    result = lab.align_run(room, args)
    assert (point["step"] == 2 and point["neg"] == "average"
            and (result["seconds"], result["images"]) == (70.5, 4 * 3 * 2))
    assert seen == [(False, 2), (True, None)] and not (tmp_path / "x.pt").exists()


def test_results_of_other_data_or_models_are_no_results(out, tmp_path, monkeypatch):
    """The same flags are not enough: the auxiliary may have been trained anew, the folder annotated
    again."""
    monkeypatch.setitem(lab.KINDS, "sample", lambda lab, args: {"row": 1})

    def room(data=from_painter(count=3), auxiliary="auxiliary"):
        made = lab.Lab(Namespace(study="x", out=str(tmp_path), jobs=1))
        made.world, made.models = Namespace(data=data), {
            name: load_model(out / f"{file}.pt")
            for name, file in (("base", "base"), ("auxiliary", auxiliary))}
        return made
    runs = [("key", "sample", {})]
    assert room().run(runs)[0]["row"] == 1 == room().run(runs)[0]["row"]
    with pytest.raises(ValueError,
                       match="key.json belongs to another run .auxiliary model.; delete it"):
        room(auxiliary="base").run(runs)
    with pytest.raises(ValueError, match="another run .pictures.; delete it"):
        room(from_painter(count=4)).run(runs)


@pytest.mark.parametrize("flags, words", [
    (["methods", "--batch", "1"], "Diffusion-DPO's batch"),
    (["speed", "--curve-samples", "1"], "needs two pictures"),
    (["gap", "--only", "none"], "no rows to choose from"),
    (["gap", "--jobs", "0"], "must be above 0")])
def test_flags_of_a_study_that_make_no_sense_are_refused_at_once(capsys, flags, words):
    with pytest.raises(SystemExit):
        study.main(flags)
    assert words in capsys.readouterr().err


def test_world_draws(out, monkeypatch):
    import nanocpo.study.figure as figure
    monkeypatch.setattr(figure, "draw_samples", lambda world, eps, seed: world.sample(
        50, (0, 0), torch.Generator())[0].flatten(1))
    # slow to draw, and its own test needs no pixels
    monkeypatch.setattr(figure, "draw_density", lambda *arguments: None)
    summary, text = run(out, "world", "--world-steps", "3")
    assert (len(summary["samples"]) == 5
            and np.allclose(summary["path ends, less z_w"]["winner"], 0, atol=1e-3))
    assert "![the analytic world](world.png)" in text
    exact, x = flawed_world(), torch.randn(5, 2, 1, 1, dtype=torch.float64)
    # each column of the figure is the field that its title names
    shown = list(figure.fields(exact, 1, 0).values())
    plain, positive, negative = (exact.eps(x, 0.5, prompt)
                                 for prompt in (PLAIN, POSITIVE, NEGATIVE))
    for field, wanted in zip(shown, (plain, positive,
                                     guide(positive, negative, 1 / (1 - figure.K)))):
        torch.testing.assert_close(field(x, 0.5), wanted)


# ---------------------------------------------------------------- small rules

def test_interval_over_seeds_by_hand():
    """Student's t with two degrees of freedom: 4.30 s / sqrt(3)."""
    mean, half = study.over_seeds([1.0, 2.0, 3.0])
    assert (mean == 2 and half == pytest.approx(4.30 / 3 ** 0.5)
            and study.over_seeds([5.0]) == (5.0, 0.0))


def test_choice_of_a_setting():
    """The fewest negatives among those that keep the caption; a broken model with fewer still does
    not win."""
    results = [{"row": {"neg": n, "caption": c}} for n, c in ((3.0, 0.95), (2.0, 0.93), (1.0, 0.6))]
    assert (study.choose(results, 0.95) == 1 and study.choose(results, 0.5) == 2
            and study.choose(results, 0.99) == 0)


def test_steps_to_a_level_by_hand():
    curve = [{"step": s, "neg": n, "caption": c}
             for s, n, c in ((0, 6.0, 0.9), (20, 4.0, 0.9), (40, 3.0, 0.7))]
    assert (study.steps_to(curve, 5.0) == 10 and study.steps_to(curve, 3.5) == 30
            and study.steps_to(curve, 2.0) is None)
    assert study.steps_to(curve, 3.5, captions=0.88) is None and study.steps_to(curve, 6.0) == 0


def test_degraded_annotations_have_the_stated_shares_and_are_nested():
    data = from_painter(count=400)
    half, tenth, wrong = (lab.degrade(data, *level).annotations
                          for level in ((0.5, 0), (0.1, 0), (0.9, 0.2)))
    assert abs((half != 0).mean() - 0.5) < 0.02 and abs((tenth != 0).mean() - 0.1) < 0.02
    assert (((tenth == half) | (tenth == 0)).all()
            and ((half == data.annotations) | (half == 0)).all())
    judged = (wrong != 0) & (data.annotations != 0)
    assert abs((wrong != data.annotations)[judged].mean() - 0.2) < 0.02
    with pytest.raises(ValueError, match="only 0.9"):
        lab.degrade(data, 1.0, 0)


def test_charts_show_their_data(tmp_path):
    assert (ticks(0, 10) == [0, 2, 4, 6, 8, 10]
            and ticks(-0.3, 0.3, 6) == [-0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.3])
    line_chart(tmp_path / "a.png", {"one": ([0, 1, 2], [1.0, None, 3.0], [0.1, 0, 0.1])},
               "title", "x", "y")
    bar_chart(tmp_path / "b.png", {"a": (1.0, 0.2), "b": (2.0, 0.0)}, "title", "x", highlight=["a"])
    matrix_chart(tmp_path / "c.png", [[0.2, 1.0], [1.0, 1.9]], ["a", "b"], ["a", "b and c"],
                 "title")
    pixels = {name: np.asarray(Image.open(tmp_path / f"{name}.png")).reshape(-1, 3)
              for name in "abc"}
    colour = lambda name, rgb: (np.abs(pixels[name].astype(int) - rgb).max(1) < 4).sum()
    blue = (0x1f, 0x5f, 0xa8)
    assert (colour("a", blue) > 20 and colour("b", blue) > 1000 and colour("c", (205, 73, 82)) < 50
            and colour("c", (90, 136, 187)) > 500)


def test_critic_is_compared_with_painter_and_networks(out, monkeypatch):
    for name, small in (("STEPS", 40), ("COUNT", 200), ("HELD_OUT", 60)):
        monkeypatch.setattr(second_opinion, name, small)
    summary, text = run(out, "critic")
    leaves = [leaf.name for leaf in from_painter(count=1).criteria.leaves]
    assert summary["leaves"] == leaves and set(summary["samples"]) == {"base", "prompted", "guided"}
    clean = summary["painter"]["clean"]
    assert all(len(by) == len(leaves) + 1 for by in clean.values()) and min(clean["critic"]) > 0.95
    # forty steps teach the networks what is plainest to see
    assert all(clean[name][leaves.index("Corners")] > 0.8 for name in ("first", "second"))
    assert text.count("| leaf |") == 4 and "| Level |" in text


def test_two_readers_agree_on_equal_verdicts():
    signs = np.array([[1, -1], [1, 1]])
    assert (second_opinion.agreement((signs, ["a", "b"]), (signs * [1, -1], ["a", "c"]))
            == [1.0, 0.0, 0.5])


def test_disturbances_of_the_networks_pictures():
    x, noise = torch.zeros(400, 3, 32, 32), torch.Generator().manual_seed(0)
    assert torch.equal(second_opinion.disturb(x, generator=noise), x)
    blocks = second_opinion.disturb(x, blotches=0.06, generator=noise)
    corners = blocks[..., ::4, ::4]
    assert torch.equal(corners.repeat_interleave(4, 2).repeat_interleave(4, 3), blocks)
    assert float(blocks.std()) == pytest.approx(0.12, rel=0.05)    # of the range 2 of a tensor
    assert float(second_opinion.disturb(x, noise=0.03, generator=noise).std()) == pytest.approx(
        0.06, rel=0.05)
    edge = torch.where(torch.arange(32) < 16, -1.0, 1.0).expand(2, 3, 32, 32)
    soft = second_opinion.disturb(edge, torch.tensor([0.6, 0.0]), generator=noise)
    assert torch.equal(soft[1], edge[1]) and -0.9 < float(soft[0, 0, 5, 15]) < -0.3
