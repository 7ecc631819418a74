"""Public Stable Diffusion weights, a folder in diffusers' layout or a single file, as our models.

Models are built on the meta device and take the file's tensors as they are: no time for an
initialisation, no second copy in memory.
"""
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ..diffusion import Diffusion
from ..unet import UNet, UNetConfig
from .clip import CLIP, CLIPConfig
from .files import WeightsError, read_json, read_part, read_tensors, say
from .names import PRESETS, marks, split, vae_names
from .tokenizer import EOS, Tokenizer
from .vae import VAE, VAEConfig


@dataclass
class Parts:
    """Everything that makes a picture of a prompt. XL has two text encoders, each with
    its tokenizer."""
    unet: UNet
    vae: VAE
    encoders: list
    tokenizers: list
    diffusion: Diffusion
    zeros_for_empty: bool = False           # XL: the empty prompt is all zeros, as it was trained
    size: tuple = (512, 512)                # height, width of the pictures that it was trained on
    version: str = "1"                      # 1, 2 or xl


# The settings that are read, with diffusers' defaults, and those that do not matter (None); then
# those with the only values that are built.
UNET = dict.fromkeys(("sample_size", "upcast_attention", "use_linear_projection", "dropout",
                      "addition_embed_type_num_heads")) | {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2, "transformer_layers_per_block": 1, "attention_head_dim": 8,
    "num_attention_heads": None, "cross_attention_dim": 1280, "norm_num_groups": 32,
    "addition_time_embed_dim": None, "projection_class_embeddings_input_dim": None}
UNET_ONLY = {"act_fn": ("silu", "swish"), "resnet_time_scale_shift": ("default",),
             "attention_type": ("default",), "conv_in_kernel": (3,), "conv_out_kernel": (3,),
             "flip_sin_to_cos": (True,), "freq_shift": (0,), "norm_eps": (1e-5,),
             "downsample_padding": (1,), "mid_block_type": ("UNetMidBlock2DCrossAttn",),
             "mid_block_scale_factor": (1,), "time_embedding_type": ("positional",),
             "resnet_out_scale_factor": (1,), "addition_embed_type": (None, "text_time"),
             "in_channels": (4,), "out_channels": (4,),
             "_class_name": ("UNet2DConditionModel",)}
VAE_NAMES = {"block_out_channels": "channels", "layers_per_block": "layers",
             "norm_num_groups": "groups", "scaling_factor": "scale"}
VAE_ONLY = {"act_fn": ("silu", "swish"), "use_quant_conv": (True,), "use_post_quant_conv": (True,),
            "mid_block_add_attention": (True,), "in_channels": (3,), "out_channels": (3,),
            "latent_channels": (4,), "_class_name": ("AutoencoderKL",)}
CLIP_NAMES = {"vocab_size": "vocabulary", "max_position_embeddings": "length",
              "hidden_size": "width", "intermediate_size": "hidden", "num_hidden_layers": "layers",
              "num_attention_heads": "heads", "hidden_act": "activation", "eos_token_id": "eos"}
CLIP_DEFAULTS = {"vocab_size": 49408, "max_position_embeddings": 77, "hidden_size": 512,
                 "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
                 "hidden_act": "quick_gelu", "eos_token_id": 49407}     # transformers'
CLIP_ONLY = {"hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": (1e-5,),
             "model_type": ("clip_text_model",), "quantization_config": (None,),
             "architectures": (None, ["CLIPTextModel"], ["CLIPTextModelWithProjection"])}
DIFFUSION = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
DIFFUSION_ONLY = {"beta_schedule": ("scaled_linear",), "beta_start": (0.00085,),
                  "beta_end": (0.012,), "num_train_timesteps": (1000,),
                  "prediction_type": ("epsilon", "v_prediction"), "trained_betas": (None,),
                  "rescale_betas_zero_snr": (None, False, True)}
# the samplers that are built: their defaults, and what of them is. Training asks no sampler.
SAMPLERS = {
    "DDIMScheduler": ({"timestep_spacing": "leading", "set_alpha_to_one": True},
                      {"timestep_spacing": ("leading", "trailing"), "set_alpha_to_one": (False,),
                       "thresholding": (False,)}),
    "EulerDiscreteScheduler": ({"timestep_spacing": "linspace"},
                               {"timestep_spacing": ("leading", "trailing"),
                                **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas",
                                                 "use_beta_sigmas", "sigma_min", "sigma_max"),
                                                (None, False)),
                                "timestep_type": ("discrete",), "final_sigmas_type": ("zero",)})}
HINTS = {"in_channels": " (9: inpainting, 8: editing by instruction)",
         "time_cond_proj_dim": " (a latent consistency model)",
         "class_embed_type": " (class embeddings)"}


def check(config, known, only, where):
    """Refuse by name every setting that changes the computation in a way that is not built: what is
    neither known nor in `only` must be None or False."""
    for key, value in config.items():
        if key not in only and (key in known or key.startswith("_")):
            continue
        if value not in only.get(key, (None, False)):
            raise WeightsError(f"{where}: {key} = {value!r} is not supported{HINTS.get(key, '')}"
                               + (f"; only {' or '.join(map(repr, only[key]))} is"
                                  if key in only else ""))


def check_numbers(config, keys, where):
    """Refuse by name what is no whole number above 0, or a tuple of such, and has to be; and what
    is more than any model has: building it would fill the memory."""
    for key in keys:
        value, most = config.get(key, 1), 100 if "layers" in key else 10 ** 6
        numbers = value if isinstance(value, tuple) else [value]
        if not numbers or not all(type(n) is int and 0 < n <= most for n in numbers):
            raise WeightsError(f"{where}: {key} = {value!r} is not supported; only a whole number "
                               f"above 0 and at most {most} is")


def unet_config(config, where="unet"):
    """diffusers' unet/config.json -> UNetConfig."""
    check(config, UNET, UNET_ONLY, where)
    get = (UNET | config).get
    channels, down, up = (tuple(get(key))
                          for key in ("block_out_channels", "down_block_types", "up_block_types"))
    if (not set(down) <= {"CrossAttnDownBlock2D", "DownBlock2D"}
            or up != tuple(kind.replace("Down", "Up") for kind in reversed(down))):
        raise WeightsError(f"{where}: the block types {', '.join(down + up)} are not supported")
    each = lambda value: (tuple(value) if isinstance(value, (list, tuple))
                          else (value,) * len(channels))
    blocks = each(get("transformer_layers_per_block"))
    # the latter is a misnomer in these files
    heads = each(get("num_attention_heads") or get("attention_head_dim"))
    layers, width = get("layers_per_block"), get("cross_attention_dim")
    if isinstance(width, (list, tuple)) and len(set(width)) == 1:
        width = width[0]                    # one for each level, and all the same
    if (not all(isinstance(n, int) for n in (layers, *blocks, *heads, *channels))
            or not len(channels) == len(down) == len(heads) == len(blocks)):
        raise WeightsError(f"{where}: its lists do not have one number for each of "
                           f"{len(channels)} levels")
    pooled = bool(get("addition_embed_type"))
    numbers = {"norm_num_groups": get("norm_num_groups"), "cross_attention_dim": width,
               "block_out_channels": channels, "attention_head_dim": heads,
               "layers_per_block": layers, "transformer_layers_per_block": blocks}
    numbers |= {key: get(key) for key in ("addition_time_embed_dim",
                                          "projection_class_embeddings_input_dim") if pooled}
    check_numbers(numbers, numbers, where)
    return UNetConfig(in_channels=4, out_channels=4, channels=channels, layers=layers, heads=heads,
                      mid_depth=blocks[-1],
                      depth=tuple(n if kind.startswith("Cross") else 0
                                  for n, kind in zip(blocks, down)),
                      context_dim=width, groups=get("norm_num_groups"),
                      size_dim=get("addition_time_embed_dim") if pooled else None,
                      vector_dim=get("projection_class_embeddings_input_dim") if pooled else None)


def vae_config(config, where="vae"):
    """diffusers' vae/config.json -> VAEConfig."""
    check(config, (*VAE_NAMES, "sample_size", "force_upcast", "down_block_types", "up_block_types"),
          VAE_ONLY, where)
    numbers = ("layers_per_block", "norm_num_groups", "block_out_channels")
    channels = tuple(config.get("block_out_channels", VAEConfig.channels))
    check_numbers(config | {"block_out_channels": channels}, numbers, where)
    scale = config.get("scaling_factor", VAEConfig.scale)
    if type(scale) not in (int, float) or not 0 < scale < math.inf:
        raise WeightsError(f"{where}: scaling_factor = {scale!r} is not supported; only a number "
                           "above 0 is")
    kinds = {*config.get("down_block_types", ()), *config.get("up_block_types", ())}
    if not kinds <= {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise WeightsError(f"{where}: the block types {', '.join(sorted(kinds))} are not supported")
    return VAEConfig(**{ours: config[key] for key, ours in VAE_NAMES.items() if key in config})


def clip_config(config, where="text_encoder"):
    """transformers' config.json of a CLIP text model -> CLIPConfig. A projection's width stands
    there even where none is used."""
    check(config, config, CLIP_ONLY, where)
    config = CLIP_DEFAULTS | config
    check_numbers(config, CLIP_DEFAULTS.keys() - {"hidden_act"}, where)
    projected = config.get("architectures") == ["CLIPTextModelWithProjection"]
    check_numbers(config, ["projection_dim"] * projected, where)
    return CLIPConfig(**{ours: config[key] for key, ours in CLIP_NAMES.items()},
                      projection=config.get("projection_dim", 512) if projected else None)


def diffusion_config(config, where="scheduler", xl=False):
    """diffusers' scheduler_config.json -> Diffusion. Every sampler of an eps- or v-model fits its
    weights: DDIM and Euler stay what they are, in place of all others (PNDM, DPM ...) DDIM or, for
    Euler's relatives, Euler samples, and that is said."""
    name = config.get("_class_name", "DDIMScheduler")
    if not isinstance(name, str) or name.startswith(("LCM", "TCD", "Flow", "EDM", "CM")):
        raise WeightsError(f"{where}: {name} belongs to another kind of model (distilled, flow "
                           "matching or EDM): not supported")
    config = DIFFUSION | config
    check(config, config, DIFFUSION_ONLY, where)
    if name in SAMPLERS:
        defaults, only = SAMPLERS[name]
        config = defaults | config
        if xl:              # of SD 1 and 2 diffusers takes 1 and False, whatever the file says
            config = {"steps_offset": 0, "clip_sample": True} | config
            only = only | {"steps_offset": (1,)}
            only |= {"clip_sample": (False,)} if name == "DDIMScheduler" else {}
        if config["timestep_spacing"] == "trailing":                # there nothing is added
            only = {key: value for key, value in only.items() if key != "steps_offset"}
        try:
            check(config, config, only, where)
        except WeightsError as error:
            raise WeightsError(f"{error} (of {name}; mend the file. It is about sampling, and "
                               "training asks no sampler)") from error
    else:
        instead = "Euler" if name.startswith("Euler") else "DDIM"
        say(f"{where}: {name} is not built; {instead} samples in its place, at the same noise "
            "levels")
    try:
        return Diffusion(
            "scaled_linear", "v" if config.get("prediction_type") == "v_prediction" else "eps",
            zero_snr=bool(config.get("rescale_betas_zero_snr")),
            spacing="trailing" if config.get("timestep_spacing") == "trailing" else "leading",
            fixed_stride=not name.startswith(("Euler", "DDPM")))
    except ValueError as error:
        raise WeightsError(f"{where}: {error}") from error


def settle(config, marked, flags, where):
    """The scheduler's settings where three may speak: its config, the weights file itself by the
    tensors that it is marked with, and flags {setting: value}. The mark wins over the config, and a
    flag too, and both are said; a flag against a mark is refused."""
    for key in marked.keys() & flags.keys():
        if marked[key] != flags[key]:
            raise WeightsError(f"{where}: the weights file says {key} = {marked[key]!r} of itself, "
                               f"and a flag {flags[key]!r}; leave the flag out")
    for key, value in (marked | flags).items():
        if key in config and config[key] != value:
            who = "a flag" if key in flags else "the weights file"
            say(f"{where}: {key} is {value!r}, as {who} says, and not {config[key]!r}")
    return config | marked | flags


def trained_size(config, factor, xl, where):
    """(height, width) of the pictures that a UNet of this config was trained on."""
    size = config.get("sample_size") or (128 if xl else 64)
    old = re.match(r"0\.[0-8]\.", str(config.get("_diffusers_version", "")))
    if old and not xl and type(size) is int and size < 64:
        say(f"{where}: sample_size {size} of an old converter is taken for 64, as by diffusers")
        size = 64
    size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise WeightsError(f"{where}: sample_size = {config['sample_size']!r} is not supported; "
                           "only a whole number or two are")
    return tuple(side * factor for side in size)


def modern(name):
    """Old names of the public files -> today's: CLIP's prefix goes, the VAE's attention has
    other names."""
    name = name.removeprefix("text_model.")
    if "mid_block.attentions.0." in name and name.startswith(("encoder.", "decoder.")):
        for old, new in {"query": "to_q", "key": "to_k", "value": "to_v",
                         "proj_attn": "to_out.0"}.items():
            name = name.replace(f".{old}.", f".{new}.")
    return name


def build(kind, config, state, dtype, where):
    """kind(config) with the weights of `state`, frozen. Raises WeightsError that shows what does
    not fit."""
    try:
        with torch.device("meta"):
            model = kind(config)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise WeightsError(f"{where}: no model has such a config.json ({error})") from error
    want = {name: p.shape for name, p in model.state_dict().items()}
    # what some files hold and nobody reads: the positions, a scale of CLIP's training, a projection
    # where none is used
    unused = ("position_ids", "logit_scale", "text_projection.weight")
    state = {modern(name): x for name, x in state.items()
             if modern(name) in want or not name.endswith(unused)}
    for name, x in state.items():           # 1x1 convolutions of old files are linear layers here
        if x.dim() == 4 and name in want and len(want[name]) == 2 and x.shape[2:] == (1, 1):
            state[name] = x[:, :, 0, 0]
    faults = {"missing": [name for name in want if name not in state],
              "unknown": [name for name in state if name not in want],
              "of another shape": [f"{name} {tuple(x.shape)}, not {tuple(want[name])}"
                                   for name, x in state.items()
                                   if name in want and x.shape != want[name]]}
    if any(faults.values()):
        shown = (f"{label}: {', '.join(sorted(names)[:3])}{' ...' if len(names) > 3 else ''}"
                 for label, names in faults.items() if names)
        raise WeightsError(f"{where}: weights and configuration do not fit; {'; '.join(shown)}")
    state = {name: x.to(dtype) for name, x in state.items()}
    # a sum reads each number once, and is finite only if all of them are
    broken = [name for name, x in state.items() if not x.sum(dtype=torch.float64).isfinite()]
    if broken:
        raise WeightsError(f"{where}: {broken[0]} is not finite in {dtype}; download it again")
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def translated(translate, config, where):
    """One of unet_config, vae_config, clip_config of a config.json. Raises WeightsError also where
    it holds what no model has."""
    try:
        return translate(config, where)
    except (TypeError, AttributeError, ValueError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{where}: no model has such a config.json ({error})") from error


KINDS = {"unet": (UNet, unet_config), "vae": (VAE, vae_config),
         "text_encoder": (CLIP, clip_config), "text_encoder_2": (CLIP, clip_config)}


def read_vae(path, config, variant, where):
    """--vae: a file, a vae/ folder, or a folder with one -> (config, tensors). What is not said
    there is as in the base's config, and its scale has to be: the UNet knows no other latents."""
    path = Path(path)
    if not path.is_dir():
        return config, vae_names(read_tensors(path))
    folder = path / "vae" if (path / "vae").is_dir() else path
    own = read_json(folder / "config.json")
    scale = lambda config: config.get("scaling_factor", VAEConfig.scale)
    if scale(own) != scale(config):
        raise WeightsError(f"--vae {path}: its latents have the scale {scale(own)}, and {where} "
                           f"wants {scale(config)}; it is of another kind of model")
    return own, read_part(folder, variant)


def load_parts(path, config=None, tokenizer=None, variant=None, dtype=torch.float32,
               prediction=None, zero_snr=None, vae=None):
    """Weights on disk -> Parts, on the CPU.

    path: a folder in diffusers' layout, or a single file. A single file holds neither tokenizer
    nor settings: tokenizer is a merges.txt, tokenizer.json or a folder with one, and config a
    folder in diffusers' layout (weights are not needed in it) whose config.json files replace the
    presets. variant "fp16" reads those files of a folder, where there are some. prediction "eps" or
    "v", zero_snr "yes" or "no" override the scheduler's: a single file of SD 2 does not say which
    it is; v is taken (the 768 model), the base model needs "eps". vae: see read_vae."""
    path = Path(path)
    if config and not Path(config).is_dir():
        raise WeightsError(f"{config}: --config is a folder in diffusers' layout; there is none")
    folder = path if path.is_dir() else Path(config) if config else None
    settings = lambda name: folder / name / ("scheduler_config.json" if name == "scheduler"
                                             else "config.json")
    if path.is_dir():
        names = [name for name in KINDS if (path / name).is_dir() or name == "vae" and vae]
        if names[:3] != list(KINDS)[:3]:
            raise WeightsError(f"{path}: needs unet/, vae/ and text_encoder/, as the text-to-image "
                               "models of Stable Diffusion 1, 2 and XL have them (the XL refiner, "
                               "other models and single parts do not)")
        if variant and not any(path.glob(f"*/*.{variant}[.-]*")):
            raise WeightsError(f"{path}: no file of the variant {variant} in it; leave --variant "
                               "out")
        marked, own = {}, [*names, "scheduler"]
        configs = {name: read_json(settings(name)) for name in own if settings(name).is_file()
                   or name != "vae"}
        version = "xl" if "text_encoder_2" in names else "2" if configs["text_encoder"].get(
            "hidden_act") == "gelu" else "1"
        configs.setdefault("vae", PRESETS[version]["vae"])
        states = {name: read_part(path / name, variant) for name in names
                  if name != "vae" or not vae}
    else:
        tensors = read_tensors(path)
        states, presets, version = split(tensors, path)
        marked = marks(tensors)
        own = [name for name in presets if folder and settings(name).is_file()]
        configs = presets | {name: read_json(settings(name)) for name in own}
        # no setting says that it is for inpainting, but this does
        if "conv_in.weight" in states["unet"]:
            configs["unet"] = configs["unet"] | {
                "in_channels": states["unet"]["conv_in.weight"].shape[1]}
        if not vae and not states["vae"]:
            raise WeightsError(f"{path}: no VAE in it (first_stage_model.); add --vae, a file or "
                               "folder with one, or take the whole checkpoint")
        if version == "2" and "scheduler" not in own and not prediction and not marked:
            say(f"{path}: a file of SD 2 does not say what it predicts; v is taken. The base model "
                "needs --prediction eps --resolution 512")
    if vae:
        configs["vae"], states["vae"] = read_vae(vae, configs["vae"], variant, path)
    models = {}
    for name, (kind, translate) in KINDS.items():
        if name not in states:
            continue
        where = f"--vae {vae}" if vae and name == "vae" else f"{path}, {name}"
        # half precision overflows in XL's VAE; bfloat16 does not
        models[name] = build(kind, translated(translate, configs[name], where), states.pop(name),
                             torch.float32 if name == "vae" and dtype == torch.float16 else dtype,
                             where)
    unet, vae, *encoders = models.values()
    xl = len(encoders) == 2
    if bool(unet.config.vector_dim) != xl:
        raise WeightsError(f"{path}: XL's UNet goes with two text encoders, the others with one; "
                           f"this has {len(encoders)}")
    if xl and not encoders[1].config.projection:
        raise WeightsError(f"{path}: text_encoder_2 must be a CLIPTextModelWithProjection; its "
                           "config.json says that it is none")
    tokenizers = []
    for i, encoder in enumerate(encoders):
        place = tokenizer or (folder or path.parent) / ("tokenizer_2" if i else "tokenizer")
        # a file alone has no settings: OpenCLIP's pads with "!", ViT-L's with the end of text
        pad = None if not tokenizer else EOS if encoder.config.activation == "quick_gelu" else "!"
        loaded = Tokenizer.load(place, pad)
        highest = max(loaded.vocabulary.values())
        if highest >= encoder.config.vocabulary:
            raise WeightsError(f"{place}: has the token {highest}, but text encoder {i + 1} knows "
                               f"only 0 to {encoder.config.vocabulary - 1}; learned words need the "
                               "text encoder that was trained with them")
        if loaded.derived and highest + 1 < encoder.config.vocabulary:
            raise WeightsError(f"{place}: its merges make {highest + 1} tokens, and text encoder "
                               f"{i + 1} knows {encoder.config.vocabulary}; the file is cut off, "
                               "or of another model")
        end = loaded.vocabulary[EOS]
        if encoder.config.projection and encoder.config.eos not in (2, end):
            raise WeightsError(f"{path}, text_encoder_2: eos_token_id = {encoder.config.eos}, but "
                               f"{place} ends a text with {end}")
        encoder.config.eos = end            # 2 stands for it, or for the highest number of all
        tokenizers.append(loaded)
    index = (read_json(folder / "model_index.json")
             if folder and (folder / "model_index.json").is_file() else {})
    flags = {"prediction_type": {"eps": "epsilon", "v": "v_prediction"}[prediction]} if (
        prediction) else {}
    if zero_snr:
        flags |= {"rescale_betas_zero_snr": zero_snr == "yes"}
        flags |= {"timestep_spacing": "trailing"} if zero_snr == "yes" else {}
    where = f"{path}, scheduler"
    return Parts(unet, vae, encoders, tokenizers,
                 diffusion_config(settle(configs["scheduler"], marked, flags, where), where, xl),
                 xl and bool(index.get("force_zeros_for_empty_prompt", True)),
                 trained_size(configs["unet"], vae.factor, xl, f"{path}, unet"), version)
