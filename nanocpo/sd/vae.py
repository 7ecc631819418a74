"""Stable Diffusion's autoencoder (2112.10752): pictures to latents of an eighth of the size, and back.

Parameter names are those of diffusers' AutoencoderKL. Every GroupNorm here has eps 1e-6, unlike the UNet's residual blocks.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..losses import wide
from ..unet import Downsample, ResBlock, Upsample

EPS = 1e-6


@dataclass
class VAEConfig:
    """The defaults are those of all public Stable Diffusion autoencoders; XL has scale 0.13025."""
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    channels: tuple = (128, 256, 512, 512)
    layers: int = 2                         # residual blocks of a level of the encoder; the decoder has one more
    groups: int = 32
    scale: float = 0.18215                  # latents times this have about unit variance


class MidAttention(nn.Module):
    """Self-attention of all pixels with one head as wide as the picture's channels."""

    def __init__(self, dim, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, dim, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x):
        tokens = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        out = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + rearrange(self.to_out(out), "b (h w) c -> b c h w", h=x.shape[2])


class Half(Downsample):
    """Half the size, padded on the right and below only: so it was trained."""

    def __init__(self, dim):
        super().__init__(dim)
        self.conv.padding = (0, 0)

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Double(Upsample):
    """Twice the size."""

    def forward(self, x):
        return super().forward(x, [2 * side for side in x.shape[2:]])


class Blocks(nn.Module):
    """One level: residual blocks, then a change of size; or the middle: two residual blocks with attention between them."""

    def __init__(self, c_in, c_out, count, groups, resize=None, attention=False):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out, None, groups, 0.0, EPS) for i in range(count))
        if attention:
            self.attentions = nn.ModuleList([MidAttention(c_out, groups)])
        if resize:
            name, kind = resize
            setattr(self, name, nn.ModuleList([kind(c_out)]))

    def forward(self, x):
        first, *rest = self.resnets
        between = getattr(self, "attentions", ())
        for module in (first, *between, *rest, *getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())):
            x = module(x)
        return x


class Coder(nn.Module):
    """The encoder (down: levels, then the middle) or the decoder (the middle, then levels)."""

    def __init__(self, c_in, c_out, channels, layers, groups, down):
        super().__init__()
        resize, last = ("downsamplers", Half) if down else ("upsamplers", Double), len(channels) - 1
        self.conv_in = nn.Conv2d(c_in, channels[0], 3, padding=1)
        levels = nn.ModuleList(Blocks(channels[max(i - 1, 0)], c, layers, groups, resize if i < last else None) for i, c in enumerate(channels))
        self.mid_block = Blocks(*[channels[-1] if down else channels[0]] * 2, 2, groups, attention=True)
        setattr(self, "down_blocks" if down else "up_blocks", levels)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], c_out, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in (*getattr(self, "down_blocks", ()), self.mid_block, *getattr(self, "up_blocks", ())):
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """`encode`, `decode` and `clip` are the interface of the toy's latents (nanocpo/model.py)."""
    clip = None                             # no bounds are known for these latents

    def __init__(self, config):
        super().__init__()
        self.config, latent, channels = config, config.latent_channels, tuple(config.channels)
        self.encoder = Coder(config.in_channels, 2 * latent, channels, config.layers, config.groups, down=True)
        self.decoder = Coder(latent, config.out_channels, channels[::-1], config.layers + 1, config.groups, down=False)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1), nn.Conv2d(latent, latent, 1)

    @property
    def factor(self):
        """How many pixels a latent stands for, along each side."""
        return 2 ** (len(self.config.channels) - 1)

    def moments(self, images):
        """Pictures (B, 3, H, W) in [-1, 1] -> mean and standard deviation of their latents, not yet scaled."""
        mean, logvar = self.quant_conv(self.encoder(images.to(self.quant_conv.weight))).chunk(2, dim=1)
        return mean, (logvar.clamp(-30, 20) / 2).exp()

    def encode(self, images):
        """Pictures -> the mean of their scaled latents, float32 or wider. The deviation around it is dropped (ours): it is small,
        and so the same picture always has the same latents, which can be computed once and kept. Tensors with the latents'
        number of channels are such latents, and come back as they are."""
        if images.shape[1] == self.config.latent_channels:
            return images
        return self.config.scale * wide(self.moments(images)[0])

    def decode(self, latents):
        """Scaled latents -> pictures, roughly in [-1, 1]."""
        latents = latents.to(self.post_quant_conv.weight) / self.config.scale
        return wide(self.decoder(self.post_quant_conv(latents)))
