"""The critic: from pixels alone to a caption, and to a score and a verdict for every leaf. No
training, only image arithmetic (ours).

It plays the paper's expert: it annotates what the models paint, so that #A_neg can be counted. On
the painter's pictures that count is exact but for rare slips. What a model paints may lie between
the two states of a leaf; there a threshold decides, and docs/results/critic.md compares the critic
with two trained networks.

The critic undoes what lies over the picture (hatching, a bare corner, spatter), finds the layout
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
                      Y, cover, silhouette)

# measure: (threshold, distance from the threshold to a typical positive painting; negative where
# less is better). Thresholds lie half-way between the two states of the painter's fresh paintings,
# moved towards the side that blur reaches.
THRESHOLDS = {
    "Placement": (3.25, 3.25),      # pixels from the subject's middle to the picture's: on a third
                                    # 6.5, dead centre 0
    "Level": (0.15, -0.15),         # |slope| of the horizon: level 0, tilted 0.30
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
    "Edges": (0.40, 0.40),          # where all edges lie from blurred (7 pixels wide: 0) to crisp
                                    # (1 pixel: 1, in a rough picture 0.55 or more); 4 pixels: 0.5
    "Gradation": (0.15, 0.12),      # 1 - top / horizon value of the sky: graded 0.36, even 0
    "Spatter": (0.0175, -0.0175),   # light that small dark spots take away, the subject aside: some
                                    # 0.06, under blur 0.03, or none
    "Corners": (0.50, -0.50),       # share of canvas colour in the barer lower corner: all or none
}


# width in pixels of a crisp edge and of a blurred one, as the painter's
SOFTNESS = 1.0, 7.0


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


@cache
def _lines():
    """Every line that is looked for once the layout is known: heights and slopes (K,), and how much
    of each pixel is sky, crisp and blurred (2, K, 1024)."""
    height, slope = np.array(list(product(np.arange(11, 26.1, 0.5),
                                          np.linspace(-0.45, 0.45, 19)))).T
    line = height[:, None, None] + slope[:, None, None] * (X - SIZE / 2)
    below = (Y - line) / np.hypot(1, slope)[:, None, None]
    return height, slope, np.stack([cover(below, soft).reshape(len(height), -1)
                                    for soft in SOFTNESS]).astype(np.float32)


def fit_horizon(sky, seen):
    """Height and slope of the horizon, each (N,): the mean over all lines, weighted by how well
    each explains the picture.

    Every visible pixel has a say, so a wide subject that leaves few columns free costs little; and
    a pixel far from the line is sky (or ground) to all of them, so its roughness tilts none.
    sky, seen (N, 32, 32): skyness; whether a pixel is near the horizon and not the subject's."""
    height, slope, shapes = _lines()
    sky = np.clip(sky, -0.5, 1.5)
    sky, seen = (x.reshape(len(x), -1).astype(np.float32) for x in (sky, seen))
    # squared, up to what is the same for every line
    error = np.concatenate([seen @ (shape ** 2).T - 2 * (seen * sky) @ shape.T
                            for shape in shapes], 1)                      # (N, 2 K)
    weight = np.exp((error.min(1, keepdims=True) - error) / 0.5)
    weight /= weight.sum(1, keepdims=True)
    return weight @ np.tile(height, 2), weight @ np.tile(slope, 2)


def repaint(rgb, seen, height, slope, parts, soft):
    """The picture (N, 1024, 3) closest to rgb (N, 32, 32, 3) that a painter could paint with this
    layout and edges `soft` pixels wide, if the colours of sky (at the top and at the horizon),
    ground, light and dark part were free: least squares.

    seen (N, 32, 32): which pixels count; parts (N, 2, 32, 32): the subject's signed distances."""
    horizon = height[:, None, None] + slope[:, None, None] * (X - SIZE / 2)
    ground = cover((horizon - Y) / np.hypot(1, slope)[:, None, None], soft)
    dark, light = cover(parts[:, 0], soft), cover(parts[:, 1], soft)
    depth, behind = np.clip(Y / (horizon - 5), 0, 1), (1 - light) * (1 - dark)
    sky = (1 - ground) * behind
    areas = np.stack([sky * (1 - depth), sky * depth, ground * behind, light * (1 - dark), dark], 3)
    areas = areas.reshape(len(rgb), -1, 5)
    counted = (areas * seen.reshape(len(rgb), -1, 1)).swapaxes(1, 2)
    # 0.01: a subject may lack a part
    colours = np.linalg.solve(counted @ areas + 0.01 * np.eye(5),
                              counted @ rgb.reshape(len(rgb), -1, 3))
    return areas @ colours


def _crispness(rgb, seen, *layout):
    """Where a picture lies on the way from its best blurred repainting (0) to its best crisp one
    (1), (N,): every edge is asked, the subject's too. Arguments: as of `repaint`."""
    crisp, blurred = (repaint(rgb, seen, *layout, soft) for soft in SOFTNESS)
    way = (crisp - blurred) * seen.reshape(len(rgb), -1, 1)
    share = ((rgb.reshape(blurred.shape) - blurred) * way).sum((1, 2))
    return share / np.maximum((way ** 2).sum((1, 2)), 1e-6)


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
    parts = np.stack([subject_at(int(k), p, h) for k, p, h in zip(kind, place, height)])
    free = parts.min(1) > 3                                                  # far from the subject
    for _ in range(2):              # colours from the layout's line, a better line from them
        below = Y - (height[:, None, None] + slope[:, None, None] * (X - SIZE / 2))
        low, earth = (_colour(clean, free & (below < -3) & (below > -7)),
                      _colour(clean, free & (below > 3)))
        height, slope = fit_horizon(_skyness(clean, low, earth),
                                    (parts.min(1) > 2) & (np.abs(below) < 8))
    out["Height"], out["Level"], out["Placement"] = height, np.abs(slope), np.abs(place - SIZE / 2)
    out["Edges"] = _crispness(clean, ~bare, height, slope, parts)
    top = _colour(clean, free & (Y < 2))
    (sky_hue, sky_rich), (ground_hue, ground_rich) = _hue_saturation(low), _hue_saturation(earth)
    turn = np.abs(sky_hue - ground_hue)
    out["Harmony"] = np.minimum(turn, 1 - turn)
    out["Purity"] = (sky_rich + ground_rich) / 2
    out["Exposure"] = low.max(1)
    out["Contrast"] = 1 - earth.max(1) / np.maximum(low.max(1), 0.02)
    out["Gradation"] = 1 - top.max(1) / np.maximum(low.max(1), 0.02)
    free &= ~bare
    light = clean.max(3)
    lost = 1 - value / np.maximum(light, 0.02)          # to small spots; a little is roughness
    # seen by its light: on dark ground noise is as deep as a spot
    out["Spatter"] = ((light * lost * (lost > 0.3) * free).sum((1, 2))
                      / np.maximum((light * free).sum((1, 2)), 0.02))
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
