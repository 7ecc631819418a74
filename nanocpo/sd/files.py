"""Reading the files of public weights: tensors, shards and settings. Nothing in a file is
ever executed."""
import pickle
import re
import zipfile
from pathlib import Path

import torch

from ..utils import ranks
from ..utils.files import ordinary, parse, read_text


class WeightsError(ValueError):
    """Weights that cannot be used; the message names the file, what is wrong and what to do."""


def say(text):
    """Print what was decided where files leave a choice, once if several processes run."""
    if ranks.first():
        print(text)


def safetensors():
    """The package's torch module. Raises WeightsError that says how to install it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise WeightsError("reading .safetensors needs the package of this name: "
                           "pip install safetensors") from error
    return safetensors.torch


def read_json(path):
    """A JSON file's object. Raises WeightsError that names it."""
    try:
        content = parse(read_text(path, "utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
        return content
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path}: cannot be read ({error}); is the download complete?") from error


def read_tensors(path):
    """One .safetensors, .bin or .ckpt file -> {name: tensor}."""
    path = Path(path)
    try:
        ordinary(path)
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: not found") from error
    with open(path, "rb") as file:          # what it is, whatever it is called
        head = file.read(9)
    safe = head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size
    if path.suffix == ".safetensors" and head[:2] in (b"PK", b"\x80\x02"):
        raise WeightsError(f"{path}: a checkpoint of torch under a wrong name; rename it to "
                           f"{path.with_suffix('.ckpt').name}")
    if safe or path.suffix == ".safetensors":
        package = safetensors()
        try:
            return package.load_file(path)
        except Exception as error:          # SafetensorError is not a public name everywhere
            raise WeightsError(f"{path}: not a safetensors file, or cut off ({error}); "
                               "download it again") from error

    class Harmless:
        """Stands for what old checkpoints hold beside their tensors and nobody needs: a callback's
        name, numbers of numpy."""
        def __init__(self, *content):
            pass
        __setstate__ = __init__
    known = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
             "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")
    try:
        with torch.serialization.safe_globals([(Harmless, name) for name in known]):
            content = torch.load(path, map_location="cpu", weights_only=True,
                                 mmap=zipfile.is_zipfile(path))
        content = content.get("state_dict", content)
        return {name: value for name, value in content.items()
                if torch.is_tensor(value) and isinstance(name, str)}
    except pickle.UnpicklingError as error:
        # torch's own advice is to load it unsafely
        other = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = (f"it holds {other[1]} beside its tensors, which is refused" if other
                else "it is no checkpoint, or holds more than tensors")
        raise WeightsError(f"{path}: {what}; nothing in it was run. Look for the same model as "
                           ".safetensors") from error
    except Exception as error:
        raise WeightsError(f"{path}: not a checkpoint, or cut off ({error}); "
                           "download it again") from error


def read_part(folder, variant=None):
    """The tensors of one part (unet/, vae/, text_encoder/): files of the variant before others,
    .safetensors before .bin, shards before a whole file."""
    folder, files = Path(folder), (("diffusion_pytorch_model", ".safetensors"),
                                   ("model", ".safetensors"), ("diffusion_pytorch_model", ".bin"),
                                   ("pytorch_model", ".bin"))
    for mark in ([f".{variant}", ""] if variant else [""]):
        for stem, suffix in files:
            index = folder / f"{stem}{suffix}.index{mark}.json"
            whole = folder / f"{stem}{mark}{suffix}"
            if not (index.is_file() or whole.is_file()):
                continue
            if variant and not mark:
                say(f"{folder}: no file of the variant {variant}; {whole.name} is read")
            return read_shards(index) if index.is_file() else read_tensors(whole)
    found = sorted(file.name for file in folder.glob("*")
                   if file.suffix in (".safetensors", ".bin"))
    kinds = sorted({name.split(".")[1].split("-")[0] for name in found if name.count(".") > 1})
    raise WeightsError(
        f"{folder}: no weights of a name that diffusers gives"
        + (f"; there is {', '.join(found)}" if found else "; is the download complete?")
        + (f": --variant {' or '.join(kinds)} reads it" if kinds else ""))


def read_shards(index):
    """An index file {"weight_map": {name: file}} -> the tensors of all its shards."""
    places, state = read_json(index).get("weight_map"), {}
    if (not isinstance(places, dict)
            or any(Path(str(file)).name != file for file in places.values())):
        raise WeightsError(f"{index}: not an index of shards, or a shard lies in another folder; "
                           "download it again")
    for file in sorted(set(places.values())):
        shard = read_tensors(index.parent / file)
        lost = [name for name, place in places.items() if place == file and name not in shard]
        if lost:
            raise WeightsError(f"{index}: {lost[0]} should be in {file} and is not; index and "
                               "shards are of different downloads")
        state |= shard
    return state
