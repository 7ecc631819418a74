"""The toy's report: which rows it has, which of them are kept, its table and its files.

    python -m nanocpo.toy.report out/target.pt --samples 512

measures checkpoints alone. How a row is measured is in evaluate.py.
"""
import argparse
import time
from pathlib import Path

from ..data import to_images
from ..model import load_model
from ..run.settings import record
from ..utils.checkpoint import code_digest, differences, fingerprint, read_json, save_json
from ..utils.cli import SEED, Parser, above, command, number
from ..utils.device import pick_device
from ..utils.report import write_report
from .evaluate import evaluate


def report(out, name, base, auxiliary, target, settings, seed, seconds):
    """Evaluate the five rows, write OUT/report.json and OUT/report.png, print the table.

    settings: settings.Report; seconds: of the training. The rows of base and auxiliary are kept in
    OUT/rows.json and taken from there as long as models, settings and code stay the same."""
    models = {"base": (base, "plain"), "auxiliary": (auxiliary, "plain"),
              "auxiliary_prompted": (auxiliary, "prompted"),
              "auxiliary_guided": (auxiliary, "guided"), name: (target, "plain")}
    how = settings.samples, seed, settings.sampling_steps, settings.guidance
    start, kept = time.time(), Path(out) / "rows.json"
    made_of = record(settings) | {"seed": seed, "models": fingerprint(base, auxiliary),
                                  "code": code_digest(*code())}
    known = read_json(kept, sealed=True)
    known = known["rows"] if known and not differences(known["made_of"], made_of) else {}
    missing = {row: pair for row, pair in models.items() if row == name or row not in known}
    result, pictures = evaluate(missing, *how)
    rows = known | result["rows"]
    result["rows"] = {row: rows[row] for row in models}
    result["seconds"] = {"training": seconds, "evaluation": time.time() - start}
    others = {row: x for row, x in result["rows"].items() if row != name}
    save_json(kept, {"made_of": made_of, "rows": others}, sealed=True)

    shown = min(16, settings.samples)
    captions = [base.captions[i % len(base.captions)] for i in range(shown)]
    prompts = [base.criteria.prompt(caption) for caption in captions]
    # the base's row may be a kept one, without pictures
    first = to_images(base.sample(prompts, steps=settings.sampling_steps, seed=seed))
    stem = write_report(out, name, result, first, pictures[name][:shown], captions, zoom=3,
                        alike="captions and seeds")
    print(table(result))
    print(f"{stem}.json and .png written; {seconds:.0f} s of training, "
          f"{time.time() - start:.0f} s of evaluation")
    return result


def code():
    """The files of all code that decides a row: this folder's, the core's and the tools'."""
    here = Path(__file__).parent
    return [*here.glob("*.py"), *here.parent.glob("*.py"), *here.parent.glob("utils/*.py")]


def table(report):
    """The report as text: a line a row, then #A_neg per root dimension."""
    rows = report["rows"] | {"real positive": report["real_positive"]}
    lines = [f"{'':20} {'#A_neg (95 %)':>20} {'#A_pos':>7} {'caption':>8} "
             f"{'diversity':>10} {'Frechet':>8} {'nearest':>8} {'hue gap':>8} {'rough':>6} "
             f"{'hatched':>8} {'clipped':>8} {'doubtful':>8}"]
    for name, row in rows.items():
        ci = f"{row['neg']:.2f} ({row['neg_ci'][0]:.2f}-{row['neg_ci'][1]:.2f})"
        lines.append(f"{name:20} {ci:>20} {row['pos']:7.2f} {row['caption']:8.3f} "
                     f"{row['diversity']:10.3f} {row['frechet']:8.2f} {row['nearest']:8.3f} "
                     f"{row['hue_gap']:8.2f} {row['roughness']:6.3f} {row['hatched']:8.2f} "
                     f"{row['clipped']:8.3f} {row['doubtful']:8.2f}")
    roots = list(report["real_positive"]["by_root"])
    lines += ["", "#A_neg by root:      " + "  ".join(f"{root[:12]:>12}" for root in roots)]
    lines += [f"{name:20} " + "  ".join(f"{row['by_root'][root]:12.2f}" for root in roots)
              for name, row in rows.items()]
    return "\n".join(lines)


def main(argv=None):
    """Evaluate checkpoints on the plain caption; --kind prompted or guided asks with attributes."""
    parser = Parser(description=main.__doc__,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--kind", choices=["plain", "prompted", "guided"], default="plain")
    parser.add_argument("--guidance", type=number(), default=2.0)
    parser.add_argument("--samples", type=above(1), default=512)
    parser.add_argument("--steps", type=above(0), default=12, help="sampling steps")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--device", type=pick_device, default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--json", help="also write the report to this file")
    args = parser.parse_args(argv)
    models = {path: (load_model(path, args.device), args.kind) for path in args.checkpoints}
    result, _ = evaluate(models, args.samples, args.seed, args.steps, args.guidance)
    print(table(result))
    if args.json:
        save_json(args.json, result)
    return result


if __name__ == "__main__":
    command(main)
