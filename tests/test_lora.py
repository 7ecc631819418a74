"""Adapters on one frozen base: what they compute, what they leave alone, and the three file
layouts, with diffusers and peft as judges."""
import json

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


@pytest.mark.parametrize("alpha", [None, 12])
def test_an_adapter_by_hand(alpha):
    layer, x = nn.Linear(5, 7).double(), randn(3, 5)
    places = lora.LoRA(nn.ModuleDict({
        "attn": nn.ModuleDict({"to_q": layer, "norm": nn.Linear(5, 5)})}))
    adapter = trained(places.new(4, alpha))
    assert list(adapter.place) == ["attn.to_q"]
    with places.using(adapter):
        got = layer(x)
    weight = layer.weight + (alpha or 4) / 4 * adapter.B[0].double() @ adapter.A[0].double()
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
    adapter = trained(places.new(3, alpha=6))
    want = run(plugged, adapter)
    lora.merge(network, adapter.pairs())
    # the adapter is float32
    torch.testing.assert_close(run(plugged, None), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", lora.LAYOUTS)
@pytest.mark.parametrize("alpha", [None, 9])
def test_every_layout_reads_back(plugged, layout, alpha, tmp_path):
    network, places = plugged
    adapter = trained(places.new(3, alpha))
    lora.save(adapter, tmp_path / "x.safetensors", layout)
    got = lora.load(tmp_path / "x.safetensors", {"unet": network})
    assert got.keys() == {"unet"} and got["unet"].keys() == adapter.place.keys()
    assert all(torch.equal(x, y) for name, pair in adapter.pairs().items()
               for x, y in zip(got["unet"][name], pair))
    again = lora.Adapter({name: [nn.Parameter(x) for x in pair]
                          for name, pair in got["unet"].items()})
    # 3 B, rounded to float32
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
    (lambda s, k: s.update({k: torch.zeros(2, 8, 3, 3)}), "adapts a convolution")])
def test_incomplete_and_misshapen_adapters_are_refused(plugged, change, words, tmp_path):
    network, places = plugged
    lora.save(places.new(2), tmp_path / "x.safetensors")
    state = load_file(tmp_path / "x.safetensors")
    change(state, next(key for key in state if "lora_A" in key))
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=words):
        lora.load(tmp_path / "x.safetensors", {"unet": network})


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
    adapter, (inputs, added) = trained(places.new(3, alpha=5)), unet_inputs(kind)
    lora.save(adapter, tmp_path / "pytorch_lora_weights.safetensors", layout)
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


def test_kohya_names_of_the_original_code(pipe, tmp_path):
    kind, _, unet, places = pipe
    if kind != "sdxl":
        pytest.skip("XL files have them")
    adapter = trained(places.new(3))
    lora.save(adapter, tmp_path / "ours.safetensors", "kohya")
    state = {}
    # e.g. down_blocks_1_attentions_0 -> input_blocks_4_1
    for key, x in load_file(tmp_path / "ours.safetensors").items():
        for level in range(3):
            for i in range(3):
                key = key.replace(f"unet_down_blocks_{level}_attentions_{i}_",
                                  f"unet_input_blocks_{3 * level + i + 1}_1_")
                key = key.replace(f"unet_up_blocks_{level}_attentions_{i}_",
                                  f"unet_output_blocks_{3 * level + i}_1_")
        state[key.replace("mid_block_attentions_0_", "middle_block_1_")] = x
    assert (any("output_blocks_5_1" in key for key in state)
            and any("middle_block_1_" in key for key in state))
    save_file(state, tmp_path / "theirs.safetensors")
    got, want = (lora.load(tmp_path / f"{name}.safetensors", {"unet": unet})["unet"]
                 for name in ("theirs", "ours"))
    assert (got.keys() == want.keys()
            and all(torch.equal(x, y) for name in want for x, y in zip(got[name], want[name])))


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
