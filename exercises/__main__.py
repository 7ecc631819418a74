"""Exercises: make students' copies, grade them, grade tests that students wrote.

    python -m exercises make copy --blank 1-5 [--weights out]
    python -m exercises grade submissions --blank 1-5 --seed S --out grades
    python -m exercises kill mine.py

A subprocess with a time limit runs each student's function. It is no sandbox.
"""
import argparse
import json
import sys
from pathlib import Path

from nanocpo.utils.cli import Parser, above, command

from .grade import child, grade, kill
from .make import make, parse_numbers
from .table import load


def main(argv=None):
    """Parse the flags and do it."""
    parser = Parser("python -m exercises", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    one = what.add_parser("make", help="a student's copy")
    one.add_argument("folder")
    one.add_argument("--blank", default="all", help="exercises that are stubs: 1-4,7 or all")
    one.add_argument("--weights", help="a folder with base.pt and auxiliary.pt to put in")
    two = what.add_parser("grade", help="a folder of students' folders")
    two.add_argument("submissions")
    two.add_argument("--blank", default="all", help="the exercises that were handed out")
    two.add_argument("--seed", required=True, help="any text; keep it to yourself")
    two.add_argument("--out", default="grades")
    two.add_argument("--limit", type=above(0, float), default=60,
                     help="seconds of processor time for an exercise")
    three = what.add_parser("kill", help="tests that a student wrote")
    three.add_argument("tests")
    four = what.add_parser("child")
    four.add_argument("job")
    four.add_argument("result")
    args = parser.parse_args(argv)
    if args.what == "make":
        numbers = parse_numbers(args.blank)
        left = make(args.folder, numbers, args.weights)
        print(f"{args.folder}: exercises {', '.join(map(str, numbers))} are blank"
              + (f"; left out, as they show a solution: {', '.join(left)}" if left else ""))
    elif args.what == "grade":
        graded = grade(args.submissions, parse_numbers(args.blank), args.seed, args.out, args.limit)
        print(f"{args.out}: {len(graded)} students graded")
    elif args.what == "kill":
        if not Path(args.tests).exists():
            raise ValueError(f"{args.tests}: no such file; give the student's mine.py")
        exercise = next(e for e in load().values() if e.kill)
        points, lines = kill(args.tests, exercise)
        print("\n".join([f"{points:.1f} of {exercise.points} points", *lines]))
    else:
        job = json.loads(Path(args.job).read_text(encoding="utf-8"))
        Path(args.result).write_text(json.dumps(child(job)), encoding="utf-8")


if __name__ == "__main__":
    command(main)
    sys.exit(0)
