"""The training loop that all stages share: optimiser, learning rate, averaged weights, checkpoints,
resuming. What a step computes is the caller's (nanocpo/method.py)."""
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from .utils import ranks
from .utils.checkpoint import fitting, load_checkpoint, save_checkpoint, use_again
from .utils.log import Log, shown
from .utils.muon import Muon

@dataclass
class Recipe:
    """How a stage is optimised (the values are ours; steps and learning rate are flags)."""
    steps: int
    lr: float                   # of AdamW's part; Muon's part takes ten times as much
    muon: bool = True           # False: AdamW for all weights
    warmup: int = 50            # steps of linear warm-up
    plateau: float = 0.3        # share of the run, warm-up included, before the rate falls to zero
    ema: float = 0.995          # averaged weights: decay min(ema, n / (n + 9)) at step n
    clip: float = 1.0           # largest gradient norm

    def lr_at(self, step):
        """Learning rate of step 0 .. steps-1."""
        falling = (1 - step / self.steps) / (1 - self.plateau)
        return self.lr * min(1, (step + 1) / self.warmup) * min(1, falling)


def fit(model, loss_step, recipe, path, *, name, seed=0, bf16=False, accumulate=1, resume=False,
        save_every=200, pictures=None, sample_every=0, made_of=None):
    """Train `model` and write `path`; returns (the averaged model, frozen; the last log line).

    loss_step(model, generator) -> (loss, logs, t): draws its own batch with the generator; logs
    hold (B,) tensors, t is (B,). accumulate: batches whose mean gradient makes one step; several
    processes share them (nanocpo/utils/ranks.py). pictures(averaged model, step): called every
    sample_every steps. The log goes to a .jsonl beside `path`. made_of: what else decides the
    result, {name: value}; it is kept in the file, and only the same run is resumed (else
    ValueError). All randomness comes from one CPU generator whose state is in the checkpoint, so a
    resumed run ends in the same weights."""
    path = Path(path)
    made_of = {"steps": recipe.steps, "lr": recipe.lr, "seed": seed, "bf16": bf16,
               "accumulate": accumulate} | (made_of or {})
    state = TrainingState(model, model.frozen_copy(), Muon(model, recipe.lr, recipe.muon),
                          torch.Generator().manual_seed(seed))
    first = state.restore(path, made_of) if resume and path.exists() else 0
    log = Log(path.with_suffix(".jsonl"), name, keep=first)
    model.train()
    shared, norms = ranks.together(model), []
    bar = tqdm(range(first, recipe.steps), desc=name, initial=first, total=recipe.steps,
               mininterval=2, disable=not ranks.first())
    for step in bar:
        done = step + 1
        # Gradients: the mean over `accumulate` batches.
        state.optimizer.zero_grad(set_to_none=True)
        batches = ranks.share(ranks.generators(state.generator, accumulate))
        for i, generator in enumerate(batches, 1):
            with ranks.exchange(shared, now=i == len(batches)):
                with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                    loss, logs, t = loss_step(shared, generator)
                (loss / len(batches)).backward()
            log.remember(t, logs)
        # Step, and let the average follow.
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip))
        state.step(recipe.lr_at(step), decay=min(recipe.ema, done / (done + 9)))
        # Record. Numbers are only read here, for reading one waits for the GPU.
        due = lambda every: done % every == 0 or done == recipe.steps
        line_due, save_due = due(max(1, min(20, recipe.steps // 10))), due(save_every)
        paint_due = pictures and sample_every and done % sample_every == 0
        if line_due or save_due or paint_due:
            norm = refuse_infinite(norms, name, done, path)
            norms.clear()
        if line_due:
            line = log.write(done, recipe.lr_at(step), norm, model.diffusion.steps)
            bar.set_postfix(shown(line))
        if paint_due and ranks.first():
            pictures(state.average, done)
        if save_due and ranks.first():
            state.save(path, step=done, steps=recipe.steps, made_of=made_of, name=name)
    ranks.wait()
    return state.average, log.line


def refuse_infinite(norms, name, done, path):
    """The gradient norms of the steps before `done` -> the last as a number. Raises
    FloatingPointError at the first that is not finite: the weights are lost from there on."""
    norms = torch.stack(norms).tolist()
    for step, norm in enumerate(norms, done - len(norms)):
        if not math.isfinite(norm):
            kept = (f"The last checkpoint stays in {path}" if path.exists()
                    else "No checkpoint was written yet")
            raise FloatingPointError(f"{name}, step {step}: the gradient is {norm}; lower --lr or "
                                     f"leave --bf16 out. {kept}")
    return norm


@dataclass
class TrainingState:
    """What changes while a model is trained, and so what a checkpoint holds."""
    model: torch.nn.Module
    average: torch.nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator

    def step(self, lr, decay):
        """One step of the optimiser; the averaged weights follow by 1 - decay."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()),
                                 1 - decay)

    def save(self, path, **more):
        """Write the checkpoint, whole or not at all."""
        save_checkpoint(path, self.model.content() | more | {
            "model": self.model.state_dict(), "ema": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(), "rng": self.generator.get_state()})

    def restore(self, path, made_of):
        """Go on from the checkpoint `path`; returns the number of steps that it has done. Raises
        ValueError if it belongs to another run."""
        state, now = load_checkpoint(path), self.model.content()
        was = state.get("made_of")
        use_again(path, was and was | {"model": state["config"], "tree": state["criteria"]},
                  made_of | {"model": now["config"], "tree": now["criteria"]},
                  cure="resume with the same flags and data, or choose another --out or --name")
        with fitting(path):
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["rng"])
            return state["step"]
