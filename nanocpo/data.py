"""The data set: captioned pictures, each with an annotation of the attribute tree.

Where they come from is not said here: nanocpo/toy/world.py paints them, nanocpo/folder/reading.py
reads a folder of your own.
"""
import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange

from .criteria import Criteria

# Of every ten pictures: 80 / 10 / 10, as summaries of the paper report of it.
SPLITS = {"train": range(0, 8), "validation": range(8, 9), "test": range(9, 10)}


@dataclass
class Batch:
    """B pictures as the model's latents or as pixels (one of the two), their captions, and their
    annotations int8 (B, leaves)."""
    captions: list
    annotations: np.ndarray
    images: torch.Tensor | None = None       # float (B, 3, H, W) in [-1, 1]
    latents: torch.Tensor | None = None      # float (B, C, h, w), computed beforehand


@dataclass
class Paintings:
    """All pictures in memory: images uint8 (N, H, W, 3), captions: N strings, annotations int8
    (N, leaves of criteria)."""
    criteria: Criteria
    images: np.ndarray
    captions: list
    annotations: np.ndarray
    skipped: int = 0                         # bad lines of a folder that were left out

    def __len__(self):
        return len(self.images)

    def take(self, indices):
        """The pictures with these numbers, in this order, as a data set of the same kind."""
        indices = np.asarray(indices, int)
        return replace(self, images=self.images[indices],
                       captions=[self.captions[i] for i in indices],
                       annotations=self.annotations[indices])

    def tenths(self):
        """The tenth, 0 to 9, that each picture is in: by position, so it does not move when the
        data grows."""
        return np.arange(len(self)) % 10

    def split(self, name):
        """The train, validation or test part."""
        return self.take([i for i, tenth in enumerate(self.tenths()) if tenth in SPLITS[name]])

    def batch(self, indices):
        """Indices (B,) -> Batch."""
        part = self.take(indices)
        return Batch(part.captions, part.annotations, images=to_tensor(part.images))

    def draw(self, count, generator):
        """A random Batch of `count` pictures, drawn with replacement."""
        return self.batch(torch.randint(len(self), (count,), generator=generator).numpy())

    def badness(self, columns):
        """How many of the leaves `columns` are judged negative at each picture: int (N,)."""
        return (self.annotations[:, columns] < 0).sum(1)

    def digest(self):
        """A hash of all of it: when it is the same, so is what a model is shown."""
        digest = hashlib.sha256(repr((self.criteria.to_dict(), self.captions)).encode())
        for array in (*self.images, self.annotations):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()


def to_tensor(images):
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W) in [-1, 1]."""
    images = torch.from_numpy(np.ascontiguousarray(images)).float() / 127.5 - 1
    return rearrange(images, "n h w c -> n c h w")


def to_images(tensor):
    """float (N, 3, H, W) in [-1, 1] -> uint8 (N, H, W, 3)."""
    images = ((tensor.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    return rearrange(images, "n c h w -> n h w c").numpy()
