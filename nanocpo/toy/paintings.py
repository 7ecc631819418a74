"""The toy's data set: paintings by painter.py, with the verdicts of an expert who looks at most of
the attributes of each."""
import math

import numpy as np
from tqdm import tqdm

from ..criteria import Criteria
from ..data import Paintings
from ..utils.device import memory
from .painter import CAPTIONS, SIZE, paint, stream

REGIMES = ("flawed", "mixed")               # what --data can be beside a folder


def from_painter(criteria=None, count=10000, regime="flawed", judged=0.9, seed=0):
    """Paint `count` pictures -> Paintings. regime "flawed": at least a third of the leaves of each
    is judged negative, so that no masterpiece exists to imitate; "mixed": independent states;
    "positive": all states positive (to compare with). judged: the share of leaves that the expert
    judged (each picture activates its own subset, 2601.04300; the share is ours)."""
    criteria = criteria or Criteria.load()
    names = [leaf.name for leaf in criteria.leaves]
    if regime not in (*REGIMES, "positive"):
        raise ValueError(f"regime is flawed, mixed or positive, not '{regime}'")
    if count < 1 or not 0.5 <= judged <= 1:
        raise ValueError(f"count must be at least 1 (is {count}) and judged between 0.5 and 1 "
                         f"(is {judged})")
    needed, room = 2 * count * SIZE ** 2 * 3, memory()
    if needed > room:
        raise ValueError(f"--count {count}: that many pictures need {needed / 2 ** 30:,.0f} GiB of "
                         f"memory, and there are {room / 2 ** 30:,.0f}")
    images, captions, annotations = [], [], []
    for i in tqdm(range(count), desc="painting", leave=False, disable=count < 5000, mininterval=2):
        captions.append(CAPTIONS[stream((seed, i), "caption").integers(len(CAPTIONS))])
        leaves = [stream((seed, i), name) for name in names]     # so a new leaf changes no old one
        while True:                         # rejection: what remains is as random as it can be
            drawn = np.array([rng.random(2) for rng in leaves])             # (leaves, 2)
            states = np.where((drawn[:, 0] < 0.5) | (regime == "positive"), 1, -1).astype(np.int8)
            annotation = np.where(drawn[:, 1] < judged, states, 0).astype(np.int8)
            if regime != "flawed" or (annotation < 0).sum() >= math.ceil(len(names) / 3):
                break
        annotations.append(annotation)
        images.append(paint(captions[-1], dict(zip(names, states)), (seed, i, 1)))
    return Paintings(criteria, np.stack(images), captions, np.stack(annotations))
