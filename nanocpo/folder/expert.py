"""The auxiliary as an expert: it knows what pictures with an attribute look like, so it can say of
a picture which side of each pair it shows (ours; the paper's expert is not public).

By Bayes' rule the odds of "good" against "bad" are those of the picture under the two prompts (E3),
and a diffusion model's log-likelihood is, up to a factor, minus its error at predicting the noise
that was added (2303.16203). Leaf by leaf that is log_ratios; leaves hang together, so verdicts are
found in rounds, in_context. The teacher judges its pupil's pictures here, and its own: what it does
not know, it does not see.
"""
import numpy as np
import torch
from tqdm import tqdm

from ..data import SPLITS
from ..method import add_noise
from ..utils.device import send

ROUNDS = 4


def held_out(data, count=32):
    """The first `count` pictures of the validation and test parts together: no model was trained
    on them, and nothing is chosen by either part where no study runs."""
    parts = (*SPLITS["validation"], *SPLITS["test"])
    return data.take([i for i, tenth in enumerate(data.tenths()) if tenth in parts][:count])


def noised(model, batch, draws, generator):
    """A Batch at `draws` evenly spread timesteps with a noise each: (x_t, t on the device, what the
    model should predict)."""
    for draw in range(draws):
        t = torch.full((len(batch.captions),), int((draw + 0.5) * model.diffusion.steps / draws))
        xt, x0, noise = add_noise(model, batch, t, generator)
        yield xt, send(t, xt.device), model.diffusion.goal(x0, t, noise)


@torch.no_grad()
def log_ratios(auxiliary, data, draws=16, seed=0, size=32, context=None):
    """Paintings -> float (N, leaves): log p(picture | good) - log p(picture | bad) of every leaf,
    up to a positive factor; above 0 the auxiliary finds the leaf good.

    draws: see noised; the prompts name the caption and one leaf, beside it what is said of the
    others in context, int8 (N, leaves).
    size: pictures at a time, of one shape (latents may have several)."""
    criteria, alike = data.criteria, {}
    generator, scores = torch.Generator().manual_seed(seed), np.zeros((len(data), len(criteria)))
    for i, image in enumerate(data.images):
        alike.setdefault(tuple(image.shape), []).append(i)
    parts = [rows[start:start + size] for rows in alike.values()
             for start in range(0, len(rows), size)]
    beside = np.zeros(scores.shape, np.int8) if context is None else context
    for rows in tqdm(parts, "verdicts", leave=False, mininterval=2):
        batch = data.batch(rows)
        # encoded once for all draws: a text encoder takes its time
        asked = [auxiliary.text.tokens(
            [criteria.prompt(c, np.where(leaf, side, others)) for side in (1, -1)
             for c, others in zip(batch.captions, beside[rows])])
            for leaf in np.eye(len(criteria), dtype=bool)]
        for xt, t, goal in noised(auxiliary, batch, draws, generator):
            for i, prompts in enumerate(asked):
                # one call for both, as in method.two_targets
                z_good, z_bad = auxiliary(torch.cat([xt, xt]), torch.cat([t, t]), prompts).chunk(2)
                # |goal - z_bad|^2 - |goal - z_good|^2, as a product: both are nearly equal
                gain = ((z_good - z_bad) * (2 * goal - z_good - z_bad)).flatten(1).sum(1)
                scores[rows, i] += gain.double().cpu().numpy() / draws
    return scores


def in_context(auxiliary, data, draws, rounds=ROUNDS, seed=0, size=32, known=None):
    """The mean of so many log_ratios, each with noise of its own. The first asks about each leaf
    alone and only serves the next ones, which put beside it what was found of the other leaves.

    Alone is not enough where leaves hang together. In data without a flawless picture, who is good
    in one leaf is likelier bad in another, so of a flawless picture the auxiliary says "bad" of
    leaf after leaf (docs/log.md). known: verdicts that stand, int8 (N, leaves); 0: none."""
    context, scores = known, 0
    for number in range(rounds):
        found = log_ratios(auxiliary, data, draws, seed + number, size, context)
        scores = found if number < 2 else scores + (found - scores) / number
        context = np.where(scores > 0, 1, -1).astype(np.int8)
        if known is not None:
            context = np.where(known != 0, known, context)
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


def agreement(scores, annotations, criteria):
    """How well verdicts by scores (N, leaves) agree with those that are known, annotations (N,
    leaves; 0: none): {"verdicts": how many were compared, "share": of them that came out right,
    None without any, "leaves": {name: the same for this leaf}}.

    Each picture is judged with cuts that were calibrated on the others, so that no verdict helps
    to confirm itself."""
    others = ~np.eye(len(scores), dtype=bool)
    cuts = np.array([calibrate(scores[rest], annotations[rest]) for rest in others])
    known, right = annotations != 0, (scores > cuts.reshape(scores.shape)) == (annotations > 0)
    share = lambda asked, came: float(came[asked].mean()) if asked.any() else None
    return {"verdicts": int(known.sum()), "share": share(known, right),
            "leaves": {leaf.name: share(*columns)
                       for leaf, *columns in zip(criteria.leaves, known.T, right.T)}}


def told(known):
    """What agreement() gave, as a sentence."""
    if not known["verdicts"]:
        return "No verdict was there to check the auxiliary by."
    return (f"Of {known['verdicts']} verdicts on held-out pictures the auxiliary gives "
            f"{100 * known['share']:.0f} % as the person did.")
