"""The numbers of the report, by hand, and which of its rows are kept."""
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from toy_tiny import CRITERIA, DATA, settings_of, tiny_model

import nanocpo.toy.report as module
from nanocpo.data import to_images, to_tensor
from nanocpo.run.settings import Report
from nanocpo.study import lab
from nanocpo.toy.critic import judge
from nanocpo.toy.evaluate import (all_prompts, asked, diversity, evaluate, frechet, hue_gap,
                                  measure_row, real_positive, roughness, seen, to_nearest, unfit)
from nanocpo.toy.painter import CAPTIONS, HATCHING, HUES, LEAVES, paint
from nanocpo.toy.paintings import from_painter
from nanocpo.toy.report import code, report, table
from nanocpo.toy.world import Toy
from nanocpo.utils.checkpoint import code_digest
from nanocpo.utils.report import interval


def test_interval_by_hand():
    # standard deviation sqrt(2), standard error 1
    mean, (low, high) = interval(np.array([1.0, 3.0]))
    assert mean == 2 and low == pytest.approx(2 - 1.96) and high == pytest.approx(2 + 1.96)


def test_diversity_is_the_mean_distance_within_a_caption():
    black, white = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)
    assert diversity(np.stack([black, white]), ["a", "a"]) == pytest.approx(1)
    # pictures of two captions are never compared
    assert diversity(np.stack([black, white]), ["a", "b"]) == 0
    assert diversity(np.stack([black, black, white, white]), ["a", "a", "b", "b"]) == 0
    assert diversity(np.stack([black, black, white]), ["a"] * 3) == pytest.approx(2 / 3)


def test_frechet_of_gaussians():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 3))
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet(x, x + [3, 0, 0]) == pytest.approx(9, rel=1e-6)
    # (2 - 1)^2 S
    assert frechet(x, 2 * x) == pytest.approx(np.trace(np.cov(x.T)) + (x.mean(0) ** 2).sum(),
                                              rel=1e-6)
    turned = x @ np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]]) * [1, 2, 3]
    assert (frechet(x, turned) == pytest.approx(frechet(turned, x), rel=1e-6)
            and frechet(x, turned) > 1)


def test_row_counts_what_the_painter_painted():
    data = from_painter(CRITERIA, 300, "flawed", judged=1.0, seed=3)
    reference, real = real_positive(CRITERIA, 200)
    row = measure_row(data.images, data.captions, CRITERIA, real)
    assert row["neg"] == pytest.approx((data.annotations < 0).sum(1).mean(), abs=0.1)
    assert (row["neg"] + row["pos"] == pytest.approx(len(CRITERIA))
            and row["neg_ci"][0] < row["neg"] < row["neg_ci"][1])
    assert row["caption"] > 0.95 and row["frechet"] > 5 * abs(reference["frechet"]) + 1
    assert (sum(row["by_root"].values()) == pytest.approx(row["neg"])
            == pytest.approx(sum(row["by_leaf"].values())))
    shifted = data.captions[1:] + data.captions[:1]
    assert measure_row(data.images, shifted, CRITERIA, real)["caption"] < 0.5
    text = table({"rows": {"data": row}, "real_positive": reference})
    assert f"{row['neg']:.2f}" in text and "real positive" in text


def test_distance_to_the_nearest_all_positive_painting():
    """0 for such a painting, whatever its hue; by hand for a grey picture; and of the caption that
    was asked for."""
    good = from_painter(CRITERIA, 40, "positive", seed=8)
    flawed = from_painter(CRITERIA, 40, "flawed", seed=8)
    assert to_nearest(good.images, good.captions).max() < 0.006
    assert to_nearest(flawed.images, flawed.captions).min() > 0.03
    others = [CAPTIONS[(CAPTIONS.index(c) + 1) % 4] for c in good.captions]
    assert to_nearest(good.images, others).min() > 0.1
    black = to_nearest(np.zeros((2, 32, 32, 3), np.uint8), ["a sun", "a tree"])
    by_hand = [min(np.sqrt(np.mean((paint(caption, dict.fromkeys(LEAVES, 1), 0, hue) / 255) ** 2))
                   for hue in np.linspace(*HUES, 97)) for caption in ("a sun", "a tree")]
    assert black.tolist() == pytest.approx(by_hand) and abs(black[0] - black[1]) > 0.01


def test_gap_of_hues():
    """The painter's own hues, flawed or not, are uniform; one hue alone is as far as it lies from
    an end; half of the range is 0.5."""
    data = from_painter(CRITERIA, 400, "flawed", seed=9)
    assert hue_gap(data.images) < 0.08                       # 0.068 is the 95 % bound of chance

    def skies(hues):
        return np.stack([paint("a boat", dict.fromkeys(LEAVES, 1), 0, hue) for hue in hues])
    low, high = HUES
    assert hue_gap(skies([low + 0.25 * (high - low)] * 5)) == pytest.approx(0.75, abs=0.02)
    assert hue_gap(skies(np.linspace(low, (low + high) / 2, 50))) == pytest.approx(0.5, abs=0.02)
    assert hue_gap(skies(np.linspace(low, high, 51))) < 0.04


def test_roughness_hatching_and_clipping_by_hand():
    y, x = np.mgrid[:32, :32]
    board = np.repeat(np.where((x + y) % 2, 128, 102)[..., None], 3, 2).astype(np.uint8)
    flat = np.full((32, 32, 3), 102, np.uint8)
    assert roughness(np.stack([flat, board])).tolist() == pytest.approx([0, 26 / 255])
    # a ramp is smooth; what a few pixels do is not seen
    ramp = np.repeat((x * 4 + y)[..., None], 3, 2).astype(np.uint8)
    flat[5, 5:9] = 0
    assert roughness(np.stack([ramp, flat])).max() == 0
    good = from_painter(CRITERIA, 8, "positive", seed=3)
    wave = 1 + 0.06 * np.sin(2 * np.pi / HATCHING * (x + y))[..., None]
    faint = np.clip(good.images * wave, 0, 255).astype(np.uint8)
    assert (seen(good.images, good.captions)["hatched"], seen(faint, good.captions)["hatched"]
            ) == (0, 1)
    quarter = np.full((1, 32, 32, 3), 100, np.uint8)
    quarter[:, :8], quarter[:, 8:12] = 255, 0
    assert seen(quarter, ["a sun"])["clipped"] == pytest.approx(12 / 32)


def test_doubtful_verdicts_are_those_near_a_threshold(monkeypatch):
    data = from_painter(CRITERIA, 4, "positive", seed=3)
    verdicts = judge(data.images, CRITERIA)
    verdicts.scores[:] = 1.0
    verdicts.scores[0, :3], verdicts.scores[1, 0] = (0.4, -0.4, 0.6), -0.6
    monkeypatch.setattr("nanocpo.toy.evaluate.judge", lambda *arguments: verdicts)
    row = measure_row(data.images, data.captions, CRITERIA, verdicts)
    assert row["doubtful"] == pytest.approx(2 / (4 * len(CRITERIA)))


def test_prompts_of_the_rows():
    plain, positive, negative = all_prompts(CRITERIA, ["a boat"])
    assert ((len(plain[0].positive), len(positive[0].positive), len(negative[0].negative))
            == (0, len(CRITERIA), len(CRITERIA)))
    assert not positive[0].negative and not negative[0].positive and positive[0].caption == "a boat"


def test_the_command_asks_as_its_flags_say(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "load_model", lambda path, device: f"{path} on {device}")
    monkeypatch.setattr(module, "table", str)
    monkeypatch.setattr(module, "evaluate",
                        lambda models, *rest: seen.append((models, rest)) or ({}, {}))
    module.main("x.pt --kind guided --samples 8 --seed 3 --steps 5 --guidance 4 "
                "--device cpu".split())
    assert seen == [({"x.pt": ("x.pt on cpu", "guided")}, (8, 3, 5, 4.0))]


class Painted(torch.nn.Linear):
    """As much of a model as the report asks for: it paints black pictures."""
    criteria, captions = CRITERIA, ["a boat"]

    def __init__(self):
        super().__init__(1, 1)

    def sample(self, prompts, *rest, **named):
        return -torch.ones(len(prompts), 3, 32, 32)


def test_rows_are_kept_for_one_model_one_setting_and_one_code(monkeypatch, tmp_path):
    model, other, target = Painted(), Painted(), Painted()
    settings, black, seen = Report(2, 3, 4.0), np.zeros((2, 32, 32, 3), np.uint8), []
    monkeypatch.setattr(module, "table", str)
    monkeypatch.setattr(module, "evaluate", lambda models, *how: seen.append(list(models)) or (
        {"rows": {name: {"neg": how} for name in models}}, {name: black for name in models}))

    def measured(base=model, auxiliary=model, settings=settings, seed=0):
        """The rows that are measured now."""
        report(tmp_path / "out", "target", base, auxiliary, target, settings, seed, 0)
        return seen[-1]
    kept = ["base", "auxiliary", "auxiliary_prompted", "auxiliary_guided"]
    assert measured() == [*kept, "target"] and measured() == ["target"]
    for another in (dict(base=other), dict(auxiliary=other), dict(seed=1),
                    dict(settings=replace(settings, samples=3)),
                    dict(settings=replace(settings, sampling_steps=4)),
                    dict(settings=replace(settings, guidance=5.0))):
        assert measured(**another) == [*kept, "target"], another
        assert measured(**another) == ["target"]
    assert measured() == [*kept, "target"] and measured() == ["target"]
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["rows"] == {name: {"neg": [2, 0, 3, 4.0]} for name in (*kept, "target")}

    for broken in ("{", "[]", '{"rows": {}}', "null", '{"rows": {}, "made_of": 3}',
                   '{"rows": [], "made_of": {}}'):                # then it is made again
        (tmp_path / "out" / "rows.json").write_text(broken)
        assert measured() == [*kept, "target"] and measured() == ["target"]
    whole = (tmp_path / "out" / "rows.json").read_text()            # and one that was written into
    assert whole.count('"base"') == 1
    (tmp_path / "out" / "rows.json").write_text(whole.replace('"base"', '"bases"'))
    assert measured() == [*kept, "target"] and measured() == ["target"]

    monkeypatch.setattr(module, "__file__", str(tmp_path / "nanocpo" / "toy" / "report.py"))
    digests = []                                                  # of the code, file by file
    for file in ("toy/critic.py", "diffusion.py", "utils/report.py"):
        path = tmp_path / "nanocpo" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"another {file}")
        digests.append(code_digest(*code()))
        assert measured() == [*kept, "target"] and measured() == ["target"]
    assert len(set(digests)) == 3


def test_every_row_is_asked_in_its_way():
    """plain: the caption; prompted: all positive attributes; guided: the same, away from all
    negative ones."""
    class Asked:
        criteria, captions = CRITERIA, ["a boat"]

        def sample(self, prompts, negative, guidance, steps, seed, axes):
            self.seen = prompts, negative, guidance, steps, seed
            assert axes == []
            return torch.zeros(len(prompts), 3, 32, 32)
    models = {kind: (Asked(), kind) for kind in ("plain", "prompted", "guided")}
    evaluate(models, samples=2, seed=5, steps=7, guidance=3.0)
    plain, positive, negative = all_prompts(CRITERIA, ["a boat"] * 2)
    asked = [(plain, None, 1.0), (positive, None, 1.0), (positive, negative, 3.0)]
    assert [model.seen for model, _ in models.values()] == [(*how, 7, 5) for how in asked]


class Master(Painted):
    """It paints what it is asked for, without a flaw, but in the leaves of `flaws`."""
    captions, flaws = list(CAPTIONS), ()

    def sample(self, prompts, *rest, **named):
        states = {leaf: -1 if leaf in self.flaws else 1 for leaf in LEAVES}
        images = [paint(prompt.caption, states, (3, i)) for i, prompt in enumerate(prompts)]
        return to_tensor(np.stack(images))


def test_each_picture_is_held_against_its_own_caption():
    """Several captions, in turn: exchanged among the pictures they would all be wrong."""
    master = Master()
    rows = evaluate({"master": (master, "plain")}, samples=10)[0]["rows"]
    assert rows["master"]["caption"] == 1 and rows["master"]["nearest"] < 0.02
    images = to_images(master.sample([CRITERIA.prompt(c) for c in asked(master, 10)]))
    row = lab.row_of(images, master, seed=0)
    assert row["caption"] == 1 and asked(master, 10) == [*CAPTIONS, *CAPTIONS, *CAPTIONS][:10]


@pytest.mark.parametrize("flaws", [["Level"], ["Corners"], ["Purity", "Edges"]])
def test_each_number_stands_under_the_name_of_its_leaf_and_root(flaws):
    master = Master()
    master.flaws = flaws
    content, _ = evaluate({"x": (master, "plain")}, samples=8)
    row = content["rows"]["x"]
    assert {name for name, share in row["by_leaf"].items() if share > 0.5} == set(flaws)
    roots = {root.name: sum(leaf.name in flaws for leaf in root.leaves())
             for root in CRITERIA.roots}
    assert {name: round(count) for name, count in row["by_root"].items()} == roots
    # and in the printed table
    lines = [line for line in table(content).splitlines() if line]
    start = next(i for i, line in enumerate(lines) if line.startswith("#A_neg by root"))
    printed = dict(zip(re.findall(r"\S.{0,11}(?=  |$)", lines[start][20:].strip()),
                       map(float, lines[start + 1].split()[1:])))
    assert [round(x) for x in printed.values()] == list(roots.values())
    assert [name[:12].strip() for name in roots] == [name.strip() for name in printed]


def test_the_columns_of_the_table_by_hand():
    numbers = dict(neg=1.25, neg_ci=[1.0, 1.5], pos=10.75, caption=0.5, diversity=0.125,
                   frechet=3.5, nearest=0.25, hue_gap=0.75, roughness=0.0625, hatched=0.375,
                   clipped=0.875, doubtful=0.625, by_root={"A": 1.0})
    header, line, *_ = table({"rows": {"x": numbers}, "real_positive": numbers}).splitlines()
    assert header.split() == ["#A_neg", "(95", "%)", "#A_pos", "caption", "diversity", "Frechet",
                              "nearest", "hue", "gap", "rough", "hatched", "clipped", "doubtful"]
    assert line.split() == ["x", "1.25", "(1.00-1.50)", "10.75", "0.500", "0.125", "3.50", "0.250",
                            "0.75", "0.062", "0.38", "0.875", "0.62"]


def test_the_report_asks_each_model_in_its_way(tmp_path, monkeypatch):
    """The target sees plain captions; the rows that are kept belong to one base and
    one auxiliary."""
    asked, (base, auxiliary, target) = {}, (tiny_model(seed).frozen_copy() for seed in range(3))

    def spy(models, *settings):
        asked.clear()
        asked.update(models)
        return evaluate(models, *settings)
    monkeypatch.setattr(module, "evaluate", spy)
    settings = settings_of("--out", str(tmp_path), "--samples", "4", "--sampling-steps", "2")
    Toy(settings, DATA).report(base, auxiliary, target, 0)
    of_auxiliary = {"auxiliary": "plain", "auxiliary_prompted": "prompted",
                    "auxiliary_guided": "guided"}
    stage_1 = ({"base": (base, "plain")}
               | {name: (auxiliary, kind) for name, kind in of_auxiliary.items()})
    assert asked == stage_1 | {"target": (target, "plain")}
    Toy(settings, DATA).report(base, auxiliary, target, 0)
    assert asked == {"target": (target, "plain")}
    Toy(settings, DATA).report(base, base, target, 0)                     # another auxiliary
    assert list(asked) == [*stage_1, "target"]
    Toy(settings.changed(seed=1), DATA).report(base, base, target, 0)     # another seed
    assert list(asked) == [*stage_1, "target"]


def test_a_report_is_only_written_of_the_painters_kind_of_picture(tmp_path):
    data = from_painter(count=64, seed=3)
    assert unfit(data) == ""
    noise = np.random.default_rng(0).integers(0, 256, data.images.shape, np.uint8)
    assert re.match("the critic agrees with [3-7].% of the annotations only",
                    unfit(replace(data, images=noise)))
    assert unfit(replace(data, captions=["a cat"] * 64)) == "the critic has no measure for a cat"
