"""Count what a model paints: #A_neg and #A_pos, caption accuracy, diversity, Fréchet distance; all by the critic, from pixels.

    python -m nanocpo.evaluate out/target.pt --samples 512

This is exact because the critic knows the painter. What can be said of real pictures is in nanocpo/sd/report.py.
"""
import argparse
import hashlib
import json
from functools import cache
from pathlib import Path

import numpy as np

from .cli import above, command, pick_device
from .critic import judge, unmeasured
from .data import from_painter, to_images
from .model import fingerprint, load_model


def all_prompts(criteria, captions):
    """For each caption three Prompts: plain, with every positive attribute, with every negative one."""
    ones = np.ones(len(criteria), np.int8)
    return tuple([criteria.prompt(caption, sign * ones) for caption in captions] for sign in (0, 1, -1))


def interval(values):
    """Mean and 95 % interval [low, high] (normal approximation) of a sample of numbers."""
    mean, half = float(np.mean(values)), 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean, [mean - half, mean + half]


def diversity(images, captions):
    """Mean over captions of the mean distance between two pictures of one caption (root mean square over pixels, in [0, 1])."""
    out = []
    for caption in sorted(set(captions)):
        x = images[[c == caption for c in captions]].reshape(captions.count(caption), -1) / 255.0
        square = (x ** 2).sum(1)
        distance = np.maximum(square[:, None] + square - 2 * x @ x.T, 0) / x.shape[1]
        if len(x) > 1:
            out.append(np.sqrt(distance).sum() / (len(x) * (len(x) - 1)))
    return float(np.mean(out)) if out else 0.0


def frechet(a, b):
    """Fréchet distance between Gaussians fitted to two sets of vectors (N, D), (M, D) (1706.08500, equation 6)."""
    mean, cov = zip(*((x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))) for x in (a, b)))
    values, vectors = np.linalg.eigh(cov[0])
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T                    # sqrt(S_a); tr sqrt(S_a S_b) is that of
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov[1] @ root), 0)).sum()   # the symmetric root S_b root
    return float(((mean[0] - mean[1]) ** 2).sum() + np.trace(cov[0]) + np.trace(cov[1]) - 2 * cross)


def measure_row(images, captions, criteria, real):
    """Pictures uint8 (N, 32, 32, 3) and the captions they were asked for -> a dict of numbers (one row of the report).
    real: the Verdicts of held-out all-positive paintings, for the Fréchet distance."""
    verdicts = judge(images, criteria)
    negative = verdicts.signs < 0                                                    # (N, leaves)
    neg, neg_ci = interval(negative.sum(1))
    pos, pos_ci = interval((~negative).sum(1))
    return {"neg": neg, "neg_ci": neg_ci, "pos": pos, "pos_ci": pos_ci,
            "caption": float(np.mean([a == b for a, b in zip(verdicts.captions, captions)])),
            "diversity": diversity(images, list(captions)),
            "frechet": frechet(np.clip(verdicts.scores, -3, 3), np.clip(real.scores, -3, 3)),
            "by_root": {root.name: float(negative[:, criteria.columns(root.name)].sum(1).mean()) for root in criteria.roots},
            "by_leaf": {leaf.name: float(share) for leaf, share in zip(criteria.leaves, negative.mean(0))}}


@cache
def real_positive(criteria, count, seed=0):
    """Held-out paintings with every leaf positive, of random captions: (row, Verdicts). Never trained on."""
    data = from_painter(criteria, count, "positive", seed=10 ** 6 + seed)
    verdicts = judge(data.images, criteria)
    return measure_row(data.images, data.captions, criteria, verdicts), verdicts


def unfit(data):
    """Why the critic cannot judge what a model of these data paints, or ""; it looks at names, then at some of the pictures."""
    missing = unmeasured(data.criteria, data.captions)
    if missing:
        return f"the critic has no measure for {', '.join(missing)}"
    some = data.take(range(min(len(data), 64)))
    agrees = (judge(some.images, data.criteria).signs == some.annotations)[some.annotations != 0]
    if agrees.size and agrees.mean() < 0.8:
        return f"the critic agrees with {agrees.mean():.0%} of the annotations only, so these pictures are not of its painter's kind"
    return ""


def evaluate(models, samples=512, seed=0, steps=12, guidance=2.0):
    """{row name: (model, kind)} of one tree and its captions -> the report: {"rows": {name: row}, "real_positive": row, ...}, and
    {name: images}.

    kind: "plain" (the caption only), "prompted" (every positive attribute in the prompt), "guided" (the same, guided away from
    every negative one). All rows start from the same noise. Raises ValueError if the critic has no measure for the tree."""
    first, _ = next(iter(models.values()))
    missing = unmeasured(first.criteria, first.captions)
    if missing:
        raise ValueError(f"the critic has no measure for {', '.join(missing)}")
    asked = [first.captions[i % len(first.captions)] for i in range(samples)]
    plain, positive, negative = all_prompts(first.criteria, asked)
    reference, real = real_positive(first.criteria, samples, seed)
    rows, pictures = {}, {}
    for name, (model, kind) in models.items():
        prompts = plain if kind == "plain" else positive
        images = model.sample(prompts, negative if kind == "guided" else None, guidance if kind == "guided" else 1.0, steps, seed=seed)
        pictures[name] = to_images(images)
        rows[name] = measure_row(pictures[name], asked, first.criteria, real)
    return {"rows": rows, "real_positive": reference, "samples": samples, "seed": seed, "sampling_steps": steps}, pictures


def rows_key(models, *settings):
    """A text that changes with the models' weights, the settings, or any code beside this file: when to measure again."""
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(repr((fingerprint(*models), settings)).encode() + code).hexdigest()


def report_stem(name):
    """Name of a report's files without suffix: only the default target's has no name in it."""
    return "report" if name == "target" else f"report_{name}"


def table(report):
    """The report as text: a line a row, then #A_neg per root dimension."""
    rows = report["rows"] | {"real positive": report["real_positive"]}
    lines = [f"{'':20} {'#A_neg (95 %)':>20} {'#A_pos':>7} {'caption':>8} {'diversity':>10} {'Frechet':>8}"]
    for name, row in rows.items():
        ci = f"{row['neg']:.2f} ({row['neg_ci'][0]:.2f}-{row['neg_ci'][1]:.2f})"
        lines.append(f"{name:20} {ci:>20} {row['pos']:7.2f} {row['caption']:8.3f} {row['diversity']:10.3f} {row['frechet']:8.2f}")
    roots = list(report["real_positive"]["by_root"])
    lines += ["", "#A_neg by root:      " + "  ".join(f"{root[:12]:>12}" for root in roots)]
    lines += [f"{name:20} " + "  ".join(f"{row['by_root'][root]:12.2f}" for root in roots) for name, row in rows.items()]
    return "\n".join(lines)


def main(argv=None):
    """Evaluate checkpoints on the plain caption; --kind prompted or guided asks with attributes."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--kind", choices=["plain", "prompted", "guided"], default="plain")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--samples", type=above(1), default=512)
    parser.add_argument("--steps", type=int, default=12, help="sampling steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=pick_device, default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--json", help="also write the report to this file")
    args = parser.parse_args(argv)
    models = {path: (load_model(path, args.device), args.kind) for path in args.checkpoints}
    report, _ = evaluate(models, args.samples, args.seed, args.steps, args.guidance)
    print(table(report))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    command(main)
