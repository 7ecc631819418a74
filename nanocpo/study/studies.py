"""The experiments: one command per table or figure, resumable run by run.

    python -m nanocpo.study world
        # no training: what the theory looks like in the plane, a minute
    python -m nanocpo.study methods
        # CPO against what it extends; needs (or trains) OUT/base.pt, auxiliary.pt
    python -m nanocpo.study methods --data mixed --out out_mixed
        # the other data regime
    python -m nanocpo.study speed | decoupling | annotation | gap | guidance | critic

A study is a list of runs (lab.py) and a table, a chart and a JSON file made of their results, in
docs/results. Settings are chosen on validation seeds, by the rule in `choose` (decoupling: its
own), and measured on fresh seeds; intervals are 95 % over seeds (Student's t).
"""
import json
import os
import platform
import shlex
import time
from dataclasses import fields
from pathlib import Path

import numpy as np

from ..losses import RULES
from ..run.flags import parse_training
from ..run.settings import CPO, SFT, Common, Report
from ..toy import evaluate
from ..utils.cli import SEED, above
from ..utils.grid import save_grid
from ..utils.log import BINS
from .expert import expert
from .lab import OPTIMIZERS, Lab, changed
from .plots import bar_chart, line_chart, matrix_chart
from .second_opinion import critic

# Every method's search: a first guess, other learning rates, other values of its own knob.
DPO = [dict(lr=6e-4, beta=200.0), dict(lr=2e-4, beta=200.0), dict(lr=6e-4, beta=1000.0),
       dict(lr=6e-4, beta=50.0)]
DPO_WIDE = DPO + [dict(lr=1.2e-3, beta=200.0), dict(lr=6e-4, beta=200.0, apart=4),
                  dict(lr=1.2e-3, beta=50.0, apart=4)]
IMITATE = [dict(lr=1.2e-3, paint=512), dict(lr=6e-4, paint=512), dict(lr=2.4e-3, paint=512),
           dict(lr=1.2e-3, paint=1024)]


def _strengths(first, other, fourth):
    return [dict(lr=1.2e-3, strength=first), dict(lr=6e-4, strength=first),
            dict(lr=1.2e-3, strength=other), dict(lr=1.2e-3, strength=fourth)]


def _pulls(first, other):
    """Both strengths at both leans: that of CPO so far, and stage 1's."""
    return [dict(lr=1.2e-3, strength=strength, lean=lean)
            for lean in (0.4, 0.7) for strength in (first, other)]


# at the pictures of the data, with the lean that suits them
DATA = dict(paint=0, lean=0.4)
METHODS = {
    "SFT on the best": (dict(method="sft"),
                        [dict(lr=1.2e-3, best=0.1), dict(lr=2.4e-3, best=0.03),
                         dict(lr=1.2e-3, best=0.03), dict(lr=1.2e-3, best=0.01)]),
    "Diffusion-DPO": (dict(method="dpo"), DPO_WIDE),
    "Diffusion-DPO on the teacher's pairs": (dict(method="dpo", paint=512), DPO),
    "SFT on the teacher's prompted pictures": (dict(method="sft"), IMITATE),
    "SFT on the teacher's guided pictures": (dict(method="sft", paint_guidance=2.0), IMITATE),
    "guided target (ESD)": (dict(method="esd", paint=0), _pulls(0.55, 0.3)),
    "guided target (ESD) at the teacher's pictures": (dict(method="esd", paint=512),
                                                      _pulls(0.3, 0.55)),
    "CPO none": (dict(stabilizer="none") | DATA, [dict(lr=1.2e-3), dict(lr=4e-4), dict(lr=1e-4)]),
    "CPO winner": (dict(stabilizer="winner") | DATA,
                   [dict(lr=1.2e-3), dict(lr=2.4e-3), dict(lr=4.8e-3)]),
    "CPO constant": (dict(stabilizer="constant", paint=0), _pulls(0.55, 0.3)),
    "CPO constant, own": (dict(stabilizer="constant", pairs="own") | DATA,
                          _strengths(0.55, 0.7, 0.8)),
    "CPO constant, completed": (dict(stabilizer="constant", pairs="completed") | DATA,
                                _strengths(0.55, 0.7, 0.8)),
    "CPO constant at the teacher's pictures": (dict(stabilizer="constant", paint=512),
                                               _pulls(0.3, 0.55)),
    "CPO safeguard": (dict(stabilizer="safeguard") | DATA, _strengths(0.2, 0.6, 0.4)[:3]),
    "CPO balance": (dict(stabilizer="balance") | DATA, _strengths(0.85, 0.6, 0.7)[:3]),
    "CPO noisy": (dict(stabilizer="noisy", paint=0), _pulls(1.5, 1.0)),
}
SAMPLERS = {"base": ("base", "plain"), "auxiliary prompted": ("auxiliary", "prompted"),
            "auxiliary guided": ("auxiliary", "guided")}
SPEED = {rule: dict(stabilizer=rule, strength=RULES[rule].strength) for rule in RULES}
# the rate at which vanilla does best (study methods)
SPEED["none, slower"] = dict(stabilizer="none", lr=1e-4)
# of decoupling: the target ends at z_win, or a little short of it (E12); or it leaves the reference
# along the gap only (E21)
DOSES = {f"k {k:g}": dict(stabilizer="constant", strength=k) for k in (0.0, -0.05, -0.1)}
DOSES |= {f"noisy {s:g}": dict(stabilizer="noisy", strength=s) for s in (0.5, 1.0)}
# of annotation: shares of leaves judged (90 % as painted), of verdicts wrong; a shorter stage 1
LEVELS = {"as painted": {}}
LEVELS |= {f"{share} % judged": dict(judged=share / 100, wrong=0.0) for share in (75, 50, 25, 10)}
LEVELS |= {f"{share} % wrong": dict(judged=0.9, wrong=share / 100) for share in (5, 10, 20)}
LEVELS |= {f"teacher of {steps} steps": dict(sft_steps=steps) for steps in (250, 500)}
COLUMNS, HEADER = ((("neg", 2), ("caption", 3), ("diversity", 3), ("frechet", 1)),
                   ("#A_neg", "caption", "diversity", "Fréchet"))
KNOBS = (1.0, 2.0)
TURNS = (-1.0, -0.5, 0.0, 0.5, 1.0)         # of the picture of `axes`
SEEN = (("nearest", 3), ("hue_gap", 2), ("hatched", 2))
# of places: how many times longer, and the flags
CONSTANT = dict(stabilizer="constant", strength=0.55) | DATA
PLACES = {"winner": (1, dict(stabilizer="winner") | DATA),
          "winner, 4 times the steps": (4, dict(stabilizer="winner") | DATA),
          "balance": (1, dict(stabilizer="balance") | DATA),
          "constant": (1, CONSTANT), "constant, 4 times the steps": (4, CONSTANT),
          "constant, no brake": (1, CONSTANT | dict(beta=1.0)),
          "constant, no brake, 4 times the steps": (4, CONSTANT | dict(beta=1.0)),
          "constant, nothing unseen": (1, CONSTANT | dict(pairs="all")),
          "constant at the teacher's pictures": (1, CONSTANT | dict(paint=512))}
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 4.0)


# --------------------------------------------------------------------------------- numbers and text

def over_seeds(values):
    """Mean and half of the 95 % interval over seeds, Student's t; a single seed has no
    interval (0)."""
    quantile = ((12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)[min(len(values) - 2, 8)]
                if len(values) > 1 else 0.0)
    return (float(np.mean(values)),
            (quantile * float(np.std(values, ddof=1)) / len(values) ** 0.5
             if len(values) > 1 else 0.0))


def written(values, digits=2):
    """"1.23 +- 0.04" of a list over seeds."""
    mean, half = over_seeds(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def choose(results, base_caption):
    """The rule: of the settings whose caption accuracy is at most 0.02 below the base's, those
    with the fewest negative attributes or at most 0.1 more (which 256 pictures do not tell apart),
    and of these the one with the smallest Fréchet distance; if no caption accuracy is high enough,
    the setting with the highest. Returns its index."""
    rows = [result["row"] for result in results]
    fit = [i for i, row in enumerate(rows) if row["caption"] >= base_caption - 0.02]
    if not fit:
        return max(range(len(rows)), key=lambda i: rows[i]["caption"])
    fewest = min(rows[i]["neg"] for i in fit)
    return min((i for i in fit if rows[i]["neg"] <= fewest + 0.1),
               key=lambda i: rows[i]["frechet"])


def markdown(header, rows):
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |"
                     for row in (header, ["---"] * len(header), *rows))


def publish(args, summary, *parts, measured=None):
    """docs/results/NAME.json and .md (NAME_mixed for another regime); returns the stem for
    the chart. measured: on what, in words; usually the rows of all seeds."""
    folder = Path(args.results)
    folder.mkdir(parents=True, exist_ok=True)
    stem = args.study if args.data == "flawed" else f"{args.study}_{Path(args.data).name}"
    (folder / f"{stem}.json").write_text(
        json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")
    measured = measured or (
        f"{args.samples} pictures a row, {args.sampling_steps} sampling steps, seeds "
        f"{', '.join(map(str, args.seeds))} (95 % intervals over seeds, Student's t)")
    how = (f"`{args.command}`; {args.steps} steps of {args.batch} pictures, {measured}, base and "
           f"auxiliary of "
           f"{'the folders of --bases' if args.bases else f'seed {args.seed}'}, "
           f"{time.strftime('%Y-%m-%d')}, {platform.machine()} with {os.cpu_count()} cores.")
    text = "\n\n".join([f"# {stem.replace('_', ', ')}", *parts,
                        f"![chart]({stem}.png)", how]) + "\n"
    (folder / f"{stem}.md").write_text(text, encoding="utf-8")
    print("\n\n".join(parts))
    print(f"{folder / stem}.json, .md and .png written")
    return folder / stem


def slug(name):
    """A row's name as part of a file name."""
    return "".join(c if c.isalnum() or c == "." else "_" for c in name)


def chosen_rows(args, table):
    """The rows that --only names, or all."""
    wrong = set(args.only or []) - set(table)
    if wrong:
        raise ValueError(f"--only {', '.join(sorted(wrong))}: no such row; "
                         f"there are: {', '.join(table)}")
    return {name: value for name, value in table.items() if not args.only or name in args.only}


# ------------------------------------------------------------------------------------------ studies

def base_runs(seeds, **overrides):
    """The base model's row for each seed."""
    return [(f"base_{seed}", "sample", dict(model="base", prompt="plain", seed=seed) | overrides)
            for seed in seeds]


def spread_over(lab, seeds, runs_of):
    """The results of runs_of(seed) for every seed, each made with one of the folders of --bases in
    turn: seed by seed, so that two rows can be compared in pairs."""
    rooms, found = lab.rooms(), {}
    for i, room in enumerate(rooms):
        mine = [seed for seed in seeds if seed % len(rooms) == i]
        results = iter(room.run([run for seed in mine for run in runs_of(seed)]))
        found |= {seed: [next(results) for _ in runs_of(seed)] for seed in mine}
    return [found[seed] for seed in seeds]


def search_of(lab, rows):
    """The search runs of `methods` on the validation seed: ({row: [result of each setting]},
    {row: the chosen setting}, the base's row)."""
    args = lab.args
    search = dict(seed=args.validation[0], samples=args.search_samples)
    tries = {name: [(f"search_{slug(name)}_{i}", "align", flags_of(lab, name, setting) | search)
                    for i, setting in enumerate(settings)]
             for name, (_, settings) in rows.items()}
    first = ("search_base", "sample", dict(model="base", prompt="plain") | search)
    base, *results = lab.run([first] + sum(tries.values(), []))
    results = iter(results)
    tried = {name: [next(results) for _ in runs] for name, runs in tries.items()}
    chosen = {name: rows[name][1][choose(found, base["row"]["caption"])]
              for name, found in tried.items()}
    return tried, chosen, base["row"]


def flags_of(lab, name, setting):
    """The flags of one row of METHODS with one of its settings. A pair of Diffusion-DPO is two
    pictures, so its batch is half as large."""
    fixed = METHODS[name][0]
    pairs = {"batch": lab.args.batch // 2} if fixed.get("method") == "dpo" else {}
    return fixed | setting | pairs


def methods(lab):
    """CPO with every stabilizer against what it extends and against plain imitation of its teacher:
    same bases, same number of pictures seen, the same kind of search for each."""
    args = lab.args
    rows = chosen_rows(args, METHODS)
    tried, chosen, base = search_of(lab, rows)

    def measured(names, seeds):
        """{row: [result of each seed]}."""
        def runs(seed):
            return [(f"{slug(name)}_{seed}", "sample",
                     dict(model=SAMPLERS[name][0], prompt=SAMPLERS[name][1], seed=seed))
                    if name in SAMPLERS else
                    # the setting is part of the name: another choice is another run
                    (f"{slug(name)}_{rows[name][1].index(chosen[name])}_{seed}", "align",
                     flags_of(lab, name, chosen[name]) | {"seed": seed}) for name in names]
        return dict(zip(names, zip(*spread_over(lab, seeds, runs))))
    results = measured([*SAMPLERS, *rows], args.seeds)
    negative = lambda name: [result["row"]["neg"] for result in results[name]]
    best = sorted(rows, key=lambda name: np.mean(negative(name)))[:args.top]
    for name, more in measured(best, args.more_seeds).items():
        results[name] += more
    wide = {name: [result["row"] for result in results[name]] for name in results}
    real = np.mean([row["real_diversity"] for found in wide.values() for row in found])
    stem = publish(
        args, {"rows": {name: list(found) for name, found in results.items()}, "chosen": chosen},
        methods_table(results, chosen),
        f"Real all-positive paintings: diversity {real:.3f}. Teacher calls: predictions of the "
        "auxiliary for one run, a picture each (its own training is the same for all rows that "
        f"have any). The best {args.top} rows have seeds {', '.join(map(str, args.more_seeds))} "
        "too.",
        "The best rows in pairs, seed by seed: the row's #A_neg less that of the column, 95 % "
        "interval. Where it holds 0 the two are not told apart.",
        pairs_table({name: negative(name) for name in best}),
        "Where the target stands along the gap in training (0: z_l, 1: z_w) at the end of the run, "
        "per timestep, and its displacement at right angles to the gap, in gaps; beside it where "
        "free outputs would end:",
        places_table(results, {name: rows[name][0] | chosen[name] for name in rows}),
        f"The search (seed {args.validation[0]}, {args.search_samples} pictures; #A_neg / caption "
        f"accuracy; base caption {base['caption']:.3f}). "
        + " ".join(choose.__doc__.split("Returns")[0].split()),
        search_table(tried, rows))
    bar_chart(f"{stem}.png", {name: over_seeds(negative(name)) for name in results},
              f"Negative attributes per picture ({args.data} data)",
              f"#A_neg of {len(lab.data.criteria)}, lower is better; 95 % interval over seeds",
              highlight=[n for n in results if n.startswith("CPO")])


def methods_table(results, chosen):
    """{row: [result of each seed]}, {row: chosen setting} -> the main table in Markdown."""
    def line(name, found):
        column = lambda key: [result["row"][key] for result in found]
        moved = [result["displacement"] for result in found if "displacement" in result]
        return [name, *(written(column(key), digits) for key, digits in (*COLUMNS, *SEEN)),
                written(moved, 4) if moved else "", found[0]["teacher calls"],
                found[0]["images"], round(np.mean([result["seconds"] for result in found])),
                ", ".join(f"{k} {v:g}" for k, v in chosen.get(name, {}).items())]
    return markdown(["row", *HEADER, "nearest", "hue gap", "hatched", "displacement",
                     "teacher calls", "pictures seen", "seconds", "chosen"],
                    [line(*item) for item in results.items()])


def pairs_table(values):
    """{row: [#A_neg of each seed]} -> the differences of all pairs of rows in Markdown."""
    return markdown(["#A_neg of row less column", *values],
                    [[a, *("" if a == b else written(np.subtract(values[a], values[b]))
                           for b in values)] for a in values])


def place_at_rest(flags, place_ref):
    """Where free outputs end along the gap under a row's flags (docs/derivation.md, section 7), as
    text."""
    rule = flags["stabilizer"]
    strength = flags.get("strength", RULES[rule].strength)
    return {"none": "no end", "winner": "1", "safeguard": "1", "balance": "1", "clamped": "about 1",
            "constant": f"{1 / (1 - strength):.2f}" if strength < 1 else "no end",
            "noisy": f"{place_ref + strength:.2f}"}[rule]


def places_table(results, flags):
    """{row: [result of each seed]}, {row: its flags} -> where the targets of the rows that log it
    stand along the gap, and beside it, in Markdown."""
    lines = []
    for name, found in results.items():
        logs = [result["log"] for result in found if "place" in result.get("log", {})]
        if not logs:
            continue
        bins = [[[log["per_t"][key][i] for key in ("place", "across")] for log in logs
                 if log["per_t"]["place"][i] is not None] for i in range(BINS)]
        ref = float(np.mean([log["place_ref"] for log in logs]))
        lines.append([name, f"{ref:.2f}", place_at_rest(flags[name], ref),
                      written([log["place"] for log in logs]),
                      *("{:.2f} ({:.2f})".format(*np.mean(x, 0)) if x else "" for x in bins),
                      written([log["across"] for log in logs])])
    return markdown(["row", "reference", "in theory", "reached", *(f"t {i * 1000 // BINS}- (across)"
                                                                   for i in range(BINS)), "across"],
                    lines)


def search_table(tried, rows):
    """{row: [result of each setting]} -> what each setting gave, in Markdown."""
    most = max(len(found) for found in tried.values())
    return markdown(["row", *(f"setting {i + 1}" for i in range(most))],
                    [[name, *(f"{result['row']['neg']:.2f} / {result['row']['caption']:.3f} ("
                              + ", ".join(f"{k} {v:g}" for k, v in setting.items()) + ")"
                              for result, setting in zip(found, rows[name][1])),
                      *[""] * (most - len(found))] for name, found in tried.items()])


def pareto(lab):
    """#A_neg against the distance from the base, over the settings that `methods` searched (its
    runs, none of its own): which method buys most at equal displacement, and where each
    over-optimises."""
    lab = Lab(changed(lab.args, study="methods"))
    tried, _, base = search_of(lab, chosen_rows(lab.args, METHODS))
    args = changed(lab.args, study="pareto")
    points = {name: sorted(((result["displacement"], result["row"], setting)
                            for result, setting in zip(found, METHODS[name][1])),
                           key=lambda point: point[0]) for name, found in tried.items()}
    text = markdown(["row", "displacement", "#A_neg", "caption", "hue gap", "nearest", "setting"],
                    [[name, f"{moved:.4f}", f"{row['neg']:.2f}", f"{row['caption']:.3f}",
                      f"{row['hue_gap']:.2f}", f"{row['nearest']:.3f}",
                      ", ".join(f"{k} {v:g}" for k, v in setting.items())]
                     for name, found in points.items() for moved, row, setting in found])
    stem = publish(args, {"base": base, "points": points},
                   f"Displacement: E_t |eps - eps_ref|^2 at the model's own pictures. Seed "
                   f"{args.validation[0]}, {args.search_samples} pictures a point, one run each; "
                   f"the base has {base['neg']:.2f} / {base['caption']:.3f}, hue gap "
                   f"{base['hue_gap']:.2f}.", text,
                   measured=f"{args.search_samples} pictures a point, {args.sampling_steps} "
                            f"sampling steps, seed {args.validation[0]}")
    line_chart(f"{stem}.png",
               {name: ([p[0] for p in found], [p[1]["neg"] for p in found], [0] * len(found))
                for name, found in points.items()},
               "What a distance from the base buys", "displacement (powers of ten)", "#A_neg",
               joined=False, log=True)


def steps_to(curve, level, captions=None):
    """Optimizer steps at which #A_neg first reaches `level`, between two measurements on a line;
    None if it does not. With captions: only where the caption accuracy is still at least that."""
    previous = None
    for point in curve:
        if point["neg"] <= level and (captions is None or point["caption"] >= captions):
            if previous is None or previous["neg"] <= level:
                return point["step"]
            share = (previous["neg"] - level) / (previous["neg"] - point["neg"])
            return previous["step"] + share * (point["step"] - previous["step"])
        previous = point
    return None


def steps_cell(steps, vanilla):
    """Steps to a level, a number a seed (None where it is not reached), as text; and how many times
    fewer than those of the faster of the runs `vanilla`, [the same of each] that reached it."""
    if None in steps:
        return f"not in {steps.count(None)} of {len(steps)} seeds"
    slow = [np.mean(other) for other in vanilla if None not in other]
    return written(steps, 0) + (f" ({min(slow) / np.mean(steps):.1f}x)" if slow else "")


def speed(lab):
    """#A_neg against optimizer steps at a constant rate, rule by rule; steps to fixed levels, and
    how many times fewer than vanilla's."""
    lab = Lab(changed(lab.args, steps=lab.args.curve_steps, samples=lab.args.curve_samples))
    args, rows = lab.args, chosen_rows(lab.args, SPEED)
    every = max(1, args.steps // 12)
    runs = [(f"{slug(name)}_{seed}", "curve", flags | dict(seed=seed, every=every))
            for name, flags in rows.items() for seed in args.seeds]
    found, bases = iter(lab.run(runs)), lab.run(base_runs(args.seeds))
    start = {key: float(np.mean([b["row"][key] for b in bases]))
             for key in ("neg", "caption", "frechet")}
    curves = {name: [[{"step": 0, **start}, *next(found)["curve"]] for _ in args.seeds]
              for name in rows}
    levels = [round(share * start["neg"], 2) for share in (0.8, 0.6, 0.5, 0.4)]

    def reached(name, level, careful):
        """Steps to the level, a number a seed; None where it is not reached."""
        return [steps_to(curve, level, start["caption"] - 0.02 if careful else None)
                for curve in curves[name]]

    def cell(name, level, careful):
        vanilla = [reached(n, level, careful) for n in curves if SPEED[n]["stabilizer"] == "none"]
        return steps_cell(reached(name, level, careful),
                          vanilla if SPEED[name]["stabilizer"] != "none" else [])
    ends = (("neg", 2), ("caption", 3), ("frechet", 1))
    tables = [markdown(["rule", *(f"#A_neg {level}" for level in levels),
                        "last: #A_neg", "caption", "Fréchet"],
                       [[name, *(cell(name, level, careful) for level in levels),
                         *(written([curve[-1][key] for curve in curves[name]], digits)
                           for key, digits in ends)]
                        for name in curves])
              for careful in (False, True)]
    settings = "; ".join(
        f"{name}: {', '.join(f'{k} {v}' for k, v in flags.items() if k != 'stabilizer')}"
        for name, flags in rows.items())
    stem = publish(args, {"curves": curves, "levels": levels},
                   f"Steps to a level of #A_neg (base {start['neg']:.2f}); in brackets, how many "
                   f"times fewer than the faster vanilla's. Learning rate {args.lr:g} where none "
                   f"is named ({settings}), constant from the first step on; raw weights, measured "
                   f"every {every} steps; {args.curve_samples} pictures a point.",
                   tables[0],
                   "The same, but a level counts only while the caption accuracy is at most 0.02 "
                   "below the base's:",
                   tables[1])
    lines = {}
    for name, seeds in curves.items():
        means = [over_seeds([curve[i]["neg"] for curve in seeds]) for i in range(len(seeds[0]))]
        lines[name] = [p["step"] for p in seeds[0]], [m for m, _ in means], [h for _, h in means]
    line_chart(f"{stem}.png", lines, "Negative attributes against optimizer steps",
               "optimizer steps", "#A_neg")


def decoupling(lab):
    """Align one branch at a time, measure all of them: the diagonal should fall to a half, the rest
    stay within a tenth."""
    # a tenth of a small number is soon lost in the noise
    lab = Lab(changed(lab.args, samples=2 * lab.args.samples))
    args, roots, doses = (lab.args, [root.name for root in lab.data.criteria.roots],
                          chosen_rows(lab.args, DOSES))
    seeds = args.validation + args.seeds
    bases = {seed: result["row"] for seed, result in zip(seeds, lab.run(base_runs(seeds)))}

    def aligned(choices, seeds):
        """[(root, dose)] -> for each of them, the rows of the targets aligned so, one a seed."""
        found = iter(lab.run([(f"{slug(root)}_{slug(dose)}_{seed}", "align",
                               dict(criteria=[root], seed=seed) | doses[dose])
                              for root, dose in choices for seed in seeds]))
        return [[next(found)["row"] for _ in seeds] for _ in choices]

    def relative(rows, seeds):
        """#A_neg of each root over the base's from the same noise: (roots, seeds)."""
        return [[row["by_root"][root] / max(bases[seed]["by_root"][root], 0.01)
                 for row, seed in zip(rows, seeds)] for root in roots]

    def score(row, own):
        """Below 1 both aims hold: the own branch at a half or less, no other changed by more than
        a tenth."""
        return max([row[own] / 0.5]
                   + [abs(x - 1) / 0.1 for other, x in enumerate(row) if other != own])

    trials = [(root, dose) for root in roots for dose in doses]
    tried = {trial: np.mean(relative(rows, args.validation), 1)
             for trial, rows in zip(trials, aligned(trials, args.validation))}
    scores = {root: {dose: score(tried[root, dose], own) for dose in doses}
              for own, root in enumerate(roots)}
    best = {root: min(doses, key=scores[root].get) for root in roots}
    found = dict(zip(roots, aligned(list(best.items()), args.seeds)))
    rows = {root: relative(found[root], args.seeds) for root in roots}
    table = [[f"{root} ({best[root]})", *map(written, rows[root]),
              written([row["caption"] for row in found[root]], 3)] for root in roots]
    means = [[over_seeds(values)[0] for values in rows[root]] for root in roots]
    worst = max(abs(x - 1) for i, row in enumerate(means) for j, x in enumerate(row) if i != j)
    searched = markdown(["branch", *doses],
                        [[root, *(f"{scores[root][dose]:.2f} (own {tried[root, dose][own]:.2f})"
                                  for dose in doses)]
                         for own, root in enumerate(roots)])
    stem = publish(
        args, {"roots": roots, "chosen": best, "relative": rows, "scores": scores, "base": bases},
        "#A_neg of each root dimension over the base's from the same noise; rows: the branch that "
        "was aligned (and its dose). Base: "
        + ", ".join(f"{root} {np.mean([bases[seed]['by_root'][root] for seed in args.seeds]):.2f}"
                    for root in roots)
        + f"; caption {np.mean([bases[seed]['caption'] for seed in args.seeds]):.3f}.",
        markdown(["aligned on", *roots, "caption"], table),
        f"Largest own share {max(means[i][i] for i in range(len(roots))):.2f}, "
        f"largest change of another {worst:.2f}.",
        f"The search, means over seeds {', '.join(map(str, args.validation))}: the worse of (own "
        "share / 0.5) and (largest change of another / 0.1); below 1 both aims hold. Each branch "
        "takes the dose with the smallest.",
        searched)
    matrix_chart(f"{stem}.png", means, roots, roots,
                 "Align one branch, measure all: #A_neg over the base's",
                 "row: aligned branch; column: measured branch")


def places(lab):
    """Why trained targets do not stand where free outputs would end: the same rule with more steps,
    without the sigmoid's brake (a small beta), and with prompts that leave nothing unseen."""
    args, rows = lab.args, chosen_rows(lab.args, PLACES)
    seeds = args.seeds
    results = iter(lab.run([(f"{slug(name)}_{seed}", "align",
                             flags | dict(steps=args.steps * longer, seed=seed))
                            for name, (longer, flags) in rows.items() for seed in seeds]))
    found = {name: [next(results) for _ in seeds] for name in rows}
    settings = {name: flags for name, (_, flags) in rows.items()}
    stem = publish(args, {"rows": found},
                   "Where the target stands along the gap at the end of the run (0: z_l, 1: z_w), "
                   "per timestep, its displacement at right angles to the gap in gaps, and where "
                   "free outputs would end.",
                   places_table(found, settings))

    def mean(some, i):
        there = [r["log"]["per_t"]["place"][i] for r in some]
        return None if None in there else float(np.mean(there))
    line_chart(f"{stem}.png", {
        name: ([(i + 0.5) * 1000 / BINS for i in range(BINS)],
               [mean(some, i) for i in range(BINS)], [0] * BINS) for name, some in found.items()},
        "Place along the gap by timestep", "timestep t (1000: pure noise)", "place (1: z_w)")


def axes(lab):
    """The auxiliary with the knob of one branch turned (sample.py --axis), all branches measured:
    the same question as `decoupling`, without training and at three calls a step."""
    args, roots = lab.args, [root.name for root in lab.data.criteria.roots]
    runs = [(f"plain_{seed}", dict(model="auxiliary", prompt="plain", seed=seed))
            for seed in args.seeds]
    runs += [(f"{slug(root)}_{scale}_{seed}", dict(model="auxiliary", prompt="plain", seed=seed,
                                                   branch=root, scale=scale))
             for root in roots for scale in KNOBS for seed in args.seeds]
    rows = iter([result["row"] for result in lab.run([(key, "sample", flags)
                                                      for key, flags in runs])])
    plain = [next(rows) for _ in args.seeds]
    turned = {(root, scale): [next(rows) for _ in args.seeds] for root in roots for scale in KNOBS}
    relative = {key: [[row["by_root"][root] / max(before["by_root"][root], 0.01)
                       for row, before in zip(found, plain)] for root in roots]
                for key, found in turned.items()}
    table = [[f"{root}, scale {scale:g}", *map(written, relative[root, scale]),
              written([row["caption"] for row in turned[root, scale]], 3)]
             for root in roots for scale in KNOBS]
    stem = publish(args, {"relative": {f"{root} {scale:g}": values
                                       for (root, scale), values in relative.items()},
                          "plain": plain},
                   "#A_neg of each root dimension over that of the auxiliary under the plain "
                   "caption and the same noise; rows: the branch whose knob was turned.",
                   markdown(["knob", *roots, "caption"], table),
                   "The same noise under five positions of each branch's knob:",
                   "![knobs turned](axes_turned.png)")
    means = [[over_seeds(values)[0] for values in relative[root, KNOBS[-1]]] for root in roots]
    matrix_chart(f"{stem}.png", means, roots, roots,
                 f"One knob at scale {KNOBS[-1]:g}, all branches measured: #A_neg over the plain's",
                 "row: knob; column: measured branch")
    turned_pictures(lab, roots, f"{stem}_turned.png")


def turned_pictures(lab, roots, path):
    """One picture, each branch's knob turned from bad (left) to good (right): a row a branch, all
    of the first caption and from the same noise."""
    images = [evaluate.paint(lab.models["auxiliary"], "plain", 1, lab.args.seed,
                             lab.args.sampling_steps, knobs=[(root, scale)])
              for root in roots for scale in TURNS]
    save_grid(path, np.concatenate(images), [f"{scale:+g}" for _ in roots for scale in TURNS],
              columns=len(TURNS), titles=roots)


def annotation(lab):
    """Which method stands a weak teacher best: experts who judge less, or err, or a stage 1 that
    was short. Auxiliary and target both see only the degraded annotations; the auxiliary itself,
    asked for all that is good and guided, tells what stage 1 lost."""
    args, levels = lab.args, chosen_rows(lab.args, LEVELS)
    kinds = {"auxiliary prompted": ("sample", dict(model="auxiliary", prompt="prompted")),
             "auxiliary guided": ("sample", dict(model="auxiliary", prompt="guided")),
             "CPO": ("align", {}),
             # ends where guidance at scale 2 does (E17), the scale of the two rows around it
             "CPO, k 0.5": ("align", dict(strength=0.5)),
             # the setting that `methods` chose
             "SFT on guided pictures": ("align", dict(method="sft", paint=1024,
                                                      paint_guidance=2.0))}
    lab.run([(f"auxiliary_{slug(level)}", "auxiliary", flags)
             for level, flags in levels.items() if flags])
    wanted = {(level, name): (kind, flags | more) for level, flags in levels.items()
              for name, (kind, more) in kinds.items()}
    results = iter(lab.run(base_runs(args.seeds)
                           + [(f"{slug(level)}_{slug(name)}_{seed}", kind, flags | dict(seed=seed))
                              for (level, name), (kind, flags) in wanted.items()
                              for seed in args.seeds]))
    base = [next(results)["row"] for _ in args.seeds]
    rows = {key: [next(results)["row"] for _ in args.seeds] for key in wanted}
    columns = (*COLUMNS, *SEEN)
    text = markdown(["annotation", "row", *HEADER, "nearest", "hue gap", "hatched"],
                    [[*key, *(written([r[k] for r in some], d) for k, d in columns)]
                     for key, some in {("", "base"): base, **rows}.items()])
    negative = lambda level, name: [row["neg"] for row in rows[level, name]]
    stem = publish(
        args, {"base": base, "rows": {f"{level}: {name}": some
                                      for (level, name), some in rows.items()}},
        text, "#A_neg less that of SFT on guided pictures, in pairs, seed by seed:",
        markdown(["annotation", "CPO", "CPO, k 0.5"],
                 [[level, *(written(np.subtract(negative(level, name),
                                                negative(level, "SFT on guided pictures")))
                            for name in ("CPO", "CPO, k 0.5"))] for level in levels]))
    bar_chart(f"{stem}.png", {f"{level}: {name}": over_seeds(negative(level, name))
                              for level, name in rows},
              "A teacher who saw few verdicts, wrong ones, or little of both",
              "#A_neg, lower is better; 95 % interval over seeds",
              highlight=[f"{level}: {name}" for level, name in rows if name.startswith("CPO")])


def gap(lab):
    """mean(d^2) per timestep bin; and how often the guarantees of docs/derivation.md hold for one
    step of a network."""
    args = lab.args
    result, = lab.run([("gap", "gap", dict(batches=args.batches, step_size=args.step_size))])
    middles, bins = ([(i + 0.5) * 1000 / BINS for i in range(BINS)],
                     [f"{i * 1000 // BINS}-" for i in range(BINS)])
    shown = lambda x: "" if x is None else f"{x:.4f}"
    text = markdown(["pairs", *(f"t {b}" for b in bins)],
                    [[pairs, *map(shown, values)] for pairs, values in result["gaps"].items()])
    places = list(dict.fromkeys(e["place"] for e in result["effects"]))
    effects = {(e["rule"], e["place"], e["optimizer"]): e for e in result["effects"]}
    cell = lambda effect: f"{100 * effect['winner rose']:.0f} / {100 * effect['loser fell']:.0f}"
    table = markdown(["rule", "from", *OPTIMIZERS],
                     [[rule, place, *(cell(effects[rule, place, o]) for o in OPTIMIZERS)]
                      for rule in RULES for place in places])
    stem = publish(args, result,
                   "mean(d²), the gap of the auxiliary's two predictions "
                   f"({lab.models['base'].diffusion.prediction}), at the data's pictures:",
                   text,
                   "Per cent of samples whose winner's error rose / loser's error fell after one "
                   f"step on their batch, of relative length {args.step_size:g} "
                   f"({result['effects'][0]['samples']} samples; `balance` and `clamped` at "
                   "strength 1). The theorems promise 0 for the winner with `winner`, `safeguard`, "
                   "`balance`, `clamped` and 0 for the loser with `balance`, on free outputs; "
                   "through shared weights they are only a tendency:",
                   table, measured=f"{args.batches} batches")
    line_chart(f"{stem}.png",
               {pairs: (middles, values, [0] * BINS) for pairs, values in result["gaps"].items()},
               "The gap by timestep", "timestep t (1000: pure noise)", "mean of d squared")


def guidance(lab):
    """What was compiled into the weights: CPO with k = 1 - 1/s (one call a step) against the
    auxiliary guided at scale s (two calls)."""
    args = lab.args
    kinds = {"auxiliary, guided, 2 calls a step":
             lambda s: ("sample", dict(model="auxiliary", prompt="guided", guidance=s)),
             "CPO constant k = 1 - 1/s, 1 call":
             lambda s: ("align", dict(stabilizer="constant", strength=1 - 1 / s))}
    runs = [(f"{slug(name)[:9]}_{s}_{seed}", kind, flags | {"seed": seed})
            for name, make in kinds.items() for s in GUIDANCE
            for seed in args.seeds for kind, flags in [make(s)]]
    results = iter(lab.run(runs))
    rows = {name: {s: [next(results)["row"] for _ in args.seeds] for s in GUIDANCE}
            for name in kinds}
    text = markdown(["row", "scale s", *HEADER],
                    [[name, f"{s:g}", *(written([r[k] for r in some], d) for k, d in COLUMNS)]
                     for name, scales in rows.items() for s, some in scales.items()])
    stem = publish(args, {"rows": rows}, text)
    lines = {name: (GUIDANCE,
                    *zip(*(over_seeds([r["neg"] for r in some]) for some in scales.values())))
             for name, scales in rows.items()}
    line_chart(f"{stem}.png", lines, "Guided at each step, or guidance in the weights",
               "scale s (1: none)", "#A_neg")


def world(lab):
    """The analytic world: vector fields and samples before and after, and the path of every \
stabilizer."""
    from .figure import draw_world
    folder = Path(lab.args.results)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = draw_world(folder / "world.png", lab.args.world_steps, lab.args.seed)
    (folder / "world.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    rows = [[name, *(f"{x:.2f}" for x in values)] for name, values in numbers["samples"].items()]
    text = markdown(["sampled from", "share good in both", "spread (good ones: 0.40)",
                     "distance of the mean from the good ones'"], rows)
    about = (f"{world.__doc__} A flawed world (`nanocpo/study/mixture.py`): 2 % of its pictures "
             "are good in both attributes. The target is the exact base and a tiny network, "
             f"trained with CPO for {lab.args.world_steps} steps; nothing else is learned. "
             f"`{lab.args.command}`.")
    (folder / "world.md").write_text(
        "\n\n".join(["# world", "![the analytic world](world.png)", about, text]) + "\n",
        encoding="utf-8")
    print(text)


STUDIES = {f.__name__: f for f in (methods, pareto, places, speed, decoupling, axes, annotation,
                                   gap, guidance, world, critic, expert)}


def add_study_flags(parser):
    """The flags of a study beside those of the two stages."""
    parser.epilog = "\n".join(f"{name}: {f.__doc__}" for name, f in STUDIES.items())
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--results", default="docs/results",
                        help="folder for the JSON, Markdown and PNG that are kept")
    parser.add_argument("--seeds", type=SEED, nargs="+", default=[1, 2, 3],
                        help="training and sampling seeds that are reported")
    parser.add_argument("--more-seeds", type=SEED, nargs="+", default=[4, 5],
                        help="further seeds of the best rows of `methods`")
    parser.add_argument("--top", type=above(0), default=5, help="how many rows those are")
    parser.add_argument("--bases", nargs="+",
                        help="folders with base and auxiliary, of several seeds, that the reported "
                        "seeds of `methods` take in turn; the search is made with --out's")
    parser.add_argument("--validation", type=SEED, nargs="+", default=[101, 102],
                        help="seeds on which settings are chosen: `methods` takes the first, "
                        "`decoupling` the mean over all")
    parser.add_argument("--search-samples", type=above(0), default=256,
                        help="pictures a row of the search")
    parser.add_argument("--curve-samples", type=above(0), default=128,
                        help="pictures a point of the curves of `speed`")
    parser.add_argument("--curve-steps", type=above(0), default=60, help="steps of these curves")
    parser.add_argument("--batches", type=above(0), default=8, help="batches that `gap` looks at")
    parser.add_argument("--step-size", type=above(0, float), default=3e-4,
                        help="relative length of the one step that `gap` takes")
    parser.add_argument("--world-steps", type=above(0), default=1500,
                        help="training steps of the tiny network of `world`")
    parser.add_argument("--only", nargs="+",
                        help="only these rows (methods, speed), levels (annotation) or doses "
                        "(decoupling)")
    parser.add_argument("--jobs", type=above(0), default=1,
                        help="runs at a time, each with its share of the cores")


def main(argv=None):
    """Parse the flags and run one study; what is finished is used again."""
    args = parse(argv)
    STUDIES[args.study](Lab(changed(args, command=command_of(args))))


def parse(argv):
    """The flags of a study as a Namespace."""
    return parse_training(__doc__, argv, ("common", "sft", "cpo", "report"), check_flags,
                          extend=add_study_flags)[1]


def command_of(args):
    """The command that asks for the same: all flags that decide a result and are not as usual."""
    start = [args.study, *["--quick"] * args.quick]
    usual, words = parse(start), ["python", "-m", "nanocpo.study", *start]
    silent = {f.name for part in (Common, SFT, CPO, Report) for f in fields(part)
              if not f.metadata["decides"]} - {"data", "tree"} | {"results", "jobs"}
    for name, value in vars(args).items():
        if name not in silent and value != getattr(usual, name):
            paths = name in ("bases", "data", "tree")
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}",
                      *(Path(x).name if paths else str(x) for x in values)]
    return shlex.join(words)


def check_flags(args):
    """Raises ValueError on flags that do not go together."""
    if min(args.samples, args.search_samples, args.curve_samples) < 2:
        raise ValueError("--samples, --search-samples and --curve-samples: an interval needs two "
                         "pictures at least")
    reported = args.seeds + (args.more_seeds if args.study == "methods" else [])
    if len(set(reported)) < len(reported):
        raise ValueError(f"--seeds {' '.join(map(str, reported))}: the same seed twice is no "
                         "second measurement")
    if set(reported) & set(args.validation):
        raise ValueError("--seeds and --validation share a seed: settings would be chosen on what "
                         "is reported")
    if args.study == "methods" and args.batch < 2:
        raise ValueError("--batch 1: half of it, a pair of pictures, is Diffusion-DPO's batch")
    if args.only and args.study in ("gap", "guidance", "world", "critic", "expert"):
        raise ValueError(f"--only: {args.study} has no rows to choose from")
    if args.criteria and args.study == "gap":
        raise ValueError("--criteria: gap is measured on the whole tree")
    if args.weights:
        raise ValueError("--weights: the studies are the toy's")
