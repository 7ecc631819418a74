"""The generator of mutants: what it makes of a line, where it plants it, what it leaves alone."""
import ast
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import random_mutants
from random_mutants import Change, Copy, Only, changes, chosen_tests, statement_lines, wilson


def made(text, kind=None):
    """The changed texts of every mutant of a text."""
    return [change.applied(text) for change in changes("x.py", text)
            if kind is None or change.kind == kind]


@pytest.mark.parametrize("kind,text,wanted", [
    ("operator", "x = a < b <= c\n", ["x = (a <= b <= c)\n"]),
    ("operator", "x = a - b * c\n", ["x = ((a) + (b * c))\n", "x = a - ((b) / (c))\n"]),
    ("operator", "x = a and b and c\n", ["x = ((a) or (b) or (c))\n"]),
    ("sign", "x = f(-y)\n", ["x = f((y))\n"]),
    ("constant", "x = f(2, 0.5, 'name', 'two words', True, 0.0)\n",
     ["x = f(3, 0.5, 'name', 'two words', True, 0.0)\n",
      "x = f(2, 0.75, 'name', 'two words', True, 0.0)\n",
      "x = f(2, 0.5, 'namex', 'two words', True, 0.0)\n",
      "x = f(2, 0.5, 'name', 'two words', False, 0.0)\n",
      "x = f(2, 0.5, 'name', 'two words', True, 1.0)\n"]),
    ("branches", "x = a if b else c\n", ["x = (c if b else a)\n"]),
    ("condition", "if a:\n    b()\n", ["if not (a):\n    b()\n"]),
    ("slice", "x = y[1:n]\n", ["x = y[:n]\n", "x = y[1:]\n"]),
    ("keyword", "f(a, b=c, d=e)\n", ["f(a, d=e)\n", "f(a, b=c)\n"]),
    ("arguments", "f(a, b, c)\n", ["f(b, a, c)\n", "f(a, c, b)\n"]),
    ("arguments", "np.maximum(a, b)\n", []),
    ("return", "def f():\n    return x\n", ["def f():\n    return None\n"]),
    ("statement", "a = b\nf()\n", ["pass\nf()\n", "a = b\npass\n"])])
def test_each_kind_by_hand(kind, text, wanted):
    assert made(text, kind) == wanted


@pytest.mark.parametrize("text", [
    '"""Text."""\n', "def f(a: int) -> float:\n    ...\n", "x: int\n", "x = f'{a + 1} {-b}'\n",
    "if __name__ == '__main__':\n    main(1)\n"])
def test_what_nobody_could_notice_is_left_alone(text):
    # the assignment itself may be dropped
    assert [new for new in made(text) if new.strip() != "pass"] == []


def test_no_argument_of_help_is_a_mutant():
    assert made("f(help='word', default=1)\n", "constant") == ["f(help='word', default=2)\n"]


def test_columns_after_letters_of_two_bytes():
    assert made("x = 'é é', 1\n", "constant") == ["x = 'é é', 2\n"]


def test_lines_of_a_statement():
    """A compound statement runs where its head is, a simple one on all of its lines."""
    tree = ast.parse("if (a\n    and b):\n    x = [1,\n         2]\n")
    head, inner = tree.body[0], tree.body[0].body[0]
    assert statement_lines([head.test, head]) == (1, 2)
    assert statement_lines([inner.value, inner, head]) == (3, 4)


def test_a_page_s_script_is_changed_and_its_remarks_are_not():
    page = "<b>a < b</b><script>\nif (x === 1) y = true; // true\n</script>"
    assert [page[:c.start] + c.new + page[c.stop:] for c in changes("page.html", page)] == [
        page.replace("===", "!=="), page.replace("y = true", "y = false"), page.replace("1", "2")]


def test_planting_and_taking_out(tmp_path):
    """Several in one file at their places, one that overlaps another left out; the next planting
    begins from the unchanged file."""
    (tmp_path / "root").mkdir()
    file = tmp_path / "root/x.py"
    file.write_text("a = 1 + 2\nb = 3\n")
    copy = Copy(tmp_path / "root", [file], tmp_path / "copy")
    one, two, both = (Change("x.py", 4, 5, "7", "constant"),
                      Change("x.py", 14, 15, "9", "constant"),
                      Change("x.py", 4, 9, "(1 - 2)", "operator"))
    assert copy.plant([both]) == [both]
    assert (tmp_path / "copy/x.py").read_text() == "a = (1 - 2)\nb = 3\n"
    assert copy.plant([one, two, both]) == [two, one]
    assert (tmp_path / "copy/x.py").read_text() == "a = 7 + 2\nb = 9\n"
    assert copy.plant([]) == [] and (tmp_path / "copy/x.py").read_text() == file.read_text()


def test_the_chosen_tests_a_line():
    """Those that run through it, its own file's first; where a fixture does, the whole file."""
    covered = {"x.py": {1: ["tests/test_a.py::one", "tests/test_b.py"],
                        2: ["tests/test_b.py::two", "tests/test_x.py::three"]}}
    change = Change("x.py", 0, 1, "", "constant", (1, 2, 3))
    assert chosen_tests(change, covered, "tests/test_x.py", []) == [
        "tests/test_x.py::three", "tests/test_a.py::one", "tests/test_b.py"]
    imported, tests = Change("y.py", 0, 1, "", "constant", (1,)), ["tests/test_pages.py"]
    assert chosen_tests(imported, covered, "tests/test_y.py", tests) == tests
    tests = ["tests/test_pages.py", "tests/test_y.py"]
    assert chosen_tests(imported, covered, "tests/test_y.py", tests) == tests


def test_tests_keep_the_order_of_their_file():
    items = [Namespace(nodeid=name) for name in ("tests/test_a.py::b", "tests/test_a.py::a",
                                                 "tests/test_c.py::x", "tests/test_c.py::y")]
    Only(["tests/test_c.py::y", "tests/test_a.py"]).pytest_collection_modifyitems(items)
    assert [item.nodeid[11:] for item in items] == ["a.py::b", "a.py::a", "c.py::y"]


def test_a_crowd_is_halved_down_to_what_a_test_notices(tmp_path):
    """In a process of its own, for it forks. Two of four changes are noticed by tests, one of them
    by a test whose name holds spaces; one lets nothing be imported, not even to name a test that
    fails. A test that is not there notices nothing."""
    (tmp_path / "root/tests").mkdir(parents=True)
    (tmp_path / "root/x.py").write_text("a = 1\nb = 2\nc = 3\nd = 4\n")
    (tmp_path / "root/tests/conftest.py").write_text("import x\n")
    (tmp_path / "root/tests/test_x.py").write_text(
        "import pytest, x\n\n\n@pytest.mark.parametrize('what', ['of two words'])\n"
        "def test_a(what):\n    assert x.a == 1\n\n\ndef test_b():\n    assert x.b == 2\n")
    script = """
import sys
from pathlib import Path
from random_mutants import Change, Copy, crowd, run_all
root = Path(sys.argv[1]) / "root"
copy = Copy(root, sorted(root.rglob("*.py")), root.parent / "copy")
some = [Change("x.py", i, i + 1, new, "constant") for i, new in (
    (4, "7"), (10, "7"), (16, "7"), (22, "1 / 0"))]
caught = crowd([copy], some, ["tests/test_x.py"], lambda text: None)
print([(change.start, test) for change, test in caught.items()])
print([row[1] for row in run_all([copy], [(0, some[:3], ["tests/test_x.py::test_none"])])])
"""
    done = subprocess.run([sys.executable, "-B", "-c", script, str(tmp_path)], capture_output=True,
                          text=True, cwd=Path(__file__).parent)
    assert done.stdout.splitlines() == [
        "[(22, 'import'), (4, 'tests/test_x.py::test_a[of two words]'), "
        "(10, 'tests/test_x.py::test_b')]",
        "[0]"], done.stderr


def test_wilson_interval():
    low, high = wilson(95, 100)
    assert low == pytest.approx(0.8882, abs=1e-4) and high == pytest.approx(0.9785, abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_sample_is_the_seed_s_and_spreads_over_the_project():
    root = Path(random_mutants.__file__).parent.parent
    one, same, other = (random_mutants.sample(root, 20, seed, "nanocpo/losses.py")
                        for seed in (1, 1, 2))
    assert one == same != other and {change.file for change in one} == {"nanocpo/losses.py"}
    folders = {change.file.rpartition("/")[0] for change in random_mutants.sample(root, 60, 1)}
    assert {"nanocpo", "nanocpo/sd", "nanocpo/study", "nanocpo/toy", "nanocpo/utils"} <= folders
