"""The training loop shared by all stages: optimiser, schedule, averaging, logs, checkpoints, resuming."""
import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from .cli import above, pick_device
from .criteria import Criteria
from .data import from_folder, from_painter
from .model import load_checkpoint, save_atomic, whole_file
from .muon import Muon

REGIMES = "flawed", "mixed"               # what --data can be beside a folder
BINS = 10                                   # timestep bins of the log: a loss averaged over t hides everything


@dataclass
class Recipe:
    """How a stage is optimised (the values are ours; steps and learning rate are flags of the scripts)."""
    steps: int
    lr: float                               # of AdamW's part; Muon's part takes ten times as much
    warmup: int = 50                        # steps of linear warm-up
    constant: float = 0.3                   # share of the run at full rate; then a line down to zero
    ema: float = 0.995                      # averaging of weights, with a shorter memory before step 1,790 (the toy's runs are shorter)
    clip: float = 1.0                       # largest gradient norm

    def lr_at(self, step):
        """Learning rate of step 0 .. steps-1."""
        return self.lr * min(1, (step + 1) / self.warmup) * min(1, (1 - step / self.steps) / (1 - self.constant))


def changed(args, **overrides):
    """The flags with some of them replaced."""
    return argparse.Namespace(**vars(args) | overrides)


def add_common_arguments(parser):
    """The flags that both training scripts share."""
    parser.add_argument("--out", default="out", help="folder for everything that is written")
    parser.add_argument("--data", default="flawed", help="flawed or mixed (painted on the fly, see nanocpo/data.py), or a "
                        "folder with metadata.jsonl")
    parser.add_argument("--tree", help="criteria as JSON; default: criteria.json in the folder, else the embedded tree")
    parser.add_argument("--count", type=above(0), default=10000, help="number of pictures to paint; 80 %% of them train")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad lines of a folder out instead of stopping")
    parser.add_argument("--seed", type=above(-1), default=0)
    parser.add_argument("--device", type=pick_device, default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--bf16", action="store_true", help="run the models in bfloat16; losses and weights stay float32")
    parser.add_argument("--batch", type=above(0), default=32)
    parser.add_argument("--accumulate", type=above(0), default=1, help="batches whose gradients make one step; with --weights 4")
    parser.add_argument("--resume", action="store_true", help="continue a run that stopped, from its last checkpoint")
    parser.add_argument("--save-every", type=above(0), default=200, help="steps between checkpoints")
    parser.add_argument("--sample-every", type=above(-1), default=500, help="steps between sample grids (0: none)")


def load_data(args):
    """The data that the flags ask for, as Paintings. Raises ValueError (or its DataError, CriteriaError) with the cure."""
    criteria = Criteria.load(args.tree) if args.tree else None
    if args.data in REGIMES:
        return from_painter(criteria, args.count, args.data, seed=args.seed)
    return from_folder(args.data, criteria, skip_bad=args.skip_bad)


def fit(model, loss_step, recipe, path, *, name, seed=0, bf16=False, accumulate=1, resume=False, save_every=200,
        pictures=None, sample_every=0, run=None):
    """Train `model` and write `path`; returns (the averaged model, frozen; the last log line).

    loss_step(model, generator) -> (loss, logs, t): draws its own batch with the generator; logs hold (B,) tensors, t is (B,).
    accumulate: batches whose mean gradient makes one step.
    pictures(averaged model, step): called every sample_every steps. The log goes to a .jsonl beside `path`.
    run: what else decides the result, {name: value}; it is kept in the file, and only the same run is resumed (else ValueError).
    All randomness comes from one CPU generator whose state is in the checkpoint, so a resumed run ends in the same weights."""
    path, device = Path(path), model.device
    generator = torch.Generator().manual_seed(seed)
    average = model.frozen_copy()
    run = {"steps": recipe.steps, "lr": recipe.lr, "seed": seed, "bf16": bf16, "accumulate": accumulate} | (run or {})
    optimizer = Muon(model, recipe.lr)
    first, lines, logged, log_file = 0, [], None, path.with_suffix(".jsonl")
    if resume and path.exists():
        state = load_checkpoint(path)
        was = state.get("run", {}) | {"model": state["config"], "tree": state["criteria"]}
        now = run | {"model": model.config, "tree": model.criteria.to_dict()}
        if was != now:
            different = sorted(key for key in was | now if was.get(key) != now.get(key))
            raise ValueError(f"{path} belongs to another run ({', '.join(different)}); resume with the same flags and data, or choose "
                             "another --out or --name")
        model.load_state_dict(state["model"])
        average.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["rng"])
        first = state["step"]
        if log_file.exists():
            logged = log_file.read_text()
            whole = [line for line in logged.splitlines() if line.endswith("}}")]                         # the last may be torn
            lines = [line for line in whole if json.loads(line)["step"] <= first]
    text = "".join(line + "\n" for line in lines)
    if text != logged:                                                    # several processes may look at one finished run
        with whole_file(log_file) as temporary:
            temporary.write_text(text)

    window, line = [], json.loads(lines[-1]) if lines else {}
    start = time.time() - line.get("seconds", 0)                          # a resumed run counts on
    log_every = max(1, min(20, recipe.steps // 10))
    model.train()
    bar = tqdm(range(first, recipe.steps), desc=name, initial=first, total=recipe.steps, mininterval=2)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
        optimizer.zero_grad(set_to_none=True)
        for _ in range(accumulate):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, logs, t = loss_step(model, generator)
            (loss / accumulate).backward()
            window.append((t, logs))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        if not torch.isfinite(norm):
            kept = f"The last checkpoint stays in {path}" if path.exists() else "No checkpoint was written yet"
            raise FloatingPointError(f"{name}, step {step}: the gradient is {norm.item()}; lower --lr or leave --bf16 out. {kept}")
        optimizer.step()
        decay = min(recipe.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        if (step + 1) % log_every == 0 or step + 1 == recipe.steps:
            line = {"name": name, "step": step + 1, "lr": recipe.lr_at(step), "gradient_norm": norm.item(),
                    "seconds": round(time.time() - start, 2)} | summarize(window, model.diffusion.steps)
            with open(log_file, "a") as file:
                file.write(json.dumps(line) + "\n")
            bar.set_postfix({key: f"{line[key]:.3f}" for key in ("loss", "margin", "accuracy", "winner", "loser") if line.get(key) is not None})
            window = []
        if pictures and sample_every and (step + 1) % sample_every == 0:
            pictures(average, step + 1)
        if (step + 1) % save_every == 0 or step + 1 == recipe.steps:
            save_atomic(path, {"config": model.config, "criteria": model.criteria.to_dict(), "model": model.state_dict(),
                               "ema": average.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1,
                               "steps": recipe.steps, "rng": generator.get_state(), "run": run, "name": name})
    return average, line


def summarize(window, steps):
    """[(t, logs)] -> the mean of each log over the samples that count, and per timestep bin (None where a bin is empty)."""
    t = torch.cat([t for t, _ in window]).cpu()
    logs = {key: torch.cat([logs[key] for _, logs in window]).float().cpu() for key in window[0][1]}
    valid = logs.pop("valid", torch.ones(len(t))) > 0
    bins = (t * BINS).div(steps, rounding_mode="floor")
    mean = lambda value, mask: round(value[mask].mean().item(), 6) if mask.any() else None
    out = {key: mean(value, valid) for key, value in logs.items()}
    return out | {"valid": round(valid.float().mean().item(), 4),
                  "per_t": {key: [mean(value, valid & (bins == i)) for i in range(BINS)] for key, value in logs.items()}}


def finished(path):
    """Whether `path` holds a complete run."""
    if not Path(path).exists():
        return False
    state = load_checkpoint(path)
    return state["step"] >= state["steps"]


def differing(run, now):
    """The names in `now`, {name: value}, that a checkpoint's `run` (see fit) has with another value."""
    return [name for name, value in now.items() if run.get(name, value) != value]


def draw_t(count, steps, generator, lean=0.7):
    """count timesteps t = T u^lean with u uniform in [0, 1): with 0.7 the noisy half, where subject and composition are decided, gets
    63 % of them (ours; E18). u is stratified, one in each of `count` equal parts of [0, 1): a batch sees all noise levels (2107.00630)."""
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (steps * u ** lean).long().clamp(max=steps - 1)


def noised(model, images, generator, t=None, noise=None):
    """Encode a batch and noise it: (xt, t, noise, goal). Random numbers come from the CPU, so a seed means the same on every device."""
    with torch.autocast(model.device.type, enabled=False):                # --bf16 is for the models: it would round picture and schedule
        x0 = model.latents.encode(images.to(model.device))
    t = draw_t(len(x0), model.diffusion.steps, generator) if t is None else t
    noise = torch.randn(x0.shape, generator=generator) if noise is None else noise
    t, noise = t.to(model.device), noise.to(model.device)
    return model.diffusion.q_sample(x0, t, noise), t, noise, model.diffusion.goal(x0, t, noise)


def draw(data, batch, generator):
    """A random batch of the data."""
    return data.batch(torch.randint(len(data), (batch,), generator=generator).numpy())


def drop_caption(captions, generator, probability=0.1):
    """Each caption becomes "" with this probability: how the unconditional prompt is learned (2207.12598)."""
    return ["" if u < probability else caption for caption, u in zip(captions, torch.rand(len(captions), generator=generator).tolist())]
