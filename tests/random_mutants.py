"""Machine-made mutants: `python tests/mutants.py --random 300 --seed S` plants a random sample of
small changes over every module, script and page, and says which of them the tests do not notice.

A mutant first meets the tests that run through its line (by coverage.py, in a process forked from
one that has torch loaded). What passes them is planted together with all others that passed, and
the whole suite runs on the crowd; where a test fails, halves of the crowd are tried until the ones
that it notices are found, and the rest meets the suite again. What is left has survived.
Needs the extra `mutants`.
"""
import ast
import difflib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mutants import copy_files

SWAPS = {"Lt": "<=", "LtE": "<", "Gt": ">=", "GtE": ">", "Eq": "!=", "NotEq": "==", "In": "not in",
         "NotIn": "in", "Is": "is not", "IsNot": "is", "Add": "-", "Sub": "+", "Mult": "/",
         "Div": "*", "FloorDiv": "/", "Mod": "*", "Pow": "*", "BitAnd": "|", "BitOr": "&",
         "And": "or", "Or": "and"}
SCRIPT = [(r"===", "!=="), (r"!==", "==="), (r" < ", " <= "), (r" > ", " >= "), (r" \+ ", " - "),
          (r" - ", " + "), (r" && ", " || "), (r" \|\| ", " && "), (r"\btrue\b", "false"),
          (r"\bfalse\b", "true"), (r"(?<=[ (\[])1\b", "2"), (r"(?<=[ (\[])0\b", "1"),
          (r"(?<=[ (])!(?=\w)", ""), (r" \* ", " / "), (r" / ", " * ")]
PAGES = ("nanocpo/folder/annotate.html", "docs/explore.html")
CONSTANTS = "tests/test_pages.py"           # compares what modules hold when they are imported
PAGE_TESTS = ["tests/test_annotate.py", "tests/test_explore.py", CONSTANTS]

# What changes nothing that anybody could notice: (file, the line without indentation, what it
# became, why).
EQUIVALENT = [
    ("nanocpo/study/mixture.py",
     "xt = (a * x0 + s * torch.randn(x0.shape, generator=generator, dtype=torch.float64)).float()",
     "xt = (a * x0 + s * torch.randn(x0.shape, dtype=torch.float64)).float()",
     "torch's own generator has the same seed there"),
    ("nanocpo/unet.py",
     "frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, dtype=torch.float32, "
     "device=t.device) / (dim // 2))",
     "frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) "
     "/ (dim // 2))", "float32 is what torch makes of the quotient"),
    ("nanocpo/toy/evaluate.py",
     "x = images[[c == caption for c in captions]].reshape(captions.count(caption), -1) / 255.0",
     "x = images[[c == caption for c in captions]].reshape(captions.count(caption), -2) / 255.0",
     "numpy takes every negative size for the one that is not known"),
    ("nanocpo/toy/painter.py",
     "good = {leaf: states[leaf] > 0 if leaf in states else stream(seed, leaf).random() < 0.5",
     "good = {leaf: states[leaf] > 0 if leaf in states else (stream(seed, leaf).random() <= 0.5)",
     "one number of 2^53 is exactly a half"),
    ("nanocpo/utils/muon.py", "wide = [x.mT if x.size(0) > x.size(1) else x for x in matrices]",
     "wide = [x.mT if (x.size(0) >= x.size(1)) else x for x in matrices]",
     "a square matrix may lie either way"),
    ("nanocpo/study/second_opinion.py",
     "known[name] = {reader: agreement(found, truth) for reader, found in read.items()}",
     "known[name] = {reader: agreement(truth, found) for reader, found in read.items()}",
     "agreement is symmetric"),
    ("nanocpo/study/second_opinion.py",
     "i = torch.randint(COUNT, (batch,), generator=generator)",
     "i = torch.randint(COUNT, (batch,))", "torch's own generator has the same seed there"),
    ("nanocpo/folder/expert.py", "context = np.where(scores > 0, 1, -1).astype(np.int8)",
     "context = np.where((scores >= 0), 1, -1).astype(np.int8)",
     "a mean of log-ratios is never exactly 0"),
    ("exercises/check.py", "for x, y in zip(a[k][1], b[k][1])) for k in a)",
     "for x, y in zip(b[k][1], a[k][1])) for k in a)", "how near two are is symmetric"),
    ("nanocpo/sd/tokenizer.py", "self.word_ids = lru_cache(maxsize=50000)(self._word_ids)",
     "self.word_ids = lru_cache()(self._word_ids)", "a smaller cache is only slower"),
    ("nanocpo/toy/evaluate.py",
     '"caption": float(np.mean([a == b for a, b in zip(verdicts.captions, captions)])),',
     '"caption": float(np.mean([a == b for a, b in zip(captions, verdicts.captions)])),',
     "whether two are equal does not depend on their order"),
    ("nanocpo/study/expert.py", "return ((scores > cuts) == (states > 0)).mean(0)",
     "return ((scores > cuts) == ((states >= 0))).mean(0)", "the painter judged every leaf here"),
]
# Functions whose first two arguments may change places.
SYMMETRIC = {"max", "min", "maximum", "minimum", "equal", "allclose", "isclose", "lcm", "gcd"}


@dataclass(frozen=True)
class Change:
    """One mutant: text[start:stop] of a file becomes `new`; lines: where its statement runs."""
    file: str
    start: int
    stop: int
    new: str
    kind: str
    lines: tuple = ()

    def applied(self, text):
        return text[:self.start] + self.new + text[self.stop:]

    def lines_of(self, text):
        """(the changed lines before, after), stripped."""
        before, after = text.splitlines(), self.applied(text).splitlines()
        pairs = [(before[a:b], after[c:d]) for tag, a, b, c, d in difflib.SequenceMatcher(
            None, before, after, autojunk=False).get_opcodes() if tag != "equal"]
        return tuple(" ".join(line.strip() for side in pairs for line in side[i]) for i in (0, 1))


# --------------------------------------------------------------------------- where one could change

def operator(node):
    """The expression of a comparison, sum or condition with its operator exchanged."""
    op = node.ops[0] if isinstance(node, ast.Compare) else node.op
    new = SWAPS.get(type(op).__name__)
    if new is None:
        return None
    parts = ([node.left, *node.comparators] if isinstance(node, ast.Compare) else
             node.values if isinstance(node, ast.BoolOp) else [node.left, node.right])
    first, rest = ast.unparse(parts[0]), [ast.unparse(part) for part in parts[1:]]
    olds = ([SYMBOLS[type(o).__name__] for o in node.ops[1:]] if isinstance(node, ast.Compare)
            else [new] * len(rest[1:]))
    wrapped = [f"({part})" if not isinstance(node, ast.Compare) else part for part in rest]
    first = first if isinstance(node, ast.Compare) else f"({first})"
    return f"({first} {new} {wrapped[0]}" + "".join(
        f" {o} {part}" for o, part in zip(olds, wrapped[1:])) + ")"


SYMBOLS = {"Lt": "<", "LtE": "<=", "Gt": ">", "GtE": ">=", "Eq": "==", "NotEq": "!=", "In": "in",
           "NotIn": "not in", "Is": "is", "IsNot": "is not"}


def constant(node):
    """Another value of the same kind; None for texts that are no name."""
    value = node.value
    if isinstance(value, bool):
        return str(not value)
    if isinstance(value, int):
        return str(value + 1)
    if isinstance(value, float):
        return repr(value * 1.5 if value else 1.0)
    if isinstance(value, str) and re.fullmatch(r"\w+", value):
        return repr(value + "x")
    return None


def changes_of(node):
    """[(kind, node to be replaced, new text)] of one node of the syntax tree."""
    found, unparse = [], ast.unparse
    if isinstance(node, (ast.Compare, ast.BinOp, ast.BoolOp)):
        found.append(("operator", node, operator(node)))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        found.append(("sign", node, f"({unparse(node.operand)})"))
    elif isinstance(node, ast.Constant):
        found.append(("constant", node, constant(node)))
    elif isinstance(node, ast.IfExp):
        found.append(("branches", node,
                      f"({unparse(node.orelse)} if {unparse(node.test)} else "
                      f"{unparse(node.body)})"))
    elif isinstance(node, (ast.If, ast.While)):
        found.append(("condition", node.test, f"not ({unparse(node.test)})"))
    elif isinstance(node, ast.Slice):
        for one, other in (("lower", "upper"), ("upper", "lower")):
            if getattr(node, one):
                kept = getattr(node, other)
                text = (":" + (unparse(kept) if kept else "") if one == "lower"
                        else (unparse(kept) if kept else "") + ":")
                found.append(("slice", node,
                              text + (f":{unparse(node.step)}" if node.step else "")))
    elif isinstance(node, ast.Call):
        for keyword in node.keywords:
            fewer = ast.Call(node.func, node.args, [k for k in node.keywords if k is not keyword])
            found.append(("keyword", node, unparse(fewer)))
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        for i in range(name in SYMMETRIC, len(node.args) - 1):
            args = list(node.args)
            args[i], args[i + 1] = args[i + 1], args[i]
            found.append(("arguments", node, unparse(ast.Call(node.func, args, node.keywords))))
    elif isinstance(node, ast.Return) and node.value is not None:
        found.append(("return", node.value, "None"))
    elif isinstance(node, (ast.Expr, ast.AugAssign, ast.Raise, ast.Assign)):
        found.append(("statement", node, "pass"))
    return [(kind, where, new) for kind, where, new in found if new is not None]


def skipped(node, parents):
    """Annotations of types, docstrings, formatted texts, what runs only as a script."""
    if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
        return True
    chain = [node, *parents]
    for inner, outer in zip(chain, chain[1:]):
        if (isinstance(outer, ast.JoinedStr)
                or isinstance(outer, (ast.arg, ast.AnnAssign)) and inner is outer.annotation
                or isinstance(outer, ast.FunctionDef) and inner is outer.returns
                or isinstance(outer, ast.keyword) and outer.arg in ("help", "description")):
            return True
    return (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            or isinstance(node, ast.Constant) and isinstance(parents[0], ast.Expr))


def statement_lines(chain):
    """The lines on which the innermost statement of [node, parent, ...] begins to run."""
    for node in chain:
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if body else node.end_lineno
            return tuple(range(node.lineno, max(last, node.lineno) + 1))
    return ()


def changes(file, text):
    """Every change of one file that there is to choose from."""
    if file.endswith(".html"):
        begin = text.index("<script>")
        return [Change(file, begin + m.start(), begin + m.end(), new, "script")
                for old, new in SCRIPT for m in re.finditer(old, text[begin:])
                if "//" not in text[text.rfind("\n", 0, begin + m.start()):begin + m.start()]]
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    lines, found = text.splitlines(), []

    def place(line, column):                # columns of ast are bytes
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    def visit(node, parents):
        if skipped(node, parents):
            return
        for kind, where, new in changes_of(node):
            begin, end = (place(where.lineno, where.col_offset),
                          place(where.end_lineno, where.end_col_offset))
            found.append(Change(file, begin, end, new, kind, statement_lines([node, *parents])))
        for child in ast.iter_child_nodes(node):
            visit(child, [node, *parents])
    visit(ast.parse(text), [])
    return found


def changes_something(change, text):
    """Whether what comes out is a program, and another one."""
    if change.file.endswith(".html"):
        return True
    try:
        return ast.dump(ast.parse(change.applied(text))) != ast.dump(ast.parse(text))
    except SyntaxError:
        return False


def sample(root, count, seed, only=""):
    """`count` random changes of the project, each as likely as any other."""
    files = sorted(path.relative_to(root).as_posix() for pattern in
                   ("nanocpo/**/*.py", "*.py", "exercises/*.py") for path in root.glob(pattern))
    texts = {file: (root / file).read_text(encoding="utf-8") for file in [*files, *PAGES]
             if only in file}
    everything = [change for file, text in texts.items() for change in changes(file, text)]
    random.Random(seed).shuffle(everything)
    some = (change for change in everything if changes_something(change, texts[change.file]))
    return list(islice(some, count))


# ------------------------------------------------------------------------------------ running tests

class Only:
    """A plugin of pytest that leaves out all tests but these (names of files stand for all in
    them)."""

    def __init__(self, tests):
        self.tests = set(tests)

    def wanted(self, item):
        return item.nodeid in self.tests or item.nodeid.split("::")[0] in self.tests

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if self.wanted(item)]


class Copy:
    """A copy of the project in which changes are planted, and tests run in a forked process."""

    def __init__(self, root, files, folder):
        self.root, self.folder, self.planted = root, Path(folder), set()
        copy_files(root, files, self.folder)

    def plant(self, some):
        """These changes and no others; those that overlap one before are left out. Returns what
        was planted."""
        for file in self.planted:
            shutil.copy(self.root / file, self.folder / file)
        self.planted, done = {change.file for change in some}, []
        for file in self.planted:
            text, begin = (self.root / file).read_text(encoding="utf-8"), 10 ** 9
            for change in sorted((c for c in some if c.file == file), key=lambda c: -c.start):
                if change.stop <= begin:
                    text, begin = change.applied(text), change.start
                    done.append(change)
            (self.folder / file).write_text(text, encoding="utf-8")
        return done

    def start(self, arguments, log="log"):
        """Fork; the child runs pytest with these arguments in the copy. Returns its number."""
        child = os.fork()
        if child:
            return child
        os.setsid()
        out = os.open(self.folder / log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(self.folder)
        sys.path[:0] = [str(self.folder)]
        os.environ["PYTHONPATH"] = str(self.folder)
        import pytest
        # whole files are collected, so that tests keep their order: some share a folder
        tests = [argument for argument in arguments if argument.startswith("tests/")]
        flags = [argument for argument in arguments if argument not in tests]
        files = list(dict.fromkeys(test.split("::")[0] for test in tests))
        code = 3
        try:
            code = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist",
                                f"--basetemp={self.folder / 'tmp'}", *flags, *files],
                               plugins=[Only(tests)])
        finally:
            os._exit(int(code))

    def failed(self, log="log"):
        """The tests that failed in a run that wrote this log, from its short summary."""
        text = (self.folder / log).read_text(encoding="utf-8", errors="replace")
        return sorted(set(re.findall(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", text, re.M)))


def preload():
    """What every test imports, once for all forked processes."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve().name != "tests"]
    for name in ("torch", "numpy", "PIL.Image", "einops", "tqdm", "pytest", "hypothesis",
                 "safetensors.torch", "diffusers", "transformers", "peft"):
        try:
            __import__(name)
        except ImportError:
            pass


def wait(children, limit):
    """Wait until one of {child: time it began} ends, and kill what took longer than `limit` s.
    Returns (child, exit status; None if it was killed)."""
    while True:
        for child, began in children.items():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return child, os.waitstatus_to_exitcode(status)
            if time.time() - began > limit:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return child, None
        time.sleep(0.02)


def run_all(copies, jobs, limit=1800):
    """[(key, changes, pytest's arguments)] through the copies; yields (key, status, failed tests)
    as they end. status: 0 where nothing was noticed, None where time ran out."""
    free, running, began, jobs = list(copies), {}, {}, list(jobs)
    while jobs or running:
        if jobs and free:
            key, some, arguments = jobs.pop(0)
            copy = free.pop()
            copy.plant(some)
            child = copy.start(arguments)
            running[child], began[child] = (key, copy), time.time()
            continue
        child, status = wait(began, limit)
        key, copy = running.pop(child)
        del began[child]
        free.append(copy)
        # status 5: there was no such test, and nothing was noticed
        yield key, 0 if status == 5 else status, copy.failed()


# ------------------------------------------------------------------------------------- the campaign

def suite(copies, planted, tests, flags=()):
    """Run all tests once, shared among the copies, on these changes: [the tests that fail], "?" for
    a share that fails without naming one."""
    jobs, failed = [(i, planted, [*flags, *tests[i::len(copies)]])
                    for i in range(len(copies))], []
    for _, status, some in run_all(copies, jobs, limit=7200):
        failed += some or ([] if status == 0 else ["?"])
    return failed


def coverage_map(copies, tests):
    """Run the unchanged suite once: ({file: {line: tests}}, tests that fail without any mutant)."""
    import coverage
    broken, found = suite(copies, [], tests, [
        "--cov=nanocpo", "--cov=train_sft", "--cov=train_cpo", "--cov=sample", "--cov=exercises",
        "--cov-context=test", "--cov-report="]), {}
    for copy in copies:
        data = coverage.CoverageData(str(copy.folder / ".coverage"))
        data.read()
        for path in data.measured_files():
            lines = found.setdefault(Path(path).relative_to(copy.folder).as_posix(), {})
            for line, contexts in data.contexts_by_lineno(path).items():
                for context in filter(None, contexts):
                    test, _, phase = context.rpartition("|")
                    # a fixture's work may serve all tests of its file
                    lines.setdefault(line, set()).add(
                        test.split("::")[0] if phase == "setup" else test)
    return {file: {line: sorted(some) for line, some in lines.items()}
            for file, lines in found.items()}, broken


def chosen_tests(change, covered, own, tests):
    """pytest's arguments for a change: the tests through its lines, its own file's first. Lines
    that only run when their module is imported, or in another process, have their file's tests."""
    if change.file in PAGES:
        return PAGE_TESTS
    some = {test for line in change.lines for test in covered.get(change.file, {}).get(line, ())}
    whole = {test for test in some if "::" not in test}
    some = {test for test in some if test in whole or test.split("::")[0] not in whole}
    return (sorted(some, key=lambda test: (test.split("::")[0] != own, "::" not in test, test))
            or [test for test in (CONSTANTS, own) if test in tests])


def crowd(copies, survivors, tests, say):
    """The survivors planted together: those that the whole suite notices -> {change: test}."""
    caught = {}
    while left := [change for change in survivors if change not in caught]:
        planted = copies[0].plant(left)
        failed = suite(copies, planted, tests)
        say(f"a crowd of {len(planted)}: {len(failed)} tests fail")
        new = {}
        for test in failed:
            if test != "?":
                new |= {change: test for change in culprits(copies[:1], planted, [test], new)}
        if failed and not new:              # not even a name: nothing could be imported
            everything = ["--collect-only", *tests]
            new |= {change: "import" for change in culprits(copies[:1], planted, everything, new)}
        if not new:
            return caught
        caught |= new
        say("\n".join(f"caught by {test}: {change.file} {change.kind}"
                      for change, test in new.items()))
    return caught


def culprits(copies, planted, arguments, known):
    """Changes that pytest with these arguments notices by themselves, found by halving; those
    already known apart."""
    some = [change for change in planted if change not in known]
    if not some or next(run_all(copies, [(0, some, ["-x", *arguments])]))[1] == 0:
        return []
    if len(some) == 1:
        return some
    half = len(some) // 2
    return (culprits(copies, some[:half], arguments, known)
            + culprits(copies, some[half:], arguments, known))


def wilson(good, total):
    """95 % interval of a share, as two shares."""
    if not total:
        return 0.0, 1.0
    z, p = 1.96, good / total
    middle, half = p + z ** 2 / (2 * total), z * (p * (1 - p) / total
                                                 + (z / (2 * total)) ** 2) ** 0.5
    return (middle - half) / (1 + z ** 2 / total), (middle + half) / (1 + z ** 2 / total)


def shown(change, text):
    """The change as a short diff."""
    before, after = change.lines_of(text)
    line = text[:change.start].count("\n") + 1
    return f"{change.file}:{line} ({change.kind})\n  - {before}\n  + {after}"


def campaign(root, files, tests, own_test, count, seed, jobs, only, folder, say=print):
    """Plant, run, report; returns the survivors that are not listed as equivalent. Goes on where it
    stopped, as long as no file has changed."""
    preload()
    chosen = sample(root, count, seed, only)
    texts = {change.file: (root / change.file).read_text(encoding="utf-8") for change in chosen}
    excused = {tuple(row[:3]) for row in EQUIVALENT}
    equivalent = [c for c in chosen if (c.file, *c.lines_of(texts[c.file])) in excused]
    copies = [Copy(root, files, Path(folder) / f"copy{i}") for i in range(jobs)]
    map_file = Path(folder) / "coverage.json"
    if not map_file.exists():
        covered, broken = coverage_map(copies, tests)
        if broken:
            raise SystemExit(f"the tests fail without any mutant: {', '.join(broken)}")
        map_file.write_text(json.dumps(covered))
    covered = {file: {int(line): some for line, some in lines.items()}
               for file, lines in json.loads(map_file.read_text()).items()}
    done_file = Path(folder) / f"done_{count}_{seed}_{only.replace('/', '_')}.json"
    done = json.loads(done_file.read_text()) if done_file.exists() else {}
    alive = [i for i, c in enumerate(chosen) if c not in equivalent]
    todo = []
    for i in alive:
        arguments = chosen_tests(chosen[i], covered, own_test(chosen[i].file), tests)
        if str(i) not in done and arguments:
            todo.append((i, [chosen[i]], ["-x", *arguments]))
    for i, status, failed in run_all(copies, todo, limit=900):
        done[str(i)] = "time" if status is None else failed[:1] or ["?"] if status else []
        done_file.write_text(json.dumps(done))
        say(f"{len(done)}/{len(alive)} {'caught' if status != 0 else 'passed'} "
            + shown(chosen[i], texts[chosen[i].file]).replace("\n", " "))
    survivors = [chosen[i] for i in alive if not done.get(str(i))]
    caught = crowd(copies, survivors, tests, say) if survivors else {}
    survivors = [change for change in survivors if change not in caught]
    lines = {}
    for change in chosen:
        lines.setdefault(change.file, [0, 0])[1] += 1
        lines[change.file][0] += change not in survivors
    for file, (good, total) in sorted(lines.items()):
        low, high = wilson(good, total)
        say(f"{file}: {good} of {total} ({100 * low:.0f} to {100 * high:.0f} %)")
    good = len(chosen) - len(survivors)
    low, high = wilson(good, len(chosen))
    say(f"seed {seed}: {good} of {len(chosen)} caught or equivalent ({len(equivalent)}), "
        f"{100 * good / max(len(chosen), 1):.1f} % ({100 * low:.1f} to {100 * high:.1f})")
    for change in survivors:
        say("survived: " + shown(change, texts[change.file]))
    return survivors
