"""The critic: from pixels alone to a caption, and to a score and a verdict for every leaf. No
training, only image arithmetic (ours).

It plays the paper's expert: it annotates what the models paint, and so #A_neg can be counted
exactly. It undoes what lies over the picture (hatching, a bare corner, spatter), finds the layout
that explains the rest best (where is the horizon, which subject stands where), reads the colours
of sky and ground, and then each leaf is one measure with one threshold. Each measure is turned
into a *score* = (measure - threshold) / scale with the sign so that > 0 means positive and
typical paintings lie near -1 and +1; the scores are also the space in which evaluate.py takes its
Fréchet distance.

Lightness here is HSV value, max(R, G, B): hue and saturation do not move it, so the leaves
stay apart.
"""
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

from .painter import (CANVAS, CAPTIONS, FOREGROUND, HATCHING, LEAVES, SIZE, SUBJECTS, SUN_HEIGHT, X,
                      Y, silhouette)

# measure: (threshold, distance from the threshold to a typical positive painting; negative where
# less is better). Thresholds lie half-way between the two states of the painter's fresh paintings,
# moved towards the side that blur reaches.
THRESHOLDS = {
    "Placement": (3.25, 3.25),      # pixels from the subject's middle to the picture's: on a third
                                    # 6.5, dead centre 0
    "Level": (0.13, -0.13),         # |slope| of the horizon: level 0, tilted 0.30
    "Height": (18.5, 3.0),          # row of the horizon at the picture's middle: thirds 21.5,
                                    # halves 15.5
    "Harmony": (0.27, -0.14),       # turns between the two hues: analogous 0.13, clashing 0.42
    "Purity": (0.45, 0.33),         # saturation: rich 0.78, muddy 0.25; a generator's mixed colours
                                    # are less saturated
    "Contrast": (0.42, 0.16),       # 1 - ground / sky value at the horizon: clear 0.58, flat 0.25
    "Exposure": (0.50, 0.20),       # value of the sky at the horizon: balanced 0.64 to 0.80, dark
                                    # 0.31 to 0.38
    "Strokes": (0.12, -0.12),       # amplitude of the diagonal wave: hatched 0.27, under blur 0.18,
                                    # clean 0
    "Edges": (0.45, 0.45),          # share of the horizon's step within two pixels: crisp 1,
                                    # blurred 0.30
    "Gradation": (0.15, 0.12),      # 1 - top / horizon value of the sky: graded 0.36, even 0
    "Spatter": (0.025, -0.025),     # area of small dark spots, the subject aside: some 0.08 or none
    "Corners": (0.50, -0.50),       # share of canvas colour in the barer lower corner: all or none
}


@dataclass
class Verdicts:
    """scores (N, leaves) float, signs (N, leaves) int8 of -1 / +1, captions: N strings."""
    scores: np.ndarray
    signs: np.ndarray
    captions: list


def _windows(image, width, reduce, axes=(1, 2)):
    """Reduce (np.max, np.min, np.mean) over a sliding window along each axis, edges repeated:
    (N, 32, 32) -> the same shape."""
    for axis in axes:
        pad = [(0, 0)] * 3
        pad[axis] = ((width - 1) // 2, width // 2)
        image = reduce(np.lib.stride_tricks.sliding_window_view(
            np.pad(image, pad, "edge"), width, axis), axis=-1)
    return image


def remove_specks(value):
    """Lift dark things that are shorter than five pixels both across and down (a morphological
    closing by two lines); a hull or a trunk is longer one way and stays. (N, 32, 32) -> the
    same shape."""
    across, down = (_windows(_windows(value, 5, np.max, (axis,)), 5, np.min, (axis,))
                    for axis in (2, 1))
    return np.minimum(across, down)


def find_hatching(value):
    """value (N, 32, 32) -> amplitude (N,) and the factor (N, 32, 32) by which hatching scaled
    each pixel.

    Hatching is a diagonal wave, so a mean over its period does not see it and one Fourier
    coefficient holds all of it."""
    local = np.maximum(_windows(value, HATCHING, np.mean), 0.02)
    ripple = np.clip(value / local - 1, -0.4, 0.4)
    wave = np.exp(2j * np.pi / HATCHING * (X + Y))
    coefficient = np.einsum("nyx,yx->n", ripple, wave.conj()) / wave.size
    amplitude = 2 * np.abs(coefficient)
    factor = 1 + 2 * np.einsum("n,yx->nyx", coefficient, wave).real
    return amplitude, np.where(amplitude[:, None, None] > 0.05, factor, 1)


def find_bare_corner(rgb):
    """rgb (N, 32, 32, 3) -> the larger share of canvas colour in the two lower corners (N,), and
    all of it (N, 32, 32) bool."""
    like = (np.abs(rgb - CANVAS).max(3) < 0.17) & (np.minimum(X, SIZE - 1 - X) + SIZE - 1 - Y < 13)
    corner = (X + SIZE - 1 - Y) <= 6
    share = np.maximum(like[:, corner].mean(1), like[:, corner[:, ::-1]].mean(1))
    return share, ((_windows(like.astype(float), 3, np.max) > 0)
                   & (share > THRESHOLDS["Corners"][0])[:, None, None])


def subject_at(kind, place, height):
    """The two signed distances of a subject, by number, whose middle is in column `place`, with the
    horizon at `height`."""
    foot = SUN_HEIGHT if SUBJECTS[kind] == "sun" else height + FOREGROUND
    return silhouette(SUBJECTS[kind], X - place, Y - foot)


@cache
def _layouts():
    """Every layout that is looked for: (K, 4) of height, slope, subject's number and place, and the
    shapes that it predicts, unit norm, (5, K, 1024): sky, ground, dark part, light part, and the
    sky's gradation (less its mean, so orthogonal to the sky)."""
    found, shapes = [], []
    for height, slope, kind, place in product(np.arange(13.5, 24, 2), np.linspace(-0.30, 0.30, 7),
                                              range(len(SUBJECTS)),
                                              SIZE / 2 + 6.5 / 4 * np.arange(-5, 6)):
        horizon = height + slope * (X - SIZE / 2)
        dark, light = (part < 0 for part in subject_at(kind, place, height))
        sky, ground = (side & ~dark & ~light for side in (Y < horizon, Y >= horizon))
        depth = np.minimum(Y / (horizon - 5), 1)
        found.append((height, slope, kind, place))
        shapes.append([sky, ground, dark, light & ~dark, sky * (depth - depth[sky].mean())])
    shapes = np.array(shapes, np.float32).reshape(len(found), 5, -1).swapaxes(0, 1)
    return np.array(found), shapes / np.maximum(np.linalg.norm(shapes, axis=2, keepdims=True), 1e-6)


def find_layout(rgb, chunk=32):
    """rgb (N, 32, 32, 3) -> height, slope, subject's number and place, each (N,), of the layout
    that leaves the least unexplained when each of its areas takes the colour that suits it best:
    least squares, so the most energy in the areas' shapes.

    A dark part must come out darker than the sky and a light part lighter, or a tree's crown would
    do for a sun."""
    layouts, shapes = _layouts()
    # of a unit-norm area: the root of its number of pixels
    best, size = [], np.maximum(shapes[:4].sum(2), 1e-6)
    for start in range(0, len(rgb), chunk):
        pixels = rgb[start:start + chunk].reshape(-1, SIZE * SIZE, 3).astype(np.float32)
        fit = np.tensordot(shapes, pixels, (2, 1))                        # (5, K, n, 3)
        sky, _, dark, light = fit[:4].sum(3) / size[..., None]            # each (K, n): lightness
        energy = (fit ** 2).sum((0, 3))
        best.append(np.where((dark > sky) | (light < sky) & (light > 0), 0, energy).argmax(0))
    return layouts[np.concatenate(best)].T


def _colour(rgb, mask):
    """The median over the masked pixels of each image and channel: (N, 32, 32, 3), (N, 32, 32) bool
    -> (N, 3); 0 where there are none."""
    count, n = mask.sum((1, 2)), np.arange(len(rgb))
    ranked = np.sort(np.where(mask[..., None], rgb, np.inf).reshape(len(rgb), -1, rgb.shape[-1]),
                     axis=1)                                              # the masked come first
    middle = (ranked[n, (count - 1) // 2] + ranked[n, count // 2]) / 2
    return np.where(count[:, None], middle, 0)


def _hue_saturation(rgb):
    """(N, 3) -> hue in turns and saturation, each (N,)."""
    high, low = rgb.max(1), rgb.min(1)
    span = np.maximum(high - low, 1e-6)
    r, g, b = rgb.T
    hue = np.select([high == r, high == g], [(g - b) / span % 6, (b - r) / span + 2],
                    (r - g) / span + 4) / 6
    return hue, (high - low) / np.maximum(high, 1e-6)


def _skyness(rgb, low, earth):
    """Colour projected on the way from ground (0) to sky (1), (N, 32, 32). Value alone would not
    do: the middle of two clashing hues is darker than either."""
    way = low - earth
    return np.einsum("nyxc,nc->nyx", rgb - earth[:, None, None],
                     way / np.maximum((way ** 2).sum(1, keepdims=True), 1e-4))


def refine_horizon(sky, below, free):
    """How much lower than the layout's line the horizon lies at the picture's middle, and how much
    steeper it is, each (N,).

    In every column that the subject leaves free, sky that reaches k pixels under the line adds k,
    blurred or not; then a line through these numbers. sky, below, free (N, 32, 32): skyness, pixels
    under the line, whether the subject is far."""
    near = np.abs(below) < 6.5
    lower = np.where(near, np.clip(sky, -0.5, 1.5) - (below < 0), 0).sum(1)          # (N, 32)
    weight = (free | ~near).all(1) + 1e-9                                 # columns
    weight /= weight.sum(1, keepdims=True)
    x = np.arange(SIZE) - SIZE / 2 - (weight * (np.arange(SIZE) - SIZE / 2)).sum(1, keepdims=True)
    steeper = (weight * x * lower).sum(1) / (weight * x ** 2).sum(1)
    return (weight * lower).sum(1) + steeper * x[:, SIZE // 2], steeper


def _sharpness(sky, below, free):
    """Share of the step from sky to ground that falls within two pixels of the horizon, (N,), the
    subject left out."""
    profile = np.stack([_colour(sky[..., None], free & (np.abs(below - k) <= 0.5))[:, 0]
                        for k in range(-3, 4)], 1)                # (N, 7)
    return (profile[:, :-2] - profile[:, 2:])[:, 1:-1].max(1)     # the line may be off by a pixel


def measure(images):
    """images uint8 (N, 32, 32, 3) -> {leaf: (N,)} raw measures, and the captions. Thresholds and
    their reasons: THRESHOLDS."""
    rgb = np.asarray(images, np.float64) / 255
    out = {}
    out["Strokes"], hatching = find_hatching(rgb.max(3))
    out["Corners"], bare = find_bare_corner(rgb)
    rgb = np.where(bare[..., None], np.median(rgb[:, -4:, 10:-10], axis=(1, 2))[:, None, None],
                   rgb / hatching[..., None])
    value = rgb.max(3)                              # (N, 32, 32): no hatching, no bare corner,
    # and here no spatter either
    clean = np.stack([remove_specks(rgb[..., c]) for c in range(3)], 3)
    height, slope, kind, place = find_layout(clean)
    free = np.stack([np.minimum(*subject_at(int(k), p, h))
                     for k, p, h in zip(kind, place, height)]) > 3        # far from the subject
    for _ in range(2):              # colours from the layout's line, a better line from them
        below = Y - (height[:, None, None] + slope[:, None, None] * (X - SIZE / 2))
        low, earth = (_colour(clean, free & (below < -3) & (below > -7)),
                      _colour(clean, free & (below > 3)))
        sky = _skyness(clean, low, earth)
        lower, steeper = refine_horizon(sky, below, free)
        height, slope = height + lower, slope + steeper
    out["Height"], out["Level"], out["Placement"] = height, np.abs(slope), np.abs(place - SIZE / 2)
    out["Edges"] = _sharpness(sky, below, free)
    top = _colour(clean, free & (Y < 2))
    (sky_hue, sky_rich), (ground_hue, ground_rich) = _hue_saturation(low), _hue_saturation(earth)
    turn = np.abs(sky_hue - ground_hue)
    out["Harmony"] = np.minimum(turn, 1 - turn)
    out["Purity"] = (sky_rich + ground_rich) / 2
    out["Exposure"] = low.max(1)
    out["Contrast"] = 1 - earth.max(1) / np.maximum(low.max(1), 0.02)
    out["Gradation"] = 1 - top.max(1) / np.maximum(low.max(1), 0.02)
    free &= ~bare
    specks = free & (1 - value / np.maximum(clean.max(3), 0.02) > 0.3)       # dark and small
    out["Spatter"] = specks.sum((1, 2)) / free.sum((1, 2))
    return out, [CAPTIONS[int(k)] for k in kind]


def unmeasured(criteria, captions=()):
    """What the critic cannot judge of a tree and its captions: leaf paths and captions that the
    painter does not know."""
    return ([leaf.path for leaf in criteria.leaves if leaf.name not in THRESHOLDS]
            + sorted(set(captions) - set(CAPTIONS)))


def judge(images, criteria):
    """images uint8 (N, 32, 32, 3), criteria: a tree whose leaves the painter knows -> Verdicts,
    leaves in the tree's order. Raises ValueError on a leaf that cannot be measured or on another
    size of picture."""
    if unmeasured(criteria):
        raise ValueError(f"the critic has no measure for {', '.join(unmeasured(criteria))}; "
                         f"it knows: {', '.join(LEAVES)}")
    if np.shape(images)[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"the critic reads pictures of shape ({SIZE}, {SIZE}, 3), "
                         f"not {np.shape(images)[1:]}")
    measures, captions = measure(images)
    scores = np.stack([(measures[leaf.name] - THRESHOLDS[leaf.name][0]) / THRESHOLDS[leaf.name][1]
                       for leaf in criteria.leaves], 1)
    return Verdicts(scores, np.where(scores > 0, 1, -1).astype(np.int8), captions)
