"""What a result was made of: every setting that decides it is in its record, so that nothing else
is taken for it. All fields of settings.py are gone through; nothing is listed by hand but what
decides nothing, with the reason."""
from argparse import Namespace
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

import sd_tiny
from toy_tiny import CRITERIA, DATA, settings_of, tiny_model

import nanocpo.toy.report as toy_report
from nanocpo.diffusion import PREDICTIONS
from nanocpo.folder.expert import log_ratios
from nanocpo.method import sft_step
from nanocpo.run import baselines, stages
from nanocpo.run.settings import STABLE_DIFFUSION, TOY, Settings, record
from nanocpo.sd.report import errors
from nanocpo.sd.world import StableDiffusion
from nanocpo.study import lab
from nanocpo.toy import painter
from nanocpo.toy.evaluate import paint, real_positive
from nanocpo.toy.paintings import from_painter
from nanocpo.toy.world import Toy
from nanocpo.train import Recipe, fit
from nanocpo.utils.checkpoint import differences, fingerprint, read_json

DECIDES_NOTHING = {
    "out": "where a result lies", "name": "how it is called",
    "data": "data have a digest (painted ones: their regime, number and seed)",
    "tree": "is part of the data's digest, of a checkpoint and of what `_load` compares",
    "skip_bad": "the pictures that are left have a digest",
    "device": "rounding only", "resume": "a resumed run ends in the same weights (test_train.py)",
    "save_every": "what is written on the way", "sample_every": "what is painted on the way",
    "base": "models have digests", "weights": "models have digests", "lora": "models have digests",
    "vae": "the latents have a digest", "config": "the models and latents have digests",
    "tokenizer": "has a digest (test_sd_world.py)",
    "variant": "models have digests",
    "zero_snr": "stands in the sources, as it came out (test_sd_world.py)",
    "checkpointing": "recomputes the same", "prompts": "what is painted on the way",
    "no_cache": "the cache keeps what would be computed"}
PARTS = {part.name: fields(getattr(TOY, part.name)) for part in fields(Settings)}
DECIDING = {part: [f for f in found if f.metadata["decides"]] for part, found in PARTS.items()}


def another(f, now):
    """Another value of a field than `now`, whatever its type is."""
    choices = f.metadata["argument"].get("choices")
    if choices:
        return next(value for value in reversed(choices) if value != now)
    if f.type is bool:
        return not now
    kind = str(f.type)
    if "list" in kind:
        return ["Tone"]
    return (now or 3) + (1 if "int" in kind else 0.125)


def all_fields(*parts):
    return [pytest.param(part, f, id=f.name) for part in parts for f in DECIDING[part]]


def test_what_decides_nothing_is_listed_with_its_reason():
    found = {f.name for some in PARTS.values() for f in some if not f.metadata["decides"]}
    assert found == DECIDES_NOTHING.keys() and all(DECIDES_NOTHING.values())


@pytest.fixture
def records(monkeypatch, tiny, tmp_path):
    """f(Settings) -> {name of a model: the record that its checkpoint would have}, of the toy."""
    found, model = {}, tiny_model().frozen_copy()
    monkeypatch.setattr(stages, "fit", lambda new, step, recipe, path, *, name, made_of, **rest: (
        found.update({name: made_of}) or (model, {})))
    monkeypatch.setattr(stages, "alignment_step", lambda *arguments: None)

    def of(settings):
        world = Toy(settings.changed(out=str(tmp_path)), DATA)
        world.new_base = lambda: model
        stages.stage_2(world, *stages.stage_1(world))
        return dict(found)
    return of


# of what only holds for another method or kind of data
WITH = {"best": dict(method="sft"), "apart": dict(method="dpo")}


@pytest.mark.parametrize("part, f", all_fields("common", "sft", "cpo", "report"))
def test_every_setting_that_decides_is_in_the_record_of_a_model(records, part, f):
    """common: of all three; sft: of a model of stage 1 (the target holds their digests); cpo: of
    the target alone; report: what the target's pictures are painted with."""
    settings = settings_of().changed(**WITH.get(f.name, {}))
    filled = settings.cpo.filled() if part == "cpo" else getattr(settings, part)
    value = another(f, getattr(filled, f.name))
    was, now = records(settings), records(settings.changed(**{f.name: value}))
    differ = {name for name in was if differences(was[name], now[name])}
    if part == "common":
        assert differ == {"base", "auxiliary", "target"}
    elif part == "sft":
        assert differ & {"base", "auxiliary"}
        # and of no more than it decides
        assert ("base" in differ) != f.name.startswith("sft_") or f.name == "sft_lean"
    elif part == "cpo":
        assert differ == {"target"}
    else:
        assert differ == ({"target"} if f.name == "sampling_steps" else set())


@pytest.mark.parametrize("prediction", [name for name in PREDICTIONS if name != "flow"])
def test_the_toy_s_prediction_is_a_source_of_every_model(records, prediction):
    was, now = records(settings_of()), records(settings_of("--prediction", prediction))
    assert all(differences(was[name], now[name]) == ["prediction"] for name in was)


@pytest.mark.parametrize("part, f", all_fields("common", "cpo", "weights"))
def test_every_setting_that_decides_is_in_the_record_of_an_adapter(part, f):
    world = object.__new__(StableDiffusion)
    world.sources = lambda: {"data": "x"}

    def of(settings):
        world.settings = settings
        return stages.everything(world, 1, 1e-3, record(settings.cpo.filled()))
    settings = STABLE_DIFFUSION.changed(weights="w", **WITH.get(f.name, {}))
    filled = settings.cpo.filled() if part == "cpo" else getattr(settings, part)
    changed = settings.changed(**{f.name: another(f, getattr(filled, f.name))})
    assert f.name in differences(of(settings), of(changed))


@pytest.fixture
def made(tmp_path):
    """f(Settings) -> the record of a study's run, and of its overrides."""
    def of(settings, kind="align", seed=0, **overrides):
        flags = {name: value for part in fields(Settings) if part.name != "weights"
                 for name, value in vars(getattr(settings, part.name)).items()}
        room = lab.Lab(Namespace(**flags | {"study": "x", "out": str(tmp_path), "seed": seed}))
        room.sources = {"pictures": "digest"}
        return room.made_of(("key", kind, overrides))
    return of


@pytest.mark.parametrize("part, f", all_fields("common", "sft", "cpo", "report"))
def test_every_setting_that_decides_is_in_the_record_of_a_study_s_run(made, part, f):
    value = another(f, getattr(getattr(TOY, part), f.name))
    if f.name != "seed":
        assert differences(made(TOY), made(TOY.changed(**{f.name: value}))) == [f.name]
    # the same as an override of one run, as studies.py writes them
    assert differences(made(TOY), made(TOY, **{f.name: value})) == [f.name]


@pytest.mark.parametrize("own", [
    dict(model="auxiliary"), dict(prompt="guided"), dict(every=3), dict(judged=0.5),
    dict(wrong=0.1), dict(branch="Tone"), dict(scale=2.0), dict(batches=3),
    dict(step_size=1e-3)], ids=str)
def test_what_a_study_asks_beside_the_settings_is_in_its_record(made, own):
    assert differences(made(TOY), made(TOY, **own)) == list(own)
    assert differences(made(TOY), made(TOY, kind="curve")) == ["kind"]


def test_the_seed_of_wrong_verdicts_is_that_of_the_folder(made):
    """A run's own seed is another one's."""
    for seed, told in ((0, []), (3, ["seed of the verdicts"])):
        assert differences(made(TOY, judged=0.5, wrong=0.0, seed=0) | {"seed": 9},
                           made(TOY, judged=0.5, wrong=0.0, seed=seed) | {"seed": 9}) == told
    degraded = [lab.degrade(DATA, 0.5, 0.1, seed).digest() for seed in (0, 0, 3)]
    assert degraded[0] == degraded[1] != degraded[2]


@pytest.mark.parametrize("f", [pytest.param(f, id=f.name) for f in DECIDING["report"]])
def test_every_setting_of_the_report_is_in_the_record_of_its_rows(monkeypatch, tmp_path, f):
    model, black = tiny_model().frozen_copy(), np.zeros((8, 32, 32, 3), np.uint8)
    monkeypatch.setattr(toy_report, "table", str)
    monkeypatch.setattr(toy_report, "evaluate", lambda models, *how: (
        {"rows": {name: {"neg": 1.0} for name in models}}, {name: black for name in models}))
    kept = []
    settings = replace(TOY.report, samples=4, sampling_steps=1)
    for how in (settings, replace(settings, **{f.name: another(f, getattr(settings, f.name))})):
        toy_report.report(tmp_path, "target", model, model, model, how, 0, 0)
        kept.append(read_json(tmp_path / "rows.json")["made_of"])
    assert differences(*kept) == [f.name]
    assert kept[0].keys() == {g.name for g in DECIDING["report"]} | {"seed", "models", "code"}


def one_step(model, generator):
    prompts = lambda criteria, batch, generator: [criteria.prompt(c) for c in batch.captions]
    return sft_step(model, CRITERIA, DATA.draw(4, generator), prompts, generator, lean=0.7)


def trained(seed, folder):
    return fit(tiny_model(), one_step, Recipe(2, 1e-3), folder / "x.pt", name="x", seed=seed)[0]


PROMPTS = [CRITERIA.prompt(caption) for caption in DATA.captions[:3]]
SEEDED = {
    "the base's first weights": lambda seed, folder: Toy(settings_of(
        "--seed", str(seed)), DATA).new_base().digest(),
    "an adapter's first weights": lambda seed, folder: fingerprint(
        sd_tiny.tiny().with_adapter(2, seed)),
    "training": lambda seed, folder: trained(seed, folder).digest(),
    "the sampler": lambda seed, folder: tiny_model().sample(PROMPTS, steps=2, seed=seed),
    "the sampler of Stable Diffusion": lambda seed, folder: sd_tiny.tiny().sample(
        ["a boat"], steps=1, seed=seed),
    "the report's pictures": lambda seed, folder: paint(tiny_model(), "plain", 4, seed, 2),
    "painted captions": lambda seed, folder: from_painter(count=9, seed=seed).captions,
    "painted states": lambda seed, folder: from_painter(count=9, seed=seed).annotations,
    "a painting": lambda seed, folder: painter.paint("a boat", dict.fromkeys(painter.LEAVES, 1),
                                                     (seed, 0)),
    "paintings of one caption": lambda seed, folder: [image for image, caption in zip(*(
        getattr(from_painter(count=9, regime="positive", seed=seed), name)
        for name in ("images", "captions"))) if caption == "a boat"][:1],
    "the teacher's pictures": lambda seed, folder: baselines.painted(
        DATA, tiny_model(), [0], 3, 2, seed).images,
    "the auxiliary's verdicts": lambda seed, folder: log_ratios(tiny_model(), DATA.take([0, 1]), 1,
                                                                seed),
    "errors of Stable Diffusion": lambda seed, folder: errors(
        sd_tiny.tiny(), torch.ones(1, 4, 6, 6), ["a boat"], seed=seed),
    "damaged verdicts": lambda seed, folder: lab.degrade(DATA, 0.5, 0.1, seed).annotations,
    "displacement": lambda seed, folder: lab.displacement(
        tiny_model(), tiny_model(1), DATA.images[:12], DATA.captions[:12], seed)[0],
    "held-out masterpieces": lambda seed, folder: real_positive(CRITERIA, 8, seed)[1].scores}


def test_a_painting_s_hue_is_of_the_seed_and_its_number(monkeypatch):
    monkeypatch.setattr("nanocpo.toy.paintings.paint", lambda caption, states, seed: np.array(seed))
    assert from_painter(count=3, seed=7).images.tolist() == [[7, 0, 1], [7, 1, 1], [7, 2, 1]]


@pytest.mark.parametrize("what", SEEDED)
def test_a_seed_is_heeded(tmp_path, what):
    """The same seed gives the same again, another one something else; the largest that a flag takes
    is one."""
    first, again, other, largest = (
        repr(np.asarray(SEEDED[what](seed, tmp_path)).tolist()) for seed in (0, 0, 1, 2 ** 63 - 1))
    assert first == again != other != largest != first


def test_settings_that_decide_nothing_change_no_weights(tmp_path, tiny):
    """Those that could: how often is saved and painted, and under which name."""
    def weights(out, **changes):
        settings = settings_of("--out", str(tmp_path / out), "--count", "40", "--paint", "4",
                               "--base-steps", "2", "--sft-steps", "2", "--sampling-steps", "2")
        world = Toy(settings.changed(**changes), DATA)
        base, auxiliary = stages.stage_1(world)
        return [model.digest() for model in (base, auxiliary,
                                             stages.stage_2(world, base, auxiliary)[0])]
    plain = weights("a")
    assert weights("b", save_every=1, sample_every=1, name="other") == plain
    assert not set(weights("c", seed=1)) & set(plain)             # as one that decides does
