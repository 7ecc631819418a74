"""Several processes, one run: the same gradients, one log, files by one process, a run that dies
well and goes on."""
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import sd_tiny
from toy_tiny import TINY

import nanocpo.toy.world
import train_cpo
from nanocpo.model import Model
from nanocpo.utils import ranks
from nanocpo.utils.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("toy_process.py")
FLAGS = ["--device", "cpu", "--count", "40", "--batch", "4", "--accumulate", "3", "--samples", "0",
         "--sample-every", "0", "--base-steps", "1", "--sft-steps", "2", "--steps", "40"]
LINUX = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")


def start(script, *flags, processes):
    """Start a script under torchrun, with a thread for each process."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                f"--nproc_per_node={processes}"] if processes > 1 else [sys.executable]
    return subprocess.Popen([*torchrun, script, *flags], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def launch(out, *flags, processes=3):
    """Start train_cpo.py with the toy's tiny model."""
    return start(WORKER, *FLAGS, "--out", out, *flags, processes=processes)


def finished(process):
    """What it printed, once it has ended well."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def result(out, name):
    """(weights, averaged weights, the optimiser's state, the random state) of a checkpoint."""
    content = load_checkpoint(out / f"{name}.pt")
    means = [x for state in content["optimizer"]["state"].values() for x in state.values()]
    return [*content["model"].values(), *content["ema"].values(), *means, content["rng"]]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """(OUT, what was printed) of a run of three processes that nobody disturbed."""
    out = tmp_path_factory.mktemp("three")
    return out, finished(launch(out))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """OUT of the same run in one process, with one thread."""
    out, threads = tmp_path_factory.mktemp("one"), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nanocpo.toy.world, "Model", partial(Model, unet=TINY, text_dim=16))
        train_cpo.main([*FLAGS, "--out", str(out)])
    torch.set_num_threads(threads)
    return out


def test_three_processes_take_the_gradients_of_one(one, three):
    """After the base's one step the optimiser's mean is a twentieth (Muon) or a tenth (AdamW) of
    the gradient of the joint batch."""
    out, printed = three
    for a, b in zip(result(one, "base"), result(out, "base"), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    # the last stage began from nearly the same and took 40 steps
    for a, b in zip(result(one, "target"), result(out, "target"), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    assert ("3 processes; a step is 12 pictures, 3 batches of 4: the run of --batch 4 "
            "--accumulate 3 in one process") in printed
    assert printed.count("3 processes;") == 1


def test_one_process_writes_and_the_log_is_of_all(one, three):
    out, _ = three
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in one.iterdir())
    for name in ("base", "auxiliary", "target"):
        ours, theirs = ([json.loads(line) for line in (folder / f"{name}.jsonl").open()]
                        for folder in (out, one))
        assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    # of the first step: all three batches are in it
    ours, theirs = (json.loads((folder / "base.jsonl").read_text()) for folder in (out, one))
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-6)
    assert ours["per_t"]["loss"] == pytest.approx(theirs["per_t"]["loss"], abs=2e-6)
    assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)


def children(pid):
    """{rank: process} of torchrun's children."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        environ = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = [entry[5:] for entry in environ if entry.startswith(b"RANK=")]
        found |= {int(rank[0]): int(child)} if rank else {}
    return found


def until_step(path, step):
    """Wait until the checkpoint `path` has done this many steps."""
    for _ in range(15000):
        if path.exists() and load_checkpoint(path)["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} did not come to step {step}")


@LINUX
def test_one_process_is_killed_all_end_and_resume_ends_in_the_same_bytes(three, tmp_path):
    """Of three: a sum of two does not depend on their order, one of three does."""
    process = launch(tmp_path, "--save-every", "1")
    until_step(tmp_path / "target.pt", 3)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=300)                  # the others do not go on waiting
    assert process.returncode
    assert re.search(r"Root Cause[^=]* rank +: 1 [^=]*SIGKILL", output)        # torchrun's words
    done = load_checkpoint(tmp_path / "target.pt")["step"]
    assert 3 <= done < 40
    finished(launch(tmp_path, "--resume"))
    for name in ("base", "auxiliary", "target"):
        for whole, parts in zip(result(three[0], name), result(tmp_path, name), strict=True):
            assert torch.equal(whole, parts)


@LINUX
def test_a_process_that_is_killed_at_any_moment_resumes_to_the_same_bytes(one, tmp_path):
    process = launch(tmp_path, "--save-every", "1", processes=1)
    until_step(tmp_path / "target.pt", 3)
    time.sleep(random.uniform(0, 0.3))
    process.kill()
    process.communicate()
    assert 3 <= load_checkpoint(tmp_path / "target.pt")["step"] < 40
    finished(launch(tmp_path, "--resume", processes=1))
    for whole, part in zip(result(one, "target"), result(tmp_path, "target"), strict=True):
        assert torch.equal(whole, part)


def test_stable_diffusion_in_two_processes_is_the_run_of_one(tmp_path):
    pytest.importorskip("diffusers"), pytest.importorskip("safetensors")
    from safetensors.torch import load_file
    files = sd_tiny.files(tmp_path)
    flags = ["--steps", "2", "--samples", "0"]
    train_cpo.main([*sd_tiny.flags(files, tmp_path / "one"), *flags])
    output = finished(start(ROOT / "train_cpo.py", *sd_tiny.flags(files, tmp_path / "two"), *flags,
                            processes=2))
    assert output.count("target.safetensors written") == 1
    names = [sorted(str(path.relative_to(out)) for path in out.rglob("*"))
             for out in (tmp_path / "one", tmp_path / "two")]
    assert names[0] == names[1]                           # latents and prompts in the cache too
    for name in ("auxiliary", "target"):
        one, two = (load_file(tmp_path / out / f"{name}.safetensors") for out in ("one", "two"))
        for key, x in one.items():
            torch.testing.assert_close(two[key], x, atol=1e-4, rtol=1e-3)


# --- the functions, one by one

@pytest.fixture
def of_three(monkeypatch):
    """This is process 1 of three."""
    monkeypatch.setattr(ranks, "count", lambda: 3)
    monkeypatch.setattr(ranks, "number", lambda: 1)


@pytest.mark.parametrize("given, expected", [((32, 6), (32, 6)), ((30, 1), (10, 3)),
                                             ((6, 4), (2, 12))])
def test_a_step_is_divided_and_stays_as_large(of_three, given, expected):
    assert ranks.divided(*given) == expected


def test_a_step_that_cannot_be_divided_is_refused(of_three):
    with pytest.raises(ValueError, match="3 processes cannot share --accumulate 1 batches of "
                                         "--batch 32: make one of the two a multiple of 3"):
        ranks.divided(32, 1)


def test_each_has_its_part_and_all_is_done(of_three):
    seen = []
    encode = ranks.every_nth(seen.append)
    for i in range(8):
        encode(i)
    assert seen == ranks.share(list(range(8))) == [1, 4, 7]


def test_one_batch_is_drawn_as_ever_and_several_do_not_depend_on_one_another():
    parent, twin = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    assert ranks.generators(parent, 1) == [parent]
    first, second = ranks.generators(parent, 2)
    drawn = torch.randn(100, generator=first)                # what another process might draw
    _, again = ranks.generators(twin, 2)
    here, there = (torch.randn(100, generator=generator) for generator in (second, again))
    assert torch.equal(here, there) and not torch.equal(here, drawn)
    assert torch.equal(parent.get_state(), twin.get_state())


def test_without_torchrun_nothing_is_shared():
    model = torch.nn.Linear(1, 1)
    assert ranks.count() == 1 and ranks.first() and ranks.together(model) is model
    assert ranks.gathered([1]) == [1] == ranks.share([1])
