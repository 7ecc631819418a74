"""Files that are whole or not there, digests, and the one rule of what may be used again.

Everything that a run makes is kept with a record of what it was made of: {name: value}, digests
of the data and models that went into it, and every setting that decides the result. `use_again`
compares that record with what is asked for now; nothing else in the project decides this.
"""
import errno
import hashlib
import io
import json
import os
import shutil
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch

from . import ranks
from .files import NotAFile, ordinary, parse, read_text


@contextmanager
def atomic_write(path):
    """Gives the name of a temporary file beside `path` to write, and renames it when the block
    ends well: never half a file. Whatever happens, the temporary file is gone afterwards. Raises
    OSError that says how much room there is where the disk is full."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name for each process: several may fill one cache
    temporary = path.with_name(f"{path.name}.tmp{ranks.number() or ''}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        kept = "; the file that was there stays" if path.exists() else ""
        free = shutil.disk_usage(path.parent).free / 2 ** 20
        raise OSError(f"{path}: there is no room for it ({free:,.1f} MiB are free, "
                      f"{error.strerror.lower()}){kept}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def alone(path):
    """Only one process at a time makes the file `path`: holds a lock beside it, which the system
    releases when its holder is dead. Raises ValueError if another one has it."""
    try:
        import fcntl
    except ImportError:                             # Windows has no such locks
        fcntl = None
    if fcntl is None or not ranks.first():          # the others of one run write nothing
        yield
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with open(lock, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{path} is being made by another run; wait for it, or choose another "
                             "--out or --name") from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def save_checkpoint(path, content):
    """torch.save, whole or not at all: a killed run never leaves half a checkpoint."""
    packed = io.BytesIO()               # torch does not say when a disk is full, a file does
    torch.save(content, packed)
    with atomic_write(path) as temporary:
        temporary.write_bytes(packed.getbuffer())


def save_json(path, content, sealed=False):
    """A JSON file, whole or not at all; sealed: with a checksum, so that a change by another hand
    is noticed. Raises ValueError on numbers that JSON does not have."""
    try:
        if sealed:
            content = content | {"checksum": _checksum(content)}
        text = json.dumps(content, indent=1, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: a number in it is not finite ({error})") from error
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path, sealed=False):
    """The dict in a JSON file that can be made again; {} where there is none, no such file, or one
    that was sealed and has changed since."""
    try:
        content = parse(read_text(path, "utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    whole = isinstance(content, dict) and (
        not sealed or content.pop("checksum", None) == _checksum(content))
    return content if whole else {}


def _checksum(content):
    """Of what JSON keeps of a dict, whose keys are texts there."""
    kept = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def unpacked(path):
    """What torch.save wrote, on the CPU; any exception if that is not what the file holds now."""
    if zipfile.is_zipfile(ordinary(path)):          # its checksums, which torch does not compare
        with zipfile.ZipFile(path) as file:
            if file.testzip():
                raise ValueError("its checksum is another")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_checkpoint(path):
    """Read a checkpoint's dict to the CPU. Raises ValueError or OSError that names the file and
    what to do."""
    try:
        content = unpacked(path)
        wrong = _fault(content)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such checkpoint; train_cpo.py makes one") from error
    except Exception as error:
        # not the file's fault; what is damaged can be an OSError too, that names no file
        if isinstance(error, NotAFile) or getattr(error, "filename", None):
            raise
        raise ValueError(f"{path}: not a checkpoint of nanocpo, or damaged "
                         f"({type(error).__name__}); delete it and train again") from error
    if wrong:
        raise ValueError(f"{path}: not a checkpoint of nanocpo, or damaged ({wrong}); delete it "
                         "and train again")
    return content


def _fault(content):
    """The one door for checkpoints: what is wrong with the content of a file, or ""."""
    kinds = {"config": dict, "criteria": dict, "ema": dict}
    if not isinstance(content, dict) or not kinds.keys() <= content.keys():
        return f"it has no {', '.join(kinds)}"
    if "made_of" in content:                # of a run, which can be resumed
        kinds |= {"made_of": dict, "step": int, "steps": int}
    for name, kind in kinds.items():
        if not isinstance(content.get(name), kind):
            return f"'{name}' is no {kind.__name__}"
    for name in kinds.keys() - {"ema"}:
        try:
            json.dumps(content[name])
        except (TypeError, ValueError, RecursionError):
            return f"'{name}' holds more than words and numbers"
    for name, weight in content["ema"].items():
        if not torch.is_tensor(weight) or not weight.isfinite().all():
            return f"the weight {name} is not finite"
    return ""


@contextmanager
def fitting(path):
    """Inside the with-block the parts of a checkpoint are put together; whatever a torn or invented
    one leads to becomes a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: its parts do not fit together ({type(error).__name__}: {error});"
                         " it is of another version") from error


def is_finished(content):
    """Whether a checkpoint's run came to its end, as far as it says."""
    return content.get("step", 0) >= content.get("steps", 0)


def stopped(path, content, resume):
    """Whether the run of a checkpoint stopped on its way; said, unless it is resumed."""
    if not is_finished(content) and not resume:
        print(f"{path} stopped at step {content['step']} of {content['steps']}; it is trained anew "
              "(--resume would go on)")
    return not is_finished(content)


def fingerprint(*modules):
    """A digest of all weights and their type: when it is the same, so is what the models make."""
    digest = hashlib.sha256()
    for module in modules:
        for name, p in module.state_dict().items():
            digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
            digest.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def code_digest(*files):
    """A digest of source files, in order of their names: what their code made is kept with it."""
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in sorted(files))).hexdigest()


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
    if not isinstance(was, dict):
        raise ValueError(f"{what} does not say what it was made of (it is of an older version, or "
                         f"damaged); {cure}")
    different = differences(was, now)
    wrong = [name for name in different if must is None or name in must]
    if wrong:
        raise ValueError(f"{what} belongs to another run ({', '.join(wrong)}); {cure}")
    if different:
        shown = ", ".join(f"{name} {was.get(name)}, not {now.get(name)}" for name in different)
        print(f"{what} is used as it is ({shown}); delete it to train another")
