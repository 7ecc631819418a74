"""Paint with any checkpoint: captions (and attributes) in, a PNG grid out.

    python sample.py --checkpoint out/target.pt --caption "a boat" "a tree" --count 4 --judge
    python sample.py --weights sd15 --lora out_sd/target.safetensors --prompt "a boat on a lake, oil painting"
    python sample.py --checkpoint out/auxiliary.pt --positive all --negative all --guidance 2 --judge

A plain model needs the caption only. With --guidance other than 1 the sample is guided from the negative prompt to the positive one.
"""
import argparse

import numpy as np

from nanocpo.cli import above, command, pick_device
from nanocpo.critic import judge, unmeasured
from nanocpo.data import to_images
from nanocpo.grid import save_grid
from nanocpo.model import load_model
from nanocpo.sd import finetune


def main(argv=None):
    """Parse the flags, sample, write the grid; returns the pictures uint8 (N, H, W, 3)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", default="out/target.pt")
    parser.add_argument("--caption", "--prompt", nargs="+", help="captions; default: all that the model knows")
    parser.add_argument("--positive", nargs="+", default=[], help="attributes to list as good: phrases, leaf names, or all")
    parser.add_argument("--negative", nargs="+", default=[], help="attributes to list as bad; with guidance, to move away from")
    parser.add_argument("--guidance", type=float, default=1.0, help="1: none")
    parser.add_argument("--count", type=above(0), default=4, help="pictures for each caption")
    parser.add_argument("--steps", type=int, default=12, help="sampling steps")
    parser.add_argument("--eta", type=float, default=0.0, help="0: DDIM; 1: as much noise as DDPM")
    parser.add_argument("--seed", type=above(-1), default=0)
    parser.add_argument("--judge", action="store_true", help="write the critic's verdict under each picture")
    parser.add_argument("--device", type=pick_device, default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--out", default="samples.png")
    finetune.add_arguments(parser)
    args = finetune.parse(parser, argv, finetune.SAMPLING)
    if args.weights:
        return finetune.paint(args)
    model = load_model(args.checkpoint, args.device)
    criteria = model.criteria
    if args.judge and unmeasured(criteria, model.captions):
        raise ValueError(f"--judge: the critic has no measure for {', '.join(unmeasured(criteria, model.captions))}; leave it out")
    good, bad = ([leaf.name for leaf in criteria.leaves] if words == ["all"] else words for words in (args.positive, args.negative))
    captions = [c for c in args.caption or model.captions for _ in range(args.count)]
    beside = bad if args.guidance == 1 else []                            # without guidance one prompt carries both sides
    prompts = [criteria.prompt(c, criteria.annotation(good, beside)) for c in captions]
    away = [criteria.prompt(c, criteria.annotation((), bad)) for c in captions]
    images = to_images(model.sample(prompts, away, args.guidance, args.steps, args.eta, args.seed))
    labels = list(captions)
    if args.judge:
        verdicts = judge(images, criteria)
        for i, (signs, seen) in enumerate(zip(verdicts.signs, verdicts.captions)):
            faults = [leaf.negative for leaf, sign in zip(criteria.leaves, signs) if sign < 0]
            labels[i] = "\n".join([f"{captions[i]}: seen {seen}", f"{len(faults)} of {len(criteria)} negative"] + faults)
        print(f"#A_neg {np.mean((verdicts.signs < 0).sum(1)):.2f} of {len(criteria)}, "
              f"caption {np.mean([a == b for a, b in zip(captions, verdicts.captions)]):.2f}")
    save_grid(args.out, images, labels, columns=min(len(images), max(args.count, 4)), zoom=5)
    print(f"{args.out}: {len(images)} pictures")
    return images


if __name__ == "__main__":
    command(main)
