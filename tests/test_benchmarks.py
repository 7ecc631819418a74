"""The benchmark scripts: they must run at a small size, and say what they lack."""
import runpy
import sys
import time
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def script(name):
    return runpy.run_path(str(FOLDER / f"{name}.py"))


@pytest.mark.parametrize("what", ["time", "step"])
def test_without_diffusers_it_says_what_to_install(what, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit, match=r"pip install -e '\.\[oracle\]'"):
        script("sd")["main"]([what])


@pytest.mark.parametrize("more", [[], ["--checkpointing"]])
@pytest.mark.parametrize("what", ["adapters", "unets", "peft"])
def test_one_small_step_of_each_kind_runs(what, more, capsys):
    if what == "peft":
        pytest.importorskip("peft")
    script("sd")["main"]([what, "--width", "0.1", "--size", "8", *more])
    mebibytes, seconds, share = map(float, capsys.readouterr().out.split())
    assert mebibytes >= 0 and seconds > 0 and share == 0


def test_several_steps_say_how_fast_they_are(capsys):
    script("sd")["main"](["adapters", "--width", "0.1", "--size", "8", "--steps", "2"])
    _, seconds, share = map(float, capsys.readouterr().out.split())
    assert seconds > 0 and share > 0


def test_a_step_of_the_toy_is_measured_part_by_part(capsys):
    """A step's forward units: SFT 1 + 2 going back; CPO two of the auxiliary more and one of the
    reference; DPO twice SFT's and two of the reference. The last layer's and the first one's
    gradients are not needed whole, so the counts lie a little below."""
    bench = script("step")["Bench"](batch=2)
    units = {kind: bench.flops(kind) / bench.forward_flops() for kind in ("sft", "dpo", "cpo")}
    assert units == pytest.approx({"sft": 3, "dpo": 8, "cpo": 6}, rel=0.03)
    shares = bench.parts(steps=2)
    expected = {"auxiliary", "reference", "target, forward", "backward", "optimiser", "average",
                "data", "prompts", "noise", "loss", "log", "gradient norm", "the rest"}
    assert shares.keys() <= expected and shares.keys() >= expected - {"log"}
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0


def test_the_plain_step_has_the_same_network(capsys):
    pytest.importorskip("diffusers")
    bench = script("step")["Bench"](batch=2)
    assert len(bench.plain(1)) == 1                        # it compares the numbers of parameters


def test_a_part_inside_a_part_counts_once(monkeypatch):
    watch = script("step")["Stopwatch"](lambda: None)
    clock = iter([0.0, 1.0, 6.0, 7.0])                   # outer, inner; inner ends, outer ends
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    with watch.part("outer"), watch.part("inner"):
        pass
    assert watch.seconds == {"outer": 2.0, "inner": 5.0}


@pytest.mark.parametrize("name, flags, told", [
    ("step", "--steps 0", "argument --steps: must be above 0, not 0"),
    ("step", "one --width 0.3", "argument --width: must be a multiple of 0.25, not 0.3"),
    ("step", "one --width nan", "argument --width: must be a multiple of 0.25, not nan"),
    ("step", "one --width -0.5", "argument --width: must be a multiple of 0.25, not -0.5"),
    ("step", "one --size 12", "argument --size: must be a multiple of 8, not 12"),
    ("step", "one --batch x", "argument --batch: invalid int value: 'x'"),
    ("sd", "step --width 0.05", "argument --width: must be a multiple of 0.1, not 0.05"),
    ("sd", "step --width inf", "argument --width: must be a multiple of 0.1, not inf"),
    ("sd", "step --rank 0", "argument --rank: must be above 0, not 0"),
    ("sd", "step --device abacus", "argument --device: torch cannot use abacus"),
    ("gpu", "--out=", "argument --out: is empty"),
])
def test_a_wrong_flag_is_told_in_one_line(name, flags, told, capsys):
    with pytest.raises(SystemExit) as ended:
        script(name)["main"](flags.split())
    said = capsys.readouterr().err
    assert ended.value.code == 2 and told in said and said.count("\n") == 1


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch finds no GPU here"):
        script("gpu")["main"]([])
