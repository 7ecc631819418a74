"""Stable Diffusion behind the toy's interface: whole pipelines against diffusers, one base under
several models, prompts and their cache."""
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import sd_tiny
from sd_tiny import moved, tiny
from nanocpo.criteria import Criteria, Prompt
from nanocpo.data import Batch
from nanocpo.method import preference_prompts
from nanocpo.model import load_model
from nanocpo.sd import clip
from nanocpo.sd.model import Backbone, SDModel, cached, windows
from nanocpo.sd.tokenizer import Tokenizer
from nanocpo.toy.paintings import from_painter
from nanocpo.train import Recipe, fit
from nanocpo.utils.checkpoint import fingerprint


# ---- pipelines

@pytest.mark.parametrize("kind", ["sd1", "sd1 euler leading", "sd1 euler trailing", "sd2", "sdxl"])
def test_whole_pipelines_equal_diffusers(kind, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("safetensors")
    from nanocpo.sd.weights import load_parts
    scheduler = (diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        timestep_spacing=kind.split()[2]) if "euler" in kind else None)
    pipe = sd_tiny.pipeline(kind.split()[0], tmp_path, scheduler)
    model = SDModel(Backbone(load_parts(tmp_path, dtype=torch.float64), size=(56, 40)))
    # float64 there too; Euler casts to float32 inside
    if hasattr(pipe.scheduler, "final_alpha_cumprod"):
        pipe.scheduler.alphas_cumprod, pipe.scheduler.final_alpha_cumprod = (
            model.diffusion.alpha_bar, model.diffusion.alpha_bar[0])
    noise = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(3))[None].double()
    for negative in (None, "muddy colour, blurred edges"):
        ours = model.sample(["a boat on the water; good: rich colour"], negative and [negative],
                            guidance=7.5, steps=5, seed=3)
        theirs = pipe(prompt="a boat on the water; good: rich colour", negative_prompt=negative,
                      num_inference_steps=5, guidance_scale=7.5, latents=noise, height=56, width=40,
                      output_type="pt").images
        torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs,
                                   atol=1e-9 if kind in ("sd1", "sd2") else 2e-6, rtol=0)
        assert theirs.std() > 0.05


@pytest.mark.parametrize("xl", [False, True])
def test_sampling_without_an_oracle(xl):
    model = tiny(xl)
    images = model.sample(["a boat", "a tree"], seed=1, steps=3)
    assert images.shape == (2, 3, 48, 48) and images.isfinite().all()
    # noise by picture, not by batch
    torch.testing.assert_close(model.sample(["a boat"], seed=1, steps=3), images[:1],
                               atol=1e-5, rtol=0)
    torch.testing.assert_close(model.sample(["a boat", "a tree"], seed=1, steps=3, batch=2), images,
                               atol=1e-5, rtol=0)
    guided = model.sample(["a boat", "a tree"], seed=1, steps=3, guidance=4.0)
    assert (guided - images).abs().max() > 1e-3
    assert not torch.equal(model.sample(["a boat", "a tree"], ["a tree", "a boat"], seed=1,
                                        steps=3, guidance=4.0), guided)
    model.backbone.size = 32, 64
    assert model.sample(["a boat"], steps=2).shape == (1, 3, 32, 64)
    model.backbone.size = 30, 32
    with pytest.raises(ValueError, match="multiple of 8"):
        model.sample(["a boat"])


def test_xl_empty_prompts_are_zeros_and_sizes_matter():
    model = tiny(xl=True)
    context, pooled = model.text.tokens(["", Prompt("a boat")])
    assert not context[0].any() and not pooled[0].any() and context[1].any() and pooled[1].any()
    assert tiny(xl=True, zeros=False).text.tokens([""])[0].any()
    seen = []
    model.backbone.parts.unet.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[4]))
    model(torch.randn(2, 4, 6, 4), torch.tensor([1, 2]), ["a", "b"])
    # original height, width, crop, target height, width
    assert seen[0].tolist() == [[48, 32, 0, 0, 48, 32]] * 2


def test_guidance_of_one_or_less_is_none_as_in_diffusers(tmp_path):
    """0 is what people write for Turbo models: it must not leave the prompt out."""
    pytest.importorskip("diffusers"), pytest.importorskip("safetensors")
    from nanocpo.sd.weights import load_parts
    pipe = sd_tiny.pipeline("sd1", tmp_path)
    model = SDModel(Backbone(load_parts(tmp_path, dtype=torch.float64), size=(40, 40)))
    noise = torch.randn(4, 5, 5, generator=torch.Generator().manual_seed(3))[None].double()
    painted = {}
    for prompt in ("a boat", "a tree on a hill"):
        for guidance in (0, 1, 0.5, -2):
            painted[prompt, guidance] = model.sample([prompt], guidance=guidance, steps=3, seed=3)
            theirs = pipe(prompt=prompt, num_inference_steps=3, guidance_scale=guidance,
                          latents=noise, height=40, width=40, output_type="pt").images
            # float32 noise levels there
            torch.testing.assert_close((painted[prompt, guidance] / 2 + 0.5).clamp(0, 1), theirs,
                                       atol=1e-5, rtol=0)
    assert (painted["a boat", 0] - painted["a tree on a hill", 0]).abs().max() > 1e-3


def test_an_empty_prompt_of_xl_that_is_written_down(tmp_path):
    """"" is the unconditional prompt, zeros; to encode it, as diffusers does with an explicit "",
    it is a space."""
    pytest.importorskip("diffusers"), pytest.importorskip("safetensors")
    from nanocpo.sd.weights import load_parts
    pipe = sd_tiny.pipeline("sdxl", tmp_path)
    model = SDModel(Backbone(load_parts(tmp_path, dtype=torch.float64), size=(40, 40)))
    ours = model.text.tokens([" ", ""])
    theirs = pipe.encode_prompt("a boat", negative_prompt="", do_classifier_free_guidance=True)
    nothing = pipe.encode_prompt("a boat", do_classifier_free_guidance=True)
    for mine, explicit, zeros in zip(ours, theirs[1::2], nothing[1::2]):
        torch.testing.assert_close(mine[:1], explicit, atol=1e-9, rtol=0)
        torch.testing.assert_close(mine[1:], zeros, atol=0, rtol=0)
        assert mine[0].abs().max() > 0.01


# ---- one base, several models

def test_three_models_share_one_base():
    base = tiny()
    auxiliary, target = moved(base.with_adapter(2, seed=1)), base.with_adapter(2, seed=2)
    x, t = torch.randn(2, 4, 6, 6), torch.tensor([5, 900])
    plain = base(x, t, ["a", "b"])
    assert torch.equal(target(x, t, ["a", "b"]), plain)  # a new adapter does nothing
    assert (auxiliary(x, t, ["a", "b"]) - plain).abs().max() > 1e-3
    assert torch.equal(base(x, t, ["a", "b"]), plain)  # and the reference stays what it was
    assert list(base.parameters()) == [] and auxiliary.backbone is target.backbone
    assert {name.split(".")[0] for name, _ in target.named_parameters()} == {"adapter"}
    frozen = auxiliary.frozen_copy()
    assert (frozen.backbone is base.backbone
            and not any(p.requires_grad for p in frozen.parameters()))
    with torch.no_grad():
        auxiliary.adapter.A[0].add_(1)
    assert not torch.equal(frozen.adapter.A[0], auxiliary.adapter.A[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fit_trains_the_adapter_alone_and_resumes(checkpointing, tmp_path):
    base = tiny(checkpointing=checkpointing)
    before = fingerprint(base.backbone.parts.unet)
    x0 = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    base.text.criteria = from_painter(count=1).criteria

    def loss_step(model, generator):
        t = torch.randint(1000, (2,), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        loss = ((model(model.diffusion.q_sample(x0, t, noise), t, ["a boat", "a tree"]) - noise)
                ** 2).flatten(1).mean(1)
        return loss.mean(), {"loss": loss.detach()}, t
    recipe = Recipe(steps=6, lr=1e-2, warmup=1)
    whole, line = fit(base.with_adapter(2), loss_step, recipe, tmp_path / "whole.pt", name="a")
    stopped = [0]

    def stops(model, generator):
        stopped[0] += 1
        if stopped[0] == 5:
            raise KeyboardInterrupt
        return loss_step(model, generator)
    with pytest.raises(KeyboardInterrupt):
        fit(base.with_adapter(2), stops, recipe, tmp_path / "part.pt", name="a", save_every=2)
    resumed, _ = fit(base.with_adapter(2), loss_step, recipe, tmp_path / "part.pt", name="a",
                     resume=True)
    for a, b in zip(whole.parameters(), resumed.parameters()):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert line["step"] == 6 and all(b.abs().max() > 0 for b in whole.adapter.B)
    assert fingerprint(base.backbone.parts.unet) == before
    with pytest.raises(ValueError, match="whole.pt: an adapter of Stable Diffusion.* "
                                         "--weights .* --lora .*whole.safetensors"):
        load_model(tmp_path / "whole.pt")  # no model of its own: this file resumes a run


# ---- prompts and caches

def test_long_prompts_take_several_windows_and_no_phrase_is_lost_or_cut():
    tokenizer = Tokenizer(sd_tiny.train_merges())
    good, bad = (tuple(f"good thing {i}" for i in range(16)),
                 tuple(f"bad thing {i}" for i in range(16)))
    parts = windows(Prompt("a boat", good, bad), tokenizer)
    assert len(parts) > 2 and all(len(tokenizer.encode(str(part))) <= 75 for part in parts)
    assert [part.caption for part in parts] == ["a boat"] + [""] * (len(parts) - 1)
    assert (sum((part.positive for part in parts), ()) == good
            and sum((part.negative for part in parts), ()) == bad)
    first = parts[0].positive + (good[len(parts[0].positive)],)
    assert len(tokenizer.encode(str(Prompt("a boat", first)))) > 75  # the next one did not fit
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (windows(Prompt("a boat", good[:1], bad[:1]), tokenizer)
                == [Prompt("a boat", good[:1], bad[:1])])
        assert windows(Prompt(""), tokenizer) == [Prompt("")]
    with pytest.warns(UserWarning, match="boat boat .* is cut at 75 tokens"):
        assert (windows(Prompt("boat " * 100, good[:1]), tokenizer)
                == [Prompt("boat " * 100), Prompt("", good[:1])])


def test_winner_and_loser_share_their_context_however_long(monkeypatch):
    # phrases of very different lengths on the two sides of the leaf: each side alone could lose
    # other phrases of the context
    tree = {"name": "T", "children": [{"name": f"L{i}", "positive": f"good {i}",
                                       "negative": f"bad {i}" + " boat" * (6 * (i == 0))}
                                      for i in range(26)]}
    criteria, model, read = Criteria(tree), tiny(), []
    batch = Batch(["a boat"], np.array([[-1] + [1, -1] * 12 + [1]], np.int8))
    tokenizer = model.backbone.parts.tokenizers[0]
    monkeypatch.setattr(model.backbone.parts, "tokenizers", [Spy(tokenizer, read)])
    context = []
    for prompts in preference_prompts(criteria, batch, [0], "opposite"):
        read.clear()
        model.text.tokens(prompts)
        context.append({phrase for text in read
                        for phrase in re.findall(r"(?:good|bad) [1-9]\d*", text)})
    assert (context[0] == context[1]
            == {f"{'bad' if i % 2 == 0 else 'good'} {i}" for i in range(1, 26)})


class Spy:
    """A tokenizer that writes down what is encoded for good, once it is called."""

    def __init__(self, tokenizer, read):
        self.tokenizer, self.read, self.length, self.encode = (
            tokenizer, read, tokenizer.length, tokenizer.encode)

    def __call__(self, text):
        self.read.append(text)
        return self.tokenizer(text)


@pytest.mark.parametrize("xl", [False, True])
def test_a_prompt_means_the_same_beside_a_longer_one(xl):
    # attention to a context that is repeated is attention to the context
    model, x, t = tiny(xl), torch.randn(3, 4, 6, 6), torch.tensor([500] * 3)
    long = Prompt("a boat", tuple(f"good thing {i}" for i in range(16)))
    context, pooled = model.text.tokens([long])
    assert context.shape[1] == 2 * 77
    if xl:  # the pooled vector is the first window's: there the caption stands
        first = windows(long, model.backbone.parts.tokenizers[0])[0]
        torch.testing.assert_close(pooled, model.text.tokens([first])[1])
    asked = [Prompt("a tree"), long,
             Prompt("a boat", *[tuple(f"{side} thing {i}" for i in range(16))
                                for side in ("good", "bad")])]
    alone = torch.cat([model(x[i:i + 1], t[:1], [prompt]) for i, prompt in enumerate(asked)])
    torch.testing.assert_close(model(x, t, asked), alone, atol=1e-5, rtol=0)
    # the later windows are read
    assert (model(x, t, [Prompt("a boat")] * 3) - alone)[1:].abs().amax((1, 2, 3)).min() > 1e-4
    # away from a shorter prompt
    assert model.sample([long], steps=2, guidance=2.0).isfinite().all()


def count_runs(model):
    runs = []
    for encoder in model.backbone.parts.encoders:
        encoder.register_forward_hook(lambda *_: runs.append(1))
    return runs


def test_encoded_prompts_are_kept_on_disk(tmp_path, monkeypatch):
    model = tiny(cache=tmp_path)
    runs = count_runs(model)
    first = model.text.tokens(["a boat", "a tree"])[0]
    again = model.text.tokens(["a tree", "a boat"])[0]
    assert torch.equal(first.flip(0), again) and len(runs) == 2
    other = tiny(cache=tmp_path)
    runs = count_runs(other)
    # another run, the same weights
    assert torch.equal(other.text.tokens(["a boat", "a tree"])[0], first) and len(runs) == 0
    other.text.tokens(["a boat."])
    assert len(runs) == 1                                                  # another caption
    changed = tiny(cache=tmp_path, seed=1)
    runs = count_runs(changed)
    # other weights
    assert not torch.equal(changed.text.tokens(["a boat"])[0], first[:1]) and len(runs) == 1
    code = tmp_path.parent / "clip.py"
    code.write_text("# another text encoder")
    monkeypatch.setattr(clip, "__file__", str(code))
    newer = tiny(cache=tmp_path)
    runs = count_runs(newer)
    assert torch.equal(newer.text.tokens(["a boat"])[0], first[:1]) and len(runs) == 1
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:50])
    again = tiny(cache=tmp_path)
    # damaged files are made again
    assert torch.equal(again.text.tokens(["a boat", "a tree"])[0], first)


def test_text_encoders_and_vae_are_on_the_device_only_while_they_work(monkeypatch, tmp_path):
    model, moves = tiny(xl=True, cache=tmp_path), []
    parts = model.backbone.parts
    names = {id(part): name for name, part in (("vae", parts.vae), ("one", parts.encoders[0]),
                                               ("two", parts.encoders[1]), ("unet", parts.unet))}
    model.backbone.device = "there"         # nothing lies there: only the moves are looked at
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, where: (
        moves.append((names.get(id(self)), str(where))), self)[1])
    with model.backbone.awake(parts.vae):
        pass
    assert moves == [("vae", "there")]      # nobody said that it may rest
    moves.clear()
    model.backbone.rest()
    assert moves == [("vae", "cpu"), ("one", "cpu"), ("two", "cpu")]
    moves.clear()
    with model.backbone.awake(*parts.encoders):
        assert moves == [("one", "there"), ("two", "there")]
    assert moves[2:] == [("one", "cpu"), ("two", "cpu")]
    moves.clear()
    model.backbone.device = torch.device("cpu")
    model.text.tokens(["a boat"])
    assert [name for name, _ in moves] == ["one", "two"] * 2
    moves.clear()
    model.text.tokens(["a boat"])           # it is kept, and nobody is woken
    assert moves == []
    model.sample(["a boat"], steps=1)
    assert [name for name, _ in moves] == ["vae"] * 2


def test_fingerprint_sees_every_weight():
    model = tiny().latents
    before = fingerprint(model)
    with torch.no_grad():
        model.quant_conv.bias[0] += 1e-6
    assert fingerprint(model) != before and fingerprint(model.half()) != fingerprint(model.float())


def test_cache_without_a_folder_keeps_nothing():
    made = []
    for _ in range(2):
        cached(None, "x", lambda: made.append(1))
    assert len(made) == 2


def test_what_is_asked_once_is_not_kept_and_wakes_the_encoder_once(monkeypatch, tmp_path):
    model, moves = tiny(cache=tmp_path), []
    model.backbone.rest()
    monkeypatch.setattr(torch.nn.Module, "to",
                        lambda self, where: moves.append(str(where)) or self)
    with pytest.raises(ZeroDivisionError), model.backbone.at_hand():
        model.text.tokens(["a boat", "a tree"]), model.text.tokens(["a boat"])
        assert len(moves) == 3 and not list(tmp_path.iterdir())
        moves.clear()
        1 / 0
    assert model.backbone.resting and moves == ["cpu", "cpu"]       # both rest again
    model.text.tokens(["a boat"])
    assert len(list(tmp_path.iterdir())) == 1
    model.backbone.resting = False          # who did not rest before does not afterwards
    moves.clear()
    with model.backbone.at_hand():
        pass
    assert moves == [] and not model.backbone.resting and model.backbone.cache == tmp_path


def test_tokens_go_where_the_encoder_is(monkeypatch):
    """On torch's "meta" device, which stands for a GPU that the tests do not have."""
    model, seen = tiny(), []

    class Encoder:
        config = None

        def to(self, device):
            return self

        def __call__(self, ids):
            seen.append((ids.device.type, tuple(ids.shape)))
            return (torch.zeros(*ids.shape, 4),)
    text = model.backbone
    monkeypatch.setattr(text, "device", torch.device("meta"))
    monkeypatch.setattr(text, "parts", replace(text.parts, encoders=[Encoder()]))
    context, pooled = text.tokens(["a boat", "a tree"])
    assert seen == [("meta", (1, 77))] * 2 and pooled is None
    assert context.device.type == "meta" and tuple(context.shape) == (2, 77, 4)
