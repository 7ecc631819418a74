"""The critic: from pixels alone to a caption, and to a score and a verdict for every leaf. No training, only image arithmetic (ours).

It plays the paper's expert: it annotates what the models paint, and so #A_neg can be counted exactly. It finds the horizon, takes
the colours on both sides of it, finds the subject, and then each leaf is one measure with one threshold. Each measure is turned into a
*score* = (measure - threshold) / scale with the sign so that > 0 means positive and typical paintings lie near -1 and +1;
the scores are also the space in which evaluate.py takes its Fréchet distance.

Lightness here is HSV value, max(R, G, B): hue and saturation do not move it, so the leaves stay apart.
"""
from dataclasses import dataclass
from functools import cache

import numpy as np

from .painter import CANVAS, CAPTIONS, LEAVES, SIZE, SUBJECTS, X, Y, cover, silhouette

# measure: (threshold, distance from the threshold to a typical positive painting; negative where less is better).
# Thresholds lie half-way between the two states of the painter's fresh paintings, moved towards the side that blur reaches.
THRESHOLDS = {
    "Placement": (10.2, -6.0),      # pixels from the subject's middle to the picture's: inside 0 or 6, cut 15
    "Level": (0.12, -0.10),         # |slope| of the horizon: level 0, tilted 0.26
    "Height": (18.6, 3.0),          # row of the horizon at the picture's middle: thirds 21.5, halves 15.5
    "Harmony": (0.24, -0.16),       # turns between the two hues: analogous 0.08, clashing 0.42
    "Purity": (0.48, 0.28),         # saturation: rich 0.78, muddy 0.23
    "Contrast": (0.38, 0.14),       # 1 - ground / sky value at the horizon: clear 0.53, flat 0.23
    "Exposure": (0.46, 0.22),       # value of the sky at the horizon: balanced 0.64 to 0.74, dark 0.27 to 0.32
    "Strokes": (0.08, -0.08),       # amplitude of the diagonal four-pixel wave: hatched 0.28, clean 0
    "Edges": (0.58, 0.32),          # share of the horizon's step within two pixels: crisp 0.9, blurred 0.33
    "Gradation": (0.15, 0.12),      # 1 - top / horizon value of the sky: graded 0.36, even 0
    "Spatter": (0.025, -0.025),     # area of small dark spots, the subject aside: some 0.08 or none
    "Corners": (0.50, -0.50),       # share of canvas colour in the barer lower corner: all or none
}

CRISP, BLURRED = 1.5, 5.0           # widths of an edge in pixels
SUN = SUBJECTS.index("sun")         # the only subject that does not stand on the horizon


@dataclass
class Verdicts:
    """scores (N, leaves) float, signs (N, leaves) int8 of -1 / +1, captions: N strings."""
    scores: np.ndarray
    signs: np.ndarray
    captions: list


@cache
def _horizon_lines():
    """Candidate lines: (K, 3) of height, slope and the row in each column (K, 32)."""
    heights, slopes = np.arange(11, 26, 0.25), np.linspace(-0.34, 0.34, 35)
    height, slope = (grid.ravel() for grid in np.meshgrid(heights, slopes, indexing="ij"))
    return height, slope, height[:, None] + slope[:, None] * (np.arange(SIZE) - SIZE / 2)


@cache
def _subject_masks(soft):
    """Every subject at every place: kind (K,), x (K,), y (K,), the unit-norm relief that it would have (1024, K)."""
    places = [(kind, x, y) for kind, subject in enumerate(SUBJECTS) for x in range(-1, SIZE + 2)
              for y in (range(4, 11) if subject == "sun" else range(10, 29))]
    parts = ((cover(part, soft).ravel() for part in silhouette(SUBJECTS[kind], X - x, Y - y)) for kind, x, y in places)
    masks = np.stack([dark - 0.5 * light for dark, light in parts], 1)    # a light part stands out less than a dark one
    kind, x, y = np.array(places).T
    return kind, x, y, masks / np.maximum(np.linalg.norm(masks, axis=0), 2.0)       # a sliver at the edge proves nothing


def _rows(image, rows):
    """image (N, 32, 32), rows (N, 32) real -> the values there, linearly interpolated, (N, 32)."""
    rows = np.clip(rows, 0, SIZE - 1.001)
    low = rows.astype(int)
    take = lambda r: np.take_along_axis(image, r[:, None], 1)[:, 0]
    return take(low) * (low + 1 - rows) + take(low + 1) * (rows - low)


def _colour(rgb, mask, percent=50):
    """A percentile over the masked pixels of each image and channel: (N, 32, 32, 3), (N, 32, 32) bool -> (N, 3)."""
    return np.nanpercentile(np.where(mask[..., None], rgb, np.nan), percent, axis=(1, 2))


def _windows(image, width, reduce, axes=(1, 2)):
    """Reduce (np.max, np.min, np.mean) over a sliding window along each axis, edges repeated: (N, 32, 32) -> the same shape."""
    for axis in axes:
        pad = [(0, 0)] * 3
        pad[axis] = ((width - 1) // 2, width // 2)
        image = reduce(np.lib.stride_tricks.sliding_window_view(np.pad(image, pad, "edge"), width, axis), axis=-1)
    return image


def remove_specks(value):
    """Lift dark things that are shorter than five pixels both across and down (a morphological closing by two lines);
    a hull or a trunk is longer one way and stays. (N, 32, 32) -> the same shape."""
    across, down = (_windows(_windows(value, 5, np.max, (axis,)), 5, np.min, (axis,)) for axis in (2, 1))
    return np.minimum(across, down)


def find_hatching(value):
    """value (N, 32, 32) -> amplitude (N,) and the factor (N, 32, 32) by which hatching scaled each pixel.

    Hatching is a diagonal wave of period four, so a 4x4 mean does not see it and one Fourier coefficient holds all of it."""
    local = np.maximum(_windows(value, 4, np.mean), 0.02)
    ripple = np.clip(value / local - 1, -0.4, 0.4)
    waves = np.exp(0.5j * np.pi * np.stack([X + Y, X - Y]))
    coefficient = np.einsum("nyx,dyx->nd", ripple, waves.conj()) / ripple[0].size
    amplitude = 2 * np.abs(coefficient).max(1)
    strongest = np.abs(coefficient) == np.abs(coefficient).max(1, keepdims=True)
    factor = 1 + 2 * np.einsum("nd,dyx->nyx", coefficient * strongest, waves).real
    return amplitude, np.where(amplitude[:, None, None] > 0.05, factor, 1)


def find_bare_corner(rgb):
    """rgb (N, 32, 32, 3) -> the larger share of canvas colour in the two lower corners (N,), and all of it (N, 32, 32) bool."""
    like = (np.abs(rgb - CANVAS).max(3) < 0.17) & (np.minimum(X, SIZE - 1 - X) + SIZE - 1 - Y < 13)
    corner = (X + SIZE - 1 - Y) <= 6
    share = np.maximum(like[:, corner].mean(1), like[:, corner[:, ::-1]].mean(1))
    return share, (_windows(like.astype(float), 3, np.max) > 0) & (share > THRESHOLDS["Corners"][0])[:, None, None]


def find_horizon(rgb):
    """rgb (N, 32, 32, 3) -> height (N,) and slope (N,) of the line across which colour changes most (a small Hough transform).

    The change is the mean of three pixels above less three below, capped so that a dark subject cannot outvote the horizon."""
    height, slope, lines = _horizon_lines()
    total = np.pad(np.cumsum(rgb, 1), ((0, 0), (1, 0), (0, 0), (0, 0)))   # total[r]: the sum of the rows above r
    change = np.zeros(rgb.shape[:3])                                      # at row r: across the edge between r - 1 and r
    change[:, 3:SIZE - 2] = np.linalg.norm(2 * total[:, 3:SIZE - 2] - total[:, :SIZE - 5] - total[:, 6:], axis=3) / 3
    change = np.minimum(change, np.median(change[:, 11:26].max(1), axis=1)[:, None, None])
    rows = np.clip(lines + 0.5, 3, SIZE - 3)                              # (K, 32): pixel centres are whole numbers
    low, part = rows.astype(int), rows % 1
    columns = np.arange(SIZE)
    votes = np.stack([(d[low, columns] * (1 - part) + d[low + 1, columns] * part).mean(1) for d in change])
    best = votes.argmax(1)
    return height[best], slope[best]


def _line(height, slope):
    """(N,), (N,) -> the horizon's row in each column (N, 32), and every pixel's distance below it (N, 32, 32)."""
    line = height[:, None] + slope[:, None] * (np.arange(SIZE) - SIZE / 2)
    return line, Y[None] - line[:, None, :]


def _sky_and_ground(rgb, below):
    """The colours (N, 3) of the sky just above the horizon (a broad subject may darken half of it: not the median) and of
    the ground, away from the corners."""
    return (_colour(rgb, (below < -3) & (below > -7), 65),
            _colour(rgb, (below > 4) & (np.abs(X - SIZE / 2 + 0.5) < 9)))


def _skyness(rgb, low, earth):
    """Colour projected on the way from ground (0) to sky (1), (N, 32, 32). Value alone would not do: the middle of two
    clashing hues is darker than either."""
    way = low - earth
    return np.einsum("nyxc,nc->nyx", rgb - earth[:, None, None], way / np.maximum((way ** 2).sum(1, keepdims=True), 1e-4))


def refine_horizon(rgb, line, low, earth, free):
    """Each column that goes from plain sky to plain ground counts its pixels of sky; the line nearest to these counts (the
    distance truncated at 1.5 pixels, against what is left of subject and spatter), as find_horizon. free (N, 32) bool:
    columns without the subject."""
    height, slope, lines = _horizon_lines()
    start = np.clip(np.round(line) - 6, 0, SIZE - 13).astype(int)
    window = np.take_along_axis(_skyness(rgb, low, earth), start[:, None] + np.arange(13)[:, None], 1)         # (N, 13, 32)
    between = np.clip(window, 0, 1)
    crossing = start + between.sum(1) - 0.5
    trust = free & (between[:, :3].mean(1) > 0.8) & (between[:, -3:].mean(1) < 0.2)
    trust = np.where(trust.sum(1, keepdims=True) < 8, free, trust)        # hardly a column is plain: use all
    best = np.array([np.minimum(np.abs(lines[:, t] - c[t]), 1.5).mean(1).argmin() for c, t in zip(crossing, trust)])
    return height[best], slope[best]


def find_subject(rgb, line, below, top, low, earth, soft):
    """-> kind, x, y, each (N,): which subject stands where. The relief against the empty scene (> 0 darker, < 0 brighter) is
    projected on the relief that every subject would have at every place."""
    colour = lambda c: c[:, None, None]                                   # (N, 3) -> (N, 1, 1, 3)
    depth = np.clip((Y[None] - 1) / np.maximum(line[:, None, :] - 6, 1), 0, 1)[..., None]
    air = colour(top) + depth * (colour(low) - colour(top))
    scene = air + cover(-below, soft[:, None, None])[..., None] * (colour(earth) - air)
    relief = np.clip(1 - rgb.max(3) / np.maximum(scene.max(3), 0.02), -1, 1)
    relief = np.where(below < 4, relief, 0).reshape(len(rgb), -1)
    kind, x, y, masks = _subject_masks(CRISP)
    fit = np.where(soft[:, None] == CRISP, relief @ masks, relief @ _subject_masks(BLURRED)[3])                # (N, K)
    foot = line[:, np.clip(x, 0, SIZE - 1)] + 1                           # all but the sun stand on the horizon
    best = np.where((kind == SUN) | (np.abs(y - foot) < 1.8), fit, -1).argmax(1)
    return kind[best], x[best], y[best]


def measure(images):
    """images uint8 (N, 32, 32, 3) -> {leaf: (N,)} raw measures, and the captions. Thresholds and their reasons: THRESHOLDS."""
    rgb = np.asarray(images, np.float64) / 255
    out = {}
    out["Strokes"], hatching = find_hatching(rgb.max(3))
    out["Corners"], bare = find_bare_corner(rgb)
    rgb = np.where(bare[..., None], np.median(rgb[:, -4:, 10:-10], axis=(1, 2))[:, None, None], rgb / hatching[..., None])
    value = rgb.max(3)                                                    # (N, 32, 32): no hatching, no bare corner,
    clean = np.stack([remove_specks(rgb[..., c]) for c in range(3)], 3)   # and here no spatter either
    top = np.median(clean[:, 1], axis=1)                                  # (N, 3): the sky's colour at the top
    line, below = _line(*find_horizon(clean))                             # pixels under the horizon
    low, earth = _sky_and_ground(clean, below)
    free = np.ones(line.shape, bool)
    for _ in range(2):                                                    # the line helps to find the subject, and without the
        height, slope = refine_horizon(clean, line, low, earth, free)     # subject's columns there is a better line
        line, below = _line(height, slope)
        low, earth = _sky_and_ground(clean, below)
        out["Edges"], soft = _sharpness(clean, line, low, earth)
        kind, x, y = find_subject(clean, line, below, top, low, earth, soft)
        free = (np.abs(np.arange(SIZE) - x[:, None]) > 8) | (kind == SUN)[:, None]
    out["Height"], out["Level"], out["Placement"] = height, np.abs(slope), np.abs(x - SIZE / 2)

    (sky_hue, sky_rich), (ground_hue, ground_rich) = _hue_saturation(low), _hue_saturation(earth)
    turn = np.abs(sky_hue - ground_hue)
    out["Harmony"] = np.minimum(turn, 1 - turn)
    out["Purity"] = (sky_rich + ground_rich) / 2
    out["Exposure"] = low.max(1)
    out["Contrast"] = 1 - earth.max(1) / np.maximum(low.max(1), 0.02)
    out["Gradation"] = 1 - top.max(1) / np.maximum(low.max(1), 0.02)

    around = np.stack([np.minimum(*silhouette(SUBJECTS[k], X - i, Y - j)) < 2.5 for k, i, j in zip(kind, x, y)])
    elsewhere = ~around & ~bare
    specks = elsewhere & (1 - value / np.maximum(clean.max(3), 0.02) > 0.3)          # dark and small
    out["Spatter"] = specks.sum((1, 2)) / elsewhere.sum((1, 2))
    captions = [CAPTIONS[k] for k in kind]
    return out, captions


def _hue_saturation(rgb):
    """(N, 3) -> hue in turns and saturation, each (N,)."""
    high, low = rgb.max(1), rgb.min(1)
    span = np.maximum(high - low, 1e-6)
    r, g, b = rgb.T
    hue = np.select([high == r, high == g], [(g - b) / span % 6, (b - r) / span + 2], (r - g) / span + 4) / 6
    return hue, (high - low) / np.maximum(high, 1e-6)


def _sharpness(rgb, line, low, earth):
    """Share of the step across the horizon that falls within two pixels (N,), and the width of the edge in pixels (N,).

    The profile is the median of the 14 columns that look most like plain sky above and plain ground below."""
    sky = _skyness(rgb, low, earth)
    columns = np.stack([_rows(sky, line + k) for k in range(-5, 6)], 2)   # (N, 32, 11)
    strange = np.abs(columns[:, :, :2] - 1).max(2) + np.abs(columns[:, :, -2:]).max(2)
    plain = np.argsort(strange, axis=1)[:, :14]
    profile = np.median(np.take_along_axis(columns, plain[:, :, None], 1), axis=1)             # (N, 11)
    share = (profile[:, :-2] - profile[:, 2:])[:, 3:-3].max(1)            # the line may be off by a pixel
    return share, np.where(share > THRESHOLDS["Edges"][0], CRISP, BLURRED)


def unmeasured(criteria, captions=()):
    """What the critic cannot judge of a tree and its captions: leaf paths and captions that the painter does not know."""
    return [leaf.path for leaf in criteria.leaves if leaf.name not in THRESHOLDS] + sorted(set(captions) - set(CAPTIONS))


def judge(images, criteria):
    """images uint8 (N, 32, 32, 3), criteria: a tree whose leaves the painter knows -> Verdicts, leaves in the tree's order.
    Raises ValueError on a leaf that cannot be measured or on another size of picture."""
    if unmeasured(criteria):
        raise ValueError(f"the critic has no measure for {', '.join(unmeasured(criteria))}; it knows: {', '.join(LEAVES)}")
    if np.shape(images)[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"the critic reads pictures of shape ({SIZE}, {SIZE}, 3), not {np.shape(images)[1:]}")
    measures, captions = measure(images)
    scores = np.stack([(measures[leaf.name] - THRESHOLDS[leaf.name][0]) / THRESHOLDS[leaf.name][1] for leaf in criteria.leaves], 1)
    return Verdicts(scores, np.where(scores > 0, 1, -1).astype(np.int8), captions)
