"""The data: captioned pictures with an annotation each, from the painter or from a folder of your own.

A folder holds pictures and a metadata.jsonl with one line a picture (the imagefolder convention):
    {"file_name": "0001.png", "caption": "a boat", "positive": ["level horizon"], "negative": ["too dark"]}
and, if the tree is not the embedded one, criteria.json. Export painter data to see one:
    python -m nanocpo.data --out paintings --count 1000
"""
import argparse
import hashlib
import json
import math
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageCms, ImageOps
from tqdm import tqdm

from .cli import command
from .criteria import Criteria, CriteriaError
from .painter import CAPTIONS, SIZE, paint

SPLITS = {"train": range(0, 8), "validation": range(8, 9), "test": range(9, 10)}         # of every ten pictures: 80 / 10 / 10


class DataError(ValueError):
    """A folder that cannot be used; the message names file, line and cure."""


@dataclass
class Batch:
    """images float (B, 3, H, W) in [-1, 1], captions: B strings, annotations int8 (B, leaves)."""
    images: torch.Tensor
    captions: list
    annotations: np.ndarray


@dataclass
class Paintings:
    """All pictures in memory: images uint8 (N, H, W, 3), captions: N strings, annotations int8 (N, leaves of criteria)."""
    criteria: Criteria
    images: np.ndarray
    captions: list
    annotations: np.ndarray
    skipped: int = 0

    def __len__(self):
        return len(self.images)

    def take(self, indices):
        """The pictures with these numbers, in this order, as Paintings."""
        indices = np.asarray(indices, int)
        return replace(self, images=self.images[indices], captions=[self.captions[i] for i in indices],
                       annotations=self.annotations[indices])

    def split(self, name):
        """The train, validation or test part: by position modulo ten, so it does not move when the data grows."""
        return self.take([i for i in range(len(self)) if i % 10 in SPLITS[name]])

    def digest(self):
        """A digest of all of it: when it is the same, so is what a model is shown."""
        digest = hashlib.sha256(repr((self.criteria.to_dict(), self.captions)).encode())
        for array in (*self.images, self.annotations):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def batch(self, indices):
        """Indices (B,) -> Batch."""
        part = self.take(indices)
        return Batch(to_tensor(part.images), part.captions, part.annotations)

    def export(self, folder):
        """Write the folder form: PNG files, metadata.jsonl and criteria.json. Raises DataError where there is one already."""
        folder = Path(folder)
        if (folder / "metadata.jsonl").exists():
            raise DataError(f"{folder / 'metadata.jsonl'} exists and may be work of yours; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "criteria.json").write_text(json.dumps(self.criteria.to_dict(), indent=1), encoding="utf-8")
        with open(folder / "metadata.jsonl", "w", encoding="utf-8") as file:
            for i, (image, caption, annotation) in enumerate(zip(self.images, self.captions, self.annotations)):
                Image.fromarray(image).save(folder / f"{i:06d}.png")
                prompt = self.criteria.prompt(caption, annotation)
                file.write(json.dumps({"file_name": f"{i:06d}.png", "caption": caption, "positive": prompt.positive,
                                       "negative": prompt.negative}) + "\n")


def to_tensor(images):
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W) in [-1, 1]."""
    return rearrange(torch.from_numpy(np.ascontiguousarray(images)).float() / 127.5 - 1, "n h w c -> n c h w")


def to_images(tensor):
    """float (N, 3, H, W) in [-1, 1] -> uint8 (N, H, W, 3)."""
    return rearrange(((tensor.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu(), "n c h w -> n h w c").numpy()


def from_painter(criteria=None, count=10000, regime="flawed", judged=0.9, seed=0):
    """Paint `count` pictures. regime "flawed": at least a third of the leaves of each is judged negative, so that no
    masterpiece exists to imitate; "mixed": independent states; "positive": all states positive (to compare with).
    judged: the share of leaves that the expert judged (each picture activates its own subset, 2601.04300; the share is ours)."""
    criteria = criteria or Criteria.load()
    names = [leaf.name for leaf in criteria.leaves]
    if regime not in ("flawed", "mixed", "positive"):
        raise ValueError(f"regime is flawed, mixed or positive, not '{regime}'")
    if count < 1 or not 0.5 <= judged <= 1:
        raise ValueError(f"count must be at least 1 (is {count}) and judged between 0.5 and 1 (is {judged})")
    images, captions, annotations = [], [], []
    for i in tqdm(range(count), desc="painting", leave=False, disable=count < 5000, mininterval=2):
        rng = np.random.default_rng((seed, i))
        captions.append(CAPTIONS[rng.integers(len(CAPTIONS))])
        while True:                                               # rejection: what remains is as random as it can be
            states = np.ones(len(names), np.int8) if regime == "positive" else rng.choice(np.array([-1, 1], np.int8), len(names))
            annotation = np.where(rng.random(len(names)) < judged, states, 0).astype(np.int8)
            if regime != "flawed" or (annotation < 0).sum() >= math.ceil(len(names) / 3):
                break
        annotations.append(annotation)
        images.append(paint(captions[-1], dict(zip(names, states)), (seed, i, 1)))
    return Paintings(criteria, np.stack(images), captions, np.stack(annotations))


def from_folder(folder, criteria=None, size=SIZE, skip_bad=False):
    """Read a folder (see above); every picture is cropped to a square in its middle and resized to `size`.

    Raises DataError at the first fault, with file, line and cure; skip_bad leaves such lines out and counts them in `skipped`."""
    criteria, rows, skipped = read_folder(folder, criteria, lambda path: np.asarray(open_picture(path, lambda _: (size, size))), skip_bad)
    images, captions, annotations = zip(*rows)
    return Paintings(criteria, np.stack(images), list(captions), np.stack(annotations), skipped)


def folder_criteria(folder):
    """The folder's own tree, criteria.json, or the embedded one."""
    own = Path(folder) / "criteria.json"
    return Criteria.load(own) if own.exists() else Criteria.load()


def read_folder(folder, criteria, picture, skip_bad):
    """The lines of a folder's metadata.jsonl -> (criteria, [(picture(path), caption, annotation)], number of bad lines)."""
    folder = Path(folder)
    listing = folder / "metadata.jsonl"
    if not listing.is_file():
        raise DataError(f"{listing}: not found; write one JSON line a picture: file_name, caption, positive, negative")
    criteria = criteria or folder_criteria(folder)
    rows, skipped = [], 0
    for number, line in enumerate(listing.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(_read_line(folder, line, criteria, picture))
        except (DataError, CriteriaError) as error:
            if not skip_bad:
                raise DataError(f"{listing}, line {number}: {error} (or pass --skip-bad to leave such lines out)") from error
            skipped += 1
    if not rows:
        raise DataError(f"{listing}: no usable picture in it ({skipped} skipped); add lines or mend the skipped ones")
    if skipped:
        print(f"{listing}: skipped {skipped} bad lines, kept {len(rows)}")
    return criteria, rows, skipped


def open_picture(path, shape):
    """A picture file -> RGB, resized and cut around its middle to shape((width, height)) of the upright original. Raises DataError."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":                             # Pillow would clip 16 and 32 bits to white, not scale them
                raise ValueError(f"mode {image.mode} has more than 8 bits a channel")
            profile = image.info.get("icc_profile")
            image = ImageOps.exif_transpose(image)
            if profile and image.mode in ("RGB", "RGBA", "CMYK", "L"):    # what a scanner calls red, into what a screen does
                with suppress(ImageCms.PyCMSError, OSError):              # a damaged profile is ignored, as by a browser
                    image = ImageCms.profileToProfile(image, ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB"),
                                                      outputMode="RGBA" if image.mode == "RGBA" else "RGB")
            if image.has_transparency_data:                       # white behind it, not whatever colour is hidden there
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return ImageOps.fit(image.convert("RGB"), shape(image.size), Image.Resampling.LANCZOS)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; correct file_name or add the picture") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path} is too large ({error}); save a smaller copy") from error
    except Exception as error:                                    # a damaged file can raise nearly anything in Pillow
        raise DataError(f"{path} cannot be read as a picture ({error}); save it again as an RGB PNG or JPEG") from error


def _read_line(folder, line, criteria, picture):
    """One line of metadata.jsonl -> picture, caption, annotation."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error}); each line is one object") from error
    if not isinstance(row, dict):
        raise DataError("not a JSON object; write {\"file_name\": ..., \"caption\": ..., \"positive\": [...], \"negative\": [...]}")
    for key in ("file_name", "caption"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise DataError(f"'{key}' is missing or empty; give it as a string")
    for key in {"positive", "negative"} - set(row):                       # either may be left out, but not misspelled
        for other in get_close_matches(key, row, cutoff=0.8):
            raise DataError(f"'{other}' looks like '{key}' misspelled; mend it, or add \"{key}\": [] if it is not")
    annotation = criteria.annotation(row.get("positive", []), row.get("negative", []))
    path = folder / row["file_name"]
    try:
        path.resolve().relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:          # outside; a null byte, half a surrogate pair, a loop of links
        raise DataError(f"{row['file_name']!r} is no file of this folder ({error}); correct it or move the picture there") from error
    return picture(path), row["caption"].strip(), annotation


def main(argv=None):
    """Export painter data to a folder."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--count", type=int, default=1000, help="number of pictures")
    parser.add_argument("--regime", choices=["flawed", "mixed", "positive"], default="flawed", help="how states are drawn")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    from_painter(count=args.count, regime=args.regime, seed=args.seed).export(args.out)
    print(f"{args.out}: {args.count} pictures, metadata.jsonl, criteria.json")


if __name__ == "__main__":
    command(main)
