"""Stable Diffusion as nanocpo's Model: one frozen base, and the adapter that makes auxiliary,
target or (none) reference of it."""
import copy
import hashlib
import math
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..criteria import Prompt
from ..losses import at_least_float32
from ..model import Model
from ..utils.checkpoint import code_digest, fingerprint, save_checkpoint, unpacked
from ..utils.device import send
from . import clip
from .lora import LoRA


def cached(folder, key, make):
    """The value of make(), computed only if `folder` has no whole file for `key` (a string); folder
    None: nothing is kept."""
    if folder is None:
        return make()
    path = Path(folder) / f"{hashlib.sha256(key.encode()).hexdigest()}.pt"
    try:
        return unpacked(path)
    except Exception:                                             # not there, or damaged
        value = make()
        save_checkpoint(path, value)
        return value


def windows(prompt, tokenizer):
    """Prompt -> Prompts of at most 75 tokens, which are encoded one behind the other: the caption
    with the phrases that fit, then the next phrases, each whole and under its heading. No phrase is
    lost, so winner and loser have one context however long they are. What is too long alone, a
    caption or a phrase, is cut with a warning."""
    fits = lambda part: len(tokenizer.encode(str(part))) <= tokenizer.length - 2
    parts = [Prompt(prompt.caption)]
    for side in ("positive", "negative"):
        for phrase in getattr(prompt, side):
            more = replace(parts[-1], **{side: getattr(parts[-1], side) + (phrase,)})
            parts = parts[:-1] + [more] if fits(more) else parts + [Prompt(**{side: (phrase,)})]
    for part in parts:
        if not fits(part):
            warnings.warn(f"'{str(part)[:60]}...' is cut at {tokenizer.length - 2} tokens; "
                          "make it shorter", stacklevel=2)
    return parts


def recomputed(step, lora, *inputs):
    """Gradient checkpointing of one step of the UNet: only its inputs are kept, and it runs once
    more going back, with the adapter that acted the first time (by then another one may)."""
    adapter = lora.active
    return checkpoint(step, *inputs, use_reentrant=False,
                      context_fn=lambda: (nullcontext(), lora.using(adapter)))


class Backbone:
    """What all models on one base share: its parts, criteria, captions, and the cache of
    encoded prompts."""

    def __init__(self, parts, criteria=None, captions=(), cache=None, size=(512, 512),
                 checkpointing=False, device="cpu"):
        self.parts, self.criteria, self.captions, self.size = parts, criteria, list(captions), size
        for part in (parts.unet, parts.vae, *parts.encoders):
            part.to(device)
        self.lora, self.cache, self.device = LoRA(parts.unet), cache, torch.device(device)
        self.resting = False
        self.config = {"kind": "lora", "size": list(size)}
        self.key = (f"{[encoder.config for encoder in parts.encoders]} "
                    f"{fingerprint(*parts.encoders)} {code_digest(clip.__file__)}" if cache else "")
        if checkpointing:
            for level in (*parts.unet.down_blocks, parts.unet.mid_block, *parts.unet.up_blocks):
                level.step = partial(recomputed, level.step, self.lora)

    def rest(self):
        """From now on text encoders and VAE wait on the CPU and are on the device only while they
        work: what is encoded already is in the cache."""
        self.resting = True
        for part in (self.parts.vae, *self.parts.encoders):
            part.to("cpu")

    @contextmanager
    def awake(self, *parts):
        """Inside the with-block these parts are on the device."""
        for part in parts:
            part.to(self.device)
        yield
        for part in parts if self.resting else ():
            part.to("cpu")

    @contextmanager
    def at_hand(self):
        """Inside the with-block text encoders and VAE stay where they are needed first, and nothing
        is kept: for thousands of prompts that are asked once."""
        usual = self.resting, self.cache
        self.resting, self.cache = False, None
        try:
            yield
        finally:
            self.resting, self.cache = usual
            if self.resting:
                self.rest()

    @cached_property
    def digest(self):
        """Of the weights that adapters are trained on."""
        return fingerprint(self.parts.unet, *self.parts.encoders)

    @torch.no_grad()
    def tokens(self, prompts):
        """B Prompts or strings -> (context (B, L, width), pooled (B, width) or None), on the
        device: the text encoders' output. L is 77 for each window of a prompt. Shorter prompts are
        repeated up to a common L: attention to a context that is repeated is attention to the
        context, so a prompt means the same whatever stands beside it."""
        context, pooled = zip(*(self._encode(Prompt(p) if isinstance(p, str) else p)
                                for p in prompts))
        length = math.lcm(*map(len, context))
        context = torch.stack([c.repeat(length // len(c), 1) for c in context])
        return (send(context, self.device),
                send(torch.stack(pooled), self.device) if pooled[0] is not None else None)

    def _encode(self, prompt):
        """One prompt -> (context (L, width), XL's pooled (width,) of its first window or None), on
        the CPU, from the cache if it is there."""
        texts = [str(part) for part in windows(prompt, self.parts.tokenizers[0])]
        ids = [[tokenizer(text) for text in texts] for tokenizer in self.parts.tokenizers]
        zeros = texts == [""] and self.parts.zeros_for_empty

        def run():
            with self.awake(*self.parts.encoders):
                outputs = [encoder(torch.tensor(i, device=self.device))
                           for encoder, i in zip(self.parts.encoders, ids)]
            if len(outputs) == 1:                                         # SD 1, 2: the last layer
                return outputs[0][0].flatten(0, 1).cpu(), None
            context = torch.cat(
                [penultimate for _, penultimate, _ in outputs], dim=-1).flatten(0, 1)
            return tuple((torch.zeros_like(x) if zeros else x).cpu()
                         for x in (context, outputs[1][2][0]))
        return cached(self.cache, f"text {self.key} {zeros} {ids}", run)


class SDModel(Model):
    """Model with the parts of Stable Diffusion. Its only parameters are the adapter's; the base is
    shared and stays frozen."""

    def __init__(self, backbone, adapter=None):
        nn.Module.__init__(self)                                  # it has none of the toy's parts
        # the backbone is no nn.Module, so its weights are not among this model's parameters
        self.backbone, self.adapter, self.text = backbone, adapter, backbone
        self.diffusion, self.config = backbone.parts.diffusion, backbone.config
        self.criteria, self.captions = backbone.criteria, backbone.captions

    @property
    def device(self):
        return self.backbone.device

    def digest(self):
        """Of the adapter's weights; without one, of the base's."""
        return self.backbone.digest if self.adapter is None else super().digest()

    @property
    def latents(self):
        """encode and decode are the VAE's; a property, so that its weights are not among this
        model's parameters."""
        return self.backbone.parts.vae

    def with_adapter(self, rank=8, seed=0):
        """A model on the same base with an adapter of its own, which does nothing yet."""
        return SDModel(self.backbone, self.backbone.lora.new(rank, seed=seed))

    def frozen_copy(self):
        """The same base, and a copy of the adapter that nothing trains."""
        return SDModel(self.backbone, copy.deepcopy(self.adapter)).eval().requires_grad_(False)

    def forward(self, xt, t, prompts):
        """xt (B, 4, h, w), t (B,), prompts: B Prompts or strings, or what text.tokens made of them
        -> as xt, float32 or wider."""
        context, pooled = prompts if isinstance(prompts, tuple) else self.text.tokens(prompts)
        unet, sizes = self.backbone.parts.unet, None
        dtype = unet.conv_in.weight.dtype
        if unet.config.size_dim:
            # original size, crop, target size: the picture is what it looks like
            height, width = (side * self.backbone.parts.vae.factor for side in xt.shape[2:])
            sizes = send(torch.tensor([[height, width, 0, 0, height, width]]), xt.device)
            sizes = sizes.expand(len(xt), 6)
        with self.backbone.lora.using(self.adapter), torch.autocast(xt.device.type, enabled=False):
            pooled = None if pooled is None else pooled.to(dtype)
            return at_least_float32(unet(xt.to(dtype), t, context.to(dtype), pooled, sizes))

    def sample(self, prompts, negative=None, guidance=1.0, steps=30, eta=0.0, seed=0, batch=1,
               axes=()):
        """Model.sample; without `negative` away from the empty prompt. Guidance of 1 or less is
        none, as in diffusers: for distilled models people write 0."""
        with self.backbone.awake(self.backbone.parts.vae):
            return super().sample(prompts, negative or [""] * len(prompts), max(guidance, 1.0),
                                  steps, eta, seed, batch, axes)

    @property
    def latent_shape(self):
        """(4, h, w) for a picture of the base's size, which must be a multiple of 8."""
        if any(side % self.latents.factor for side in self.backbone.size):
            raise ValueError(
                f"the size {self.backbone.size} must be a multiple of {self.latents.factor}")
        return 4, *(side // self.latents.factor for side in self.backbone.size)

    def first_noise(self, count, generator):
        """Model.first_noise, as wide as the base and as large as its schedule begins."""
        noise = super().first_noise(count, generator).to(
            at_least_float32(self.backbone.parts.unet.conv_in.weight).dtype)
        if self.diffusion.spacing == "trailing" and not self.diffusion.fixed_stride:
            noise = noise * (1 - self.diffusion.alpha_bar[-1]).sqrt().to(noise)
        return noise
