"""Put one function into the running reference. The function keeps its identity and gets another
code, so that whoever imported it calls the new one."""
import ast
import importlib
import textwrap
from contextlib import contextmanager

from .table import find, split_name

PARTS = ("__code__", "__defaults__", "__kwdefaults__")


def helpers(text, reference_text):
    """What a student added to a file: the source of every statement and method whose name the
    reference does not have. A helper that the reference has too stays the reference's."""
    def names(node):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            return {alias.asname or alias.name for alias in node.names}
        if isinstance(node, ast.Assign):
            return {n.id for target in node.targets for n in ast.walk(target)
                    if isinstance(n, ast.Name)}
        return {node.name} if hasattr(node, "name") else set()

    def fresh(body, old_body):
        old = set().union(*map(names, old_body)) if old_body else set()
        return [node for node in body if names(node) and not names(node) & old]
    tree, old = ast.parse(text), ast.parse(reference_text)
    found = {"": [ast.get_source_segment(text, n) for n in fresh(tree.body, old.body)]}
    for node in tree.body:
        other = find(reference_text, node.name) if isinstance(node, ast.ClassDef) else None
        if other is not None:
            lines = text.splitlines()
            found[node.name] = [textwrap.dedent("\n".join(lines[n.lineno - 1:n.end_lineno]))
                                for n in fresh(node.body, other.body)]
    return found


def _new(source, module):
    """The function that this source defines, with the module's names around it."""
    tree = ast.parse(textwrap.dedent(source))
    tree.body[0].decorator_list = []
    scope = {}
    exec(compile(tree, f"<{tree.body[0].name}>", "exec"), module.__dict__, scope)
    return scope[tree.body[0].name]


@contextmanager
def installed(sources, added=()):
    """Within the block the functions {qualified name: source} stand in the place of the
    reference's. added: {file: helpers(...)}, executed first, and not taken back."""
    for path, groups in dict(added).items():
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        for owner, texts in groups.items():
            for text in texts:
                if owner:
                    function = _new(text, module)
                    setattr(getattr(module, owner), function.__name__, function)
                else:
                    exec(text, module.__dict__)
    kept = []
    try:
        for function, source in sources.items():
            path, name = split_name(function)
            module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
            target = module
            for part in name.split("."):
                target = getattr(target, part)
            new = _new(source, module)
            if new.__code__.co_freevars != target.__code__.co_freevars:
                raise ValueError(f"{function}: cannot stand alone (super() or a closure)")
            kept.append((target, [getattr(target, part) for part in PARTS]))
            for part in PARTS:
                setattr(target, part, getattr(new, part))
        yield
    finally:
        for target, values in reversed(kept):
            for part, value in zip(PARTS, values):
                setattr(target, part, value)
