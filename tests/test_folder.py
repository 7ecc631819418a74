"""Folders of pictures: they give back what was written, and a broken one is told what is wrong."""
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from toy_tiny import CRITERIA, same_data

from nanocpo.criteria import CriteriaError
from nanocpo.folder.reading import DataError, from_folder
from nanocpo.toy.export import export, main
from nanocpo.toy.paintings import from_painter

GOOD = {"file_name": "good.png", "caption": "a boat", "positive": ["level horizon"],
        "negative": ["too dark"]}


def write(folder, *rows):
    """metadata.jsonl with these rows (dicts, or bytes as they are) beside two good pictures of
    one colour."""
    folder.mkdir(exist_ok=True)
    for name in ("good.png", "second.png"):
        Image.new("RGB", (40, 32), (10, 20, 30)).save(folder / name)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder


# ---------------------------------------------------------------- folders that are sound

def test_export_and_read_give_the_same_data(tmp_path):
    data = from_painter(CRITERIA.select(["Composition", "Finish"]), 30, seed=4)
    export(data, tmp_path / "new" / "folder")  # the folders above it are made too
    back = from_folder(tmp_path / "new" / "folder")
    assert same_data(data, back) and same_data(data.batch([3, 1, 4]), back.batch([3, 1, 4]))
    assert (back.criteria.to_dict() == data.criteria.to_dict() and back.skipped == 0
            and len(back) == 30)


def test_own_criteria_in_the_folder_are_used(tmp_path):
    tree = {"name": "T", "children": [{"name": "Mood", "positive": "calm", "negative": "restless"}]}
    row = {"file_name": "good.png", "caption": "a boat", "negative": ["restless"]}
    write(tmp_path, row)
    # the embedded tree does not know it
    with pytest.raises(DataError, match="unknown attribute 'restless'"):
        from_folder(tmp_path)
    (tmp_path / "criteria.json").write_text(json.dumps(tree))
    data = from_folder(tmp_path)
    assert data.annotations.tolist() == [[-1]] and data.criteria.to_dict() == tree
    # a tree that is given comes first
    with pytest.raises(DataError, match="unknown attribute 'restless'"):
        from_folder(tmp_path, CRITERIA)
    (tmp_path / "criteria.json").write_text("{")
    with pytest.raises(CriteriaError, match="criteria.json: cannot read"):
        from_folder(tmp_path)


def test_lines_may_leave_out_annotations_and_hold_other_keys(tmp_path):
    bare = {"file_name": "second.png", "caption": "  ein Boot, ü \n"}
    data = from_folder(write(tmp_path, bare, b"",
                             json.dumps(GOOD | {"x": 1}).encode() + b"\r", b"   "))
    assert data.captions == ["ein Boot, ü", "a boat"] and not data.annotations[0].any()
    judged = CRITERIA.columns(["Level", "Exposure"])              # of GOOD, in this order
    assert (np.flatnonzero(data.annotations[1]).tolist() == judged
            and data.annotations[1, judged].tolist() == [1, -1])


def test_size_is_the_size_asked_for(tmp_path):
    assert from_folder(write(tmp_path, GOOD), size=16).images.shape == (1, 16, 16, 3)
    assert (from_folder(tmp_path, size=16).images == [10, 20, 30]).all()


def quarters(size):
    """Red at the top left, green top right, blue bottom left, white bottom right:
    (size, size, 3)."""
    four = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    return four.repeat(size // 2, 0).repeat(size // 2, 1)


def corners(image):
    """The four corners of a picture in reading order, each channel 0 or 1: rgb values
    as a string."""
    return ["".join(str(int(c > 127)) for c in image[y, x])
            for y, x in ((2, 2), (2, -3), (-3, 2), (-3, -3))]


@pytest.mark.parametrize("mode, expected", [
    ("RGB", ["100", "010", "001", "111"]), ("RGBA", ["100", "010", "001", "111"]),
    ("P", ["100", "010", "001", "111"]), ("CMYK", ["100", "010", "001", "111"]),
    ("L", ["000", "111", "000", "111"]), ("LA", ["000", "111", "000", "111"]),
    ("1", ["000", "111", "000", "111"])])
@pytest.mark.parametrize("wide", [True, False])
def test_other_modes_and_shapes(tmp_path, mode, expected, wide):
    # black bands that the crop must remove
    pixels = np.zeros((48, 64, 3) if wide else (64, 48, 3), np.uint8)
    pixels[(slice(None), slice(8, 56)) if wide else slice(8, 56)] = quarters(48)
    image = Image.fromarray(pixels).convert(mode, dither=Image.Dither.NONE)
    image.save(tmp_path / f"x.{'tif' if mode == 'CMYK' else 'png'}")
    data = from_folder(write(
        tmp_path, GOOD | {"file_name": f"x.{'tif' if mode == 'CMYK' else 'png'}"}))
    assert data.images.shape == (1, 32, 32, 3) and data.images.dtype == np.uint8
    assert corners(data.images[0]) == expected


@pytest.mark.parametrize("orientation, turn", [
    (1, None), (2, Image.Transpose.FLIP_LEFT_RIGHT), (3, Image.Transpose.ROTATE_180),
    (6, Image.Transpose.ROTATE_90), (8, Image.Transpose.ROTATE_270)])
def test_rotated_photographs_are_turned_upright(tmp_path, orientation, turn):
    # the camera stores the picture turned and says so: what is stored is the inverse of what a
    # viewer must do
    upright = Image.fromarray(np.pad(quarters(48), ((0, 0), (8, 8), (0, 0))))
    stored, exif = upright if turn is None else upright.transpose(turn), Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.jpg", quality=95, exif=exif)
    data = from_folder(write(tmp_path, GOOD | {"file_name": "x.jpg"}))
    assert corners(data.images[0]) == ["100", "010", "001", "111"]


def test_colour_profiles_are_heeded(tmp_path):
    """A scan that says where its red lies is turned into sRGB, as a viewer does; here the profile
    has red and blue exchanged."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    places = {srgb[i:i + 4]: i
              for i in range(132, 132 + 12 * int.from_bytes(srgb[128:132], "big"), 12)}
    exchanged = bytearray(srgb)
    red, blue = (slice(places[tag] + 4, places[tag] + 12) for tag in (b"rXYZ", b"bXYZ"))
    exchanged[red], exchanged[blue] = srgb[blue], srgb[red]
    found = {}
    for name, profile in (("none", None), ("srgb", srgb), ("exchanged", bytes(exchanged)),
                          ("damaged", b"nonsense")):
        for mode in ("RGB", "RGBA", "P"):
            Image.fromarray(quarters(48)).convert(mode).save(
                tmp_path / "x.png", icc_profile=profile)
            found[name, mode] = from_folder(write(
                tmp_path, GOOD | {"file_name": "x.png"})).images[0].astype(int)
    for mode in ("RGB", "RGBA"):
        assert corners(found["exchanged", mode]) == ["001", "010", "100", "111"]
        assert (np.abs(found["srgb", mode] - found["none", mode]).max() <= 2
                and (found["damaged", mode] == found["none", mode]).all())
    assert (found["srgb", "P"] == found["none", "P"]).all()


def test_resizing_is_smooth(tmp_path):
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checks).save(tmp_path / "x.png")
    image = from_folder(write(tmp_path, GOOD | {"file_name": "x.png"})).images[0]
    # grey: no pixel was simply picked
    assert image[4:-4, 4:-4].min() > 120 and image[4:-4, 4:-4].max() < 135


# ---------------------------------------------------------------- as people have them

def test_captions_under_other_names(tmp_path):
    """`text`, and a .txt beside the picture; the line's own caption comes first."""
    rows = [{"file_name": "good.png", "text": " a boat "}, {"file_name": "second.png"}]
    folder = write(tmp_path, *rows)
    (tmp_path / "second.txt").write_text("\ufeffa tree\n", encoding="utf-8")
    assert from_folder(folder).captions == ["a boat", "a tree"]
    (tmp_path / "good.txt").write_text("not this")
    assert from_folder(folder).captions == ["a boat", "a tree"]
    (tmp_path / "second.txt").unlink()
    with pytest.raises(DataError, match="line 2: 'caption' is missing .*second.txt beside"):
        from_folder(folder)


def test_names_as_windows_and_macos_write_them(tmp_path):
    folder, decomposed = write(tmp_path), "u\u0308ber.png"
    (folder / "sub").mkdir()
    for name in ("sub/1.png", decomposed):
        Image.new("RGB", (8, 8), "red").save(folder / name)
    rows = [GOOD | {"file_name": name} for name in ("sub\\1.png", "\u00fcber.png")]
    write(tmp_path, *rows)
    assert (from_folder(folder).images[:, 0, 0] == [255, 0, 0]).all()
    # the same picture, spelled in two ways
    write(tmp_path, *rows, GOOD | {"file_name": "sub/1.png"})
    with pytest.raises(DataError, match="line 3: 1.png has line 1 already"):
        from_folder(folder)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-8-sig"])
def test_listings_in_other_encodings(tmp_path, encoding):
    write(tmp_path, GOOD)
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / "metadata.jsonl").write_bytes((mark + json.dumps(GOOD) + "\n").encode(encoding))
    if encoding == "utf-8-sig":
        assert from_folder(tmp_path).captions == ["a boat"]
    else:
        with pytest.raises(DataError, match="metadata.jsonl: is UTF-16; save it as UTF-8"):
            from_folder(tmp_path, skip_bad=True)


# ---------------------------------------------------------------- folders that are not

def make_defects(folder):
    """The files that the bad lines below name."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:1500])
    (folder / "text.png").write_text("this is no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "sub").mkdir()
    for name in ("latin", "piped"):
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    (folder / "latin.txt").write_bytes("bé".encode("latin-1"))
    for name in ("pipe.png", "piped.txt"):
        os.mkfifo(folder / name)
    Image.fromarray(np.full((32, 32), 30000, np.uint16)).save(folder / "deep.png")
    Image.new("RGB", (8, 8)).save(folder.parent / "outside.png")
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")


DEFECTS = {
    "missing picture": (GOOD | {"file_name": "none.png"}, "none.png does not exist"),
    "text as picture": (GOOD | {"file_name": "text.png"}, "text.png cannot be read as a picture"),
    "empty picture": (GOOD | {"file_name": "empty.png"}, "empty.png cannot be read as a picture"),
    "truncated picture": (GOOD | {"file_name": "cut.png"}, "cut.png cannot be read as a picture"),
    "sixteen bits": (GOOD | {"file_name": "deep.png"},
                     "deep.png cannot be read as a picture .*more than 8 bits"),
    "directory": (GOOD | {"file_name": "sub"}, "sub cannot be read as a picture"),
    "the folder itself": (GOOD | {"file_name": "."}, "cannot be read as a picture"),
    "outside": (GOOD | {"file_name": "../outside.png"},
                "outside.png' is no file of this folder .*move the picture"),
    "link to outside": (GOOD | {"file_name": "link.png"},
                        "link.png' is no file of this folder .*move the picture"),
    "link to itself": (GOOD | {"file_name": "loop.png"}, "loop.png"),
    "absolute": (GOOD | {"file_name": "/elsewhere/picture.png"},
                 "/elsewhere/picture.png' is no file of this folder .*move the picture"),
    "null byte": (GOOD | {"file_name": "a\0.png"}, "is no file of this folder"),
    "half a surrogate pair": (GOOD | {"file_name": "\ud800.png"}, "ud800.png' holds half a char"),
    "half a surrogate pair in a caption": (GOOD | {"caption": "a \udc00"}, "holds half a char"),
    "missing file_name": ({"caption": "a boat"}, "'file_name' is missing or empty"),
    "numeric file_name": (GOOD | {"file_name": 1}, "'file_name' is missing or empty"),
    "the same again": (GOOD | {"negative": [], "file_name": "./good.png"},
                       "good.png has line 1 already; keep one"),
    "text beside a caption": (GOOD | {"text": "another", "file_name": "second.png"},
                              "'caption' and 'text' are different"),
    "missing caption": ({"file_name": "good.png"}, "'caption' is missing or empty"),
    "empty caption": (GOOD | {"caption": "  "}, "'caption' is missing or empty"),
    "caption is no string": (GOOD | {"caption": ["a boat"]}, "'caption' is no string"),
    "caption is NaN": (GOOD | {"caption": float("nan")}, "'caption' is no string .nan"),
    "text is an object": ({"file_name": "good.png", "text": {}}, "'text' is no string"),
    "unknown attribute": (GOOD | {"positive": ["nice"]}, "unknown attribute 'nice'"),
    "both sides": (GOOD | {"negative": ["tilted horizon"]},
                   "Composition/Horizon/Level: .* as positive and as negative"),
    "wrong side": (GOOD | {"positive": ["too dark"]}, "'too dark' is the other side's phrase"),
    "positive is a string": (GOOD | {"positive": "level horizon"},
                             "a list of strings, not 'level horizon'"),
    "positive is null": (GOOD | {"positive": None}, "a list of strings, not None"),
    "positive holds a number": (GOOD | {"positive": ["Level", 1]}, "a list of strings, not .*1"),
    "positive is an object": (GOOD | {"positive": {"Level": 1}}, "a list of strings, not {"),
    "negative is NaN": (GOOD | {"negative": float("nan")}, "a list of strings, not nan"),
    "misspelled": ({"file_name": "good.png", "caption": "a boat", "postive": []},
                   "'postive' looks like 'positive' misspelled"),
    "no JSON": (b"good.png, a boat", "not JSON"),
    "half a line": (json.dumps(GOOD).encode()[:-5], "not JSON"),
    "a list": (b'["good.png", "a boat"]', "not a JSON object"),
    "NaN alone": (b"NaN", "not a JSON object"),
    "invalid UTF-8": (b'{"file_name": "good.png", "caption": "\xff"}', "not JSON .byte 39 is not"),
    "thousands of brackets": (b"[" * 100_000, "not JSON"),
    "a key twice": (b'{"file_name": "good.png", "caption": "x", "positive": ["Level"], '
                    b'"positive": []}', "'positive' stands there twice; keep one"),
    "a number of thousands of digits": (b'{"file_name": "good.png", "caption": "x", "n": '
                                        + b"9" * 5000 + b"}", "a number of 5000 digits; write"),
    "a named pipe": (GOOD | {"file_name": "pipe.png"}, "pipe.png: a named pipe or a device, not"),
    "a caption that is not UTF-8": ({"file_name": "latin.png"}, "latin.txt: is not UTF-8 .*byte 1"),
    "a caption that is a pipe": ({"file_name": "piped.png"}, "piped.txt: a named pipe"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defect_names_file_line_and_fault(tmp_path, defect):
    row, message = DEFECTS[defect]
    folder = write(tmp_path / "data", GOOD, b"", row, GOOD)  # the empty line counts as a line
    make_defects(folder)
    with pytest.raises(DataError, match=f"(?s)metadata.jsonl, line 3: .*{message}"):
        from_folder(folder)


def test_skip_bad_leaves_out_every_defect_and_counts(tmp_path, capsys):
    last = GOOD | {"file_name": "second.png", "caption": "the last"}
    folder = write(tmp_path / "data", GOOD, *(row for row, _ in DEFECTS.values()), last)
    make_defects(folder)
    data = from_folder(folder, skip_bad=True)
    assert data.captions == ["a boat", "the last"] and data.skipped == len(DEFECTS)
    assert len(data.images) == len(data.annotations) == 2 and (data.images == [10, 20, 30]).all()
    assert f"skipped {len(DEFECTS)} bad lines, kept 2" in capsys.readouterr().out


def test_transparent_parts_are_white(tmp_path):
    folder = write(tmp_path, GOOD | {"file_name": "x.png"})
    sheet = np.zeros((32, 32, 4), np.uint8)                           # black, all of it hidden
    sheet[:, 16:] = 200, 0, 0, 255
    Image.fromarray(sheet).save(folder / "x.png")
    image = from_folder(folder).images[0]
    assert (image[:, :14] == 255).all() and (image[:, 18:] == (200, 0, 0)).all()


def test_damage_that_surprises_pillow_is_a_bad_line_too(tmp_path, monkeypatch):
    def struct_error(image):
        # seen of a JPEG with one wrong byte in its EXIF part
        raise TypeError("bad operand type for abs()")
    monkeypatch.setattr(ImageOps, "exif_transpose", struct_error)
    with pytest.raises(DataError, match="line 1: .*good.png cannot be read as a picture"):
        from_folder(write(tmp_path, GOOD))


def test_an_export_never_overwrites_a_folder_of_annotations(tmp_path):
    folder = write(tmp_path, GOOD)
    before = (folder / "metadata.jsonl").read_bytes()
    with pytest.raises(DataError, match="metadata.jsonl exists and may be work of yours"):
        main(["--out", str(folder), "--count", "1"])
    assert ((folder / "metadata.jsonl").read_bytes() == before
            and not (folder / "000000.png").exists())
    shell = subprocess.run([sys.executable, "-m", "nanocpo.toy.export", "--out", folder,
                            "--count", "1"], capture_output=True, text=True)
    # one line, no traceback
    assert (shell.returncode == 1
            and re.fullmatch("error: .*metadata.jsonl exists .*\n", shell.stderr))


def test_huge_picture_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)               # Pillow refuses at twice this
    with pytest.raises(DataError, match="line 1: .*good.png is too large .*decompression bomb.*; "
                                        "save a smaller copy"):
        from_folder(write(tmp_path, GOOD))


@pytest.mark.parametrize("content", [None, b"", b"\n \n"])
def test_folder_without_lines(tmp_path, content):
    if content is not None:
        (tmp_path / "metadata.jsonl").write_bytes(content)
    for skip_bad in (False, True):  # no fault to skip: it stays an error
        with pytest.raises(DataError, match="metadata.jsonl: " + (
                "not found" if content is None else "no usable picture")):
            from_folder(tmp_path, skip_bad=skip_bad)


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match="nowhere/metadata.jsonl: not found; .* in the browser: "
                                        "python -m nanocpo.folder.annotate .*nowhere "):
        from_folder(tmp_path / "nowhere")


def test_nothing_left_after_skipping(tmp_path):
    with pytest.raises(DataError, match=r"metadata.jsonl: no usable picture in it \(2 skipped\)"):
        from_folder(write(tmp_path, b"{", b"["), skip_bad=True)


# ---------------------------------------------------------------- the command

def test_command_writes_a_folder_that_reads_back(tmp_path, capsys):
    main(["--out", str(tmp_path / "x"), "--count", "12", "--regime", "mixed", "--seed", "9"])
    back, data = from_folder(tmp_path / "x"), from_painter(count=12, regime="mixed", seed=9)
    assert same_data(back, data) and "12 pictures" in capsys.readouterr().out
