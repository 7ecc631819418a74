"""The auxiliary as an expert: it knows what pictures with an attribute look like, so it can say of
a picture which side of each pair it shows (ours; the paper's expert is not public).

By Bayes' rule the odds of "good" against "bad" are those of the picture under the two prompts (E3),
and a diffusion model's log-likelihood is, up to a factor, minus its error at predicting the noise
that was added (2303.16203). The teacher judges its pupil's pictures here, and its own: what it does
not know, it does not see.
"""
import numpy as np
import torch

from ..method import add_noise, two_targets
from ..utils.device import send


@torch.no_grad()
def log_ratios(auxiliary, data, draws=16, seed=0, size=32):
    """Paintings -> float (N, leaves): log p(picture | good) - log p(picture | bad) of every leaf,
    up to a positive factor; above 0 the auxiliary finds the leaf good.

    draws: timesteps, evenly spread, with a noise each; the prompts name the caption and one leaf.
    size: pictures at a time."""
    criteria, steps = auxiliary.criteria, auxiliary.diffusion.steps
    generator, scores = torch.Generator().manual_seed(seed), np.zeros((len(data), len(criteria)))
    for start in range(0, len(data), size):
        rows = range(start, min(start + size, len(data)))
        batch = data.batch(rows)
        for draw in range(draws):
            t = torch.full((len(rows),), int((draw + 0.5) * steps / draws))
            xt, x0, noise = add_noise(auxiliary, batch, t, generator)
            goal = auxiliary.diffusion.goal(x0, t, noise)
            for i in range(len(criteria)):
                one = np.eye(len(criteria), dtype=np.int8)[i]
                good, bad = ([criteria.prompt(c, side) for c in batch.captions]
                             for side in (one, -one))
                z_good, z_bad = two_targets(auxiliary, xt, send(t, xt.device), good, bad)
                # |goal - z_bad|^2 - |goal - z_good|^2, as a product: both are nearly equal
                gain = ((z_good - z_bad) * (2 * goal - z_good - z_bad)).flatten(1).sum(1)
                scores[rows.start:rows.stop, i] += gain.double().cpu().numpy() / draws
    return scores


def calibrate(scores, annotations):
    """Where to cut the scores (N, leaves) of each leaf, (leaves,): between two scores, so that the
    shares of good and of bad verdicts (annotations (N, leaves); 0: none) that come out right have
    the largest mean; 0 where one of the two kinds is missing, or nothing is better than 0."""
    cuts = np.zeros(scores.shape[1])
    for i, (column, verdicts) in enumerate(zip(scores.T, annotations.T)):
        good, bad = (np.sort(column[verdicts == side]) for side in (1, -1))
        if not len(good) or not len(bad):
            continue
        ranked = np.unique(np.concatenate([good, bad]))
        tried = np.concatenate([[0.0], (ranked[1:] + ranked[:-1]) / 2])
        right = [(good > cut).mean() + (bad <= cut).mean() for cut in tried]
        cuts[i] = tried[int(np.argmax(right))]
    return cuts
