"""Stable Diffusion behind the toy's interface: whole pipelines against diffusers, prompts, caches, buckets, and both stages end to end."""
import argparse
import functools
import json
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import sd_tiny
from sd_tiny import moved, tiny
from nanocpo.criteria import Criteria, Prompt
from nanocpo.data import Batch, DataError, from_painter
from nanocpo.sd import finetune
from nanocpo.sd.finetune import LatentPaintings, buckets, nearest
from nanocpo.model import fingerprint, load_model
from nanocpo.sd.model import Base, SDModel, cached, windows
from nanocpo.sd.tokenizer import Tokenizer
from nanocpo.sd.vae import VAE
from nanocpo.train import Recipe, fit
from train_cpo import preference_prompts


# ---- pipelines

@pytest.mark.parametrize("kind", ["sd1", "sd1 euler leading", "sd1 euler trailing", "sd2", "sdxl"])
def test_whole_pipelines_equal_diffusers(kind, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("safetensors")
    from nanocpo.sd.weights import load_parts
    scheduler = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                                                 timestep_spacing=kind.split()[2]) if "euler" in kind else None
    pipe = sd_tiny.pipeline(kind.split()[0], tmp_path, scheduler)
    model = SDModel(Base(load_parts(tmp_path, dtype=torch.float64), size=(56, 40)))
    if hasattr(pipe.scheduler, "final_alpha_cumprod"):                    # float64 there too; Euler casts to float32 inside
        pipe.scheduler.alphas_cumprod, pipe.scheduler.final_alpha_cumprod = model.diffusion.alpha_bar, model.diffusion.alpha_bar[0]
    noise = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(3))[None].double()
    for negative in (None, "muddy colour, blurred edges"):
        ours = model.sample(["a boat on the water; good: rich colour"], negative and [negative], guidance=7.5, steps=5, seed=3)
        theirs = pipe(prompt="a boat on the water; good: rich colour", negative_prompt=negative, num_inference_steps=5, guidance_scale=7.5,
                      latents=noise, height=56, width=40, output_type="pt").images
        torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, atol=1e-9 if kind in ("sd1", "sd2") else 2e-6, rtol=0)
        assert theirs.std() > 0.05


@pytest.mark.parametrize("xl", [False, True])
def test_sampling_without_an_oracle(xl):
    model = tiny(xl)
    images = model.sample(["a boat", "a tree"], seed=1, steps=3)
    assert images.shape == (2, 3, 48, 48) and images.isfinite().all()
    torch.testing.assert_close(model.sample(["a boat"], seed=1, steps=3), images[:1], atol=1e-5, rtol=0)     # noise by picture, not by batch
    torch.testing.assert_close(model.sample(["a boat", "a tree"], seed=1, steps=3, batch=2), images, atol=1e-5, rtol=0)
    guided = model.sample(["a boat", "a tree"], seed=1, steps=3, guidance=4.0)
    assert (guided - images).abs().max() > 1e-3
    assert not torch.equal(model.sample(["a boat", "a tree"], ["a tree", "a boat"], seed=1, steps=3, guidance=4.0), guided)
    model.base.size = 32, 64
    assert model.sample(["a boat"], steps=2).shape == (1, 3, 32, 64)
    model.base.size = 30, 32
    with pytest.raises(ValueError, match="multiple of 8"):
        model.sample(["a boat"])


def test_xl_empty_prompts_are_zeros_and_sizes_matter():
    model = tiny(xl=True)
    context, pooled = model.text.tokens(["", Prompt("a boat")])
    assert not context[0].any() and not pooled[0].any() and context[1].any() and pooled[1].any()
    assert tiny(xl=True, zeros=False).text.tokens([""])[0].any()
    seen = []
    model.base.parts.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[4]))
    model(torch.randn(2, 4, 6, 4), torch.tensor([1, 2]), ["a", "b"])
    assert seen[0].tolist() == [[48, 32, 0, 0, 48, 32]] * 2                # original height, width, crop, target height, width


# ---- one base, several models

def test_three_models_share_one_base():
    base = tiny()
    auxiliary, target = moved(base.with_adapter(2, seed=1)), base.with_adapter(2, seed=2)
    x, t = torch.randn(2, 4, 6, 6), torch.tensor([5, 900])
    plain = base(x, t, ["a", "b"])
    assert torch.equal(target(x, t, ["a", "b"]), plain)                    # a new adapter does nothing
    assert (auxiliary(x, t, ["a", "b"]) - plain).abs().max() > 1e-3
    assert torch.equal(base(x, t, ["a", "b"]), plain)                      # and the reference stays what it was
    assert list(base.parameters()) == [] and auxiliary.base is target.base
    assert {name.split(".")[0] for name, _ in target.named_parameters()} == {"adapter"}
    frozen = auxiliary.frozen_copy()
    assert frozen.base is base.base and not any(p.requires_grad for p in frozen.parameters())
    with torch.no_grad():
        auxiliary.adapter.A[0].add_(1)
    assert not torch.equal(frozen.adapter.A[0], auxiliary.adapter.A[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fit_trains_the_adapter_alone_and_resumes(checkpointing, tmp_path):
    base = tiny(checkpointing=checkpointing)
    before = fingerprint(base.base.parts.unet)
    x0 = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    base.text.criteria = from_painter(count=1).criteria

    def loss_step(model, generator):
        t = torch.randint(1000, (2,), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        loss = ((model(model.diffusion.q_sample(x0, t, noise), t, ["a boat", "a tree"]) - noise) ** 2).flatten(1).mean(1)
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
    resumed, _ = fit(base.with_adapter(2), loss_step, recipe, tmp_path / "part.pt", name="a", resume=True)
    for a, b in zip(whole.parameters(), resumed.parameters()):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert line["step"] == 6 and all(b.abs().max() > 0 for b in whole.adapter.B)
    assert fingerprint(base.base.parts.unet) == before
    with pytest.raises(ValueError, match="whole.pt: an adapter of Stable Diffusion.* --weights .* --lora .*whole.safetensors"):
        load_model(tmp_path / "whole.pt")                                  # no model of its own: this file resumes a run


# ---- prompts and caches

def test_long_prompts_take_several_windows_and_no_phrase_is_lost_or_cut():
    tokenizer = Tokenizer(sd_tiny.train_merges())
    good, bad = tuple(f"good thing {i}" for i in range(16)), tuple(f"bad thing {i}" for i in range(16))
    parts = windows(Prompt("a boat", good, bad), tokenizer)
    assert len(parts) > 2 and all(len(tokenizer.encode(str(part))) <= 75 for part in parts)
    assert [part.caption for part in parts] == ["a boat"] + [""] * (len(parts) - 1)
    assert sum((part.positive for part in parts), ()) == good and sum((part.negative for part in parts), ()) == bad
    first = parts[0].positive + (good[len(parts[0].positive)],)
    assert len(tokenizer.encode(str(Prompt("a boat", first)))) > 75                                        # the next one did not fit
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert windows(Prompt("a boat", good[:1], bad[:1]), tokenizer) == [Prompt("a boat", good[:1], bad[:1])]
        assert windows(Prompt(""), tokenizer) == [Prompt("")]
    with pytest.warns(UserWarning, match="boat boat .* is cut at 75 tokens"):
        assert windows(Prompt("boat " * 100, good[:1]), tokenizer) == [Prompt("boat " * 100), Prompt("", good[:1])]


def test_winner_and_loser_share_their_context_however_long(monkeypatch):
    # phrases of very different lengths on the two sides of the leaf: each side alone could lose other phrases of the context
    tree = {"name": "T", "children": [{"name": f"L{i}", "positive": f"good {i}", "negative": f"bad {i}" + " boat" * (6 * (i == 0))} for i in range(26)]}
    criteria, model, read = Criteria(tree), tiny(), []
    batch = Batch(None, ["a boat"], np.array([[-1] + [1, -1] * 12 + [1]], np.int8))
    tokenizer = model.base.parts.tokenizers[0]
    monkeypatch.setattr(model.base.parts, "tokenizers", [Spy(tokenizer, read)])
    context = []
    for prompts in preference_prompts(criteria, batch, [0], "opposite"):
        read.clear()
        model.text.tokens(prompts)
        context.append({phrase for text in read for phrase in re.findall(r"(?:good|bad) [1-9]\d*", text)})
    assert context[0] == context[1] == {f"{'bad' if i % 2 == 0 else 'good'} {i}" for i in range(1, 26)}


class Spy:
    """A tokenizer that writes down what is encoded for good, once it is called."""

    def __init__(self, tokenizer, read):
        self.tokenizer, self.read, self.length, self.encode = tokenizer, read, tokenizer.length, tokenizer.encode

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
    if xl:                                                        # the pooled vector is the first window's: there the caption stands
        first = windows(long, model.base.parts.tokenizers[0])[0]
        torch.testing.assert_close(pooled, model.text.tokens([first])[1])
    asked = [Prompt("a tree"), long, Prompt("a boat", *[tuple(f"{side} thing {i}" for i in range(16)) for side in ("good", "bad")])]
    alone = torch.cat([model(x[i:i + 1], t[:1], [prompt]) for i, prompt in enumerate(asked)])
    torch.testing.assert_close(model(x, t, asked), alone, atol=1e-5, rtol=0)
    assert (model(x, t, [Prompt("a boat")] * 3) - alone)[1:].abs().amax((1, 2, 3)).min() > 1e-4             # the later windows are read
    assert model.sample([long], steps=2, guidance=2.0).isfinite().all()                                    # away from a shorter prompt


def count_runs(model):
    runs = []
    for encoder in model.base.parts.encoders:
        encoder.register_forward_hook(lambda *_: runs.append(1))
    return runs


def test_encoded_prompts_are_kept_on_disk(tmp_path):
    model = tiny(cache=tmp_path)
    runs = count_runs(model)
    first = model.text.tokens(["a boat", "a tree"])[0]
    again = model.text.tokens(["a tree", "a boat"])[0]
    assert torch.equal(first.flip(0), again) and len(runs) == 2
    other = tiny(cache=tmp_path)
    runs = count_runs(other)
    assert torch.equal(other.text.tokens(["a boat", "a tree"])[0], first) and len(runs) == 0       # another run, the same weights
    other.text.tokens(["a boat."])
    assert len(runs) == 1                                                  # another caption
    changed = tiny(cache=tmp_path, seed=1)
    runs = count_runs(changed)
    assert not torch.equal(changed.text.tokens(["a boat"])[0], first[:1]) and len(runs) == 1      # other weights
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:50])
    again = tiny(cache=tmp_path)
    assert torch.equal(again.text.tokens(["a boat", "a tree"])[0], first)  # damaged files are made again


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


# ---- pictures

def test_buckets():
    sizes = buckets(512)
    assert (512, 512) in sizes and all(w % 64 == h % 64 == 0 and w * h <= 512 ** 2 and 0.5 <= w / h <= 2 for w, h in sizes)
    assert {(h, w) for w, h in sizes} == set(sizes)
    assert nearest((3000, 3000), sizes) == (512, 512) and nearest((640, 427), sizes) == (640, 384) and nearest((100, 5000), sizes) == (384, 640)
    assert nearest((1600, 1200), sizes) == nearest((16, 12), sizes) and nearest((1200, 1600), sizes) == nearest((1600, 1200), sizes)[::-1]
    with pytest.raises(ValueError, match="bucket-step"):
        buckets(32)


def test_a_batch_has_one_shape():
    images = np.empty(10, object)
    for i in range(10):
        images[i] = torch.full((4, 4, 6) if i % 3 else (4, 6, 4), float(i))
    painter = from_painter(count=10)
    data = LatentPaintings(painter.criteria, images, [f"caption {i}" for i in range(10)], painter.annotations)
    for first in range(10):
        batch = data.batch([first, 0, 1, 2, 3, 9])
        numbers = batch.images[:, 0, 0, 0].long().tolist()
        assert len({i % 3 == 0 for i in numbers}) == 1 and numbers[0] == first
        assert batch.captions == [f"caption {i}" for i in numbers] and (batch.annotations == painter.annotations[numbers]).all()
    assert len(data.split("train")) == 8 and isinstance(data.split("train"), LatentPaintings)


def write_pictures(folder, count=12):
    """The painter's export with pictures of several shapes, PNG and JPEG."""
    from_painter(count=count).export(folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        old = folder / row["file_name"]
        image = Image.open(old).resize([(96, 64), (64, 96), (70, 70)][i % 3])
        old.unlink()
        row["file_name"] = f"{i}.{('png', 'jpg')[i % 2]}"
        image.save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder of tiny weights, folder of pictures, diffusers' pipeline)."""
    pytest.importorskip("diffusers"), pytest.importorskip("safetensors")
    folder = tmp_path_factory.mktemp("world")
    pipe = sd_tiny.pipeline("sd1", folder / "weights")
    write_pictures(folder / "pictures")
    return folder / "weights", folder / "pictures", pipe


def flags(world, out):
    weights, pictures, _ = world
    return ["--weights", str(weights), "--data", str(pictures), "--out", str(out), "--resolution", "64", "--bucket-step", "16",
            "--device", "cpu", "--accumulate", "2", "--rank", "2", "--sft-lr", "0.05", "--sft-steps", "2"]


ALIGN = ["--lr", "0.5", "--steps", "2", "--samples", "0", "--sampling-steps", "1"]                   # of train_cpo.py only


def test_latents_are_computed_once(world, tmp_path, monkeypatch, capsys):
    import train_sft
    from safetensors.torch import load_file, save_file
    parser = argparse.ArgumentParser()
    train_sft.add_common_arguments(parser), train_sft.add_sft_arguments(parser), finetune.add_arguments(parser)
    made, encode = [], VAE.encode
    monkeypatch.setattr(VAE, "encode", lambda self, images: made.append(tuple(images.shape)) or encode(self, images))

    def shapes(*more):
        made.clear()
        data, _ = finetune.start(finetune.parse(parser, flags(world, tmp_path) + list(more), finetune.TRAINING))
        return {tuple(x.shape) for x in data.images}, len(made)
    first = shapes()
    assert first == ({(4, 6, 10), (4, 10, 6), (4, 8, 8)}, 12)              # 80 x 48, 48 x 80 and 64 x 64 pixels
    assert shapes()[1] == 0                                                # all there
    assert shapes("--resolution", "48")[1] == 12                           # another size
    assert "enlarged" not in capsys.readouterr().out
    shapes("--resolution", "80")
    assert "4 of 12 pictures are enlarged, since they are smaller than --resolution 80 asks" in capsys.readouterr().out
    assert shapes("--no-cache")[1] == 12
    picture = next(world[1].glob("0.png"))
    before = picture.read_bytes()
    Image.new("RGB", (70, 70), "red").save(picture)
    assert shapes()[1] == 1                                                # another picture of the same name
    picture.write_bytes(before)
    picture.rename(picture.with_suffix(".gone"))
    with pytest.raises(DataError, match="metadata.jsonl, line 1: .*0.png does not exist"):
        shapes()
    picture.with_suffix(".gone").rename(picture)
    weights = shutil.copytree(world[0], tmp_path / "weights")
    file = weights / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file(state | {"encoder.conv_in.bias": state["encoder.conv_in.bias"] + 0.1}, file)
    made.clear()
    finetune.start(finetune.parse(parser, flags((weights, *world[1:]), tmp_path), finetune.TRAINING))
    assert len(made) == 12                                                 # another VAE, the same --out


def test_a_base_is_opened_as_the_flags_say(monkeypatch):
    import train_sft
    seen, parser = [], argparse.ArgumentParser()
    train_sft.add_common_arguments(parser), finetune.add_arguments(parser)
    monkeypatch.setattr(finetune, "load_parts", lambda *asked: seen.append(asked) or tiny().base.parts)

    def opened(*more):
        return finetune.open_base(finetune.parse(parser, ["--weights", "w", "--device", "cpu", *more], {})).base.parts.unet.mid_block
    block = opened("--variant", "fp16", "--bf16", "--checkpointing", "--prediction", "v", "--config", "c", "--tokenizer", "t")
    assert seen == [("w", "c", "t", "fp16", torch.bfloat16, "v")] and isinstance(block.step, functools.partial)
    assert not isinstance(opened("--dtype", "float16").step, functools.partial) and seen[1] == ("w", None, None, None, torch.float16, None)
    for flag in ("--resolution", "--bucket-step"):
        with pytest.raises(ValueError, match=f"{flag} 100 must be a multiple of 8"):
            opened(flag, "100")


def test_samples_go_towards_the_positive_and_away_from_the_negative(world, tmp_path, monkeypatch):
    import sample
    seen = []
    monkeypatch.setattr(SDModel, "sample", lambda self, *asked: seen.append(asked) or torch.zeros(1, 3, 64, 64))
    flags = ["--weights", str(world[0]), "--prompt", "a boat", "--positive", "good light", "--negative", "blur", "--eta", "0.5", "--steps", "3",
             "--seed", "4", "--resolution", "64", "--device", "cpu", "--out", str(tmp_path / "x.png")]
    sample.main(flags)
    sample.main([*flags, "--guidance", "1"])
    assert seen[0] == ([Prompt("a boat", ("good light",))], [Prompt("a boat", (), ("blur",))], 7.5, 3, 0.5, 4)
    assert seen[1][0] == [Prompt("a boat", ("good light",), ("blur",))] and seen[1][2] == 1
    with pytest.raises(ValueError, match="name the phrases"):
        sample.main([*flags, "--positive", "all"])


def test_both_stages_end_to_end_and_diffusers_paints_the_same(world, tmp_path, capsys):
    pytest.importorskip("peft")
    import sample
    import train_cpo
    import train_sft
    common = flags(world, tmp_path)
    base, auxiliary = train_sft.main(common)
    assert base.adapter is None and auxiliary.base is base.base and max(b.abs().max() for b in auxiliary.adapter.B) > 1e-3
    log = json.loads((tmp_path / "auxiliary.jsonl").read_text().splitlines()[-1])
    assert log["step"] == 2 and log["loss"] > 0
    written = (tmp_path / "auxiliary.safetensors").stat().st_mtime_ns

    report = train_cpo.main(common + ALIGN + ["--checkpointing", "--sample-every", "2", "--samples", "2"])
    assert (tmp_path / "auxiliary.safetensors").stat().st_mtime_ns == written          # it was there, and used again
    assert (tmp_path / "samples" / "target_00002.png").is_file() and Image.open(tmp_path / "report.png").width == 2 * 68 + 4
    assert report == json.loads((tmp_path / "report.json").read_text()) and report["held_out"] == 2       # pictures 8 and 9 of twelve
    assert report["log_ratio"]["target"] != report["log_ratio"]["base"] and set(report["errors"]) >= {"target", "auxiliary_told"}
    first = json.loads((tmp_path / "target.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-3)             # target and reference start as one
    assert {"winner", "margin", "gap", "lam"} <= first.keys()

    lora = ["--lora", str(tmp_path / "target_kohya.safetensors")]
    for name, more in (("half", ["--criteria", "Color Relations", "--dtype", "bfloat16"]), ("esd", ["--method", "esd", *lora]),
                       ("sft", ["--method", "sft", "--best", "0.5"])):
        line = train_cpo.main(common + ALIGN + ["--name", name, *more])
        assert line["step"] == 2 and ("margin" in line) == (name == "half") and (tmp_path / f"{name}.safetensors").is_file()
        assert not (tmp_path / f"report_{name}.json").exists()

    train_cpo.main(flags(world, tmp_path / "one") + ALIGN)                 # both stages in one call, and then again
    train_cpo.main(flags(world, tmp_path / "one") + ALIGN + ["--resume"])
    target = tmp_path / "target.safetensors"
    before = target.read_bytes()
    train_cpo.main(common + ALIGN + ["--resume"])                          # the same run, which is finished
    assert target.read_bytes() == before
    listing = world[1] / "metadata.jsonl"
    rows = listing.read_text()
    for more, what, text in ((["--stabilizer", "none"], "stabilizer", rows), (["--rank", "3"], "rank", rows), (lora, "auxiliary", rows),
                             ([], "data", "\n".join(rows.splitlines()[::-1])), (["--prediction", "v"], "prediction", rows)):
        listing.write_text(text)
        capsys.readouterr()
        with pytest.raises(ValueError, match=rf"target.pt belongs to another run \({what}\)"):
            train_cpo.main(common + ALIGN + ["--resume", *more])
        listing.write_text(rows)
        other = f"auxiliary.safetensors: used as it is (trained with another {what}: "                  # it is used, but not silently
        assert (other in capsys.readouterr().out) == (what in ("data", "prediction"))

    pipe = world[2]
    for name in ("target.safetensors", "target_kohya.safetensors"):
        ours = sample.main(["--weights", str(world[0]), "--lora", str(tmp_path / name), "--prompt", "a boat", "--resolution", "64", "--steps", "2",
                            "--seed", "7", "--device", "cpu", "--out", str(tmp_path / "x.png")])
        noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(7))[None].double()
        pipe.load_lora_weights(tmp_path, weight_name=name)
        theirs = pipe(prompt="a boat", num_inference_steps=2, guidance_scale=7.5, latents=noise, height=64, width=64, output_type="np").images
        pipe.unload_lora_weights()
        plain = pipe(prompt="a boat", num_inference_steps=2, guidance_scale=7.5, latents=noise, height=64, width=64, output_type="np").images
        assert ours.shape == (1, 64, 64, 3) and np.abs(theirs * 255 - ours).max() <= 1 and np.abs(theirs - plain).max() > 0.02


def test_an_adapter_of_the_text_encoder(world, tmp_path):
    # in the names of peft and of kohya: merged for sampling, refused for training, where the three models share the encoder
    from safetensors.torch import save_file
    a, b = torch.randn(2, 24), torch.randn(24, 2)
    layer = "encoder.layers.1.self_attn.q_proj"
    tensors = {"peft": {f"text_encoder.text_model.{layer}.lora_A.weight": a, f"text_encoder.text_model.{layer}.lora_B.weight": b},
               "kohya": {f"lora_te_text_model_{layer.replace('.', '_')}.lora_down.weight": a,
                         f"lora_te_text_model_{layer.replace('.', '_')}.lora_up.weight": b}}
    args = argparse.Namespace(weights=str(world[0]), config=None, tokenizer=None, variant=None, dtype="float32", prediction=None, resolution=64, bucket_step=64,
                              checkpointing=False, device="cpu")
    for name, state in tensors.items():
        save_file(state, tmp_path / f"{name}.safetensors")
        base = finetune.open_base(args)
        with pytest.raises(ValueError, match="adapts the text encoder too"):
            finetune.with_lora(base, tmp_path / f"{name}.safetensors")
        before, context = base.base.parts.encoders[0].get_parameter(f"{layer}.weight").clone(), base.text.tokens(["a boat"])[0]
        model = finetune.with_lora(base, tmp_path / f"{name}.safetensors", merge_text=True)
        torch.testing.assert_close(base.base.parts.encoders[0].get_parameter(f"{layer}.weight"), before + b @ a)
        assert (model.text.tokens(["a boat"])[0] - context).abs().max() > 1e-3


@pytest.mark.parametrize("size, side", [(None, 512), (64, 512), (96, 768), (128, 1024)])
def test_pictures_are_as_large_as_those_that_the_base_was_trained_on(world, tmp_path, size, side):
    """Unless told otherwise. The tiny VAE halves the sides three times, as the real ones do."""
    shutil.copytree(world[0], tmp_path / "weights")
    config = tmp_path / "weights" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": size}))
    for more, expected in (([], side), (["--resolution", "64"], 64)):
        parser = argparse.ArgumentParser()
        parser.add_argument("--device", default="cpu")
        finetune.add_arguments(parser)
        args = finetune.parse(parser, ["--weights", str(tmp_path / "weights"), *more], {})
        assert finetune.open_base(args).base.size == (expected, expected) == (args.resolution,) * 2


def test_flags_that_do_not_go_together(world, tmp_path):
    import train_cpo
    import train_sft
    common = flags(world, tmp_path)
    for more, words in ((["--dtype", "float16"], "is for sampling"),
                        (["--method", "dpo"], "pairs of pictures"), (["--paint", "8"], "folder's own pictures"),
                        (["--data", "flawed"], "folder with pictures"), (["--criteria", "Colour"], "no dimension 'Colour'"),
                        (["--lora", "nowhere.safetensors"], "nowhere.safetensors: not found")):
        with pytest.raises(ValueError, match=words):
            train_cpo.main(common + more)
    for flag in ("--rank", "--accumulate", "--bucket-step", "--resolution"):
        with pytest.raises(SystemExit):
            train_cpo.main(common + [flag, "0"])
    with pytest.raises(ValueError, match="nowhere: --config is a folder"):
        train_cpo.main(common + ["--config", "nowhere"])
    assert not list(tmp_path.rglob("auxiliary*"))                 # nothing was trained before
    with pytest.raises(ValueError, match="nowhere: not found"):
        train_sft.main(["--weights", "nowhere"])
