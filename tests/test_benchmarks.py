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


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch finds no GPU here"):
        script("gpu")["main"]([])
