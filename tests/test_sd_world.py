"""Stable Diffusion as a world: what the flags open, both stages end to end with diffusers as judge,
what is used again and what is refused."""
import functools
import hashlib
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import sd_tiny
import train_cpo
import train_sft
from sd_tiny import moved, tiny
from nanocpo.criteria import Criteria, Prompt
from nanocpo.diffusion import Diffusion
from nanocpo.folder import annotate
from nanocpo.run import stages
from nanocpo.run.flags import parse_sampling, parse_training
from nanocpo.run.settings import STABLE_DIFFUSION, Weights
from nanocpo.run.stages import ready_auxiliary, stage_2, train
from nanocpo.sd import latents, lora, world
from nanocpo.sd.latents import LatentPaintings, load_latents
from nanocpo.sd.model import SDModel
from nanocpo.sd.tokenizer import Tokenizer
from nanocpo.sd.world import StableDiffusion, StableDiffusionPainter, open_base, with_lora
from nanocpo.toy.paintings import from_painter
from nanocpo.utils.checkpoint import fingerprint, load_checkpoint, save_checkpoint

# of train_cpo.py only
ALIGN = ["--lr", "0.5", "--steps", "2", "--samples", "0", "--sampling-steps", "1"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    pytest.importorskip("diffusers"), pytest.importorskip("safetensors")
    return sd_tiny.files(tmp_path_factory.mktemp("files"))


# ---- what the flags open

def test_a_base_is_opened_as_the_flags_say(monkeypatch):
    seen, data = [], from_painter(count=1)
    monkeypatch.setattr(world, "load_parts",
                        lambda *asked: seen.append(asked) or tiny().backbone.parts)
    monkeypatch.setattr(world, "load_latents", lambda *asked: data)
    common = ["--weights", "w", "--device", "cpu"]

    def to_train(*more):
        return StableDiffusion(parse_training("", [*common, *more], ("common", "sft"))).base

    def to_sample(*more):
        return StableDiffusionPainter(*parse_sampling("", [*common, *more])).model
    block = to_train("--variant", "fp16", "--bf16", "--checkpointing", "--prediction", "v",
                     "--config", "c", "--tokenizer", "t", "--zero-snr", "yes", "--vae",
                     "elsewhere").backbone.parts.unet.mid_block
    assert (seen == [("w", "c", "t", "fp16", torch.bfloat16, "v", "yes", "elsewhere")]
            and isinstance(block.step, functools.partial))
    block = to_sample("--dtype", "float16").backbone.parts.unet.mid_block
    assert (not isinstance(block.step, functools.partial)
            and seen[1] == ("w", None, None, None, torch.float16, None, None, None))
    for flag in ("--resolution", "--bucket-step"):
        for opened in (to_train, to_sample):
            with pytest.raises(ValueError, match=f"{flag} 100 must be a multiple of 8"):
                opened(flag, "100")
    assert to_sample("--width", "64", "--height", "32").latent_shape == (4, 4, 8)
    assert to_sample("--resolution", "64", "--height", "32").latent_shape == (4, 4, 8)
    with pytest.raises(ValueError, match="--width 100 must be a multiple of 8"):
        to_sample("--width", "100")


def test_samples_go_towards_the_positive_and_away_from_the_negative(files, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(SDModel, "sample",
                        lambda self, *asked, axes: seen.append((*asked, axes))
                        or torch.zeros(1, 3, 64, 64))
    flags = ["--weights", str(files[0]), "--prompt", "a boat", "--positive", "good light",
             "--negative", "blur", "--eta", "0.5", "--steps", "3", "--seed", "4",
             "--resolution", "64", "--device", "cpu", "--out", str(tmp_path / "x.png")]
    sample.main(flags)
    sample.main([*flags, "--guidance", "1", "--axis", "warm light / cold light=2", "sharp/soft=0"])
    assert seen[0] == ([Prompt("a boat", ("good light",))], [Prompt("a boat", (), ("blur",))],
                       7.5, 3, 0.5, 4, [])
    assert seen[1][6] == [
        (2.0, [Prompt("a boat", ("warm light",))], [Prompt("a boat", (), ("cold light",))]),
        (0.0, [Prompt("a boat", ("sharp",))], [Prompt("a boat", (), ("soft",))])]
    with pytest.raises(ValueError, match="--axis 'warm': with --weights write both phrases"):
        sample.main([*flags, "--axis", "warm=2"])
    assert seen[1][0] == [Prompt("a boat", ("good light",), ("blur",))] and seen[1][2] == 1
    with pytest.raises(ValueError, match="name the phrases"):
        sample.main([*flags, "--positive", "all"])


def test_an_adapter_of_the_text_encoder(files, tmp_path):
    # in the names of peft and of kohya: merged for sampling, refused for training, where the three
    # models share the encoder
    from safetensors.torch import save_file
    a, b = torch.randn(2, 24), torch.randn(24, 2)
    layer = "encoder.layers.1.self_attn.q_proj"
    tensors = {"peft": {f"text_encoder.text_model.{layer}.lora_A.weight": a,
                        f"text_encoder.text_model.{layer}.lora_B.weight": b},
               "kohya": {f"lora_te_text_model_{layer.replace('.', '_')}.lora_down.weight": a,
                         f"lora_te_text_model_{layer.replace('.', '_')}.lora_up.weight": b}}
    for name, state in tensors.items():
        save_file(state, tmp_path / f"{name}.safetensors")
        base = open_base(Weights(str(files[0]), resolution=64), "cpu")
        with pytest.raises(ValueError, match="adapts the text encoder too"):
            with_lora(base, tmp_path / f"{name}.safetensors")
        encoder = base.backbone.parts.encoders[0]
        before, context = (encoder.get_parameter(f"{layer}.weight").clone(),
                           base.text.tokens(["a boat"])[0])
        model = with_lora(base, tmp_path / f"{name}.safetensors", merge_text=True)
        torch.testing.assert_close(encoder.get_parameter(f"{layer}.weight"), before + b @ a)
        assert (model.text.tokens(["a boat"])[0] - context).abs().max() > 1e-3


@pytest.mark.parametrize("size, side", [(None, 512), (64, 512), (96, 768), (128, 1024)])
def test_pictures_are_as_large_as_those_that_the_base_was_trained_on(files, tmp_path, monkeypatch,
                                                                     size, side):
    """Unless told otherwise. The tiny VAE halves the sides three times, as the real ones do."""
    shutil.copytree(files[0], tmp_path / "weights")
    config = tmp_path / "weights" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": size}))
    asked = []                              # of the sizes of the data's latents: they agree
    monkeypatch.setattr(latents, "buckets", lambda *sizes: asked.append(sizes) or [(64, 64)])
    for more, expected in (([], side), (["--resolution", "64"], 64)):
        settings = parse_training("", ["--weights", str(tmp_path / "weights"), "--device", "cpu",
                                       "--data", str(files[1]), *more], ("common",))
        base = open_base(settings.weights, "cpu")
        assert base.backbone.size == (expected, expected)
        load_latents(settings.common, settings.weights, base)
        assert asked[-1] == (expected, 64)


def test_flags_that_do_not_go_together(files, tmp_path):
    common = sd_tiny.flags(files, tmp_path)
    for more, words in ((["--dtype", "float16"], "is for sampling"),
                        (["--method", "dpo"], "pairs of pictures"),
                        (["--paint", "8"], "folder's own pictures"),
                        (["--data", "flawed"], "folder with pictures"),
                        (["--criteria", "Colour"], "no dimension 'Colour'"),
                        (["--lora", "nowhere.safetensors"], "nowhere.safetensors: not found"),
                        (["--lora", __file__ + ":0.5"], "one file, without a strength"),
                        (["--lora", __file__, __file__], "one file, without a strength")):
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


def test_each_picture_says_how_it_was_made(files, tmp_path):
    flags = ["--weights", str(files[0]), "--prompt", "a boat", "ü", "--positive", "good light",
             "--negative", "blur", "--steps", "1", "--seed", "4", "--width", "64", "--height", "32",
             "--device", "cpu", "--out", str(tmp_path / "new" / "x.png")]
    images = sample.main(flags)
    assert images.shape == (2, 32, 64, 3)
    for i, prompt in enumerate(("a boat; good: good light", "ü; good: good light")):
        with Image.open(tmp_path / "new" / f"x_{i}.png") as picture:
            assert (np.asarray(picture) == images[i]).all()
            told, away = picture.text, f"{('a boat', 'ü')[i]}; bad: blur"
        assert (told["prompt"], told["negative_prompt"], told["seed"]) == (prompt, away, "4")
        assert told["parameters"] == (
            f"{prompt}\nNegative prompt: {away}\nSteps: 1, CFG scale: 7.5, Seed: 4, Size: 64x32, "
            f"Model: weights, Picture: {i}, eta: 0.0")
    sample.main([*flags, "--guidance", "0"])
    with Image.open(tmp_path / "new" / "x_0.png") as picture:
        assert (picture.text["prompt"], picture.text["negative_prompt"]) == (
            "a boat; good: good light; bad: blur", "")


def test_what_cannot_be_written_is_said_before_sampling(tmp_path, capsys):
    for out in (tmp_path, tmp_path / "x.txt", tmp_path / "x"):
        with pytest.raises(SystemExit):
            sample.main(["--weights", "nowhere", "--out", str(out)])
        assert "name the picture of the grid, for example" in capsys.readouterr().err


def test_several_adapters_with_strengths_paint_their_sum(files, tmp_path):
    base = open_base(Weights(str(files[0]), resolution=64), "cpu")
    names = []
    for i in (1, 2):
        names.append(tmp_path / f"{i}.safetensors")
        lora.save(moved(base.with_adapter(2, seed=i), seed=i).adapter, names[-1])
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    ask = lambda *files: with_lora(base, *files)(x, t, ["a boat"])
    both = with_lora(base, f"{names[0]}:0.5", f"{names[1]}:-2")
    weight = base.backbone.parts.unet.get_submodule(next(iter(both.adapter.place))).weight
    (a, b), name = next(iter(both.adapter.pairs().values())), next(iter(both.adapter.place))
    one, two = (lora.load(file, {"unet": base.backbone.parts.unet})["unet"][name] for file in names)
    torch.testing.assert_close(b @ a, 0.5 * one[1] @ one[0] - 2 * two[1] @ two[0])
    assert (b @ a).shape == weight.shape
    torch.testing.assert_close(ask(f"{names[0]}:0"), base(x, t, ["a boat"]))
    torch.testing.assert_close(ask(f"{names[0]}:0.25", f"{names[0]}:0.75"), ask(names[0]),
                               atol=1e-5, rtol=1e-4)
    assert (ask(names[0]) - base(x, t, ["a boat"])).abs().max() > 1e-3


def test_prompts_of_ones_own_in_the_sample_grids(files, tmp_path, monkeypatch):
    seen, file = [], tmp_path / "prompts.txt"
    monkeypatch.setattr(SDModel, "sample", lambda self, captions, **how: (
        seen.append(captions), torch.zeros(len(captions), 3, 64, 64))[1])
    file.write_text("\ufeffa boat at night\n\n  a tree \n", encoding="utf-8")
    common = sd_tiny.flags(files, tmp_path / "out") + ["--prompts", str(file)]
    with pytest.raises(ValueError, match="--prompts are painted every --sample-every steps"):
        train_sft.main(common)
    train_sft.main(common + ["--sample-every", "2"])
    assert seen == [["a boat at night", "a tree"]] * 2
    assert (tmp_path / "out" / "samples" / "auxiliary_00002.png").is_file()
    for content, words in ((b"\n", "no prompt in it"), ("a".encode("utf-16"), "as UTF-8 text")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            train_sft.main(common)


# ---- both stages

def test_both_stages_end_to_end_and_diffusers_paints_the_same(files, tmp_path, capsys):
    pytest.importorskip("peft")
    common = sd_tiny.flags(files, tmp_path)
    base, auxiliary = train_sft.main(common)
    assert (base.adapter is None and auxiliary.backbone is base.backbone
            and max(b.abs().max() for b in auxiliary.adapter.B) > 1e-3)
    log = json.loads((tmp_path / "auxiliary.jsonl").read_text().splitlines()[-1])
    assert log["step"] == 2 and log["loss"] > 0
    adapter = tmp_path / "auxiliary.safetensors"
    written = adapter.stat().st_mtime_ns

    report = train_cpo.main(common + ALIGN
                            + ["--checkpointing", "--sample-every", "2", "--samples", "2",
                               "--verdict-draws", "1"])
    assert adapter.stat().st_mtime_ns == written           # it was there, and used again
    assert ((tmp_path / "samples" / "target_00002.png").is_file()
            and Image.open(tmp_path / "report.png").width == 2 * 68 + 4)
    # by the digests of the twelve files
    held = sum(int(hashlib.sha256(path.read_bytes()).hexdigest()[:8], 16) % 10 > 7
               for path in files[1].iterdir() if path.suffix in (".png", ".jpg"))
    assert (report == json.loads((tmp_path / "report.json").read_text())
            and report["held_out"] == held > 0)
    assert (report["log_ratio"]["target"] != report["log_ratio"]["base"]
            and set(report["errors"]) >= {"target", "auxiliary_told"})
    assert report["counted"]["draws"] == 1 and report["counted"]["agreement"]["verdicts"] > held
    assert 0 <= report["counted"]["negative"]["target"]["mean"] <= report["counted"]["leaves"]
    first = json.loads((tmp_path / "target.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-3)  # target and reference start as one
    assert {"winner", "margin", "gap", "lam"} <= first.keys()

    own, other = ["--lora", str(adapter)], ["--lora", str(tmp_path / "target_kohya.safetensors")]
    half = ["--name", "half", "--criteria", "Color Relations", "--dtype", "bfloat16"]
    # rounded, base and latents are others, for which an adapter is only used if a flag names it
    with pytest.raises(ValueError,
                       match="auxiliary.safetensors belongs to another run .base, data.; "
                             "choose another --out, or delete the file; as --lora"):
        train_cpo.main(common + ALIGN + half)
    for name, more in (("half", [*half, *own]),
                       ("esd", ["--method", "esd", *other]),
                       ("sft", ["--method", "sft", "--best", "0.5"])):
        line = train_cpo.main(common + ALIGN + ["--name", name, *more])
        assert (line["step"] == 2 and ("margin" in line) == (name == "half")
                and (tmp_path / f"{name}.safetensors").is_file())
        assert not (tmp_path / f"report_{name}.json").exists()

    # both stages in one call, and then again
    train_cpo.main(sd_tiny.flags(files, tmp_path / "one") + ALIGN)
    train_cpo.main(sd_tiny.flags(files, tmp_path / "one") + ALIGN + ["--resume"])
    target = tmp_path / "target.safetensors"
    before = target.read_bytes()
    train_cpo.main(common + ALIGN + ["--resume"])  # the same run, which is finished
    assert target.read_bytes() == before
    listing = files[1] / "metadata.jsonl"
    rows = listing.read_text()
    for more, what, text in ((["--stabilizer", "none"], "stabilizer, strength", rows),
                             (["--rank", "3"], "rank", rows), (other, "auxiliary", rows),
                             ([], "data", "\n".join(rows.splitlines()[::-1])),
                             (["--prediction", "v"], "prediction", rows)):
        listing.write_text(text)
        capsys.readouterr()
        run = common + ALIGN + ["--resume", *more]
        if what in ("data", "prediction"):
            # the auxiliary itself would be the wrong one, unless a flag names it
            with pytest.raises(ValueError, match="auxiliary.safetensors belongs to another run "
                                                 f".{what}.; choose another --out, or delete"):
                train_cpo.main(run)
            run += own
        with pytest.raises(ValueError, match=f"target.pt belongs to another run .{what}.; resume "
                                             "with the same flags and data"):
            train_cpo.main(run)
        listing.write_text(rows)
        # it is used, but not silently
        used = "auxiliary.safetensors is used as it is (rank 2, not 3); delete it to train another"
        assert (used in capsys.readouterr().out) == (what == "rank")

    pipe = files[2]
    for name in ("target.safetensors", "target_kohya.safetensors"):
        ours = sample.main(["--weights", str(files[0]), "--lora", str(tmp_path / name),
                            "--prompt", "a boat", "--resolution", "64", "--steps", "2",
                            "--seed", "7", "--device", "cpu", "--out", str(tmp_path / "x.png")])
        with Image.open(tmp_path / "x_0.png") as plain:        # beside the grid, and nothing else
            assert (np.asarray(plain) == ours[0]).all() and plain.text["seed"] == "7"
        noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(7))[None].double()
        pipe.load_lora_weights(tmp_path, weight_name=name)
        theirs = pipe(prompt="a boat", num_inference_steps=2, guidance_scale=7.5, latents=noise,
                      height=64, width=64, output_type="np").images
        pipe.unload_lora_weights()
        plain = pipe(prompt="a boat", num_inference_steps=2, guidance_scale=7.5, latents=noise,
                     height=64, width=64, output_type="np").images
        assert (ours.shape == (1, 64, 64, 3) and np.abs(theirs * 255 - ours).max() <= 1
                and np.abs(theirs - plain).max() > 0.02)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_commands_of_the_documentation_run_as_they_stand(kind, tmp_path, monkeypatch):
    """With tiny files under the names that they give, and few steps; the adapters of XL are then
    known to other programs."""
    pytest.importorskip("diffusers"), pytest.importorskip("safetensors")
    from safetensors import safe_open
    made = sd_tiny.files(tmp_path / "made", kind)
    monkeypatch.chdir(tmp_path)
    made[0].rename("sd15"), made[1].rename("paintings")
    listing = (tmp_path / "paintings" / "metadata.jsonl")
    rows = listing.read_text()
    text = (Path(__file__).parent.parent / "docs" / "stable_diffusion.md").read_text("utf-8")
    block = text.split("## The commands")[1].split("```")[1].replace("\\\n", " ")
    commands = [shlex.split(line) for line in block.splitlines() if line.startswith("python ")]
    assert [command[1] for command in commands] == ["-m", "train_sft.py", "train_cpo.py",
                                                    "sample.py"]
    few = {"train_sft.py": ["--sft-steps", "1", "--bucket-step", "16", "--resolution", "64"],
           "sample.py": ["--steps", "1", "--resolution", "64"]}
    few["train_cpo.py"] = few["train_sft.py"] + ALIGN
    mains = {"train_sft.py": train_sft.main, "train_cpo.py": train_cpo.main,
             "sample.py": sample.main}
    for command in commands:
        flags = [{"cuda": "cpu"}.get(word, word) for word in command[2:]]
        if command[1] == "-m":
            assert flags[0] == "nanocpo.folder.annotate"
            annotate.main(flags[1:])
        else:
            mains[command[1]](flags + few[command[1]])
    assert (tmp_path / "paintings" / "annotate.html").is_file() and listing.read_text() == rows
    assert Image.open("samples_0.png").size == (64, 64)
    for name in ("auxiliary", "target"):
        with safe_open(f"out_sd/{name}_kohya.safetensors", "pt") as file:
            told, keys = file.metadata(), list(file.keys())
        assert told["ss_output_name"] == name and told["ss_network_dim"] == "8"
        assert told["modelspec.resolution"] == "64x64"               # that of the training
        assert ("modelspec.trigger_phrase" in told) == (name == "auxiliary")
        assert told["ss_base_model_version"] == {"sd1": "sd_v1", "sdxl": "sdxl_base_v1-0"}[kind]
        assert any("unet_mid_block" in key for key in keys) == (kind == "sd1")
        assert any("unet_middle_block_1_" in key for key in keys) == (kind == "sdxl")


# ---- stage 2 as train_cpo.py runs it, on random latents

CRITERIA = Criteria.load().select("Color Relations")                             # short prompts
STAGE_2 = ["--weights", "unused", "--device", "cpu", "--steps", "1", "--sft-steps", "1",
           "--sampling-steps", "1", "--accumulate", "1", "--rank", "2"]


@pytest.fixture
def opened(monkeypatch):
    """(data, base) in the place of what --weights and --data would open."""
    pytest.importorskip("safetensors")
    data, base = sd_tiny.random_data(CRITERIA, 20)
    monkeypatch.setattr(world, "open_base", lambda *asked: base)
    monkeypatch.setattr(world, "load_latents", lambda *asked: data)
    return data, base


def test_the_record_tells_zero_terminal_snr(opened, tmp_path):
    """An adapter that was trained to other noise levels is not used silently."""
    def told(zero_snr):
        opened[1].backbone.parts.diffusion = Diffusion("scaled_linear", "v", zero_snr=zero_snr)
        flags = ["--weights", "unused", "--device", "cpu", "--out", str(tmp_path)]
        return StableDiffusion(parse_training("", flags, ("common",))).sources()["prediction"]
    assert (told(False), told(True)) == ("v", "v with zero-terminal SNR")


def test_the_record_tells_the_tokenizer_of_a_flag(opened, tmp_path):
    def told(tokenizer, *flags):
        opened[1].backbone.parts.tokenizers = [tokenizer]
        flags = ["--weights", "unused", "--device", "cpu", "--out", str(tmp_path), *flags]
        return StableDiffusion(parse_training("", flags, ("common",))).sources().get("tokenizer")
    merges = sd_tiny.train_merges()
    made = [told(Tokenizer(*asked), "--tokenizer", "t") for asked in (
        (merges,), (merges,), (merges[:-1],), (merges[::-1],), (merges, None, "!"))]
    assert made[0] == made[1] and len(set(made)) == 4 and told(Tokenizer(merges)) is None


def test_each_part_of_the_data_has_its_use(opened, tmp_path, monkeypatch):
    """Sixteen of the twenty pictures train the auxiliary and the target; the report's log is of the
    four that are held out, taken once."""
    drawn, taken, batch, take = [], [], LatentPaintings.batch, LatentPaintings.take
    monkeypatch.setattr(LatentPaintings, "batch",
                        lambda self, indices: drawn.append(len(self)) or batch(self, indices))
    monkeypatch.setattr(LatentPaintings, "take",
                        lambda self, indices: taken.append(list(indices)) or take(self, indices))
    got = train_cpo.main([*STAGE_2, "--out", str(tmp_path), "--samples", "2", "--criteria", "Hue",
                          "--verdict-draws", "0"])
    assert drawn[:2] == [16, 16] and len(drawn) > 2 and set(drawn[2:]) == {4}
    assert (taken.count([8, 9, 18, 19]) == 1 and got["held_out"] == 4
            and got["cpo"]["margin"] is not None)


def test_the_files_hold_the_averaged_adapter(opened, tmp_path):
    train_cpo.main([*STAGE_2, "--out", str(tmp_path), "--samples", "0"])
    model, state = opened[1].with_adapter(2), load_checkpoint(tmp_path / "target.pt")
    assert any(not torch.equal(state["ema"][name], x) for name, x in state["model"].items())
    model.load_state_dict(state["ema"])
    for file in ("target", "target_kohya"):
        got = lora.load(tmp_path / f"{file}.safetensors",
                        {"unet": opened[1].backbone.parts.unet})["unet"]
        assert got.keys() == model.adapter.pairs().keys()
        assert all(torch.equal(x, y) for name, pair in model.adapter.pairs().items()
                   for x, y in zip(got[name], pair))


@pytest.mark.parametrize("method", ["esd", "sft"])
def test_every_method_ends_with_a_report(opened, tmp_path, method):
    lora.save(moved(opened[1].with_adapter(2)).adapter, tmp_path / "judge.safetensors")
    got = train_cpo.main([*STAGE_2, "--out", str(tmp_path), "--samples", "2", "--method", method,
                          "--lora", str(tmp_path / "judge.safetensors")])
    assert got["cpo"]["margin"] is not None and got["cpo"]["winner"] > 0


def test_a_stage_trains_as_its_flags_say(opened, tmp_path, monkeypatch):
    seen, (_, base) = {}, opened
    monkeypatch.setattr(stages, "fit", lambda model, step, recipe, path, **named: (
        seen.update(named) or (model, {})))
    made = StableDiffusion(STABLE_DIFFUSION.changed(
        out=str(tmp_path), device="cpu", rank=2, seed=3, accumulate=3, batch=1, resume=True,
        save_every=7, sample_every=5))
    train(made, "x", made.trainable(made.base), 1, 1e-3, None, {"made": "of"})
    assert (seen["accumulate"], seen["seed"], seen["resume"], seen["save_every"],
            seen["sample_every"]) == (3, 3, True, 7, 5)
    assert seen["made_of"]["made"] == "of"
    begins = [made.trainable(made.base), base.with_adapter(2, seed=3), base.with_adapter(2)]
    assert fingerprint(begins[0]) == fingerprint(begins[1]) != fingerprint(begins[2])
    parts = base.backbone.parts
    for stage in (lambda: ready_auxiliary(made, made.base),
                  lambda: stage_2(made, made.base, made.trainable(made.base))):
        seen.clear()
        stage()
        assert seen["made_of"]["base"] == fingerprint(parts.unet, *parts.encoders)


def test_an_auxiliary_without_its_checkpoint_is_used(opened, tmp_path, capsys):
    # brought from elsewhere, or its .pt was deleted: training would overwrite it
    path = tmp_path / "auxiliary.safetensors"
    lora.save(moved(opened[1].with_adapter(2)).adapter, path)
    before = path.read_bytes()
    train_cpo.main([*STAGE_2, "--out", str(tmp_path), "--samples", "0"])
    assert (path.read_bytes() == before and not path.with_suffix(".pt").exists()
            and (tmp_path / "target.safetensors").is_file())
    assert f"{path}: used as it is; delete it to train another" in capsys.readouterr().out


def test_a_half_finished_run_is_not_taken_for_the_one_before(opened, tmp_path, capsys):
    """The files beside a checkpoint that stopped are of an earlier run: the auxiliary is trained
    anew, and who paints with one is told."""
    flags = [*STAGE_2, "--out", str(tmp_path), "--samples", "0"]
    train_cpo.main(flags)
    path = tmp_path / "auxiliary.pt"
    before = path.with_suffix(".safetensors").read_bytes()
    save_checkpoint(path, load_checkpoint(path) | {"step": 0})
    capsys.readouterr()
    world.with_lora(opened[1], path.with_suffix(".safetensors"))
    assert f"{path.with_suffix('.safetensors')} is of an earlier run" in capsys.readouterr().out
    train_cpo.main([*flags, "--sft-lr", "0.1"])
    assert f"{path} stopped at step 0 of 1; it is trained anew" in capsys.readouterr().out
    assert path.with_suffix(".safetensors").read_bytes() != before
    assert load_checkpoint(path)["step"] == 1
