"""The denoiser: one compact UNet whose configuration is the toy's,
Stable Diffusion 1.x's, 2.x's or XL's.

Parameter names and block order are those of diffusers' UNet2DConditionModel, so that public weights
fit by configuration alone.
Shapes: B batch, C channels, H W latent size, N = H * W tokens, L context tokens.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


@dataclass
class UNetConfig:
    """Every number that shapes the network. The defaults are the toy's (ours); SD 1.5 is channels
    (320, 640, 1280, 1280), depth (1, 1, 1, 0), heads (8, 8, 8, 8), layers 2, context_dim 768, no
    vector_dim, 32 groups, 4 channels in and out."""
    in_channels: int = 12
    out_channels: int = 12
    channels: tuple = (32, 64, 128)  # width of each level; every level but the last halves the size
    depth: tuple = (0, 0, 0)         # transformer blocks after each residual block of a level
    mid_depth: int = 1
    heads: tuple = (4, 4, 4)
    layers: int = 1                  # residual blocks of a level (one more on the way up)
    context_dim: int = 64            # width of the prompt's tokens
    vector_dim: int | None = 64      # width of the pooled prompt that joins the time embedding
                                     # (as in SDXL); None: none
    size_dim: int | None = None      # SDXL: width of the sinusoid of each of the six size numbers
                                     # inside that vector
    groups: int = 8                  # of every GroupNorm
    dropout: float = 0.0


def sinusoid(t, dim):
    """t (B,) real -> (B, dim) float32 [cos | sin] with frequencies from 1 down to 1 / 10000
    (1706.03762, section 3.5)."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, dtype=torch.float32,
                                                            device=t.device) / (dim // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Embedding(nn.Module):
    """Two linear layers with a SiLU between: for the time and for the pooled prompt."""

    def __init__(self, dim, width):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim, width), nn.Linear(width, width)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class ResBlock(nn.Module):
    """norm, SiLU, conv, + time, norm, SiLU, conv, + shortcut."""

    def __init__(self, c_in, c_out, time_dim, groups, dropout, eps=1e-5):
        super().__init__()
        self.norm1, self.conv1 = (nn.GroupNorm(groups, c_in, eps),
                                  nn.Conv2d(c_in, c_out, 3, padding=1))
        if time_dim:
            self.time_emb_proj = nn.Linear(time_dim, c_out)
        self.norm2, self.conv2 = (nn.GroupNorm(groups, c_out, eps),
                                  nn.Conv2d(c_out, c_out, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, time=None):
        h = self.conv1(F.silu(self.norm1(x)))                   # (B, c_out, H, W)
        if time is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """Multi-head attention from x (B, N, dim) to context (B, L, context_dim), or to x itself."""

    def __init__(self, dim, heads, context_dim=None, dropout=0.0, bias=False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias)
        self.to_k, self.to_v = (nn.Linear(context_dim or dim, dim, bias) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(dropout))

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (rearrange(proj(src), "b n (h d) -> b h n d", h=self.heads)
                   for proj, src in ((self.to_q, x), (self.to_k, context), (self.to_v, context)))
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v),
                                     "b h n d -> b n (h d)"))


class GEGLU(nn.Module):
    """One projection split into a value and its gate: value * gelu(gate) (2002.05202)."""

    def __init__(self, dim, width):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * width)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward;
    each is added to what it reads."""

    def __init__(self, dim, heads, context_dim, dropout):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(dim), Attention(dim, heads, dropout=dropout)
        self.norm2, self.attn2 = nn.LayerNorm(dim), Attention(dim, heads, context_dim, dropout)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = nn.ModuleDict({"net": nn.Sequential(          # its names: ff.net.0.proj, ff.net.2
            GEGLU(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim))})

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff.net(self.norm3(x))


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks over the pixels as tokens;
    its GroupNorm eps is 1e-6, unlike the residual blocks'."""

    def __init__(self, dim, heads, depth, config):
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, dim, 1e-6)
        self.proj_in, self.proj_out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(dim, heads, config.context_dim, config.dropout) for _ in range(depth))

    def forward(self, x, context):
        tokens = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))  # (B, N, C)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + rearrange(self.proj_out(tokens), "b (h w) c -> b c h w", h=x.shape[2])


class Resize(nn.Module):
    """A 3x3 convolution: with stride 2 down to half the size, or after nearest-neighbour upsampling
    to `size`, the next skip's (so that odd sizes work)."""

    def __init__(self, dim, stride):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride, padding=1)

    def forward(self, x, size=None):
        return self.conv(F.interpolate(x, size=size, mode="nearest") if size else x)


class Level(nn.Module):
    """One level of the UNet: residual blocks, a transformer behind each of the first `count`;
    then a change of size."""

    def __init__(self, widths_in, width, heads, depth, count, time_dim, config, resize=None):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(c, width, time_dim, config.groups, config.dropout)
                                     for c in widths_in)
        self.attentions = nn.ModuleList(SpatialTransformer(width, heads, depth, config)
                                        for _ in range(count if depth else 0))
        if resize:
            name, stride = resize
            setattr(self, name, nn.ModuleList([Resize(width, stride)]))

    def step(self, i, x, time, context):
        """Residual block i and the transformer behind it."""
        x = self.resnets[i](x, time)
        return self.attentions[i](x, context) if i < len(self.attentions) else x


class UNet(nn.Module):
    """The whole: `forward(x, t, context, vector, sizes)` predicts noise or velocity,
    in the shape of x."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        channels, time_dim = config.channels, 4 * config.channels[0]
        self.time_embedding = Embedding(channels[0], time_dim)
        if config.vector_dim:
            self.add_embedding = Embedding(config.vector_dim, time_dim)
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)

        def level(widths_in, i, resize):
            return Level(widths_in, channels[i], config.heads[i], config.depth[i], len(widths_in),
                         time_dim, config, resize)

        last, skips, width = len(channels) - 1, [channels[0]], channels[0]
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for i, c in enumerate(channels):
            self.down_blocks.append(level([width] + [c] * (config.layers - 1), i,
                                          ("downsamplers", 2) if i < last else None))
            width = c
            skips += [c] * (config.layers + (i < last))
        self.mid_block = Level([width] * 2, width, config.heads[-1], config.mid_depth, 1, time_dim,
                               config)
        for i in reversed(range(last + 1)):
            widths_in = []
            for _ in range(config.layers + 1):
                widths_in.append(width + skips.pop())           # each block reads [x, skip]
                width = channels[i]
            self.up_blocks.append(level(widths_in, i, ("upsamplers", 1) if i > 0 else None))
        self.conv_norm_out = nn.GroupNorm(config.groups, channels[0], 1e-5)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(self, x, t, context=None, vector=None, sizes=None):
        """x (B, C, H, W), t (B,), context (B, L, context_dim), vector (B, pooled width), sizes
        (B, 6) for SDXL -> as x."""
        time = self.time_embedding(sinusoid(t, self.config.channels[0]).to(x.dtype))
        if self.config.vector_dim:
            if self.config.size_dim:
                sizes = sinusoid(sizes.flatten(), self.config.size_dim).to(vector.dtype)
                vector = torch.cat([vector, rearrange(sizes, "(b n) d -> b (n d)", b=len(x))],
                                   dim=1)
            time = time + self.add_embedding(vector)
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = block.step(i, x, time, context)
                skips.append(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block.step(0, x, time, context)
        x = self.mid_block.resnets[1](x, time)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = block.step(i, torch.cat([x, skips.pop()], dim=1), time, context)
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](x, skips[-1].shape[2:])
        return self.conv_out(F.silu(self.conv_norm_out(x)))
