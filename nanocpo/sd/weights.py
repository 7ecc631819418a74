"""Public Stable Diffusion weights, a folder in diffusers' layout or a single file, as our models.

Models are built on the meta device and take the file's tensors as they are: no time for an
initialisation, no second copy in memory.
"""
from dataclasses import dataclass
from pathlib import Path

import torch

from ..diffusion import Diffusion
from ..unet import UNet, UNetConfig
from .clip import CLIP, CLIPConfig
from .files import WeightsError, read_json, read_part, read_tensors
from .names import split
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
    resolution: int = 512                   # the side of the square pictures that it was trained on


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
             "in_channels": (4,), "out_channels": (4,)}
VAE_NAMES = {"block_out_channels": "channels", "layers_per_block": "layers",
             "norm_num_groups": "groups", "scaling_factor": "scale"}
VAE_ONLY = {"act_fn": ("silu", "swish"), "use_quant_conv": (True,), "use_post_quant_conv": (True,),
            "mid_block_add_attention": (True,), "in_channels": (3,), "out_channels": (3,),
            "latent_channels": (4,)}
CLIP_NAMES = {"vocab_size": "vocabulary", "max_position_embeddings": "length",
              "hidden_size": "width", "intermediate_size": "hidden", "num_hidden_layers": "layers",
              "num_attention_heads": "heads", "hidden_act": "activation", "eos_token_id": "eos"}
CLIP_ONLY = {"hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": (1e-5,),
             "model_type": ("clip_text_model",),
             "architectures": (None, ["CLIPTextModel"], ["CLIPTextModelWithProjection"])}
DIFFUSION_ONLY = {"beta_schedule": ("scaled_linear",), "beta_start": (0.00085,),
                  "beta_end": (0.012,), "num_train_timesteps": (1000,),
                  "prediction_type": ("epsilon", "v_prediction"), "trained_betas": (None,)}
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
    layers = get("layers_per_block")
    if (not all(isinstance(n, int) for n in (layers, *blocks))
            or not len(channels) == len(down) == len(heads) == len(blocks)):
        raise WeightsError(f"{where}: its lists do not have one number for each of "
                           f"{len(channels)} levels")
    pooled = bool(get("addition_embed_type"))
    return UNetConfig(in_channels=4, out_channels=4, channels=channels, layers=layers, heads=heads,
                      mid_depth=blocks[-1],
                      depth=tuple(n if kind.startswith("Cross") else 0
                                  for n, kind in zip(blocks, down)),
                      context_dim=get("cross_attention_dim"), groups=get("norm_num_groups"),
                      size_dim=get("addition_time_embed_dim") if pooled else None,
                      vector_dim=get("projection_class_embeddings_input_dim") if pooled else None)


def vae_config(config, where="vae"):
    """diffusers' vae/config.json -> VAEConfig."""
    check(config, (*VAE_NAMES, "sample_size", "force_upcast", "down_block_types", "up_block_types"),
          VAE_ONLY, where)
    kinds = {*config.get("down_block_types", ()), *config.get("up_block_types", ())}
    if not kinds <= {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise WeightsError(f"{where}: the block types {', '.join(sorted(kinds))} are not supported")
    return VAEConfig(**{ours: config[key] for key, ours in VAE_NAMES.items() if key in config})


def clip_config(config, where="text_encoder"):
    """transformers' config.json of a CLIP text model -> CLIPConfig. A projection's width stands
    there even where none is used."""
    check(config, config, CLIP_ONLY, where)
    projected = config.get("architectures") == ["CLIPTextModelWithProjection"]
    return CLIPConfig(**{ours: config[key] for key, ours in CLIP_NAMES.items() if key in config},
                      projection=config.get("projection_dim", 512) if projected else None)


def diffusion_config(config, prediction=None, where="scheduler"):
    """diffusers' scheduler_config.json -> Diffusion. Every sampler of an eps- or v-model fits its
    weights: Euler stays Euler, all others (PNDM, DPM ...) become DDIM. prediction: "eps" or "v", if
    the file does not know better."""
    name = config.get("_class_name", "DDIMScheduler")
    if name.startswith(("LCM", "TCD", "Flow", "EDM", "CM")):
        raise WeightsError(f"{where}: {name} belongs to another kind of model (distilled, flow "
                           "matching or EDM): not supported")
    check(config, config, DIFFUSION_ONLY, where)
    return Diffusion(
        "scaled_linear",
        prediction or ("v" if config.get("prediction_type") == "v_prediction" else "eps"),
        zero_snr=bool(config.get("rescale_betas_zero_snr")),
        spacing="trailing" if config.get("timestep_spacing") == "trailing" else "leading",
        fixed_stride=not name.startswith(("Euler", "DDPM")))


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
    with torch.device("meta"):
        model = kind(config)
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
    model.load_state_dict({name: x.to(dtype) for name, x in state.items()}, assign=True)
    return model.eval().requires_grad_(False)


KINDS = {"unet": (UNet, unet_config), "vae": (VAE, vae_config),
         "text_encoder": (CLIP, clip_config), "text_encoder_2": (CLIP, clip_config)}


def load_parts(path, config=None, tokenizer=None, variant=None, dtype=torch.float32,
               prediction=None):
    """Weights on disk -> Parts, on the CPU.

    path: a folder in diffusers' layout, or a single file. A single file holds neither tokenizer
    nor settings: tokenizer is a merges.txt, tokenizer.json or a folder with one, and config a
    folder in diffusers' layout (weights are not needed in it) whose config.json files replace the
    presets. variant "fp16" reads those files of a folder. prediction "eps" or "v" overrides the
    scheduler's: a single file of SD 2 does not say which it is; v is taken (the 768 model), the
    base model needs "eps"."""
    path = Path(path)
    if config and not Path(config).is_dir():
        raise WeightsError(f"{config}: --config is a folder in diffusers' layout; there is none")
    folder = path if path.is_dir() else Path(config) if config else None
    settings = lambda name: folder / name / ("scheduler_config.json" if name == "scheduler"
                                             else "config.json")
    if path.is_dir():
        names = [name for name in KINDS if (path / name).is_dir()]
        if names[:3] != list(KINDS)[:3]:
            raise WeightsError(f"{path}: needs unet/, vae/ and text_encoder/, as the text-to-image "
                               "models of Stable Diffusion 1, 2 and XL have them (the XL refiner, "
                               "other models and single parts do not)")
        configs = {name: read_json(settings(name)) for name in [*names, "scheduler"]}
        states = {name: read_part(path / name, variant) for name in names}
    else:
        states, presets = split(read_tensors(path), path)
        configs = {name: (read_json(settings(name)) if folder and settings(name).is_file()
                          else preset)
                   for name, preset in presets.items()}
        # no setting says that it is for inpainting, but this does
        if "conv_in.weight" in states["unet"]:
            configs["unet"] = configs["unet"] | {
                "in_channels": states["unet"]["conv_in.weight"].shape[1]}
    models = {}
    for name in list(states):
        where, (kind, translate) = f"{path}, {name}", KINDS[name]
        # half precision overflows in XL's VAE; bfloat16 does not
        models[name] = build(kind, translate(configs[name], where), states.pop(name),
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
        if max(loaded.vocabulary.values()) >= encoder.config.vocabulary:
            raise WeightsError(f"{place}: knows {len(loaded.vocabulary)} tokens, but text encoder "
                               f"{i + 1} only {encoder.config.vocabulary}")
        tokenizers.append(loaded)
    index = (read_json(folder / "model_index.json")
             if folder and (folder / "model_index.json").is_file() else {})
    return Parts(unet, vae, encoders, tokenizers,
                 diffusion_config(configs["scheduler"], prediction, f"{path}, scheduler"),
                 xl and bool(index.get("force_zeros_for_empty_prompt", True)),
                 (configs["unet"].get("sample_size") or 64) * vae.factor)
