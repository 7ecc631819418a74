"""Grade submissions in bulk, and tests that students wrote. Every student's function runs in a
subprocess with a time limit. That protects the grader from crashes and endless loops; it is no
sandbox: code you do not trust belongs into a container without a network."""
import contextlib
import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

from .check import complaint, outcome
from .install import helpers, installed
from .make import answers
from .probes import CHECKS
from .table import ROOT, find, load, source_of, split_name, stub

SHARES = {"core": 0.7, "robust": 0.3}


def child(job):
    """In the subprocess: job (a dict) -> what is written to its result file."""
    with contextlib.suppress(ImportError):              # Windows has no such module
        import resource
        own = math.ceil(job["limit"])
        resource.setrlimit(resource.RLIMIT_CPU, (own, own + 5))
    if "kill" in job:
        return _kill_each(job)
    from . import hidden  # noqa: F401   registers its checks
    with installed(job["functions"], job["helpers"]):
        return {name: outcome(job["number"], name, job["seed"]) for name in CHECKS[job["number"]]}


def run(job, limit):
    """A job in a subprocess of its own: (its result or None, what went wrong). limit: seconds of
    processor time, so that a busy machine costs nobody points; who only waits is stopped after
    ten times as many."""
    late = None, f"ran past the time limit of {limit:g} seconds"
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "job.json", Path(folder) / "result.json"
        given.write_text(json.dumps(job | {"limit": limit}), encoding="utf-8")
        command = [sys.executable, "-m", "exercises", "child", str(given), str(result)]
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=10 * limit, capture_output=True,
                                  text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        except subprocess.TimeoutExpired:
            return late
        if done.returncode == -getattr(signal, "SIGXCPU", 0) != 0:
            return late
        if not result.exists():
            return None, (done.stderr.strip().splitlines() or ["ended without a result"])[-1][:200]
        return json.loads(result.read_text(encoding="utf-8")), ""


def handed_in(folder, exercise):
    """(functions, helpers, complaint) of one exercise in a student's folder."""
    functions, added = {}, {}
    for function in exercise.functions:
        path, name = split_name(function)
        try:
            text = (Path(folder) / path).read_text(encoding="utf-8")
            if find(text, name) is None:
                return {}, {}, f"{path}: no function {name}"
            source = source_of(text, name)
            added[path] = helpers(text, (ROOT / path).read_text(encoding="utf-8"))
        except OSError:
            return {}, {}, f"{path} was not handed in"
        except SyntaxError as error:
            return {}, {}, f"{path}, line {error.lineno}: {error.msg}"
        if source.strip() != stub(exercise, function).strip():
            functions[function] = source
    missing = [f for f in exercise.functions if f not in functions]
    # a stub is put in as the stub: it must not be graded as the reference
    functions |= {f: stub(exercise, f) for f in missing}
    empty = len(missing) == len(exercise.functions)
    return functions, added, "nothing is written yet" if empty else ""


def score(exercise, outs, told):
    """(points, [lines]) of outcomes {check: outcome}."""
    checks, lines = told["checks"], []
    tiers = {tier: [] for tier in SHARES}
    for name, check in checks.items():
        text = complaint(name, outs, check["expected"], told["wrong"], check["asks"])
        tiers[check["tier"]].append(text is None)
        if text:
            lines.append(f"{check['tier']}, {name}:\n{text}")
    share = sum(SHARES[tier] * sum(passed) / len(passed)
                for tier, passed in tiers.items() if passed)
    return round(exercise.points * share, 6), lines


def grade_one(folder, exercise, told, seed, limit):
    """(points, text) of one exercise of one student."""
    if exercise.kill:
        mine = Path(folder) / "mine.py"
        if not mine.exists():
            return 0.0, "mine.py was not handed in"
        points, lines = kill(mine, exercise, limit)
        return points, "\n".join(lines)
    functions, added, text = handed_in(folder, exercise)
    if text:
        return 0.0, text
    outs, text = run({"number": exercise.number, "seed": seed, "functions": functions,
                      "helpers": added}, limit)
    if outs is None:
        return 0.0, text
    points, lines = score(exercise, outs, told)
    return points, "\n".join(lines) or "all passed"


def grade(submissions, numbers, seed, out, limit=60, jobs=None):
    """Every folder in `submissions` is a student; writes OUT/grades.csv, grades.xml (JUnit) and
    for each student STUDENT.json (Gradescope's results.json). Returns {student: {number: (points,
    text)}}."""
    from . import hidden  # noqa: F401
    table = load()
    students = sorted(p for p in Path(submissions).iterdir() if p.is_dir())
    if not students:
        raise ValueError(f"{submissions}: no folder of a student in it; one folder each")
    told = answers([n for n in numbers if table[n].functions], seed)
    tasks = [(s, n) for s in students for n in numbers]
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        results = list(pool.map(lambda task: grade_one(
            task[0], table[task[1]], told.get(str(task[1])), seed, limit), tasks))
    graded = {}
    for (student, n), result in zip(tasks, results):
        graded.setdefault(student.name, {})[n] = result
    write(graded, table, Path(out))
    return graded


def write(graded, table, out):
    """The three kinds of file."""
    out.mkdir(parents=True, exist_ok=True)
    suites = ElementTree.Element("testsuites")
    with open(out / "grades.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        numbers = list(next(iter(graded.values())))
        rows.writerow(["student", *(f"ex{n}" for n in numbers), "total"])
        for student, results in graded.items():
            points = [round(results[n][0], 2) for n in numbers]
            rows.writerow([student, *points, round(sum(points), 2)])
            suite = ElementTree.SubElement(suites, "testsuite", name=student,
                                           tests=str(len(numbers)))
            tests = []
            for n in numbers:
                got, text = results[n]
                full = table[n].points
                case = ElementTree.SubElement(suite, "testcase", classname=student, name=f"ex{n}")
                properties = ElementTree.SubElement(case, "properties")
                for key, value in (("points", f"{got:.2f}"), ("of", str(full))):
                    ElementTree.SubElement(properties, "property", name=key, value=value)
                if got < full - 1e-9:
                    message = f"{got:.2f} of {full}"
                    ElementTree.SubElement(case, "failure", message=message).text = "".join(
                        c for c in text if c.isprintable() or c == "\n")
                tests.append({"number": str(n), "name": table[n].title, "score": round(got, 2),
                              "max_score": full, "output": text})
            (out / f"{student}.json").write_text(json.dumps(
                {"score": round(sum(points), 2), "tests": tests}, indent=1), encoding="utf-8")
    ElementTree.ElementTree(suites).write(out / "grades.xml", encoding="utf-8",
                                          xml_declaration=True)


# --- tests that students write

def _passes(path):
    import pytest
    for name in [n for n, m in sys.modules.items() if getattr(m, "__file__", None) == path]:
        del sys.modules[name]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--import-mode=importlib",
                                "-c", os.devnull, "-W", "ignore", path])) == 0


def _kill_each(job):
    table, out = load(), {}
    out["reference"] = _passes(job["kill"])
    for n in job["of"] if out["reference"] else ():
        for wrong in table[n].wrong:
            with installed({wrong.function: wrong.source}):
                out[wrong.hint] = not _passes(job["kill"])
    return out


def kill(path, exercise, limit=120):
    """(points, lines) of a file of tests: it must pass on the reference, and is paid by the planted
    bugs that it notices."""
    result, text = run({"kill": str(Path(path).resolve()), "of": exercise.kill}, limit)
    if result is None:
        return 0.0, [text]
    if not result.pop("reference"):
        return 0.0, [f"{Path(path).name}: its tests do not pass on the reference, or there are "
                     "none"]
    killed = sum(result.values())
    lines = [f"{killed} of {len(result)} planted bugs noticed; {exercise.full} earn all points"]
    lines += [f"not noticed: {hint}" for hint, dead in result.items() if not dead]
    return exercise.points * min(1, killed / exercise.full), lines
