"""The log of a training run: a JSON line every few steps, with means per timestep bin."""
import json
import math
import time

import torch

from . import ranks
from .checkpoint import atomic_write
from .files import ordinary

BINS = 10                       # timestep bins of the log: a loss averaged over t hides everything


class Log:
    """One JSON line every few steps: the means of each log over the samples since the last."""

    def __init__(self, path, name, keep):
        """keep: of a log that is there already, the lines up to this step stay."""
        self.path, self.name, self.window = path, name, []
        before = ordinary(path).read_bytes() if keep and path.exists() else b""
        # a torn line, or one that is not the log's, is left out
        lines = [line for line in before.decode(errors="replace").splitlines()
                 if _step(line) <= keep]
        text = "".join(line + "\n" for line in lines)
        # several may look at one finished run
        if (not keep or text.encode() != before) and ranks.first():
            with atomic_write(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        self.line = json.loads(lines[-1]) if lines else {}
        self.start = time.time() - self.line.get("seconds", 0)          # a resumed run counts on

    def remember(self, t, logs):
        """The logs of one batch: t (B,), {name: (B,)}."""
        self.window.append((t, logs))

    def write(self, step, lr, gradient_norm, timesteps):
        """Append the line of this step, and begin the next window; returns the line."""
        self.line = {"name": self.name, "step": step, "lr": lr, "gradient_norm": gradient_norm,
                     "seconds": round(time.time() - self.start, 2)}
        # on the CPU: what lies on one GPU is of no use to the process of another
        window = [(t, {key: x.cpu() for key, x in logs.items()}) for t, logs in self.window]
        self.line |= summarize(ranks.gathered(window), timesteps)
        self.window = []
        if ranks.first():
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.line) + "\n")
        return self.line


def _step(line):
    """The step of a line of the log; infinity for what is none."""
    try:
        return json.loads(line)["step"] + 0 * json.loads(line)["seconds"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf


def summarize(window, steps):
    """[(t, logs)] -> the mean of each log over the samples that count, and per timestep bin (None
    where a bin is empty)."""
    t = torch.cat([t for t, _ in window]).cpu()
    logs = {key: torch.cat([logs[key] for _, logs in window]).float().cpu() for key in window[0][1]}
    valid = logs.pop("valid", torch.ones(len(t))) > 0
    bins = (t * BINS).div(steps, rounding_mode="floor")

    def mean(value, mask):
        return round(value[mask].mean().item(), 6) if mask.any() else None
    per_t = {key: [mean(value, valid & (bins == i)) for i in range(BINS)]
             for key, value in logs.items()}
    return {key: mean(value, valid) for key, value in logs.items()} | {
        "valid": round(valid.float().mean().item(), 4), "per_t": per_t}


def shown(line):
    """What the progress bar says of a log line."""
    keys = ("loss", "margin", "accuracy", "winner", "loser")
    return {key: f"{line[key]:.3f}" for key in keys if line.get(key) is not None}
