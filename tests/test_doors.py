"""The doors: whatever stands where a file should be, and whatever a flag says, is told in one line
and waited for by nobody."""
import argparse
import errno
import json
import math
import os
import subprocess
import sys
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import exercises.__main__
import exercises.make
import sample
import train_cpo
import train_sft
from nanocpo.criteria import Criteria, CriteriaError
from nanocpo.folder import annotate
from nanocpo.folder.reading import DataError, from_folder
from nanocpo.model import load_model
from nanocpo.run.flags import parse_sampling
from nanocpo.sd import files, lora, model
from nanocpo.sd.tokenizer import EOS, Tokenizer
from nanocpo.sd.weights import WeightsError, build, clip_config
from nanocpo.sd.clip import CLIP
from nanocpo.sd.world import read_prompts, say_if_older
from nanocpo.study import lab, studies
from nanocpo.toy import export, report
from nanocpo.utils.checkpoint import load_checkpoint, read_json, save_json
from nanocpo.utils.cli import command, printable
from nanocpo.utils.files import NotAFile, members, ordinary, parse, read_text
from nanocpo.utils.log import Log

from sd_tiny import train_merges, write_tokenizer
from toy_tiny import settings_of, tiny_model

ROOT = Path(__file__).resolve().parent.parent
PIPE = "a named pipe or a device, not a file"


@pytest.fixture
def pipe(tmp_path):
    """A pipe that nobody writes into: who opens it to read waits for ever."""
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


# ---------------------------------------------------------------- files

READERS = {
    "checkpoint": load_checkpoint, "model": load_model, "rows": read_json, "text": read_text,
    "tree": Criteria.load, "weights": files.read_tensors, "config": files.read_json,
    "tokenizer": Tokenizer.load, "prompts": read_prompts, "adapter": lora.named,
    "log": lambda path: Log(path, "x", keep=3)}


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_or_a_folder_is_told_and_not_waited_for(pipe, tmp_path, reader):
    with pytest.raises((ValueError, OSError), match=PIPE):
        path = READERS[reader](pipe)
        if reader == "adapter":             # its name is good, and then it is read
            lora.load(path[0], {})
    if reader not in ("tokenizer", "adapter"):                    # where a folder has a meaning
        with pytest.raises((ValueError, OSError), match="a folder, not a file"):
            READERS[reader](tmp_path)


def test_an_ordinary_file_is_one_and_nothing_is_told_as_nothing(tmp_path):
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbfa")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    assert ordinary(tmp_path / "link") == tmp_path / "link" and read_text(tmp_path / "link") == "a"
    with pytest.raises(FileNotFoundError):
        ordinary(tmp_path / "y")
    with pytest.raises(NotAFile, match=PIPE):
        ordinary(os.devnull)
    (tmp_path / "x").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="x: is not UTF-8 .invalid start byte at byte 2.; save it"):
        read_text(tmp_path / "x")


def test_a_cache_that_is_no_file_is_made_again(tmp_path):
    made = model.cached(tmp_path, "key", lambda: torch.ones(2))
    (path,) = tmp_path.iterdir()
    path.unlink()
    os.mkfifo(path)
    assert torch.equal(model.cached(tmp_path, "key", lambda: torch.ones(2)), made)
    assert path.is_file() and torch.equal(model.cached(tmp_path, "key", None), made)


def test_a_cache_of_which_one_byte_has_changed_is_made_again(tmp_path):
    made = model.cached(tmp_path, "key", lambda: torch.linspace(1, 2, 64))
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[content.index(made.numpy().tobytes()) + 3] ^= 1
    path.write_bytes(content)
    assert torch.equal(model.cached(tmp_path, "key", lambda: made + 5), made + 5)
    assert torch.equal(model.cached(tmp_path, "key", None), made + 5)


def test_what_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": "x"}')

    def forbidden(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    monkeypatch.setattr(Image, "open", forbidden)
    with pytest.raises(DataError, match="line 1: .*a.png cannot be read as a picture .Permission "
                                        "denied.; name another, or change what may be read"):
        from_folder(tmp_path)
    monkeypatch.setattr(torch, "load", lambda path, **_: forbidden(path))
    with pytest.raises(PermissionError, match="Permission denied: .*a.png"):
        load_checkpoint(tmp_path / "a.png")


def test_the_grid_is_no_pipe(pipe, capsys):
    os.rename(pipe, pipe.with_suffix(".png"))
    with pytest.raises(SystemExit):
        parse_sampling("a test", ["--out", str(pipe.with_suffix(".png"))])
    assert "pipe.png: name the picture of the grid" in capsys.readouterr().err


def test_a_log_of_other_bytes_goes_on(tmp_path):
    line = json.dumps({"step": 2, "seconds": 1})
    (tmp_path / "x.jsonl").write_bytes(line.encode() + b"\n\xff\xfe{\n")
    log = Log(tmp_path / "x.jsonl", "x", keep=3)
    assert log.line["step"] == 2 and (tmp_path / "x.jsonl").read_text() == line + "\n"


def test_a_broken_result_of_a_study_is_named(tmp_path):
    room = lab.Lab(Namespace(study="s", out=str(tmp_path), seed=0))
    room.models, room.sources = {}, {}
    path, run = room.path("key"), ("key", "sample", {})
    path.parent.mkdir(parents=True)
    for broken in ("{", "[]", "", '{"made_of": [1]}'):
        path.write_text(broken)
        with pytest.raises(ValueError, match="key.json does not say what .* or damaged.; delete"):
            room.read(run)
    save_json(path, {"made_of": room.made_of(run)}, sealed=True)
    whole = path.read_text()
    path.write_text(whole.replace('"kind": "sample"', '"kind":  "sample"'))     # still the same
    assert room.read(run)["made_of"]["kind"] == "sample"
    path.write_text(whole.replace("{", '{"row": {"neg": 0.0},', 1))             # a row is put in
    with pytest.raises(ValueError, match="key.json does not say what .* or damaged.; delete"):
        room.read(run)
    path.write_text(whole)
    for broken in (b"", b"PK\3\4", b"x" * 99, b"npy"):
        path.with_suffix(".npz").write_bytes(broken)
        with pytest.raises(ValueError, match="key.npz: not the pictures of a run, or damaged"):
            room.read(run)
    with zipfile.ZipFile(path.with_suffix(".npz"), "w") as file:
        file.writestr("other.npy", b"")
    with pytest.raises(ValueError, match="key.npz: not the pictures"):
        room.read(run)


def test_a_base_that_does_not_say_its_seed_is_named(tmp_path):
    torch.save(tiny_model().content() | {"ema": {}}, tmp_path / "base.pt")
    with pytest.raises(ValueError, match="base.pt does not say which seed it is of"):
        lab.Lab(Namespace(bases=[str(tmp_path)], out="x")).rooms()


# ---------------------------------------------------------------- JSON

def test_json_has_one_meaning_or_none():
    assert parse('{"a": [1, {"b": "\\ud83d\\ude00"}]}') == {"a": [1, {"b": "\U0001f600"}]}
    for text, words in (('{"a": 1, "b": {"c": 1, "c": 1}}', "'c' stands there twice"),
                        ('["\\ud83d"]', "holds half a character"), ("{", "not JSON .Expecting"),
                        ('{"\\udc00": 1}', "holds half a character"),
                        ("[" * 10 ** 5, "nested too deep"), ("", "not JSON"),
                        ("9" * 4001, "a number of 4001 digits; write it as a string")):
        with pytest.raises(ValueError, match=words):
            parse(text)


def test_members_by_hand():
    text = ' {"a":1.00 ,\t"b\\"\\u00e9" : {"c":["}",1]},"n":NaN , "i": -12345678901234567890123 }'
    found = members(text)
    assert {key: raw for key, (_, raw) in found.items()} == {
        "a": "1.00", 'b"\u00e9': '{"c":["}",1]}', "n": "NaN", "i": "-12345678901234567890123"}
    assert found["i"][0] == -12345678901234567890123 and math.isnan(found["n"][0])
    assert members("{ }") == {}


# ---------------------------------------------------------------- words

def test_an_error_is_one_line_whatever_a_file_says(capsys):
    def main():
        raise CriteriaError("a\nb\x1b[2J \ud800 é" + "long " * 9999 + "; mend it")
    with pytest.raises(SystemExit) as ended:
        command(main)
    told = ended.value.code
    assert told.startswith("error: a\\nb\\x1b[2J \\ud800 é") and told.endswith("long ; mend it")
    assert len(told) < 2100 and printable("a" * 2000) == "a" * 2000
    with pytest.raises(SystemExit):
        settings_of("--name", "a\nb" * 999)
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("coding", ["utf-8", "ascii"])
def test_what_a_terminal_cannot_show_is_no_reason_to_stop(coding):
    code = ("from nanocpo.utils.cli import command\n"
            "command(lambda: print('caf\\udce9 \\u00e9'))")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT,
                           env=os.environ | {"PYTHONIOENCODING": coding})
    assert found.returncode == 0 and found.stderr == b""
    assert found.stdout.decode(coding) == "caf\\udce9 " + (
        "é" if coding == "utf-8" else "\\xe9") + os.linesep


def test_numbers_of_exercises_are_those_that_there_are():
    assert exercises.make.parse_numbers("2-4,1") == [1, 2, 3, 4]
    for wrong, words in (("1-99999999999", "no exercise 999999999; there are 1 to"), ("0", "no ex"),
                         ("²", "write numbers as 1-4,7"), ("1-x", "write numbers"), ("", "write"),
                         ("5-2", "write the smaller number first")):
        with pytest.raises(ValueError, match=words):
            exercises.make.parse_numbers(wrong)


MAINS = {"train_sft": train_sft.main, "train_cpo": train_cpo.main, "sample": sample.main,
         "study": studies.main, "report": report.main, "export": export.main,
         "annotate": annotate.main, "exercises": exercises.__main__.main}


class Seen(Exception):
    pass


def parsers(main, monkeypatch):
    """The parser that this main makes, and those of its subcommands."""
    def stop(self, *arguments):
        raise Seen(self)
    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Seen) as seen:
            main([])
    top = seen.value.args[0]
    return [top] + [parser for action in top._actions if isinstance(
        action, argparse._SubParsersAction) for parser in action.choices.values()]


@pytest.mark.parametrize("name", MAINS)
def test_no_flag_of_any_command_is_empty_or_infinite(name, monkeypatch):
    """But a caption: the empty one is the unconditional prompt. Seeds are those of torch."""
    checked = 0
    for parser in parsers(MAINS[name], monkeypatch):
        for action in parser._actions:
            if action.nargs == 0 or isinstance(action, argparse._SubParsersAction):
                continue
            wrong = ["", " "] if action.dest != "caption" else []
            number = any(isinstance(x, (int, float)) for x in np.ravel(action.default)) or (
                getattr(action.type, "__name__", "") in ("int", "float"))
            wrong += ["nan", "inf", "-inf", "1e999"] if number else []
            wrong += ["-1", str(2 ** 63)] if "seed" in action.dest and number else []
            for value in wrong:
                with pytest.raises(argparse.ArgumentError):
                    parser._get_value(action, value)
                    parser._check_value(action, value)
                checked += 1
    assert checked > 3


# ---------------------------------------------------------------- Stable Diffusion

@pytest.mark.parametrize("change, words", [
    (lambda lines: lines[:1], "there is no merge in it"),
    (lambda lines: lines[:61], r"60 tokens of its vocabulary are made by no merge, .*is cut off"),
    (lambda lines: lines[:-1] + ["é"], "a merge is two tokens")])
def test_a_tokenizer_that_is_cut_off(tmp_path, change, words):
    write_tokenizer(tmp_path)
    lines = (tmp_path / "merges.txt").read_text().splitlines()
    assert len(lines) == 121 and Tokenizer.load(tmp_path)("a boat")[:1]
    (tmp_path / "merges.txt").write_text("\n".join(change(lines)), encoding="utf-8")
    with pytest.raises(WeightsError, match=words):
        Tokenizer.load(tmp_path)


def test_words_in_angle_brackets_need_no_merge(tmp_path):
    """As <|endoftext|>, which every vocabulary has; all other long words do."""
    vocabulary = write_tokenizer(tmp_path)
    for word, refused in (("<|mine|>", False), ("<mine>", False), ("x<mine>", True),
                          ("mine>", True)):
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary | {word: len(vocabulary)}))
        if refused:
            with pytest.raises(WeightsError, match="1 tokens of its vocabulary are made by no"):
                Tokenizer.load(tmp_path)
        else:
            assert Tokenizer.load(tmp_path).vocabulary[word] == len(vocabulary)


@pytest.mark.parametrize("number", ["7", None, -1, 1.5, True])
def test_ids_are_whole_numbers(tmp_path, number):
    vocabulary = write_tokenizer(tmp_path) | {"a": number}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(WeightsError, match="the id .* is no whole number from 0 on"):
        Tokenizer.load(tmp_path)


def test_derived_vocabularies_say_so(tmp_path):
    assert Tokenizer(train_merges()).derived
    write_tokenizer(tmp_path)
    assert not Tokenizer.load(tmp_path).derived
    assert not Tokenizer.load(tmp_path / "merges.txt").derived    # vocab.json lies beside it
    (tmp_path / "vocab.json").unlink()
    assert Tokenizer.load(tmp_path / "merges.txt").derived and EOS in Tokenizer.load(tmp_path).ids


def test_weights_that_are_not_finite_are_named():
    config = clip_config(dict(vocab_size=20, hidden_size=8, intermediate_size=8,
                              num_hidden_layers=1, num_attention_heads=2))
    state = CLIP(config).state_dict()
    assert build(CLIP, config, dict(state), torch.float32, "x")
    name = list(state)[3]
    for broken in (float("nan"), float("inf")):
        worse = {key: x.clone() for key, x in state.items()}
        worse[name].view(-1)[1] = broken
        with pytest.raises(WeightsError, match=f"x: {name} is not finite in torch.float32"):
            build(CLIP, config, worse, torch.float32, "x")


def test_an_adapter_older_than_its_checkpoint_is_told(tmp_path, capsys):
    path = tmp_path / "target.safetensors"
    say_if_older(path)                                            # no checkpoint: nothing to say
    content = tiny_model().content() | {"ema": {}, "made_of": {}, "steps": 7}
    for step in (7, 3):
        torch.save(content | {"step": step}, tmp_path / "target.pt")
        say_if_older(path)
    (tmp_path / "target.pt").write_bytes(b"an embedding of another program")
    say_if_older(path)
    assert capsys.readouterr().out == (f"{path} is of an earlier run: target.pt stopped at step 3 "
                                       "of 7\n")
