"""The architecture: which folder may know which. Every import runs downwards, never in a circle."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# the last one is a command as the others are: it may know all, and nobody it
SCRIPTS = ("train_sft", "train_cpo", "sample", "nanocpo.folder.propose")
# A folder may import from itself and from those with a smaller number; "" is the core.
RANK = {"utils": 0, "": 1, "folder": 2, "run": 3, "toy": 4, "sd": 4, "study": 5}
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
           for path in [*ROOT.glob("nanocpo/**/*.py"), *(ROOT / f"{s}.py" for s in SCRIPTS[:3])]}


def imports(name, text):
    """The project's modules that a module's text imports, as far as they are files."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[:-node.level] if node.level else []
            module = ".".join(above + ([node.module] if node.module else []))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return {module for module in found if module in MODULES}


GRAPH = {name: imports(name, path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def folder(name):
    return name.split(".")[1] if name.count(".") > 1 else ""


def complaints(graph):
    """What is wrong with a graph {module: modules that it imports}."""
    out = []
    for name, others in graph.items():
        for other in others:
            if other in SCRIPTS:
                out.append(f"{name} imports the script {other}")
            elif name not in SCRIPTS and folder(name) != folder(other) \
                    and RANK[folder(other)] >= RANK[folder(name)]:
                out.append(f"{name} imports upwards: {other}")
    below, changed = {name: set(others) for name, others in graph.items()}, True
    while changed:                          # all that a module reaches, step by step
        changed = False
        for name, reached in below.items():
            more = set().union(*(below.get(other, set()) for other in reached)) - reached
            reached |= more
            changed |= bool(more)
    return out + [f"{name} imports itself in a circle" for name in graph if name in below[name]]


def test_imports_run_downwards_and_never_in_a_circle():
    assert not complaints(GRAPH)


def test_every_folder_has_its_place_and_the_core_is_what_it_should_be():
    assert {folder(name) for name in MODULES if name not in SCRIPTS} == set(RANK)
    core = {name.removeprefix("nanocpo.") for name in MODULES
            if name not in SCRIPTS and folder(name) == "" and not name.endswith("__init__")}
    assert core == {"criteria", "data", "diffusion", "unet", "model", "losses", "method", "train"}


def test_the_graph_is_read_as_it_is():
    assert "nanocpo.losses" in GRAPH["nanocpo.method"]
    assert "nanocpo.run.stages" in GRAPH["train_cpo"]
    text = "from . import lora\nfrom ..model import Model\nimport os"
    assert imports("nanocpo.sd.model", text) == {"nanocpo.sd.lora", "nanocpo.model"}


@pytest.mark.parametrize("name, more, complaint", [
    ("train_cpo", "train_sft", "train_cpo imports the script train_sft"),
    ("nanocpo.study.lab", "train_cpo", "nanocpo.study.lab imports the script train_cpo"),
    ("nanocpo.method", "nanocpo.run.stages", "nanocpo.method imports upwards: nanocpo.run.stages"),
    ("nanocpo.toy.world", "nanocpo.sd.vae", "nanocpo.toy.world imports upwards: nanocpo.sd.vae"),
    ("nanocpo.losses", "nanocpo.method", "nanocpo.losses imports itself in a circle")])
def test_a_wrong_import_is_noticed(name, more, complaint):
    assert complaint in complaints(GRAPH | {name: GRAPH[name] | {more}})


def test_no_script_is_installed_as_a_module():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "py-modules" not in text
    packages = {".".join(path.parent.relative_to(ROOT).parts)
                for path in ROOT.glob("nanocpo/**/*.py")}
    assert all(f'"{package}"' in text for package in packages)


def unnamed_encodings(text):
    """Lines on which text is read or written in whatever encoding the machine has."""
    lines = []
    for node in ast.walk(ast.parse(text)):
        name = getattr(getattr(node, "func", None), "attr", getattr(
            getattr(node, "func", None), "id", ""))
        if not isinstance(node, ast.Call) or name not in ("open", "read_text", "write_text"):
            continue
        words = [arg.value for arg in [*node.args, *(k.value for k in node.keywords)]
                 if isinstance(arg, ast.Constant)]
        binary = any(isinstance(word, str) and "b" in word and set(word) <= set("rwab+")
                     for word in words)
        # pictures have none, utils/files.py says its own, os.devnull keeps no text
        other = (ast.unparse(node.func) in ("Image.open", "webbrowser.open", "read_text")
                 or "devnull" in ast.unparse(node))
        given = "utf-8" in words or any(k.arg == "encoding" for k in node.keywords)
        if not (binary or other or given):
            lines.append(node.lineno)
    return lines


def test_every_text_has_its_encoding():
    files = [path for where in ("nanocpo", "exercises", "benchmarks", ".")
             for path in (ROOT / where).glob("*.py" if where == "." else "**/*.py")]
    assert len(files) > 60
    found = {path.name: unnamed_encodings(path.read_text(encoding="utf-8")) for path in files}
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert unnamed_encodings("open(x)\np.read_text()\nopen(x, 'rb')\np.write_text(x, 'utf-8')\n"
                             "open(x, 'w', encoding=y)\np.open()") == [1, 2, 6]
