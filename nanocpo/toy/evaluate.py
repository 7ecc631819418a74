"""Count what a model paints: #A_neg and #A_pos (negative and positive attributes in a picture),
caption accuracy, diversity, Fréchet distance; all by the critic, from pixels.

The critic knows the painter, so the count is all but exact on the painter's pictures. What a model
paints may lie between two states: how far two trained networks agree there is in
docs/results/critic.md. What can be said of real pictures is in nanocpo/sd/report.py.
"""
import colorsys
from functools import cache

import numpy as np

from ..data import to_images
from ..utils.report import interval
from .critic import find_hatching, judge, unmeasured
from . import painter
from .painter import HUES, LEAVES
from .paintings import from_painter


def all_prompts(criteria, captions):
    """For each caption three Prompts: plain, with every positive attribute, with every
    negative one."""
    ones = np.ones(len(criteria), np.int8)
    return tuple([criteria.prompt(caption, sign * ones) for caption in captions]
                 for sign in (0, 1, -1))


def knob(criteria, captions, name, scale):
    """An axis of Model.sample for one branch of the tree: (scale, a Prompt with the branch good for
    each caption, one with it bad)."""
    branch = np.isin(np.arange(len(criteria)), criteria.columns(name)).astype(np.int8)
    return scale, *([criteria.prompt(c, sign * branch) for c in captions] for sign in (1, -1))


def diversity(images, captions):
    """Mean over captions of the mean distance between two pictures of one caption (root mean square
    over pixels, in [0, 1])."""
    out = []
    for caption in sorted(set(captions)):
        x = images[[c == caption for c in captions]].reshape(captions.count(caption), -1) / 255.0
        square = (x ** 2).sum(1)
        distance = np.maximum(square[:, None] + square - 2 * x @ x.T, 0) / x.shape[1]
        if len(x) > 1:
            out.append(np.sqrt(distance).sum() / (len(x) * (len(x) - 1)))
    return float(np.mean(out)) if out else 0.0


def frechet(a, b):
    """Fréchet distance between Gaussians fitted to two sets of vectors (N, D), (M, D) (1706.08500,
    equation 6)."""
    mean, cov = zip(*((x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))) for x in (a, b)))
    values, vectors = np.linalg.eigh(cov[0])
    # sqrt(S_a); tr sqrt(S_a S_b) is that of the symmetric root S_b root
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov[1] @ root), 0)).sum()
    return float(((mean[0] - mean[1]) ** 2).sum() + np.trace(cov[0]) + np.trace(cov[1]) - 2 * cross)


# --- what the eye sees and the verdicts do not

@cache
def masterpieces(caption, hues=97):
    """All all-positive paintings of a caption, (hues, 3072) in [0, 1]: they vary in hue only, so a
    fine row of hues is all of them."""
    pictures = [painter.paint(caption, dict.fromkeys(LEAVES, 1), 0, hue)
                for hue in np.linspace(*HUES, hues)]
    return np.stack(pictures).reshape(hues, -1) / 255


def to_nearest(images, captions):
    """Distance (N,) of each picture to the nearest all-positive painting of its caption: root mean
    square over pixels, in [0, 1]."""
    out, captions = np.empty(len(images)), np.array(captions)
    for caption in set(captions):
        rows, bank = captions == caption, masterpieces(str(caption))
        x = images[rows].reshape(rows.sum(), -1) / 255
        square = (x ** 2).sum(1)[:, None] + (bank ** 2).sum(1) - 2 * x @ bank.T
        out[rows] = np.sqrt(np.maximum(square.min(1), 0) / x.shape[1])
    return out


def hue_gap(images):
    """How far the hues of the skies are from the painter's, which are uniform between HUES: the
    largest difference of the two distribution functions (Kolmogorov and Smirnov), 0 to 1.

    The hue is that of a corner which is sky in every painting; no flaw changes it."""
    corner = images[:, :7, :8].reshape(len(images), -1, 3).mean(1)
    hues = np.sort([colorsys.rgb_to_hsv(*colour)[0] for colour in corner])
    share = np.clip((hues - HUES[0]) / (HUES[1] - HUES[0]), 0, 1)
    steps = np.arange(len(share) + 1) / len(share)
    return float(max((steps[1:] - share).max(), (share - steps[:-1]).max()))


def roughness(images):
    """(N,): the median over pixels and channels of the distance between a value and the mean of its
    four neighbours, in [0, 1]; 0 in the painter's own all-positive pictures."""
    x = images / 255
    around = (x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:]) / 4
    return np.median(np.abs(x[:, 1:-1, 1:-1] - around).reshape(len(x), -1), axis=1)


def seen(images, captions):
    """{name: number}: distance to the nearest all-positive painting, gap of hues, roughness, share
    of pictures with hatching that the critic does not count yet, share of values at 0 or 255."""
    return {"nearest": float(to_nearest(images, captions).mean()), "hue_gap": hue_gap(images),
            "roughness": float(roughness(images).mean()),
            "hatched": float((find_hatching(images.max(3) / 255)[0] > 0.03).mean()),
            "clipped": float(((images == 0) | (images == 255)).mean())}


def measure_row(images, captions, criteria, real):
    """Pictures uint8 (N, 32, 32, 3) and the captions they were asked for -> a dict of numbers
    (one row of the report). real: the Verdicts of held-out all-positive paintings, for the
    Fréchet distance."""
    verdicts = judge(images, criteria)
    negative = verdicts.signs < 0                                                    # (N, leaves)
    neg, neg_ci = interval(negative.sum(1))
    pos, pos_ci = interval((~negative).sum(1))
    return {"neg": neg, "neg_ci": neg_ci, "pos": pos, "pos_ci": pos_ci,
            "caption": float(np.mean([a == b for a, b in zip(verdicts.captions, captions)])),
            "diversity": diversity(images, list(captions)),
            # how sure the critic is: verdicts whose score is nearer to 0 than half of a typical one
            "doubtful": float((np.abs(verdicts.scores) < 0.5).mean()),
            **seen(images, captions),
            "frechet": frechet(np.clip(verdicts.scores, -3, 3), np.clip(real.scores, -3, 3)),
            "by_root": {root.name: float(negative[:, criteria.columns(root.name)].sum(1).mean())
                        for root in criteria.roots},
            "by_leaf": {leaf.name: float(share)
                        for leaf, share in zip(criteria.leaves, negative.mean(0))}}


@cache
def real_positive(criteria, count, seed=0):
    """Held-out paintings with every leaf positive, of random captions: (row, Verdicts). Never
    trained on."""
    data = from_painter(criteria, count, "positive", seed=10 ** 6 + seed)
    verdicts = judge(data.images, criteria)
    return measure_row(data.images, data.captions, criteria, verdicts), verdicts


def unfit(data):
    """Why the critic cannot judge what a model of these data paints, or ""; it looks at names, then
    at some of the pictures."""
    missing = unmeasured(data.criteria, data.captions)
    if missing:
        return f"the critic has no measure for {', '.join(missing)}"
    some = data.take(range(min(len(data), 64)))
    agrees = (judge(some.images, data.criteria).signs == some.annotations)[some.annotations != 0]
    if agrees.size and agrees.mean() < 0.8:
        return (f"the critic agrees with {agrees.mean():.0%} of the annotations only, "
                "so these pictures are not of its painter's kind")
    return ""


def asked(model, samples):
    """The captions of a report's pictures: all that the model knows, in turn."""
    return [model.captions[i % len(model.captions)] for i in range(samples)]


def paint(model, kind, samples=512, seed=0, steps=12, guidance=2.0, knobs=()):
    """A model's pictures uint8 (samples, H, W, 3) of the captions of `asked`. kind: "plain" (the
    caption only), "prompted" (every positive attribute in the prompt), "guided" (the same, guided
    away from every negative one). knobs: (branch, scale) each."""
    captions = asked(model, samples)
    plain, positive, negative = all_prompts(model.criteria, captions)
    return to_images(model.sample(plain if kind == "plain" else positive,
                                  negative if kind == "guided" else None,
                                  guidance if kind == "guided" else 1.0, steps, seed=seed,
                                  axes=[knob(model.criteria, captions, *one) for one in knobs]))


def evaluate(models, samples=512, seed=0, steps=12, guidance=2.0):
    """{row name: (model, kind)} of one tree and its captions -> the report: {"rows": {name: row},
    "real_positive": row, ...}, and {name: images}. kind: see paint. All rows start from the same
    noise. Raises ValueError if the critic has no measure for the tree."""
    first, _ = next(iter(models.values()))
    missing = unmeasured(first.criteria, first.captions)
    if missing:
        raise ValueError(f"the critic has no measure for {', '.join(missing)}")
    reference, real = real_positive(first.criteria, samples, seed)
    pictures = {name: paint(model, kind, samples, seed, steps, guidance)
                for name, (model, kind) in models.items()}
    rows = {name: measure_row(images, asked(first, samples), first.criteria, real)
            for name, images in pictures.items()}
    return {"rows": rows, "real_positive": reference, "samples": samples, "seed": seed,
            "sampling_steps": steps}, pictures
