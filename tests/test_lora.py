"""Adapters on one frozen base: what they compute, what they leave alone, and the three file
layouts, with diffusers and peft as judges."""
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nanocpo.sd import lora
from nanocpo.sd.model import recomputed
from nanocpo.unet import UNet, UNetConfig

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file                        # noqa: E402

import sd_tiny                                                            # noqa: E402
from nanocpo.sd.weights import WeightsError                               # noqa: E402

CONFIG = UNetConfig(in_channels=4, out_channels=4, channels=(8, 16), depth=(1, 1), heads=(2, 2),
                    layers=2, context_dim=12, vector_dim=None, groups=4)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(adapter, seed=1):
    """As after training: B is not zero any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for b in adapter.B:
            b += 0.05 * torch.randn(b.shape, generator=generator)
    return adapter


@pytest.fixture
def plugged():
    torch.manual_seed(0)
    network = UNet(CONFIG).double()
    return network, lora.LoRA(network)


def run(plugged, adapter, seed=0):
    network, places = plugged
    with places.using(adapter):
        return network(randn(2, 4, 8, 8, seed=seed), torch.tensor([10, 700]),
                       randn(2, 5, 12, seed=seed + 1))


def test_a_new_adapter_changes_nothing_and_a_trained_one_does(plugged):
    network, places = plugged
    adapter = places.new(rank=3)
    assert len(adapter.A) == 8 * sum(1 for _ in filter(
        lambda m: type(m).__name__ == "TransformerBlock", network.modules()))
    assert all(name.endswith(lora.TARGETS) for name in adapter.place)
    plain = run(plugged, None)
    assert torch.equal(run(plugged, adapter), plain)
    trained(adapter)
    assert (run(plugged, adapter) - plain).abs().max() > 1e-3
    assert torch.equal(run(plugged, None), plain) and places.active is None             # off again


def test_an_adapter_by_hand():
    layer, x = nn.Linear(5, 7).double(), randn(3, 5)
    places = lora.LoRA(nn.ModuleDict({
        "attn": nn.ModuleDict({"to_q": layer, "norm": nn.Linear(5, 5)})}))
    adapter = trained(places.new(4))
    assert list(adapter.place) == ["attn.to_q"]
    with places.using(adapter):
        got = layer(x)
    weight = layer.weight + adapter.B[0].double() @ adapter.A[0].double()
    torch.testing.assert_close(got, x @ weight.T + layer.bias, atol=1e-12, rtol=0)


def test_only_the_acting_adapter_gets_gradients(plugged):
    network, places = plugged
    one, other = trained(places.new(2, seed=1)), trained(places.new(2, seed=2))
    before = {name: p.clone() for name, p in network.named_parameters()}
    optimizer = torch.optim.SGD([*one.parameters(), *other.parameters()], lr=0.1)
    with torch.no_grad():
        run(plugged, other)
    (run(plugged, one) ** 2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in one.parameters())
    assert all(p.grad is None for p in [*other.parameters(), *network.parameters()])
    start = one.A[0].clone()
    optimizer.step()
    assert not torch.equal(one.A[0], start)
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


def test_the_switch_is_restored_after_an_error_and_nests(plugged):
    network, places = plugged
    one, other = places.new(2), places.new(2)
    with pytest.raises(RuntimeError), places.using(one):
        with places.using(other):
            assert places.active is other
        assert places.active is one
        raise RuntimeError
    assert places.active is None


def test_checkpointing_recomputes_with_the_adapter_that_acted(plugged):
    network, places = plugged
    adapter = trained(places.new(2))
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            for level in (*network.down_blocks, network.mid_block, *network.up_blocks):
                level.step = (lambda step: lambda *inputs: recomputed(
                    step, places, *inputs))(level.step)
        adapter.zero_grad()
        loss = (run(plugged, adapter) ** 2).sum()
        # another acts by the time of the backward pass
        with places.using(trained(places.new(2, seed=9), seed=9)):
            loss.backward()
        gradients.append([p.grad.clone() for p in adapter.parameters()])
    for plain, again in zip(*gradients):
        torch.testing.assert_close(plain, again, atol=1e-12, rtol=1e-12)


def test_merging_equals_acting(plugged):
    network, places = plugged
    adapter = trained(places.new(3))
    want = run(plugged, adapter)
    lora.merge(network, adapter.pairs())
    # the adapter is float32
    torch.testing.assert_close(run(plugged, None), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", lora.LAYOUTS)
def test_every_layout_reads_back(plugged, layout, tmp_path):
    network, places = plugged
    adapter = trained(places.new(3))
    lora.save(adapter, tmp_path / "x.safetensors", layout)
    got = lora.load(tmp_path / "x.safetensors", {"unet": network})
    assert got.keys() == {"unet"} and got["unet"].keys() == adapter.place.keys()
    assert all(torch.equal(x, y) for name, pair in adapter.pairs().items()
               for x, y in zip(got["unet"][name], pair))
    again = lora.Adapter({name: [nn.Parameter(x) for x in pair]
                          for name, pair in got["unet"].items()})
    torch.testing.assert_close(run(plugged, again), run(plugged, adapter), atol=1e-5, rtol=0)


def test_alpha_is_read_wherever_it_stands(plugged, tmp_path):
    network, places = plugged
    name = next(iter(places.new(2).place))
    a, b, path = torch.randn(2, 8), torch.randn(8, 2), tmp_path / "x.safetensors"
    peft = {f"unet.{name}.lora_A.weight": a, f"unet.{name}.lora_B.weight": b}

    def scale(tensors, metadata=None):
        save_file(tensors, path, metadata)
        return round(float((lora.load(path, {"unet": network})["unet"][name][1] / b).mean()), 5)
    assert scale(peft) == 1
    assert scale(peft, {"lora_adapter_metadata": json.dumps(
        {"unet.r": 2, "unet.lora_alpha": 16})}) == 8
    pattern = {"unet.r": 4, "unet.lora_alpha": 16, "unet.alpha_pattern": {name.split(".", 2)[2]: 6},
               "unet.rank_pattern": {name: 2}}
    assert scale(peft, {"lora_adapter_metadata": json.dumps(pattern)}) == 3
    assert scale(peft, {"lora_adapter_metadata": json.dumps(
        {"unet.lora_alpha": 4, "unet.use_rslora": True})}) == round(4 / 2 ** 0.5, 5)
    flat = "lora_unet_" + name.replace(".", "_")
    assert scale({f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b,
                  f"{flat}.alpha": torch.tensor(1.0)}) == 0.5
    (tmp_path / "adapter_config.json").write_text(json.dumps(
        {"r": 2, "lora_alpha": 6, "peft_type": "LORA"}))
    own = {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    assert scale(own) == 3
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(WeightsError, match="adapter_config.json beside it"):
        scale(own)


def test_old_names_and_convolutions(plugged, tmp_path):
    network, places = plugged
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    a, b = torch.randn(2, 8), torch.randn(8, 2)
    save_file({
        f"unet.{block}.processor.to_out_lora.down.weight": a,
        f"unet.{block}.processor.to_out_lora.up.weight": b,
        "unet.down_blocks.0.attentions.0.proj_in.lora.down.weight": a[:, :, None, None].clone(),
        "unet.down_blocks.0.attentions.0.proj_in.lora.up.weight": b[:, :, None, None].clone()},
        tmp_path / "x.safetensors")
    got = lora.load(tmp_path / "x.safetensors", {"unet": network})["unet"]
    assert set(got) == {f"{block}.to_out.0", "down_blocks.0.attentions.0.proj_in"}
    assert all(torch.equal(x, y) for pair in got.values() for x, y in zip(pair, (a, b)))


@pytest.mark.parametrize("key, words", [
    ("unet.{}.hada_w1_a", "LoHa"), ("lora_unet_{}.lokr_w1", "LoKr"), ("unet.{}.dora_scale", "DoRA"),
    ("unet.nowhere.lora_A.weight", "no place"),
    ("text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.weight", "no place"),
    ("lora_unet_down_blocks_9.alpha", "no place"), ("other", "no place")])
def test_what_has_no_place_is_refused_by_name(plugged, key, words, tmp_path):
    network, places = plugged
    adapter = places.new(2)
    lora.save(adapter, tmp_path / "x.safetensors")
    key = key.format(next(iter(adapter.place)))
    save_file(load_file(tmp_path / "x.safetensors") | {key: torch.zeros(2, 8)},
              tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=f"x.safetensors: .*{key.split('.')[0]}.*{words}"):
        lora.load(tmp_path / "x.safetensors", {"unet": network})


def test_an_adapter_of_a_real_convolution_is_refused(plugged, tmp_path):
    # adapters act on linear layers: to take this one and ignore it would paint with another
    # adapter than the file's
    network, places = plugged
    name = next(name for name, m in network.named_modules() if name.endswith("conv_shortcut"))
    out, width = network.get_submodule(name).weight.shape[:2]
    for key, shape in (("down", (2, width, 1, 1)), ("up", (out, 2, 1, 1))):
        save_file({f"lora_unet_{name.replace('.', '_')}.lora_{key}.weight": torch.zeros(shape)},
                  tmp_path / "x.safetensors")
        with pytest.raises(WeightsError, match="conv_shortcut.* adapts a convolution"):
            lora.load(tmp_path / "x.safetensors", {"unet": network})


@pytest.mark.parametrize("change, words", [
    (lambda s, k: s.pop(k), "incomplete"),
    (lambda s, k: s.update({k: torch.zeros(2, 5)}), "another shape"),
    (lambda s, k: s.update({k: torch.zeros(2, 8, 3, 3)}), "adapts a convolution"),
    (lambda s, k: s.update({k: s[k] * float("nan")}), "to_q.* is not finite; train it again"),
    (lambda s, k: s.update({k: s[k] + float("inf")}), "is not finite"),
    (lambda s, k: s.update({k: torch.zeros(())}), "incomplete or of another shape"),
    (lambda s, k: s.update({k: torch.zeros(0, s[k].shape[1])}), "of another shape"),
    (lambda s, k: s.update({k.replace("lora_A.weight", "alpha"): torch.tensor(float("nan"))}),
     "is not finite"),
    (lambda s, k: s.update({k.replace("lora_A.weight", "alpha"): torch.ones(2)}),
     "its alpha cannot be read")])
def test_broken_adapters_are_refused(plugged, change, words, tmp_path):
    network, places = plugged
    lora.save(trained(places.new(2)), tmp_path / "x.safetensors")
    state = load_file(tmp_path / "x.safetensors")
    change(state, next(key for key in state if "to_q.lora_A" in key))
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=words):
        lora.load(tmp_path / "x.safetensors", {"unet": network})


@pytest.mark.parametrize("settings, words", [
    ("{", "its lora_adapter_metadata cannot be read"), ("[1]", "cannot be read"),
    ('{"unet.lora_alpha": "much"}', "its alpha cannot be read"),
    ('{"unet.lora_alpha": [1]}', "its alpha cannot be read"),
    ('{"unet.lora_alpha": NaN}', "is not finite"),
    ('{"unet.alpha_pattern": [1]}', "its alpha cannot be read"),
    ('{"unet.alpha_pattern": {"(": 1}}', "its alpha cannot be read")])
def test_settings_of_an_adapter_that_make_no_sense_are_refused(plugged, settings, words, tmp_path):
    network, places = plugged
    lora.save(places.new(2), tmp_path / "x.safetensors",
              metadata={"lora_adapter_metadata": settings})
    with pytest.raises(WeightsError, match=words):
        lora.load(tmp_path / "x.safetensors", {"unet": network})


@pytest.mark.parametrize("key, words", [
    ("bundle_emb.word.string_to_param.*", "bundled embedding .learned words.: not supported")])
def test_bundled_embeddings_are_called_what_they_are(plugged, key, words, tmp_path):
    network, places = plugged
    lora.save(places.new(2), tmp_path / "x.safetensors")
    save_file(load_file(tmp_path / "x.safetensors") | {key: torch.zeros(1, 768)},
              tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=words):
        lora.load(tmp_path / "x.safetensors", {"unet": network})


def test_what_is_named_as_an_adapter(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b""), (tmp_path / "x.pt").write_bytes(b"")
    assert lora.named(str(file)) == (file, 1) and lora.named(f"{file}:0.8") == (file, 0.8)
    assert lora.named(f"{file}:-1") == (file, -1)
    for wrong, words in ((tmp_path, "a folder; name the file in it, for example .*x.safetensors"),
                         ("someone/a-style", "not found; .*nothing is downloaded"),
                         (f"{file}:nan", "x.safetensors:nan: the strength is not finite"),
                         (f"{file}:strong", "x.safetensors:strong: not found"),
                         (tmp_path / "x.pt", "ends in .safetensors .training writes it beside")):
        with pytest.raises(WeightsError, match=words):
            lora.named(wrong)


def test_several_adapters_add_up_with_their_strengths(plugged):
    network, places = plugged
    one, two = trained(places.new(3, seed=1), seed=1), trained(places.new(2, seed=2), seed=2)
    last = next(reversed(two.place))
    more = {name: pair for name, pair in two.pairs().items() if name != last}
    both = lora.Adapter(lora.together([(one.pairs(), 0.8), (more, -2.0)]))
    for name, (a, b) in both.pairs().items():
        first, second = ([x.double() for x in pairs[name]] if name in pairs else [None] * 2
                         for pairs in (one.pairs(), more))
        want = 0.8 * first[1] @ first[0] - (2 * second[1] @ second[0] if name != last else 0)
        torch.testing.assert_close(b.double() @ a.double(), want, atol=1e-6, rtol=0)
    assert both.place.keys() == one.place.keys() and last not in more


def sd_scripts_names(xl):
    """The layers that sd-scripts knows by default in the attention of a UNet: those of SD 1 and 2
    under diffusers' names, those of XL under the original code's, as its files have them."""
    if xl:
        depth = {f"input_blocks_{n}_1": 2 if n < 6 else 10 for n in (4, 5, 7, 8)} | {
            "middle_block_1": 10} | {f"output_blocks_{n}_1": 10 if n < 3 else 2 for n in range(6)}
    else:
        depth = ({f"down_blocks_{i}_attentions_{j}": 1 for i in range(3) for j in range(2)}
                 | {"mid_block_attentions_0": 1}
                 | {f"up_blocks_{i}_attentions_{j}": 1 for i in range(1, 4) for j in range(3)})
    return {f"lora_unet_{block}_transformer_blocks_{i}_attn{n}_{layer}"
            for block, count in depth.items() for i in range(count) for n in (1, 2)
            for layer in ("to_q", "to_k", "to_v", "to_out_0")}


@pytest.mark.parametrize("version, count", [("1", 128), ("2", 128), ("xl", 560)])
def test_kohya_files_have_sd_scripts_names(version, count, tmp_path):
    from nanocpo.sd.names import PRESETS
    from nanocpo.sd.weights import unet_config
    with torch.device("meta"):
        network = UNet(unet_config(PRESETS[version]["unet"]))
    names = [name for name, m in network.named_modules() if isinstance(m, nn.Linear)
             and name.endswith(tuple("." + target for target in lora.TARGETS))]
    adapter = lora.Adapter({name: [nn.Parameter(torch.zeros(1, 1)) for _ in "AB"]
                            for name in names})
    lora.save(adapter, tmp_path / "x.safetensors", "kohya", version == "xl")
    want = sd_scripts_names(version == "xl")
    assert len(want) == count and set(load_file(tmp_path / "x.safetensors")) == {
        f"{name}.{part}" for name in want for part in ("lora_down.weight", "lora_up.weight",
                                                       "alpha")}


@pytest.mark.parametrize("version, prediction, base, architecture", [
    ("1", "eps", "sd_v1", "stable-diffusion-v1"), ("2", "eps", "sd_v2", "stable-diffusion-v2-512"),
    ("2", "v", "sd_v2_v", "stable-diffusion-v2-768-v"),
    ("xl", "eps", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base")])
def test_an_adapter_says_what_it_is(plugged, tmp_path, version, prediction, base, architecture):
    from safetensors import safe_open
    adapter = plugged[1].new(3)
    parts = SimpleNamespace(version=version, diffusion=SimpleNamespace(prediction=prediction))
    told = lora.describe("target", adapter, parts, (512, 768), ["rich colour", "level horizon"])
    lora.save(adapter, tmp_path / "x.safetensors", "kohya", metadata=told)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        got = file.metadata()
    want = {"ss_base_model_version": base, "modelspec.architecture": f"{architecture}/lora",
            "ss_network_dim": "3", "ss_network_alpha": "3.0", "ss_output_name": "target",
            "ss_v2": str(version == "2"), "modelspec.sai_model_spec": "1.0.0",
            "modelspec.resolution": "768x512",
            "modelspec.prediction_type": "v" if prediction == "v" else "epsilon",
            "modelspec.trigger_phrase": "rich colour, level horizon",
            "format": "pt", "ss_network_module": "networks.lora", "modelspec.title": "target",
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models"
            if version == "xl" else "diffusers"}
    assert got == want
    # the same adapter is the same bytes, whatever order the package has
    before = (tmp_path / "x.safetensors").read_bytes()
    for _ in range(3):
        lora.save(adapter, tmp_path / "x.safetensors", "kohya", metadata=told)
        assert (tmp_path / "x.safetensors").read_bytes() == before
    assert "modelspec.trigger_phrase" not in lora.describe("target", adapter, parts, (64, 64))


# ---- the oracles

@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def pipe(request, tmp_path_factory):
    (pytest.importorskip("diffusers"), pytest.importorskip("transformers"),
     pytest.importorskip("peft"))
    from nanocpo.sd.weights import load_parts
    folder = tmp_path_factory.mktemp("lora_" + request.param)
    theirs = sd_tiny.pipeline(request.param, folder)
    unet = load_parts(folder, dtype=torch.float64).unet
    return request.param, theirs, unet, lora.LoRA(unet)


def unet_inputs(kind):
    x, context, t = (randn(2, 4, 8, 8, seed=1), randn(2, 7, 44 if kind == "sdxl" else 24, seed=2),
                     torch.tensor([17, 903]))
    if kind != "sdxl":
        return (x, t, context), {}
    pooled, sizes = randn(2, 20, seed=3), torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    return ((x, t, context, pooled, sizes),
            {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}})


@pytest.mark.parametrize("layout", lora.LAYOUTS)
def test_diffusers_loads_our_files(pipe, layout, tmp_path):
    kind, theirs, unet, places = pipe
    adapter, (inputs, added) = trained(places.new(3)), unet_inputs(kind)
    parts = SimpleNamespace(version="xl" if kind == "sdxl" else "1",
                            diffusion=SimpleNamespace(prediction="eps"))
    lora.save(adapter, tmp_path / "pytorch_lora_weights.safetensors", layout, kind == "sdxl",
              lora.describe("x", adapter, parts, (64, 64)))
    plain = unet(*inputs)
    with places.using(adapter):
        want = unet(*inputs)
    theirs.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    try:
        got = theirs.unet(*inputs[:3], **added).sample
        # the file is float32; a wrong scale moves more than 1e-3
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        assert (want - plain).abs().max() > 1e-3
    finally:
        theirs.unload_lora_weights()


def test_both_names_that_kohya_files_of_xl_have_are_read(pipe, tmp_path):
    """Those of the original code, which we write, and those of diffusers."""
    kind, _, unet, places = pipe
    adapter = trained(places.new(3))
    states = []
    for xl in (False, True):
        lora.save(adapter, tmp_path / "x.safetensors", "kohya", xl)
        states.append(set(load_file(tmp_path / "x.safetensors")))
        got = lora.load(tmp_path / "x.safetensors", {"unet": unet})["unet"]
        assert all(torch.equal(x, y) for name, pair in adapter.pairs().items()
                   for x, y in zip(got[name], pair))
    assert not states[0] & states[1]


def test_an_adapter_trained_by_peft_reads_the_same(pipe, tmp_path):
    # alpha 16 at rank 4: files without metadata would be read wrongly, and diffusers writes it
    kind, theirs, unet, places = pipe
    peft = pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    config = peft.LoraConfig(r=4, lora_alpha=16,
                             target_modules=["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"])
    theirs.unet.add_adapter(config)
    try:
        with torch.no_grad():
            for i, (name, p) in enumerate(theirs.unet.named_parameters()):
                if "lora_B" in name:
                    p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        inputs, added = unet_inputs(kind)
        want = theirs.unet(*inputs[:3], **added).sample
        layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(theirs.unet))
        (StableDiffusionXLPipeline if kind == "sdxl"
         else StableDiffusionPipeline).save_lora_weights(
            tmp_path, unet_lora_layers={name: x.float().contiguous() for name, x in layers.items()},
            unet_lora_adapter_metadata=config.to_dict() | {
                "target_modules": sorted(config.target_modules)})
    finally:
        theirs.unet.delete_adapters("default")
    pairs = lora.load(next(tmp_path.glob("*.safetensors")), {"unet": unet})["unet"]
    with places.using(lora.Adapter({
            name: [nn.Parameter(x) for x in pair] for name, pair in pairs.items()})):
        torch.testing.assert_close(unet(*inputs), want, atol=1e-5, rtol=0)
