"""The door for files that somebody else wrote: only ordinary ones are opened, and what they hold is
read in one meaning or refused in one line."""
import json
import re
import stat
from json.decoder import scanstring
from pathlib import Path


class NotAFile(OSError):
    """Something stands there that is no file."""


def ordinary(path):
    """The same path, if a program can read it to its end. Raises NotAFile where a folder or a
    named pipe or a device is there, of which the last two would be waited for, FileNotFoundError
    where nothing is."""
    path = Path(path)
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise NotAFile(f"{path}: a folder, not a file; name the file")
    if not stat.S_ISREG(mode):
        raise NotAFile(f"{path}: a named pipe or a device, not a file; put a file there")
    return path


def read_text(path, encoding="utf-8-sig"):
    """The text of a file. Raises OSError (of ordinary, too) or ValueError that names it."""
    try:
        return ordinary(path).read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); save it as "
                         "UTF-8") from error


def parse(text):
    """JSON text -> its content. Raises ValueError where it is no JSON, nested too deep to be read,
    says a key twice (each reader would take another one), or holds half a surrogate pair, which
    cannot be written down again."""
    try:
        content = json.loads(text, object_pairs_hook=_once, parse_int=_number)
        _whole(content)
        return content
    except RecursionError as error:
        raise ValueError("not JSON that can be read (nested too deep)") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from error


def _number(digits):
    """A whole number's digits -> int. Raises ValueError on more than Python reads."""
    if len(digits) > 4000:
        raise ValueError(f"a number of {len(digits)} digits; write it as a string")
    return int(digits)


def _once(pairs):
    """Pairs of key and value -> dict. Raises ValueError if a key is there twice."""
    seen = dict(pairs)
    if len(seen) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"'{next(key for key in keys if keys.count(key) > 1)}' stands there "
                         "twice; keep one of the two")
    return seen


def is_text(string):
    """Whether a string can be written as UTF-8: it holds no half of a surrogate pair alone, as
    Python has in place of what is not UTF-8 in a file's name."""
    return not re.search("[\ud800-\udfff]", string)


def _whole(content):
    """Raises ValueError at a string in JSON's content that is no text."""
    if isinstance(content, str) and not is_text(content):
        raise ValueError(f"{content[:40]!a} holds half a character (\\ud800 to \\udfff alone); "
                         "write it whole")
    for part in ([*content, *content.values()] if isinstance(content, dict)
                 else content if isinstance(content, list) else ()):
        _whole(part)


def members(text):
    """The text of a JSON object that parse takes -> {key: (value, its text as it stands)}: what a
    program does not understand it can write back byte for byte, numbers of any length included."""
    decoder, between, found = json.JSONDecoder(), re.compile(r"[ \t\n\r,:]*"), {}
    skip = lambda at: between.match(text, at).end()
    at = skip(text.index("{") + 1)
    while text[at] != "}":
        key, at = scanstring(text, at + 1)
        at = skip(at)
        value, end = decoder.raw_decode(text, at)
        found[key], at = (value, text[at:end]), skip(end)
    return found
