"""Reading public Stable Diffusion weights: a folder in diffusers' layout, or a single file. Nothing in a file is ever executed.

Models are built on the meta device and take the file's tensors as they are: no time for an initialisation, no second copy in memory.
"""
import json
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from ..diffusion import Diffusion
from ..unet import UNet, UNetConfig
from . import singlefile
from .clip import CLIP, CLIPConfig
from .tokenizer import EOS, Tokenizer
from .vae import VAE, VAEConfig


class WeightsError(ValueError):
    """Weights that cannot be used; the message names the file, what is wrong and what to do."""


@dataclass
class Parts:
    """Everything that makes a picture of a prompt. XL has two text encoders, each with its tokenizer."""
    unet: UNet
    vae: VAE
    encoders: list
    tokenizers: list
    diffusion: Diffusion
    zeros_for_empty: bool = False           # XL: the empty prompt is all zeros, as it was trained


def safetensors():
    """The package's torch module. Raises WeightsError that says how to install it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise WeightsError("reading .safetensors needs the package safetensors: pip install 'nanocpo[sd]'") from error
    return safetensors.torch


def read_tensors(path):
    """One .safetensors, .bin or .ckpt file -> {name: tensor}."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: not found")
    if path.suffix == ".safetensors":
        package = safetensors()
        try:
            return package.load_file(path)
        except Exception as error:                                # SafetensorError is not a public name everywhere
            raise WeightsError(f"{path}: not a safetensors file, or cut off ({error}); download it again") from error

    class Callback:
        """Stands for the one harmless class that old checkpoints hold beside their tensors."""
    known = (Callback, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    try:
        with torch.serialization.safe_globals([known]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        content = content.get("state_dict", content)
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path}: holds more than tensors, or is no checkpoint; nothing in it was run. Look for the same model as "
                           f".safetensors ({str(error).splitlines()[0]})") from error
    except Exception as error:
        raise WeightsError(f"{path}: not a checkpoint, or cut off ({error}); download it again") from error
    return {name: value for name, value in content.items() if torch.is_tensor(value)}


def read_part(folder, variant=None):
    """The tensors of one part (unet/, vae/, text_encoder/): .safetensors before .bin, shards before a whole file."""
    mark, stem = f".{variant}" if variant else "", "diffusion_pytorch_model"
    if not (any(folder.glob(f"{stem}*"))):
        stem = "model" if any(folder.glob("model*.safetensors*")) else "pytorch_model"
    for suffix in (".safetensors", ".bin"):
        index, whole = folder / f"{stem}{suffix}.index{mark}.json", folder / f"{stem}{mark}{suffix}"
        if index.is_file():
            return read_shards(index)
        if whole.is_file():
            return read_tensors(whole)
    found = sorted(file.name for file in folder.glob("*") if file.suffix in (".safetensors", ".bin"))
    raise WeightsError(f"{folder}: no {stem}{mark}.safetensors or .bin" + (f"; there is {', '.join(found)}: name the part between the "
                       f"dots as --variant, for example fp16" if found else "; is the download complete?"))


def read_shards(index):
    """An index file -> the tensors of all its shards."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("a shard lies in another folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index}: not an index of shards ({error}); download it again") from error
    state = {}
    for name in names:
        shard = read_tensors(index.parent / name)
        lost = [key for key, place in places.items() if place == name and key not in shard]
        if lost:
            raise WeightsError(f"{index}: {lost[0]} should be in {name} and is not; index and shards are of different downloads")
        state |= shard
    return state


# Settings with their only supported values, and those that do not matter or are read below. Any other setting must be None or False.
SILU = ("silu", "swish")
UNET_ONLY = {"act_fn": SILU, "resnet_time_scale_shift": ("default",), "attention_type": ("default",), "conv_in_kernel": (3,),
             "conv_out_kernel": (3,), "flip_sin_to_cos": (True,), "freq_shift": (0,), "norm_eps": (1e-5,), "downsample_padding": (1,),
             "mid_block_type": ("UNetMidBlock2DCrossAttn",), "mid_block_scale_factor": (1,), "time_embedding_type": ("positional",),
             "resnet_out_scale_factor": (1,), "addition_embed_type": (None, "text_time"), "in_channels": (4,), "out_channels": (4,)}
UNET_FREE = ("sample_size upcast_attention use_linear_projection dropout addition_embed_type_num_heads block_out_channels down_block_types "
             "up_block_types layers_per_block attention_head_dim num_attention_heads cross_attention_dim norm_num_groups "
             "transformer_layers_per_block addition_time_embed_dim projection_class_embeddings_input_dim").split()
VAE_ONLY = {"act_fn": SILU, "use_quant_conv": (True,), "use_post_quant_conv": (True,), "mid_block_add_attention": (True,)}
VAE_FREE = ("sample_size force_upcast in_channels out_channels latent_channels block_out_channels layers_per_block norm_num_groups "
            "scaling_factor down_block_types up_block_types").split()
HINTS = {"in_channels": " (9: inpainting, 8: editing by instruction)", "time_cond_proj_dim": " (a latent consistency model)",
         "class_embed_type": " (class embeddings)"}


def check(config, only, free, where):
    """Refuse by name every setting that changes the computation in a way that is not built."""
    for key, value in config.items():
        if not key.startswith("_") and key not in free and value not in only.get(key, (None, False)):
            raise WeightsError(f"{where}: {key} = {value!r} is not supported{HINTS.get(key, '')}"
                               + (f"; only {' or '.join(map(repr, only[key]))} is" if key in only else ""))


def unet_config(config, where="unet"):
    """diffusers' unet/config.json -> UNetConfig; what it leaves out has diffusers' default."""
    check(config, UNET_ONLY, UNET_FREE, where)
    channels = tuple(config.get("block_out_channels", (320, 640, 1280, 1280)))
    each = lambda value: tuple(value) if isinstance(value, (list, tuple)) else (value,) * len(channels)
    down = config.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
    up = config.get("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
    if not set(down) <= {"CrossAttnDownBlock2D", "DownBlock2D"} or list(up) != [kind.replace("Down", "Up") for kind in reversed(down)]:
        raise WeightsError(f"{where}: the block types {', '.join([*down, *up])} are not supported")
    blocks = each(config.get("transformer_layers_per_block", 1))
    # attention_head_dim is a misnomer: in these files it is the number of heads
    heads = each(config.get("num_attention_heads") or config.get("attention_head_dim", 8))
    layers, size = config.get("layers_per_block", 2), config.get("addition_embed_type") and config["addition_time_embed_dim"]
    if not all(isinstance(number, int) for number in (layers, *blocks)) or not len(channels) == len(down) == len(heads) == len(blocks):
        raise WeightsError(f"{where}: its lists do not have one number for each of {len(channels)} levels")
    return UNetConfig(in_channels=4, out_channels=4, channels=channels, layers=layers, heads=heads, mid_depth=blocks[-1],
                      depth=tuple(n if kind.startswith("Cross") else 0 for n, kind in zip(blocks, down)),
                      context_dim=config.get("cross_attention_dim", 1280), groups=config.get("norm_num_groups", 32), size_dim=size,
                      vector_dim=config["projection_class_embeddings_input_dim"] if size else None)


def vae_config(config, where="vae"):
    """diffusers' vae/config.json -> VAEConfig."""
    check(config, VAE_ONLY, VAE_FREE, where)
    kinds = {*config.get("down_block_types", ()), *config.get("up_block_types", ())}
    if not kinds <= {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise WeightsError(f"{where}: the block types {', '.join(sorted(kinds))} are not supported")
    names = {"in_channels": "in_channels", "out_channels": "out_channels", "latent_channels": "latent_channels",
             "block_out_channels": "channels", "layers_per_block": "layers", "norm_num_groups": "groups", "scaling_factor": "scale"}
    return VAEConfig(**{ours: config[key] for key, ours in names.items() if key in config})


def clip_config(config, where="text_encoder"):
    """transformers' config.json of a CLIP text model -> CLIPConfig."""
    kind = (config.get("architectures") or ["CLIPTextModel"])[0]
    only = {"hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": (1e-5,), "model_type": ("clip_text_model",),
            "architectures": ("CLIPTextModel", "CLIPTextModelWithProjection")}
    check({key: config[key] for key in only if key in config} | {"architectures": kind}, only, (), where)
    get = config.get
    return CLIPConfig(get("vocab_size", 49408), get("max_position_embeddings", 77), get("hidden_size", 768), get("intermediate_size", 3072),
                      get("num_hidden_layers", 12), get("num_attention_heads", 12), get("hidden_act", "quick_gelu"),
                      get("eos_token_id", 49407), get("projection_dim", 512) if kind.endswith("WithProjection") else None)


def diffusion_config(config, prediction=None, where="scheduler"):
    """diffusers' scheduler_config.json -> Diffusion. Every sampler of an eps- or v-model fits its weights: Euler stays Euler,
    all others (PNDM, DPM ...) become DDIM. prediction: "eps" or "v", if the file does not know better."""
    name = config.get("_class_name", "DDIMScheduler")
    if name.startswith(("LCM", "TCD", "Flow", "EDM", "CM")):
        raise WeightsError(f"{where}: {name} belongs to another kind of model (distilled, flow matching or EDM): not supported")
    only = {"beta_schedule": ("scaled_linear",), "beta_start": (0.00085,), "beta_end": (0.012,), "num_train_timesteps": (1000,),
            "prediction_type": ("epsilon", "v_prediction"), "trained_betas": (None,)}
    check({key: config[key] for key in only if key in config}, only, (), where)
    prediction = prediction or ("v" if config.get("prediction_type") == "v_prediction" else "eps")
    return Diffusion("scaled_linear", prediction, zero_snr=bool(config.get("rescale_betas_zero_snr")),
                     spacing="trailing" if config.get("timestep_spacing") == "trailing" else "leading",
                     sampler="list" if name.startswith(("Euler", "DDPM")) else "ddim")


def modern(name):
    """Old names of the public files -> today's: CLIP's prefix goes, the VAE's attention has other names."""
    name = name.removeprefix("text_model.")
    if "mid_block.attentions.0." in name and name.startswith(("encoder.", "decoder.")):
        for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
            name = name.replace(f".{old}.", f".{new}.")
    return name


def build(kind, config, state, dtype, where):
    """kind(config) with the weights of `state`, frozen. Raises WeightsError that shows what does not fit."""
    with torch.device("meta"):
        model = kind(config)
    want = {name: p.shape for name, p in model.state_dict().items()}
    state = {modern(name): x for name, x in state.items() if not name.endswith("position_ids")}
    for name, x in state.items():                                 # 1x1 convolutions of old files are linear layers here
        if x.dim() == 4 and name in want and len(want[name]) == 2 and x.shape[2:] == (1, 1):
            state[name] = x[:, :, 0, 0]
    few = lambda names: ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")
    wrong = {f"{name} {tuple(state[name].shape)}, not {tuple(want[name])}" for name in want if name in state and state[name].shape != want[name]}
    faults = [f"{label}: {few(names)}" for label, names in (("missing", set(want) - set(state)), ("unknown", set(state) - set(want)),
                                                           ("of another shape", wrong)) if names]
    if faults:
        raise WeightsError(f"{where}: weights and configuration do not fit; {'; '.join(faults)}")
    model.load_state_dict({name: x.to(dtype) for name, x in state.items()}, assign=True)
    return model.eval().requires_grad_(False)


def load_parts(path, config=None, tokenizer=None, variant=None, dtype=torch.float32, prediction=None):
    """Weights on disk -> Parts, on the CPU.

    path: a folder in diffusers' layout, or a single file. A single file holds neither tokenizer nor settings: tokenizer is a
    merges.txt, tokenizer.json or a folder with one, and config a folder in diffusers' layout (weights are not needed in it) whose
    config.json files replace the presets. variant "fp16" reads those files of a folder. prediction "eps" or "v" overrides the
    scheduler's: a single file of SD 2 does not say which it is; v is taken (the 768 model), the base model needs "eps"."""
    path, config = Path(path), Path(config) if config else None
    if path.is_dir():
        names = ["unet", "vae"] + [name for name in ("text_encoder", "text_encoder_2") if (path / name).is_dir()]
        if "text_encoder" not in names or not (path / "unet").is_dir():
            raise WeightsError(f"{path}: needs unet/, vae/ and text_encoder/, as the text-to-image models of Stable Diffusion 1, 2 and XL "
                               "have them (the XL refiner, other models and single parts do not)")
        configs = {name: read_json(path / settings_file(name)) for name in [*names, "scheduler"]}
        states, config = {name: read_part(path / name, variant) for name in names}, path
    else:
        whole = read_tensors(path)
        try:
            configs = dict(singlefile.PRESETS[singlefile.version(whole)])
            for name in configs:
                if config and (config / settings_file(name)).is_file():
                    configs[name] = read_json(config / settings_file(name))
            states = singlefile.split(whole, clip_config(configs["text_encoder"]).layers)
        except (ValueError, KeyError) as error:
            raise error if isinstance(error, WeightsError) else WeightsError(f"{path}: {error}") from error
        if "conv_in.weight" in states["unet"]:
            check({"in_channels": states["unet"]["conv_in.weight"].shape[1]}, UNET_ONLY, UNET_FREE, path)
    kinds = {"unet": (UNet, unet_config), "vae": (VAE, vae_config), "text_encoder": (CLIP, clip_config), "text_encoder_2": (CLIP, clip_config)}
    models = {}
    for name in list(states):
        where, (kind, translate) = f"{path}, {name}", kinds[name]
        # half precision overflows in XL's VAE; bfloat16 does not
        models[name] = build(kind, translate(configs[name], where), states.pop(name),
                             torch.float32 if name == "vae" and dtype == torch.float16 else dtype, where)
    unet, vae, *encoders = models.values()
    if bool(unet.config.vector_dim) != (len(encoders) == 2):
        raise WeightsError(f"{path}: XL's UNet goes with two text encoders, the others with one; this has {len(encoders)}")
    tokenizers = [load_tokenizer(path, config, tokenizer, i, encoder) for i, encoder in enumerate(encoders)]
    index = read_json(config / "model_index.json") if config and (config / "model_index.json").is_file() else {}
    return Parts(unet, vae, encoders, tokenizers, diffusion_config(configs["scheduler"], prediction, f"{path}, scheduler"),
                 len(encoders) == 2 and bool(index.get("force_zeros_for_empty_prompt", True)))


def settings_file(part):
    """Where a folder in diffusers' layout keeps the settings of a part."""
    return f"{part}/{'scheduler_config' if part == 'scheduler' else 'config'}.json"


def load_tokenizer(path, config, tokenizer, i, encoder):
    """The tokenizer of text encoder i. Without its own settings OpenCLIP's pads with "!", ViT-L's with the end of text."""
    folder = tokenizer or config and config / ("tokenizer_2" if i else "tokenizer")
    if not folder or not Path(folder).exists():
        raise WeightsError(f"{path}: no tokenizer{f' in {folder}' if folder else ''}; give --tokenizer, a folder with merges.txt or "
                           "tokenizer.json (any repository of Stable Diffusion has one)")
    try:
        loaded = Tokenizer.load(folder, None if not tokenizer else EOS if encoder.config.activation == "quick_gelu" else "!")
    except (ValueError, FileNotFoundError) as error:
        raise WeightsError(str(error)) from error
    if max(loaded.vocabulary.values()) >= encoder.config.vocabulary:
        raise WeightsError(f"{folder}: knows {len(loaded.vocabulary)} tokens, but text encoder {i + 1} only {encoder.config.vocabulary}")
    return loaded


def read_json(path):
    """A JSON file's object. Raises WeightsError that names it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
        return content
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read ({error}); is the download complete?") from error
