"""What each study asks for and what it publishes, word by word: its runs, page, JSON and charts,
from made-up results; what charts and the figure of the analytic world draw, stroke by stroke; and
what the checks of the exercises see; paintings, the critic's scores and a row of the report; every
constant, default, setting and flag: all of it against the files of tests/pages.

A page that changes is meant to be looked at, so after a change on purpose:

    python tests/test_pages.py          # writes tests/pages anew; read the difference

The rules inside (intervals, choices, shares) are checked by hand in test_study.py, charts in
test_pictures.py; here nothing can land in another's row, column or place, or be asked with another
setting, without being seen. Numbers may differ by what processors differ by.
"""
import ast
import dataclasses
import importlib
import inspect
import json
import pprint
import random
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nanocpo.study.expert as expert
import nanocpo.study.figure as figure
import nanocpo.study.lab as lab
import nanocpo.study.plots as plots
import nanocpo.study.second_opinion as second_opinion
import nanocpo.study.studies as study
from exercises import hidden  # noqa: F401
from exercises.check import fingerprint, outcome
from exercises.probes import CHECKS
from nanocpo.losses import RULES
from nanocpo.toy import evaluate
from nanocpo.toy.critic import judge
from nanocpo.toy.paintings import from_painter
from nanocpo.utils import cli, grid
from nanocpo.utils.log import BINS

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "tests" / "pages"
DATA = from_painter(count=40, regime="mixed")
ROOTS = [root.name for root in DATA.criteria.roots]
LEAVES = [leaf.name for leaf in DATA.criteria.leaves]
# name of the file: flags of the study
COMMANDS = {
    "methods": "methods --seeds 1 2 --more-seeds 4 5 --top 2",
    "methods_mixed": "methods --data mixed --seeds 1 2 3 --more-seeds 4 --top 1 "
                     "--bases /x/out /x/out1 --validation 7 --only|CPO winner|Diffusion-DPO",
    "pareto": "pareto --search-samples 99 --only|CPO constant|CPO noisy",
    "places": "places --seeds 3 4",
    "speed": "speed --seeds 1 2 --curve-steps 36 --curve-samples 64",
    "decoupling": "decoupling --seeds 1 2 --validation 101 102 --only|k 0|noisy 0.5",
    "axes": "axes --seeds 1 2",
    "annotation": "annotation --seeds 1 2 --only|50 % judged|10 % wrong|teacher of 250 steps",
    "gap": "gap --batches 3 --step-size 0.002",
    "guidance": "guidance --seeds 1 2 3 --guidance 2.5",
    "world": "world --world-steps 77 --seed 5",
    "expert": "expert --seed 3",
    "critic": "critic --seed 4 --samples 33"}


def made_up(key, kind, args):
    """A result that depends on the run's key alone."""
    draw = random.Random(key)
    number = lambda low, high, digits: round(draw.uniform(low, high), digits)
    if kind == "gap":
        return {"gaps": {pairs: [None if i == 1 else number(0, 1, 4) for i in range(BINS)]
                         for pairs in ("own", "opposite")},
                "effects": [{"rule": rule, "place": place, "optimizer": optimizer, "samples": 64,
                             "winner rose": number(0, 1, 2), "loser fell": number(0, 1, 2)}
                            for rule in RULES for place in ("at the base", "after 150 steps")
                            for optimizer in lab.OPTIMIZERS]}
    if kind == "curve":
        return {"curve": [{"step": step, "neg": number(0, 12, 2), "caption": number(0.5, 1, 3),
                           "diversity": number(0, 1, 3), "frechet": number(0, 30, 1)}
                          for step in range(args.every, args.steps + 1, args.every)]}
    if kind == "auxiliary":
        return {"seconds": 1.5}
    row = {"neg": number(0, 7, 2), "caption": number(0.9, 1, 3), "diversity": number(0.1, 0.3, 3),
           "frechet": number(1, 40, 1), "nearest": number(0.05, 0.3, 3),
           "hue_gap": number(0, 0.5, 2), "hatched": number(0, 1, 2),
           "real_diversity": number(0.1, 0.2, 3),
           "by_root": {root: number(0.5, 2, 2) for root in ROOTS}}
    if kind == "sample":
        return {"row": row, "seconds": 0, "images": 0, "teacher calls": 0}
    per_t = {what: [None if i == 0 and key.endswith("2") else number(0, 2, 2) for i in range(BINS)]
             for what in ("place", "across")}
    log = {"place_ref": number(0.3, 0.8, 2), "place": number(0.5, 2, 2),
           "across": number(0, 1, 2), "per_t": per_t} if args.method == "cpo" else {}
    return {"row": row, "displacement": number(0, 0.1, 4), "seconds": draw.randrange(100),
            "images": draw.randrange(9999), "teacher calls": draw.randrange(99999), "log": log}


class Room(lab.Lab):
    """A laboratory without models; it writes down what it is asked for."""
    asked = []
    data = DATA
    models = {"base": SimpleNamespace(diffusion=SimpleNamespace(prediction="flow")),
              "auxiliary": "the auxiliary"}

    def rooms(self):
        return [Room(lab.changed(self.args, out=folder, seed=i))
                for i, folder in enumerate(self.args.bases or [self.args.out])]

    def run(self, runs):
        where = f" in {self.args.out}, seed {self.args.seed}" if self.args.bases else ""
        for key, kind, flags in runs:
            more = ", ".join(f"{name} {value}" for name, value in sorted(flags.items()))
            self.asked.append(f"{key} ({kind}{where}): {more}")
        usual = self.args.steps, self.args.samples
        return [made_up(key, kind, lab.changed(self.args, **flags))
                | {"key": f"{key} of {usual}"} for key, kind, flags in runs]


def short(content):
    """A summary with the name of a run for its result, and #A_neg for a row."""
    if isinstance(content, dict) and "key" in content:
        return content["key"]
    if isinstance(content, dict) and "step" in content:
        return "step " + " ".join(f"{value:g}" for value in content.values())
    if isinstance(content, dict) and "by_root" in content:
        return f"row {content['neg']}"
    if isinstance(content, dict):
        return {key: short(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [short(value) for value in content]
    return round(content, 4) if isinstance(content, float) else content


def dense(content):
    return pprint.pformat(content, width=100, compact=True, sort_dicts=False)


def page_of_study(name, monkeypatch, folder):
    """All that a study asks for and publishes, as text."""
    first, *only = COMMANDS[name].split("|")
    Room.asked, charts = [], []
    monkeypatch.setattr(study, "Lab", Room)
    monkeypatch.setattr(study.time, "strftime", lambda form: form)
    monkeypatch.setattr(study.platform, "machine", lambda: "abacus")
    monkeypatch.setattr(study.os, "cpu_count", lambda: 7)

    def chart(kind):
        def record(path, *arguments, **named):
            plain = json.loads(json.dumps([arguments, named], default=float))
            charts.append(f"{kind} {Path(path).name}\n{dense(short(plain))}")
        return record
    for module, kinds in ((study, ("line_chart", "bar_chart", "matrix_chart")),
                          (expert, ("line_chart",)), (second_opinion, ("matrix_chart",))):
        for kind in kinds:
            monkeypatch.setattr(module, kind, chart(kind))

    def painted(model, kind, count, seed, steps, knobs):
        charts.append(f"painted: {model} {kind} {count} {seed} {steps} {knobs}")
        return np.full((count, 32, 32, 3), len(charts), np.uint8)
    monkeypatch.setattr(study.evaluate, "paint", painted)
    monkeypatch.setattr(study, "save_grid", lambda path, images, labels, **how: charts.append(
        f"grid {Path(path).name} {images[:, 0, 0, 0].tolist()} {labels} {how}"))
    monkeypatch.setattr(figure, "draw_world", lambda path, steps, seed: charts.append(
        f"world {Path(path).name} {steps} {seed}") or {"samples": {
            "base": [0.021, 1.25, 0.5], "target": [0.96, 0.4, 0.25]}, "steps": steps})
    draw = np.random.default_rng(0)
    monkeypatch.setattr(expert, "in_context", lambda model, data, draws, rounds, seed: (
        charts.append(f"asked: {model} {len(data)} {draws} {rounds} {seed} "
                      f"{data.annotations.sum()}")
        or data.annotations * 1.5 + 2 * draw.standard_normal(data.annotations.shape) + 1))
    opinion = lambda images: (np.where(draw.random((len(images), len(LEAVES))) < 0.4, -1, 1),
                              [DATA.captions[i] for i in draw.integers(0, 40, len(images))])
    monkeypatch.setattr(second_opinion, "HELD_OUT", 20)
    monkeypatch.setattr(second_opinion, "train_network", lambda criteria, **how: charts.append(
        f"network {how}") or how["seed"])
    monkeypatch.setattr(second_opinion, "opinion", lambda network, images: opinion(images))
    monkeypatch.setattr(second_opinion, "judge", lambda images, criteria: SimpleNamespace(
        **dict(zip(("signs", "captions"), opinion(images))),
        scores=draw.standard_normal((len(images), len(LEAVES)))))
    monkeypatch.setattr(second_opinion, "evaluate", lambda models, *how: charts.append(
        f"evaluated {[(row, kind) for row, (_, kind) in models.items()]} {how}") or (
            None, {row: np.zeros((16, 32, 32, 3), np.uint8) for row in models}))
    study.main([*first.split(), *only, "--out", str(folder / "out"),
                "--results", str(folder), "--device", "cpu"])
    stem = folder / name
    written = stem.with_suffix(".json").read_text("utf-8")
    indent = len(written.splitlines()[1]) - len(written.splitlines()[1].lstrip())
    summary = f"indented by {indent}\n{dense(short(json.loads(written)))}"
    parts = {"runs": "\n".join(Room.asked), "page": stem.with_suffix(".md").read_text("utf-8"),
             "JSON": summary, "charts": "\n".join(charts)}
    text = "\n\n".join(f"=== {title}\n{part}" for title, part in parts.items()) + "\n"
    return text.replace(str(folder), "FOLDER")


class Pen:
    """Stands in for Pillow's pen and keeps what it was asked to draw. Of many strokes of one kind
    after one another the number is kept, and the sum of all coordinates with growing weights."""

    def __init__(self, said):
        self.said = said

    def __getattr__(self, kind):
        def stroke(places, *words, fill=None, outline=None, width=None, joint=None, font=None,
                   anchor=None):
            how = [*words, fill, outline, width, joint, font and font.size, anchor]
            numbers = np.array(places, float).flatten()
            self.said.append((f"{kind} {how}", numbers))
        return stroke


def strokes(said):
    """The record of a Pen as lines of text."""
    lines, i = [], 0
    while i < len(said):
        j = i
        while j < len(said) and said[j][0] == said[i][0]:
            j += 1
        numbers = np.concatenate([places for _, places in said[i:j]])
        if len(numbers) > 24:
            numbers = [len(numbers), numbers.sum(), numbers @ np.linspace(1, 2, len(numbers))]
        lines.append(f"{j - i} {said[i][0]} " + " ".join(f"{x:.2f}" for x in numbers))
        i = j
    return lines


def page_of_drawings(name, monkeypatch, folder):
    """Every stroke of the charts, of the analytic world, or of a grid of pictures."""
    said = []

    class Sheet(plots.Sheet):
        def __init__(self, width, height):
            super().__init__(width, height)
            said.append(("sheet", np.array(self.image.size)))
            self.pen = Pen(said)
            self.image.paste = lambda image, place: said.append(
                (f"picture {image.size}", np.array([*place, np.asarray(image).mean(),
                                                    np.asarray(image)[:99].mean()])))

        def arrow(self, x, y, dx, dy, *how):
            if name == "drawn_world":
                said.append((f"arrow {how}", np.array([x, y, dx, dy])))
            else:
                super().arrow(x, y, dx, dy, *how)
    monkeypatch.setattr(plots, "Sheet", Sheet)
    monkeypatch.setattr(figure, "Sheet", Sheet)
    end = ""
    if name == "drawn_grid":
        monkeypatch.setattr(grid.ImageDraw, "Draw", lambda sheet: said.append(
            ("sheet", np.array(sheet.size))) or Pen(said))
        monkeypatch.setattr(Pen, "textlength", lambda pen, text, font: 7 * len(text), raising=False)
        images = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5, 1).repeat(3, 3)
        grid.save_grid(folder / "a.png", images, ["a", "two\nlines", "long " * 99], 2, 8,
                       titles=["one", "other"])
        grid.save_grid(folder / "b.png", images)
        end = str([int(np.asarray(Image.open(folder / f"{name}.png"), int).sum()) for name in "ab"])
    elif name == "drawn_charts":
        bars = {"the first": (1.25, 0.5), "second": (4.0, 0.0), "third, long name": (0.25, 0.5)}
        plots.bar_chart(folder / "a.png", bars, "A title", "unit", highlight=["second"])
        plots.bar_chart(folder / "a.png", {"none": (0.0, 0.0)}, "Nothing", "unit", 500)
        lines = {"up": ([0, 10, 20], [1.0, 3.0, 3.5], [0, 0.5, 0.25]),
                 "gap": ([0, 5, 10, 15], [2.0, None, -0.5, 1], [0, 0, 0, 0])}
        plots.line_chart(folder / "b.png", lines, "Title", "steps", "number")
        plots.line_chart(folder / "b.png", {"dots": ([3], [7], [0])}, "One", "x", "y", joined=False)
        plots.line_chart(folder / "b.png", {str(i): ([0, 1e-3], [i, 4e4], [9, 0])
                                            for i in range(12)}, "Many", "x", "y")
        powers = {"a": ([1e-3, 0.1], [1, 2], [0, 0]), "b": ([2], [3], [0])}
        plots.line_chart(folder / "b.png", powers,
                         "Powers of ten", "x", "y", joined=False, log=True)
        plots.matrix_chart(folder / "c.png", [[0.2, 1.0, 1.5], [2.5, 0.75, 1.2], [1, 0, 0.1]],
                           ["a", "b", "and so on"], ["Light and Value", "second word", "third"],
                           "Title", "a note")
        plots.matrix_chart(folder / "c.png", [[0.9, 0.95]], ["a"], ["b", "c"], "T", middle=0.93)
        for arrow in ((5, 9, 30, -40, "red"), (5, 9, -3, 1, "blue", 2, 9), (1, 2, 0.1, 0.2, "no")):
            sheet = Sheet(100, 80)
            sheet.arrow(*arrow)
    else:
        monkeypatch.setattr(figure, "draw_samples", partial(figure.draw_samples, count=40, steps=4))
        monkeypatch.setattr(figure, "paths", partial(figure.paths, steps=60))
        monkeypatch.setattr(figure, "PANEL", 100)
        found = figure.draw_world(folder / "world.png", steps=3, seed=1)
        end = dense(short(found))
    return "\n".join(strokes(said)) + f"\n{end}\n"


def page_of_probes(name, monkeypatch, folder):
    """What each check of the exercises asks and sees in the right solution."""
    lines = []
    for number, checks in CHECKS.items():
        for name, check in checks.items():
            lines.append(f"{number} {name} ({check.tier}): {check.asks}")
            for key, (kind, numbers) in fingerprint(outcome(number, name, "page")).items():
                lines.append(f"    {key}: {kind} {numbers[0]:.3f} {numbers[1]:.3f}")
    return "\n".join(lines) + "\n"


def page_of_toy(name, monkeypatch, folder):
    """What the painter paints and what the critic makes of it, clean and rough; and a row of the
    report. A change here voids every published number."""
    lines, draw = [], np.random.default_rng(5)
    for regime in ("flawed", "mixed", "positive"):
        data = from_painter(DATA.criteria, 4, regime, judged=0.8, seed=len(regime))
        rough = np.clip(data.images + draw.normal(0, 9, data.images.shape), 0, 255).astype(np.uint8)
        for title, images in (("clean", data.images), ("rough", rough)):
            verdicts = judge(images, data.criteria)
            lines += [f"{regime} {title}, {asked}, {signs.tolist()}: {x.mean():.2f} "
                      f"{(x * np.arange(x.size).reshape(x.shape)).mean():.2f}; {caption} "
                      + " ".join(f"{score:.3f}" for score in scores)
                      for asked, signs, x, caption, scores in zip(
                          data.captions, data.annotations, images, verdicts.captions,
                          verdicts.scores)]
        row = evaluate.measure_row(rough, data.captions, data.criteria,
                                   judge(data.images, data.criteria))
        lines += [f"    {key} " + " ".join(f"{x:.4f}" for x in np.hstack(
            [*value.values()] if isinstance(value, dict) else [value]))
                  for key, value in row.items()]
    return "\n".join(lines) + "\n"


def plain(value):
    """A constant as text that is the same everywhere."""
    if torch.is_tensor(value):
        return f"tensor {value.dtype} {np.round(value.tolist(), 6).tolist()}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {type(value).__name__: {f.name: plain(getattr(value, f.name))
                                       for f in dataclasses.fields(value)}}
    if isinstance(value, dict):
        return {plain(key): plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if callable(value):                             # of a type of flags its bounds too
        bounds = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
        bounds = [str(x) for x in bounds if isinstance(x, (int, float, type))]
        return " ".join([getattr(value, "__qualname__", type(value).__name__), *bounds])
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value).replace(str(ROOT), "ROOT")


def assigned(node):
    """The names that a statement of a module or a class gives values to."""
    targets = node.targets if isinstance(node, ast.Assign) else ()
    return [one.id for target in targets
            for one in (target.elts if isinstance(target, ast.Tuple) else [target])
            if isinstance(one, ast.Name)]


def page_of_constants(name, monkeypatch, folder):
    """Every constant of every module, every default of a function, and what a setting says."""
    names = sorted(path.relative_to(ROOT).as_posix() for where in ("nanocpo", "exercises")
                   for path in (ROOT / where).rglob("*.py")
                   if path.name not in ("__main__.py", "student_mine.py", "student_tests.py"))
    lines = []
    for file in names:
        module = importlib.import_module(
            file.removesuffix("/__init__.py").removesuffix(".py").replace("/", "."))
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        lines.append(f"--- {file}")
        for node in tree.body:
            lines += [f"{one} = {dense(plain(getattr(module, one)))}" for one in assigned(node)]
            for part in [node, *node.body] if isinstance(node, ast.ClassDef) else [node]:
                if isinstance(part, ast.FunctionDef) and (part.args.defaults
                                                          or any(part.args.kw_defaults)):
                    owner = getattr(module, node.name) if part is not node else module
                    asks = inspect.signature(inspect.unwrap(getattr(owner, part.name))).parameters
                    lines.append(f"{node.name} {part.name}: " + ", ".join(
                        f"{key}={plain(x.default)}" for key, x in asks.items()
                        if x.default is not x.empty))
            known = getattr(module, node.name) if isinstance(node, ast.ClassDef) else None
            for part in node.body if known else ():
                lines += [f"{node.name}.{one} = {plain(known.__dict__[one])}"
                          for one in assigned(part)]
            if dataclasses.is_dataclass(known):
                how = known.__dataclass_params__
                lines.append(f"{node.name}: eq {how.eq}, order {how.order}, frozen {how.frozen}")
            for field in dataclasses.fields(known) if dataclasses.is_dataclass(known) else ():
                told = {key: plain(x) for key, x in field.metadata.items()}
                default = (None if field.default is dataclasses.MISSING else plain(field.default))
                lines.append(f"{node.name}.{field.name} = {default} {told or ''}")
    return "\n".join(lines) + "\n"


SCRIPTS = ("train_sft", "train_cpo", "train_cpo --weights x", "train_cpo --quick", "sample",
           "sample --weights x", "nanocpo.folder.propose", "nanocpo.folder.annotate",
           "nanocpo.toy.report", "nanocpo.toy.export", "nanocpo.study.studies gap",
           "exercises.__main__")


def page_of_flags(name, monkeypatch, folder):
    """Every flag of every command: its default, its type, whether --help shows it."""
    lines = []

    class Stopped(Exception):
        pass

    def told(parser, indent=""):
        for action in parser._actions:
            if isinstance(action.choices, dict):                        # of subcommands
                for word, one in action.choices.items():
                    lines.append(f"{indent}{word}: {one.description}")
                    told(one, indent + "    ")
                continue
            how = {key: plain(value) for key, value in vars(action).items()
                   if key in ("default", "nargs", "const", "type", "required", "choices", "help")
                   and value not in (None, False)}
            lines.append(f"{indent}{' '.join(action.option_strings) or action.dest} "
                         f"{type(action).__name__} {how}")

    def stop(parser, argv=None, namespace=None):
        lines.append(f"{parser.usage} {parser.description} {parser.formatter_class.__name__}")
        told(parser)
        raise Stopped
    monkeypatch.setattr(cli.Parser, "parse_args", stop)
    for script in SCRIPTS:
        module, *flags = script.split()
        lines.append(f"--- {script}")
        with pytest.raises(Stopped):
            importlib.import_module(module).main(flags)
    return "\n".join(lines) + "\n"


# as much of a browser as docs/explore.html needs; it writes down what is drawn
BROWSER = """
const made = {}, queue = []; let strokes = [];
const pen = new Proxy({}, { get: (_, name) => (...where) => strokes.push([name, ...where]),
  set: (_, name, value) => strokes.push([name, value]) });
const element = id => made[id] ??= { value: START[id] ?? "", getContext: () => pen, options: [],
  add(option) { this.options.push(option); if (option[3]) this.value = option[1]; } };
globalThis.Option = function (...how) { return how; };
globalThis.document = { getElementById: element };
globalThis.requestAnimationFrame = f => queue.push(f);
"""
ACTED = """
const lines = [], round = v => typeof v === "number" ? v.toFixed(3) : v;
function tell(action, whole) {
  lines.push(`--- ${action}`, made.numbers.innerHTML, ["t_", "k_", "beta_"].map(
    id => `${id} ${made[id].textContent}`).join(", "));
  if (whole) strokes.forEach(s => lines.push(s.map(round).join(" ")));
  const all = strokes.flat().filter(v => typeof v === "number");
  const sum = all.reduce((s, v, i) => s + v * (1 + i / 100), 0).toFixed(2);
  lines.push(`${strokes.length} strokes, ${sum}`);
  strokes = [];
}
const set = (id, value) => { made[id].value = value; made[id].oninput(); };
const step = () => queue.shift()();
lines.push(JSON.stringify(made.rule.options));
tell("opened", true);
made.play.onclick(); step(); step(); tell("two steps"); lines.push(`${queue.length} waits`);
set("k", "60"); tell("a flag while it plays draws nothing"); step(); tell("then with k 0.6");
made.play.onclick(); tell("stopped"); step(); lines.push(`${queue.length} waits`); strokes = [];
set("beta", "100"); tell("beta 10: the output stays");
set("t", "100"); tell("another t: from the reference");
made.play.onclick(); step(); strokes = [];
made.plane.onpointermove({ buttons: 0, offsetX: 1, offsetY: 2 }); tell("the pointer, no button");
made.plane.onpointermove({ buttons: 1, offsetX: 400, offsetY: 100 }); step(); tell("dragged");
made.back.onclick(); tell("back", true); step(); strokes = []; lines.push(`${queue.length} waits`);
for (const [rule] of made.rule.options) {
  set("rule", rule); tell(rule);
  made.play.onclick(); step(); made.play.onclick(); tell(`${rule}, on its way`); step();
  made.back.onclick(); strokes = [];
}
set("k", "100");
for (const rule of ["constant", "balance", "noisy"]) { set("rule", rule); tell(rule + ", k 1"); }
set("rule", "none"); set("beta", "200"); made.play.onclick();
let count = 0; while (queue.length && count < 3000) { step(); count++; }
strokes = []; lines.push(`none runs for ${count} steps`); made.back.onclick(); tell("end");
console.log(lines.join("\\n"));
"""


def page_of_explore(name, monkeypatch, folder):
    """What docs/explore.html draws and says while somebody plays with it."""
    if not shutil.which("node"):
        pytest.skip("no node on this machine")
    text = (ROOT / "docs/explore.html").read_text("utf-8")
    start = dict(re.findall(r'<input[^>]*id="(\w+)"[^>]*value="([-\d.]+)"', text))
    script = re.search(r"<script>(.*?)</script>", text, re.S)[1]
    (folder / "page.js").write_text(
        BROWSER.replace("START", json.dumps(start)) + script + ACTED, "utf-8")
    done = subprocess.run(["node", folder / "page.js"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return f"{start}\n{done.stdout}"


FIXED = {name: page_of_study for name in COMMANDS} | {
    "drawn_charts": page_of_drawings, "drawn_world": page_of_drawings,
    "drawn_grid": page_of_drawings, "probes": page_of_probes,
    "toy": page_of_toy, "constants": page_of_constants,
    "flags": page_of_flags, "explored": page_of_explore}


def agree(line, expected):
    """Whether two lines are alike but for the last digits of their numbers."""
    number = re.compile(r"-?\d+\.\d+(?:e[-+]?\d+)?")
    half = "float16 (" in line                                    # bfloat16 too
    return (number.sub("#", line) == number.sub("#", expected)
            and np.allclose([*map(float, number.findall(line))],
                            [*map(float, number.findall(expected))],
                            rtol=0.02 if half else 1e-4, atol=0.3 if half else 0.0011))


def test_every_study_has_its_page():
    assert {flags.split()[0] for flags in COMMANDS.values()} == set(study.STUDIES)
    assert {path.stem for path in PAGES.iterdir()} == set(FIXED)


@pytest.mark.parametrize("name", FIXED)
def test_this_is_published(name, monkeypatch, tmp_path, capsys):
    found = FIXED[name](name, monkeypatch, tmp_path).splitlines()
    wanted = (PAGES / f"{name}.txt").read_text("utf-8").splitlines()
    # made-up numbers are alike anywhere
    exact = name in (*COMMANDS, "constants", "flags")
    for line, expected in zip(found, wanted):
        assert line == expected if exact else agree(line, expected), line
    assert len(found) == len(wanted)


def write_pages():
    import tempfile
    PAGES.mkdir(exist_ok=True)
    for name, page in FIXED.items():
        with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory() as folder:
            (PAGES / f"{name}.txt").write_text(page(name, monkeypatch, Path(folder)), "utf-8")


if __name__ == "__main__":
    write_pages()
