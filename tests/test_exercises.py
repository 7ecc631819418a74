"""The exercises: the table fits the code, a copy shows no solution, known wrong solutions get their
own hint, right ones none, and the grader runs what the student wrote."""
import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from xml.etree import ElementTree

import pytest
import torch
from toy_tiny import tiny_model

from exercises import hidden  # noqa: F401
from exercises.check import complaint, difference, hint_of, outcome, wrong_key
import exercises.grade as grading
from exercises.grade import grade, grade_one, handed_in, kill, score, write
from exercises.install import helpers, installed
from exercises.make import answers, make, parse_numbers, solution_lines, starter_weights
from exercises.probes import CHECKS
from exercises.table import ROOT, load, reference, replaced, source_of, split_name, stub
from nanocpo.model import load_model
from nanocpo.utils.checkpoint import is_finished, load_checkpoint, save_checkpoint

TABLE = load()
# lines of a solution that code which is no exercise has too
SHARED = {"chosen = np.isin(np.arange(len(criteria)), columns)"}
CODED = [n for n in TABLE if TABLE[n].functions]


@cache
def told(number, seed="a"):
    return answers([number], seed)[str(number)]


def outcomes(number, sources, seed="a"):
    with installed(sources):
        return {name: outcome(number, name, seed) for name in CHECKS[number]}


def complaints(number, outs, seed="a"):
    row = told(number, seed)
    return {name: text for name, check in row["checks"].items() if (text := complaint(
        name, outs, check["expected"], row["wrong"], check["asks"]))}


def test_the_table_is_large_enough():
    assert len(CODED) >= 11 and all(len(TABLE[n].wrong) >= 4 for n in CODED)
    assert {TABLE[n].lesson for n in TABLE} == {1, 2, 3}
    for n in CODED:
        assert {check.tier for check in CHECKS[n].values()} == {"core", "robust"}
        assert len(CHECKS[n]) <= 7
        hints = [wrong.hint for wrong in TABLE[n].wrong]
        assert len(set(hints)) == len(hints)


@pytest.mark.parametrize("number", CODED)
def test_every_known_wrong_solution_is_wrong_and_gets_its_own_hint(number):
    for wrong in TABLE[number].wrong:
        outs = outcomes(number, {wrong.function: wrong.source})
        found = complaints(number, outs)
        hints = {hint_of(name, outs, told(number)["wrong"]) for name in found}
        assert hints == {wrong.hint}
        assert score(TABLE[number], outs, told(number))[0] < TABLE[number].points


@pytest.mark.parametrize("number", CODED)
def test_right_solutions_earn_all_core_points_and_no_hint(number):
    assert not complaints(number, outcomes(number, {}))
    for right in TABLE[number].right:
        outs = outcomes(number, {right.function: right.source})
        found = complaints(number, outs)
        assert all(told(number)["checks"][name]["tier"] == "robust" for name in found)
        assert all(hint_of(name, outs, told(number)["wrong"]) is None for name in found)
        assert score(TABLE[number], outs, told(number))[0] >= 0.7 * TABLE[number].points


@pytest.mark.parametrize("number", CODED)
def test_an_empty_stub_is_never_passed(number):
    sources = {f: stub(TABLE[number], f) for f in TABLE[number].functions}
    outs = outcomes(number, sources)
    assert score(TABLE[number], outs, told(number))[0] == 0
    assert any(out.get("waits") == [str(number), []] for out in outs.values())


def test_recorded_values_fail_under_another_seed():
    for number in CODED:
        recorded = {name: c["expected"] for name, c in told(number, "a")["checks"].items()}
        for name, check in told(number, "b")["checks"].items():
            same = wrong_key(recorded[name], check["expected"]) is None
            assert not same or name in ("nothing_to_say", "black")


def test_a_fact_is_named_where_no_hint_is_known():
    x = ["float64 (3,)", [1.0, -2.0, 4.0]]
    assert difference(["float64 (1, 3)", x[1]], x) == "the dtype or the shape differs"
    assert difference([x[0], [-1.0, 2.0, -4.0]], x) == "the sign is the other one"
    assert difference([x[0], [3.0, -6.0, 12.0]], x).startswith("yours is 3 times")
    assert "largest difference is at number 3" in difference([x[0], [1.0, -2.0, 9.0]], x)
    assert "2 of 3 values agree" in difference([x[0], [1.0, -2.0, 9.0]], x)


@pytest.mark.parametrize("text, part", [("1-4,7", None), ("0", "no exercise 0"), ("x", "write")])
def test_numbers_on_the_command_line(text, part):
    if part is None:
        assert parse_numbers(text) == [1, 2, 3, 4, 7]
    else:
        with pytest.raises(ValueError, match=part):
            parse_numbers(text)


def run(folder, *arguments):
    return subprocess.run([sys.executable, "-m", *arguments], cwd=folder, capture_output=True,
                          text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """One copy for each lesson."""
    out = {}
    for lesson in (1, 2, 3):
        numbers = [n for n in TABLE if TABLE[n].lesson == lesson]
        out[lesson] = tmp_path_factory.mktemp("copies") / str(lesson)
        make(out[lesson], numbers)
    return out


def test_no_copy_shows_a_solution(copies):
    for lesson, folder in copies.items():
        numbers = [n for n in TABLE if TABLE[n].lesson == lesson]
        lines = solution_lines(numbers)
        assert len(lines) > 10
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix not in (".png", ".pt"):
                text = path.read_text(encoding="utf-8")
                shown = [line for line in lines if line in text and line not in SHARED]
                assert not shown, f"{path}: {shown}"
        names = {path.name for path in folder.rglob("*")}
        assert not names & {"table.toml", "mutants.py", "hidden.py", "grade.py", "log.md",
                            "key.md", ".git"}


def test_a_copy_starts_healthy_fails_what_is_blank_and_passes_when_refilled(copies):
    for lesson, folder in copies.items():
        blank = [n for n in CODED if TABLE[n].lesson == lesson]
        done = run(folder, "pytest", "exercises", "--tb=no", "-rA", "-q")
        failed = {line.split("[")[1].split("-")[0] for line in done.stdout.splitlines()
                  if line.startswith("FAILED")}
        passed = {line.split("[")[1].split("-")[0] for line in done.stdout.splitlines()
                  if line.startswith("PASSED")}
        assert failed == {f"ex{n}" for n in blank}
        assert ("waits for exercise" in done.stdout) == (lesson > 1)
        assert passed >= {f"ex{n}" for n in CODED if n not in blank
                          and not set(TABLE[n].needs) & set(blank)}
    for number in (n for n in CODED if TABLE[n].lesson == 3):
        for function in TABLE[number].functions:
            text, name = reference(function)
            path = copies[3] / split_name(function)[0]
            path.write_text(replaced(path.read_text(), name, source_of(text, name)))
    done = run(copies[3], "pytest", "exercises")
    assert done.returncode == 0, done.stdout


def test_a_wrong_answer_is_told_although_another_exercise_is_empty(copies):
    """Exercise 9 calls 8, and a check of 8 waits for 11: that is no fault of 8."""
    wrong = TABLE[9].wrong[0]
    for function, source in [(wrong.function, wrong.source)] + [
            (function, stub(TABLE[11], function)) for function in TABLE[11].functions]:
        path, name = split_name(function)
        file = copies[3] / path
        file.write_text(replaced(file.read_text(), name, source))
    done = run(copies[3], "pytest", "-m", "ex9")
    assert done.returncode == 1 and "failed" in done.stdout
    assert wrong.hint in done.stdout and "waits for exercise 8" not in done.stdout


def test_an_exercise_says_little(copies):
    done = run(copies[1], "pytest", "-m", "ex3")
    assert done.returncode == 1 and len(done.stdout.splitlines()) <= 40
    assert "exercise 3 is empty" in done.stdout


@pytest.fixture
def submissions(tmp_path):
    """Students: the reference, a poisoned body, an empty stub, a helper of one's own, a loop."""
    text, name = reference("diffusion.guide")
    head = 'def guide(positive, negative, scale):\n    """x"""\n'
    bodies = {"right": source_of(text, name), "empty": stub(TABLE[4], "diffusion.guide"),
              "poison": head + "    raise RuntimeError('poison')\n",
              "helper": head + "    return mine(positive, negative, scale)\n\n\n"
                               "def mine(p, n, s):\n    return n + s * (p - n)\n",
              "loop": head + "    while True:\n        pass\n"}
    for student, body in bodies.items():
        folder = tmp_path / "in" / student / "nanocpo"
        folder.mkdir(parents=True)
        (folder / "diffusion.py").write_text(replaced(text, name, body))
        (folder / "method.py").write_text((ROOT / "nanocpo/method.py").read_text())
    (tmp_path / "in" / "nothing").mkdir()
    return tmp_path


def test_grading_in_bulk(submissions):
    graded = grade(submissions / "in", [4], "s", submissions / "out", limit=10)
    points = {student: results[4][0] for student, results in graded.items()}
    assert points["right"] == points["helper"] == TABLE[4].points
    assert max(points[s] for s in ("poison", "empty", "loop")) < 0.7 * TABLE[4].points
    assert points["nothing"] == 0 and "not handed in" in graded["nothing"][4][1]
    assert "poison" in graded["poison"][4][1] and "time limit" in graded["loop"][4][1]
    rows = list(csv.DictReader(open(submissions / "out" / "grades.csv")))
    assert {row["student"]: float(row["total"]) for row in rows}["right"] == TABLE[4].points
    result = json.loads((submissions / "out" / "right.json").read_text())
    assert result["score"] == result["tests"][0]["max_score"] == TABLE[4].points
    cases = ElementTree.parse(submissions / "out" / "grades.xml").findall(".//testcase")
    assert len(cases) == 6 and sum(c.find("failure") is not None for c in cases) == 4


def test_the_files_of_a_grading_by_hand(tmp_path):
    one, two = TABLE[1], TABLE[2]
    graded = {"a": {1: (float(one.points), "all passed"), 2: (0.333, "no\x07\nway")},
              "b": {1: (0.0, ""), 2: (two.points - 1e-12, "x")}}
    write(graded, TABLE, tmp_path / "out")
    assert (tmp_path / "out" / "grades.csv").read_text().splitlines() == [
        "student,ex1,ex2,total", f"a,{one.points}.0,0.33,{one.points}.33",
        f"b,0.0,{two.points}.0,{two.points}.0"]
    suites = ElementTree.parse(tmp_path / "out" / "grades.xml").getroot()
    assert [(s.get("name"), s.get("tests")) for s in suites] == [("a", "2"), ("b", "2")]
    told = [[(c.get("classname"), c.get("name"), [(p.get("name"), p.get("value"))
                                                 for p in c.iter("property")],
              [(f.get("message"), f.text) for f in c.iter("failure")]) for c in s] for s in suites]
    assert told == [[
        ("a", "ex1", [("points", f"{one.points}.00"), ("of", str(one.points))], []),
        ("a", "ex2", [("points", "0.33"), ("of", str(two.points))],
         [(f"0.33 of {two.points}", "no\nway")])], [
        ("b", "ex1", [("points", "0.00"), ("of", str(one.points))],
         [(f"0.00 of {one.points}", None)]),
        ("b", "ex2", [("points", f"{two.points}.00"), ("of", str(two.points))], [])]]
    assert json.loads((tmp_path / "out" / "a.json").read_text()) == {
        "score": one.points + 0.33, "tests": [
            {"number": "1", "name": one.title, "score": one.points, "max_score": one.points,
             "output": "all passed"},
            {"number": "2", "name": two.title, "score": 0.33, "max_score": two.points,
             "output": "no\x07\nway"}]}


def test_one_exercise_of_one_student(tmp_path, monkeypatch):
    killing = next(exercise for exercise in TABLE.values() if exercise.kill)
    assert grade_one(tmp_path, killing, None, "s", 5) == (0.0, "mine.py was not handed in")
    (tmp_path / "mine.py").write_text("")
    monkeypatch.setattr(grading, "kill", lambda path, exercise, limit: (
        1.5, [str(path), str(exercise.number), f"limit {limit}"]))
    assert grade_one(tmp_path, killing, None, "s", 5) == (
        1.5, f"{tmp_path / 'mine.py'}\n{killing.number}\nlimit 5")
    monkeypatch.setattr(grading, "handed_in", lambda folder, exercise: (
        {"f": "x"}, {"a": "b"}, str(folder) if exercise.number == 1 else ""))
    assert grade_one("nothing", TABLE[1], None, "s", 5) == (0.0, "nothing")
    asked = []
    monkeypatch.setattr(grading, "run", lambda job, limit: asked.append((job, limit)) or (
        (None, "late") if limit == 5 else ({"o": 1}, "")))
    assert grade_one("x", TABLE[2], None, "s", 5) == (0.0, "late")
    assert asked == [({"number": 2, "seed": "s", "functions": {"f": "x"}, "helpers": {"a": "b"}},
                      5)]
    for lines in ([], ["one", "two"]):
        monkeypatch.setattr(grading, "score", lambda exercise, outs, told: (
            (7.0, lines) if (exercise.number, outs, told) == (2, {"o": 1}, "t") else None))
        assert grade_one("x", TABLE[2], "t", "s", 6) == (
            7.0, "\n".join(lines) or "all passed")


def test_a_poisoned_body_fails_every_exercise():
    for number in CODED:
        for function in TABLE[number].functions:
            text, name = reference(function)
            source = stub(TABLE[number], function).replace("NotImplementedError", "RuntimeError")
            outs = outcomes(number, {function: source})
            assert any("error" in out for out in outs.values()), function


def test_what_is_taken_from_a_students_file():
    text, name = reference("losses._balance")
    changed = text.replace("def _dot(a, b):", "def _dot(a, b, c=1):") + "\n\ndef mine():\n    0\n"
    assert helpers(changed, text) == {"": ["def mine():\n    0"], "Rule": []}
    functions, _, text = handed_in(ROOT, TABLE[8])
    assert set(functions) == {"losses.dpo_loss"} and text == ""


TESTS = '''
import torch
from nanocpo.losses import cpo_loss

def test_collapse():
    torch.manual_seed(0)
    eps, ref, w, l = (torch.randn(3, 2, 3, 4, dtype=torch.float64) for _ in range(4))
    eps.requires_grad_()
    loss, logs = cpo_loss(eps, ref, w, l, beta=0.7, stabilizer="none")
    u = 0.7 * ((w - l) * (eps - ref)).flatten(1).mean(1)
    torch.testing.assert_close(logs["margin"], u.detach())
    torch.testing.assert_close(loss, torch.nn.functional.softplus(-u).mean())
'''


def test_tests_of_a_student_are_paid_by_the_bugs_that_they_notice(tmp_path):
    exercise = replace(TABLE[10], kill=[9], full=8)
    (tmp_path / "mine.py").write_text(TESTS)
    points, lines = kill(tmp_path / "mine.py", exercise)
    assert 0 < points < exercise.points and "planted bugs noticed" in lines[0]
    (tmp_path / "wrong.py").write_text("def test():\n    assert False\n")
    assert kill(tmp_path / "wrong.py", exercise)[0] == 0
    (tmp_path / "blind.py").write_text("def test():\n    pass\n")
    assert kill(tmp_path / "blind.py", exercise)[0] == 0


def test_every_exercise_has_its_page():
    for number, exercise in TABLE.items():
        page = (ROOT / f"docs/exercises/{number:02d}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {number}. {exercise.title}\n") and len(page.splitlines()) <= 40
        assert f"{exercise.points} points" in page and f"pytest -m ex{number}" in page


def test_starter_weights_fit_together_and_are_small(tmp_path):
    base, auxiliary = tiny_model(), tiny_model(1)
    for name, model, made_of in (("base", base, {}), ("auxiliary", auxiliary,
                                                      {"base": base.digest()})):
        save_checkpoint(tmp_path / f"{name}.pt", model.content() | {
            "ema": model.state_dict(), "model": model.state_dict(), "optimizer": [0] * 99,
            "step": 4, "steps": 4, "made_of": made_of})
    starter_weights(tmp_path, tmp_path / "copy")
    content = load_checkpoint(tmp_path / "copy" / "auxiliary.pt")
    assert content["made_of"]["base"] == load_model(tmp_path / "copy" / "base.pt").digest()
    assert "optimizer" not in content and "model" not in content and is_finished(content)
    assert content["ema"]["unet.conv_in.weight"].dtype == torch.float16
    for name in ("base", "auxiliary"):
        assert (tmp_path / "copy" / f"{name}.pt").stat().st_size < 0.6 * (
            tmp_path / f"{name}.pt").stat().st_size


def test_the_colab_cell_runs_in_a_copy(copies):
    text = (ROOT / "docs/teaching.md").read_text(encoding="utf-8")
    clone, install, tests = text.split("## In Colab")[1].split("```")[1].strip().splitlines()
    assert clone.startswith("git clone") and install.startswith("pip install -r requirements.txt")
    assert (copies[2] / "requirements.txt").exists() and (copies[2] / "docs/report.png").exists()
    done = run(copies[2], *tests.removeprefix("python -m ").split())
    assert done.returncode == 0, done.stdout


def test_the_command_passes_its_flags_on(monkeypatch, tmp_path, capsys):
    import exercises.__main__ as command
    asked = []

    def note(name, answer):
        monkeypatch.setattr(command, name, lambda *how: asked.append((name, *how)) or answer)
    note("make", ["docs/x.md"])
    note("grade", {"one": {}, "two": {}})
    note("kill", (1.25, ["a line"]))
    note("child", {"x": [1]})
    command.main(["make", "there", "--blank", "2-3", "--weights", "w"])
    command.main(["grade", "all", "--blank", "4", "--seed", "S", "--out", "o", "--limit", "7.5"])
    mine = tmp_path / "mine.py"
    with pytest.raises(ValueError, match="mine.py: no such file; give the student's mine.py"):
        command.main(["kill", str(mine)])
    mine.write_text("")
    command.main(["kill", str(mine)])
    (tmp_path / "job").write_text('{"a": 1}')
    command.main(["child", str(tmp_path / "job"), str(tmp_path / "result")])
    killing = next(exercise for exercise in TABLE.values() if exercise.kill)
    assert asked[:2] + asked[3:] == [("make", "there", [2, 3], "w"),
                                     ("grade", "all", [4], "S", "o", 7.5), ("child", {"a": 1})]
    assert asked[2][:2] == ("kill", str(mine)) and asked[2][2].number == killing.number
    assert json.loads((tmp_path / "result").read_text()) == {"x": [1]}
    assert capsys.readouterr().out == (
        "there: exercises 2, 3 are blank; left out, as they show a solution: docs/x.md\n"
        f"o: 2 students graded\n1.2 of {killing.points} points\na line\n")


def test_a_job_that_leaves_no_result_says_its_last_words(monkeypatch):
    for said, words in (("first\nlast words\n", "last words"), ("", "ended without a result"),
                        ("x" * 300, "x" * 200)):
        monkeypatch.setattr(grading.subprocess, "run", lambda *how, **more: (
            subprocess.CompletedProcess(how, 1, stdout="", stderr=said)))
        assert grading.run({}, 5) == (None, words)


def test_a_file_of_tests_is_read_anew_each_time(tmp_path):
    """In a process of its own, for the modules of this one stay."""
    (tmp_path / "mine.py").write_text("def test_a():\n    assert True\n")
    script = """
import sys
from exercises.grade import _passes
path, other = sys.argv[1], sys.modules["json"]
print(_passes(path))
open(path, "w", encoding="utf-8").write("def test_a():\\n    assert False\\n")
print(_passes(path), sys.modules["json"] is other)
"""
    done = subprocess.run([sys.executable, "-B", "-c", script, str(tmp_path / "mine.py")], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False", "True"], done.stderr
