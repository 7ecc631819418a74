"""LoRA (2106.09685): small trainable adapters beside the linear layers of one frozen network.

Auxiliary and target are two adapters on the same base, and the reference is the base with none:
three models for the memory of one. An adapter adds scale * B A x to the output of a layer W x, with
A (rank, in) random and B (out, rank) zero at the start.
"""
import json
import math
import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..losses import at_least_float32
from ..utils.checkpoint import atomic_write
from .files import WeightsError, read_json, read_tensors, safetensors
from .names import unet_name

# the attention's layers, as diffusers' trainers choose them
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
LAYOUTS = {"peft": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
           "diffusers": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
           "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight")}
UNSUPPORTED = {"hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA",
               "lora_magnitude_vector": "DoRA", "lora_mid": "LoCon with a middle",
               "lora_bias": "LoRA with a bias", "lora_B.bias": "LoRA with a bias"}
KOHYA_PARTS = {"lora_unet_": "unet", "lora_te_": "text_encoder",
               "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}


class Adapter(nn.Module):
    """The matrices of one adapter, float32 whatever the base is: the only parameters that
    are trained."""

    def __init__(self, pairs, scale=1.0):
        """pairs {layer name: (A (rank, in), B (out, rank))}."""
        super().__init__()
        self.place, self.scale = {name: i for i, name in enumerate(pairs)}, scale
        self.A = nn.ParameterList(a for a, _ in pairs.values())
        self.B = nn.ParameterList(b for _, b in pairs.values())

    def add(self, name, x):
        """What the adapter adds to the output of this layer for its input x; None if it leaves the
        layer alone."""
        i = self.place.get(name)
        return (None if i is None else
                self.scale * F.linear(F.linear(x, self.A[i].to(x.dtype)), self.B[i].to(x.dtype)))

    def pairs(self):
        """{layer name: (A, scale * B)}, detached: the scale is folded in, since most file layouts
        have no place for it."""
        return {name: (self.A[i].detach(), self.scale * self.B[i].detach())
                for name, i in self.place.items()}


class LoRA:
    """A frozen network and the adapter that acts on it now (`active`; None: the network
    is itself)."""

    def __init__(self, network):
        self.layers, self.active = ({name: m for name, m in network.named_modules()
                                     if isinstance(m, nn.Linear)}, None)
        network.requires_grad_(False)
        for name, layer in self.layers.items():
            layer.register_forward_hook(partial(self._add, name))

    def _add(self, name, layer, inputs, output):
        extra = None if self.active is None else self.active.add(name, inputs[0])
        return output if extra is None else output + extra

    @contextmanager
    def using(self, adapter):
        """Inside the with-block `adapter` acts, or none; afterwards what acted before."""
        before, self.active = self.active, adapter
        try:
            yield
        finally:
            self.active = before

    def new(self, rank=8, alpha=None, targets=TARGETS, seed=0):
        """A new adapter on the layers whose names end in one of `targets`. It changes nothing yet:
        B is zero. alpha None: the rank."""
        generator, pairs = torch.Generator().manual_seed(seed), {}
        for name, layer in self.layers.items():
            if name.endswith(tuple("." + target for target in targets)):
                a = torch.randn(rank, layer.in_features, generator=generator) / rank ** 0.5
                pairs[name] = tuple(x.to(layer.weight.device)
                                    for x in (a, torch.zeros(layer.out_features, rank)))
        return Adapter(pairs, (alpha or rank) / rank)


@torch.no_grad()
def merge(network, pairs):
    """Add an adapter's pairs to the weights of the network's layers for good; it then costs
    nothing more."""
    for name, (a, b) in pairs.items():
        weight = network.get_submodule(name).weight
        change = (at_least_float32(b) @ at_least_float32(a)).to(weight.device)
        weight.data = (at_least_float32(weight) + change).to(weight.dtype)


def save(adapter, path, layout="peft"):
    """Write a .safetensors file that diffusers' load_lora_weights reads; "kohya" is what most other
    programs read."""
    tensors, (down, up) = {}, LAYOUTS[layout]
    for name, (a, b) in adapter.pairs().items():
        flat = name.replace(".", "_") if layout == "kohya" else name
        tensors |= {down.format(flat): a.cpu().contiguous(), up.format(flat): b.cpu().contiguous()}
        if layout == "kohya":
            # alpha = rank: the scale is in B already
            tensors[f"lora_unet_{flat}.alpha"] = torch.tensor(float(len(a)))
    with atomic_write(path) as temporary:
        safetensors().save_file(tensors, temporary)


def load(path, networks):
    """A LoRA file in peft's, diffusers' or kohya's layout -> {part: {layer name: (A, B)}}, the
    scale folded into B.

    networks {"unet": ..., "text_encoder": ..., "text_encoder_2": ...}: where the names must
    be found. Raises WeightsError on any key that has no place there: half an adapter is
    another adapter."""
    path = Path(path)
    state, found = read_tensors(path), {}
    if not state:
        raise WeightsError(f"{path}: there is no adapter in it")
    flat = {part: {name.replace(".", "_"): name for name, m in net.named_modules()
                   if isinstance(m, (nn.Linear, nn.Conv2d))}
            for part, net in networks.items()}
    for key, x in state.items():
        bad = next((kind for mark, kind in UNSUPPORTED.items() if mark in key), None)
        if bad:
            raise WeightsError(f"{path}: {key} belongs to a {bad}: not supported")
        # the oldest diffusers files name the attention's processor instead of its layers
        plain = re.sub(r"\.processor\.(to_\w+?)_lora\.",
                       lambda m: f".{m[1]}{'.0' if m[1] == 'to_out' else ''}.lora.", key)
        match = re.match(r"(.+?)\.(?:(lora_A|lora_down|lora\.down|lora_linear_layer\.down)"
                         r"|(lora_B|lora_up|lora\.up|lora_linear_layer\.up))"
                         r"(?:\.default)?\.weight$|(.+)\.alpha$", plain)
        part, name = _layer(match[1] or match[4], flat) if match else (None, None)
        if name is None:
            raise WeightsError(f"{path}: {key} has no place in {', '.join(networks)}; is it the "
                               "adapter of another model, or of convolutions (LoCon: not "
                               "supported)?")
        if (isinstance(networks[part].get_submodule(name), nn.Conv2d)
                or x.dim() == 4 and x.shape[2:] != (1, 1)):
            raise WeightsError(f"{path}: {key} adapts a convolution: not supported")
        # files of SD 1 have 1x1 convolutions where we have linear layers
        x = x.flatten(1) if x.dim() == 4 else x
        found.setdefault((part, name), {})["A" if match[2] else "B" if match[3] else "alpha"] = x
    settings, out = _settings(path, state), {}
    for (part, name), pieces in found.items():
        shape = networks[part].get_submodule(name).weight.shape
        out.setdefault(part, {})[name] = _fold(f"{path}: the adapter of {part}.{name}", name,
                                               shape, pieces, settings.get(part, {}))
    # files of one adapter may be in any order
    return {part: dict(sorted(layers.items())) for part, layers in out.items()}


def _layer(name, flat):
    """A layer's name in a file -> (part, our name), or (part, None). kohya's underscores are undone
    by a table of the real names."""
    prefix = next((prefix for prefix in KOHYA_PARTS if name.startswith(prefix)), None)
    if prefix:
        part, name = KOHYA_PARTS[prefix], name.removeprefix(prefix)
        # XL files: the original code's
        original = re.match(r"(?:(in|out)put_blocks_(\d+)_(\d+)|middle_block_(\d+))_(.*)", name)
        if original:
            way, block, i, middle, rest = original.groups()
            name = unet_name(f"middle_block.{middle}.{rest}" if middle
                             else f"{way}put_blocks.{block}.{i}.{rest}")
    else:
        part, _, rest = name.removeprefix("base_model.model.").partition(".")
        part, name = (part, rest) if part in KOHYA_PARTS.values() else ("unet", f"{part}.{rest}")
    return part, flat.get(part, {}).get(name.replace(".", "_").removeprefix("text_model_"))


def _settings(path, state):
    """What is known of rank and alpha beside the tensors: {part: settings as in
    peft's LoraConfig}."""
    if any(key.startswith("base_model.model.") for key in state):
        beside = path.with_name("adapter_config.json")
        if not beside.is_file():
            raise WeightsError(f"{path}: peft keeps this adapter's alpha in {beside.name} beside "
                               "it; that file is missing")
        return {"unet": read_json(beside)}
    settings = {}
    if path.suffix == ".safetensors":
        with safetensors().safe_open(path, "pt") as file:
            for key, value in json.loads(
                    (file.metadata() or {}).get("lora_adapter_metadata", "{}")).items():
                part, _, name = key.partition(".")
                settings.setdefault(part, {})[name] = value
    return settings


def _fold(where, name, shape, pieces, settings):
    """A, B and alpha of the layer `name` -> (A, scale * B) float32. Without any alpha the scale is
    1, as all readers take it."""
    rank = len(pieces.get("A", ()))
    if any(key not in pieces or pieces[key].shape != size
           for key, size in (("A", (rank, shape[1])), ("B", (shape[0], rank)))):
        shapes = ", ".join(f"{key} {tuple(x.shape)}" for key, x in pieces.items())
        raise WeightsError(f"{where} {tuple(shape)} is incomplete or of another shape: {shapes}")
    if settings.get("use_dora"):
        raise WeightsError(f"{where} is a DoRA: not supported")
    pattern = next((v for k, v in (settings.get("alpha_pattern") or {}).items()
                    if re.match(rf"(.*\.)?({k})$", name)), None)
    alpha = (pieces["alpha"].item() if "alpha" in pieces
             else pattern or settings.get("lora_alpha") or rank)
    return (pieces["A"].float(),
            pieces["B"].float()
            * (alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)))
