"""The numbers of the report, by hand."""
import numpy as np
import pytest
import torch

import nanocpo.evaluate as module
from nanocpo.criteria import Criteria
from nanocpo.data import from_painter
from nanocpo.evaluate import all_prompts, diversity, evaluate, frechet, interval, measure_row, real_positive, rows_key, table

CRITERIA = Criteria.load()


def test_interval_by_hand():
    mean, (low, high) = interval(np.array([1.0, 3.0]))            # standard deviation sqrt(2), standard error 1
    assert mean == 2 and low == pytest.approx(2 - 1.96) and high == pytest.approx(2 + 1.96)


def test_diversity_is_the_mean_distance_within_a_caption():
    black, white = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)
    assert diversity(np.stack([black, white]), ["a", "a"]) == pytest.approx(1)
    assert diversity(np.stack([black, white]), ["a", "b"]) == 0   # pictures of two captions are never compared
    assert diversity(np.stack([black, black, white, white]), ["a", "a", "b", "b"]) == 0
    assert diversity(np.stack([black, black, white]), ["a"] * 3) == pytest.approx(2 / 3)


def test_frechet_of_gaussians():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 3))
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet(x, x + [3, 0, 0]) == pytest.approx(9, rel=1e-6)
    assert frechet(x, 2 * x) == pytest.approx(np.trace(np.cov(x.T)) + (x.mean(0) ** 2).sum(), rel=1e-6)      # (2 - 1)^2 S
    turned = x @ np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]]) * [1, 2, 3]
    assert frechet(x, turned) == pytest.approx(frechet(turned, x), rel=1e-6) and frechet(x, turned) > 1


def test_row_counts_what_the_painter_painted():
    data = from_painter(CRITERIA, 300, "flawed", judged=1.0, seed=3)
    reference, real = real_positive(CRITERIA, 200)
    row = measure_row(data.images, data.captions, CRITERIA, real)
    assert row["neg"] == pytest.approx((data.annotations < 0).sum(1).mean(), abs=0.1)
    assert row["neg"] + row["pos"] == pytest.approx(12) and row["neg_ci"][0] < row["neg"] < row["neg_ci"][1]
    assert row["caption"] > 0.95 and row["frechet"] > 5 * abs(reference["frechet"]) + 1
    assert sum(row["by_root"].values()) == pytest.approx(row["neg"]) == pytest.approx(sum(row["by_leaf"].values()))
    shifted = data.captions[1:] + data.captions[:1]
    assert measure_row(data.images, shifted, CRITERIA, real)["caption"] < 0.5
    text = table({"rows": {"data": row}, "real_positive": reference})
    assert f"{row['neg']:.2f}" in text and "real positive" in text


def test_prompts_of_the_rows():
    plain, positive, negative = all_prompts(CRITERIA, ["a boat"])
    assert (len(plain[0].positive), len(positive[0].positive), len(negative[0].negative)) == (0, 12, 12)
    assert not positive[0].negative and not negative[0].positive and positive[0].caption == "a boat"


def test_the_command_asks_as_its_flags_say(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "load_model", lambda path, device: f"{path} on {device}")
    monkeypatch.setattr(module, "table", str)
    monkeypatch.setattr(module, "evaluate", lambda models, *rest: seen.append((models, rest)) or ({}, {}))
    module.main("x.pt --kind guided --samples 8 --seed 3 --steps 5 --guidance 4 --device cpu".split())
    assert seen == [({"x.pt": ("x.pt on cpu", "guided")}, (8, 3, 5, 4.0))]


def test_rows_are_kept_for_one_model_one_setting_and_one_code(monkeypatch, tmp_path):
    model, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    keys = [rows_key([model], 1), rows_key([model], 1), rows_key([other], 1), rows_key([model], 2)]
    (tmp_path / "critic.py").write_text("another critic")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "evaluate.py"))
    assert keys[0] == keys[1] and len({*keys, rows_key([model], 1)}) == 4


def test_every_row_is_asked_in_its_way():
    """plain: the caption; prompted: all positive attributes; guided: the same, away from all negative ones."""
    class Asked:
        criteria, captions = CRITERIA, ["a boat"]

        def sample(self, prompts, negative, guidance, steps, seed):
            self.seen = prompts, negative, guidance, steps, seed
            return torch.zeros(len(prompts), 3, 32, 32)
    models = {kind: (Asked(), kind) for kind in ("plain", "prompted", "guided")}
    evaluate(models, samples=2, seed=5, steps=7, guidance=3.0)
    plain, positive, negative = all_prompts(CRITERIA, ["a boat"] * 2)
    asked = [(plain, None, 1.0), (positive, None, 1.0), (positive, negative, 3.0)]
    assert [model.seen for model, _ in models.values()] == [(*how, 7, 5) for how in asked]
