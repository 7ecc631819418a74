"""Stable Diffusion as a world (see World in nanocpo/run/stages.py): one frozen base, adapters on it
for auxiliary and target, pictures as latents.

    python train_sft.py --weights sd15 --data paintings --out out_sd  # out_sd/auxiliary.safetensors
    python train_cpo.py --weights sd15 --data paintings --out out_sd  # out_sd/target.safetensors
"""
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from ..criteria import Prompt
from ..data import to_images
from ..folder.expert import held_out
from ..run.settings import knobs
from ..run.stages import alignment_step
from ..utils import ranks
from ..utils.checkpoint import CURE, is_finished, load_checkpoint, stopped
from ..utils.device import pick_device
from ..utils.files import read_text
from ..utils.grid import save_grid
from . import lora
from .files import WeightsError
from .latents import load_latents
from .model import Backbone, SDModel
from .report import report
from .weights import load_parts


def open_base(weights, device, dtype=None, cache=None, height=None, width=None):
    """The frozen base that settings.Weights name, as an SDModel without an adapter: it is the
    reference."""
    parts = load_parts(weights.weights, weights.config, weights.tokenizer, weights.variant,
                       getattr(torch, dtype or weights.dtype), weights.prediction,
                       weights.zero_snr, weights.vae)
    size = (weights.resolution,) * 2 if weights.resolution else parts.size
    size = height or size[0], width or size[1]
    for flag, value in (("resolution", weights.resolution), ("bucket-step", weights.bucket_step),
                        ("height", height), ("width", width)):
        if value and value % parts.vae.factor:
            raise ValueError(f"--{flag} {value} must be a multiple of {parts.vae.factor}")
    return SDModel(Backbone(parts, cache=cache, size=size, checkpointing=weights.checkpointing,
                            device=device))


def with_lora(base, *files, merge_text=False):
    """The base with the adapters of files (FILE or FILE:STRENGTH), added up. merge_text: what they
    say of the text encoders is merged into them; else it is refused."""
    parts, names = base.backbone.parts, ("text_encoder", "text_encoder_2")
    networks, loaded = {"unet": parts.unet} | dict(zip(names, parts.encoders)), []
    for path, strength in map(lora.named, files):
        pairs = lora.load(path, networks)
        say_if_older(path)
        if not merge_text and pairs.keys() - {"unet"}:
            raise WeightsError(f"{path}: it adapts the text encoder too, which all models share in "
                               "training; give one for the UNet alone")
        for name in pairs.keys() - {"unet"}:
            lora.merge(networks[name], lora.together([(pairs[name], strength)]))
        loaded.append((pairs.get("unet", {}), strength))
    adapter = lora.Adapter(lora.together(loaded)).to(base.device)
    return SDModel(base.backbone, adapter).eval().requires_grad_(False)


def say_if_older(path):
    """Say so where an adapter's file is of an earlier run than the checkpoint beside it."""
    beside, content = path.with_suffix(".pt"), {}
    if beside.is_file():
        with suppress(ValueError):              # another program's
            content = load_checkpoint(beside)
    if not is_finished(content):
        print(f"{path} is of an earlier run: {beside.name} stopped at step {content['step']} of "
              f"{content['steps']}")


def read_prompts(path):
    """A file with a prompt a line -> [prompts]. Raises ValueError where there is none."""
    try:
        prompts = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"--prompts {path}: cannot be read as UTF-8 text ({error})") from error
    if not prompts:
        raise ValueError(f"--prompts {path}: there is no prompt in it; write one a line")
    return prompts


class StableDiffusion:
    """Raises ValueError where the settings ask for what cannot be trained here."""
    autocast = False                        # --bf16 is the type of the base's weights
    cure = f"{CURE}; as --lora it is used all the same"

    def __init__(self, settings):
        self.settings = settings
        common, cpo, weights = settings.common, settings.cpo, settings.weights
        if cpo.method == "dpo":
            raise ValueError("--method dpo needs pairs of pictures of one shape and caption; with "
                             "--weights use cpo, esd or sft")
        if cpo.paint:
            raise ValueError(f"--paint {cpo.paint}: with --weights CPO trains on the folder's own "
                             "pictures; leave it out")
        self.shown = read_prompts(weights.prompts) if weights.prompts else None
        if weights.prompts and not common.sample_every:
            raise ValueError("--prompts are painted every --sample-every steps; give it too")
        if len(weights.lora or ()) > 1 or any(lora.named(f)[1] != 1 for f in weights.lora or ()):
            raise ValueError("--lora in training is one ready auxiliary, as it is: one file, "
                             "without a strength")
        dtype = "bfloat16" if common.bf16 else weights.dtype
        if dtype == "float16":
            raise ValueError("--dtype float16 is for sampling: small gradients vanish in it; train "
                             "in bfloat16 or float32")
        self.out = Path(common.out)
        base = open_base(weights, pick_device(common.device), dtype,
                         None if weights.no_cache else self.out / "cache")
        self.data = load_latents(common, weights, base)
        backbone = base.backbone
        backbone.criteria, backbone.captions = self.data.criteria, sorted(set(self.data.captions))
        if not weights.no_cache:            # latents and prompts are kept
            backbone.rest()
        self.base = SDModel(backbone)

    def path(self, name):
        return self.out / f"{name}.pt"

    def sources(self):
        diffusion = self.base.diffusion     # one name for what is predicted, and at which noise
        zero = " with zero-terminal SNR" if diffusion.alpha_bar[-1] == 0 else ""
        sources = {"data": self.data.digest(), "prediction": diffusion.prediction + zero}
        if self.settings.weights.tokenizer:     # a flag's own, that is no part of the base
            tokenizers = self.base.backbone.parts.tokenizers
            sources["tokenizer"] = " ".join(tokenizer.digest() for tokenizer in tokenizers)
        return sources

    def given(self, name):
        if name == "base":
            return self.base
        path, lora_file = self.out / f"{name}.safetensors", self.settings.weights.lora
        if lora_file:
            print(f"{lora_file[0]}: used as it is")
            return with_lora(self.base, *lora_file)
        if path.is_file() and not self.path(name).is_file():
            # brought from elsewhere, or its checkpoint, which would tell, was deleted
            print(f"{path}: used as it is; delete it to train another")
            return with_lora(self.base, path)
        return None

    def stored(self, name, base):
        path = self.out / f"{name}.safetensors"           # only written when it is ready
        if not path.is_file():
            return None
        content = load_checkpoint(self.path(name))
        if stopped(self.path(name), content, self.settings.common.resume):
            return None                                   # its files are of a run before
        return path, with_lora(base, path), content.get("made_of")

    def new_base(self):
        raise AssertionError("the base of Stable Diffusion is a file, see given()")

    def trainable(self, base):
        return base.with_adapter(self.settings.weights.rank, self.settings.common.seed)

    def publish(self, model, name):
        path = self.out / f"{name}.safetensors"
        if ranks.first():
            parts, leaves = model.backbone.parts, self.data.criteria.leaves
            # the auxiliary reads phrases, the target plain captions
            told = lora.describe(name, model.adapter, parts, model.backbone.size,
                                 [leaf.positive for leaf in leaves] if name == "auxiliary" else ())
            lora.save(model.adapter, path, metadata=told)
            lora.save(model.adapter, self.out / f"{name}_kohya.safetensors", "kohya",
                      parts.version == "xl", told)
            print(f"{path} written")
        ranks.wait()
        return with_lora(self.base, path) if name == "auxiliary" else model

    def pictures(self, name):
        how = self.settings.report

        def paint(average, step):
            known = self.base.captions
            captions = self.shown or [known[i % len(known)] for i in range(4)]
            images = np.concatenate([
                to_images(model.sample(captions, guidance=how.guidance, steps=how.sampling_steps,
                                       seed=self.settings.common.seed))
                for model in (self.base, average)])
            save_grid(self.out / "samples" / f"{name}_{step:05d}.png", images, captions * 2,
                      columns=len(captions), zoom=1, titles=["base", f"{name}, step {step}"])
        return paint

    def wants_auxiliary(self):
        return bool(self.settings.weights.lora)           # as the judge of --method sft

    def report(self, base, auxiliary, target, seconds):
        if not ranks.first():
            return None
        held = held_out(self.data)
        # so that every timestep bin is measured
        evenly = self.settings.changed(method="cpo", lean=1.0)
        step = alignment_step(evenly, held, base, auxiliary)
        columns = self.data.criteria.columns(self.settings.cpo.criteria)
        return report(self.settings, held, base, auxiliary, target, columns, step)


# --- nanocpo/folder/propose.py

class StableDiffusionJudge:
    """What folder/propose.py asks of Stable Diffusion (see Judge in nanocpo/folder/proposals.py).
    Raises ValueError without an auxiliary."""

    def __init__(self, how, weights, criteria):
        if not weights.lora:
            raise ValueError("--weights needs --lora: the auxiliary's adapter, for example "
                             "out_sd/auxiliary.safetensors")
        self.how, self.weights, self.criteria = how, weights, criteria
        self.model = with_lora(open_base(weights, how.device), *weights.lora, merge_text=True)

    def pictures(self, rows=None):
        return load_latents(self.how, self.weights, self.model, rows)


# --- sample.py

class StableDiffusionPainter:
    """What sample.py asks of Stable Diffusion. --positive and --negative are phrases here: they
    stand in the prompts as they did in training, the negative ones in the prompt to guide away
    from."""
    zoom, columns = 1, 4

    def __init__(self, sampling, weights):
        self.sampling = sampling
        if sampling.judge:
            raise ValueError("--judge: the critic knows the painter's pictures only; leave it out "
                             "with --weights")
        if "all" in (*sampling.positive, *sampling.negative):
            raise ValueError("--positive all and --negative all: a base knows no tree; with "
                             "--weights name the phrases")
        model = open_base(weights, sampling.device, height=sampling.height, width=sampling.width)
        self.weights = weights
        self.model = with_lora(model, *weights.lora, merge_text=True) if weights.lora else model
        self.captions = sampling.caption or [""]

    def prompts(self, captions):
        """captions: N -> (N Prompts, N Prompts to guide away from; None: the empty prompt)."""
        good, bad = tuple(self.sampling.positive), tuple(self.sampling.negative)
        # without guidance one prompt carries both sides
        beside = bad if self.sampling.guidance <= 1 else ()
        return ([Prompt(c, good, beside) for c in captions],
                [Prompt(c, (), bad) for c in captions] if bad else None)

    def axes(self, captions):
        """As ToyPainter.axes; a name is a pair of phrases, good / bad."""
        found = []
        for name, scale in knobs(self.sampling.axis):
            good, slash, bad = (part.strip() for part in name.partition("/"))
            if not (good and slash and bad):
                raise ValueError(f"--axis '{name}': with --weights write both phrases, good / bad")
            found.append((scale, [Prompt(c, (good,), ()) for c in captions],
                          [Prompt(c, (), (bad,)) for c in captions]))
        return found

    def labels(self, images, captions):
        """What stands under each picture."""
        return captions

    def notes(self, number, prompt, away):
        """What makes picture `number` again: {key: text}; `parameters` is in the words that most
        programs read."""
        how, (height, width) = self.sampling, self.model.backbone.size
        away = str(away or "") if how.guidance > 1 else ""
        settings = {"Steps": how.steps, "CFG scale": how.guidance, "Seed": how.seed,
                    "Size": f"{width}x{height}", "Model": Path(self.weights.weights).stem,
                    # of the seed: they differ in their noise
                    "Picture": number, "eta": how.eta,
                    "LoRA": " ".join(map(str, self.weights.lora or ()))}
        listed = ", ".join(f"{key}: {value}" for key, value in settings.items() if value != "")
        return {"prompt": str(prompt), "negative_prompt": away, "seed": str(how.seed),
                "parameters": f"{prompt}\nNegative prompt: {away}\n{listed}"}
