"""LoRA (2106.09685): small trainable adapters beside the linear layers of one frozen network.

Auxiliary and target are two adapters on the same base, and the reference is the base with none:
three models for the memory of one. An adapter adds B A x to the output of a layer W x, with
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
from ..utils.files import parse
from .files import WeightsError, read_json, read_tensors, safetensors
from .names import attention_name, unet_name

# the attention's layers, as diffusers' trainers choose them
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
LAYOUTS = {"peft": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
           "diffusers": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
           "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight")}
UNSUPPORTED = {"hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA",
               "lora_magnitude_vector": "DoRA", "lora_mid": "LoCon with a middle",
               "lora_bias": "LoRA with a bias", "lora_B.bias": "LoRA with a bias",
               "bundle_emb": "bundled embedding (learned words)"}
KOHYA_PARTS = {"lora_unet_": "unet", "lora_te_": "text_encoder",
               "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}


class Adapter(nn.Module):
    """The matrices of one adapter, float32 whatever the base is: the only parameters that
    are trained."""

    def __init__(self, pairs):
        """pairs {layer name: (A (rank, in), B (out, rank))}."""
        super().__init__()
        self.place = {name: i for i, name in enumerate(pairs)}
        self.A = nn.ParameterList(a for a, _ in pairs.values())
        self.B = nn.ParameterList(b for _, b in pairs.values())

    def add(self, name, x):
        """What the adapter adds to the output of this layer for its input x; None if it leaves the
        layer alone."""
        i = self.place.get(name)
        return (None if i is None else
                F.linear(F.linear(x, self.A[i].to(x.dtype)), self.B[i].to(x.dtype)))

    def pairs(self):
        """{layer name: (A, B)}, detached."""
        return {name: (self.A[i].detach(), self.B[i].detach()) for name, i in self.place.items()}


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

    def new(self, rank=8, seed=0):
        """A new adapter on the layers whose names end in one of TARGETS. It changes nothing yet:
        B is zero."""
        generator, pairs = torch.Generator().manual_seed(seed), {}
        for name, layer in self.layers.items():
            if name.endswith(tuple("." + target for target in TARGETS)):
                a = torch.randn(rank, layer.in_features, generator=generator) / rank ** 0.5
                pairs[name] = tuple(x.to(layer.weight.device)
                                    for x in (a, torch.zeros(layer.out_features, rank)))
        return Adapter(pairs)


@torch.no_grad()
def merge(network, pairs):
    """Add an adapter's pairs to the weights of the network's layers for good; it then costs
    nothing more."""
    for name, (a, b) in pairs.items():
        weight = network.get_submodule(name).weight
        change = (at_least_float32(b) @ at_least_float32(a)).to(weight.device)
        weight.data = (at_least_float32(weight) + change).to(weight.dtype)


def describe(name, adapter, parts, size, phrases=()):
    """What other programs read of an adapter beside its tensors: {key: string}, in the words of
    sd-scripts (ss_...) and of the modelspec standard. Without it some take an adapter of XL for one
    of SD 1. parts: the base's; size (height, width): that it was trained at; phrases: what to write
    in prompts."""
    v, version = parts.diffusion.prediction == "v", parts.version
    rank = max(map(len, adapter.A), default=0)
    family = {"1": "v1", "2": "v2-768-v" if v else "v2-512", "xl": "xl-v1-base"}[version]
    return {"format": "pt", "ss_output_name": name, "ss_network_module": "networks.lora",
            "ss_base_model_version": "sdxl_base_v1-0" if version == "xl"
            else f"sd_v{version}{'_v' * v}",
            # alpha is the rank: nothing is scaled
            "ss_v2": str(version == "2"), "ss_network_dim": str(rank),
            "ss_network_alpha": str(float(rank)), "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"stable-diffusion-{family}/lora",
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models"
            if version == "xl" else "diffusers", "modelspec.title": name,
            "modelspec.resolution": "x".join(map(str, size[::-1])),
            "modelspec.prediction_type": "v" if v else "epsilon",
            **({"modelspec.trigger_phrase": ", ".join(phrases)} if phrases else {})}


def save(adapter, path, layout="peft", xl=False, metadata=None):
    """Write a .safetensors file that diffusers' load_lora_weights reads; "kohya" is what most other
    programs read, where the layers of XL (xl) have the names of its original code."""
    tensors, (down, up) = {}, LAYOUTS[layout]
    for name, (a, b) in adapter.pairs().items():
        name = attention_name(name) if xl and layout == "kohya" else name
        flat = name.replace(".", "_") if layout == "kohya" else name
        tensors |= {down.format(flat): a.cpu().contiguous(), up.format(flat): b.cpu().contiguous()}
        if layout == "kohya":
            # alpha = rank: nothing is scaled
            tensors[f"lora_unet_{flat}.alpha"] = torch.tensor(float(len(a)))
    content = safetensors().save(tensors, metadata)
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + size])
    # the package writes the metadata in any order: the same adapter would be other bytes each time
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as temporary:
        temporary.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size:])


def named(text):
    """FILE or FILE:STRENGTH -> (path, strength). Raises WeightsError on what is no adapter's
    file."""
    file, _, strength = str(text).rpartition(":")
    try:
        path, strength = Path(file or "?"), float(strength)
    except ValueError:
        path, strength = Path(text), 1.0
    if not math.isfinite(strength):
        raise WeightsError(f"--lora {text}: the strength is not finite; write FILE:STRENGTH, for "
                           "example FILE:0.8")
    if path.is_dir():
        inside = sorted(path.glob("*.safetensors"))
        raise WeightsError(f"--lora {path}: a folder; name the file in it"
                           + (f", for example {inside[0]}" if inside else ""))
    if not path.exists():
        raise WeightsError(f"--lora {path}: not found; it is a file that you have, for nothing is "
                           "downloaded")
    if path.suffix in (".pt", ".pth", ".ckpt"):
        raise WeightsError(f"--lora {path}: not the adapter's file; that ends in .safetensors "
                           "(training writes it beside the .pt)")
    return path, strength


def together(adapters):
    """[({layer name: (A, B)}, strength)] -> one such: their matrices side by side."""
    pairs = {}
    for layers, strength in adapters:
        for name, (a, b) in layers.items():
            old = pairs.get(name)
            b = strength * b
            pairs[name] = (torch.cat([old[0], a]), torch.cat([old[1], b], 1)) if old else (a, b)
    return pairs


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
        if not beside.exists():
            raise WeightsError(f"{path}: peft keeps this adapter's alpha in {beside.name} beside "
                               "it; that file is missing")
        return {"unet": read_json(beside)}
    settings = {}
    if path.suffix == ".safetensors":
        with safetensors().safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
            try:
                for key, value in parse(text).items():
                    part, _, name = key.partition(".")
                    settings.setdefault(part, {})[name] = value
            except (ValueError, AttributeError) as error:
                raise WeightsError(f"{path}: its lora_adapter_metadata cannot be read ({error})"
                                   ) from error
    return settings


def _fold(where, name, shape, pieces, settings):
    """A, B and alpha of the layer `name` -> (A, scale * B) float32. Without any alpha the scale is
    1, as all readers take it."""
    rank = pieces["A"].shape[0] if pieces.get("A", torch.ones(())).dim() else 0
    if rank < 1 or any(key not in pieces or pieces[key].shape != size
           for key, size in (("A", (rank, shape[1])), ("B", (shape[0], rank)))):
        shapes = ", ".join(f"{key} {tuple(x.shape)}" for key, x in pieces.items())
        raise WeightsError(f"{where} {tuple(shape)} is incomplete or of another shape: {shapes}")
    if settings.get("use_dora"):
        raise WeightsError(f"{where} is a DoRA: not supported")
    try:
        pattern = next((v for k, v in (settings.get("alpha_pattern") or {}).items()
                        if re.match(rf"(.*\.)?({k})$", name)), None)
        alpha = float(pieces["alpha"].item() if "alpha" in pieces
                      else pattern or settings.get("lora_alpha") or rank)
    except (ValueError, TypeError, AttributeError, RuntimeError, re.error) as error:
        raise WeightsError(f"{where}: its alpha cannot be read ({error})") from error
    folded = (pieces["A"].float(), pieces["B"].float()
              * (alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)))
    if not all(x.isfinite().all() for x in folded):
        raise WeightsError(f"{where} is not finite; train it again, or take another file")
    return folded
