"""VAE, text encoders, tokenizer and schedules against diffusers and transformers: float64, so that
even a wrong epsilon shows."""
import gzip
import hashlib
import importlib.metadata
import json
import random

import pytest
import torch

import sd_tiny
from nanocpo.diffusion import Diffusion, scaled_linear_alpha_bar, zero_terminal_snr
from nanocpo.sd.clip import CLIP, CLIPConfig
from nanocpo.sd.names import PRESETS
from nanocpo.sd.tokenizer import Tokenizer
from nanocpo.sd.vae import VAE, VAEConfig
from nanocpo.sd.weights import build, clip_config, unet_config, vae_config
from nanocpo.unet import UNet

# name: (class, configuration, parameters, sha256 of the sorted "name shape" lines); 4-D weights of
# linear layers squeezed
FULL = {"unet 1": (UNet, unet_config(PRESETS["1"]["unet"]), 859_520_964,
                   "1cf15a89f2b4394f1c352ef2d708a784c8455528dda8ae9e3b5ae39d649e53df"),
        "unet 2": (UNet, unet_config(PRESETS["2"]["unet"]), 865_910_724,
                   "61d626becb5b11d894e2956c6a9b97e2ef40b8dedb66529bc101650e187b27f0"),
        "unet xl": (UNet, unet_config(PRESETS["xl"]["unet"]), 2_567_463_684,
                    "9556a38d644b6b5389f13de11fde3b4314fff6224b313378827c9a1b34b67f27"),
        "vae": (VAE, vae_config({}), 83_653_863,
                "600696bc94ffc80f250f7a2b836e289ff191e5f194ce89f9aa389cfc8ef4a0ab"),
        "ViT-L": (CLIP, clip_config(PRESETS["1"]["text_encoder"]), 123_060_480,
                  "0240ea74fae34c19a2b92936882746abfaecad35ffed019f943f0eeaef38847a"),
        "OpenCLIP H": (CLIP, clip_config(PRESETS["2"]["text_encoder"]), 340_387_840,
                       "b3fb33659b67fd5121e1e4ef84a0f1b10313aae0dea3dfb11f6bec572e5fd3e3"),
        "OpenCLIP bigG": (CLIP, clip_config(PRESETS["xl"]["text_encoder_2"]), 694_659_840,
                          "e611a86ee8b584b7b75fac8f6e8208313e4535412882c4e5ff69a2749f747b3e")}


def shapes(state):
    return sorted(f"{name} {tuple(p.shape)}" for name, p in state.items())


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(ours, theirs, atol=1e-9):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


@pytest.mark.parametrize("name", FULL)
def test_names_and_shapes_of_the_full_models(name):
    kind, config, count, digest = FULL[name]
    with torch.device("meta"):
        state = kind(config).state_dict()
    assert sum(p.numel() for p in state.values()) == count
    assert hashlib.sha256("\n".join(shapes(state)).encode()).hexdigest() == digest


# that one is in test_unet.py
@pytest.mark.parametrize("name", [name for name in FULL if name != "unet 1"])
def test_full_models_have_the_oracles_names_and_shapes(name):
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    kind, config, _, _ = FULL[name]
    which = {"1": "1", "2": "2", "xl": "xl"}.get(name[5:])
    with torch.device("meta"):
        ours = kind(config).state_dict()
        if kind is UNet:
            settings = {key: tuple(v) if isinstance(v, list) else v
                        for key, v in PRESETS[which]["unet"].items()}
            theirs = diffusers.UNet2DConditionModel(
                **settings, use_linear_projection=which != "1").state_dict()
        elif kind is VAE:
            theirs = diffusers.AutoencoderKL(**{
                **sd_tiny.VAE, "block_out_channels": config.channels,
                "norm_num_groups": 32}).state_dict()
        else:
            c = transformers.CLIPTextConfig(
                hidden_size=config.width, intermediate_size=config.hidden,
                num_hidden_layers=config.layers, num_attention_heads=config.heads,
                projection_dim=config.projection or 512)
            theirs = (transformers.CLIPTextModelWithProjection if config.projection
                      else transformers.CLIPTextModel)(c).state_dict()
            theirs = {key.removeprefix("text_model."): p for key, p in theirs.items()
                      if not key.endswith("position_ids")}
    squeeze = lambda key, p: (p[:, :, 0, 0] if p.dim() == 4
                              and ("proj_in" in key or "proj_out" in key) else p)
    assert shapes(ours) == shapes({key: squeeze(key, p) for key, p in theirs.items()})


@pytest.fixture(scope="module")
def vaes():
    """The same random weights in diffusers' VAE and ours."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = sd_tiny.perturb(diffusers.AutoencoderKL(**sd_tiny.VAE).double())
    return (build(VAE, vae_config(dict(theirs.config)), theirs.state_dict(), torch.float64, "test"),
            theirs)


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (40, 56)], ids=str)
def test_vae_equals_diffusers(vaes, size):
    ours, theirs = vaes
    ours.requires_grad_(True)
    x, z = randn(2, 3, *size, seed=1), randn(2, 4, size[0] // 8, size[1] // 8, seed=2)
    expected = theirs.encode(x).latent_dist
    mean, logvar = ours.quant_conv(ours.encoder(x)).chunk(2, dim=1)
    std = (logvar.clamp(-30, 20) / 2).exp()
    close(mean, expected.mean)
    close(std, expected.std)
    close(ours.encode(x), expected.mean * 0.18215)
    decoded, want = ours.decode(z), theirs.decode(z / 0.18215).sample
    close(decoded, want)
    weights = randn(*decoded.shape, seed=3)
    got = torch.autograd.grad((decoded * weights).sum() + mean.sum() + std.sum(),
                              list(ours.parameters()))
    want = torch.autograd.grad((want * weights).sum() + expected.mean.sum() + expected.std.sum(),
                               list(theirs.parameters()))
    want = dict(zip([name for name, _ in theirs.named_parameters()], want))
    for (name, p), gradient in zip(ours.named_parameters(), got):
        torch.testing.assert_close(gradient, want[name], atol=1e-9, rtol=1e-9, msg=name)


def test_vae_takes_the_old_names_and_convolutions(vaes):
    ours, theirs = vaes
    state, old = theirs.state_dict(), {"to_q": "query", "to_k": "key", "to_v": "value",
                                       "to_out.0": "proj_attn"}
    for new, name in old.items():
        for key in [key for key in state if f".attentions.0.{new}." in key]:
            x = state.pop(key)
            state[key.replace(f".{new}.", f".{name}.")] = x[:, :, None, None] if x.dim() == 2 else x
    rebuilt = build(VAE, ours.config, state, torch.float64, "test")
    assert all(torch.equal(a, b)
               for a, b in zip(rebuilt.state_dict().values(), ours.state_dict().values()))


def test_vae_without_an_oracle():
    torch.manual_seed(0)
    vae = VAE(VAEConfig(channels=(8, 16), layers=1, groups=4)).double()
    x = randn(1, 3, 12, 10)
    latents = vae.encode(x)
    assert latents.shape == (1, 4, 6, 5) and vae.factor == 2
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        vae.encode(latents)                 # those of a Batch are not encoded: test_sd_latents.py
    assert vae.decode(latents).shape == x.shape
    assert {m.eps for m in vae.modules() if isinstance(m, torch.nn.GroupNorm)} == {1e-6}
    # padding is on the right and below only
    shifted = torch.zeros(1, 3, 12, 10, dtype=torch.float64)
    shifted[..., 0, 0] = 1.0
    conv = vae.encoder.down_blocks[0].downsamplers[0]
    h = randn(1, 8, 6, 4)
    padded = torch.nn.functional.pad(h, (0, 1, 0, 1))
    close(conv(h), torch.nn.functional.conv2d(padded, conv.conv.weight, conv.conv.bias, stride=2),
          1e-12)


@pytest.mark.parametrize("projection", [None, 20])
@pytest.mark.parametrize("eos", [2, 63])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("pad", [0, 63])
def test_clip_equals_transformers(projection, eos, act, pad):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = sd_tiny.text_model(64, projection, act, eos)
    ours = build(CLIP, clip_config(json.loads(theirs.config.to_json_string())
                                   | {"architectures": [type(theirs).__name__]}),
                 theirs.state_dict(), torch.float64, "test").requires_grad_(True)
    ids = torch.tensor([[62, 5, 9, 11, 63] + [pad] * 72, [62] + [7] * 75 + [63],
                        [62, 63] + [pad] * 75])
    expected = theirs(ids, output_hidden_states=True)
    last, penultimate, pooled = ours(ids)
    want = expected.text_embeds if projection else expected.pooler_output
    close(last, expected.last_hidden_state)
    close(penultimate, expected.hidden_states[-2])
    close(pooled, want)
    got = dict(zip([n for n, _ in ours.named_parameters()],
                   torch.autograd.grad((last ** 2).sum() + (pooled ** 2).sum(),
                                       list(ours.parameters()))))
    grads = torch.autograd.grad((expected.last_hidden_state ** 2).sum() + (want ** 2).sum(),
                                list(theirs.parameters()))
    for (name, _), gradient in zip(theirs.named_parameters(), grads):
        torch.testing.assert_close(got[name.removeprefix("text_model.")], gradient, atol=1e-9,
                                   rtol=1e-9, msg=name)


def test_clip_without_an_oracle():
    torch.manual_seed(0)
    model = CLIP(CLIPConfig(vocabulary=64, width=8, hidden=12, layers=2, heads=2)).double()
    one, other = torch.tensor([[62, 5, 9, 63, 63]]), torch.tensor([[62, 5, 9, 63, 7]])
    last, penultimate, pooled = model(one)
    # the first end of text
    assert torch.equal(pooled[0], last[0, 3]) and not torch.equal(last, penultimate)
    assert torch.equal(last[:, :4], model(other)[0][:, :4])  # causal: what follows changes nothing


# ---- tokenizer

HAND = ["", " ", "a boat", "A BOAT on the  water", "don't, it's: they'll we've I'm you'd we're",
        "12 pictures 1888", "½ Ⅷ ४ x²", "naïve café é", "e\u0301a\u0308", "ΑΣ ΟΔΟΣ", "İstanbul ẞ",
        "日本語の絵 山", "👩‍👩‍👧 emoji 🎨!", "\ufeffbom", "tab\tnew\nline\r\n", "\x00\x07 control",
        "“curly” ‘quotes’ — dash…", "a" * 300, "boat " * 100, "!!! wow !", "a!b",
        "<|endoftext|> x <|startoftext|>", "<|ENDOFTEXT|>", "x<|endoftext|>y",
        "under_score snake_case", "'s 't '", "'S it'S", "don' t", "#hash @at $5.00 50%",
        "good: level horizon, crisp edges; bad: too dark", "\u200b zero\u200dwidth",
        "\u3000wide space", "ﬁne ﬂow", "ǅ titlecase"]


@pytest.fixture(scope="module", params=["eos", "!"])
def tokenizers(request, tmp_path_factory):
    """(ours, transformers') on the same files."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    sd_tiny.write_tokenizer(folder, None if request.param == "eos" else "!")
    return Tokenizer.load(folder), transformers.CLIPTokenizer.from_pretrained(folder)


def differences(tokenizers, texts):
    ours, theirs = tokenizers
    want = theirs(texts, padding="max_length", max_length=77, truncation=True).input_ids
    return [(text, ours(text), ids) for text, ids in zip(texts, want) if ours(text) != ids]


def test_tokenizer_by_hand_cases(tokenizers):
    assert differences(tokenizers, HAND) == []


def test_tokenizer_fuzz(tokenizers):
    # assigned characters of blocks without newer combining marks, whose order the two Unicode
    # tables may see differently
    blocks = [range(32, 127)] * 4 + [range(0xA0, 0x300), range(0x391, 0x3CA), range(0x410, 0x450),
                                     range(0x4E00, 0x4F00), range(0x2010, 0x2050),
                                     range(0x1F300, 0x1F400)]
    rng = random.Random(0)
    texts = ["".join(rng.choice(["'s", " ", "the ", "boat", chr(rng.choice(rng.choice(blocks)))])
                     for _ in range(rng.randint(1, 30))) for _ in range(3000)]
    assert differences(tokenizers, [text for text in texts
                                    if "\u0378" not in text and "\u0379" not in text]) == []


def test_spaces_are_unicode_s_and_not_python_s(tokenizers):
    spaces = [f"a{chr(c)}boat {chr(c)} x" for c in (*range(9, 14), *range(0x1c, 0x21), 0x85, 0xa0)]
    assert differences(tokenizers, spaces) == []


ADDED = {"added_tokens.json": {"<cat-toy>": 0, "Zorn": 1}, "tokenizer_config.json": {
    "added_tokens_decoder": {0: {"content": "<cat-toy>", "normalized": True},
                             1: {"content": "Zorn", "normalized": False, "single_word": True}}}}


@pytest.mark.parametrize("file", [*ADDED, "tokenizer.json"])
def test_learned_words_are_tokens_of_their_own(file, tmp_path):
    transformers = pytest.importorskip("transformers")
    size = len(sd_tiny.write_tokenizer(tmp_path))
    if file == "added_tokens.json":
        new = {word: size + i for word, i in ADDED[file].items()}
    else:
        new = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {
            "added_tokens_decoder": {
                size + i: {"lstrip": False, "rstrip": False, "single_word": False,
                           "special": False} | token
                for i, token in ADDED["tokenizer_config.json"]["added_tokens_decoder"].items()}}
    (tmp_path / (file if file in ADDED else "tokenizer_config.json")).write_text(json.dumps(new))
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    folder = tmp_path
    if file == "tokenizer.json":            # as transformers 5 writes them
        folder = tmp_path / "new"
        theirs.save_pretrained(folder)
    both = Tokenizer.load(folder), theirs
    texts = ["a <cat-toy> boat", "a<CAT-TOY>b", "zorn Zorn Zorns xZorn <cat-toy><cat-toy>",
             "<cat- toy> Zorn.", "Zorn<|endoftext|>Zorn"]
    assert differences(both, texts) == []
    assert {size, size + 1} <= set(both[0]("a <cat-toy> Zorn"))
    if file == "tokenizer_config.json":
        (tmp_path / "added_tokens.json").write_text(json.dumps({"Zorn": size + 5}))
        with pytest.raises(ValueError, match=f"'Zorn' is token {size + 5} in one .* {size + 1} in "
                                             "another"):
            Tokenizer.load(tmp_path)


def test_the_longest_learned_word_is_taken():
    added = [{"content": "<a>", "id": 600}, {"content": "<a><b>", "id": 601}]
    assert Tokenizer([], added=added).encode("<A><b><a>") == [601, 600]


def test_the_real_merges():
    """Those of the public files are in a package: 49,152 - 256 - 2 merges. Where it is installed,
    transformers reads the same numbers from them."""
    try:
        packed = next(file for file in importlib.metadata.files("open_clip_torch")
                      if file.name == "bpe_simple_vocab_16e6.txt.gz")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("open_clip_torch is not installed")
    transformers = pytest.importorskip("transformers")
    lines = gzip.decompress(packed.locate().read_bytes()).decode("utf-8").split("\n")
    ours = Tokenizer([line.split() for line in lines[1:49152 - 256 - 2 + 1]])
    assert len(ours.vocabulary) == 49408 and ours("a photo of a cat")[:7] == [
        49406, 320, 1125, 539, 320, 2368, 49407]
    theirs = transformers.CLIPTokenizer(vocab=dict(ours.vocabulary), merges=list(ours.rank))
    blocks = [range(32, 127)] * 4 + [range(0xA0, 0x300), range(0x391, 0x3CA), range(0x410, 0x450)]
    rng = random.Random(0)
    texts = HAND + ["".join(rng.choice(["'s", " ", "the ", "boat", "painting ",
                                        chr(rng.choice(rng.choice(blocks)))])
                            for _ in range(rng.randint(1, 30))) for _ in range(2000)]
    want = theirs(texts, padding="max_length", max_length=77, truncation=True).input_ids
    ends = [ids[:ids.index(49407) + 1] for ids in want]            # the padding is another test's
    assert [ours(text)[:len(ids)] for text, ids in zip(texts, ends)] == ends


def test_tokenizer_json_and_merges_alone_say_the_same(tokenizers, tmp_path):
    ours, theirs = tokenizers
    theirs.save_pretrained(tmp_path / "new")             # transformers 5 writes tokenizer.json only
    assert ((tmp_path / "new" / "tokenizer.json").is_file()
            and not (tmp_path / "new" / "vocab.json").exists())
    (tmp_path / "merges.txt").write_text("\n".join(map(" ".join, ours.rank)), encoding="utf-8")
    new, alone = Tokenizer.load(tmp_path / "new"), Tokenizer.load(tmp_path / "merges.txt")
    assert (new.vocabulary == alone.vocabulary == ours.vocabulary
            and new.rank == ours.rank and new.pad == ours.pad)
    assert [new(text) for text in HAND] == [ours(text) for text in HAND]


def test_tokenizer_without_an_oracle(tmp_path):
    tokenizer = Tokenizer([("b", "o"), ("bo", "a"), ("boa", "t</w>"), ("#", "v</w>")])
    a = tokenizer.vocabulary["a</w>"]
    assert (a, tokenizer.vocabulary["!"], tokenizer.vocabulary["bo"],
            len(tokenizer.vocabulary)) == (256 + 64, 0, 512, 518)
    assert tokenizer("a Boat") == [516, a, 514] + [517] * 74      # 512 + 4 merges, then BOS and EOS
    assert len(tokenizer("a " * 200)) == 77 and tokenizer("a " * 200)[-1] == 517
    (tmp_path / "merges.txt").write_text("#version: 0.2\n# v</w>\nb o\n", encoding="utf-8")
    # only the header is skipped
    assert list(Tokenizer.load(tmp_path).rank) == [("#", "v</w>"), ("b", "o")]
    (tmp_path / "merges.txt").write_text("#version: 0.2\nb o a\n", encoding="utf-8")
    with pytest.raises(ValueError, match="merges.txt: cannot be read"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer in .*nowhere.txt; give --tokenizer"):
        Tokenizer.load(tmp_path / "nowhere.txt")


# ---- schedules

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
             num_train_timesteps=1000)


def predictor(seed=0):
    """Some smooth answer that depends on x and t."""
    shift = randn(1, 4, 4, 4, seed=seed)
    return lambda x, t: (0.7 * torch.tanh(x + shift)
                         + 0.1 * (t.double() / 1000).view(-1, 1, 1, 1) * x)


def run_theirs(scheduler, x, count, predict, eta=None, generator=None):
    """diffusers' loop; the scheduler takes our alpha_bar, since its own is float32."""
    scheduler.set_timesteps(count)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, t)
        kwargs = {} if eta is None else {"eta": eta}
        if generator is not None:
            kwargs["generator"] = generator
        x = scheduler.step(predict(model_input, t.view(1).long()), t, x, **kwargs).prev_sample
    return x


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("name, zero_snr", [("DDIM", False), ("DDIM", True), ("DDIM eta", False),
                                            ("DDPM", False), ("Euler", False), ("Euler", True)])
def test_samplers_equal_diffusers(spacing, prediction, name, zero_snr):
    diffusers = pytest.importorskip("diffusers")
    if zero_snr and prediction == "eps":
        pytest.skip("zero SNR needs v")
    ours = Diffusion("scaled_linear", prediction, zero_snr=zero_snr, spacing=spacing,
                     fixed_stride=name.startswith("DDIM"))
    settings = BETAS | dict(prediction_type="epsilon" if prediction == "eps" else "v_prediction",
                            timestep_spacing=spacing, steps_offset=1,
                            rescale_betas_zero_snr=zero_snr)
    kind = getattr(diffusers, {"DDIM": "DDIMScheduler", "DDPM": "DDPMScheduler",
                               "Euler": "EulerDiscreteScheduler"}[name.split()[0]])
    extra = {"DDIM": dict(clip_sample=False, set_alpha_to_one=False),
             "DDPM": dict(clip_sample=False)}.get(name.split()[0], {})
    for count in (1, 7, 30, 50):
        theirs = kind(**settings, **extra)
        # the zero-SNR root is a difference, where float32 rounding shows first
        torch.testing.assert_close(theirs.alphas_cumprod.double(), ours.alpha_bar, atol=1e-7,
                                   rtol=2e-4 if zero_snr else 2e-6)
        theirs.alphas_cumprod = ours.alpha_bar.clone()
        if name.startswith("DDIM"):
            theirs.final_alpha_cumprod = ours.alpha_bar[0]
        # diffusers keeps sigma finite; so do we here, to compare the rest
        if name == "Euler" and zero_snr:
            theirs.alphas_cumprod[-1] = ours.alpha_bar[-1] = 2 ** -24
        x, generators = (randn(2, 4, 4, 4, seed=count),
                         [torch.Generator().manual_seed(5) for _ in range(2)])
        eta = {"DDPM": 1.0, "DDIM eta": 1.0}.get(name, 0.0)
        start = (x if spacing == "leading" or name != "Euler"
                 else x * (1 - ours.alpha_bar[999]).sqrt())
        got = ours.sample(predictor(), start, count, eta, generators[0])
        want = run_theirs(theirs, x, count, predictor(), eta if name.startswith("DDIM") else None,
                          generators[1] if eta else None)
        assert ours.timesteps(count).tolist() == [round(float(t)) for t in theirs.timesteps]
        scale = want.abs().max()
        # diffusers' Euler is float32 inside
        close(got / scale, want / scale, (2e-5 if zero_snr else 3e-6) if name == "Euler" else 1e-9)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_every_count_has_diffusers_timesteps(spacing):
    diffusers = pytest.importorskip("diffusers")
    ours, theirs = (Diffusion("scaled_linear", "eps", spacing=spacing),
                    diffusers.DDIMScheduler(**BETAS, timestep_spacing=spacing, steps_offset=1))
    for count in range(1, 1000):
        theirs.set_timesteps(count)
        # some of theirs end in an extra -1
        assert ours.timesteps(count).tolist() == theirs.timesteps.tolist()[:count], count


def test_noising_and_goal_equal_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(**BETAS)
    theirs.alphas_cumprod = scaled_linear_alpha_bar()
    x0, noise, t = randn(3, 4, 4, 4, seed=1), randn(3, 4, 4, 4, seed=2), torch.tensor([0, 500, 999])
    ours = Diffusion("scaled_linear", "v")
    close(ours.q_sample(x0, t, noise), theirs.add_noise(x0, noise, t), 1e-12)
    close(ours.goal(x0, t, noise), theirs.get_velocity(x0, noise, t), 1e-12)


def test_schedules_without_an_oracle():
    alpha_bar = zero_terminal_snr(scaled_linear_alpha_bar())
    assert (alpha_bar[-1] == 0 and float(alpha_bar[0]) == pytest.approx(0.99915, abs=1e-12)
            and (alpha_bar.diff() < 0).all())
    leading, trailing = (Diffusion("scaled_linear", "v", spacing=spacing)
                         for spacing in ("leading", "trailing"))
    assert leading.timesteps(50)[:2].tolist() == [981, 961] and leading.timesteps(50)[-1] == 1
    assert trailing.timesteps(3).tolist() == [999, 666, 332]
    x0 = randn(1, 4, 4, 4)
    out = Diffusion("scaled_linear", "v", zero_snr=True, spacing="trailing").sample(
        lambda xt, t: -x0, randn(1, 4, 4, 4, seed=1), 1)
    close(out, x0, 1e-12)                   # at pure noise v is -x0, and nothing is divided by zero
    for wrong, words in ((dict(spacing="linspace"), "power, leading, trailing"),
                         (dict(prediction="eps", zero_snr=True), "needs prediction v")):
        with pytest.raises(ValueError, match=words):
            Diffusion(**{"schedule": "scaled_linear", **wrong})
    with pytest.raises(ValueError, match="between 1 and 999"):
        leading.timesteps(1000)
