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
        made_of = {"data": "flawed", "prediction": "flow", "seed": 0,
                   "tree": model.criteria.to_dict()}
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


@pytest.fixture
def two_settings(monkeypatch):
    """A search of two settings for each row; test_pages.py has all."""
    monkeypatch.setattr(study, "METHODS", {
        name: (fixed, settings[:2]) for name, (fixed, settings) in study.METHODS.items()})


def test_methods_searches_then_measures_and_is_never_repeated(out, monkeypatch, two_settings):
    flags = ["--seeds", "1", "2", "--only", "CPO constant", "Diffusion-DPO", "--top", "1",
             "--more-seeds", "4"]
    summary, text = run(out, "methods", *flags)
    assert list(summary["rows"]) == ["base", "auxiliary prompted", "auxiliary guided",
                                     "Diffusion-DPO", "CPO constant"]
    # the best row has one seed more
    mean = {name: np.mean([x["row"]["neg"] for x in summary["rows"][name][:2]])
            for name in ("Diffusion-DPO", "CPO constant")}
    best = min(mean, key=mean.get)
    assert {name: len(results) for name, results in summary["rows"].items()} == {
        name: 3 if name == best else 2 for name in summary["rows"]}
    dpo, cpo = summary["rows"]["Diffusion-DPO"][0], summary["rows"]["CPO constant"][0]
    assert (dpo["images"] == cpo["images"] == 8 and dpo["made_of"]["batch"] == 2
            and dpo["made_of"]["seed"] == 1)
    chosen = summary["chosen"]["CPO constant"]
    searched = [json.loads(path.read_text())["made_of"]
                for path in (out / "study" / "methods").glob("search_*.json")]
    # what is chosen on is not what is reported
    assert len(searched) == 5 and {s["seed"] for s in searched} == {101}
    assert [s["batch"] for s in searched
            if s["kind"] == "align" and s["method"] == "dpo"] == [2] * 2
    assert chosen in study.METHODS["CPO constant"][1] and cpo["made_of"]["lr"] == chosen["lr"]
    assert ("| CPO constant |" in text and " ± " in text and "setting 2" in text
            and "python -m nanocpo.study methods --count 60 --batch 4 --steps 2" in text
            and " --seeds 1 2 --more-seeds 4 --top 1 --search-samples 8 " in text
            and "--only 'CPO constant' Diffusion-DPO`;" in text)
    assert (cpo["teacher calls"], dpo["teacher calls"]) == (16, 0)
    assert cpo["displacement"] > 0 and len(cpo["displacement per t"]) == 10
    assert (not list((out / "study" / "methods").glob("*.pt"))
            and list((out / "study" / "methods").glob("CPO_constant_[0-3]_1.png")))
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


def test_pareto_is_made_of_the_runs_of_methods(out, monkeypatch, two_settings):
    """None of its own: a point for every setting that was searched, sorted by displacement."""
    monkeypatch.setitem(lab.KINDS, "align",
                        lambda lab, args: pytest.fail("a finished run was repeated"))
    summary, text = run(out, "pareto", "--only", "CPO constant", "Diffusion-DPO")
    assert {name: len(points) for name, points in summary["points"].items()} == {
        "Diffusion-DPO": 2, "CPO constant": 2}
    for points in summary["points"].values():
        assert [p[0] for p in points] == sorted(p[0] for p in points)
    assert text.count("| CPO constant |") == 2


def test_pictures_are_judged_again_when_the_critic_has_changed(out, monkeypatch, two_settings):
    flags = ["--seeds", "1", "--only", "CPO winner", "--top", "1", "--more-seeds", "2"]
    before, _ = run(out, "methods", *flags)
    monkeypatch.setattr(lab, "judge_digest", lambda: "another critic")
    measure, seen = lab.evaluate.measure_row, []

    def other(images, captions, *rest):
        seen.append((len(images), captions[:4]))
        row = measure(images, captions, *rest)
        return row | {"neg": row["neg"] + 100}
    monkeypatch.setattr(lab.evaluate, "measure_row", other)
    monkeypatch.setitem(lab.KINDS, "align",
                        lambda lab, args: pytest.fail("a finished run was repeated"))
    after, _ = run(out, "methods", *flags)
    assert all(x["row"]["neg"] > 100 for found in after["rows"].values() for x in found)
    asked = (8, load_model(out / "base.pt").captions)    # beside them real paintings are measured
    assert seen.count(asked) == 1 + 2 + 3 * 1 + 2        # the search, the samplers, both seeds
    once = len(seen)
    run(out, "methods", *flags)                                   # and then they are kept
    assert len(seen) == once
    a, b = (summary["rows"]["CPO winner"][0]["row"] for summary in (before, after))
    assert {name: a[name] for name in ("caption", "nearest")} == pytest.approx(
        {name: b[name] for name in ("caption", "nearest")})
    assert a["neg"] + 100 == pytest.approx(b["neg"])


def test_seeds_take_the_folders_of_bases_in_turn(monkeypatch):
    """--bases: seed s trains and paints with folder s modulo their number, so that rows can be
    compared seed by seed."""
    class Room:
        def __init__(self, name):
            self.name = name

        def run(self, runs):
            return [(self.name, key) for key, _, _ in runs]

        def rooms(self):
            return [Room("a"), Room("b")]
    found = study.spread_over(Room("out"), [3, 4, 1], lambda seed: [
        (f"x_{seed}", "align", {}), (f"y_{seed}", "align", {})])
    assert found == [[("b", "x_3"), ("b", "y_3")], [("a", "x_4"), ("a", "y_4")],
                     [("b", "x_1"), ("b", "y_1")]]


def test_each_folder_of_bases_is_a_laboratory_with_its_own_seed(out, tmp_path):
    for name, seed in (("a", 5), ("b", 6)):
        content = torch.load(out / "base.pt", weights_only=True)
        content["made_of"]["seed"] = seed
        save_checkpoint(tmp_path / name / "base.pt", content)
    both = [str(tmp_path / name) for name in "ab"]
    room = lab.Lab(Namespace(out="x", seed=0, bases=both, steps=3))
    assert [(r.args.out, r.args.seed, r.args.steps) for r in room.rooms()] == [
        (both[0], 5, 3), (both[1], 6, 3)]
    alone = lab.Lab(Namespace(out="x", seed=0, bases=None))
    assert alone.rooms() == [alone]
    del content["made_of"]["seed"]
    save_checkpoint(tmp_path / "b" / "base.pt", content)
    with pytest.raises(ValueError, match="b/base.pt does not say which seed it is of"):
        room.rooms()


def test_places(out, monkeypatch):
    summary, text = run(out, "places", "--seeds", "1", "--only", "winner",
                        "winner, 4 times the steps")
    steps = {name: rows[0]["log"]["step"] for name, rows in summary["rows"].items()}
    assert steps == {"winner": 2, "winner, 4 times the steps": 8} and text.count("| winner") == 2


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
            == ["75___judged_CPO_1.json"])
    summary, text = run(out, "annotation", *flags)
    assert (calls == ["75___judged_CPO_1"] + ["75___judged_CPO__k_0.5_1"] * 2
            + ["75___judged_SFT_on_guided_pictures_1", "5___wrong_CPO_1", "5___wrong_CPO__k_0.5_1",
               "5___wrong_SFT_on_guided_pictures_1"])
    kinds = ("auxiliary prompted", "auxiliary guided", "CPO", "CPO, k 0.5",
             "SFT on guided pictures")
    assert (list(summary["rows"]) == [f"{level}: {kind}" for level in ("75 % judged", "5 % wrong")
                                      for kind in kinds]
            and "| 75 % judged | SFT on guided pictures |" in text)
    one, other, sft = (summary["rows"][f"5 % wrong: {kind}"][0]["neg"] for kind in kinds[2:])
    assert f"| 5 % wrong | {one - sft:.2f} | {other - sft:.2f} |" in text


def test_an_auxiliary_of_degraded_annotations_must_agree_in_every_setting(tiny, tmp_path):
    """Its length is part of a run's record: it may not be another one's."""
    args = Namespace(out=str(tmp_path), seed=0, device="cpu", base_steps=1, sft_steps=1, batch=2,
                     count=40)
    degraded = lab.changed(args, judged=0.25, wrong=0.0)
    first = lab.Lab(args).taught(degraded)[1]
    assert first.digest() == lab.Lab(args).taught(degraded)[1].digest()
    with pytest.raises(ValueError, match="auxiliary.pt is finished after 1 steps, and what is"):
        lab.Lab(args).taught(lab.changed(degraded, sft_steps=2))


def test_a_shorter_teacher_is_another_teacher(tiny, tmp_path):
    """Of the same base and data; the folder's own is not touched."""
    args = Namespace(out=str(tmp_path), seed=0, device="cpu", base_steps=1, sft_steps=2, batch=2,
                     count=40)
    room = lab.Lab(args)
    data, short = room.taught(lab.changed(args, sft_steps=1))
    assert data is room.data and short.digest() != room.models["auxiliary"].digest()
    assert room.taught(args)[1] is room.models["auxiliary"]
    made_of = torch.load(tmp_path / "study/auxiliary_1_steps/auxiliary.pt")["made_of"]
    assert made_of["steps"] == 1 and made_of["base"] == room.models["base"].digest()


def test_gap_is_measured_on_the_whole_tree(out, capsys):
    with pytest.raises(SystemExit):
        run(out, "gap", "--criteria", "Composition")
    assert "gap is measured on the whole tree" in capsys.readouterr().err


def test_a_run_of_degraded_annotations_has_data_and_auxiliary_of_its_own(tmp_path, monkeypatch):
    args = Namespace(out=str(tmp_path), seed=0, device="cpu", name="x", method="cpo", steps=1,
                     batch=1, accumulate=1, sampling_steps=2, sft_steps=1)
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
    monkeypatch.setattr(lab, "measured",
                        lambda lab, args, model, kind="plain", knobs=(): (model, []))
    monkeypatch.setattr(lab, "displacement", lambda *arguments: (0.5, []))
    monkeypatch.setattr(lab.evaluate, "asked", lambda *arguments: [])
    assert lab.align_run(room, degraded)["row"] == "0.25, taught by 0.25"
    assert lab.align_run(room, args)["row"] == "0.90, the folder's"
    assert lab.sample_run(room, degraded)["row"] == "taught by 0.25"
    assert (lab.sample_run(room, Namespace(model="auxiliary", prompt="plain", sft_steps=1))["row"]
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


def test_speed_expert_and_axes(out, monkeypatch):
    summary, text = run(out, "speed", "--seeds", "1", "--only", "none", "none, slower", "constant",
                        "--curve-steps", "2")
    assert [p["step"] for p in summary["curves"]["none"][0]] == [0, 1, 2] and "| constant |" in text
    monkeypatch.setattr("nanocpo.study.expert.DRAWS", (1, 2))
    monkeypatch.setattr("nanocpo.study.expert.IN_ROUNDS", (1,))
    monkeypatch.setattr("nanocpo.study.expert.CALIBRATED", (0, 4))
    study.main(["expert", "--out", str(out), "--results", str(out / "results"), "--count", "60",
                "--device", "cpu"])
    found = json.loads((out / "results" / "expert.json").read_text())
    assert list(found["rows"]) == [f"{ask}, calibrated on {some}" for ask in (
        "1 draws, 1 round", "2 draws, 1 round", "1 draws, 4 rounds") for some in (0, 4)]
    assert all(0 <= x <= 1 for row in found["rows"].values() for x in row)
    monkeypatch.setattr(study, "KNOBS", (1.0,))
    summary, text = run(out, "axes", "--seeds", "1")
    assert list(summary["relative"]) == [f"{root} 1" for root in summary["plain"][0]["by_root"]]
    assert "| Finish, scale 1 |" in text
    turned = np.asarray(Image.open(out / "results" / "axes_turned.png"))
    # 6 rows of 5, each 128 pixels large with a line of text and a title; the middle is the same
    # picture everywhere, for a knob at 0 does nothing
    tile = lambda row, column: turned[26 + row * 168:26 + row * 168 + 128,
                                      4 + column * 132:4 + column * 132 + 128]
    assert turned.shape == (6 * 168 + 4, 5 * 132 + 4, 3)
    assert all((tile(row, 2) == tile(0, 2)).all() for row in range(6))
    assert (tile(0, 0) != tile(0, 2)).any() and (tile(0, 0) != tile(0, 4)).any()
    args = study.parse(["decoupling", "--out", str(out), "--count", "60", "--batch", "4", "--steps",
                        "2", "--samples", "8", "--sampling-steps", "2", "--paint", "4"])
    branch, whole = lab.Lab(args).run([("branch", "align", dict(criteria=["Finish"], seed=1)),
                                       ("whole", "align", dict(seed=1))])
    assert branch["made_of"]["criteria"] == ["Finish"] and branch["row"] != whole["row"]


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
    summary, text = run(out, "decoupling", "--seeds", "4", "5", "--only", "k 0", "k -0.05",
                        "k -0.1")
    assert summary["chosen"] == dict.fromkeys(roots, "k -0.1") | {"Finish": "k -0.05"}
    assert (summary["scores"]["Composition"]
            == pytest.approx({"k 0": 1.5, "k -0.05": 1.3, "k -0.1": 0.6}))
    assert (summary["relative"]["Finish"]
            == [[1.04, 1.04]] * (len(roots) - 1) + [[0.2, 0.2]] and roots[-1] == "Finish")
    assert ("Largest own share 0.20, largest change of another 0.04." in text
            and "seeds 101, 102" in text and "--seeds 4 5 " in text)


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


@pytest.mark.parametrize("cores, jobs, threads", [(8, 2, 4), (5, 2, 2), (2, 3, 1), (None, 2, 1)])
def test_processes_share_the_cores(monkeypatch, tmp_path, cores, jobs, threads):
    """Whole threads for each, one at least."""
    asked = []

    class Context:
        def Pool(self, *how):
            asked.append(how)
            raise InterruptedError
    monkeypatch.setattr(lab.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(lab.multiprocessing, "get_context", lambda kind: Context())
    room = lab.Lab(Namespace(study="s", out=str(tmp_path), seed=0, jobs=jobs))
    room.models = {}
    with pytest.raises(InterruptedError):
        room.run([("key", "sample", {})])
    assert asked == [(jobs, torch.set_num_threads, [threads])]
    assert type(asked[0][2][0]) is int


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
    assert len(summary["effects"]) == 7 * 2 * 2
    assert all(0 <= e[share] <= 1 for e in summary["effects"]
               for share in ("winner rose", "loser fell"))


def test_one_step_by_hand():
    """Of the stated relative length; of three samples two count, one's winner error rises, both
    losers' fall."""
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))

        def frozen_copy(self):
            return Net().requires_grad_(False)
    weights, seeds = [], []

    def step(moving, generator):
        weights.append(moving.w.detach().clone())
        seeds.append(generator.initial_seed())
        after = len(weights) % 2 == 0
        logs = {"winner": [2.0, 1.0, 2.0] if after else [1.0] * 3,
                "loser": [0.5] * 3 if after else [1.0] * 3, "valid": [True, True, False]}
        return moving.w[0] * 7, {k: torch.tensor(v) for k, v in logs.items()}, None
    assert lab.step_effect(step, Net(), "SGD", 0.01, 3, seed=50) == {
        "winner rose": 0.5, "loser fell": 1.0, "samples": 6}
    assert seeds == [50, 50, 51, 51, 52, 52]
    for before, after in zip(weights[::2], weights[1::2]):
        assert torch.allclose(after - before, torch.tensor([-0.05, 0.0]), atol=1e-6)


def test_a_row_is_measured_with_the_run_s_own_settings(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(lab.evaluate, "paint", lambda *arguments: seen.append(arguments)
                        or np.full((3, 32, 32, 3), 7, np.uint8))
    monkeypatch.setattr(lab, "row_of", lambda images, base, seed: (len(images), base, seed))
    args = Namespace(samples=8, seed=5, sampling_steps=3, guidance=4.0, out=tmp_path, name="n",
                     model="auxiliary", prompt="plain", branch="Finish", scale=2.0)
    room = Namespace(models={"base": "the base"}, taught=lambda args: (None, "the auxiliary"))
    row, images = lab.measured(room, args, "model", "guided")
    assert row == (3, "the base", 5) and seen == [("model", "guided", 8, 5, 3, 4.0, ())]
    assert np.array_equal(np.load(tmp_path / "n.npz")["images"], images)
    assert (tmp_path / "n.png").exists()
    lab.sample_run(room, args)
    assert seen[1] == ("the auxiliary", "plain", 8, 5, 3, 4.0, [("Finish", 2.0)])


def test_displacement_by_hand():
    """The mean over timesteps of |eps - eps_ref|^2: of flow matching's predictions, which differ by
    a constant c, (c (1 - sigma))^2; and 0 for the base itself."""
    base = load_tiny()
    other = load_tiny()
    with torch.no_grad():
        other.unet.conv_out.bias += 0.5
    images = from_painter(count=40, seed=2).images
    captions = ["a boat"] * 40
    assert lab.displacement(base, base, images, captions) == (0.0, [0.0] * 10)
    mean, per_t = lab.displacement(other, base, images, captions)
    sigma = (torch.arange(40) + 0.5) * 1000 // 40 / 1000 + 0.001
    assert mean == pytest.approx(float((0.25 * (1 - sigma) ** 2).mean()), rel=1e-4)
    assert per_t[0] > per_t[5] > per_t[9] and np.mean(per_t) == pytest.approx(mean, rel=1e-3)


def load_tiny():
    torch.manual_seed(0)
    data = from_painter(count=4)
    return Model(data.criteria, ["a boat"], TINY, text_dim=16).frozen_copy()


@pytest.mark.parametrize("flags, calls", [
    (dict(paint=0), 2 * 10 * 4 * 2), (dict(method="esd"), 512 * 3 + 2 * 10 * 4 * 2),
    (dict(method="sft"), 0),
    (dict(method="dpo"), 0), (dict(method="sft", paint=7), 7 * 3),
    (dict(method="sft", paint=7, paint_guidance=2.0), 7 * 3 * 2),
    (dict(method="dpo", paint=7), 7 * 3 * 2), (dict(paint=7), 7 * 3 + 2 * 10 * 4 * 2),
    (dict(method="dpo", paint=7, paint_guidance=3.0), 7 * 3 * 4)])
def test_calls_of_the_teacher(flags, calls):
    args = Namespace(**dict(steps=10, batch=4, accumulate=2, sampling_steps=3) | flags)
    assert lab.teacher_calls(args) == calls


def test_a_curve_is_never_resumed_and_a_run_counts_its_log_s_seconds(tmp_path, monkeypatch):
    args, seen = (Namespace(out=str(tmp_path), name="x", every=2, method="cpo", steps=4, batch=3,
                            accumulate=2, resume=True, sampling_steps=2, sft_steps=1), [])

    def align(lab, args, data, auxiliary, watch=None, steady=False):
        seen.append((args.resume, getattr(args, "sample_every", None), steady))
        (tmp_path / "x.pt").write_text("")
        if watch:
            watch("average", 2)
        return "target", {"seconds": 70.5}
    monkeypatch.setattr(lab, "align", align)
    monkeypatch.setattr(lab, "measured", lambda lab, args, model: (dict.fromkeys(
        ("neg", "caption", "diversity", "frechet"), model), []))
    monkeypatch.setattr(lab, "displacement", lambda *arguments: (0.5, []))
    monkeypatch.setattr(lab.evaluate, "asked", lambda *arguments: [])
    room = lab.Lab(args)
    room.world, room.models = Namespace(data=None), {"base": None, "auxiliary": None}
    (point,) = lab.curve_run(room, args)["curve"]
    result = lab.align_run(room, args)
    assert (point["step"] == 2 and point["neg"] == "average"
            and (result["seconds"], result["images"]) == (70.5, 4 * 3 * 2))
    assert seen == [(False, 2, True), (True, None, False)] and not (tmp_path / "x.pt").exists()


def test_results_of_other_data_or_models_are_no_results(out, tmp_path, monkeypatch):
    """The same flags are not enough: the auxiliary may have been trained anew, the folder annotated
    again."""
    monkeypatch.setitem(lab.KINDS, "sample", lambda lab, args: {"row": 1})

    def room(data=from_painter(count=3), auxiliary="auxiliary"):
        made = lab.Lab(Namespace(study="x", out=str(tmp_path), jobs=1, seed=0))
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
    (["gap", "--jobs", "0"], "must be above 0"),
    (["speed", "--seeds", "1", "1"], "the same seed twice"),
    (["methods", "--seeds", "1", "4"], "--seeds 1 4 4 5: the same seed twice"),
    (["speed", "--seeds", "101"], "chosen on what is reported")])
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


def test_samples_stay_on_the_sheet():
    import nanocpo.study.figure as figure
    away = lambda xt, alpha_bar: -9 * torch.sign(xt)
    points = figure.draw_samples(flawed_world(), away, seed=0, count=20, steps=3)
    assert points.shape == (20, 2) and float(points.abs().max()) == figure.REACH


# ---------------------------------------------------------------- small rules

def test_interval_over_seeds_by_hand():
    """Student's t with two degrees of freedom: 4.30 s / sqrt(3)."""
    mean, half = study.over_seeds([1.0, 2.0, 3.0])
    assert (mean == 2 and half == pytest.approx(4.30 / 3 ** 0.5)
            and study.over_seeds([5.0]) == (5.0, 0.0))


# of Student's t with 1 to 9 degrees of freedom: 2.5 % lie above
@pytest.mark.parametrize("count, quantile", [*enumerate(
    (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262), 2)])
def test_quantiles_of_student_s_t(count, quantile):
    values = np.arange(count) * 1.5
    mean, half = study.over_seeds(list(values))
    assert mean == pytest.approx(values.mean())
    spread = (((values - values.mean()) ** 2).sum() / (count - 1)) ** 0.5
    assert half / (spread / count ** 0.5) == pytest.approx(quantile, abs=0.006)


def test_times_fewer_steps_by_hand():
    """A run of 10 steps against one of 60: six times fewer; of two vanillas the faster counts."""
    assert study.steps_cell([10.0], [[60.0]]) == "10 (6.0x)"
    assert study.steps_cell([10.0], [[90.0], [45.0]]) == "10 (4.5x)"
    assert study.steps_cell([30.0], [[15.0]]) == "30 (0.5x)"
    assert study.steps_cell([10.0, 20.0], [[None, 60.0], [30.0, 60.0]]) == "15 ± 64 (3.0x)"
    assert study.steps_cell([10.0], [[None]]) == "10" == study.steps_cell([10.0], [])
    assert study.steps_cell([10.0, None, None], [[60.0]]) == "not in 2 of 3 seeds"


def test_choice_of_a_setting():
    """The fewest negatives among those that keep the caption; a broken model with fewer still does
    not win. Where #A_neg does not decide, the Fréchet distance does."""
    def results(*rows):
        return [{"row": dict(zip(("neg", "caption", "frechet"), row))} for row in rows]
    three = results((3.0, 0.95, 1), (2.0, 0.93, 9), (1.0, 0.6, 5))
    assert (study.choose(three, 0.95) == 1 and study.choose(three, 0.5) == 2
            and study.choose(three, 0.99) == 0)
    close = results((0.1, 1.0, 3.0), (0.18, 1.0, 1.0), (0.21, 1.0, 0.5), (0.1, 0.9, 0.1))
    assert study.choose(close, 1.0) == 1


def fake(neg, **more):
    row = dict(neg=neg, caption=0.9, diversity=0.1, frechet=3.0, nearest=0.2, hue_gap=0.1,
               hatched=0.5)
    return {"row": row, "seconds": 10, "images": 100, "teacher calls": 7} | more


def test_the_table_of_methods_by_hand():
    text = study.methods_table({"base": [fake(6.0), fake(7.0)],
                                "CPO constant": [fake(1.0, displacement=0.02),
                                                 fake(2.0, displacement=0.04)]},
                               {"CPO constant": dict(lr=0.1, strength=0.3)})
    header, _, base, cpo = [[cell.strip() for cell in line.split("|")[1:-1]]
                            for line in text.splitlines()]
    assert dict(zip(header, base)) | {"#A_neg": ""} == {
        "row": "base", "#A_neg": "", "caption": "0.900 ± 0.000", "diversity": "0.100 ± 0.000",
        "Fréchet": "3.0 ± 0.0", "nearest": "0.200 ± 0.000", "hue gap": "0.10 ± 0.00",
        "hatched": "0.50 ± 0.00", "displacement": "", "teacher calls": "7",
        "pictures seen": "100", "seconds": "10", "chosen": ""}
    # half of 1, over sqrt(2) twice, times 12.71
    assert (base[1], cpo[1]) == ("6.50 ± 6.36", "1.50 ± 6.36")
    assert cpo[header.index("displacement")] == "0.0300 ± 0.1271"
    assert cpo[-1] == "lr 0.1, strength 0.3"


def test_pairs_of_rows_by_hand():
    text = study.pairs_table({"a": [1.0, 2.0], "b": [3.0, 6.0]})
    assert text.splitlines()[2:] == ["| a |  | -3.00 ± 12.71 |", "| b | 3.00 ± 12.71 |  |"]


def test_places_along_the_gap_by_hand():
    def log(place, missing=None):
        per_t = {"place": [place + i for i in range(10)], "across": [0.5] * 10}
        if missing is not None:
            per_t["place"][missing] = per_t["across"][missing] = None
        return {"log": {"place": place, "place_ref": 0.25, "across": 0.125, "per_t": per_t}}
    text = study.places_table({"SFT on the best": [fake(1.0, log={"loss": 1})],
                               "CPO noisy": [log(1.0), log(2.0, missing=3)]},
                              {"CPO noisy": dict(stabilizer="noisy", strength=1.5)})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert len(rows) == 1 and rows[0][:3] == ["CPO noisy", "0.25", "1.75"]
    assert rows[0][3].startswith("1.50 ±") and rows[0][4] == "1.50 (0.50)"
    assert rows[0][7] == "4.00 (0.50)" and rows[0][-1].startswith("0.12 ±")


@pytest.mark.parametrize("flags, place", [
    (dict(stabilizer="none"), "no end"), (dict(stabilizer="winner"), "1"),
    (dict(stabilizer="constant", strength=0.5), "2.00"), (dict(stabilizer="constant"), "1.43"),
    (dict(stabilizer="constant", strength=0.75, pairs="own"), "4.00"),
    (dict(stabilizer="safeguard", strength=0.2), "1"), (dict(stabilizer="balance"), "1"),
    (dict(stabilizer="noisy", strength=1.5), "1.80")])
def test_where_free_outputs_end(flags, place):
    """E12 to E15 and E21, in gaps from the loser; the reference stands at 0.3."""
    assert study.place_at_rest(flags, 0.3) == place


def test_the_table_of_the_search_by_hand():
    text = study.search_table({"a": [fake(1.0), fake(2.0)], "b": [fake(3.0)]},
                              {"a": ({}, [dict(lr=1), dict(lr=2)]), "b": ({}, [dict(best=0.5)])})
    assert text.splitlines()[2:] == ["| a | 1.00 / 0.900 (lr 1) | 2.00 / 0.900 (lr 2) |",
                                     "| b | 3.00 / 0.900 (best 0.5) |  |"]


def test_every_row_of_methods_is_another_run_with_settings_of_its_own():
    """No two rows or settings are the same command, and the batch of a pair is half."""
    room = lab.Lab(Namespace(batch=32))
    flags = [json.dumps(study.flags_of(room, name, setting), sort_keys=True)
             for name, (_, settings) in study.METHODS.items() for setting in settings]
    assert len(set(flags)) == len(flags) > 50
    batches = {name: study.flags_of(room, name, {}).get("batch") for name in study.METHODS}
    assert {name for name, batch in batches.items() if batch == 16} == {
        "Diffusion-DPO", "Diffusion-DPO on the teacher's pairs"}
    assert set(batches.values()) == {16, None}


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
    for name, joined in (("d", True), ("e", False)):
        line_chart(tmp_path / f"{name}.png", {"one": ([0, 2], [1.0, 3.0], [0, 0])}, "title", "x",
                   "y", joined=joined)
    bar_chart(tmp_path / "b.png", {"a": (1.0, 0.2), "b": (2.0, 0.0)}, "title", "x", highlight=["a"])
    matrix_chart(tmp_path / "c.png", [[0.2, 1.0], [1.0, 1.9]], ["a", "b"], ["a", "b and c"],
                 "title")
    pixels = {name: np.asarray(Image.open(tmp_path / f"{name}.png")).reshape(-1, 3)
              for name in "abcde"}
    colour = lambda name, rgb: (np.abs(pixels[name].astype(int) - rgb).max(1) < 4).sum()
    blue = (0x1f, 0x5f, 0xa8)
    tinted = {name: (pixels[name][:, 2].astype(int) - pixels[name][:, 0] > 40).sum()
              for name in "de"}
    assert 20 < tinted["e"] < tinted["d"] - 100                   # dots alone
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
    dot = torch.full((1, 3, 32, 32), -1.0)
    dot[0, :, 9, 20] = 1.0
    weights = np.exp(-np.arange(-3, 4) ** 2 / (2 * 0.9 ** 2))       # by hand, down and across
    kernel = np.outer(weights, weights) / weights.sum() ** 2
    around = second_opinion.disturb(dot, blur=0.9, generator=noise)[0, 1, 6:13, 17:24]
    assert np.allclose((around + 1) / 2, kernel, atol=1e-6)
    edge = torch.where(torch.arange(32) < 16, -1.0, 1.0).expand(2, 3, 32, 32)
    soft = second_opinion.disturb(edge, torch.tensor([0.6, 0.0]), generator=noise)
    assert torch.equal(soft[1], edge[1]) and -0.9 < float(soft[0, 0, 5, 15]) < -0.3
