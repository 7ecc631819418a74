"""Single-file checkpoints (.safetensors, .ckpt of the original code bases): their names into ours,
and the configurations they lack.

    model.diffusion_model.      the UNet     first_stage_model.  the VAE
    cond_stage_model.           the text encoder of 1.x (CLIP's own names) and 2.x (OpenCLIP's)
    conditioner.embedders.0, 1  those of XL  model_ema.          the UNet's average, not read
"""
import re

from .files import WeightsError

VIT_L = {"architectures": ["CLIPTextModel"], "hidden_act": "quick_gelu", "eos_token_id": 2,
         "hidden_size": 768, "intermediate_size": 3072,
         "num_hidden_layers": 12, "num_attention_heads": 12}
OPENCLIP_H = {"architectures": ["CLIPTextModel"], "hidden_act": "gelu", "eos_token_id": 49407,
              "hidden_size": 1024, "intermediate_size": 4096,
              "num_hidden_layers": 23, "num_attention_heads": 16}
BIG_G = {"architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu",
         "eos_token_id": 49407, "hidden_size": 1280, "intermediate_size": 5120,
         "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280}
XL_UNET = {"block_out_channels": [320, 640, 1280],
           "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
           "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
           "transformer_layers_per_block": [1, 2, 10],
           "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
           "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
           "projection_class_embeddings_input_dim": 2816, "sample_size": 128}
BETAS = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
         "beta_end": 0.012, "set_alpha_to_one": False, "steps_offset": 1}
# what the config.json files of the same models say, where it differs from diffusers' defaults
PRESETS = {
    "1": {"unet": {"cross_attention_dim": 768, "sample_size": 64},
          "vae": {}, "text_encoder": VIT_L, "scheduler": BETAS},
    "2": {"unet": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
                   "sample_size": 96},
          "vae": {}, "text_encoder": OPENCLIP_H,
          "scheduler": BETAS | {"prediction_type": "v_prediction"}},
    "xl": {"unet": XL_UNET, "vae": {"scaling_factor": 0.13025},
           "text_encoder": VIT_L, "text_encoder_2": BIG_G,
           "scheduler": BETAS | {"_class_name": "EulerDiscreteScheduler",
                                 "timestep_spacing": "leading"}}}
# tensors by which a fine-tune says what it predicts, and that its schedule ends in pure noise
MARKS = {"v_pred": {"prediction_type": "v_prediction"},
         "ztsnr": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}}

TOP = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
       "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
       "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
       "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
       "middle_block.2": "mid_block.resnets.1"}
RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
          "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
          "nin_shortcut": "conv_shortcut"}
MIDDLE = {"mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1",
          "mid.attn_1": "mid_block.attentions.0", "norm_out": "conv_norm_out"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OPENCLIP = {"token_embedding": "embeddings.token_embedding",
            "positional_embedding": "embeddings.position_embedding.weight",
            "ln_final": "final_layer_norm", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
            "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "attn.out_proj": "self_attn.out_proj"}


def swap(name, table, start=False):
    """Replace the first run of whole dotted parts that the table knows; start: at the beginning of
    the name only."""
    for old, new in table.items():
        found = re.search(
            (r"^" if start else r"(?:^|(?<=\.))") + re.escape(old) + r"(?=\.|$)", name)
        if found:
            return name[:found.start()] + new + name[found.end():]
    return name


def unet_name(name):
    """A UNet's name of the original code -> ours. Every level has three blocks: two residual and
    the change of size going down, three residual going up, where the change of size hangs behind
    the last."""
    found = re.match(r"(in|out)put_blocks\.(\d+)\.(\d+)\.(.*)", name)
    if not found or name.startswith("input_blocks.0."):
        return swap(swap(name, TOP, start=True), RESNET if name.startswith("middle_block") else {})
    way, block, part, rest = found[1], int(found[2]), int(found[3]), found[4]
    level, i = divmod(block - (way == "in"), 3)
    side = "down" if way == "in" else "up"
    if rest.startswith(("op.", "conv.")):
        return f"{side}_blocks.{level}.{side}samplers.0.conv.{rest.split('.', 1)[1]}"
    return f"{side}_blocks.{level}." + (f"resnets.{i}.{swap(rest, RESNET)}" if part == 0
                                        else f"attentions.{i}.{rest}")


def attention_name(name):
    """The name of a layer in a UNet's transformer -> the original code's."""
    name = name.replace("mid_block.attentions.0.", "middle_block.1.")
    return re.sub(r"^(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.", lambda found: (
        f"input_blocks.{3 * int(found[2]) + int(found[3]) + 1}.1." if found[1] == "down"
        else f"output_blocks.{3 * int(found[2]) + int(found[3])}.1."), name)


def vae_name(name, levels):
    """A VAE's name -> ours. The decoder's levels are counted from the other end there."""
    name = swap(swap(name, MIDDLE), RESNET)
    name = re.sub(r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets.", name)
    name = re.sub(r"^encoder\.down\.(\d+)\.downsample\.",
                  r"encoder.down_blocks.\1.downsamplers.0.", name)
    up = re.match(r"decoder\.up\.(\d+)\.(block|upsample)\.(.*)", name)
    if up:
        kind = "resnets." if up[2] == "block" else "upsamplers.0."
        return f"decoder.up_blocks.{levels - 1 - int(up[1])}.{kind}{up[3]}"
    head, attention, rest = name.partition("mid_block.attentions.0.")
    return head + attention + (swap(rest, ATTENTION, start=True) if attention else rest)


def vae_names(state):
    """The tensors of a VAE, of either code base, alone or in a checkpoint, under our names."""
    inside = {name.removeprefix("first_stage_model."): x for name, x in state.items()
              if name.startswith("first_stage_model.")} or state
    levels = len({name.split(".")[2] for name in inside if name.startswith("decoder.up.")})
    return {vae_name(name, levels): x for name, x in inside.items()
            if not name.startswith(("loss.", "model_ema."))}


def marks(state):
    """What a checkpoint says of itself by the names of tensors: {scheduler's setting: value}."""
    return {key: value for mark in MARKS if mark in state for key, value in MARKS[mark].items()}


def openclip(state, penultimate=False):
    """OpenCLIP's text tower -> ours. q, k and v are stacked there; the projection is (in, out).
    penultimate: without the last block, which SD 2 does not use, where a file has it (those that
    were converted from diffusers' layout have not, nor a projection)."""
    out, unused = {}, None
    if penultimate and "text_projection" in state:
        blocks = [int(block[1])
                  for block in (re.match(r"transformer\.resblocks\.(\d+)\.", name)
                                for name in state) if block]
        unused = f"transformer.resblocks.{max(blocks, default=0)}."
    for name, tensor in state.items():
        if unused and name.startswith(unused):
            continue
        name = re.sub(r"^transformer\.resblocks\.", "encoder.layers.", name)
        stacked = re.match(r"(.*\.)attn\.in_proj_(weight|bias)$", name)
        if stacked:
            for part, piece in zip("qkv", tensor.chunk(3)):
                out[f"{stacked[1]}self_attn.{part}_proj.{stacked[2]}"] = piece
        elif name == "text_projection":
            out["text_projection.weight"] = tensor.T.contiguous()
        else:
            out[swap(name, OPENCLIP)] = tensor
    return out


# what a file that is something else has in it
OTHERS = {"conditioner.embedders.0.model.": "the XL refiner, which only finishes what the base "
                                            "model began, or SD Turbo: not supported",
          **dict.fromkeys(("edm_vpred.", "edm_mean", "edm_std"),
                          "a model in the EDM formulation: not supported"),
          "control_model.": "a ControlNet, not a text-to-image model",
          "controlnet": "a ControlNet, not a text-to-image model"}


def split(state, where):
    """A checkpoint -> ({part: its tensors under our names}, their configurations, "1", "2" or
    "xl"). Raises WeightsError on what is something else, by name. An average of the UNet's weights
    (model_ema.) is left alone: what the file calls its model is taken, as diffusers does."""
    has = lambda prefix: any(name.startswith(prefix) for name in state)
    for prefix, what in OTHERS.items():
        if has(prefix):
            raise WeightsError(f"{where}: this is {what}")
    if not has("model.diffusion_model.input_blocks."):
        raise WeightsError(f"{where}: no UNet in it (model.diffusion_model.): not a checkpoint of "
                           "Stable Diffusion 1, 2 or XL")
    cut = lambda prefix: {name[len(prefix):]: x for name, x in state.items()
                          if name.startswith(prefix)}
    parts = {"unet": {unet_name(name): x for name, x in cut("model.diffusion_model.").items()},
             "vae": vae_names(cut("first_stage_model."))}
    if has("conditioner.embedders.1.model."):
        return (parts | {"text_encoder": cut("conditioner.embedders.0.transformer."),
                         "text_encoder_2": openclip(cut("conditioner.embedders.1.model."))},
                PRESETS["xl"], "xl")
    if has("cond_stage_model.model."):
        return (parts | {"text_encoder": openclip(cut("cond_stage_model.model."),
                                                  penultimate=True)}, PRESETS["2"], "2")
    return parts | {"text_encoder": cut("cond_stage_model.transformer.")}, PRESETS["1"], "1"
