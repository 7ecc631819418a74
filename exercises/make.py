"""A student's copy: some functions are stubs, everything else is the reference."""
import json
import shutil
import sys
from functools import cache
from pathlib import Path

from nanocpo.model import load_model
from nanocpo.utils.checkpoint import load_checkpoint, save_checkpoint

from .check import fingerprint, outcome, wrong_key
from .install import installed
from .probes import CHECKS
from .table import ROOT, load, reference, replaced, source_of, split_name, stub

SEED = "visible"
COPIED = ("nanocpo/**/*", "*.py", "requirements.txt", "LICENSE", "README.md", "docs/*.md",
          "docs/*.html", "docs/*.png", "docs/results/*", "docs/exercises/*")
# answers, and what tells the grader from the student
LEFT_OUT = {"docs/log.md", "docs/teaching.md"}
KEPT = ("__init__.py", "check.py", "probes.py")            # of this folder
INI = """[pytest]
testpaths = exercises mine.py
addopts = -q --no-header -rs --tb=short -p no:cacheprovider
markers =
"""


def parse_numbers(text):
    """"1-4,7" -> [1, 2, 3, 4, 7]; "all" is every exercise. Raises ValueError with the cure."""
    known = load()
    if text == "all":
        return sorted(known)
    numbers = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        if not low.isdecimal() or (high and not high.isdecimal()):
            raise ValueError(f"exercises '{part}': write numbers as 1-4,7 or all")
        ends = int(low[:9]), int((high or low)[:9])
        if ends[0] > ends[1]:
            raise ValueError(f"exercises '{part}': write the smaller number first")
        numbers += {*ends, *(n for n in known if ends[0] < n < ends[1])}
    wrong = [n for n in numbers if n not in known]
    if wrong or not numbers:
        raise ValueError(f"no exercise {', '.join(map(str, wrong))}; there are 1 to {max(known)}")
    return sorted(set(numbers))


@cache
def visible():
    """The answers of every exercise for the seed that students see, as JSON."""
    numbers = [n for n, exercise in load().items() if exercise.functions]
    return json.dumps({"seed": SEED, "exercises": answers(numbers, SEED, hidden=False)})


def answers(numbers, seed, hidden=True):
    """What the reference gives at every check, and how each known wrong solution gives itself
    away: numbers only. Runs the reference of this process."""
    table, out = load(), {}
    for n in numbers:
        exercise, checks = table[n], {}
        for name, check in CHECKS.get(n, {}).items():
            if not hidden and check.run.__module__.endswith("hidden"):
                continue
            asks = f"{exercise.equation}: {check.asks}" if check.asks else exercise.asks
            checks[name] = {"tier": check.tier, "asks": asks, "expected": outcome(n, name, seed)}
        wrongs = []
        for wrong in exercise.wrong:
            with installed({wrong.function: wrong.source}):
                outs = {name: outcome(n, name, seed) for name in checks}
            wrongs.append({"hint": wrong.hint, "prints": {
                name: fingerprint(o) for name, o in outs.items()
                if wrong_key(o, checks[name]["expected"])}})
        out[str(n)] = {"title": exercise.title, "needs": exercise.needs, "checks": checks,
                       "wrong": wrongs}
    return out


def solution_lines(numbers):
    """The lines of 22 characters or more in the bodies that `make` blanks."""
    table, lines = load(), set()
    for n in numbers:
        for function in table[n].functions:
            text, name = reference(function)
            shown = stub(table[n], function)
            lines |= {line.strip() for line in source_of(text, name).splitlines()
                      if len(line.strip()) >= 22 and line not in shown}
    return lines


def make(folder, numbers, weights=None):
    """Write the copy; returns the files that were left out because they show a solution."""
    folder, table = Path(folder), load()
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; choose another folder")
    leaks, left = solution_lines(numbers), []
    blanked = {}                            # file -> its text with stubs
    for n in numbers:
        for function in table[n].functions:
            path, name = split_name(function)
            text = blanked.get(path) or (ROOT / path).read_text(encoding="utf-8")
            blanked[path] = replaced(text, name, stub(table[n], function))
    for path in sorted({p for pattern in COPIED for p in ROOT.glob(pattern)}):
        name = path.relative_to(ROOT).as_posix()
        if not path.is_file() or "__pycache__" in name or name in LEFT_OUT or "/key" in name:
            continue
        if path.suffix in (".md", ".html", ".json") and any(
                line in path.read_text(encoding="utf-8") for line in leaks):
            left.append(name)
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name in blanked:
            (folder / name).write_text(blanked[name], encoding="utf-8")
        else:
            shutil.copy(path, folder / name)
    own, here = folder / "exercises", Path(__file__).parent
    own.mkdir()
    for name in KEPT:
        shutil.copy(here / name, own / name)
    shutil.copy(here / "student_tests.py", own / "test_exercises.py")
    (own / "answers.json").write_text(visible(), encoding="utf-8")
    shutil.copy(here / "student_mine.py", folder / "mine.py")
    marks = "".join(f"    ex{n}: {table[n].title}\n" for n in table)
    (folder / "pytest.ini").write_text(INI + marks, encoding="utf-8")
    if weights:
        starter_weights(weights, folder / "out")
    return left


def starter_weights(out, folder):
    """base.pt and auxiliary.pt of a training, in half precision and without the optimiser's state,
    so that "look at" needs no training."""
    size = 0
    for name in ("base", "auxiliary"):
        path = Path(out) / f"{name}.pt"
        content = load_checkpoint(path)
        kept = {key: content[key] for key in ("config", "criteria", "step", "steps", "made_of")
                if key in content}
        kept["ema"] = {key: value.half() if value.is_floating_point() else value
                       for key, value in content["ema"].items()}
        if name == "auxiliary" and "base" in (kept.get("made_of") or {}):
            # rounding made another base of it, and the auxiliary belongs to this one
            kept["made_of"] = kept["made_of"] | {
                "base": load_model(folder / "base.pt").digest()}
        save_checkpoint(folder / f"{name}.pt", kept)
        size += (folder / f"{name}.pt").stat().st_size
    if size > 12e6:
        print(f"starter weights: {size / 1e6:.1f} MB, more than 12", file=sys.stderr)


