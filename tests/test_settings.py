"""Settings, the flags that are made of them, and what all commands share."""
import argparse
import json
from dataclasses import fields

import pytest
import torch

from toy_tiny import DATA, settings_of, tiny_model

import train_cpo
from nanocpo.criteria import CriteriaError
from nanocpo.losses import RULES
from nanocpo.run import stages
from nanocpo.run.flags import parse_sampling, parse_training
from nanocpo.run.settings import QUICK, STABLE_DIFFUSION, TOY, flat, knobs, record
from nanocpo.toy.paintings import from_painter
from nanocpo.toy.world import Toy
from nanocpo.utils import cli
from nanocpo.utils.cli import command
from nanocpo.utils.device import pick_device, send


def test_a_stage_trains_as_its_flags_say(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "fit", lambda *arguments, **named: (arguments, named))
    settings = settings_of("--resume", "--bf16", "--accumulate", "2", "--seed", "3",
                           "--save-every", "7", "--out", str(tmp_path))
    (model, step, recipe, path), named = stages.train(
        Toy(settings, DATA), "x", tiny_model(), 9, 1e-3, "step", {})
    assert (step, recipe.steps, recipe.lr, path) == ("step", 9, 1e-3, tmp_path / "x.pt")
    assert [named[key] for key in ("resume", "bf16", "accumulate", "seed", "save_every",
                                   "sample_every")] == [True, True, 2, 3, 7, 0]
    flawed, mixed = (Toy(settings_of("--data", regime, "--count", "200", "--seed", "3")).data
                     for regime in ("flawed", "mixed"))
    assert ((mixed.annotations < 0).sum(1).min() < len(mixed.criteria) / 3
            and mixed.digest() == from_painter(count=200, regime="mixed", seed=3).digest())
    assert flawed.digest() == from_painter(count=200, seed=3).digest()


def test_a_branch_is_pulled_more_gently_unless_told_otherwise():
    flags = ("", "--criteria Tone", "--strength 0 --beta 9",
             "--criteria Tone --strength 0.9 --beta 2")
    filled = [settings_of(*f.split()).cpo.filled() for f in flags]
    assert ([(cpo.strength, cpo.beta) for cpo in filled]
            == [(0.3, None), (0, 1), (0, 9), (0.9, 2)])
    assert {cpo.stabilizer for cpo in filled} == {"constant"}


def test_quick_is_other_defaults_and_no_more(capsys):
    quick = settings_of("--quick")
    assert quick == QUICK.changed(batch=8, steps=4, sample_every=0, device=quick.common.device)
    assert settings_of("--quick", "--base-steps", "7", "--out", "x").changed(out="y") == (
        QUICK.changed(batch=8, steps=4, sample_every=0, device=quick.common.device, base_steps=7,
                      out="y"))
    assert settings_of().sft.base_steps > 3 * QUICK.sft.base_steps - 1
    with pytest.raises(SystemExit):
        settings_of("--quick", "--weights", "x")
    assert "--quick is the toy's" in capsys.readouterr().err


def test_strengths_without_a_limit_are_refused(capsys):
    for flags, words in (("--stabilizer constant --strength 1", "needs less than 1"),
                         ("--stabilizer noisy --strength 0", "s must be above 0")):
        with pytest.raises(SystemExit):
            settings_of(*flags.split())
        assert words in capsys.readouterr().err


def test_knobs_of_the_branches():
    assert knobs(["Color Relations=2", "a=b=-0.5"]) == [("Color Relations", 2.0), ("a=b", -0.5)]
    for wrong in ("Level", "Level=", "Level=much"):
        with pytest.raises(ValueError, match=f"--axis '{wrong}': write NAME=SCALE"):
            knobs([wrong])


def test_dpo_has_defaults_of_its_own():
    for flags in ([], ["--criteria", "Tone"]):
        cpo = settings_of("--method", "dpo", *flags).cpo.filled()
        assert (cpo.stabilizer, cpo.beta) == ("none", 200)
    cpo = settings_of("--method", "dpo", "--stabilizer", "safeguard", "--beta", "9").cpo.filled()
    assert (cpo.stabilizer, cpo.beta) == ("safeguard", 9)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_without_a_strength_takes_its_usual_one(rule):
    for flags in ([], ["--method", "dpo"]):
        usual = settings_of("--stabilizer", rule, *flags).cpo.filled()
        assert (usual.stabilizer, usual.strength) == (rule, RULES[rule].strength)
    told = settings_of("--stabilizer", rule, "--strength", "0.4").cpo.filled()
    assert (told.stabilizer, told.strength) == (rule, 0.4)


def test_esd_regresses_to_the_end_of_constant_whatever_the_stabilizer():
    for flags in ([], ["--stabilizer", "none"], ["--stabilizer", "winner"]):
        assert settings_of("--method", "esd", *flags).cpo.filled().strength == 0.3


def test_only_cpo_and_esd_on_a_branch_paint_and_only_they_record_how(monkeypatch):
    branch = ["--criteria", "Tone"]
    paints = {flags: settings_of(*flags.split()).cpo.filled().paint for flags in (
        "", "--paint 7", "--criteria Tone", "--criteria Tone --paint 7",
        "--criteria Tone --paint 0", "--criteria Tone --method esd",
        "--criteria Tone --method dpo", "--criteria Tone --method sft")}
    assert list(paints.values()) == [512, 7, 1024, 7, 0, 1024, 0, 0]
    assert settings_of("--weights", "x", "--data", "y").cpo.filled().paint == 0
    # who paints asks the auxiliary, whatever the method
    asks = [settings_of(*flags.split()).cpo.teaches
            for flags in ("", "--method esd", "--method dpo", "--method sft",
                          "--method sft --paint 7", "--method dpo --paint 7")]
    assert asks == [True, True, False, False, True, True]

    made_of = {}
    monkeypatch.setattr(stages, "train", lambda *arguments, **named: made_of.update(arguments[6]))
    monkeypatch.setattr(stages, "alignment_step", lambda *arguments: None)
    model = tiny_model().frozen_copy()
    for flags, told in (([], True), (["--paint", "0"], False), (branch, True),
                        ([*branch, "--paint", "0"], False)):
        made_of.clear()
        stages.stage_2(Toy(settings_of(*flags), DATA), model, model)
        assert ("sampling_steps" in made_of) == told and "auxiliary" in made_of


def test_changed_replaces_fields_of_any_part_and_the_record_has_those_that_decide():
    settings = TOY.changed(seed=3, sft_lr=0.5, steps=7, samples=2, rank=4, no_field_at_all=1)
    was, now = flat(TOY), flat(settings)
    assert {name for name in now if now[name] != was[name]} == {"seed", "sft_lr", "steps",
                                                                "samples", "rank"}
    assert (settings.common.seed, settings.weights.rank, TOY.common.seed) == (3, 4, 0)
    kept = record(settings.common, settings.cpo)
    assert kept["seed"] == 3 and kept["steps"] == 7 and "sft_lr" not in kept
    # where a result lies, and what is only looked at, decides nothing
    assert not kept.keys() & {"out", "device", "resume", "save_every", "sample_every", "name"}


def test_every_field_has_a_flag_and_the_flags_give_the_defaults(capsys):
    for argv, settings in (([], TOY), (["--weights", "x"], STABLE_DIFFUSION.changed(weights="x"))):
        parsed = parse_training("a test", ["--device", "cpu", *argv],
                                ("common", "sft", "cpo", "report"))
        assert flat(parsed) == flat(settings.changed(device=pick_device("cpu")))
    with pytest.raises(SystemExit):
        parse_training("a test", ["--help-all"], ("common", "sft", "cpo", "report"))
    shown = capsys.readouterr().out
    for part in (TOY.common, TOY.sft, TOY.cpo, TOY.report):
        for f in fields(part):
            assert f"--{f.name.replace('_', '-')}" in shown


@pytest.mark.parametrize("flags, words", [
    ("--name base", "name 'base'"), ("--name ./base", "no name for files"),
    ("--name Auxiliary_guided", "is taken by"), ("--name x_kohya", "is taken by"),
    ("--name report/x", "no name for files"), ("--name rows", "is taken by"),
    ("--strength 1", "'constant' needs less than 1"),
    ("--method esd --strength 2", "'constant' needs less than 1"),
    ("--method esd --stabilizer none --strength 1", "'constant' needs less than 1"),
    ("--samples 1", "two pictures"), ("--steps 0", "--steps: must be above 0, not 0"),
    ("--beta -1", "--beta: must be above 0"), ("--lr x", "--lr: invalid float value"),
    ("--batch 0", "--batch: must be above 0"), ("--seed -1", "--seed: must be above -1"),
    ("--lora x.safetensors", "--lora needs --weights"),
    ("--device nonsense", "--device: torch cannot use nonsense")])
def test_flags_that_make_no_sense_are_refused_before_anything_is_trained(
        tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.setattr(train_cpo, "Toy", lambda settings: pytest.fail("not refused"))
    with pytest.raises(SystemExit):
        train_cpo.main([*flags.split(), "--out", str(tmp_path / "out")])
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_unknown_branch_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(CriteriaError, match="no dimension 'Colour'"):
        train_cpo.main(["--criteria", "Colour", "--count", "8", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_device_is_picked_once_and_can_be_named():
    assert pick_device("cpu").type == "cpu" and pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(argparse.ArgumentTypeError, match="torch cannot use nonsense"):
        pick_device("nonsense")


def test_a_gpu_is_not_waited_for_and_other_devices_are():
    class Tensor:
        def to(self, device, non_blocking):
            return device, non_blocking
    assert [send(Tensor(), torch.device(name))[1] for name in ("cuda", "cuda:1", "cpu", "mps")] == [
        True, True, False, False]
    assert torch.equal(send(torch.ones(2), "cpu"), torch.ones(2))


def test_scripts_that_are_one_process_say_so_under_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="error: only train_sft.py and train_cpo.py can be"):
        command(lambda: None)


def test_what_the_user_can_mend_is_told_in_one_line_and_a_bug_with_its_traceback(monkeypatch):
    def fails(error):
        def main():
            raise error
        return main
    for error in (CriteriaError("no dimension"), FileNotFoundError("no file"),
                  FloatingPointError("diverged")):
        with pytest.raises(SystemExit, match=f"^error: {error}$"):
            command(fails(error))
    with pytest.raises(SystemExit, match=r"^error: the GPU's memory is full: a smaller --batch "
                                         r".*\(Tried to allocate 2 GiB\)$"):
        command(fails(torch.cuda.OutOfMemoryError("Tried to allocate 2 GiB. "
                                                  "GPU 0 has a total capacity of 1 GiB")))
    for bug in (KeyError("a bug"), json.JSONDecodeError("no JSON, no file named", "", 0),
                UnicodeDecodeError("utf-8", b"x", 0, 1, "bad")):
        with pytest.raises(type(bug)):
            command(fails(bug))
    monkeypatch.setattr(cli.sys, "flags", argparse.Namespace(dev_mode=True))         # python -X dev
    with pytest.raises(CriteriaError):
        command(fails(CriteriaError("no dimension")))


@pytest.mark.parametrize("flags", [
    "--guidance nan", "--guidance inf", "--strength nan", "--lr inf", "--lr nan", "--beta inf",
    "--seed -1", f"--seed {2 ** 63}", "--batch 0", "--paint -1", "--best nan", "--out=", "--data=",
    "--criteria=", "--lean 0", "--samples 1.5"])
def test_numbers_of_flags_are_finite_and_names_are_not_empty(flags, capsys):
    with pytest.raises(SystemExit):
        settings_of(*flags.split())
    name = flags.split()[0].split("=")[0]
    assert f"argument {name}: " in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--eta nan", "--eta -1", "--eta 2", "--guidance inf",
                                   "--steps 0", "--count 0", f"--seed {2 ** 64}", "--out="])
def test_numbers_of_sampling_are_checked_before_it_begins(flags, capsys):
    with pytest.raises(SystemExit):
        parse_sampling("a test", flags.split())
    assert f"argument {flags.split()[0].split('=')[0]}: " in capsys.readouterr().err
    assert parse_sampling("a test", ["--eta", "1", "--seed", "0", "--device", "cpu"])[0].eta == 1


@pytest.mark.parametrize("several, words", [
    (True, "stopped; --resume goes on from the last checkpoint\n"), (False, "stopped\n")])
def test_ctrl_c_is_one_line(capsys, several, words):
    def main():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as ended:
        command(main, several=several)
    assert ended.value.code == 130 and capsys.readouterr().err == words


def test_a_full_memory_is_one_line():
    def main():
        torch.empty(2 ** 50)
    with pytest.raises(SystemExit, match=r"the memory is full: 4,194,304.0 GiB were asked for at "
                                         "once; a smaller --batch"):
        command(main)

    def other():
        raise MemoryError
    with pytest.raises(SystemExit, match="the memory is full: a smaller"):
        command(other)
    with pytest.raises(ValueError, match="--count 1000000000: that many pictures need 5,722 GiB"):
        from_painter(count=10 ** 9)
