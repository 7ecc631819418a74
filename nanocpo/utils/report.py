"""What the two reports share: an interval, the files that are written."""
from pathlib import Path

import numpy as np

from .checkpoint import save_json
from .grid import save_grid


def interval(values):
    """Mean and 95 % interval [low, high] (normal approximation) of a sample of numbers."""
    mean, half = float(np.mean(values)), 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean, [mean - half, mean + half]


def write_report(out, name, content, base, target, captions, zoom, alike):
    """Write OUT/report.json (report_NAME, unless it is the default target's) and a picture of the
    same stem: base above target, uint8 (N, H, W, 3) each, a column a caption. alike: what the two
    rows share. Returns the path without suffix."""
    stem = Path(out) / ("report" if name == "target" else f"report_{name}")
    save_json(stem.with_name(stem.name + ".json"), content)
    save_grid(stem.with_name(stem.name + ".png"), np.concatenate([base, target]), captions * 2,
              columns=len(captions), zoom=zoom, titles=["base", f"{name}: the same {alike}"])
    return stem
