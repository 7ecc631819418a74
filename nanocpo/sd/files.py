"""Reading the files of public weights: tensors, shards and settings. Nothing in a file is
ever executed."""
import json
import pickle
import zipfile
from pathlib import Path

import torch


class WeightsError(ValueError):
    """Weights that cannot be used; the message names the file, what is wrong and what to do."""


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
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
        return content
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path}: cannot be read ({error}); is the download complete?") from error


def read_tensors(path):
    """One .safetensors, .bin or .ckpt file -> {name: tensor}."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: not found")
    if path.suffix == ".safetensors":
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
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path}: holds more than tensors, or is no checkpoint; nothing in it "
                           "was run. Look for the same model as .safetensors "
                           f"({str(error).splitlines()[0]})") from error
    except Exception as error:
        raise WeightsError(f"{path}: not a checkpoint, or cut off ({error}); "
                           "download it again") from error
    return {name: value for name, value in content.items() if torch.is_tensor(value)}


def read_part(folder, variant=None):
    """The tensors of one part (unet/, vae/, text_encoder/): .safetensors before .bin, shards before
    a whole file."""
    mark, stem = f".{variant}" if variant else "", "diffusion_pytorch_model"
    if not any(folder.glob(f"{stem}*")):
        stem = "model" if any(folder.glob("model*.safetensors*")) else "pytorch_model"
    for suffix in (".safetensors", ".bin"):
        index, whole = folder / f"{stem}{suffix}.index{mark}.json", folder / f"{stem}{mark}{suffix}"
        if index.is_file():
            return read_shards(index)
        if whole.is_file():
            return read_tensors(whole)
    found = sorted(file.name for file in folder.glob("*")
                   if file.suffix in (".safetensors", ".bin"))
    raise WeightsError(
        f"{folder}: no {stem}{mark}.safetensors or .bin"
        + (f"; there is {', '.join(found)}: name the part between the dots as --variant, for "
           "example fp16" if found else "; is the download complete?"))


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
