"""table.toml, read; and functions in the project's source, found by name through its syntax tree:
a line may move without a row here being touched."""
import ast
import importlib.util
import sys
import textwrap
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Solution:
    """One way to write one function: its whole source, and for a wrong one the hint."""
    function: str
    source: str
    hint: str = ""


@dataclass
class Exercise:
    """One row of table.toml; right and wrong are Solutions."""
    number: int
    title: str
    lesson: int
    points: int
    equation: str
    functions: list
    asks: str
    interface: str
    needs: list = field(default_factory=list)
    kill: list = field(default_factory=list)      # whose wrong solutions a student's tests catch
    full: int = 0                                 # so many of them earn all points
    right: list = field(default_factory=list)
    wrong: list = field(default_factory=list)


def split_name(function):
    """"diffusion.Diffusion.step" -> ("nanocpo/diffusion.py", "Diffusion.step")."""
    parts = function.split(".")
    for i in range(len(parts) - 1, 0, -1):
        if (ROOT / "nanocpo" / Path(*parts[:i])).with_suffix(".py").exists():
            return "nanocpo/" + "/".join(parts[:i]) + ".py", ".".join(parts[i:])
    raise ValueError(f"exercises/table.toml: no file below nanocpo holds '{function}'; mend the "
                     "row")


def find(text, name):
    """The syntax node of a function ("f" or "Class.f") in a file's text, or None."""
    node = ast.parse(text)
    for part in name.split("."):
        node = next((n for n in node.body if getattr(n, "name", None) == part), None)
        if node is None:
            return None
    return node


def source_of(text, name):
    """A function's lines, from `def` to its end, without decorators; None if it is not there."""
    node = find(text, name)
    return node and "\n".join(text.splitlines()[node.lineno - 1:node.end_lineno]) + "\n"


def replaced(text, name, source):
    """The file's text with this function's lines exchanged."""
    node, lines = find(text, name), text.splitlines(keepends=True)
    return "".join([*lines[:node.lineno - 1], source, *lines[node.end_lineno:]])


def with_body(text, name, body):
    """The function with the signature and docstring that it has, and this body."""
    node = find(text, name)
    first = node.body[0]
    if ast.get_docstring(node) is None:         # the lines down to the first statement
        head = text.splitlines()[node.lineno - 1:first.lineno - 1]
    else:
        head = text.splitlines()[node.lineno - 1:first.end_lineno]
    return "\n".join(head) + "\n" + textwrap.indent(body.strip("\n") + "\n",
                                                    " " * (node.col_offset + 4))


def reference(function):
    """(text of the file, name in it) of a function of the table."""
    path, name = split_name(function)
    return (ROOT / path).read_text(encoding="utf-8"), name


def stub(exercise, function):
    """What a student finds: signature, docstring, the equation, the interface, and the error."""
    text, name = reference(function)
    said = textwrap.wrap(exercise.asks, 88) + exercise.interface.strip().splitlines()
    return with_body(text, name, "\n".join([
        f"# Exercise {exercise.number}: {exercise.title}", *(f"# {line}".rstrip() for line in said),
        f'raise NotImplementedError("exercise {exercise.number}: {exercise.equation}")']))


def planted_bugs():
    """{why: row} of tests/mutants.py; {} in a student's copy."""
    path = ROOT / "tests" / "mutants.py"
    if not path.exists():
        return {}
    spec = importlib.util.spec_from_file_location("planted_bugs", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {mutant.why: mutant for mutant in module.MUTANTS}


def _edited(row, number, source, bugs, function):
    """The source of a wrong solution that is an edit: of a planted bug, or old and new."""
    if "bug" in row:
        if row["bug"] not in bugs:
            raise ValueError(f"exercises/table.toml, exercise {number}: tests/mutants.py has no "
                             f"row '{row['bug']}'; mend the row, or write it as old and new")
        old, new = bugs[row["bug"]].old, bugs[row["bug"]].new
    else:
        old, new = row["old"], row["new"]
    if source.count(old) == 0:
        raise ValueError(f"exercises/table.toml, exercise {number}: '{old}' does not occur in "
                         f"{function}; mend the row")
    return source.replace(old, new)


def load(path=Path(__file__).parent / "table.toml"):
    """{number: Exercise} of the table. Raises ValueError that names the row that does not fit the
    code."""
    exercises, bugs = {}, planted_bugs()
    for row in tomllib.loads(path.read_text(encoding="utf-8"))["exercise"]:
        rights, wrongs = row.pop("right", []), row.pop("wrong", [])
        exercise = exercises[row["number"]] = Exercise(**row)
        known = {}
        for function in exercise.functions:
            text, name = reference(function)
            if find(text, name) is None:
                raise ValueError(f"exercises/table.toml, exercise {exercise.number}: no function "
                                 f"'{name}' in {split_name(function)[0]}; mend the row")
            known[function] = source_of(text, name)
        for right in rights:
            function = right.get("function", exercise.functions[0])
            source = with_body(*reference(function), right["body"])
            exercise.right.append(Solution(function, source))
        base = known | {right.function: right.source for right in exercise.right}
        for wrong in wrongs:
            function = wrong.get("function", exercise.functions[0])
            if "body" in wrong:
                source = with_body(*reference(function), wrong["body"])
            else:
                before = (known if "bug" in wrong else base)[function]
                source = _edited(wrong, exercise.number, before, bugs, function)
            exercise.wrong.append(Solution(function, source, wrong["hint"]))
    return exercises
