"""Files that are whole or not there, digests, and the one rule of what may be used again.

Everything that a run makes is kept with a record of what it was made of: {name: value}, digests
of the data and models that went into it, and every setting that decides the result. `use_again`
compares that record with what is asked for now; nothing else in the project decides this.
"""
import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

import torch

from . import ranks


@contextmanager
def atomic_write(path):
    """Gives the name of a temporary file beside `path` to write, and renames it when the block
    ends well: never half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name for each process: several may fill one cache
    temporary = path.with_name(f"{path.name}.tmp{ranks.number() or ''}")
    yield temporary
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(path, content):
    """torch.save, whole or not at all: a killed run never leaves half a checkpoint."""
    with atomic_write(path) as temporary:
        torch.save(content, temporary)


def save_json(path, content):
    """A JSON file, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def load_checkpoint(path):
    """Read a checkpoint's dict to the CPU. Raises ValueError or OSError that names the file and
    what to do."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["config"], content["criteria"], content["ema"]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such checkpoint; train_cpo.py makes one") from error
    except OSError:                         # not the file's fault
        raise
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint of nanocpo, or damaged "
                         f"({type(error).__name__}); delete it and train again") from error
    return content


def is_finished(content):
    """Whether a checkpoint's run came to its end."""
    return content["step"] >= content["steps"]


def fingerprint(*modules):
    """A digest of all weights and their type: when it is the same, so is what the models make."""
    digest = hashlib.sha256()
    for module in modules:
        for name, p in module.state_dict().items():
            digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
            digest.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def differences(was, now):
    """The names that two records {name: value} do not agree about."""
    was, now = (json.loads(json.dumps(record)) for record in (was, now))  # tuples are lists there
    missing = object()
    return sorted(k for k in was | now if was.get(k, missing) != now.get(k, missing))


CURE = "choose another --out, or delete the file"


def use_again(what, was, now, must=None, cure=CURE):
    """The one rule of what may be used again: base, auxiliary, a run to resume, an adapter, the
    result of a study. (Rows of the report are only kept to save a minute: where `differences`
    finds any, they are made again.)

    what: the file; was: the record in it, None if it has none; now: the record of what is asked
    for. Refuses, with a ValueError that says what differs and the cure, whatever would silently
    be another thing. must: the names that have to agree (None: all of them). That others differ
    is said and accepted: a base that was trained longer on the same data is what its owner left
    there."""
    if was is None:
        raise ValueError(f"{what} does not say what it was made of (it is of an older version); "
                         f"{cure}")
    different = differences(was, now)
    wrong = [name for name in different if must is None or name in must]
    if wrong:
        raise ValueError(f"{what} belongs to another run ({', '.join(wrong)}); {cure}")
    if different:
        shown = ", ".join(f"{name} {was.get(name)}, not {now.get(name)}" for name in different)
        print(f"{what} is used as it is ({shown}); delete it to train another")
