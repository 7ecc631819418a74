"""The benchmark script: it must run at a small size, and say what it lacks."""
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "sd.py"


def test_without_diffusers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit, match=r"pip install -e '\.\[oracle\]'"):
        runpy.run_path(str(SCRIPT))["main"](["time"])


@pytest.mark.parametrize("more", [[], ["--checkpointing"]])
@pytest.mark.parametrize("what", ["adapters", "unets"])
def test_one_small_step_of_each_kind_runs(what, more, capsys):
    runpy.run_path(str(SCRIPT))["main"]([what, "--width", "0.1", "--size", "8", *more])
    mebibytes, seconds = map(float, capsys.readouterr().out.split())
    assert mebibytes >= 0 and seconds > 0
