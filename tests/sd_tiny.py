"""Tiny random Stable Diffusion models in the public layouts, made by diffusers: what the tests of
nanocpo/sd compare with."""
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
FOUR = dict(down_block_types=(CROSS_DOWN,) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + (CROSS_UP,) * 3)
UNETS = {"sd1": dict(FOUR, block_out_channels=(16, 32, 32, 32), attention_head_dim=4,
                     cross_attention_dim=24),
         "sd2": dict(FOUR, block_out_channels=(16, 32, 32, 32), attention_head_dim=(1, 2, 4, 4),
                     cross_attention_dim=24, use_linear_projection=True),
         "sdxl": dict(down_block_types=("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
                      up_block_types=(CROSS_UP, CROSS_UP, "UpBlock2D"),
                      block_out_channels=(16, 32, 32), attention_head_dim=(1, 2, 4),
                      use_linear_projection=True, cross_attention_dim=44,
                      transformer_layers_per_block=(1, 2, 3), addition_embed_type="text_time",
                      addition_time_embed_dim=8, projection_class_embeddings_input_dim=20 + 6 * 8)}
VAE = dict(block_out_channels=(8, 16, 16, 16), latent_channels=4, norm_num_groups=4,
           layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
           up_block_types=("UpDecoderBlock2D",) * 4)
TEXT = ("a boat on the water, a tree on a hill, the house by the river and its garden; don't tilt "
        "the horizon, it's the painter's rule.\n"
        "good: level horizon, subject on a third, rich colour, clear values, crisp edges. bad: "
        "tilted horizon, subject dead centre, muddy colour,\n"
        "flat values, blurred edges; 1888, 12 pictures! the rather bright painting of the other "
        "harbour in the evening")


def perturb(model, seed=1):
    """Norms start at 1 and 0, where swapped ones would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model.eval()


def train_merges(count=120):
    """Byte-pair merges of TEXT, the commonest pair first: enough of a tokenizer for all the
    tests."""
    words = [[*word[:-1], word[-1] + "</w>"]
             for word in TEXT.replace(",", " ,").replace(":", " :").split()]
    merges = []
    for _ in range(count):
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = ["".join(best)]
                i += 1
    return merges


def write_tokenizer(folder, pad=None):
    """vocab.json, merges.txt and the settings, as in the public repositories; returns the
    vocabulary."""
    from nanocpo.sd.tokenizer import Tokenizer
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    merges = train_merges()
    vocabulary = Tokenizer(merges).vocabulary
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n",
                                       encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
               "unk_token": "<|endoftext|>", "pad_token": pad or "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}))
    return vocabulary


def text_model(vocabulary, projection=None, act="quick_gelu", eos=None, width=24, layers=3):
    """A random transformers text encoder, float64."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    eos = vocabulary - 1 if eos is None else eos
    config = CLIPTextConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=40,
                            num_hidden_layers=layers, num_attention_heads=4, hidden_act=act,
                            eos_token_id=eos, bos_token_id=vocabulary - 2, pad_token_id=1,
                            projection_dim=projection or 20, attn_implementation="sdpa")
    return perturb((CLIPTextModelWithProjection if projection else CLIPTextModel)(config).double())


def pipeline(kind, folder, scheduler=None):
    """A random float64 diffusers pipeline of this kind, saved in `folder` in the public layout."""
    import diffusers
    from transformers import CLIPTokenizer
    diffusers.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    folder = Path(folder)
    size = len(write_tokenizer(folder / "tokenizer", "!" if kind == "sd2" else None))
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    unet = perturb(diffusers.UNet2DConditionModel(in_channels=4, out_channels=4, norm_num_groups=8,
                                                  layers_per_block=2, **UNETS[kind]).double())
    vae = perturb(diffusers.AutoencoderKL(
        **VAE, scaling_factor=0.13025 if kind == "sdxl" else 0.18215).double())
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                 num_train_timesteps=1000, steps_offset=1)
    if scheduler is None:
        scheduler = (diffusers.EulerDiscreteScheduler(**betas, timestep_spacing="leading")
                     if kind == "sdxl" else
                     diffusers.DDIMScheduler(
                         **betas, clip_sample=False, set_alpha_to_one=False,
                         prediction_type="v_prediction" if kind == "sd2" else "epsilon"))
    common = dict(vae=vae, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
    if kind == "sdxl":
        write_tokenizer(folder / "tokenizer_2", "!")
        pipe = diffusers.StableDiffusionXLPipeline(
            **common, text_encoder=text_model(size, eos=2),
            text_encoder_2=text_model(size, projection=20, act="gelu", width=20),
            tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
            add_watermarker=False)
    else:
        text = text_model(size, eos=2 if kind == "sd1" else None,
                          act="quick_gelu" if kind == "sd1" else "gelu")
        pipe = diffusers.StableDiffusionPipeline(**common, text_encoder=text, safety_checker=None,
                                                 feature_extractor=None,
                                                 requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


def tiny(xl=False, cache=None, zeros=True, dtype=torch.float32, seed=0, checkpointing=False):
    """A random model without any file or oracle: 48 x 48 pictures have 6 x 6 latents."""
    from nanocpo.sd.clip import CLIP, CLIPConfig
    from nanocpo.sd.names import PRESETS
    from nanocpo.sd.model import Backbone, SDModel
    from nanocpo.sd.tokenizer import Tokenizer
    from nanocpo.sd.vae import VAE, VAEConfig
    from nanocpo.sd.weights import Parts, diffusion_config
    from nanocpo.unet import UNet, UNetConfig
    torch.manual_seed(seed)
    tokenizer = Tokenizer(train_merges(), pad="!" if xl else "<|endoftext|>")
    clip = CLIPConfig(vocabulary=len(tokenizer.vocabulary), width=12, hidden=16, layers=2, heads=2)
    encoders = [CLIP(clip)] + [CLIP(CLIPConfig(**vars(clip) | {"projection": 10,
                                                               "activation": "gelu"}))] * xl
    unet = UNetConfig(in_channels=4, out_channels=4, channels=(8, 16), depth=(0, 1), heads=(2, 2),
                      groups=4, context_dim=24 if xl else 12, vector_dim=10 + 6 * 4 if xl else None,
                      size_dim=4 if xl else None)
    parts = Parts(UNet(unet), VAE(VAEConfig(channels=(4, 4, 8, 8), layers=1, groups=2)), encoders,
                  [tokenizer] * len(encoders),
                  diffusion_config(PRESETS["xl" if xl else "1"]["scheduler"]), xl and zeros,
                  version="xl" if xl else "1")
    for part in (parts.unet, parts.vae, *parts.encoders):
        perturb(part.to(dtype)).requires_grad_(False)
    return SDModel(Backbone(parts, cache=cache, size=(48, 48), checkpointing=checkpointing))


def moved(model, seed=1):
    """As after training: the adapter does something."""
    with torch.no_grad():
        for b in model.adapter.B:
            b += 0.5 * torch.randn(b.shape, generator=torch.Generator().manual_seed(seed))
    return model


def random_data(criteria, count):
    """(data: random latents of one shape, captions in turn, every leaf judged at random; a tiny
    base that knows them)."""
    from nanocpo.sd.latents import LatentPaintings
    from nanocpo.sd.model import SDModel
    base = tiny()
    rng, images = np.random.default_rng(0), np.empty(count, object)
    for i in range(count):
        images[i] = torch.from_numpy(rng.normal(size=(4, 6, 6))).float()
    states = rng.choice(np.array([-1, 1], np.int8), (count, len(criteria)))
    base.text.criteria, base.text.captions = criteria, ["a boat", "a tree"]
    return (LatentPaintings(criteria, images,
                            [f"a {('boat', 'tree')[i % 2]}" for i in range(count)], states),
            SDModel(base.backbone))


def write_pictures(folder, count=12):
    """The painter's export with pictures of several shapes, PNG and JPEG."""
    from nanocpo.toy.export import export
    from nanocpo.toy.paintings import from_painter
    export(from_painter(count=count), folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        old = folder / row["file_name"]
        image = Image.open(old).resize([(96, 64), (64, 96), (70, 70)][i % 3])
        old.unlink()
        row["file_name"] = f"{i}.{('png', 'jpg')[i % 2]}"
        image.save(folder / row["file_name"])
    # which are held out is read off the files' bytes, and these depend on the encoder: one is
    # written until it is
    last, note = folder / rows[8]["file_name"], 0
    while int(hashlib.sha256(last.read_bytes()).hexdigest()[:8], 16) % 10 != 8:
        told, note = PngInfo(), note + 1
        told.add_text("note", str(note))
        with Image.open(last) as image:
            image.load()
        image.save(last, pnginfo=told)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def files(folder, kind="sd1"):
    """(folder of tiny weights, folder of pictures, diffusers' pipeline)."""
    pipe = pipeline(kind, folder / "weights")
    write_pictures(folder / "pictures")
    return folder / "weights", folder / "pictures", pipe


def flags(files, out):
    """What both training scripts are called with to train on these files."""
    weights, pictures, _ = files
    return ["--weights", str(weights), "--data", str(pictures), "--out", str(out),
            "--resolution", "64", "--bucket-step", "16", "--device", "cpu", "--accumulate", "2",
            "--rank", "2", "--sft-lr", "0.05", "--sft-steps", "2"]
