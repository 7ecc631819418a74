"""A folder of your own pictures as data.

It holds pictures and a metadata.jsonl with one line a picture (the imagefolder convention):
    {"file_name": "0001.png", "caption": "a boat", "positive": ["level horizon"],
     "negative": ["too dark"]}
and, if the tree is not the embedded one, criteria.json. To see one:
    python -m nanocpo.toy.export --out paintings --count 1000
"""
import os
import unicodedata
from contextlib import suppress
from difflib import get_close_matches
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from ..criteria import Criteria, CriteriaError
from ..data import Paintings
from ..utils.files import NotAFile, members, ordinary, parse, read_text


class DataError(ValueError):
    """A folder that cannot be used; the message names file, line and cure."""


def from_folder(folder, criteria=None, size=32, skip_bad=False, rows=None):
    """Read a folder -> Paintings; every picture is cropped to a square in its middle and resized
    to `size`. rows: see read_folder.

    Raises DataError at the first fault, with file, line and cure; skip_bad leaves such lines out
    and counts them in `skipped`."""
    def picture(path):
        return np.asarray(open_picture(path, lambda _: (size, size)))
    criteria, rows, skipped = read_folder(folder, criteria, picture, skip_bad, rows)
    images, captions, annotations = zip(*rows)
    return Paintings(criteria, np.stack(images), list(captions), np.stack(annotations), skipped)


def folder_criteria(folder, tree=None):
    """The tree in the file `tree`, else the folder's own, criteria.json, else the embedded one."""
    own = Path(folder) / "criteria.json"
    return Criteria.load(tree) if tree else Criteria.load(own) if own.exists() else Criteria.load()


def lines(listing):
    """metadata.jsonl -> [(number, bytes of the line)]. Raises DataError if it is not UTF-8."""
    content = ordinary(listing).read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{listing}: is UTF-16; save it as UTF-8")
    content = content.removeprefix(b"\xef\xbb\xbf")
    return [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]


def find_picture(folder, name):
    """The file that a line names: as it is written, else with / for \\ (Windows) or in the other
    normal form of Unicode (macOS)."""
    for spelled in (name, name.replace("\\", "/")):
        for form in (spelled, *(unicodedata.normalize(form, spelled) for form in ("NFC", "NFD"))):
            if (folder / form).is_file():
                return folder / form
    return folder / name


def said(row):
    """The caption in a line {key: value}: under `caption`, or `text` as other programs write it; ""
    if it has none. Raises DataError if two keys differ, or one holds no text."""
    for key in ("caption", "text"):
        if not isinstance(row.get(key), (str, type(None))):
            raise DataError(f"'{key}' is no string ({row[key]!r:.60}); write it in quotes")
    found = {row[key].strip() for key in ("caption", "text") if (row.get(key) or "").strip()}
    if len(found) > 1:
        raise DataError("'caption' and 'text' are different; leave one of them out")
    return found.pop() if found else ""


def caption_of(row, path):
    """The caption that a line says, or else the .txt beside the picture `path`; "" if there is
    none. Raises DataError where one cannot be read."""
    beside, caption = path.parent / f"{path.stem}.txt", said(row)
    if caption or not beside.exists():
        return caption
    try:
        return read_text(beside).strip()
    except (OSError, ValueError) as error:
        raise DataError(f"the caption beside the picture: {error}") from error


def read_folder(folder, criteria, picture, skip_bad, rows=None):
    """The lines of a folder's metadata.jsonl -> (criteria, [(picture(path), caption, annotation)],
    number of bad lines). rows: [(file name, caption, annotation)] instead of the lines."""
    folder = Path(folder)
    if rows is not None:
        return criteria, [(picture(folder / name), *told) for name, *told in rows], 0
    listing = folder / "metadata.jsonl"
    if not listing.exists():
        raise DataError(f"{listing}: not found; write one JSON line a picture: file_name, caption, "
                        f"positive, negative; or judge them in the browser: python -m nanocpo."
                        f"folder.annotate {folder} (it takes captions from .txt files and "
                        "metadata.csv)")
    criteria = criteria or folder_criteria(folder)
    rows, skipped, seen = [], 0, {}
    for number, line in lines(listing):
        try:
            path, caption, annotation, _ = read_line(folder, line, criteria)
            if not caption:
                raise DataError("'caption' is missing or empty; give it as a string, or as "
                                f"{path.stem}.txt beside the picture")
            if path.resolve() in seen:
                raise DataError(f"{path.name} has line {seen[path.resolve()]} already; keep one of "
                                "the two")
            rows.append((picture(path), caption, annotation))
            seen[path.resolve()] = number
        except (DataError, CriteriaError) as error:
            if not skip_bad:
                raise DataError(f"{listing}, line {number}: {error} (or pass --skip-bad to leave "
                                "such lines out)") from error
            skipped += 1
    if not rows:
        raise DataError(f"{listing}: no usable picture in it ({skipped} skipped); add lines or "
                        "mend the skipped ones")
    if skipped:
        print(f"{listing}: skipped {skipped} bad lines, kept {len(rows)}")
    return criteria, rows, skipped


def open_picture(path, shape):
    """A picture file -> RGB, resized and cut around its middle to shape((width, height)) of the
    upright original. Raises DataError."""
    try:
        with Image.open(ordinary(path)) as image:
            if image.mode[0] in "IF":       # Pillow would clip 16 and 32 bits to white
                raise ValueError(f"mode {image.mode} has more than 8 bits a channel")
            profile = image.info.get("icc_profile")
            image = ImageOps.exif_transpose(image)
            if profile and image.mode in ("RGB", "RGBA", "CMYK", "L"):
                # what a scanner calls red, into what a screen does; a damaged profile is ignored,
                # as by a browser
                with suppress(ImageCms.PyCMSError, OSError):
                    image = ImageCms.profileToProfile(
                        image, ImageCms.ImageCmsProfile(BytesIO(profile)),
                        ImageCms.createProfile("sRGB"),
                        outputMode="RGBA" if image.mode == "RGBA" else "RGB")
            if image.has_transparency_data:  # white behind it, not whatever colour is hidden there
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"),
                                              image.convert("RGBA"))
            return ImageOps.fit(image.convert("RGB"), shape(image.size), Image.Resampling.LANCZOS)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; correct file_name or add the picture") from error
    except (NotAFile, PermissionError) as error:      # not the picture's fault
        raise DataError(f"{path} cannot be read as a picture ({error.strerror or error}); name "
                        "another, or change what may be read") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path} is too large ({error}); save a smaller copy") from error
    except Exception as error:              # a damaged file can raise nearly anything in Pillow
        raise DataError(f"{path} cannot be read as a picture ({error}); save it again as an RGB "
                        "PNG or JPEG") from error


def read_line(folder, line, criteria):
    """One line of metadata.jsonl (bytes) -> path of its picture in the folder, caption ("" if there
    is none), annotation, {key: JSON text} of the keys that are not ours. Raises DataError,
    CriteriaError."""
    try:
        text = line.decode()
        row = parse(text)
    except UnicodeDecodeError as error:
        raise DataError(f"not JSON (byte {error.start + 1} is not UTF-8); save it as UTF-8"
                        ) from error
    except ValueError as error:
        what = "; each line is one object" if str(error).startswith("not JSON") else ""
        raise DataError(f"{error}{what}") from error
    if not isinstance(row, dict):
        raise DataError("not a JSON object; write {\"file_name\": ..., \"caption\": ..., "
                        "\"positive\": [...], \"negative\": [...]}")
    if not isinstance(row.get("file_name"), str) or not row["file_name"].strip():
        raise DataError("'file_name' is missing or empty; give it as a string")
    for key in {"positive", "negative"} - set(row):     # either may be left out, not misspelled
        for other in get_close_matches(key, row, cutoff=0.8):
            raise DataError(f"'{other}' looks like '{key}' misspelled; mend it, or add \"{key}\": "
                            "[] if it is not")
    annotation = criteria.annotation(row.get("positive", []), row.get("negative", []))
    path = find_picture(folder, row["file_name"])
    try:
        path.resolve().relative_to(folder.resolve())
    # outside; a null byte, a loop of links
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{row['file_name']!r} is no file of this folder ({error}); correct it or "
                        "move the picture there") from error
    ours = ("file_name", "caption", "text", "positive", "negative")
    others = {key: raw for key, (_, raw) in members(text).items() if key not in ours}
    return Path(os.path.normpath(path)), caption_of(row, path), annotation, others
