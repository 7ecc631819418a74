"""Pictures of any size as latents: brought to a few sizes of about the same area ("buckets"),
encoded once, and kept in OUT/cache."""
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..data import Batch, Paintings, to_tensor
from ..folder import reading
from ..folder.reading import folder_criteria, open_picture, read_folder
from ..utils import ranks
from ..utils.checkpoint import code_digest, fingerprint
from . import vae as autoencoder
from .model import cached


def buckets(resolution, step=64):
    """[(width, height)]: multiples of `step` with an area of at most resolution^2, for shapes from
    1:2 to 2:1."""
    area, sizes = resolution ** 2, set()
    for width in range(step, 2 * resolution + 1, step):
        height = area // width // step * step
        if height and max(width, height) <= 2 * min(width, height):
            sizes |= {(width, height), (height, width)}
    if not sizes:
        raise ValueError(f"--resolution {resolution} is less than --bucket-step {step}")
    return sorted(sizes)


def nearest(size, sizes):
    """The bucket whose shape is nearest to (width, height); of equal shapes the largest."""
    return min(sizes, key=lambda b: (abs(np.log(b[0] / b[1]) - np.log(size[0] / size[1])),
                                     -b[0] * b[1]))


@dataclass
class LatentPaintings(Paintings):
    """Paintings whose `images` are latents (4, h, w) in an object array (N,), of several shapes.
    digests: of the N files' contents, in hexadecimal; without them the parts go by position."""
    digests: tuple = ()

    def take(self, indices):
        part = super().take(indices)
        return replace(part, digests=tuple(self.digests[i] for i in indices if self.digests))

    def tenths(self):
        """By content: one picture under two names is never trained on and held out, and it stays
        where it is, whatever is added, left out or put in another order."""
        if not self.digests:
            return super().tenths()
        tenths = np.array([int(digest[:8], 16) % 10 for digest in self.digests])
        return tenths if (tenths < 8).any() else 0 * tenths              # a very small folder

    def batch(self, indices):
        """Indices (B,) -> Batch of latents. All of a batch have the shape of its first picture; an
        index of another shape stands for one of that shape (the index modulo their number), so a
        random batch stays random and buckets come as often as their pictures."""
        alike = [i for i in range(len(self))
                 if self.images[i].shape == self.images[indices[0]].shape]
        part = self.take([i if i in alike else alike[i % len(alike)] for i in indices])
        return Batch(part.captions, part.annotations, latents=torch.stack(list(part.images)))


def load_latents(common, weights, base, rows=None):
    """The folder --data as LatentPaintings. common, weights: of the settings; base: an SDModel;
    rows: see read_folder. The cache's key holds the VAE's weights, the code that reads and
    encodes, the picture's bytes and its size."""
    if not Path(common.data).is_dir():
        raise ValueError(f"--data {common.data}: with --weights it is a folder with pictures and "
                         "metadata.jsonl")
    resolution = max(base.backbone.size)
    sizes, vae, cache = buckets(resolution, weights.bucket_step), base.latents, base.text.cache
    enlarged, bar = [], tqdm(desc="latents", leave=False, mininterval=2,
                         disable=not ranks.first())
    code = code_digest(__file__, reading.__file__, autoencoder.__file__)
    key = f"{vae.config} {fingerprint(vae)} {code}" if cache else ""

    def latents(path):
        def shape(size):
            bucket = nearest(size, sizes)
            if size[0] < bucket[0] or size[1] < bucket[1]:
                enlarged.append(path.name)
            return bucket
        image = open_picture(path, shape)
        bar.update()
        encode = lambda: vae.encode(to_tensor(np.array(image)[None]).to(base.device))[0].cpu()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        with torch.no_grad():
            return cached(cache, f"latents {key} {image.size} {digest}", encode), digest

    criteria = folder_criteria(common.data, common.tree)
    if cache and ranks.count() > 1:               # each encodes its part; then all read all of it
        read_folder(common.data, criteria, ranks.every_nth(latents), common.skip_bad)
        ranks.wait()
        enlarged.clear()
    criteria, rows, skipped = read_folder(common.data, criteria, latents, common.skip_bad, rows)
    bar.close()
    if enlarged:
        print(f"{len(enlarged)} of {len(rows)} pictures are enlarged, since they are smaller than "
              f"--resolution {resolution} asks ({enlarged[0]}, ...); their blur is learned too")
    pictures, captions, annotations = zip(*rows)
    images, digests = zip(*pictures)
    return LatentPaintings(criteria, np.fromiter(images, object), list(captions),
                           np.stack(annotations), skipped, digests)
