"""Pictures of pictures, and charts: their tiles, titles and labels are read back from the files, so
that none stands at another's place."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sd_tiny import moved, random_data
from toy_tiny import CRITERIA, DATA, settings_of, tiny_model

import sample
from nanocpo.data import to_images
from nanocpo.folder.expert import held_out
from nanocpo.run.settings import STABLE_DIFFUSION
from nanocpo.sd.report import report as sd_report
from nanocpo.sd.world import StableDiffusion
from nanocpo.study import plots
from nanocpo.study.plots import COLOURS, bar_chart, line_chart, matrix_chart
from nanocpo.toy.evaluate import all_prompts, paint
from nanocpo.toy.world import Toy
from nanocpo.utils.checkpoint import save_checkpoint
from nanocpo.utils.grid import LINES, save_grid
from nanocpo.utils.report import write_report

LINE, TITLE, GAP = 14, 22, 4                # pixels of a label's line, of a title, between tiles


def read(path, count, columns, side, zoom, titled=False, lines=1):
    """A saved grid -> its pictures (count, side, side, 3) without their enlargement, the label's
    pixels under each, and the title's above each row."""
    sheet = np.asarray(Image.open(path).convert("RGB"))
    size, title = side * zoom, TITLE * titled
    step_x, step_y = size + GAP, size + LINE * lines + title + GAP
    assert sheet.shape == (-(-count // columns) * step_y + GAP, columns * step_x + GAP, 3)
    tiles, labels = [], []
    for i in range(count):
        x, y = GAP + i % columns * step_x, GAP + title + i // columns * step_y
        tile = sheet[y:y + size, x:x + size]
        assert (tile == tile[::zoom, ::zoom].repeat(zoom, 0).repeat(zoom, 1)).all()   # not smoothed
        tiles.append(tile[::zoom, ::zoom])
        labels.append(sheet[y + size:y + size + LINE * lines, x:x + size])
    return np.stack(tiles), labels, [sheet[GAP + row * step_y:GAP + row * step_y + title]
                                     for row in range(-(-count // columns))]


def written(folder, label, side, zoom):
    """The pixels of a label under a single picture."""
    save_grid(folder / "single.png", np.zeros((1, side, side, 3), np.uint8), [label], zoom=zoom,
              columns=1)
    return read(folder / "single.png", 1, 1, side, zoom, lines=label.count("\n") + 1)[1][0]


def titled(folder, title, columns, side, zoom):
    """The pixels of a title above a row of pictures."""
    save_grid(folder / "single.png", np.zeros((columns, side, side, 3), np.uint8), zoom=zoom,
              columns=columns, titles=[title])
    return read(folder / "single.png", columns, columns, side, zoom, titled=True, lines=0)[2][0]


def noise(count, side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def test_each_picture_has_its_label_and_each_row_its_title(tmp_path):
    images, labels = noise(5, 16), ["a boat", "", "the sun", "x\ny", "W" * 99]
    save_grid(tmp_path / "x.png", images, labels, columns=2, zoom=3, titles=["one", "2", "three"])
    tiles, found, titles = read(tmp_path / "x.png", 5, 2, 16, 3, titled=True, lines=2)
    assert (tiles == images).all()
    for label, pixels in zip(labels, found):
        alone = written(tmp_path, label, 16, 3)
        assert (pixels[:len(alone)] == alone).all() and (pixels[len(alone):] == 255).all()
    assert len({pixels.tobytes() for pixels in found}) == 5 and (found[1] == 255).all()
    for title, pixels in zip(("one", "2", "three"), titles):
        assert (pixels == titled(tmp_path, title, 2, 16, 3)).all() and (pixels < 255).any()
    assert len({pixels.tobytes() for pixels in titles}) == 3


def test_a_caption_of_thousands_of_words_is_cut_to_its_place(tmp_path):
    for label, lines in (("word " * 20_000, 1), ("word\n" * 20_000, LINES)):
        save_grid(tmp_path / "x.png", noise(2, 16), [label, "a"], columns=2, zoom=4)
        _, found, _ = read(tmp_path / "x.png", 2, 2, 16, 4, lines=lines)
        assert (found[0] == written(tmp_path, label[:5 * lines].strip(), 16, 4)[:, :64]).all() or (
            lines == 1 and (found[0] < 255).any())
        assert (found[1][:LINE] == written(tmp_path, "a", 16, 4)).all()


def test_base_stands_above_the_target_under_their_captions(tmp_path):
    base, target, captions = noise(3, 16), noise(3, 16, 1), ["a boat", "a sun", "hill"]
    write_report(tmp_path, "x", {}, base, target, captions, zoom=6, alike="noise")
    tiles, labels, titles = read(tmp_path / "report_x.png", 6, 3, 16, 6, titled=True)
    assert (tiles[:3] == base).all() and (tiles[3:] == target).all()
    for caption, pixels in zip(captions * 2, labels):
        assert (pixels == written(tmp_path, caption, 16, 6)).all()
    for title, pixels in zip(("base", "x: the same noise"), titles):
        assert (pixels == titled(tmp_path, title, 3, 16, 6)).all()


def test_the_toy_s_report_shows_each_model_s_pictures_from_the_same_noise(tmp_path):
    base, auxiliary, target = (tiny_model(seed).frozen_copy() for seed in range(3))
    settings = settings_of("--out", str(tmp_path), "--samples", "6", "--sampling-steps", "2",
                           "--seed", "5")
    for last, name in ((target, "target"), (base, "again")):
        Toy(settings.changed(name=name), DATA).report(base, auxiliary, last, 0)
        stem = "report" if name == "target" else f"report_{name}"
        tiles, labels, _ = read(tmp_path / f"{stem}.png", 12, 6, 32, 3, titled=True)
        for row, model in ((tiles[:6], base), (tiles[6:], last)):
            assert (row == paint(model, "plain", 6, 5, 2)).all()
        for i, pixels in enumerate(labels):
            caption = base.captions[i % 6 % len(base.captions)]
            assert (pixels == written(tmp_path, caption, 32, 3)).all()
        assert (tiles[:6] == tiles[6:]).all() == (last is base)


def test_the_toy_s_grids_show_each_kind_of_prompt_in_its_row(tmp_path):
    settings, model = settings_of("--out", str(tmp_path), "--seed", "3"), tiny_model()
    for name, rows in (("auxiliary", 3), ("target", 1)):
        Toy(settings, DATA).pictures(name)(model, 7)
        tiles, _, titles = read(tmp_path / "samples" / f"{name}_00007.png", 8 * rows, 8, 32, 4,
                                titled=True)
        captions = [model.captions[i % len(model.captions)] for i in range(8)]
        for i, (kind, prompts) in enumerate(zip(("plain", "positive", "negative"),
                                                all_prompts(CRITERIA, captions)[:rows])):
            assert (tiles[8 * i:8 * i + 8] == to_images(model.sample(prompts, seed=3))).all()
            assert (titles[i] == titled(tmp_path, f"{name}, step 7: {kind} prompt", 8, 32, 4)).all()


def test_samples_stand_above_their_own_captions_and_verdicts(tmp_path, monkeypatch):
    model = tiny_model()
    save_checkpoint(tmp_path / "x.pt", model.content() | {"ema": model.state_dict()})
    captions, out = model.captions[:3], tmp_path / "x.png"
    flags = ["--checkpoint", str(tmp_path / "x.pt"), "--out", str(out), "--count", "2",
             "--caption", *captions, "--steps", "2", "--device", "cpu"]
    images = sample.main(flags)
    tiles, labels, _ = read(out, 6, 4, 32, 5)
    assert (tiles == images).all()
    for i, pixels in enumerate(labels):
        assert (pixels == written(tmp_path, captions[i // 2], 32, 5)).all()
    painter = sample.ToyPainter(SimpleNamespace(
        checkpoint=str(tmp_path / "x.pt"), device="cpu", width=None, height=None, caption=None,
        count=1, judge=True))
    data = DATA.take(range(6))
    told = painter.labels(data.images, data.captions)
    for i, (label, caption) in enumerate(zip(told, data.captions)):
        one, = painter.labels(data.images[i:i + 1], [caption])
        assert label == one and label.startswith(f"{caption}: seen {caption}\n")
    assert len(set(told)) == 6
    monkeypatch.setattr(sample.ToyPainter, "labels", lambda self, images, captions: [
        f"{caption} {image.sum()}" for image, caption in zip(images, captions)])
    images = sample.main(flags)
    for i, pixels in enumerate(read(out, 6, 4, 32, 5)[1]):
        told = f"{captions[i // 2]} {images[i].sum()}"
        assert (pixels == written(tmp_path, told, 32, 5)).all()


def test_stable_diffusion_s_report_and_grids_show_each_model_in_its_row(tmp_path):
    data, base = random_data(CRITERIA, 20)
    target = moved(base.with_adapter(2), seed=4).frozen_copy()
    with torch.no_grad():
        for b in target.adapter.B:
            b *= 20
    settings = STABLE_DIFFUSION.changed(out=str(tmp_path), seed=3, samples=2, sampling_steps=2)
    sd_report(settings, held_out(data.take(range(8))), base, None, target, [0])
    tiles, labels, titles = read(tmp_path / "report.png", 4, 2, 48, 1, titled=True)
    captions = base.captions[:2]
    shown = [to_images(model.sample(captions, guidance=7.5, steps=2, seed=3))
             for model in (base, target)]
    assert (tiles == np.concatenate(shown)).all() and (shown[0] != shown[1]).any()
    for caption, pixels in zip(captions * 2, labels):
        assert (pixels == written(tmp_path, caption, 48, 1)).all()
    assert (titles[0] == titled(tmp_path, "base", 2, 48, 1)).all()
    world = object.__new__(StableDiffusion)
    world.settings, world.base, world.shown, world.out = settings, base, captions, tmp_path
    world.pictures("x")(target, 7)
    tiles, _, titles = read(tmp_path / "samples" / "x_00007.png", 4, 2, 48, 1, titled=True)
    assert (tiles == np.concatenate(shown)).all()
    assert (titles[0] == titled(tmp_path, "base", 2, 48, 1)).all()
    assert (titles[1] == titled(tmp_path, "x, step 7", 2, 48, 1)).all()


# ---------------------------------------------------------------- charts

@pytest.fixture
def drawn(monkeypatch):
    """What a chart draws: .texts [(x, y, words)], .boxes [(left, top, right, bottom, fill)] and
    .dots [(x, y, fill)]."""
    found = SimpleNamespace(texts=[], boxes=[], dots=[])

    class Sheet(plots.Sheet):
        def text(self, x, y, words, *rest, **named):
            found.texts.append((x, y, words))

        def upright(self, x, y, words, *rest):
            found.texts.append((x, y, words))

        def box(self, *place, fill=None, outline=None):
            found.boxes.append((*place, fill))

        def dot(self, x, y, radius, fill):
            found.dots.append((x, y, fill))
    monkeypatch.setattr(plots, "Sheet", Sheet)
    return found


def at(drawn, words):
    """(x, y) of this text, which stands there once."""
    place, = [(x, y) for x, y, text in drawn.texts if text == words]
    return place


def test_each_bar_is_as_long_as_its_number_and_beside_its_name(drawn, tmp_path):
    rows = {"one": (1.0, 0.5), "two": (4.0, 0.0), "three": (2.0, 0.25)}
    bar_chart(tmp_path / "x.png", rows, "title", "x label", highlight=["three"])
    assert len(drawn.boxes) == 3
    lengths = [right - left for left, _, right, _, _ in drawn.boxes]
    assert np.allclose(np.divide(lengths, [1.0, 4.0, 2.0]), lengths[0])
    for (name, (mean, half)), (_, top, right, _, fill) in zip(rows.items(), drawn.boxes):
        number = f"{mean:.2f}" + (f" +- {half:.2f}" if half else "")
        assert at(drawn, name)[1] == at(drawn, number)[1] == top + 9
        assert at(drawn, number)[0] >= right and (fill == COLOURS[0]) == (name == "three")
    assert at(drawn, "title")[1] < drawn.boxes[0][1] < at(drawn, "x label")[1]


def test_each_line_has_its_points_its_colour_and_its_name(drawn, tmp_path):
    series = {"up": ([0, 10], [1.0, 3.0], [0, 0]),
              "down": ([0, 5, 10], [2.0, None, 0.5], [0, 0, 0])}
    line_chart(tmp_path / "x.png", series, "title", "steps", "number")
    keys = {words: (y, next(fill for _, v, fill in drawn.dots if v == y))
            for _, y, words in drawn.texts if words in series}
    assert keys["up"][0] < keys["down"][0]
    legend = {y for y, _ in keys.values()}
    points = {name: [(x, y) for x, y, fill in drawn.dots if fill == colour and y not in legend]
              for name, (_, colour) in keys.items()}
    (a, b), (c, d) = points["up"], points["down"]
    assert a[0] == c[0] < b[0] == d[0]
    # 1, 3, 2 and 0.5 on one scale: more is higher
    scale = (a[1] - b[1]) / 2
    assert scale > 0 and c[1] == pytest.approx(a[1] - scale)
    assert d[1] == pytest.approx(a[1] + 0.5 * scale)


def test_each_number_of_a_matrix_stands_at_its_row_and_column(drawn, tmp_path):
    matrix_chart(tmp_path / "x.png", [[0.25, 1.0, 1.5], [2.0, 0.75, 1.25]], ["a", "b"],
                 ["first", "second", "third"], "title")
    rows, columns = ([at(drawn, name)[k] for name in names]
                     for k, names in ((1, ("a", "b")), (0, ("first", "second", "third"))))
    for words, i, j in (("0.25", 0, 0), ("1.00", 0, 1), ("1.50", 0, 2), ("2.00", 1, 0),
                        ("0.75", 1, 1), ("1.25", 1, 2)):
        x, y = at(drawn, words)
        assert x == pytest.approx(columns[j]) and y == pytest.approx(rows[i])
        red, _, blue = next(fill for left, top, right, bottom, fill in drawn.boxes
                            if left < x < right and top < y < bottom)
        assert (blue > red) == (float(words) < 1) and (blue == red) == (words == "1.00")
