"""Latents, prompt encoder, sampling and the file of a model that is small enough to check by
hand."""
import os

import pytest
import torch
import torch.nn.functional as F

from nanocpo.criteria import Criteria, Prompt
from nanocpo.diffusion import guide
from nanocpo.model import Model, SpaceToDepth, load_model
from nanocpo.unet import UNetConfig
from nanocpo.utils.checkpoint import fingerprint, save_checkpoint


def leaf(name):
    return {"name": name, "positive": f"good {name}", "negative": f"bad {name}"}


# "Tone" is the beginning of "Tones": an ancestor is a whole name on the path, not a prefix.
# Leaves: dark, pale, red, wide
TREE = {"name": "T", "children": [{"name": "Tone", "children": [leaf("dark"), leaf("pale")]},
                                  {"name": "Tones", "children": [leaf("red")]}, leaf("wide")]}
NODES = ["Tone", "Tone/dark", "Tone/pale", "Tones", "Tones/red", "wide"]
A = Prompt("a boat", ("good dark", "good pale"), ("bad wide",))
B = Prompt("a tree", ("good red",), ("bad dark",))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(seed=0, size=8, **changes):
    torch.manual_seed(seed)
    unet = UNetConfig(channels=(8, 16), depth=(0, 1), heads=(2, 2), groups=4, context_dim=8,
                      vector_dim=8, **changes)
    return Model(Criteria(TREE), ["a boat", "a tree"], unet, text_dim=8, size=size)


def content(model):
    return {"config": model.config, "criteria": model.criteria.to_dict(), "ema": model.state_dict()}


def calls_of(model):
    """A list that collects the xt of every call of the model."""
    calls = []
    model.register_forward_pre_hook(lambda _, arguments: calls.append(arguments[0].clone()))
    return calls


# ---- latents

@pytest.mark.parametrize("block, shape", [(1, (3, 4, 6)), (2, (12, 2, 3)), (4, (48, 1, 2))])
def test_decode_undoes_encode(block, shape):
    latents = SpaceToDepth(block)
    x = randn(2, 3, 4, 6 if block < 4 else 8).clamp(-1, 1)
    z = latents.encode(x)
    assert z.shape == (2, *shape)
    torch.testing.assert_close(latents.decode(z), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.encode(latents.decode(z + 1)), z + 1, atol=1e-5, rtol=0)


def test_latents_by_hand():
    # one white pixel in the lower left of a black picture: only the lightness of sub-pixel
    # (1, 0) differs
    x = -torch.ones(1, 3, 4, 4)
    x[0, :, 3, 0] = 1
    z = SpaceToDepth(2).encode(x)
    expected = torch.zeros(12, 2, 2)
    expected[:4] = 1.5 * -0.6 * 3 ** 0.5  # SpaceToDepth.SCALE of lightness is 1.5
    expected[2, 1, 0] = 1.5 * 1.4 * 3 ** 0.5
    torch.testing.assert_close(z[0], expected, atol=1e-5, rtol=0)


def test_clip_keeps_pictures_and_bounds_everything_else():
    latents = SpaceToDepth(2)
    valid = latents.encode(randn(2, 3, 8, 8).clamp(-1, 1))
    torch.testing.assert_close(latents.clip(valid), valid, atol=1e-5, rtol=0)
    wild = 3 * randn(2, 3, 8, 8, seed=1)
    torch.testing.assert_close(latents.clip(latents.encode(wild)),
                               latents.encode(wild.clamp(-1, 1)), atol=1e-5, rtol=0)


# ---- prompts

def test_tokens_by_hand():
    tokens = make().text.tokens([A, B, Prompt()])
    assert (tokens.tolist() == [[1, 1, 1, 0, 2], [2, 2, 0, 1, 0], [0, 0, 0, 0, 0]]
            and tokens.dtype == torch.int64)


@pytest.mark.parametrize("prompt, fault", [
    (Prompt("a house"), "'a house'; this model knows: a boat, a tree"),
    (Prompt("a boat", ("good",)), "unknown attribute 'good'"),
    (Prompt("a boat", (), ("odd",)), "unknown attribute 'odd'"),
    (Prompt("a boat", ("bad red",)), "'bad red' is the other side's phrase"),
    (Prompt("a boat", (), ("good red",)), "'good red' is the other side's phrase"),
    (Prompt("a boat", ("good red",), ("bad red",)), "listed as positive and as negative")], ids=str)
def test_prompts_the_model_was_not_built_for(prompt, fault):
    with pytest.raises(ValueError, match=fault):
        make().text.tokens([A, prompt])


def test_every_token_is_the_sum_over_its_path():
    text = make().text
    on_path = [["Tone", "Tone/dark"], ["Tone", "Tone/pale"], ["Tones", "Tones/red"], ["wide"]]
    tokens = text.tokens([A, B])
    context, pooled = text(tokens)
    for i, row in enumerate(tokens.tolist()):
        parts = [text.caption.weight[row[0]]] + [
            sum(text.node[state, NODES.index(path)] for path in paths)
            for state, paths in zip(row[1:], on_path)]
        torch.testing.assert_close(context[i], F.layer_norm(torch.stack(parts), (8,)))
        # four leaves: the root of 4
        torch.testing.assert_close(pooled[i], parts[0] + sum(parts[1:]) / 2)


def test_siblings_share_their_ancestors_embedding():
    text = make().text
    text(text.tokens([Prompt("", ("good dark", "good pale"))]))[1].sum().backward()
    share = text.node.grad[..., 0] * 2  # how often the prompt reads each (state, node)
    # "Tone" is learned from both its leaves
    assert share[1].tolist() == pytest.approx([2, 1, 1, 0, 0, 0])
    assert share[0].tolist() == pytest.approx([0, 0, 0, 1, 1, 1])  # the rest is not mentioned
    assert share[2].abs().max() == 0


def test_an_annotation_becomes_the_prompt_it_says():
    model = make()
    prompt = model.criteria.prompt("a tree", [-1, 0, 1, 0])
    assert model.text.tokens([prompt]).tolist() == model.text.tokens([B]).tolist()


# ---- sampling

def test_prompts_and_their_tokens_are_the_same_call():
    model = make().eval()
    xt, t = randn(2, 12, 4, 4), torch.tensor([3, 900])
    both = model(xt, t, [A, B])
    torch.testing.assert_close(both, model(xt, t, model.text.tokens([A, B])))
    torch.testing.assert_close(both[1:], model(xt[1:], t[1:], [B]))
    assert (not torch.allclose(both, model(xt, t, [A, A]))
            and not torch.allclose(both, model(xt, t, [B, B])))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_same_seed_same_bytes(eta):
    model = make(dropout=0.5)  # in training mode: sampling must switch dropout off, and on again
    torch.manual_seed(1)
    first = model.sample([A, B], steps=3, eta=eta, seed=5)
    assert model.training
    again = model.sample([A, B], steps=3, eta=eta, seed=5)
    assert first.shape == (2, 3, 8, 8) and first.abs().max() <= 1 + 1e-5 and not first.requires_grad
    assert torch.equal(first, again)
    assert not torch.equal(first, model.sample([A, B], steps=3, eta=eta, seed=6))
    assert not model.eval().sample([A], steps=1).requires_grad and not model.training


def test_sampling_leaves_the_global_randomness_alone():
    # else looking at samples during training would change the training
    model, before = make(), torch.manual_seed(3).get_state()
    model.sample([A], steps=3, eta=1.0)
    assert torch.equal(before, torch.get_rng_state())


def test_no_noise_is_used_twice(monkeypatch):
    # neither in two pictures, nor as the start and in a step, nor in two steps or batches
    draws, randn_of_torch, model = [], torch.randn, make()
    monkeypatch.setattr(torch, "randn",
                        lambda *a, **k: draws.append(randn_of_torch(*a, **k)) or draws[-1])
    model.sample([A, A, A], steps=3, eta=1.0, batch=2)
    numbers = torch.cat([draw.flatten() for draw in draws])
    # start, steps but the last
    assert len(numbers) == 3 * 3 * 192 and len(numbers.unique()) > 0.99 * len(numbers)


# 6: no multiple of 16 numbers a picture, where torch fills differently
@pytest.mark.parametrize("size", [8, 6])
def test_noise_of_a_picture_does_not_depend_on_the_number(size):
    calls = calls_of(model := make(size=size))
    many = model.sample([A, B, A, B, A], steps=2, seed=7)
    few = model.sample([A, B], steps=2, seed=7)
    assert torch.equal(calls[0][:2], calls[2]) and not torch.equal(calls[0][0], calls[0][2])
    torch.testing.assert_close(few, many[:2], atol=1e-5, rtol=0)
    torch.testing.assert_close(model.sample([A, B, A, B, A], steps=2, seed=7, batch=2), many,
                               atol=1e-5, rtol=0)


def test_two_models_start_from_the_same_noise():
    models = [make(0), make(1)]
    first, second = map(calls_of, models)
    for model in models:
        model.sample([A, B], steps=1, seed=2)
    assert torch.equal(first[0], second[0])


def test_noise_is_normal():
    calls = calls_of(model := make(size=32))
    model.sample([A] * 8, steps=1)
    assert (float(calls[0].mean()) == pytest.approx(0, abs=0.03)
            and float(calls[0].std()) == pytest.approx(1, abs=0.02))


def test_guidance_one_is_no_guidance():
    calls = calls_of(model := make())
    plain = model.sample([A, B], steps=2)
    assert torch.equal(model.sample([A, B], [B, A], guidance=1.0, steps=2), plain)
    # nothing to guide away from
    assert torch.equal(model.sample([A, B], None, guidance=4.0, steps=2), plain)
    assert all(len(call) == 2 for call in calls)  # and it costs nothing


@pytest.mark.parametrize("batch", [256, 2])
def test_guidance_equals_guide_of_two_predictions(batch):
    calls = calls_of(model := make().eval())
    prompts, negative = [A, B, A], [B, Prompt("a boat"), Prompt()]
    images = model.sample(prompts, negative, guidance=3.0, steps=2, batch=batch)
    assert len(calls[0]) == 2 * min(batch, 3)  # one call predicts both
    chunks = calls if batch == 256 else [torch.cat([calls[0][:2], calls[2][:1]])]

    def apart(xt, t):
        return guide(model(xt, t, prompts), model(xt, t, negative), 3.0)
    latents = model.diffusion.sample(apart, chunks[0][:3], 2, clip=model.latents.clip)
    torch.testing.assert_close(images, model.latents.decode(latents), atol=1e-4, rtol=0)
    assert not torch.allclose(images, model.sample(prompts, steps=2), atol=1e-2)


def test_knobs_add_the_difference_of_two_predictions_each():
    """z_0 + sum of s_b (z_b+ - z_b-); beside guidance too. Scale 0 is no knob."""
    model = make().eval()
    prompts, negative = [A, B, A], [B, Prompt("a boat"), Prompt()]
    axes = [(2.0, [A, A, B], [B, A, A]), (-0.5, [B, B, B], negative)]
    calls = calls_of(model)
    images = model.sample(prompts, negative, 3.0, steps=2, axes=axes)
    noise = calls[0][:3]
    assert len(calls[0]) == 3 * (2 + 4)

    def by_hand(xt, t):
        ask = lambda side: model(xt, t, side)
        out = guide(ask(prompts), ask(negative), 3.0)
        return out + sum(scale * (ask(good) - ask(bad)) for scale, good, bad in axes)
    latents = model.diffusion.sample(by_hand, noise, 2, clip=model.latents.clip)
    torch.testing.assert_close(images, model.latents.decode(latents), atol=1e-4, rtol=0)
    alone = model.sample(prompts, steps=2)
    torch.testing.assert_close(model.sample(prompts, steps=2, axes=[(0.0, [A, A, B], negative)]),
                               alone, atol=1e-4, rtol=0)
    assert not torch.allclose(model.sample(prompts, steps=2, axes=axes[:1]), alone, atol=1e-2)


# ---- files

def test_save_and_load_give_the_same_model(tmp_path):
    model = make(dropout=0.5)
    save_checkpoint(tmp_path / "new" / "model.pt", content(model))
    loaded = load_model(tmp_path / "new" / "model.pt")
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.config == model.config and loaded.criteria.to_dict() == TREE
    assert fingerprint(loaded) == fingerprint(model)
    pictures = (m.sample([A, B], [B, A], 2.0, steps=2) for m in (loaded, model))
    # kernels may round by where the weights lie in memory
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-5)
    assert os.listdir(tmp_path / "new") == ["model.pt"]


def test_the_averaged_weights_are_loaded(tmp_path):
    save_checkpoint(tmp_path / "m.pt", content(make(1)) | {"model": make(2).state_dict()})
    assert "text.on_path" not in make(1).state_dict()   # the tree says it
    assert torch.equal(load_model(tmp_path / "m.pt").unet.conv_in.weight,
                       make(1).unet.conv_in.weight)


# ---- the frozen copy

def test_frozen_copy_stays_when_the_original_trains():
    model = make()
    frozen = model.frozen_copy()
    xt, t, before = randn(2, 12, 4, 4), torch.tensor([3, 900]), {
        name: p.clone() for name, p in frozen.state_dict().items()}
    assert (model.training and not frozen.training
            and all(p.requires_grad for p in model.parameters()))
    assert not any(p.requires_grad for p in frozen.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(xt, t, [A, B]).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in frozen.state_dict().items())
    assert not torch.allclose(model.eval()(xt, t, [A, B]), frozen(xt, t, [A, B]))
    assert all(p.grad is None for p in frozen.parameters())
