"""Stable Diffusion's autoencoder (2112.10752): pictures to latents of an eighth of the size,
and back.

Parameter names are those of diffusers' AutoencoderKL. Every GroupNorm here has eps 1e-6, unlike the
UNet's residual blocks.
"""
from collections import OrderedDict
from dataclasses import dataclass

from einops import rearrange
from torch import nn

from ..losses import at_least_float32
from ..unet import Attention, ResBlock

EPS, LATENT = 1e-6, 4               # LATENT: channels of the latents of all these autoencoders


@dataclass
class VAEConfig:
    """The defaults are those of all public Stable Diffusion autoencoders; XL has scale 0.13025."""
    channels: tuple = (128, 256, 512, 512)
    layers: int = 2                         # residual blocks of a level of the encoder; the decoder
                                            # has one more
    groups: int = 32
    scale: float = 0.18215                  # latents times this have about unit variance


class MidAttention(Attention):
    """Self-attention of all pixels with one head as wide as the picture's channels."""

    def __init__(self, dim, groups):
        super().__init__(dim, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, dim, EPS)

    def forward(self, x):
        tokens = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        return x + rearrange(super().forward(tokens), "b (h w) c -> b c h w", h=x.shape[2])


class Middle(nn.Module):
    """Two residual blocks with attention between them."""

    def __init__(self, dim, groups):
        super().__init__()
        self.resnets, self.attentions = (resnets(dim, dim, 2, groups),
                                         nn.Sequential(MidAttention(dim, groups)))

    def forward(self, x):
        return self.resnets[1](self.attentions(self.resnets[0](x)))


def chain(**parts):
    """The parts one after the other, under their names."""
    return nn.Sequential(OrderedDict(parts))


def resnets(c_in, c_out, count, groups):
    """`count` residual blocks, the first of which changes the width."""
    return nn.Sequential(*(ResBlock(c_in if i == 0 else c_out, c_out, None, groups, 0.0, EPS)
                           for i in range(count)))


def levels(channels, layers, groups, name, resize):
    """Residual blocks for each of `channels`, and resize(width) behind all but the last."""
    out = [chain(resnets=resnets(c_in, c_out, layers, groups))
           for c_in, c_out in zip(channels[:1] + channels, channels)]
    for level, width in zip(out[:-1], channels):
        level.add_module(name, nn.Sequential(resize(width)))
    return nn.Sequential(*out)


def half(dim):
    """Half the size, padded on the right and below only: so it was trained."""
    return chain(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(dim, dim, 3, stride=2))


def double(dim):
    """Twice the size."""
    return chain(nearest=nn.Upsample(scale_factor=2), conv=nn.Conv2d(dim, dim, 3, padding=1))


class VAE(nn.Module):
    """`encode`, `decode` and `clip` are the interface of the toy's latents (nanocpo/model.py)."""
    clip = None                             # no bounds are known for these latents

    def __init__(self, config):
        super().__init__()
        self.config, channels, layers, groups = (
            config, tuple(config.channels), config.layers, config.groups)
        first, last = channels[0], channels[-1]
        self.factor = 2 ** (len(channels) - 1)  # pixels that a latent stands for, along each side
        self.encoder = chain(conv_in=nn.Conv2d(3, first, 3, padding=1),
                             down_blocks=levels(channels, layers, groups, "downsamplers", half),
                             mid_block=Middle(last, groups),
                             conv_norm_out=nn.GroupNorm(groups, last, EPS), act=nn.SiLU(),
                             conv_out=nn.Conv2d(last, 2 * LATENT, 3, padding=1))
        self.decoder = chain(conv_in=nn.Conv2d(LATENT, last, 3, padding=1),
                             mid_block=Middle(last, groups),
                             up_blocks=levels(channels[::-1], layers + 1, groups, "upsamplers",
                                              double),
                             conv_norm_out=nn.GroupNorm(groups, first, EPS), act=nn.SiLU(),
                             conv_out=nn.Conv2d(first, 3, 3, padding=1))
        self.quant_conv, self.post_quant_conv = (nn.Conv2d(2 * LATENT, 2 * LATENT, 1),
                                                 nn.Conv2d(LATENT, LATENT, 1))

    def encode(self, images):
        """Pictures (B, 3, H, W) in [-1, 1] -> the mean of their scaled latents, float32 or wider.
        The deviation around it, the other half of the channels, is dropped (ours): it is small, and
        so the same picture always has the same latents, which can be computed once and kept."""
        mean, _ = self.quant_conv(self.encoder(images.to(self.quant_conv.weight))).chunk(2, dim=1)
        return self.config.scale * at_least_float32(mean)

    def decode(self, latents):
        """Scaled latents -> pictures, roughly in [-1, 1]."""
        latents = latents.to(self.post_quant_conv.weight) / self.config.scale
        return at_least_float32(self.decoder(self.post_quant_conv(latents)))
