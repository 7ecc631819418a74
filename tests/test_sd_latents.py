"""Pictures as latents: sizes, batches of one shape, and a cache that never gives the wrong ones."""
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import sd_tiny
from nanocpo.data import Batch, to_tensor
from nanocpo.folder import reading
from nanocpo.folder.reading import DataError
from nanocpo.method import add_noise
from nanocpo.run.flags import parse_training
from nanocpo.sd import latents, vae
from nanocpo.sd.latents import LatentPaintings, buckets, load_latents, nearest
from nanocpo.sd.vae import VAE
from nanocpo.sd.world import StableDiffusion
from nanocpo.toy.paintings import from_painter
from nanocpo.utils import ranks


def test_buckets():
    sizes = buckets(512)
    assert (512, 512) in sizes and all(w % 64 == h % 64 == 0 and w * h <= 512 ** 2
                                       and 0.5 <= w / h <= 2 for w, h in sizes)
    assert {(h, w) for w, h in sizes} == set(sizes)
    assert (nearest((3000, 3000), sizes) == (512, 512) and nearest((640, 427), sizes) == (640, 384)
            and nearest((100, 5000), sizes) == (384, 640))
    assert (nearest((1600, 1200), sizes) == nearest((16, 12), sizes)
            and nearest((1200, 1600), sizes) == nearest((1600, 1200), sizes)[::-1])
    with pytest.raises(ValueError, match="bucket-step"):
        buckets(32)


def test_a_broad_picture_has_broad_latents(tmp_path):
    """Its left half black, its right half white: neither turned nor mirrored; and buckets that are
    not their own mirror image."""
    assert [nearest(size, [(8, 4), (6, 6), (2, 9)]) for size in (
        (400, 200), (150, 400), (30, 40), (90, 50), (1, 8))] == [(8, 4), (2, 9), (6, 6), (8, 4),
                                                                  (2, 9)]
    base = sd_tiny.tiny()
    sheet = np.zeros((48, 96, 3), np.uint8)
    sheet[:, 48:] = 255
    for name, pixels in (("broad", sheet), ("tall", sheet.transpose(1, 0, 2))):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    (tmp_path / "metadata.jsonl").write_text("".join(
        f'{{"file_name": "{name}.png", "caption": "{name}"}}\n' for name in ("broad", "tall")))
    settings = parse_training("", ["--weights", "w", "--data", str(tmp_path), "--bucket-step", "16",
                                   "--device", "cpu"], ("common",))
    data = load_latents(settings.common, settings.weights, base)
    assert data.captions == ["broad", "tall"]
    for encoded, pixels in zip(data.images, (sheet, sheet.transpose(1, 0, 2))):
        height, width = (side // 3 * 2 for side in pixels.shape[:2])                  # 64 x 32
        small = np.array(Image.fromarray(pixels).resize((width, height), Image.LANCZOS))
        assert encoded.shape == (4, height // 8, width // 8)
        with torch.no_grad():
            torch.testing.assert_close(encoded, base.latents.encode(to_tensor(small[None]))[0])


def test_a_batch_has_one_shape():
    images = np.empty(10, object)
    for i in range(10):
        images[i] = torch.full((4, 4, 6) if i % 3 else (4, 6, 4), float(i))
    painter = from_painter(count=10)
    data = LatentPaintings(painter.criteria, images, [f"caption {i}" for i in range(10)],
                           painter.annotations)
    for first in range(10):
        batch = data.batch([first, 0, 1, 2, 3, 9])
        numbers = batch.latents[:, 0, 0, 0].long().tolist()
        assert batch.images is None
        assert len({i % 3 == 0 for i in numbers}) == 1 and numbers[0] == first
        assert (batch.captions == [f"caption {i}" for i in numbers]
                and (batch.annotations == painter.annotations[numbers]).all())
    assert len(data.split("train")) == 8 and isinstance(data.split("train"), LatentPaintings)


def test_the_latents_of_a_batch_are_noised_as_they_are():
    model, t = sd_tiny.tiny(), torch.tensor([3, 700])
    latents, images = torch.randn(2, 4, 6, 6), torch.rand(2, 3, 48, 48) * 2 - 1
    generator = torch.Generator().manual_seed(0)
    xt, x0, noise = add_noise(model, Batch([], None, latents=latents), t, generator)
    assert torch.equal(x0, latents)
    assert torch.equal(xt, model.diffusion.q_sample(latents, t, noise))
    _, x0, _ = add_noise(model, Batch([], None, images=images), t, generator)
    assert torch.equal(x0, model.latents.encode(images)) and x0.shape == latents.shape


def test_held_out_pictures_are_chosen_by_content():
    """Not by position: another order, more pictures or a second name change no picture's part."""
    digests = [f"{i * 0x9E3779B1 % 2 ** 32:08x}{i:056x}" for i in range(200)]

    def parts(digests):
        images = np.empty(len(digests), object)
        for i in range(len(digests)):
            images[i] = torch.zeros(4, 4, 4)
        painter = from_painter(count=1)
        data = LatentPaintings(painter.criteria, images, digests,
                               np.zeros((len(digests), len(painter.criteria)), np.int8),
                               digests=tuple(digests))
        return {name: set(data.split(name).captions) for name in ("train", "validation", "test")}
    whole = parts(digests)
    assert 30 <= len(whole["validation"]) + len(whole["test"]) <= 50
    assert sum(map(len, whole.values())) == 200 == len(set().union(*whole.values()))
    assert parts(digests[::-1]) == whole
    some = parts(digests[60:90])
    assert all(some[name] <= whole[name] for name in whole)
    out = sorted(whole["test"])[0]
    # where nothing would be left to train on, all is
    assert parts([out, out])["train"] == {out}
    assert parts([out, min(whole["train"])])["test"] == {out}
    data = LatentPaintings(None, np.arange(3), list("abc"), np.zeros((3, 1)),
                           digests=("1", "2", "3"))
    assert data.take([2, 0]).digests == ("3", "1")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    pytest.importorskip("diffusers"), pytest.importorskip("safetensors")
    return sd_tiny.files(tmp_path_factory.mktemp("files"))


def test_processes_encode_a_part_each_and_read_all(files, tmp_path, monkeypatch):
    """This is the first of two; the second does nothing here, so the first encodes its half
    before it waits, and what is missing after."""
    made, waited, encode = [], [], VAE.encode
    monkeypatch.setattr(VAE, "encode", lambda self, images: made.append(1) or encode(self, images))
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks, "wait", lambda: waited.append(len(made)))
    data = StableDiffusion(parse_training("", sd_tiny.flags(files, tmp_path),
                                          ("common", "sft"))).data
    assert waited == [6] and len(made) == len(data) == 12


def test_latents_are_computed_once(files, tmp_path, monkeypatch, capsys):
    from safetensors.torch import load_file, save_file
    made, encode = [], VAE.encode
    monkeypatch.setattr(VAE, "encode", lambda self, images: (
        made.append(tuple(images.shape)) or encode(self, images)))

    def load(files, *more):
        return StableDiffusion(parse_training("", sd_tiny.flags(files, tmp_path) + list(more),
                                              ("common", "sft"))).data

    def shapes(*more):
        made.clear()
        return {tuple(x.shape) for x in load(files, *more).images}, len(made)
    first = shapes()
    assert first == ({(4, 6, 10), (4, 10, 6), (4, 8, 8)}, 12)  # 80 x 48, 48 x 80 and 64 x 64 pixels
    assert shapes()[1] == 0                                    # all there
    assert shapes("--resolution", "48")[1] == 12               # another size
    assert "enlarged" not in capsys.readouterr().out
    shapes("--resolution", "80")
    assert ("4 of 12 pictures are enlarged, since they are smaller than --resolution 80 asks"
            in capsys.readouterr().out)
    assert shapes("--no-cache")[1] == 12
    for module in (reading, vae, latents):                     # other code that reads or encodes
        with monkeypatch.context() as changed:
            code = tmp_path / "code.py"
            code.write_text(f"# another {module.__name__}")
            changed.setattr(module, "__file__", str(code))
            assert shapes()[1] == 12
    assert shapes()[1] == 0
    picture = next(files[1].glob("0.png"))
    before = picture.read_bytes()
    Image.new("RGB", (70, 70), "red").save(picture)
    assert shapes()[1] == 1  # another picture of the same name
    picture.write_bytes(before)
    picture.rename(picture.with_suffix(".gone"))
    with pytest.raises(DataError, match="metadata.jsonl, line 1: .*0.png does not exist"):
        shapes()
    picture.with_suffix(".gone").rename(picture)
    weights = shutil.copytree(files[0], tmp_path / "weights")
    file = weights / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file(state | {"encoder.conv_in.bias": state["encoder.conv_in.bias"] + 0.1}, file)
    made.clear()
    load((weights, *files[1:]))
    assert len(made) == 12  # another VAE, the same --out
