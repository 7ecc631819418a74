"""A folder of your own pictures as data.

It holds pictures and a metadata.jsonl with one line a picture (the imagefolder convention):
    {"file_name": "0001.png", "caption": "a boat", "positive": ["level horizon"],
     "negative": ["too dark"]}
and, if the tree is not the embedded one, criteria.json. To see one:
    python -m nanocpo.toy.export --out paintings --count 1000
"""
import json
from contextlib import suppress
from difflib import get_close_matches
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from ..criteria import Criteria, CriteriaError
from ..data import Paintings


class DataError(ValueError):
    """A folder that cannot be used; the message names file, line and cure."""


def from_folder(folder, criteria=None, size=32, skip_bad=False):
    """Read a folder -> Paintings; every picture is cropped to a square in its middle and resized
    to `size`.

    Raises DataError at the first fault, with file, line and cure; skip_bad leaves such lines out
    and counts them in `skipped`."""
    def picture(path):
        return np.asarray(open_picture(path, lambda _: (size, size)))
    criteria, rows, skipped = read_folder(folder, criteria, picture, skip_bad)
    images, captions, annotations = zip(*rows)
    return Paintings(criteria, np.stack(images), list(captions), np.stack(annotations), skipped)


def folder_criteria(folder):
    """The folder's own tree, criteria.json, or the embedded one."""
    own = Path(folder) / "criteria.json"
    return Criteria.load(own) if own.exists() else Criteria.load()


def read_folder(folder, criteria, picture, skip_bad):
    """The lines of a folder's metadata.jsonl -> (criteria, [(picture(path), caption, annotation)],
    number of bad lines)."""
    folder = Path(folder)
    listing = folder / "metadata.jsonl"
    if not listing.is_file():
        raise DataError(f"{listing}: not found; write one JSON line a picture: file_name, caption, "
                        "positive, negative")
    criteria = criteria or folder_criteria(folder)
    rows, skipped = [], 0
    for number, line in enumerate(listing.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(_read_line(folder, line, criteria, picture))
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
        with Image.open(path) as image:
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
    except Image.DecompressionBombError as error:
        raise DataError(f"{path} is too large ({error}); save a smaller copy") from error
    except Exception as error:              # a damaged file can raise nearly anything in Pillow
        raise DataError(f"{path} cannot be read as a picture ({error}); save it again as an RGB "
                        "PNG or JPEG") from error


def _read_line(folder, line, criteria, picture):
    """One line of metadata.jsonl -> picture, caption, annotation."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error}); each line is one object") from error
    if not isinstance(row, dict):
        raise DataError("not a JSON object; write {\"file_name\": ..., \"caption\": ..., "
                        "\"positive\": [...], \"negative\": [...]}")
    for key in ("file_name", "caption"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise DataError(f"'{key}' is missing or empty; give it as a string")
    for key in {"positive", "negative"} - set(row):     # either may be left out, not misspelled
        for other in get_close_matches(key, row, cutoff=0.8):
            raise DataError(f"'{other}' looks like '{key}' misspelled; mend it, or add \"{key}\": "
                            "[] if it is not")
    annotation = criteria.annotation(row.get("positive", []), row.get("negative", []))
    path = folder / row["file_name"]
    try:
        path.resolve().relative_to(folder.resolve())
    # outside; a null byte, half a surrogate pair, a loop of links
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{row['file_name']!r} is no file of this folder ({error}); correct it or "
                        "move the picture there") from error
    return picture(path), row["caption"].strip(), annotation
