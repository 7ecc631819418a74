"""The text encoders: CLIP's (2103.00020) ViT-L and OpenCLIP's H and bigG, by configuration. Names
are transformers', without `text_model.`"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


@dataclass
class CLIPConfig:
    """The defaults are ViT-L's, of Stable Diffusion 1.x."""
    vocabulary: int = 49408
    length: int = 77
    width: int = 768
    hidden: int = 3072
    layers: int = 12
    heads: int = 12
    activation: str = "quick_gelu"          # "gelu" for OpenCLIP
    eos: int = 2                            # 2 is a historical mistake in public files: it stands
                                            # for the last token of the vocabulary
    projection: int | None = None           # width of the pooled output's projection; None: there
                                            # is none


class Layer(nn.Module):
    """Causal attention (a token sees what stands before it, padding included) and two linear
    layers; each is added to what it reads."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.quick = config.heads, config.activation == "quick_gelu"
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.self_attn = nn.ModuleDict({f"{part}_proj": nn.Linear(config.width, config.width)
                                        for part in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(config.width, config.hidden),
                                  "fc2": nn.Linear(config.hidden, config.width)})

    def forward(self, x):
        h = self.layer_norm1(x)
        q, k, v = (rearrange(self.self_attn[f"{part}_proj"](h), "b n (h d) -> b h n d",
                             h=self.heads)
                   for part in "qkv")
        h = rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=True),
                      "b h n d -> b n (h d)")
        x = x + self.self_attn["out_proj"](h)
        h = self.mlp["fc1"](self.layer_norm2(x))
        # ViT-L's approximation of GELU
        return x + self.mlp["fc2"](h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))


class CLIP(nn.Module):
    """Token ids (B, 77) -> what the versions of Stable Diffusion read."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embeddings = nn.ModuleDict(
            {"token_embedding": nn.Embedding(config.vocabulary, config.width),
             "position_embedding": nn.Embedding(config.length, config.width)})
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(Layer(config) for _ in range(config.layers))})
        self.final_layer_norm = nn.LayerNorm(config.width)
        if config.projection:
            self.text_projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(self, ids):
        """ids (B, L) -> (last (B, L, width) after the final norm: SD 1, 2; penultimate layer
        without it: XL; pooled (B, width or projection), the final norm at the first
        end-of-text)."""
        x = (self.embeddings["token_embedding"](ids)
             + self.embeddings["position_embedding"].weight[:ids.shape[1]])
        for layer in self.encoder["layers"]:
            penultimate, x = x, layer(x)
        last = self.final_layer_norm(x)
        eos = self.config.vocabulary - 1 if self.config.eos == 2 else self.config.eos
        pooled = last[torch.arange(len(ids)), (ids == eos).int().argmax(1)]
        return last, penultimate, self.text_projection(pooled) if self.config.projection else pooled
