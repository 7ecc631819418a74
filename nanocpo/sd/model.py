"""Stable Diffusion as nanocpo's Model: one frozen base, and the adapter that makes auxiliary, target or (none) reference of it."""
import copy
import hashlib
import math
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..criteria import Prompt
from ..diffusion import guide
from ..lora import LoRA
from ..losses import wide
from ..model import fingerprint, save_atomic


class Cache:
    """Tensors in files that are named by a key; folder None: nothing is kept."""

    def __init__(self, folder=None):
        self.folder = Path(folder) if folder else None

    def get(self, key, make):
        """The value of make(), computed only if no file for `key` (a string) is there, or if it is damaged."""
        if self.folder is None:
            return make()
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.pt"
        try:
            return torch.load(path, weights_only=True)
        except Exception:
            value = make()
            save_atomic(path, value)
            return value


def windows(prompt, tokenizer):
    """Prompt -> Prompts of at most 75 tokens, which are encoded one behind the other: the caption with the phrases that fit, then the
    next phrases, each whole and under its heading. No phrase is lost, so winner and loser have one context however long they are. What is
    too long alone, a caption or a phrase, is cut with a warning."""
    fits = lambda part: len(tokenizer.encode(str(part))) <= tokenizer.length - 2
    parts = [Prompt(prompt.caption)]
    for side in ("positive", "negative"):
        for phrase in getattr(prompt, side):
            more = replace(parts[-1], **{side: getattr(parts[-1], side) + (phrase,)})
            parts = parts[:-1] + [more] if fits(more) else parts + [Prompt(**{side: (phrase,)})]
    for part in parts:
        if not fits(part):
            warnings.warn(f"'{str(part)[:60]}...' is cut at {tokenizer.length - 2} tokens; make it shorter", stacklevel=2)
    return parts


def recomputed(step, lora, *inputs):
    """Gradient checkpointing of one step of the UNet: only its inputs are kept, and it runs once more going back, with the adapter
    that acted the first time (by then another one may)."""
    adapter = lora.active

    def run(*inputs):
        with lora.using(adapter):
            return step(*inputs)
    return checkpoint(run, *inputs, use_reentrant=False) if torch.is_grad_enabled() else run(*inputs)


class Base:
    """What all models on one base share: its parts, criteria, captions, and the cache of encoded prompts."""

    def __init__(self, parts, criteria=None, captions=(), cache=None, size=(512, 512), checkpointing=False, device="cpu"):
        self.parts, self.criteria, self.captions, self.size = parts, criteria, list(captions), size
        for part in (parts.unet, parts.vae, *parts.encoders):
            part.to(device)
        self.lora, self.cache = LoRA(parts.unet), Cache(cache)
        self.config = {"kind": "lora", "size": list(size)}
        self.key = f"{[encoder.config for encoder in parts.encoders]} {fingerprint(*parts.encoders)}" if cache else ""
        if checkpointing:
            for level in (*parts.unet.down_blocks, parts.unet.mid_block, *parts.unet.up_blocks):
                level.step = partial(recomputed, level.step, self.lora)

    @property
    def device(self):
        return self.parts.unet.conv_in.weight.device

    @torch.no_grad()
    def tokens(self, prompts):
        """B Prompts or strings -> (context (B, L, width), pooled (B, width) or None), on the device: the text encoders' output. L is 77
        for each window of a prompt. Shorter prompts are repeated up to a common L: attention to a context that is repeated is attention
        to the context, so a prompt means the same whatever stands beside it."""
        context, pooled = zip(*(self._encode(Prompt(p) if isinstance(p, str) else p) for p in prompts))
        length = math.lcm(*map(len, context))
        context = torch.stack([c.repeat(length // len(c), 1) for c in context])
        return context.to(self.device), torch.stack(pooled).to(self.device) if pooled[0] is not None else None

    def _encode(self, prompt):
        """One prompt -> (context (L, width), XL's pooled (width,) of its first window or None), on the CPU, from the cache if it is there."""
        texts = [str(part) for part in windows(prompt, self.parts.tokenizers[0])]
        ids = [[tokenizer(text) for text in texts] for tokenizer in self.parts.tokenizers]
        zeros = texts == [""] and self.parts.zeros_for_empty

        def run():
            outputs = [encoder(torch.tensor(i, device=self.device)) for encoder, i in zip(self.parts.encoders, ids)]
            if len(outputs) == 1:                                         # SD 1, 2: the last layer
                return outputs[0][0].flatten(0, 1).cpu(), None
            context = torch.cat([penultimate for _, penultimate, _ in outputs], dim=-1).flatten(0, 1)
            return tuple((torch.zeros_like(x) if zeros else x).cpu() for x in (context, outputs[1][2][0]))
        return self.cache.get(f"text {self.key} {zeros} {ids}", run)


class SDModel(nn.Module):
    """The interface of nanocpo.model.Model. Its only parameters are the adapter's; the base is shared and stays frozen."""

    def __init__(self, base, adapter=None):
        super().__init__()
        self.base, self.adapter, self.text, self.diffusion = base, adapter, base, base.parts.diffusion         # base is no nn.Module
        self.criteria, self.captions, self.config = base.criteria, base.captions, base.config

    @property
    def device(self):
        return self.base.device

    @property
    def latents(self):
        """encode and decode are the VAE's; a property, so that its weights are not among this model's parameters."""
        return self.base.parts.vae

    def with_adapter(self, rank=8, seed=0):
        """A model on the same base with an adapter of its own, which does nothing yet."""
        return SDModel(self.base, self.base.lora.new(rank, seed=seed))

    def frozen_copy(self):
        """The same base, and a copy of the adapter that nothing trains."""
        return SDModel(self.base, copy.deepcopy(self.adapter)).eval().requires_grad_(False)

    def forward(self, xt, t, prompts):
        """xt (B, 4, h, w), t (B,), prompts: B Prompts or strings, or what text.tokens made of them -> as xt, float32 or wider."""
        context, pooled = prompts if isinstance(prompts, tuple) else self.text.tokens(prompts)
        unet, sizes = self.base.parts.unet, None
        dtype = unet.conv_in.weight.dtype
        if unet.config.size_dim:                                  # original size, crop, target size: the picture is what it looks like
            height, width = (side * self.base.parts.vae.factor for side in xt.shape[2:])
            sizes = torch.tensor([[height, width, 0, 0, height, width]], device=xt.device).expand(len(xt), 6)
        with self.base.lora.using(self.adapter), torch.autocast(xt.device.type, enabled=False):
            return wide(unet(xt.to(dtype), t, context.to(dtype), None if pooled is None else pooled.to(dtype), sizes))

    @torch.no_grad()
    def sample(self, prompts, negative=None, guidance=1.0, steps=30, eta=0.0, seed=0, batch=1, size=None):
        """N prompts -> pictures (N, 3, H, W), roughly in [-1, 1]. With guidance other than 1 they are guided away from `negative`
        (None: the empty prompt). size (H, W) is a multiple of 8. The first noise of picture i depends on seed and i only."""
        height, width = size or self.base.size
        factor = self.latents.factor
        if height % factor or width % factor:
            raise ValueError(f"the size {height}x{width} must be a multiple of {factor}")
        generator = torch.Generator().manual_seed(seed)
        noise = torch.stack([torch.randn(4, height // factor, width // factor, generator=generator) for _ in prompts])
        noise, out = noise.to(wide(self.base.parts.unet.conv_in.weight).dtype), []
        if self.diffusion.spacing == "trailing" and self.diffusion.sampler == "list":
            noise = noise * (1 - self.diffusion.alpha_bar[self.diffusion.timesteps(steps)[0]]).sqrt().to(noise)
        for start in range(0, len(prompts), batch):
            asked = list(prompts[start:start + batch])
            if guidance != 1:
                asked += negative[start:start + batch] if negative else [""] * len(asked)
            some = self.text.tokens(asked)

            def predict(xt, t):
                if guidance == 1:
                    return self(xt, t, some)
                return guide(*self(torch.cat([xt, xt]), torch.cat([t, t]), some).chunk(2), guidance)
            latents = self.diffusion.sample(predict, noise[start:start + batch].to(self.device), steps, eta, generator)
            out.append(self.latents.decode(latents))
        return torch.cat(out)
