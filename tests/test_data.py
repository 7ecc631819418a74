"""The data: what the painter's regimes hold, splits, batches, tensors, digests."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from toy_tiny import CRITERIA, same_data

from nanocpo.criteria import Criteria
from nanocpo.data import Paintings, to_images, to_tensor
from nanocpo.toy.painter import CAPTIONS, LEAVES, paint
from nanocpo.toy.paintings import from_painter

COUNT = len(CRITERIA)


# ---------------------------------------------------------------- the painter's regimes

def test_flawed_regime_has_no_masterpiece_and_leaves_some_unjudged():
    data = from_painter(CRITERIA, 300, "flawed", seed=2)
    assert (data.images.shape == (300, 32, 32, 3) and data.images.dtype == np.uint8
            and len(data) == 300)
    assert data.annotations.shape == (300, COUNT) and data.annotations.dtype == np.int8
    assert ((data.annotations < 0).sum(1) >= math.ceil(COUNT / 3)).all()
    assert (0.06 < (data.annotations == 0).mean() < 0.14
            and set(np.unique(data.annotations)) == {-1, 0, 1})
    assert (data.annotations < 0).any(0).all() and (data.annotations > 0).any(0).all()
    assert set(data.captions) == set(CAPTIONS) and data.skipped == 0


def test_a_third_is_rounded_up_on_a_small_tree():
    part = CRITERIA.select(["Composition", "Tone"])
    assert len(part) % 3 > 0                                      # five leaves: two of them
    data = from_painter(part, 100, "flawed")
    assert ((data.annotations < 0).sum(1).min() == len(part) // 3 + 1
            and data.annotations.shape == (100, len(part)))


def test_mixed_regime_has_pictures_with_few_flaws():
    data = from_painter(CRITERIA, 300, "mixed", judged=1.0, seed=2)
    negative = (data.annotations < 0).sum(1)
    assert (negative.min() < COUNT / 3 and negative.max() > COUNT * 2 / 3
            and abs(negative.mean() - COUNT / 2) < 0.4)
    assert (data.annotations != 0).all()  # judged = 1: the expert leaves nothing out


def test_positive_regime_is_all_positive():
    assert (from_painter(CRITERIA, 20, "positive", judged=1.0).annotations == 1).all()
    assert not (from_painter(CRITERIA, 20, "positive").annotations < 0).any()


def test_pictures_show_what_the_annotation_says():
    # judged = 1, so every state is known; the seed of a picture is its place
    data = from_painter(CRITERIA, 12, "flawed", judged=1.0, seed=5)
    names = [leaf.name for leaf in CRITERIA.leaves]
    for i in range(12):
        again = paint(data.captions[i], dict(zip(names, data.annotations[i])), (5, i, 1))
        assert (again == data.images[i]).all()


def test_same_seed_same_data_and_more_pictures_do_not_move_the_first_ones():
    a, b, c = (from_painter(count=20, seed=1), from_painter(count=30, seed=1),
               from_painter(count=20, seed=2))
    assert same_data(a, b.take(range(20)))
    assert ((a.images != c.images).any() and (a.annotations != c.annotations).any()
            and a.captions != c.captions)


def test_unknown_regime_and_tree_that_cannot_be_painted():
    with pytest.raises(ValueError, match="flawed, mixed or positive, not 'good'"):
        from_painter(count=1, regime="good")
    tree = {"name": "T", "children": [{"name": "Mood", "positive": "calm", "negative": "restless"}]}
    with pytest.raises(ValueError, match=rf"cannot draw \['Mood'\].*{LEAVES[0]}.*give a folder"):
        from_painter(Criteria(tree), 1)


# ---------------------------------------------------------------- splits, batches, tensors

def test_split_is_80_10_10_and_disjoint():
    images = np.zeros((200, 1, 1, 3), np.uint8)
    data = Paintings(CRITERIA, images, [str(i) for i in range(200)],
                     np.arange(200)[:, None] * np.ones((1, COUNT), int))
    parts = {name: data.split(name) for name in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [160, 20, 20]
    # disjoint and whole
    assert sorted(int(c) for part in parts.values() for c in part.captions) == list(range(200))
    for part in parts.values():  # captions, pictures and annotations move together
        assert (part.annotations[:, 0].tolist() == [int(c) for c in part.captions]
                and len(part.images) == len(part.captions))
    # does not move as data grows
    assert data.take(range(100)).split("test").captions == parts["test"].captions[:10]


def test_tensor_round_trip_is_exact():
    # every value there is
    images = np.arange(256 * 3, dtype=np.uint32).reshape(1, 16, 16, 3).astype(np.uint8)
    tensor = to_tensor(images)
    assert tensor.shape == (1, 3, 16, 16) and tensor.dtype == torch.float32
    assert (tensor.min().item(), tensor.max().item()) == (-1, 1)
    # channels first, rows stay rows
    assert tensor[0, 2, 1, 0].item() == pytest.approx(images[0, 1, 0, 2] / 127.5 - 1)
    assert (to_images(tensor) == images).all() and to_images(tensor).dtype == np.uint8
    # clipped, not wrapped
    assert to_images(torch.tensor([-3.0, 3.0]).reshape(2, 1, 1, 1)).ravel().tolist() == [0, 255]


def test_a_digest_tells_pictures_verdicts_and_captions_apart():
    data = from_painter(count=4)
    others = [replace(data, annotations=-data.annotations), replace(data, images=255 - data.images),
              replace(data, captions=["x"] * 4)]
    assert (len({d.digest() for d in (data, *others)}) == 4
            and from_painter(count=4).digest() == data.digest())


def test_batch_holds_the_pictures_that_were_asked_for():
    data = from_painter(count=10)
    batch = data.batch([7, 2])
    assert torch.equal(batch.images, to_tensor(data.images[[7, 2]]))
    assert batch.captions == [data.captions[7], data.captions[2]]
    assert (batch.annotations == data.annotations[[7, 2]]).all()
