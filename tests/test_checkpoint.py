"""Files: whole or not there, refused where broken, and used again only for the same thing."""
import errno
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from toy_tiny import DATA, same, settings_of, tiny_model

import train_cpo
import train_sft
from nanocpo.criteria import Criteria
from nanocpo.model import load_model
from nanocpo.run.stages import stage_1
from nanocpo.toy.export import export
from nanocpo.toy.paintings import from_painter
from nanocpo.toy.world import Toy
from nanocpo.utils.checkpoint import (alone, differences, is_finished, load_checkpoint, read_json,
                                      save_checkpoint, save_json, use_again)


def content(model):
    return model.content() | {"ema": model.state_dict()}


# ---------------------------------------------------------------- whole, broken, malicious

@pytest.mark.parametrize("there_before", [True, False])
def test_failing_midway_never_leaves_half_a_file(tmp_path, monkeypatch, there_before):
    path = tmp_path / "model.pt"
    if there_before:
        save_checkpoint(path, content(tiny_model()))
    old = path.read_bytes() if there_before else None

    def half(_, file, **__):
        (open(file, "wb").write(b"half") if isinstance(file, (str, os.PathLike))
         else file.write(b"half"))
        raise OSError("disk full")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, content(tiny_model(1)))
    assert path.read_bytes() == old if there_before else not path.exists()
    monkeypatch.undo()
    save_checkpoint(path, content(tiny_model(1)))  # and what is left is in no one's way
    assert torch.equal(load_model(path).unet.conv_in.weight, tiny_model(1).unet.conv_in.weight)


def write_broken(path, kind):
    save_checkpoint(path, content(tiny_model()))
    whole, others = path.read_bytes(), {
        "dict": {"state_dict": {}, "config": {}}, "tensor": torch.zeros(3), "list": [1, 2]}
    if kind in others:
        torch.save(others[kind], path)
    else:
        damaged = {"truncated": whole[:-200], "half": whole[:len(whole) // 2], "empty": b"",
                   "garbage": b"\0\xff?" * 999}
        path.write_bytes(damaged[kind])


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # asking a tensor for "config"
@pytest.mark.parametrize("kind", ["truncated", "half", "empty", "garbage",
                                  "dict", "tensor", "list"])
@pytest.mark.parametrize("load", [load_checkpoint, load_model])
def test_a_damaged_file_is_named(tmp_path, kind, load):
    write_broken(tmp_path / "broken.pt", kind)
    with pytest.raises(ValueError, match="broken.pt: not a checkpoint of nanocpo, or damaged"):
        load(tmp_path / "broken.pt")


def test_a_byte_that_was_changed_is_noticed(tmp_path):
    """In the middle of the weights, where it is another number and nothing else."""
    save_checkpoint(tmp_path / "x.pt", content(tiny_model()))
    torn = bytearray((tmp_path / "x.pt").read_bytes())
    torn[len(torn) // 2] ^= 1
    (tmp_path / "x.pt").write_bytes(torn)
    with pytest.raises(ValueError, match="x.pt: not a checkpoint of nanocpo, or damaged"):
        load_model(tmp_path / "x.pt")


def test_damage_is_named_whatever_torch_says_of_it(tmp_path, monkeypatch):
    """What is torn can be an error of the file system without the file's name."""
    save_checkpoint(tmp_path / "x.pt", content(tiny_model()))

    def invalid(*arguments, **named):
        raise OSError(errno.EINVAL, "Invalid argument")
    monkeypatch.setattr(torch, "load", invalid)
    words = "x.pt: not a checkpoint of nanocpo, or damaged .OSError.; delete it"
    with pytest.raises(ValueError, match=words):
        load_checkpoint(tmp_path / "x.pt")


def test_a_missing_file_stays_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pt"):
        load_checkpoint(tmp_path / "none.pt")


def test_a_full_disk_is_told_with_what_is_free_and_leaves_no_half_file(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    save_checkpoint(path, content(tiny_model()))
    before, write = path.read_bytes(), type(path).write_bytes

    def full(self, data):
        write(self, bytes(data)[:100])
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(type(path), "write_bytes", full)
    words = (r"model.pt: there is no room for it \([\d,.]+ MiB are free, no space left on device.; "
             "the file that was there stays")
    with pytest.raises(OSError, match=words):
        save_checkpoint(path, content(tiny_model(1)))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
def test_only_one_process_makes_a_file(tmp_path):
    """Another one is refused in a line; the lock of a dead one is free."""
    code = ("import sys, time; from nanocpo.utils.checkpoint import alone\n"
            f"with alone({str(tmp_path / 'base.pt')!r}):\n"
            "    print('here', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                          cwd=Path(__file__).parent.parent) as other:
        assert other.stdout.readline() == "here\n"
        with pytest.raises(ValueError, match="base.pt is being made by another run; wait for it"):
            with alone(tmp_path / "base.pt"):
                pass
        with alone(tmp_path / "auxiliary.pt"):                    # another file is free
            pass
        other.kill()
    with alone(tmp_path / "base.pt"):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("change, words", [
    (dict(config=[1]), "'config' is no dict"), (dict(criteria="x"), "'criteria' is no dict"),
    (dict(made_of={}, step="3", steps=3), "'step' is no int"),
    (dict(config={"unet": torch.zeros(1)}), "'config' holds more than words and numbers"),
    (dict(made_of={"lr": torch.zeros(1)}, step=1, steps=1),
     "'made_of' holds more than words and numbers"),
    (dict(made_of={}), "'step' is no int"), (dict(made_of=3), "'made_of' is no dict"),
    (dict(ema={"w": torch.tensor([1.0, float("nan")])}), "the weight w is not finite"),
    (dict(ema={"w": torch.tensor(float("inf"))}), "the weight w is not finite"),
    (dict(ema={"w": "x"}), "the weight w is not finite")])
def test_one_door_for_checkpoints(tmp_path, change, words):
    torch.save(content(tiny_model()) | change, tmp_path / "x.pt")
    words = f"x.pt: not a checkpoint of nanocpo, or damaged .{words}.; delete it and train again"
    with pytest.raises(ValueError, match=words):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("change", [dict(heads=(0, 0)), dict(channels=()), dict(groups=0),
                                    dict(channels="x"), dict(depth=(1,)), dict(unknown=1)])
def test_impossible_settings_in_a_checkpoint(tmp_path, change):
    kept = content(tiny_model())
    kept["config"]["unet"] |= change
    torch.save(kept, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt: its parts do not fit together"):
        load_model(tmp_path / "x.pt")


def test_what_is_not_finished_is_said(tmp_path, capsys):
    for step, told in ((3, "x.pt is not finished: step 3 of 7\n"), (7, "")):
        torch.save(content(tiny_model()) | dict(step=step, steps=7, made_of={}), tmp_path / "x.pt")
        load_model(tmp_path / "x.pt")
        assert capsys.readouterr().out.endswith(told) and bool(told) == (step == 3)


def test_json_has_no_nan(tmp_path):
    save_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError, match="x.json: a number in it is not finite"):
        save_json(tmp_path / "x.json", {"a": float("nan")})
    assert read_json(tmp_path / "x.json") == {"a": 1}
    assert read_json(tmp_path / "none.json") == {}


def test_a_sealed_file_is_read_only_as_it_was_written(tmp_path):
    path, content = tmp_path / "x.json", {"a": [1, 2.5], "b": {"c": "d"}}
    save_json(path, content, sealed=True)
    assert read_json(path, sealed=True) == content and content.keys() == {"a", "b"}
    written = path.read_text()
    assert json.loads(written).keys() == {"a", "b", "checksum"}
    save_json(path, {"by number": {2: "x", 10: (1, 2)}}, sealed=True)
    assert read_json(path, sealed=True) == {"by number": {"2": "x", "10": [1, 2]}}
    for other in (written.replace("2.5", "2.6"), written.replace('"d"', '"e"'),
                  written.replace('"c"', '"C"'), written.replace("checksum", "sum"),
                  json.dumps(content), "[]", "{}"):
        path.write_text(other)
        assert read_json(path, sealed=True) == {}


class Malicious:
    """Unpickling it makes a folder."""
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("write", [lambda content, file: pickle.dump(content, file, 2), torch.save],
                         ids=["pickle", "torch"])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, write):
    with open(tmp_path / "evil.pt", "wb") as file:
        write(content(tiny_model()) | {"step": Malicious(str(tmp_path / "executed"))}, file)
    with pytest.raises(ValueError, match="evil.pt"):
        load_checkpoint(tmp_path / "evil.pt")
    assert os.listdir(tmp_path) == ["evil.pt"]
    if write is not torch.save:  # it would have worked
        pickle.loads((tmp_path / "evil.pt").read_bytes())
        assert (tmp_path / "executed").exists()


# ---------------------------------------------------------------- what may be used again

def test_differences_are_named_and_a_record_survives_its_file(tmp_path):
    record = {"a": 1, "shape": (2, 3), "names": ["x"], "none": None}
    assert differences(record, record) == []
    save_json(tmp_path / "record.json", record)                   # where a tuple becomes a list
    assert differences(json.loads((tmp_path / "record.json").read_text()), record) == []
    now = {"a": 2, "shape": (2, 3), "names": ["x"], "new": None}  # another, one gone, one more
    assert differences(record, now) == ["a", "new", "none"] == differences(now, record)


def test_what_would_silently_be_another_thing_is_refused(capsys):
    was = {"data": "a", "base": "b", "steps": 1}
    use_again("x.pt", was, dict(was))
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError,
                       match="^x.pt belongs to another run .base, data.; choose another "
                                         "--out, or delete the file$"):
        use_again("x.pt", was, {"data": "c", "base": "c", "steps": 1})
    with pytest.raises(ValueError, match="^x.pt belongs to another run .steps.; do this$"):
        use_again("x.pt", was, was | {"steps": 2}, cure="do this")
    with pytest.raises(ValueError, match="^x.pt does not say what it was made of .*; do this$"):
        use_again("x.pt", None, was, must=set(), cure="do this")
    # what does not have to agree is said
    use_again("x.pt", was, was | {"steps": 2, "lr": 3}, must={"data", "base"})
    assert capsys.readouterr().out == ("x.pt is used as it is (lr None, not 3, steps 1, not 2); "
                                       "delete it to train another\n")
    with pytest.raises(ValueError, match="^x.pt belongs to another run .data.;"):
        use_again("x.pt", was, was | {"steps": 2, "data": "c"}, must={"data", "base"})


def test_unfit_checkpoints_are_refused(tiny, tmp_path):
    train_sft.main(["--out", str(tmp_path), "--count", "40", "--base-steps", "1",
                    "--sft-steps", "1", "--batch", "4", "--sample-every", "0"])
    settings = settings_of("--out", str(tmp_path), "--count", "40")
    other = from_painter(Criteria.load().select("Composition"), 20)
    with pytest.raises(ValueError, match="base.pt belongs to another run .tree.;"):
        stage_1(Toy(settings, other))
    strange = from_painter(count=20)
    strange.captions[0] = "a cow"
    with pytest.raises(ValueError, match="base.pt belongs to another run .captions.;"):
        stage_1(Toy(settings, strange))
    save_json(tmp_path / "tree.json", other.criteria.to_dict())
    tree = settings.changed(tree=str(tmp_path / "tree.json"))     # painted data, but for the tree
    with pytest.raises(ValueError,
                       match="base.pt belongs to another run .tree.; choose another --out"):
        stage_1(Toy(tree))
    with pytest.raises(ValueError,
                       match="base.pt belongs to another run .tree.; choose another --base"):
        stage_1(Toy(tree.changed(base=str(tmp_path / "base.pt"))))


def test_what_is_there_is_used_again(tiny, tmp_path):
    common = ["--out", str(tmp_path), "--count", "100", "--batch", "4", "--device", "cpu",
              "--sample-every", "0"]
    start = time.time()
    report = train_cpo.main([*common, "--base-steps", "2", "--sft-steps", "2", "--steps", "2",
                             "--samples", "16", "--sampling-steps", "3"])
    assert 0 < sum(report["seconds"].values()) <= time.time() - start
    before = (tmp_path / "base.pt").read_bytes(), (tmp_path / "auxiliary.pt").read_bytes()
    line = train_cpo.main([*common, "--criteria", "Color Relations", "--name", "colour",
                           "--steps", "20", "--paint", "4", "--samples", "0"])
    assert line["step"] == 20 and (tmp_path / "colour.pt").exists()
    # used, not remade
    assert before == ((tmp_path / "base.pt").read_bytes(), (tmp_path / "auxiliary.pt").read_bytes())

    # the rows of base and auxiliary are not measured twice
    kept = json.loads((tmp_path / "rows.json").read_text())
    assert list(kept["rows"]) == ["base", "auxiliary", "auxiliary_prompted", "auxiliary_guided"]
    kept["rows"]["base"]["neg"] = 99
    kept.pop("checksum")
    save_json(tmp_path / "rows.json", kept, sealed=True)
    # with another seed everything is measured anew
    for seed, neg in (("0", 99), ("1", report["rows"]["base"]["neg"])):
        again = train_cpo.main([*common, "--name", "again", "--steps", "2", "--samples", "16",
                                "--sampling-steps", "3", "--seed", seed])
        assert (again["rows"]["base"]["neg"] == pytest.approx(neg, abs=4)
                and list(again["rows"])[-1] == "again")


def test_base_and_auxiliary_are_used_again_only_for_the_same_data(tiny, tmp_path, capsys):
    export(from_painter(count=12), tmp_path / "data")
    flags = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--base-steps", "1",
             "--sft-steps", "1", "--batch", "4", "--sample-every", "0", "--device", "cpu"]
    base, auxiliary = train_sft.main(flags)
    again = train_sft.main([*flags, "--sft-steps", "2"])
    assert same(base, again[0]) and same(auxiliary, again[1])
    assert ("auxiliary.pt is used as it is (steps 1, not 2); delete it"
            in (out := capsys.readouterr().out) and "base.pt is" not in out)
    train_sft.main([*flags[:2], "--out", str(tmp_path / "other"), *flags[4:], "--seed", "1"])
    with pytest.raises(ValueError, match="auxiliary.pt belongs to another run .base.;"):
        train_sft.main([*flags, "--base", str(tmp_path / "other" / "base.pt")])
    listing = tmp_path / "data" / "metadata.jsonl"
    listing.write_text("\n".join(listing.read_text().splitlines()[::-1]))
    with pytest.raises(ValueError, match="base.pt belongs to another run .data.;"):
        train_sft.main(flags)


def test_a_half_trained_auxiliary_is_no_teacher(tiny, tmp_path):
    world = Toy(settings_of("--out", str(tmp_path), "--base-steps", "1", "--sft-steps", "2"), DATA)
    stage_1(world)
    path = tmp_path / "auxiliary.pt"
    save_checkpoint(path, load_checkpoint(path) | {"step": 1})            # as if it had been killed
    stage_1(world)
    assert is_finished(load_checkpoint(path))
