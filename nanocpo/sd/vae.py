"""Stable Diffusion's autoencoder (2112.10752): pictures to latents of an eighth of the size, and back.

Parameter names are those of diffusers' AutoencoderKL. Every GroupNorm here has eps 1e-6, unlike the UNet's residual blocks.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

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


class EncoderDownsample(Downsample):
    """Pads on the right and below only: so it was trained."""

    def __init__(self, dim):
        super().__init__(dim)
        self.conv.padding = (0, 0)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Blocks(nn.Module):
    """The middle (`attention`), or one level: residual blocks, then a change of size."""

    def __init__(self, c_in, c_out, count, groups, resize=None, attention=False):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out, None, groups, 0.0, EPS) for i in range(count))
        if attention:
            self.attentions = nn.ModuleList([MidAttention(c_out, groups)])
        if resize is EncoderDownsample:
            self.downsamplers = nn.ModuleList([resize(c_out)])
        elif resize is Upsample:
            self.upsamplers = nn.ModuleList([resize(c_out)])

    def forward(self, x):
        for i, block in enumerate(self.resnets):
            if i == 1 and hasattr(self, "attentions"):                               # between the middle's two blocks
                x = self.attentions[0](x)
            x = block(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x, [2 * side for side in x.shape[2:]])
        return x


class Encoder(nn.Module):
    """Pictures (B, 3, H, W) -> mean and log-variance, stacked (B, 2 * latent channels, H / 8, W / 8)."""

    def __init__(self, config):
        super().__init__()
        channels, last = config.channels, len(config.channels) - 1
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(Blocks(channels[max(i - 1, 0)], c, config.layers, config.groups,
                                                EncoderDownsample if i < last else None) for i, c in enumerate(channels))
        self.mid_block = Blocks(channels[-1], channels[-1], 2, config.groups, attention=True)
        self.conv_norm_out = nn.GroupNorm(config.groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in [*self.down_blocks, self.mid_block]:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents (B, latent channels, h, w) -> pictures (B, 3, 8h, 8w)."""

    def __init__(self, config):
        super().__init__()
        channels, last = config.channels[::-1], len(config.channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = Blocks(channels[0], channels[0], 2, config.groups, attention=True)
        self.up_blocks = nn.ModuleList(Blocks(channels[max(i - 1, 0)], c, config.layers + 1, config.groups,
                                              Upsample if i < last else None) for i, c in enumerate(channels))
        self.conv_norm_out = nn.GroupNorm(config.groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in [self.mid_block, *self.up_blocks]:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """`encode`, `decode` and `clip` are the interface of the toy's latents (nanocpo/model.py)."""
    clip = None                             # no bounds are known for these latents

    def __init__(self, config):
        super().__init__()
        self.config, self.encoder, self.decoder = config, Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

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


def wide(x):
    """Half precision to float32; float32 and float64 stay."""
    return x if x.dtype == torch.float64 else x.float()
