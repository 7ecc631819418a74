"""Every layout on disk gives the same tensors, what is not supported is refused by name, and
damaged files say so and run nothing."""
import json
import pickle
import re
import shutil
import sys
import types

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file                        # noqa: E402

import sd_tiny                                                            # noqa: E402
from nanocpo.sd import weights                                            # noqa: E402
from nanocpo.sd.names import BETAS, PRESETS, marks, split, unet_name      # noqa: E402
from nanocpo.sd.weights import WeightsError, load_parts, read_part, read_tensors        # noqa: E402


def tensors(parts):
    return {f"{i} {name}": p for i, part in enumerate((parts.unet, parts.vae, *parts.encoders))
            for name, p in part.state_dict().items()}


def same(a, b):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def saved(request, tmp_path_factory):
    """(kind, the folder that diffusers wrote, our parts of it)."""
    pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp(request.param)
    sd_tiny.pipeline(request.param, folder)
    return request.param, folder, load_parts(folder, dtype=torch.float64)


# ---- the original names, from the structure and independently of nanocpo/sd/names.py

def ldm_unet(depth):
    """[(diffusers' prefix, the original code's)] of a UNet with two residual blocks a level; depth
    says which levels attend."""
    pairs = [("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"),
             ("mid_block.resnets.0", "middle_block.0"),
             ("mid_block.attentions.0", "middle_block.1"),
             ("mid_block.resnets.1", "middle_block.2")]
    pairs += [(f"{ours}.linear_{i}", f"{theirs}.{2 * (i - 1)}") for i in (1, 2)
              for ours, theirs in (("time_embedding", "time_embed"),
                                   ("add_embedding", "label_emb.0"))]
    n = 1
    for level, attends in enumerate(depth):
        for i in range(2):
            pairs += [(f"down_blocks.{level}.resnets.{i}", f"input_blocks.{n}.0"),
                      (f"down_blocks.{level}.attentions.{i}", f"input_blocks.{n}.1")]
            n += 1
        pairs.append((f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{n}.0.op"))
        n += 1
    for level, attends in enumerate(reversed(depth)):
        for i in range(3):
            n = 3 * level + i
            pairs += [(f"up_blocks.{level}.resnets.{i}", f"output_blocks.{n}.0"),
                      (f"up_blocks.{level}.attentions.{i}", f"output_blocks.{n}.1")]
        pairs.append((f"up_blocks.{level}.upsamplers.0.conv",
                      f"output_blocks.{n}.{2 if attends else 1}.conv"))
    return pairs


def ldm_vae(levels):
    """The same for the VAE."""
    pairs = []
    for half, side in (("encoder", "down"), ("decoder", "up")):
        for i in (1, 2):
            pairs.append((f"{half}.mid_block.resnets.{i - 1}", f"{half}.mid.block_{i}"))
        for new, old in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
                         "to_out.0": "proj_out"}.items():
            pairs.append((f"{half}.mid_block.attentions.0.{new}", f"{half}.mid.attn_1.{old}"))
        pairs.append((f"{half}.conv_norm_out", f"{half}.norm_out"))
        for i in range(levels):
            at = i if side == "down" else levels - 1 - i
            pairs += [(f"{half}.{side}_blocks.{i}.resnets.{j}", f"{half}.{side}.{at}.block.{j}")
                      for j in range(3)]
            pairs.append((f"{half}.{side}_blocks.{i}.{side}samplers.0",
                          f"{half}.{side}.{at}.{side}sample"))
    return pairs


INNER = {"unet": {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
                  "norm2": "out_layers.0", "conv2": "out_layers.3",
                  "conv_shortcut": "skip_connection"},
         "vae": {"conv_shortcut": "nin_shortcut"}}


def original(name, pairs, inner):
    """One of diffusers' names -> the original code's."""
    for new, old in pairs:
        if name.startswith(new + "."):
            rest = name[len(new) + 1:]
            if "resnets" in new:
                part, _, tail = rest.partition(".")
                rest = f"{inner.get(part, part)}.{tail}"
            return f"{old}.{rest}"
    return name


def openclip(state):
    """A transformers text encoder's tensors -> OpenCLIP's: q, k and v stacked, the projection
    transposed, one block more than is used."""
    out, blocks = {}, 1 + max(int(m[1]) for m in (re.match(r"encoder\.layers\.(\d+)", name)
                                                  for name in state) if m)
    for name, x in state.items():
        name = name.replace("encoder.layers.", "transformer.resblocks.")
        for new, old in {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
                         "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj",
                         "final_layer_norm": "ln_final",
                         "embeddings.token_embedding": "token_embedding",
                         "embeddings.position_embedding.weight": "positional_embedding"}.items():
            name = name.replace(new, old)
        if name == "text_projection.weight":
            name, x = "text_projection", x.T.contiguous()
        if ".self_attn." in name:
            head, part, kind = re.match(r"(.*)\.self_attn\.([qkv])_proj\.(\w+)", name).groups()
            out.setdefault(f"{head}.attn.in_proj_{kind}", {})[part] = x
        else:
            out[name] = x
    out = {name: torch.cat([x["q"], x["k"], x["v"]]) if isinstance(x, dict) else x
           for name, x in out.items()}
    # SD 2 files hold a last block, a projection and a scale that it does not use
    if "text_projection" not in out:
        out |= {name.replace(f".{blocks - 1}.", f".{blocks}."): x + 1 for name, x in out.items()
                if f"resblocks.{blocks - 1}." in name}
        out["text_projection"] = torch.ones(3, 3, dtype=torch.float64)
    return out | {"logit_scale": torch.tensor(4.6, dtype=torch.float64)}


def single(kind, folder):
    """The folder's weights as one state dict of the original code."""
    read = lambda part: {name.removeprefix("text_model."): x
                         for name, x in read_part(folder / part).items()}
    depth = [c > 0 for c in weights.unet_config(
        json.loads((folder / "unet" / "config.json").read_text())).depth]
    unet = {original(name, ldm_unet(depth), INNER["unet"]): x for name, x in read("unet").items()}
    vae = {original(name, ldm_vae(4), INNER["vae"]):
           x[:, :, None, None] if "attentions" in name and x.dim() == 2 else x
           for name, x in read("vae").items()}
    state = ({f"model.diffusion_model.{name}": x for name, x in unet.items()}
             | {f"first_stage_model.{name}": x for name, x in vae.items()})
    clip = {"sd1": "cond_stage_model.transformer.text_model.", "sd2": "cond_stage_model.model.",
            "sdxl": "conditioner.embedders.0.transformer.text_model."}[kind]
    text = read("text_encoder")
    if kind == "sd2":
        text = openclip(text)
    else:
        text["embeddings.position_ids"] = torch.arange(77)[None]
        # some programs save the whole of CLIP's text half
        text |= {"text_projection.weight": torch.ones(24, 24, dtype=torch.float64),
                 "logit_scale": torch.tensor(4.6, dtype=torch.float64)}
    state |= {clip + name: x for name, x in text.items()}
    if kind == "sdxl":
        state |= {"conditioner.embedders.1.model." + name: x
                  for name, x in openclip(read("text_encoder_2")).items()}
    if kind == "sd1":
        state |= ({"model_ema.diffusion_model" + name.replace(".", ""): x + 1
                   for name, x in unet.items()} | {"model_ema.decay": torch.tensor(0.9)})
    return ({name: x.contiguous() for name, x in state.items()}
            | {"betas": torch.zeros(1000), "alphas_cumprod": torch.zeros(1000)})


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_single_files_equal_the_folder(saved, suffix, tmp_path):
    kind, folder, parts = saved
    state, path = single(kind, folder), tmp_path / f"model{suffix}"
    (save_file(state, path) if suffix == ".safetensors"
     else torch.save({"state_dict": state, "global_step": 470000}, path))
    got = load_parts(path, config=folder, dtype=torch.float64)
    assert same(got, parts)
    assert (got.diffusion.prediction, got.diffusion.fixed_stride) == (
        {"sd2": "v"}.get(kind, "eps"), kind != "sdxl")
    if kind == "sd2":
        assert load_parts(path, config=folder, prediction="eps").diffusion.prediction == "eps"
        # converted from diffusers' layout, a file has neither the last block nor the projection
        cut = {name: x for name, x in state.items()
               if not re.search(r"resblocks\.3\.|text_projection|logit_scale", name)}
        assert len(cut) < len(state) - 2
        torch.save(cut, tmp_path / "converted.ckpt")
        assert same(load_parts(tmp_path / "converted.ckpt", config=folder, dtype=torch.float64),
                    parts)
    if kind == "sdxl":                    # fine-tunes that predict v say so by the names of tensors
        torch.save(state | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])},
                   tmp_path / "v.ckpt")
        tensors = read_tensors(tmp_path / "v.ckpt")
        diffusion = weights.diffusion_config(split(tensors, "x")[1]["scheduler"] | marks(tensors))
        assert (diffusion.prediction, diffusion.spacing, diffusion.fixed_stride,
                diffusion.alpha_bar[-1]) == ("v", "trailing", False, 0)


@pytest.mark.parametrize("version", ["1", "2", "xl"])
def test_all_names_of_full_single_files(version):
    # from diffusers' names to the original code's and back; and the original's through diffusers'
    # own converter
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    from nanocpo.unet import UNet
    config = weights.unet_config(PRESETS[version]["unet"])
    with torch.device("meta"):
        ours = UNet(config).state_dict()
    pairs = ldm_unet([depth > 0 for depth in config.depth])
    originals = {name: original(name, pairs, INNER["unet"]) for name in ours}
    assert len(set(originals.values())) == len(ours)
    assert all(unet_name(old) == name for name, old in originals.items())
    settings = dict(layers_per_block=2,
                    addition_embed_type="text_time" if version == "xl" else None,
                    class_embed_type=None,
                    **{key: v for key, v in PRESETS[version]["unet"].items()
                       if key.endswith("types")})
    settings.setdefault("down_block_types", [sd_tiny.CROSS_DOWN] * 3 + ["DownBlock2D"])
    settings.setdefault("up_block_types", ["UpBlock2D"] + [sd_tiny.CROSS_UP] * 3)
    theirs = utils.convert_ldm_unet_checkpoint({f"model.diffusion_model.{old}": ours[name]
                                                for name, old in originals.items()}, settings)
    assert ({name: p.shape for name, p in theirs.items()}
            == {name: p.shape for name, p in ours.items()})


def test_variants_bins_and_shards(saved, tmp_path):
    kind, folder, parts = saved
    if kind != "sd1":
        pytest.skip("the same code for all kinds")
    state = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    stem = "diffusion_pytorch_model"
    names = sorted(state)
    for half, part in enumerate((names[:300], names[300:]), 1):
        save_file({name: state[name] for name in part},
                  tmp_path / f"{stem}-0000{half}-of-00002.safetensors")
    index = {"metadata": {},
             "weight_map": {name: f"{stem}-0000{1 + (i >= 300)}-of-00002.safetensors"
                            for i, name in enumerate(names)}}
    listing = tmp_path / f"{stem}.safetensors.index.json"
    listing.write_text(json.dumps(index))
    got = read_part(tmp_path)
    assert got.keys() == state.keys() and all(torch.equal(got[name], state[name]) for name in state)
    listing.write_text(json.dumps({"weight_map": index["weight_map"]
                                   | {names[0]: f"{stem}-00002-of-00002.safetensors"}}))
    with pytest.raises(WeightsError, match=f"index.json: {re.escape(names[0])} should be in"):
        read_part(tmp_path)
    listing.write_text(json.dumps({"weight_map": {names[0]: "../elsewhere.safetensors"}}))
    with pytest.raises(WeightsError, match="another folder"):
        read_part(tmp_path)
    listing.write_text(json.dumps({"weight_map": {names[0]: "nowhere.safetensors"}}))
    with pytest.raises(WeightsError, match="nowhere.safetensors: not found"):
        read_part(tmp_path)
    bins, half = tmp_path / "bins", tmp_path / "half"
    bins.mkdir(), half.mkdir()
    torch.save(state, bins / f"{stem}.bin")
    assert read_part(bins).keys() == state.keys()
    save_file({name: x.half() for name, x in state.items()}, half / f"{stem}.fp16.safetensors")
    assert read_part(half, "fp16")[names[0]].dtype == torch.float16
    with pytest.raises(WeightsError, match="there is .*fp16.safetensors: --variant fp16 reads it"):
        read_part(half)
    texts = load_file(folder / "text_encoder" / "model.safetensors")
    shutil.rmtree(bins), bins.mkdir()
    torch.save({f"text_model.{name.removeprefix('text_model.')}": x for name, x in texts.items()},
               bins / "pytorch_model.bin")
    assert len(read_part(bins)) == len(texts)


def test_types(saved):
    _, folder, _ = saved
    half = load_parts(folder, dtype=torch.float16)
    assert (half.unet.conv_in.weight.dtype == torch.float16
            and half.vae.quant_conv.weight.dtype == torch.float32)        # never the VAE
    assert load_parts(folder, dtype=torch.bfloat16).vae.quant_conv.weight.dtype == torch.bfloat16
    assert not any(p.is_meta or p.requires_grad for p in tensors(half).values())


# ---- refusals

@pytest.mark.parametrize("setting, words", [
    ({"in_channels": 9}, "in_channels = 9 .*inpainting"),
    ({"time_cond_proj_dim": 256}, "time_cond_proj_dim.*latent consistency"),
    ({"class_embed_type": "timestep"}, "class_embed_type.*class embeddings"),
    ({"num_class_embeds": 1000}, "num_class_embeds"),
    ({"dual_cross_attention": True}, "dual_cross_attention"),
    ({"only_cross_attention": True}, "only_cross_attention"),
    ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
    ({"act_fn": "gelu"}, "act_fn"), ({"encoder_hid_dim": 64}, "encoder_hid_dim"),
    ({"attention_type": "gated"}, "attention_type"), ({"conv_in_kernel": 1}, "conv_in_kernel"),
    ({"flip_sin_to_cos": False}, "flip_sin_to_cos"), ({"freq_shift": 1}, "freq_shift"),
    ({"addition_embed_type": "image"}, "addition_embed_type"),
    ({"some_new_thing": 3}, "some_new_thing"),
    ({"down_block_types": ["AttnDownBlock2D"] * 4}, "AttnDownBlock2D"),
    ({"attention_head_dim": [8, 8]}, "one number for each of 4"),
    ({"transformer_layers_per_block": [[1, 1], 1, 1, 1]}, "one number for each"),
    ({"norm_eps": 1e-6}, "norm_eps")])
def test_unet_settings_are_refused_by_name(setting, words):
    with pytest.raises(WeightsError, match=words):
        weights.unet_config(setting)


def test_old_names_are_those_of_the_vae_and_of_clip_alone():
    old = "decoder.mid_block.attentions.0.{}.weight"
    assert [weights.modern(old.format(name)) for name in ("query", "proj_attn", "to_k")] == [
        old.format(name) for name in ("to_q", "to_out.0", "to_k")]
    assert weights.modern("text_model.final_layer_norm.bias") == "final_layer_norm.bias"
    for name in ("mid_block.attentions.0.query.weight", "decoder.up.0.key.weight"):
        assert weights.modern(name) == name


def test_other_settings_are_refused_by_name():
    for call, setting, words in (
            (weights.vae_config, {"shift_factor": 0.1}, "shift_factor"),
            (weights.vae_config, {"use_quant_conv": False}, "use_quant_conv"),
            (weights.vae_config, {"down_block_types": ["AttnDown"]}, "AttnDown"),
            (weights.clip_config, {"hidden_act": "relu"}, "hidden_act"),
            (weights.clip_config, {"architectures": ["T5EncoderModel"]}, "T5EncoderModel"),
            (weights.clip_config, {"hidden_size": 0}, "text_encoder: hidden_size = 0"),
            (weights.clip_config, {"architectures": ["CLIPTextModelWithProjection"],
                                   "projection_dim": -1}, "projection_dim = -1"),
            (weights.diffusion_config, BETAS | {"prediction_type": "sample"}, "prediction_type"),
            (weights.diffusion_config, {"beta_schedule": "linear"}, "beta_schedule"),
            # diffusers' defaults, which public files never mean
            (weights.diffusion_config, {"_class_name": "PNDMScheduler"}, "schedule = 'linear'"),
            (weights.diffusion_config, {"beta_schedule": "scaled_linear"}, "beta_start = 0.0001"),
            (weights.diffusion_config, {"_class_name": "LCMScheduler"}, "LCMScheduler")):
        with pytest.raises(WeightsError, match=words):
            call(setting)
    pndm = weights.diffusion_config(BETAS | {"_class_name": "PNDMScheduler",
                                             "skip_prk_steps": True})
    assert (pndm.fixed_stride, pndm.spacing, pndm.prediction) == (True, "leading", "eps")


def test_settings_that_are_read():
    """The number of heads stands under either name; with zero-terminal SNR the last step is pure
    noise."""
    config = {"attention_head_dim": 64, "num_attention_heads": [5, 10, 20, 20]}
    assert (weights.unet_config(config).heads == (5, 10, 20, 20)
            and weights.unet_config({"attention_head_dim": 5}).heads == (5,) * 4)
    settings = BETAS | {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    usual, zero = (weights.diffusion_config(settings | {"rescale_betas_zero_snr": value})
                   for value in (False, True))
    assert usual.alpha_bar[-1] > 0.004 and zero.alpha_bar[-1] == 0
    assert (usual.prediction == zero.prediction == "v" and usual.spacing == "trailing"
            and usual.fixed_stride is True)


def test_presets_say_what_the_public_configurations_say():
    """What changes no shape: the latents' scale, the number of heads, what is predicted, the text
    encoder's activation."""
    presets = [PRESETS[version] for version in ("1", "2", "xl")]
    assert [weights.vae_config(p["vae"]).scale for p in presets] == [0.18215, 0.18215, 0.13025]
    assert ([weights.unet_config(p["unet"]).heads for p in presets]
            == [(8,) * 4, (5, 10, 20, 20), (5, 10, 20)])
    assert ([weights.diffusion_config(p["scheduler"]).prediction for p in presets]
            == ["eps", "v", "eps"])
    assert ([weights.clip_config(p["text_encoder"]).activation for p in presets]
            == ["quick_gelu", "gelu", "quick_gelu"])
    assert [p["unet"]["sample_size"] for p in presets] == [64, 96, 128]


@pytest.mark.parametrize("names, words", [
    (["conditioner.embedders.0.model.x"], "refiner"), (["edm_mean"], "EDM"),
    (["edm_vpred.sigma_max"], "EDM"), (["control_model.x"], "ControlNet"),
    (["something.else"], "no UNet")])
def test_other_single_files_are_refused_by_name(names, words, tmp_path):
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=f"x.safetensors: .*{words}"):
        load_parts(tmp_path / "x.safetensors")


def test_inpainting_single_file_and_missing_tokenizer(saved, tmp_path):
    kind, folder, _ = saved
    state = single(kind, folder)
    save_file(state, tmp_path / "plain.safetensors")
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*", "*.safetensors"))
    with pytest.raises(WeightsError, match="no tokenizer.*; give --tokenizer"):
        load_parts(tmp_path / "plain.safetensors", config=bare)
    got = load_parts(tmp_path / "plain.safetensors", config=bare,
                     tokenizer=folder / "tokenizer" / "merges.txt", dtype=torch.float64)
    assert [t.pad for t in got.tokenizers] == {
        "sd1": [len(got.tokenizers[0].vocabulary) - 1], "sd2": [0],
        "sdxl": [len(got.tokenizers[0].vocabulary) - 1, 0]}[kind]
    names = (folder / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / "merges.txt").write_text("\n".join(names[:-5]), encoding="utf-8")
    words = f"merges.txt: its merges make {len(got.tokenizers[0].vocabulary) - 5} tokens, and text"
    with pytest.raises(WeightsError, match=f"{words} encoder 1 knows .* the file is cut off"):
        load_parts(tmp_path / "plain.safetensors", config=bare, tokenizer=tmp_path / "merges.txt")
    (tmp_path / "merges.txt").write_text("\n".join([*names, "b b"]), encoding="utf-8")
    with pytest.raises(WeightsError, match="has the token .*, but text encoder 1 knows only 0 to"):
        load_parts(tmp_path / "plain.safetensors", config=bare, tokenizer=tmp_path / "merges.txt")
    state["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(16, 9, 3, 3)
    save_file(state, tmp_path / "nine.safetensors")
    with pytest.raises(WeightsError, match="nine.safetensors, unet: in_channels = 9.*inpainting"):
        load_parts(tmp_path / "nine.safetensors", config=folder)


def test_weights_that_do_not_fit_are_shown(saved, tmp_path):
    kind, folder, _ = saved
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["extra"], state["conv_out.bias"] = state.pop("conv_in.bias"), torch.zeros(5)
    save_file(state, file)
    with pytest.raises(WeightsError,
                       match=r"unet.*missing: conv_in.bias; unknown: extra; "
                             r"of another shape: conv_out.bias \(5,\), not \(4,\)"):
        load_parts(broken)
    shutil.rmtree(broken / "text_encoder")
    with pytest.raises(WeightsError, match="needs unet/, vae/ and text_encoder/"):
        load_parts(broken)


def test_xl_needs_both_text_encoders_and_the_second_one_s_projection(saved, tmp_path):
    kind, folder, _ = saved
    if kind != "sdxl":
        pytest.skip("of XL")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    config = broken / "text_encoder_2" / "config.json"
    config.write_text(config.read_text().replace("CLIPTextModelWithProjection", "CLIPTextModel"))
    with pytest.raises(WeightsError, match="text_encoder_2 must be a CLIPTextModelWithProjection"):
        load_parts(broken)
    shutil.rmtree(broken / "text_encoder_2")
    with pytest.raises(WeightsError, match="two text encoders.*this has 1"):
        load_parts(broken)


# ---- two sources that disagree, and settings of other shapes

@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    """(folder of a tiny XL, its single file with the marks v_pred and ztsnr)."""
    pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("xl")
    sd_tiny.pipeline("sdxl", folder / "stock")
    save_file(single("sdxl", folder / "stock") | {"v_pred": torch.zeros(1),
                                                  "ztsnr": torch.zeros(1)},
              folder / "marked.safetensors")
    return folder / "stock", folder / "marked.safetensors"


def is_v(diffusion):
    return (diffusion.prediction, diffusion.spacing, float(diffusion.alpha_bar[-1])) == (
        "v", "trailing", 0.0)


def test_what_a_file_says_of_itself_wins_and_is_said(xl, capsys):
    stock, marked = xl
    parts = load_parts(marked, config=stock)
    assert is_v(parts.diffusion) and parts.version == "xl"
    said = capsys.readouterr().out
    assert ("prediction_type is 'v_prediction', as the weights file says, and not 'epsilon'" in said
            and "timestep_spacing is 'trailing'" in said
            and "rescale_betas_zero_snr is True" in said)
    for flags in ({"prediction": "eps"}, {"zero_snr": "no"}):
        with pytest.raises(WeightsError, match="weights file says .* of itself, and a flag"):
            load_parts(marked, config=stock, **flags)
    assert is_v(load_parts(marked, config=stock, prediction="v", zero_snr="yes").diffusion)


def test_a_flag_wins_over_a_config_and_is_said(xl, capsys):
    stock, _ = xl
    diffusion = load_parts(stock, prediction="v", zero_snr="yes").diffusion
    said = capsys.readouterr().out
    assert is_v(diffusion) and "prediction_type is 'v_prediction', as a flag says" in said
    assert not is_v(load_parts(stock, prediction="v", zero_snr="no").diffusion)
    # pure noise does not tell x0 from eps
    with pytest.raises(ValueError, match="needs prediction v"):
        load_parts(stock, zero_snr="yes")


def test_a_file_of_sd_2_does_not_say_what_it_predicts(tmp_path, capsys):
    pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    sd_tiny.pipeline("sd2", tmp_path / "folder")
    shutil.rmtree(tmp_path / "folder" / "scheduler")
    save_file(single("sd2", tmp_path / "folder"), tmp_path / "two.safetensors")
    parts = load_parts(tmp_path / "two.safetensors", config=tmp_path / "folder")
    assert (parts.version, parts.diffusion.prediction) == ("2", "v")
    assert "v is taken. The base model needs --prediction eps" in capsys.readouterr().out


def test_variants_are_chosen_file_by_file(xl, tmp_path, capsys):
    """One part without the variant; a .bin beside the variant; a variant's .bin beside a file."""
    stock, _ = xl
    mixed, stem = tmp_path / "mixed", "diffusion_pytorch_model"
    shutil.copytree(stock, mixed)
    want = load_parts(stock, dtype=torch.float64)
    state = load_file(stock / "text_encoder" / "model.safetensors")
    with pytest.raises(WeightsError, match="no file of the variant fp16 in it"):
        load_parts(mixed, variant="fp16")
    (mixed / "unet" / f"{stem}.safetensors").rename(mixed / "unet" / f"{stem}.fp16.safetensors")
    assert same(load_parts(mixed, variant="fp16", dtype=torch.float64), want)
    said = capsys.readouterr().out
    assert ("vae: no file of the variant fp16; diffusion_pytorch_model.safetensors is read" in said
            and "unet: no file" not in said)
    text = mixed / "text_encoder"
    (text / "model.safetensors").unlink()
    save_file({name: x + 1 for name, x in state.items()}, text / "model.fp16.safetensors")
    torch.save(state, text / "pytorch_model.bin")
    assert all(torch.equal(read_part(text, "fp16")[name], x + 1) for name, x in state.items())
    assert all(torch.equal(read_part(text)[name], x) for name, x in state.items())
    (text / "model.fp16.safetensors").rename(text / "model.safetensors")
    (text / "pytorch_model.bin").rename(text / "pytorch_model.fp16.bin")
    assert all(torch.equal(read_part(text, "fp16")[name], x) for name, x in state.items())


@pytest.mark.parametrize("setting, size", [
    ({"sample_size": [48, 64]}, (384, 512)), ({"sample_size": 32}, (256, 256)),
    ({"sample_size": 32, "_diffusers_version": "0.6.0"}, (512, 512)),
    ({"sample_size": 32, "_diffusers_version": "0.10.0"}, (256, 256)), ({}, (512, 512))])
def test_the_size_that_a_base_was_trained_on(setting, size, capsys):
    assert weights.trained_size(setting, 8, False, "x") == size
    said = "x: sample_size 32 of an old converter is taken for 64, as by diffusers\n"
    assert capsys.readouterr().out == (said if setting.get("_diffusers_version") == "0.6.0" else "")
    assert weights.trained_size({}, 8, True, "x") == (1024, 1024)
    for side, told in ((63, True), (64, False)):                # no smaller than today's: it stays
        old = {"sample_size": side, "_diffusers_version": "0.8.1"}
        assert weights.trained_size(old, 8, False, "x") == (512, 512)
        assert ("old converter" in capsys.readouterr().out) == told
    for wrong in ([64], "64", [64, None], 6.5):
        with pytest.raises(WeightsError, match="x: sample_size = "):
            weights.trained_size({"sample_size": wrong}, 8, False, "x")


def test_settings_of_other_types_are_refused_by_name():
    assert weights.unet_config({"cross_attention_dim": [768] * 4}).context_dim == 768
    for call, setting in ((weights.unet_config, {"cross_attention_dim": [768, 768, 768, 1024]}),
                          (weights.unet_config, {"norm_num_groups": None}),
                          (weights.unet_config, {"_class_name": "UNetFlatConditionModel"}),
                          (weights.vae_config, {"norm_num_groups": None}),
                          (weights.vae_config, {"_class_name": "AutoencoderTiny"}),
                          *((weights.vae_config, {"scaling_factor": scale}) for scale in (
                              "0.18", None, 0, -1.0, float("nan"), float("inf"), True)),
                          (weights.vae_config, {"block_out_channels": [8, 0]}),
                          (weights.unet_config, {"layers_per_block": 10 ** 9}),
                          (weights.clip_config, {"num_hidden_layers": 10 ** 9}),
                          (weights.clip_config, {"vocab_size": 1.5}),
                          (weights.clip_config, {"num_attention_heads": "8"}),
                          (weights.clip_config, {"quantization_config": {"load_in_8bit": True}})):
        with pytest.raises(WeightsError, match=f"{list(setting)[0]} = .* is not supported"):
            call(setting)
    with pytest.raises(WeightsError, match="one number for each of 4"):
        weights.unet_config({"attention_head_dim": None})
    with pytest.raises(WeightsError, match="there: no model has such a config.json"):
        weights.build(weights.UNet, weights.unet_config({"norm_num_groups": 7}), {}, torch.float32,
                      "there")


def test_what_a_text_encoder_s_config_leaves_out_is_transformers_default():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTextConfig()
    assert all(getattr(theirs, key) == value for key, value in weights.CLIP_DEFAULTS.items())
    assert weights.clip_config({}).heads == 8


EULER = BETAS | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}


@pytest.mark.parametrize("setting", [
    {"timestep_spacing": "linspace"}, {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}, {"sigma_max": 10.0},
    {"timestep_type": "continuous"}, {"final_sigmas_type": "sigma_min"}])
def test_settings_of_a_sampler_that_is_built_are_refused_or_done(setting):
    weights.diffusion_config(EULER)
    with pytest.raises(WeightsError, match=f"{list(setting)[0]} = .*about sampling, and training"):
        weights.diffusion_config(EULER | setting)


def test_defaults_of_the_samplers_are_diffusers_own(capsys):
    diffusers = pytest.importorskip("diffusers")
    for name, (defaults, _) in weights.SAMPLERS.items():
        theirs = getattr(diffusers, name)().config
        assert all(theirs[key] == value for key, value in (defaults | weights.DIFFUSION).items())
    without = {key: value for key, value in EULER.items() if key != "timestep_spacing"}
    with pytest.raises(WeightsError, match="timestep_spacing = 'linspace'"):
        weights.diffusion_config(without)
    for wrong in ({"set_alpha_to_one": True}, {"thresholding": True},
                  {"timestep_spacing": "linspace"}):
        with pytest.raises(WeightsError, match=list(wrong)[0]):
            weights.diffusion_config(BETAS | wrong)
    # of SD 1 and 2 diffusers itself takes 1
    weights.diffusion_config(BETAS | {"steps_offset": 0})
    whole = BETAS | {"clip_sample": False}
    weights.diffusion_config(whole, xl=True)
    with pytest.raises(WeightsError, match="steps_offset = 0"):
        weights.diffusion_config(whole | {"steps_offset": 0}, xl=True)
    weights.diffusion_config(whole | {"steps_offset": 0, "timestep_spacing": "trailing"}, xl=True)
    weights.diffusion_config(BETAS)
    with pytest.raises(WeightsError, match="clip_sample = True"):
        weights.diffusion_config(BETAS, xl=True)
    weights.diffusion_config(EULER | {"clip_sample": True}, xl=True)       # Euler does not read it
    assert capsys.readouterr().out == ""
    weights.diffusion_config(BETAS | {"_class_name": "DPMSolverMultistepScheduler",
                                      "use_karras_sigmas": True})
    assert ("DPMSolverMultistepScheduler is not built; DDIM samples in its place"
            in capsys.readouterr().out)


def test_a_vae_from_elsewhere(xl, tmp_path):
    """A folder, a vae/ folder, a file in either code's names; the scale is the base's."""
    stock, marked = xl
    state = {name: x * 1.5 for name, x in read_part(stock / "vae").items()}
    shutil.copytree(stock / "vae", tmp_path / "vae")
    save_file(state, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(state, tmp_path / "names.safetensors")
    pairs = ldm_vae(4)
    old = {original(name, pairs, INNER["vae"]): x for name, x in state.items()}
    torch.save({"state_dict": old | {"loss.x": torch.zeros(1)}}, tmp_path / "old.ckpt")
    save_file({f"first_stage_model.{name}": x for name, x in old.items()} | {"x": torch.zeros(1)},
              tmp_path / "whole.safetensors")
    for vae in (tmp_path, tmp_path / "vae", tmp_path / "names.safetensors", tmp_path / "old.ckpt",
                tmp_path / "whole.safetensors"):
        for path, config in ((stock, None), (marked, stock)):
            got = load_parts(path, config=config, vae=vae, dtype=torch.float64).vae
            assert got.config.scale == 0.13025
            assert all(torch.equal(got.get_parameter(name), x) for name, x in state.items()), vae
    lean = {name: x for name, x in load_file(marked).items()
            if not name.startswith("first_stage_model.")}
    save_file(lean, tmp_path / "lean.safetensors")
    with pytest.raises(WeightsError, match="lean.safetensors: no VAE in it .*; add --vae"):
        load_parts(tmp_path / "lean.safetensors", config=stock)
    load_parts(tmp_path / "lean.safetensors", config=stock, vae=tmp_path)
    bare = tmp_path / "bare"
    shutil.copytree(stock, bare, ignore=shutil.ignore_patterns("vae"))
    load_parts(bare, vae=tmp_path)
    file = tmp_path / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 0.18215}))
    with pytest.raises(WeightsError, match="--vae .*scale 0.18215, and .* wants 0.13025; .*kind"):
        load_parts(stock, vae=tmp_path)


def test_the_end_of_a_text_is_the_tokenizer_s(tmp_path):
    """Two learned words: with eos_token_id 2 the vocabulary's last token is one of them."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    pipe = sd_tiny.pipeline("sdxl", tmp_path)
    size = len(pipe.tokenizer)
    torch.manual_seed(0)
    for part in ("tokenizer", "tokenizer_2"):
        for old in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / part / old).unlink(missing_ok=True)
        sd_tiny.write_tokenizer(tmp_path / part, "!" if part == "tokenizer_2" else None)
        (tmp_path / part / "added_tokens.json").write_text(json.dumps({"<cat-toy>": size,
                                                                       "Zorn": size + 1}))
    for part, encoder in (("text_encoder", pipe.text_encoder),
                          ("text_encoder_2", pipe.text_encoder_2)):
        encoder.resize_token_embeddings(size + 2)
        encoder.config.eos_token_id = 2
        encoder.save_pretrained(tmp_path / part)
    parts = load_parts(tmp_path, dtype=torch.float64)
    encoder, tokenizer = parts.encoders[1], parts.tokenizers[1]
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer_2")
    second = transformers.CLIPTextModelWithProjection.from_pretrained(
        tmp_path / "text_encoder_2", dtype=torch.float64)
    pooled = {}
    for text in ("a boat on the water", "a tree"):
        ids = torch.tensor([tokenizer(text)])
        assert ids[0].tolist() == theirs(text, padding="max_length", max_length=77).input_ids
        pooled[text] = encoder(ids)[2]
        torch.testing.assert_close(pooled[text], second(ids).text_embeds, atol=1e-9, rtol=0)
    assert not torch.equal(*pooled.values())
    # at a learned word transformers would pool at the word: the number is the highest. Ours is the
    # end of the text, as of an encoder whose config says where that is
    second.text_model.eos_token_id = tokenizer.vocabulary["<|endoftext|>"]
    ids = torch.tensor([tokenizer("a <cat-toy> boat")])
    assert size in ids[0].tolist()
    torch.testing.assert_close(encoder(ids)[2], second(ids).text_embeds, atol=1e-9, rtol=0)
    config = tmp_path / "text_encoder_2" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": 5}))
    with pytest.raises(WeightsError, match="text_encoder_2: eos_token_id = 5, but .*ends a text"):
        load_parts(tmp_path)


# ---- damaged and malicious files

def test_damaged_files_say_so(tmp_path):
    good = tmp_path / "good.safetensors"
    save_file({"a": torch.arange(100.0)}, good)
    content, path = good.read_bytes(), tmp_path / "bad.safetensors"
    for wrong in (content[:-50], content[:20], b"", b"\xff" * 8 + content[8:],
                  content[:8] + b"?" + content[9:], content.replace(b'"F32"', b'"F99"'),
                  b"<html>not found</html>"):
        path.write_bytes(wrong)
        with pytest.raises(WeightsError,
                           match="bad.safetensors: not a safetensors file, or cut off"):
            read_tensors(path)
    torch.save({"state_dict": {"a": torch.arange(100.0)}}, tmp_path / "good.ckpt")
    assert read_tensors(tmp_path / "good.ckpt")["a"][99] == 99
    content = (tmp_path / "good.ckpt").read_bytes()
    for wrong in (content[:-200], content[:20], b"", b"<html>"):
        (tmp_path / "bad.ckpt").write_bytes(wrong)
        with pytest.raises(WeightsError, match="bad.ckpt: "):
            read_tensors(tmp_path / "bad.ckpt")
    with pytest.raises(WeightsError, match="missing.ckpt: not found"):
        read_tensors(tmp_path / "missing.ckpt")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 1.6"])
def test_a_malicious_pickle_runs_nothing(old, tmp_path):
    trap = tmp_path / "it_ran"
    torch.save({"state_dict": Malicious(str(trap))}, tmp_path / "bad.ckpt",
               _use_new_zipfile_serialization=not old)
    with pytest.raises(WeightsError, match="nothing in it was run"):
        read_tensors(tmp_path / "bad.ckpt")
    with open(tmp_path / "raw.bin", "wb") as file:
        pickle.dump(Malicious(str(trap)), file)
    with pytest.raises(WeightsError):
        read_tensors(tmp_path / "raw.bin")
    assert not trap.exists()


def test_what_is_refused_is_named_and_no_unsafe_advice_is_given(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(2)}, "args": types.SimpleNamespace(lr=1)},
               tmp_path / "x.ckpt")
    with pytest.raises(WeightsError, match="x.ckpt: it holds types.SimpleNamespace beside its "
                                           "tensors, which is refused; nothing in it was run"
                       ) as error:
        read_tensors(tmp_path / "x.ckpt")
    assert "weights_only" not in str(error.value)


def test_files_under_the_other_name(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x.ckpt")
    assert read_tensors(tmp_path / "x.ckpt")["a"].tolist() == [1, 1]
    for new in (True, False):
        torch.save({"a": torch.ones(2)}, tmp_path / "y.safetensors",
                   _use_new_zipfile_serialization=new)
        with pytest.raises(WeightsError, match="a checkpoint of torch .*; rename it to y.ckpt"):
            read_tensors(tmp_path / "y.safetensors")


def test_old_checkpoints_with_a_training_callback_load(monkeypatch, tmp_path):
    # monkeypatch takes the made-up modules away again: reading must not need them
    name = "pytorch_lightning.callbacks.model_checkpoint"
    kind = type("ModelCheckpoint", (), {"__module__": name})
    with monkeypatch.context() as patch:
        for i in range(3):
            patch.setitem(sys.modules, ".".join(name.split(".")[:i + 1]), types.ModuleType(name))
        sys.modules[name].ModelCheckpoint = kind
        torch.save({"state_dict": {"a": torch.ones(2)},
                    "callbacks": {kind: {"best": np.float64(0.5)}}},
                   tmp_path / "own.ckpt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "own.ckpt").read_bytes()
    for module in (b"numpy.core", b"numpy._core"):           # the public files' name, and numpy 2's
        renamed, count = re.subn(rb"cnumpy\._?core\.multiarray\nscalar\n",
                                 b"c" + module + b".multiarray\nscalar\n", content)
        assert count == 1
        (tmp_path / "old.ckpt").write_bytes(renamed)
        assert read_tensors(tmp_path / "old.ckpt")["a"].tolist() == [1, 1]


def test_without_safetensors_the_error_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(WeightsError, match="pip install safetensors"):
        read_tensors(tmp_path / "x.safetensors")
