"""The UNet against diffusers' (float64, so that even a wrong epsilon shows) and, without diffusers,
against formulas."""
import copy
import hashlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sd_tiny import perturb

from nanocpo.unet import GEGLU, Attention, UNet, UNetConfig, sinusoid

SD15 = UNetConfig(in_channels=4, out_channels=4, channels=(320, 640, 1280, 1280),
                  depth=(1, 1, 1, 0), heads=(8, 8, 8, 8), layers=2, context_dim=768,
                  vector_dim=None, groups=32)
# of the sorted "name shape" lines, with 4-D proj_in and proj_out squeezed
SD15_DIGEST = "1cf15a89f2b4394f1c352ef2d708a784c8455528dda8ae9e3b5ae39d649e53df"

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
FOUR_LEVELS = dict(down_block_types=(CROSS_DOWN,) * 3 + ("DownBlock2D",),
                   up_block_types=("UpBlock2D",) + (CROSS_UP,) * 3)
TINY = dict(in_channels=4, out_channels=4, groups=8, context_dim=24, layers=2)
# name: (our configuration, diffusers')
TOPOLOGIES = {
    "sd1.5": (UNetConfig(**TINY, channels=(16, 32, 48, 48), depth=(1, 1, 1, 0), heads=(4, 4, 4, 4),
                         vector_dim=None),
              dict(FOUR_LEVELS, block_out_channels=(16, 32, 48, 48), attention_head_dim=4)),
    "sd2.1": (UNetConfig(**TINY, channels=(16, 32, 64, 64), depth=(1, 1, 1, 0), heads=(1, 2, 4, 4),
                         vector_dim=None),
              dict(FOUR_LEVELS, block_out_channels=(16, 32, 64, 64),
                   attention_head_dim=(1, 2, 4, 4), use_linear_projection=True)),
    "sdxl": (UNetConfig(**TINY, channels=(16, 32, 64), depth=(0, 2, 3), mid_depth=3,
                        heads=(1, 2, 4), vector_dim=20 + 6 * 8, size_dim=8),
             dict(down_block_types=("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
                  up_block_types=(CROSS_UP, CROSS_UP, "UpBlock2D"),
                  block_out_channels=(16, 32, 64), attention_head_dim=(1, 2, 4),
                  use_linear_projection=True, transformer_layers_per_block=(1, 2, 3),
                  addition_embed_type="text_time", addition_time_embed_dim=8,
                  projection_class_embeddings_input_dim=20 + 6 * 8))}


def lines(named):
    return sorted(f"{name} {tuple(shape)}" for name, shape in named)


def shapes(model):
    return lines((name, p.shape) for name, p in model.state_dict().items())


def squeezed(name, tensor):
    """SD 1.x holds proj_in and proj_out as 1x1 convolutions; ours are linear."""
    return (tensor[:, :, 0, 0] if ("proj_in" in name or "proj_out" in name) and tensor.dim() == 4
            else tensor)


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module", params=TOPOLOGIES)
def pair(request):
    """The same random weights in diffusers' UNet and ours."""
    diffusers = pytest.importorskip("diffusers")
    ours_config, theirs_config = TOPOLOGIES[request.param]
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(in_channels=4, out_channels=4, cross_attention_dim=24,
                                            norm_num_groups=8, layers_per_block=2, **theirs_config)
    perturb(theirs.double())
    ours = UNet(ours_config).double()
    state = {name: squeezed(name, p) for name, p in theirs.state_dict().items()}
    assert shapes(ours) == lines((name, p.shape) for name, p in state.items())
    ours.load_state_dict(state)
    return ours, theirs


# 18 x 13: neither side is divisible by 8 or 4
@pytest.mark.parametrize("size", [(16, 16), (24, 16), (18, 13)], ids=str)
def test_outputs_and_gradients_equal_diffusers(pair, size):
    ours, theirs = pair
    x, context, t = randn(2, 4, *size, seed=2), randn(2, 7, 24, seed=3), torch.tensor([17, 903])
    vector, sizes = (randn(2, 20, seed=4),
                     torch.tensor([[512., 384, 0, 16, 512, 512], [64, 96, 8, 0, 256, 128]]))
    extra, added = (((vector, sizes), dict(text_embeds=vector, time_ids=sizes))
                    if ours.config.size_dim else ((), None))
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = ours(x_ours, t, context, *extra)
    expected = theirs(x_theirs, t, context, added_cond_kwargs=added).sample
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=0)
    weights = randn(*x.shape, seed=5)
    got = torch.autograd.grad((out * weights).sum(), [x_ours, *ours.parameters()])
    want = torch.autograd.grad((expected * weights).sum(), [x_theirs, *theirs.parameters()])
    want = dict(zip([""] + [name for name, _ in theirs.named_parameters()], want))
    for name, gradient in zip([""] + [name for name, _ in ours.named_parameters()], got):
        torch.testing.assert_close(gradient, squeezed(name, want[name]), atol=1e-9, rtol=0,
                                   msg=name)


def test_full_sd15_on_the_meta_device():
    with torch.device("meta"):
        model = UNet(SD15)
    assert sum(p.numel() for p in model.parameters()) == 859_520_964
    assert hashlib.sha256("\n".join(shapes(model)).encode()).hexdigest() == SD15_DIGEST


def test_full_sd15_has_diffusers_names_and_shapes():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        # its defaults are SD 1.5's
        ours, theirs = UNet(SD15), diffusers.UNet2DConditionModel(cross_attention_dim=768)
    assert shapes(ours) == lines((name, squeezed(name, p).shape)
                                 for name, p in theirs.state_dict().items())


def toy_inputs(size=(16, 16), batch=2):
    return (randn(batch, 12, *size, seed=1), torch.tensor([10, 700][:batch]),
            randn(batch, 5, 64, seed=2), randn(batch, 64, seed=3))


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(0)
    return perturb(UNet(UNetConfig()).double()).eval()


@pytest.mark.parametrize("size", [(15, 17), (16, 16), (7, 4)], ids=str)
def test_toy_keeps_any_size(toy, size):
    x, t, context, vector = toy_inputs(size)
    out = toy(x, t, context, vector)
    assert out.shape == x.shape and out.isfinite().all()


def test_every_parameter_gets_a_gradient(toy):
    model = copy.deepcopy(toy)
    x, *rest = toy_inputs()
    (model(x, *rest) * randn(*x.shape, seed=5)).sum().backward()
    assert [name for name, p in model.named_parameters()
            if p.grad is None or not p.grad.abs().max() > 1e-9] == []


@pytest.mark.parametrize("which", ["x", "t", "context", "vector"])
def test_every_input_changes_the_output_of_its_own_picture(toy, which):
    inputs = dict(zip(["x", "t", "context", "vector"], toy_inputs()))
    before = toy(**inputs)
    changed = inputs[which].clone()
    changed[1] = changed[1] * 0.5 + 1 if which != "t" else 300
    after = toy(**inputs | {which: changed})
    assert (after[1] - before[1]).abs().max() > 1e-3         # the toy's own size: not mere rounding
    torch.testing.assert_close(after[0], before[0], atol=1e-12, rtol=0)


def test_order_of_the_context_tokens_does_not_matter(toy):
    # tokens carry no position: the prompt encoder's sums say which leaf each one is
    x, t, context, vector = toy_inputs()
    torch.testing.assert_close(toy(x, t, context.flip(1), vector), toy(x, t, context, vector),
                               atol=1e-12, rtol=0)


def test_no_vector_needs_no_module():
    model = UNet(UNetConfig(channels=(8, 16), depth=(1, 1), heads=(2, 2), groups=4, context_dim=8,
                            vector_dim=None))
    assert not any("add_embedding" in name for name, _ in model.named_parameters())
    assert model(torch.randn(1, 12, 6, 6), torch.tensor([5]),
                 torch.randn(1, 3, 8)).shape == (1, 12, 6, 6)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = UNet(UNetConfig(channels=(8, 16), depth=(0, 1), heads=(2, 2), groups=4,
                            dropout=0.5)).double()
    inputs, reached, places = (toy_inputs((6, 6)), set(),
                               [m for m in model.modules() if isinstance(m, nn.Dropout)])
    for place in places:
        place.register_forward_hook(lambda module, *_: reached.add(module))
    assert not torch.equal(model(*inputs), model(*inputs))
    assert reached == set(places) and all(place.p == 0.5 for place in places)
    assert {name.split(".")[-1] for name, m in model.named_modules()
            if m in reached} == {"dropout", "1"}
    model.eval()
    assert torch.equal(model(*inputs), model(*inputs))


def test_sinusoid_by_hand():
    got = sinusoid(torch.tensor([0, 3, 999]), 8)
    for row, t in zip(got.tolist(), (0, 3, 999)):
        angles = [t * 10000 ** (-i / 4) for i in range(4)]
        assert row == pytest.approx([math.cos(a) for a in angles] + [math.sin(a) for a in angles],
                                    abs=1e-4)
    assert got.dtype == torch.float32


def test_geglu_by_hand():
    layer = GEGLU(3, 2).double()
    x = randn(1, 4, 3, seed=1)
    weight, bias = layer.proj.weight, layer.proj.bias
    value, gate = F.linear(x, weight[:2], bias[:2]), F.linear(x, weight[2:], bias[2:])
    # the exact GELU, not its tanh approximation
    by_hand = value * gate * (1 + torch.erf(gate / math.sqrt(2))) / 2
    torch.testing.assert_close(layer(x), by_hand, atol=1e-12, rtol=0)


@pytest.mark.parametrize("context_dim", [None, 6])
def test_attention_by_hand(context_dim):
    layer = Attention(8, 2, context_dim).double()
    x, context = randn(3, 5, 8, seed=1), randn(3, 4, 6, seed=2) if context_dim else None
    source, heads = x if context is None else context, []
    for part in (slice(0, 4), slice(4, 8)):
        q, k, v = (layer.to_q(x)[..., part], layer.to_k(source)[..., part],
                   layer.to_v(source)[..., part])
        heads.append((q @ k.mT / math.sqrt(4)).softmax(-1) @ v)
    torch.testing.assert_close(layer(x, context), layer.to_out[0](torch.cat(heads, -1)),
                               atol=1e-12, rtol=0)


def test_epsilons_of_all_norms():
    # too small a matter for any picture to show, but public weights were trained with these
    for name, module in UNet(UNetConfig()).named_modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            transformers_own = "attentions" in name and isinstance(module, nn.GroupNorm)
            assert module.eps == (1e-6 if transformers_own else 1e-5), name
