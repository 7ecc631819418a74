"""The painter and the critic hold each other to account: what was painted is what is seen."""
import colorsys

import numpy as np
import pytest

from nanocpo.criteria import Criteria
from nanocpo.toy.critic import (THRESHOLDS, _crispness, _layouts, _lines, find_layout, fit_horizon,
                                    judge)
from nanocpo.toy.painter import (CAPTIONS, HUES, LEAVES, SIZE, SUN_HEIGHT, X, Y, cover,
                                     paint)

CRITERIA = Criteria.load()
NAMES = [leaf.name for leaf in CRITERIA.leaves]
# about as rough as what a model paints
ROUGH = dict(blotches=0.06, noise=0.03)
PER_LEAF = 30                            # pictures in which one leaf is turned round, for each leaf


def disturbed(images, sigma=0.0, noise=0.0, blotches=0.0, seed=1):
    """uint8 (N, 32, 32, 3) -> the same after a Gaussian blur of sigma pixels, a random offset for
    each 4x4 block and channel, and one for each pixel and channel (deviations, of the range)."""
    rng = np.random.default_rng(seed)
    weights = np.exp(-np.arange(-3, 4) ** 2 / (2 * max(sigma, 0.01) ** 2))
    out = images / 255
    for axis in (1, 2):
        pad = [(3, 3) if a == axis else (0, 0) for a in range(4)]
        padded = np.pad(out, pad, "edge")
        out = sum(w * np.take(padded, range(k, k + SIZE), axis)
                  for k, w in enumerate(weights / weights.sum()))
    blocks = rng.normal(0, blotches, (len(out), 8, 8, 3)).repeat(4, 1).repeat(4, 2)
    out = out + blocks + rng.normal(0, noise, out.shape)
    return np.round(np.clip(out, 0, 1) * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def fresh():
    """2,000 paintings with independent random states: captions, states (2000, leaves), images."""
    rng = np.random.default_rng(77)
    captions, states = ([str(c) for c in rng.choice(CAPTIONS, 2000)],
                        rng.choice([-1, 1], (2000, len(NAMES))))
    images = [paint(caption, dict(zip(NAMES, row)), (77, i))
              for i, (caption, row) in enumerate(zip(captions, states))]
    return captions, states, np.stack(images)


@pytest.fixture(scope="module")
def verdicts(fresh):
    return judge(fresh[2], CRITERIA)


def agreement(verdicts, captions, states):
    """Share of right verdicts: {leaf name or "caption": share}."""
    right = dict(zip(NAMES, (verdicts.signs == states).mean(0)))
    return right | {"caption": np.mean([a == b for a, b in zip(verdicts.captions, captions)])}


def test_a_corner_is_bare_on_either_side():
    """The painter bares the left one; a picture that is its mirror image has the same verdict."""
    good = dict.fromkeys(NAMES, 1)
    images = np.stack([paint("a boat", good | {"Corners": side}, (5, i)) for side in (1, -1)
                       for i in range(4)])
    for pictures in (images, images[:, :, ::-1]):
        assert judge(pictures, CRITERIA).signs[:, NAMES.index("Corners")].tolist() == (
            [1] * 4 + [-1] * 4)


# ---------------------------------------------------------------- the painter

def test_the_painter_knows_every_leaf_of_the_tree():
    assert set(NAMES) == set(LEAVES) and len(CAPTIONS) == 4


@pytest.mark.parametrize("caption", CAPTIONS)
def test_same_arguments_same_bytes_other_seed_other_bytes(caption):
    states = dict.fromkeys(LEAVES, 1)
    pictures = [paint(caption, states, seed) for seed in (5, 5, 6, (5, 1))]
    assert all(p.shape == (32, 32, 3) and p.dtype == np.uint8 for p in pictures)
    assert pictures[0].tobytes() == pictures[1].tobytes()
    assert (pictures[0].tobytes() != pictures[2].tobytes()
            and pictures[0].tobytes() != pictures[3].tobytes())
    assert states == dict.fromkeys(LEAVES, 1)                     # the argument is left as it was


def test_captions_and_seeds_vary_the_picture():
    # an all-positive painting of a caption varies in its hue only, between HUES
    seen = [{paint(c, dict.fromkeys(LEAVES, 1), seed).tobytes() for seed in range(50)}
            for c in CAPTIONS]
    assert (all(len(variants) > 40 for variants in seen)
            and len(set().union(*seen)) == sum(map(len, seen)))
    sky = np.array([paint(CAPTIONS[0], dict.fromkeys(LEAVES, 1), seed)[10, 2]
                    for seed in range(200)]) / 255
    hues = [colorsys.rgb_to_hsv(*colour)[0] for colour in sky]
    assert abs(min(hues) - HUES[0]) < 0.01 and abs(max(hues) - HUES[1]) < 0.01


@pytest.mark.parametrize("caption, states, message", [
    ("a horse", {}, "cannot paint 'a horse'.*a house, a tree, a boat, a sun"),
    ("boat", {}, "cannot paint 'boat'"),
    ("a boat", {"Mood": 1, "Level": 1}, r"cannot draw \['Mood'\].*Placement"),
    ("a boat", {"Composition/Horizon/Level": 1}, "cannot draw")])                 # names, not paths
def test_unknown_caption_or_leaf(caption, states, message):
    with pytest.raises(ValueError, match=message):
        paint(caption, states, 0)


@pytest.mark.parametrize("name", LEAVES)
def test_leaf_that_is_not_named_takes_a_random_state(name):
    others, good = {leaf: 1 for leaf in LEAVES if leaf != name}, 0
    for seed in range(60):
        caption = CAPTIONS[seed % 4]
        free, plus, minus = (paint(caption, others | extra, seed).tobytes()
                             for extra in ({}, {name: 1}, {name: -1}))
        assert plus != minus and free in (plus, minus)  # naming a leaf moves no other random number
        good += free == plus
    assert 15 <= good <= 45                   # a fair coin: 30, four standard deviations either way


def test_leaves_that_are_not_named_are_independent_of_each_other():
    drawn = judge(np.stack([paint("a boat", {}, (8, i)) for i in range(100)]), CRITERIA).signs
    correlation = np.corrcoef(drawn.T) - np.eye(len(NAMES))
    assert np.abs(correlation).max() < 0.5                # noise alone gives 0.10 with 100 pictures


# ------------------------------------------------------------- the critic on the painter's pictures

def test_one_leaf_turned_round_leaves_the_others_as_they_were(fresh, verdicts):
    captions, states, images = fresh
    # picture i: leaf i modulo their number is turned round, same seed
    turned = np.arange(PER_LEAF * len(NAMES)) % len(NAMES)
    flipped = states[:len(turned)].copy()
    flipped[np.arange(len(turned)), turned] *= -1
    pictures = np.stack([paint(captions[i], dict(zip(NAMES, flipped[i])), (77, i))
                         for i in range(len(turned))])
    assert (pictures != images[:len(turned)]).any((1, 2, 3)).all()
    changed = judge(pictures, CRITERIA).signs != verdicts.signs[:len(turned)]
    for k, name in enumerate(NAMES):
        rows = changed[turned == k]
        assert rows[:, k].mean() >= 0.95, (
            f"{name}: the critic does not see that it was turned round")
        assert np.delete(rows, k, 1).mean() <= 0.02, (
            f"{name}: turning it round changes other verdicts")


def test_critic_agrees_with_the_painter(fresh, verdicts):
    share = agreement(verdicts, *fresh[:2])
    assert not {name: s for name, s in share.items() if s < 0.98}


@pytest.mark.parametrize("how", [dict(sigma=0.6, noise=0.02), dict(noise=0.02), ROUGH], ids=str)
def test_critic_agrees_on_disturbed_pictures(fresh, how):
    captions, states, images = (part[:1000] for part in fresh)    # half of them, for speed
    share = agreement(judge(disturbed(images, **how), CRITERIA), captions, states)
    assert not {name: s for name, s in share.items() if s < 0.95}


@pytest.mark.parametrize("caption", CAPTIONS)
def test_rough_paintings_without_a_flaw_raise_no_alarm(caption):
    """About as rough as what a model paints; a wide subject hides half of the horizon."""
    images = np.stack([paint(caption, dict.fromkeys(LEAVES, 1), (9, i)) for i in range(100)])
    negative = (judge(disturbed(images, **ROUGH), CRITERIA).signs < 0).mean(0)
    assert not {name: share for name, share in zip(NAMES, negative) if share > 0.05}


def test_horizon_is_found_from_a_few_rough_columns():
    slopes = np.repeat([0.0, 0.3, -0.3], 50)
    below = Y - 20 - slopes[:, None, None] * (X - SIZE / 2)
    sky = cover(below, 1.0) + np.random.default_rng(0).normal(0, 0.25, below.shape)
    height, slope = fit_horizon(sky, (np.abs(below) < 8) & (X < 12))
    assert np.abs(slope - slopes).mean() < 0.05 and np.abs(height - 20).mean() < 0.8
    assert len(np.unique(slope.round(6))) > 100                           # not a grid's: graded


def test_crispness_is_the_way_from_blurred_to_crisp():
    horizon, none = np.full(1, 20.0), np.full((1, 2, SIZE, SIZE), 99.0)
    seen = np.ones((1, SIZE, SIZE))
    measured = [_crispness(np.tile(cover(Y - 20, soft)[None, ..., None], 3), seen, horizon,
                           0 * horizon, none)[0] for soft in (1, 2.5, 4, 5.5, 7)]
    assert np.allclose([measured[0], measured[-1]], [1, 0], atol=0.02)
    assert (np.diff(measured) < -0.1).all() and abs(measured[2] - 0.5) < 0.03


def test_layout_is_found_again_under_a_steep_gradation():
    layouts, shapes = _layouts()
    rng = np.random.default_rng(0)
    for k in rng.choice(len(layouts), 12, replace=False):
        # sky, ground, dark, light
        colours = np.array([[0.5, 0.5, 0.6], [0.5, 0.5, 0.6], [0.4, 0.4, 0.5], [0.8, 0.8, 0.8]])
        flat = sum((shape > 0)[:, None] * colour for shape, colour in zip(shapes[:4, k], colours))
        steep = flat + 8 * shapes[4, k][:, None]                  # and no step to the ground
        assert np.allclose(np.ravel(find_layout(steep.reshape(1, SIZE, SIZE, 3))), layouts[k])


def test_dark_disc_high_up_is_no_sun():
    disc = np.where(np.hypot(X - SIZE / 2, Y - SUN_HEIGHT)[..., None] < 6, 0.1,
                    np.where((Y < 21.5)[..., None], 0.7, 0.35)) * np.ones(3)
    light = np.where(disc == 0.1, 1.0, disc)
    kinds = find_layout(np.stack([disc, light]))[2]
    assert CAPTIONS[int(kinds[0])] != "a sun" and CAPTIONS[int(kinds[1])] == "a sun"


def test_scores_and_signs_belong_together(verdicts):
    assert (verdicts.signs.dtype == np.int8
            and verdicts.scores.shape == verdicts.signs.shape == (2000, len(CRITERIA)))
    assert (((verdicts.scores > 0) == (verdicts.signs == 1)).all()
            and set(np.unique(verdicts.signs)) == {-1, 1})
    typical = [np.median(np.abs(column)) for column in verdicts.scores.T]
    # typical paintings lie near -1 and +1: comparable scales
    assert 0.4 < min(typical) and max(typical) < 3


def test_hues_are_compared_around_the_wheel(fresh, verdicts):
    """A clashing ground is 0.42 turns from its sky, an analogous one 0.13; from some skies the way
    leads past red, where the wheel begins."""
    column, (threshold, scale) = NAMES.index("Harmony"), THRESHOLDS["Harmony"]
    turns = threshold + scale * verdicts.scores[:, column]
    for state, distance in ((-1, 0.42), (1, 0.13)):
        off = np.abs(turns[fresh[1][:, column] == state] - distance)
        assert len(off) > 900 and np.quantile(off, 0.95) < 0.05


def test_a_horizon_may_tilt_to_either_side(fresh):
    """The painter's rises to one side only, but a model's may not."""
    _, states, images = fresh
    tilted = images[states[:, NAMES.index("Level")] < 0][:300]
    assert (judge(tilted[:, :, ::-1], CRITERIA).signs[:, NAMES.index("Level")] < 0).mean() > 0.95


def test_sub_tree_gives_that_trees_columns(fresh, verdicts):
    part = judge(fresh[2][:40], CRITERIA.select(["Finish", "Level"]))
    columns = CRITERIA.columns(["Finish", "Level"])
    assert part.signs.shape == (40, 3) and part.captions == verdicts.captions[:40]
    assert (part.signs == verdicts.signs[:40, columns]).all()
    assert np.allclose(part.scores, verdicts.scores[:40, columns])


def test_pictures_of_no_scene_are_judged_too():
    # what an untrained model paints: the critic must answer with finite numbers, whatever it sees
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    found = judge(np.stack([np.zeros_like(noise), np.full_like(noise, 255),
                            noise]).astype(np.uint8), CRITERIA)
    assert np.isfinite(found.scores).all() and set(found.captions) <= set(CAPTIONS)


def test_leaf_without_a_measure():
    mood = {"name": "Mood", "positive": "calm", "negative": "restless"}
    level = {"name": "Level", "positive": "level", "negative": "tilted"}
    tree = Criteria({"name": "T", "children": [{"name": "A", "children": [mood]}, level]})
    with pytest.raises(ValueError, match="no measure for A/Mood;.*Placement"):
        judge(np.zeros((1, 32, 32, 3), np.uint8), tree)


@pytest.mark.parametrize("shape", [(2, 16, 16, 3), (2, 32, 32), (2, 3, 32, 32), (2, 32, 32, 4),
                                   (32, 32, 3)])
def test_wrong_size_of_picture(shape):
    with pytest.raises(ValueError, match=r"pictures of shape \(32, 32, 3\)"):
        judge(np.zeros(shape, np.uint8), CRITERIA)


def test_lines_are_as_soft_across_whatever_their_slope():
    """Of the horizons that are tried, crisp ones are one pixel wide across and blurred ones seven,
    which is more pixels down the picture where the line is steep."""
    heights, slopes, shapes = _lines()
    assert len(heights) == len(slopes) == 31 * 19 and shapes.shape == (2, 31 * 19, 1024)
    steep, = np.flatnonzero((heights == 18) & np.isclose(slopes, 0.45))
    level, = np.flatnonzero((heights == 18) & np.isclose(slopes, 0))
    for soft, kind in zip((1.0, 7.0), shapes):
        column = kind[steep].reshape(32, 32)[:, 16]                 # there it is 18 pixels deep
        distance = (np.arange(32) - 18) / np.hypot(1, 0.45)
        assert np.allclose(column, cover(distance, soft), atol=1e-6)
        assert np.allclose(kind[level].reshape(32, 32),
                           cover(np.arange(32) - 18.0, soft)[:, None], atol=1e-6)


def test_the_layouts_that_are_looked_for():
    layouts, _ = _layouts()
    height, slope, kind, place = (sorted(set(np.round(column, 6))) for column in layouts.T)
    assert height == [13.5, 15.5, 17.5, 19.5, 21.5, 23.5] and kind == [0, 1, 2, 3]
    assert np.allclose(slope, [-0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.3])
    assert np.allclose(place, 16 + 1.625 * np.arange(-5, 6))       # a third is 4 of these steps
    assert len(layouts) == 6 * 7 * 4 * 11
