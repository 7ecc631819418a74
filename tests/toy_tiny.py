"""What the tests of the toy share: a model and data that are small enough to train in a test."""
import numpy as np
import torch

from nanocpo.model import Model
from nanocpo.run.flags import parse_training
from nanocpo.toy.paintings import from_painter
from nanocpo.unet import UNetConfig

TINY = UNetConfig(channels=(16, 32), depth=(0, 0), heads=(2, 2), groups=8, context_dim=16,
                  vector_dim=16)
DATA = from_painter(count=60, seed=1)
CRITERIA = DATA.criteria


def tiny_model(seed=0):
    torch.manual_seed(seed)
    return Model(CRITERIA, sorted(set(DATA.captions)), TINY, text_dim=16)


def settings_of(*flags):
    """The Settings of train_cpo.py with these flags, for a run of a few steps."""
    return parse_training("a test", ["--batch", "8", "--steps", "4", "--sample-every", "0",
                                     "--device", "cpu", *flags],
                          ("common", "sft", "cpo", "report"))


def plain(captions):
    return [CRITERIA.prompt(caption) for caption in captions]


def same(a, b):
    """Two models have the same weights."""
    return all(torch.equal(x, y)
               for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def same_data(a, b):
    """Two Paintings or Batches hold the same pictures, captions and annotations."""
    return (np.array_equal(a.images, b.images) and a.images.dtype == b.images.dtype
            and list(a.captions) == list(b.captions)
            and np.array_equal(a.annotations, b.annotations)
            and a.annotations.dtype == b.annotations.dtype)
