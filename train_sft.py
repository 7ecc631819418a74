"""Stage 1: supervised fine-tuning gives the auxiliary model the expert's knowledge.

    python train_sft.py                          # trains what is missing: out/base.pt, then out/auxiliary.pt
    python train_sft.py --data paintings         # the same from a folder with metadata.jsonl
    python train_sft.py --weights sd15 --data paintings --out out_sd         # an adapter on Stable Diffusion (nanocpo/sd/finetune.py)

The *base* model is trained on plain captions; it stands for the public model that the paper starts from. The *auxiliary* model
starts as a copy of it and sees prompts that also list an image's positive and negative attributes (2601.04300, stage 1).
"""
import argparse
from pathlib import Path

import numpy as np
import torch

from nanocpo.cli import above, command
from nanocpo.data import to_images
from nanocpo.evaluate import all_prompts
from nanocpo.grid import save_grid
from nanocpo.losses import sft_loss
from nanocpo.model import Model, fingerprint, load_checkpoint, load_model
from nanocpo.sd import finetune
from nanocpo.train import REGIMES, Recipe, add_common_arguments, differing, draw, drop_caption, finished, fit, load_data, noised


def add_sft_arguments(parser):
    """The flags of stage 1; train_cpo.py has them too, since it runs what is missing. The values are ours."""
    parser.add_argument("--base", help="start from this checkpoint instead of training OUT/base.pt")
    parser.add_argument("--base-steps", type=above(0), default=1000, help="steps of the base model on plain captions")
    parser.add_argument("--base-lr", type=above(0, float), default=2e-3)
    parser.add_argument("--sft-steps", type=above(0), default=1000, help="steps of the auxiliary model")
    parser.add_argument("--sft-lr", type=above(0, float), default=2e-3)


def attribute_prompts(criteria, batch, generator):
    """SFT prompts: each image's caption with a random part of its annotation, so that every kind of prompt that is asked for
    later was seen: all attributes, some, only one side, none; and a dropped caption for guidance (shares: ours)."""
    annotations = batch.annotations.copy()                                # (B, leaves)
    count, leaves = annotations.shape
    kind, keep, mask = (torch.rand(shape, generator=generator).numpy() for shape in ((count,), (count, 1), (count, leaves)))
    annotations[(kind[:, None] >= 0.7) & (mask >= keep)] = 0              # 20 % a random share, and below:
    annotations[(kind < 0.1)[:, None] & (annotations < 0)] = 0            # 10 % the positive ones only
    annotations[((kind >= 0.1) & (kind < 0.2))[:, None] & (annotations > 0)] = 0                      # 10 % the negative ones only
    annotations[kind >= 0.9] = 0                                          # 10 % nothing but the caption; 50 % all
    captions = drop_caption(batch.captions, generator)
    return [criteria.prompt(caption, a) for caption, a in zip(captions, annotations)]


def caption_prompts(criteria, batch, generator):
    """The base model's prompts: captions only, some dropped."""
    return [criteria.prompt(caption) for caption in drop_caption(batch.captions, generator)]


def sft_step(args, data, prompts):
    """The loss of one step of supervised training; prompts(criteria, batch, generator) says what the model is shown."""
    def loss_step(model, generator):
        batch = draw(data, args.batch, generator)
        xt, t, _, goal = noised(model, batch.images, generator)
        return *sft_loss(model(xt, t, prompts(data.criteria, batch, generator)), goal), t
    return loss_step


def train_base(args, data, device):
    """The base model from nothing, on plain captions -> OUT/base.pt."""
    torch.manual_seed(args.seed)
    model = Model(data.criteria, sorted(set(data.captions))).to(device)
    return run_stage(args, model, sft_step(args, data.split("train"), caption_prompts), "base", args.base_steps, args.base_lr,
                     {"data": identity(args, data)})


def train_auxiliary(args, data, base):
    """A copy of the base model, tuned on captions with attributes -> OUT/auxiliary.pt."""
    model = base.frozen_copy().requires_grad_(True)
    return run_stage(args, model, sft_step(args, data.split("train"), attribute_prompts), "auxiliary", args.sft_steps, args.sft_lr,
                     {"data": identity(args, data), "base": fingerprint(base)}, kinds=("plain", "positive", "negative"))


def run_stage(args, model, loss_step, name, steps, lr, made_of, kinds=("plain",), watch=None):
    """fit() with the script's flags, and a grid every so often: a row for each kind of prompt, always the same noise.
    made_of: digests of the data and models that went into it, and the stage's own flags (fit's `run`).
    watch(averaged model, step) is called instead of the grid, if given."""
    captions = [model.captions[i % len(model.captions)] for i in range(8)]
    prompts = dict(zip(("plain", "positive", "negative"), all_prompts(model.criteria, captions)))

    def pictures(average, step):
        images = np.concatenate([to_images(average.sample(prompts[kind], seed=args.seed)) for kind in kinds])
        titles = [f"{name}, step {step}: {kind} prompt" for kind in kinds]
        save_grid(Path(args.out) / "samples" / f"{name}_{step:05d}.png", images, captions * len(kinds), titles=titles)

    return fit(model, loss_step, Recipe(steps, lr), Path(args.out) / f"{name}.pt", name=name,
               seed=args.seed, bf16=args.bf16, accumulate=args.accumulate, resume=args.resume, save_every=args.save_every,
               pictures=watch or pictures, sample_every=args.sample_every, run={"batch": args.batch, "count": args.count} | made_of)


def identity(args, data):
    """What says that data are the same: painted ones are, of any seed and number, if they are flawed or mixed alike."""
    return args.data if args.data in REGIMES else data.digest()


def ensure_models(args, data):
    """(base, auxiliary): loaded where a finished checkpoint exists in OUT, trained where none does. Raises ValueError if one that
    exists was made of other data or of another base; says so if its other flags differ."""
    device, out = args.device, Path(args.out)

    def fitting(path, made_of, **flags):
        """The model in this file, checked against what it should be made of."""
        model, run = load_model(path, device), load_checkpoint(path).get("run", {})
        if model.criteria.to_dict() != data.criteria.to_dict() or set(data.captions) - set(model.captions):
            raise ValueError(f"{path} was trained with another tree or other captions than those of {args.data}; choose another --out, "
                             "or delete the file")
        wrong = differing(run, made_of)
        if wrong:
            raise ValueError(f"{path} was made with another {' and another '.join(wrong)} than this run's; choose another --out, or delete "
                             "the file")
        other = ", ".join(f"{key} {run[key]}, not {flags[key]}" for key in differing(run, flags))
        if other:
            print(f"{path} is used as it is ({other}); delete it to train another")
        return model
    same = dict(batch=args.batch, seed=args.seed)
    if args.base:
        base = fitting(args.base, {})                                     # of whatever data it is
    else:
        if not finished(out / "base.pt"):
            train_base(args, data, device)
        base = fitting(out / "base.pt", {"data": identity(args, data)}, steps=args.base_steps, lr=args.base_lr, **same)
    if not finished(out / "auxiliary.pt"):
        train_auxiliary(args, data, base)
    made_of = {"data": identity(args, data), "base": fingerprint(base)}
    return base, fitting(out / "auxiliary.pt", made_of, steps=args.sft_steps, lr=args.sft_lr, **same)


def main(argv=None):
    """Parse the flags, train what is missing; returns (base, auxiliary)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_common_arguments(parser)
    add_sft_arguments(parser)
    finetune.add_arguments(parser)
    args = finetune.parse(parser, argv, finetune.TRAINING)
    if args.weights:
        data, base = finetune.start(args)
        return base, finetune.ensure_auxiliary(args, data, base, sft_step(args, data.split("train"), attribute_prompts))
    data = load_data(args)
    return ensure_models(args, data)


if __name__ == "__main__":
    command(main)
