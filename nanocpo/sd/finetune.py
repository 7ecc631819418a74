"""The two stages on Stable Diffusion: what train_sft.py, train_cpo.py and sample.py need with --weights.

    python train_sft.py --weights sd15 --data paintings --out out_sd        # -> out_sd/auxiliary.safetensors
    python train_cpo.py --weights sd15 --data paintings --out out_sd        # -> out_sd/target.safetensors

Pictures of any size are brought to a few sizes of about the same area ("buckets"), and their latents are computed once.
"""
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .. import lora
from ..cli import above
from ..criteria import Criteria, Prompt
from ..data import Batch, Paintings, open_picture, read_folder, to_images, to_tensor
from ..grid import save_grid
from ..model import fingerprint, load_checkpoint
from ..train import Recipe, changed, differing, fit
from .files import WeightsError
from .model import Base, SDModel, cached
from .report import held_out, report
from .weights import load_parts

# what the scripts' flags default to with --weights; ours, not tuned on real weights
TRAINING = {"batch": 1, "accumulate": 4, "sft_steps": 2000, "sft_lr": 1e-4, "steps": 500, "lr": 1e-4, "sample_every": 0, "samples": 16,
            "sampling_steps": 20, "guidance": 7.5, "paint": 0}
SAMPLING = {"guidance": 7.5, "steps": 30, "count": 1}


def add_arguments(parser):
    """The flags of Stable Diffusion, the same in all scripts."""
    group = parser.add_argument_group("Stable Diffusion (README, section Stable Diffusion)")
    group.add_argument("--weights", help="a folder in diffusers' layout or a single .safetensors or .ckpt file of Stable Diffusion 1, 2, XL")
    group.add_argument("--lora", help="an adapter: in train_cpo.py the ready auxiliary, in sample.py what to paint with")
    group.add_argument("--config", help="single file: a folder in diffusers' layout whose configs and tokenizer to use")
    group.add_argument("--tokenizer", help="single file: merges.txt, tokenizer.json or a folder with one")
    group.add_argument("--variant", help="folder: read the files of this variant, for example fp16")
    group.add_argument("--prediction", choices=["eps", "v"], help="what the model predicts, if its files do not say (single file of SD 2)")
    group.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the frozen base (--bf16: bfloat16); "
                       "float16 is for sampling only")
    group.add_argument("--resolution", type=above(0), help="side of a square picture, other shapes have about the same area; default: what the "
                       "base was trained on (512; 768 for a single file of SD 2, 1024 for XL)")
    group.add_argument("--bucket-step", type=above(0), default=64, help="sides of pictures are multiples of this")
    group.add_argument("--rank", type=above(0), default=8, help="of the adapters")
    group.add_argument("--checkpointing", action="store_true", help="recompute activations: less memory, more time")
    group.add_argument("--no-cache", action="store_true", help="do not keep latents and encoded prompts in OUT/cache")


def parse(parser, argv, values):
    """Parse the flags; with --weights those that the toy has too have other defaults, `values`."""
    if parser.parse_known_args(argv)[0].weights:
        parser.set_defaults(**values)
    args = parser.parse_args(argv)
    if args.lora and not args.weights:
        parser.error("--lora needs --weights: an adapter is nothing without its base")
    args.dtype = "bfloat16" if getattr(args, "bf16", False) else args.dtype
    return args


def open_base(args, cache=None):
    """The frozen base that the flags name, as an SDModel without an adapter: it is the reference."""
    parts = load_parts(args.weights, args.config, args.tokenizer, args.variant, getattr(torch, args.dtype), args.prediction)
    args.resolution = args.resolution or parts.resolution
    for flag in ("resolution", "bucket_step"):
        if vars(args)[flag] % parts.vae.factor:
            raise ValueError(f"--{flag.replace('_', '-')} {vars(args)[flag]} must be a multiple of {parts.vae.factor}")
    return SDModel(Base(parts, cache=cache, size=(args.resolution,) * 2, checkpointing=args.checkpointing, device=args.device))


# ---- pictures

def buckets(resolution, step=64):
    """[(width, height)]: multiples of `step` with an area of at most resolution^2, for shapes from 1:2 to 2:1."""
    area, sizes = resolution ** 2, set()
    for width in range(step, 2 * resolution + 1, step):
        height = area // width // step * step
        if height and max(width, height) <= 2 * min(width, height):
            sizes |= {(width, height), (height, width)}
    if not sizes:
        raise ValueError(f"--resolution {resolution} is less than --bucket-step {step}")
    return sorted(sizes)


def nearest(size, sizes):
    """The bucket whose shape is nearest to (width, height); of equal shapes the largest."""
    return min(sizes, key=lambda b: (abs(np.log(b[0] / b[1]) - np.log(size[0] / size[1])), -b[0] * b[1]))


@dataclass
class LatentPaintings(Paintings):
    """Paintings whose `images` are latents (4, h, w) in an object array (N,), of several shapes."""

    def batch(self, indices):
        """Indices (B,) -> Batch of latents. All of a batch have the shape of its first picture; an index of another shape stands for
        one of that shape (the index modulo their number), so a random batch stays random and buckets come as often as their pictures."""
        alike = [i for i in range(len(self)) if self.images[i].shape == self.images[indices[0]].shape]
        part = self.take([i if i in alike else alike[i % len(alike)] for i in indices])
        return Batch(torch.stack(list(part.images)), part.captions, part.annotations)


def load_latents(args, base):
    """The folder --data as LatentPaintings. The cache's key holds the VAE's weights, the picture's bytes and its size."""
    if not Path(args.data).is_dir():
        raise ValueError(f"--data {args.data}: with --weights it is a folder with pictures and metadata.jsonl")
    sizes, vae, cache = buckets(args.resolution, args.bucket_step), base.latents, base.text.cache
    enlarged = []
    key, bar = f"{vae.config} {fingerprint(vae)}" if cache else "", tqdm(desc="latents", leave=False, mininterval=2)

    def latents(path):
        def shape(size):
            bucket = nearest(size, sizes)
            if size[0] < bucket[0] or size[1] < bucket[1]:
                enlarged.append(path.name)
            return bucket
        image = open_picture(path, shape)
        bar.update()
        encode = lambda: vae.encode(to_tensor(np.array(image)[None]).to(base.device))[0].cpu()
        with torch.no_grad():
            return cached(cache, f"latents {key} {image.size} {hashlib.sha256(path.read_bytes()).hexdigest()}", encode)

    criteria = Criteria.load(args.tree) if args.tree else None
    criteria, rows, skipped = read_folder(args.data, criteria, latents, args.skip_bad)
    bar.close()
    if enlarged:
        print(f"{len(enlarged)} of {len(rows)} pictures are enlarged, since they are smaller than --resolution {args.resolution} asks "
              f"({enlarged[0]}, ...); their blur is learned too")
    images, captions, annotations = zip(*rows)
    return LatentPaintings(criteria, np.fromiter(images, object), list(captions), np.stack(annotations), skipped)


# ---- training

def start(args):
    """(data, base) for the training scripts."""
    if getattr(args, "method", None) == "dpo":
        raise ValueError("--method dpo needs pairs of pictures of one shape and caption; with --weights use cpo, esd or sft")
    if getattr(args, "paint", 0):
        raise ValueError(f"--paint {args.paint}: with --weights CPO trains on the folder's own pictures; leave it out")
    if args.dtype == "float16":
        raise ValueError("--dtype float16 is for sampling: small gradients vanish in it; train in bfloat16 or float32")
    base = open_base(args, None if args.no_cache else Path(args.out) / "cache")
    data = load_latents(args, base)
    base.text.criteria, base.text.captions = data.criteria, sorted(set(data.captions))
    return data, SDModel(base.base)


def sources(data, base):
    """What an adapter is made of, {name: digest}."""
    return {"data": data.digest(), "base": base.base.digest, "prediction": base.diffusion.prediction}


def train(args, data, base, loss_step, name, steps, lr, made_of):
    """Train a new adapter on the base -> OUT/NAME.pt (to resume) and OUT/NAME.safetensors, kohya's layout in NAME_kohya.safetensors;
    returns (the averaged model, frozen; the last log line). made_of: what of this stage must be the same to resume it (fit's `run`)."""
    out, model = Path(args.out), base.with_adapter(args.rank, args.seed)

    def pictures(average, step):
        captions = [base.captions[i % len(base.captions)] for i in range(4)]
        images = np.concatenate([to_images(m.sample(captions, guidance=args.guidance, steps=args.sampling_steps, seed=args.seed))
                                 for m in (base, average)])
        save_grid(out / "samples" / f"{name}_{step:05d}.png", images, captions * 2, columns=4, zoom=1, titles=["base", f"{name}, step {step}"])

    run = sources(data, base) | {"rank": args.rank, "batch": args.batch}
    average, line = fit(model, loss_step, Recipe(steps, lr), out / f"{name}.pt", name=name, seed=args.seed, accumulate=args.accumulate,
                        resume=args.resume, save_every=args.save_every, pictures=pictures, sample_every=args.sample_every,
                        run=run | made_of)
    lora.save(average.adapter, out / f"{name}.safetensors")
    lora.save(average.adapter, out / f"{name}_kohya.safetensors", "kohya")
    print(f"{out / name}.safetensors written")
    return average, line


def with_lora(base, path, merge_text=False):
    """The base with the adapter of a file. merge_text: what it says of the text encoders is merged into them; else it is refused."""
    parts, names = base.base.parts, ("text_encoder", "text_encoder_2")
    pairs = lora.load(path, {"unet": parts.unet} | dict(zip(names, parts.encoders)))
    if not merge_text and pairs.keys() - {"unet"}:
        raise WeightsError(f"{path}: it adapts the text encoder too, which all models share in training; give one for the UNet alone")
    for name, encoder in zip(names, parts.encoders):
        lora.merge(encoder, pairs.get(name, {}))
    return SDModel(base.base, lora.Adapter(pairs.get("unet", {})).to(base.device)).eval().requires_grad_(False)


def ensure_auxiliary(args, data, base, loss_step):
    """The auxiliary: --lora's adapter, or OUT's (which is only written when it is ready, and trained now if it is not there). Says so if
    OUT's, as far as its checkpoint is still there, was trained on other data or another base: it may serve on, or be the wrong one."""
    path = Path(args.lora or Path(args.out) / "auxiliary.safetensors")
    if args.lora:
        print(f"{path}: used as it is")
    elif path.is_file():
        checkpoint, other = path.with_suffix(".pt"), ""
        if checkpoint.is_file():
            other = " and ".join(differing(load_checkpoint(checkpoint).get("run", {}), sources(data, base)))
        print(f"{path}: used as it is" + (f" (trained with another {other}: other files or flags)" if other else "") + "; delete it to train another")
    else:
        train(args, data, base, loss_step, "auxiliary", args.sft_steps, args.sft_lr, {})
    return with_lora(base, path)


def align(args, data, base, sft_step, method_step, ingredients):
    """Stage 2: the target, an adapter beside the auxiliary's, and what can be said of it without a critic (report.py); returns that
    report, or the last log line with --samples 0. sft_step and method_step(args, data, base, auxiliary): the two stages' loss steps;
    ingredients(args, auxiliary): what decides the second (fit's `run`)."""
    columns = data.criteria.columns(args.criteria)                        # a wrong name is said before the training, not after
    needed = args.method != "sft" or args.lora                            # --lora: as the judge of --method sft
    auxiliary = ensure_auxiliary(args, data, base, sft_step) if needed else None
    step = method_step(args, data.split("train"), base, auxiliary)
    target, line = train(args, data, base, step, args.name, args.steps, args.lr, ingredients(args, auxiliary))
    if args.samples == 0:
        return line
    held, evenly = held_out(data), changed(args, method="cpo", lean=1.0)                    # so that every timestep bin is measured
    return report(args, held, base, auxiliary, target, columns, method_step(evenly, held, base, auxiliary))


def paint(args):
    """sample.py with --weights: the grid in --out; returns the pictures uint8 (N, H, W, 3). --positive and --negative are phrases here:
    they stand in the prompts as they did in training, the negative ones in the prompt to guide away from."""
    if args.judge:
        raise ValueError("--judge: the critic knows the painter's pictures only; leave it out with --weights")
    if "all" in args.positive + args.negative:
        raise ValueError("--positive all and --negative all: a base knows no tree; with --weights name the phrases")
    model = open_base(args)
    model = with_lora(model, args.lora, merge_text=True) if args.lora else model
    captions = [c for c in args.caption or [""] for _ in range(args.count)]
    beside = tuple(args.negative) if args.guidance == 1 else ()           # without guidance one prompt carries both sides
    prompts = [Prompt(c, tuple(args.positive), beside) for c in captions]
    away = [Prompt(c, (), tuple(args.negative)) for c in captions] if args.negative else None
    images = to_images(model.sample(prompts, away, args.guidance, args.steps, args.eta, args.seed))
    save_grid(args.out, images, captions, columns=min(len(images), 4), zoom=1)
    print(f"{args.out}: {len(images)} pictures")
    return images
