"""Refusals that come up rarely, each once: what is wrong, where, and what to do about it."""
import errno
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy_tiny import DATA, settings_of, tiny_model

import nanocpo.study.second_opinion as second_opinion
import nanocpo.study.studies as study
from exercises.check import difference, outcome, record
from exercises.grade import grade, handed_in
from exercises.install import installed
from exercises.probes import CHECKS, Check
from exercises.make import make, parse_numbers, starter_weights
from exercises.table import load, split_name
from nanocpo.run.flags import parse_sampling
from nanocpo.sd import files, lora
from nanocpo.sd.files import WeightsError
from nanocpo.sd.tokenizer import BOS, EOS, Tokenizer
from nanocpo.sd.vae import VAE
from nanocpo.sd.world import StableDiffusion, StableDiffusionPainter
from nanocpo.toy.paintings import from_painter
from nanocpo.toy.world import Toy, ToyPainter
from nanocpo.utils import cli, device, ranks
from nanocpo.utils.checkpoint import atomic_write, load_checkpoint, save_checkpoint


def sampling(**changed):
    how, _ = parse_sampling("a test", [])
    return replace(how, **changed)


def test_the_toy_paints_one_size():
    for size in ({"width": 64}, {"height": 64}):
        with pytest.raises(ValueError, match="--width and --height need --weights: the toy"):
            ToyPainter(sampling(**size))


def test_what_stable_diffusion_cannot_be_asked():
    for wrong, words in (({"judge": True}, "--judge: the critic knows the painter's pictures only"),
                         ({"positive": ["all"]}, "a base knows no tree; with --weights name the"),
                         ({"negative": ["all"]}, "a base knows no tree; with --weights name the")):
        with pytest.raises(ValueError, match=words):
            StableDiffusionPainter(sampling(**wrong), None)
    with pytest.raises(AssertionError, match="the base of Stable Diffusion is a file"):
        StableDiffusion.new_base(None)
    assert VAE.clip is None


def test_numbers_of_paintings():
    for wrong in (dict(count=0), dict(judged=0.49), dict(judged=1.01)):
        with pytest.raises(ValueError, match="count must be at least 1 .is .* between 0.5 and 1"):
            from_painter(**wrong)
    assert len(from_painter(count=1, judged=0.5)) == len(from_painter(count=1, judged=1)) == 1


@pytest.mark.parametrize("flags, words", [
    (["--weights", "x", "--prediction", "flow"], "--prediction flow: Stable Diffusion 1, 2 and XL"),
    (["--prompts", "x.txt"], "--prompts needs --weights: the toy knows its data's captions only"),
    (["--lora", "x"], "--lora needs --weights: an adapter is nothing without its base")])
def test_flags_that_do_not_go_together(flags, words, capsys):
    with pytest.raises(SystemExit):
        settings_of(*flags)
    assert words in capsys.readouterr().err


def test_studies_are_the_toy_s(capsys):
    with pytest.raises(SystemExit):
        study.main(["gap", "--weights", "x"])
    assert "--weights: the studies are the toy's" in capsys.readouterr().err


def test_only_the_first_process_reports(monkeypatch, tmp_path):
    monkeypatch.setattr(ranks, "first", lambda: False)
    assert Toy(settings_of("--out", str(tmp_path)), DATA).report(*[None] * 3, 0) is None
    assert StableDiffusion.report(None, *[None] * 3, 0) is None


def test_an_error_of_a_file_that_is_not_a_full_disk_stays_what_it_is(tmp_path):
    with pytest.raises(OSError) as told, atomic_write(tmp_path / "x"):
        raise OSError(errno.EIO, "input/output error")
    assert told.value.errno == errno.EIO and not list(tmp_path.iterdir())


def test_text_that_is_not_utf_8(tmp_path):
    parser = cli.Parser()
    parser.add_argument("--caption", type=cli.encodable)
    with pytest.raises(SystemExit):
        parser.parse_args(["--caption", "a \udcff"])
    assert parser.parse_args(["--caption", ""]).caption == ""


def test_a_machine_that_does_not_say_how_much_memory_it_has(monkeypatch):
    monkeypatch.setattr(device.os, "sysconf", lambda name: (_ for _ in ()).throw(ValueError(name)))
    assert device.memory() == math.inf
    monkeypatch.setattr(device.os, "sysconf", {"SC_PAGE_SIZE": 7, "SC_PHYS_PAGES": 5}.get)
    assert device.memory() == 35


def test_the_critic_s_second_opinion_takes_the_target_where_there_is_one(monkeypatch, tmp_path):
    monkeypatch.setattr(second_opinion, "train_network", lambda criteria, **how: None)
    monkeypatch.setattr(second_opinion, "paintings", lambda *how: (1 / 0))
    save_checkpoint(tmp_path / "target.pt", tiny_model().content() | {"ema": {}})
    seen = []
    monkeypatch.setattr(second_opinion, "load_model", lambda path, device: seen.append(
        (path, device)))
    room = SimpleNamespace(args=SimpleNamespace(out=str(tmp_path)), data=DATA,
                           models={"base": 1, "auxiliary": 2}, world=SimpleNamespace(device="d"))
    with pytest.raises(ZeroDivisionError):
        second_opinion.critic(room)
    assert seen == [(tmp_path / "target.pt", "d")]


@pytest.mark.parametrize("error", [
    KeyboardInterrupt(), torch.cuda.OutOfMemoryError("x"), MemoryError(), ValueError("x"),
    RuntimeError("you tried to allocate 5 bytes")], ids=lambda error: type(error).__name__)
def test_a_developer_sees_where_an_error_arose(monkeypatch, error):
    """python -X dev; without it each ends in one line."""
    def main():
        raise error
    for mode in (True, False):
        monkeypatch.setattr(cli.sys, "flags", SimpleNamespace(dev_mode=mode))
        with pytest.raises(type(error) if mode else SystemExit):
            cli.command(main)


def test_another_process_is_only_to_blame_where_there_is_one(monkeypatch):
    lost, other = RuntimeError("gloo: Connection closed by peer"), RuntimeError("a bug")
    for count in (1, 2):
        monkeypatch.setattr(ranks, "count", lambda: count)
        assert ranks.is_of_another(lost) == (count == 2) and not ranks.is_of_another(other)
        assert ranks.is_of_another(ranks.dist.DistError("x")) == (count == 2)


# ---- Stable Diffusion's files

def test_files_that_hold_something_else(tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(WeightsError, match="x.json: cannot be read .not an object.; is the"):
        files.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert files.read_json(tmp_path / "x.json") == {"a": 1}
    torch.save({}, tmp_path / "x.ckpt")
    with pytest.raises(WeightsError, match="x.ckpt.*: there is no adapter in it"):
        lora.load(tmp_path / "x.ckpt", {"unet": torch.nn.Linear(2, 2)})


def test_a_dora_is_refused_by_name():
    pieces = {"A": torch.ones(1, 3), "B": torch.ones(2, 1)}
    a, b = lora._fold("x, unet, q", "q", (2, 3), pieces, {"lora_alpha": 3})
    assert torch.equal(a, pieces["A"]) and torch.equal(b, 3 * pieces["B"])
    with pytest.raises(WeightsError, match="x, unet, q is a DoRA: not supported"):
        lora._fold("x, unet, q", "q", (2, 3), pieces, {"use_dora": True})


def test_a_tokenizer_that_is_not_clip_s():
    words = {BOS: 0, EOS: 1, "a": 2}
    for lost in (BOS, EOS):
        with pytest.raises(WeightsError, match="the tokenizer's vocabulary has no .*"
                                               f"{lost[2:-2]}.*: it is not CLIP's"):
            Tokenizer([], {word: i for word, i in words.items() if word != lost})
    with pytest.raises(WeightsError, match="has no !: it is not CLIP's"):
        Tokenizer([], words, pad="!")
    assert Tokenizer([], words, pad="a").pad == 2


# ---- exercises

def test_what_is_recorded_and_told_of_numbers():
    assert record(1.5) == ["float64 ()", [1.5]] and record(None) == ["None", []]
    assert record(np.array([[1, 2]])) == ["int64 (1, 2)", [1.0, 2.0]]
    assert difference(["float64 (1,)", [math.nan]], ["float64 (1,)", [1.0]]) == (
        "some of yours are not finite")
    assert difference(["float64 (1,)", [1.0]], ["float32 (1,)", [1.0]]) == (
        "the dtype or the shape differs")
    assert difference(["None", []], ["float32 (1,)", [1.0]]) == "something else altogether"


def test_an_error_is_an_outcome_of_one_line(monkeypatch):
    def wrong(draw):
        raise KeyError("y" * 200 + "\nmore")
    monkeypatch.setitem(CHECKS, 99, {"x": Check("core", wrong, "")})
    assert outcome(99, "x", "s") == {"error": ["KeyError: '" + "y" * 149, []]}


def test_all_is_every_exercise():
    assert parse_numbers("all") == sorted(load())


def test_a_copy_is_never_written_over_another(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="is not empty; choose another folder"):
        make(tmp_path, [1])
    assert (tmp_path / "mine").read_text() == "x"


def test_starter_weights_that_are_large_are_told(tmp_path, capsys, monkeypatch):
    for name in ("base", "auxiliary"):
        content = tiny_model().content() | {"step": 1, "steps": 1}
        save_checkpoint(tmp_path / f"{name}.pt", content | {"ema": {"x": torch.zeros(7 * 10 ** 5)}})
    starter_weights(tmp_path, tmp_path / "small")
    assert capsys.readouterr().err == ""
    for name in ("base", "auxiliary"):
        content = load_checkpoint(tmp_path / f"{name}.pt")
        save_checkpoint(tmp_path / f"{name}.pt", content | {
            "ema": {"x": torch.zeros(4 * 10 ** 6)}})
    starter_weights(tmp_path, tmp_path / "large")
    assert "starter weights: 16.0 MB, more than 12" in capsys.readouterr().err


def test_nobody_handed_anything_in(tmp_path):
    with pytest.raises(ValueError, match="no folder of a student in it; one folder each"):
        grade(tmp_path, [1], "x", tmp_path / "out")
    exercise = load()[1]
    assert handed_in(tmp_path, exercise)[2].endswith("was not handed in")
    path = tmp_path / split_name(exercise.functions[0])[0]
    path.parent.mkdir(parents=True)
    path.write_text("def other(): pass\n")
    assert ": no function " in handed_in(tmp_path, exercise)[2]
    path.write_text("def f(:\n")
    assert ", line 1: " in handed_in(tmp_path, exercise)[2]


def test_rows_of_the_table_that_do_not_fit_the_code(tmp_path):
    with pytest.raises(ValueError, match="no file below nanocpo holds 'nowhere.f'; mend the row"):
        split_name("nowhere.f")
    text = ('[[exercise]]\nnumber = 1\ntitle = "x"\nlesson = 1\npoints = 1\nequation = "E1"\n'
            'functions = ["{}"]\nasks = "x"\ninterface = "x"\n')
    path = tmp_path / "table.toml"
    path.write_text(text.format("diffusion.nowhere"))
    with pytest.raises(ValueError, match="exercise 1: no function 'nowhere' in nanocpo/diffusion"):
        load(path)
    wrong = '[[exercise.wrong]]\nhint = "x"\n'
    path.write_text(text.format("diffusion.guide") + wrong + 'bug = "never planted"\n')
    with pytest.raises(ValueError, match="exercise 1: tests/mutants.py has no row 'never planted'"):
        load(path)
    path.write_text(text.format("diffusion.guide") + wrong + 'old = "not there"\nnew = "x"\n')
    with pytest.raises(ValueError, match="exercise 1: 'not there' does not occur in diffusion.gui"):
        load(path)


def test_a_function_that_needs_what_stands_around_it():
    with pytest.raises(ValueError, match="unet.ResBlock.__init__: cannot stand alone .super"):
        with installed({"unet.ResBlock.__init__": "def __init__(self):\n    pass\n"}):
            pass
