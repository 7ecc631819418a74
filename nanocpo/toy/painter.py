"""The painter: small procedural paintings whose attributes are known, because they were
chosen (ours).

A painting is a sky, a ground, a horizon and one subject, 32x32 RGB. In `paint(caption,
states, seed)` the scene and every leaf draw their random numbers from streams of their own, so the
same caption and seed give *the same painting* in two states: only the named attribute differs. And
a leaf that is added repaints no old picture.

Colour is kept as hue, saturation, value, because each of the three is an attribute of its own: a
texture or the exposure scales all channels alike and so moves value only. Shapes are signed
distances in pixels (negative inside); the soft step `cover` turns a distance into opacity, and the
width of that step *is* the edge quality.
"""
import zlib

import numpy as np

SIZE = 32
SUBJECTS = ("house", "tree", "boat", "sun")
CAPTIONS = tuple(f"a {subject}" for subject in SUBJECTS)
# what this painter can draw, by leaf name
LEAVES = ("Placement", "Level", "Height", "Harmony", "Purity", "Contrast",
          "Exposure", "Strokes", "Edges", "Gradation", "Spatter", "Corners")
HUES = (0.46, 0.78)                 # skies are teal to violet: mixed, they do not turn grey
# pixels from line to line, across or down: coarse, so blur spares it
HATCHING = 6
CANVAS = (0.95, 0.92, 0.84)         # bare canvas: brighter than any painted ground
# spatter: x and y from the middle; none near a horizon, which it would blur
BLOTS = ((-13, -12.5), (-4.5, -13.5), (4, -12.5), (12.5, -13), (-10.5, -7), (13, -7.5),
         (-7, 13), (1, 12.5), (8, 13))
FOREGROUND, SUN_HEIGHT = 4.0, 8.0   # rows from the horizon down to a subject's foot; the sun's row
Y, X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)                # pixel centres; y grows downwards


def cover(distance, softness=1.0):
    """Signed distance in pixels -> opacity in [0, 1]; softness is the width of the edge
    in pixels."""
    return np.clip(0.5 - distance / softness, 0, 1)


def box(x, y, left, right, top, bottom):
    """Signed distance to an upright rectangle (exact inside and beside it, as all that
    `cover` needs)."""
    return np.maximum(np.maximum(left - x, x - right), np.maximum(top - y, y - bottom))


def cone(x, y, top, bottom, slope):
    """Signed distance to a triangle with its tip at (0, top), opening by `slope` pixels a row, cut
    off at `bottom`."""
    return np.maximum((np.abs(x) - slope * (y - top)) / np.hypot(1, slope), y - bottom)


def silhouette(subject, x, y):
    """Signed distances of a subject's dark part and of its light part; (0, 0) is the middle of its
    foot (of the sun's disc)."""
    nothing = np.full(np.shape(x + y), 99.0)
    if subject == "house":
        return cone(x, y, -18, -9, 0.9), box(x, y, -6, 6, -9, 0)              # roof, walls
    if subject == "tree":
        return np.minimum(box(x, y, -2, 2, -7, 0), np.hypot(x, y + 11.5) - 6.5), nothing
    if subject == "boat":
        hull = np.maximum(box(x, y, -8.5, 8.5, -4.5, 0), np.abs(x) * 0.8 + y - 5)
        return hull, np.maximum(cone(x + 3, y, -18, -5.5, 0.8), -3.5 - x)     # hull, sail
    return nothing, np.hypot(x, y) - 6


def hsv_to_rgb(hue, saturation, value):
    """Hue (one number, in turns), saturation and value (numbers or arrays) -> RGB in [0, 1],
    channels last."""
    wheel = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return np.asarray(value)[..., None] * (1 - np.asarray(saturation)[..., None] * (1 - wheel))


def stream(seed, name):
    """The random numbers of one leaf (or of "the scene") in one picture; seed: an int or a tuple
    of ints."""
    numbers = seed if isinstance(seed, tuple) else (seed,)        # of any size: no array of them
    return np.random.default_rng((*numbers, zlib.crc32(name.encode())))


def paint(caption, states, seed, hue=None):
    """caption: one of CAPTIONS; states: {leaf name: +1 or -1} (a leaf that is not named takes a
    random state); seed: an int or a tuple of ints; hue: of the sky, in turns (None: a random one)
    -> uint8 (32, 32, 3). Raises ValueError on another caption or leaf."""
    if caption not in CAPTIONS:
        raise ValueError(f"this painter cannot paint '{caption}'; it knows: {', '.join(CAPTIONS)}")
    if not set(states) <= set(LEAVES):
        raise ValueError(f"this painter cannot draw {sorted(set(states) - set(LEAVES))}; it knows: "
                         f"{', '.join(LEAVES)}. For another tree give a folder of pictures")
    subject = caption.removeprefix("a ")
    hue = stream(seed, "the scene").uniform(*HUES) if hue is None else hue
    good = {leaf: states[leaf] > 0 if leaf in states else stream(seed, leaf).random() < 0.5
            for leaf in LEAVES}
    soft = 1.0 if good["Edges"] else 7.0

    # Composition: the horizon's height and slope, the subject's place on it (or of the sun
    # above it)
    slope = 0.0 if good["Level"] else 0.30
    horizon = (21.5 if good["Height"] else 15.5) + slope * (X - SIZE / 2)     # (32, 32)
    place = SIZE / 2 + (6.5 if good["Placement"] else 0)
    foot = SUN_HEIGHT if subject == "sun" else horizon.mean() + FOREGROUND
    ground = cover((horizon - Y) / np.hypot(1, slope), soft)
    dark, light = (cover(distance, soft)[..., None]
                   for distance in silhouette(subject, X - place, Y - foot))

    # Colour: hue, saturation and value of the three areas
    ground_hue = hue + (-0.13 if good["Harmony"] else 0.42)
    rich = 0.78 if good["Purity"] else 0.25
    sky_value, ground_value, dark_value, light_value = (
        (0.80, 0.34, 0.08, 1.0) if good["Contrast"] else (0.64, 0.48, 0.26, 0.90))
    depth = np.minimum(0.60 + 0.40 * Y / (horizon - 5), 1) if good["Gradation"] else np.ones_like(Y)
    sky = hsv_to_rgb(hue, rich, sky_value * depth)  # with gradation lighter towards the horizon
    rgb = sky + ground[..., None] * (hsv_to_rgb(ground_hue, rich, ground_value) - sky)
    rgb += light * (hsv_to_rgb(hue, rich * 0.4, light_value) - rgb)
    rgb += dark * (hsv_to_rgb(hue, rich, dark_value) - rgb)

    # Texture and finish: each scales value; the bare corner was never painted, so nothing
    # darkens it
    if not good["Strokes"]:
        rgb *= 1 + 0.3 * np.sin(2 * np.pi / HATCHING * (X + Y + 0.5))[..., None]
    if not good["Spatter"]:
        mirror = stream(seed, "Spatter, where").choice([-1, 1])
        blots = (cover(np.hypot((X - 15.5) * mirror - x, Y - 15.5 - y) - 1.8) for x, y in BLOTS)
        rgb *= 1 - 0.7 * np.max(list(blots), axis=0)[..., None]
    if not good["Exposure"]:
        rgb *= 0.48
    if not good["Corners"]:
        rgb += cover((X + SIZE - 1 - Y - 8) / 2 ** 0.5)[..., None] * (np.array(CANVAS) - rgb)
    return np.round(np.clip(rgb, 0, 1) * 255).astype(np.uint8)
