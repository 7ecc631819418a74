"""The laboratory of studies.py: one *run* is one trained and measured model (or one measurement),
kept in a file of its own.

Each run leaves OUT/study/NAME/KEY.json (and a grid of pictures beside it) and is never repeated.
Base, auxiliary and data are those of --seed; a run has its own training and sampling seed.
"""
import argparse
import multiprocessing
import os
import time
import zipfile
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..data import to_tensor
from ..losses import RULES
from ..run.settings import TEACHES, TOY, flat, record
from ..run.stages import alignment_step, ready_auxiliary, stage_1, stage_2
from ..toy import critic, evaluate, painter
from ..toy.world import Toy
from ..utils.log import BINS, summarize
from ..utils.checkpoint import code_digest, load_checkpoint, read_json, save_json, use_again
from ..utils.files import ordinary
from ..utils.grid import save_grid
from ..utils.muon import Muon

# Of the gap study. Their learning rates do not matter: `step_effect` sets the length of the step.
OPTIMIZERS = {
    "free outputs": lambda model: torch.optim.SGD(model.parameters(), 1.0),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), 1.0),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), 1e-3),
    "Muon": lambda model: Muon(model, 1e-3, weight_decay=0.0),
}


def changed(args, **overrides):
    """The flags with some of them replaced."""
    return argparse.Namespace(**vars(args) | overrides)


def settings_of(args):
    """The flags that are settings of the two stages, as Settings."""
    return TOY.changed(**vars(args))


class Lab:
    """The data and models of one --out folder, loaded when first needed, and the runs made
    with them."""

    def __init__(self, args):
        self.args = args

    @cached_property
    def world(self):
        return Toy(settings_of(self.args))

    @property
    def data(self):
        return self.world.data

    @cached_property
    def models(self):
        return dict(zip(("base", "auxiliary"), stage_1(self.world)))

    def rooms(self):
        """This laboratory, or one for each folder of --bases, whose models have seeds of their
        own."""
        if not self.args.bases:
            return [self]
        seeds = []
        for base in (Path(folder) / "base.pt" for folder in self.args.bases):
            made_of = load_checkpoint(base).get("made_of", {})
            if "seed" not in made_of:
                raise ValueError(f"{base} does not say which seed it is of (it is of an older "
                                 "version); train it again")
            seeds.append(made_of["seed"])
        return [Lab(changed(self.args, out=folder, seed=seed))
                for folder, seed in zip(self.args.bases, seeds)]

    @cached_property
    def sources(self):
        """Digests of the data and models that every run starts from."""
        return ({"pictures": self.data.digest()}
                | {f"{name} model": model.digest() for name, model in self.models.items()})

    def taught(self, args):
        """(data, auxiliary) of a run: the folder's, or, if the run names these shares, as if
        experts had judged only args.judged of the leaves, and args.wrong of their verdicts
        were wrong; or, if its stage 1 has another length, an auxiliary of that length."""
        data, name = self.data, f"auxiliary_{args.sft_steps}_steps"
        if "judged" in args:
            data = degrade(data, args.judged, args.wrong, self.args.seed)
            name = f"auxiliary_{args.judged}_{args.wrong}"
        elif args.sft_steps == self.args.sft_steps:
            return data, self.models["auxiliary"]
        settings = settings_of(changed(
            self.args, out=str(Path(self.args.out) / "study" / name), sft_steps=args.sft_steps,
            sample_every=0, resume=True))
        return data, ready_auxiliary(Toy(settings, data), self.models["base"], exactly=True)

    def run(self, runs):
        """[(key, kind, overrides of the flags)], independent of one another -> their results, made
        where no file has them yet.

        With --jobs over 1 they are shared among processes. A file made with other settings is an
        error, not a result."""
        missing = [run for run in runs if not self.path(run[0]).exists()]
        for number, run in enumerate(missing if self.args.jobs == 1 else [], 1):
            print(f"{self.args.study}: run {number} of {len(missing)}, {run[0]}", flush=True)
            self.make(run)
        if missing and self.args.jobs > 1:
            self.models                     # train what is missing once, before the processes start
            threads = max(1, (os.cpu_count() or 1) // self.args.jobs)
            with multiprocessing.get_context("spawn").Pool(
                    self.args.jobs, torch.set_num_threads, [threads]) as pool:
                pool.starmap(make_in_process, [(self.args, run) for run in missing], chunksize=1)
        return [self.read(run) for run in runs]

    def path(self, key, suffix="json"):
        return Path(self.args.out) / "study" / self.args.study / f"{key}.{suffix}"

    def made_of(self, run):
        """All that decides a run's result, to tell whether a file still answers the question."""
        key, kind, overrides = run
        settings = settings_of(changed(self.args, **overrides))
        own = {name: value for name, value in overrides.items() if name not in flat(settings)}
        if "judged" in own and self.args.seed:  # of the damage; runs of before were all of seed 0
            own["seed of the verdicts"] = self.args.seed
        parts = settings.common, settings.sft, settings.cpo, settings.report
        return {"kind": kind} | record(*parts) | own | self.sources

    def read(self, run):
        """The result of a finished run. Its pictures are judged again when the critic (or what is
        measured) has changed since."""
        path, pictures = self.path(run[0]), self.path(run[0], "npz")
        result = read_json(path, sealed=True)           # {} of one that is broken
        use_again(path, result.get("made_of"), self.made_of(run),
                  cure="delete it or choose another --out")
        if pictures.exists() and result.get("judged by") != judge_digest():
            args = changed(self.args, **run[2])
            try:
                images = np.load(ordinary(pictures))["images"]
            except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise ValueError(f"{pictures}: not the pictures of a run, or damaged ({error}); "
                                 f"delete it and {path.name}, and they are painted again"
                                 ) from error
            result |= {"row": row_of(images, self.models["base"], args.seed),
                       "judged by": judge_digest()}
            save_json(path, result, sealed=True)
        return result

    def make(self, run):
        """Do one run and write its file, whole or not at all."""
        key, kind, overrides = run
        path = self.path(key)
        args = changed(self.args, **overrides, out=str(path.parent), name=key, resume=True,
                       sample_every=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        start = time.time()
        result = {"key": key, "made_of": self.made_of(run), "judged by": judge_digest()}
        result |= KINDS[kind](self, args)
        save_json(path, result | {"wall": round(time.time() - start, 1)}, sealed=True)


def make_in_process(args, run, labs={}):
    """One run in a process of its own, which loads data and models for itself: once for each
    folder."""
    labs.setdefault(repr(args), Lab(args)).make(run)


@cache
def judge_digest():
    """A digest of the code that turns pictures into a row."""
    return code_digest(*(module.__file__ for module in (critic, evaluate, painter)))


def row_of(images, base, seed):
    """The report's row for pictures uint8 (N, 32, 32, 3), asked for in the report's order."""
    reference, real = evaluate.real_positive(base.criteria, len(images), seed)
    row = evaluate.measure_row(images, evaluate.asked(base, len(images)), base.criteria, real)
    return row | {"real_diversity": reference["diversity"]}


def measured(lab, args, model, kind="plain", knobs=()):
    """(the report's row for a model, its pictures). They stay beside the run's file: all of them to
    be judged again, the first as a grid to be looked at."""
    images = evaluate.paint(model, kind, args.samples, args.seed, args.sampling_steps,
                            args.guidance, knobs)
    stem = Path(args.out) / args.name
    np.savez_compressed(f"{stem}.npz", images=images)
    save_grid(f"{stem}.png", images[:16], columns=8, zoom=3)
    return row_of(images, lab.models["base"], args.seed), images


def teacher_calls(args):
    """How many predictions the auxiliary makes for one run of stage 2, a picture each."""
    cpo, calls = settings_of(args).cpo.filled(), 0
    if cpo.paint:
        guided = 2 if cpo.paint_guidance != 1 else 1
        calls += cpo.paint * args.sampling_steps * guided * (2 if cpo.method == "dpo" else 1)
    if cpo.method in TEACHES:
        calls += 2 * args.steps * args.batch * args.accumulate
    return calls


@torch.no_grad()
def displacement(model, base, images, captions, seed=0):
    """How far a model has moved from its base: E_t |eps - eps_ref|^2, the mean squared difference
    of their noise predictions at the model's own pictures, noised to evenly spread timesteps; and
    the same per timestep bin (None where a bin is empty)."""
    generator, prompts = torch.Generator().manual_seed(seed), [
        base.criteria.prompt(caption) for caption in captions]
    x0 = base.latents.encode(to_tensor(images))
    t = ((torch.arange(len(x0)) + 0.5) * base.diffusion.steps / len(x0)).long()
    t = t[torch.randperm(len(t), generator=generator)]
    xt = base.diffusion.q_sample(x0, t, torch.randn(x0.shape, generator=generator))
    a, _ = base.diffusion.scales(t, xt)
    moved = torch.cat([(m - b).square().flatten(1).mean(1) for m, b in (
        [net(xt[part], t[part], [prompts[i] for i in part.tolist()]) for net in (model, base)]
        for part in torch.arange(len(x0)).split(128))])
    moved = moved * a.flatten() ** 2 if base.diffusion.prediction != "eps" else moved
    bins = t * BINS // base.diffusion.steps
    return float(moved.mean()), [round(float(moved[bins == i].mean()), 6) if (bins == i).any()
                                 else None for i in range(BINS)]


def sample_run(lab, args):
    """A row without training: base or auxiliary, asked in one of evaluate's ways, with the knob of
    a branch turned."""
    model = lab.models["base"] if args.model == "base" else lab.taught(args)[1]
    knobs = [(args.branch, args.scale)] if "branch" in args else []
    return {"row": measured(lab, args, model, args.prompt, knobs)[0], "seconds": 0, "images": 0,
            "teacher calls": 0}


def align(lab, args, data, auxiliary, watch=None, steady=False):
    """Stage 2 as these flags say, from the lab's base; see stages.stage_2."""
    return stage_2(Toy(settings_of(args), data), lab.models["base"], auxiliary, watch, steady)


def align_run(lab, args):
    """Stage 2, then its row. Images seen: a pair of Diffusion-DPO is two."""
    data, auxiliary = lab.taught(args)
    target, line = align(lab, args, data, auxiliary)
    checkpoint, base = Path(args.out) / f"{args.name}.pt", lab.models["base"]
    row, images = measured(lab, args, target)
    moved = displacement(target, base, images, evaluate.asked(base, len(images)))
    result = {"row": row, "displacement": moved[0], "displacement per t": moved[1],
              "seconds": line["seconds"],           # the log's: a resumed run counts on
              "images": (args.steps * args.batch * args.accumulate
                         * (2 if args.method == "dpo" else 1)),
              "teacher calls": teacher_calls(args), "log": line}
    checkpoint.unlink()             # the numbers and the pictures stay, tens of megabytes do not
    return result


def curve_run(lab, args):
    """Stage 2 at a constant rate, its raw weights measured every args.every steps; never resumed,
    for the points before would be lost."""
    curve, start, spent = [], time.time(), 0.0

    def watch(average, step):
        nonlocal spent
        now = time.time()
        row, _ = measured(lab, args, average)
        curve.append({"step": step, "seconds": round(now - start - spent, 1)}
                     | {key: row[key] for key in ("neg", "caption", "diversity", "frechet")})
        spent += time.time() - now                                # measuring is not training
    align(lab, changed(args, sample_every=args.every, resume=False), lab.data,
          lab.models["auxiliary"], watch, steady=True)
    (Path(args.out) / f"{args.name}.pt").unlink()
    return {"curve": curve}


def auxiliary_run(lab, args):
    """Stage 1 with degraded annotations, so that later runs of this level find it."""
    start = time.time()
    lab.taught(args)
    return {"seconds": round(time.time() - start, 1)}


def degrade(data, judged, wrong, seed=0):
    """Paintings of which only this share of all leaves is judged, and this share of the verdicts
    says the opposite (ours)."""
    rng = np.random.default_rng((seed, 7))
    now = float((data.annotations != 0).mean())
    if judged > now + 0.02:
        raise ValueError(f"only {now:.2f} of the leaves are judged in this data, not {judged}")
    keep, flip = (rng.random(data.annotations.shape) * now < judged,
                  rng.random(data.annotations.shape) < wrong)
    return replace(data, annotations=(np.where(keep, data.annotations, 0)
                                      * np.where(flip, -1, 1)).astype(np.int8))


class FreeOutputs(nn.Module):
    """Stands in for a model as if every output were a parameter of its own: it answers first as the
    model does, and what an optimizer then moves is the answer. On it the guarantees of
    docs/derivation.md must hold for every sample."""

    def __init__(self, model):
        super().__init__()
        self.model = (model,)       # in a tuple, so that its weights are not parameters of this
        self.device, self.latents, self.diffusion = model.device, model.latents, model.diffusion

    @property
    def text(self):
        return self.model[0].text

    def forward(self, xt, t, prompts):
        if not hasattr(self, "answer"):
            self.answer = nn.Parameter(self.model[0](xt, t, prompts).detach().clone())
        return self.answer


def gap_run(lab, args):
    """The gap per timestep bin for the three kinds of prompt pairs, and what one optimizer step
    does to the errors of its own batch."""
    base, auxiliary = lab.models["base"], lab.models["auxiliary"]
    train, gaps = lab.data.split("train"), {}
    for pairs in ("own", "completed", "opposite"):
        settings, window = settings_of(changed(args, pairs=pairs, lean=1.0, paint=0)), []
        step = alignment_step(settings, train, base, auxiliary)
        with torch.no_grad():
            for seed in range(args.batches):
                _, logs, t = step(base, torch.Generator().manual_seed(seed))
                window.append((t, logs))
        gaps[pairs] = summarize(window, base.diffusion.steps)["per_t"]["gap"]
    table = []
    for rule in RULES:
        flags = changed(args, stabilizer=rule,
                        strength=1.0 if rule in ("balance", "clamped") else RULES[rule].strength)
        aligned, _ = align(lab, changed(flags, name=f"gap_{rule}"), lab.data, auxiliary)
        (Path(args.out) / f"gap_{rule}.pt").unlink()
        step = alignment_step(settings_of(flags), train, base, auxiliary)
        for place, model in (("at the base", base), (f"after {args.steps} steps", aligned)):
            for optimizer in OPTIMIZERS:
                table.append({"rule": rule, "place": place, "optimizer": optimizer}
                             | step_effect(step, model, optimizer, args.step_size, args.batches,
                                           seed=10 ** 6))
    return {"gaps": gaps, "effects": table}


def step_effect(step, model, optimizer, size, batches, seed):
    """Share of samples whose winner's error rose, and whose loser's error fell, when one step was
    taken on their batch. The step is shortened or stretched to `size` times the norm of the weights
    (of the outputs), so that optimizers are compared in direction only."""
    rose, fell, count = 0, 0, 0
    for i in range(batches):
        moving = (FreeOutputs(model) if optimizer == "free outputs"
                  else model.frozen_copy().requires_grad_(True))
        generator = lambda: torch.Generator().manual_seed(seed + i)
        loss, before, _ = step(moving, generator())
        loss.backward()
        old = [p.detach().clone() for p in moving.parameters()]
        OPTIMIZERS[optimizer](moving).step()
        with torch.no_grad():
            norm = lambda tensors: sum(float(x.square().sum()) for x in tensors) ** 0.5
            factor = size * norm(old) / max(
                norm([p - o for p, o in zip(moving.parameters(), old)]), 1e-12)
            for p, o in zip(moving.parameters(), old):
                p.copy_(o + factor * (p - o))
            after = step(moving, generator())[1]
        # by more than rounding
        rose += (after["winner"] > before["winner"] * (1 + 1e-6))[before["valid"]].sum().item()
        fell += (after["loser"] < before["loser"] * (1 - 1e-6))[before["valid"]].sum().item()
        count += int(before["valid"].sum())
    return {"winner rose": rose / count, "loser fell": fell / count, "samples": count}


KINDS = {"sample": sample_run, "align": align_run, "curve": curve_run, "auxiliary": auxiliary_run,
         "gap": gap_run}
