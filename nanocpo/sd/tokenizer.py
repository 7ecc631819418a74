"""CLIP's byte-pair tokenizer, from the files that come with the weights: tokenizer.json, or
merges.txt (and vocab.json).

Text -> NFC, lower case -> words -> bytes -> merged pairs -> [BOS] ids [EOS] padding. It agrees with
the tokenizers library but for code points that the running Python's Unicode tables do not know yet.
"""
import hashlib
import re
import unicodedata
from functools import lru_cache
from pathlib import Path

from ..utils.files import read_text
from .files import WeightsError, read_json

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def byte_letters():
    """{byte: printable letter}: GPT-2's table. Printable bytes stand for themselves, the others for
    letters from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def words(text):
    """Split at spaces; contractions, runs of letters, single numbers and runs of anything else are
    words of their own."""
    # Python's re knows no classes of characters as Unicode's L and N: one letter for each class,
    # but those of contractions stay
    # U+001C to U+001F are spaces to Python, and not to Unicode
    kind = (lambda c: c if c in "'strevmld" else " " if c.isspace() and not "\x1c" <= c <= "\x1f"
            else {"L": "L", "N": "N"}.get(unicodedata.category(c)[0], "."))
    found = re.finditer(r"'(?:s|t|re|ve|m|ll|d)|[Lstrevmld]+|N|['.]+", "".join(map(kind, text)))
    return [text[word.start():word.end()] for word in found]


def plain(text):
    """Text as it is looked up: NFC, and lower case letter by letter, for of a whole string Python
    gives a sigma at the end of a word another form."""
    return "".join(c.lower() for c in unicodedata.normalize("NFC", text))


def finder(tokens):
    """A pattern that splits a text at {token: only as a whole word}, the longest first."""
    each = (rf"(?<!\w){re.escape(token)}(?!\w)" if whole else re.escape(token)
            for token, whole in sorted(tokens.items(), key=lambda item: -len(item[0])))
    return re.compile(f"({'|'.join(each) or '(?!)'})")


class Tokenizer:
    """`tokenizer(text)` -> 77 ids; `tokenizer.encode(text)` -> the ids of the text alone."""

    def __init__(self, merges, vocabulary=None, pad=EOS, length=77, added=()):
        """merges: pairs in the order of their rank. vocabulary {token: id}; None derives it: bytes,
        bytes that end a word, merges. added: learned words, as tokenizer.json lists them:
        {"content", "id", and perhaps "normalized": found in the text as it is looked up (else as
        it is written), "single_word"}."""
        self.letters = byte_letters()
        self.derived = vocabulary is None
        if vocabulary is None:
            tokens = [*self.letters.values(), *(c + "</w>" for c in self.letters.values()),
                      *map("".join, merges), BOS, EOS]
            vocabulary = {token: i for i, token in enumerate(tokens)}
        vocabulary = vocabulary | {token["content"]: token["id"] for token in added}
        missing = [token for token in (BOS, EOS, pad) if token not in vocabulary]
        if missing:
            raise WeightsError(f"the tokenizer's vocabulary has no {', '.join(missing)}: "
                               "it is not CLIP's")
        self.vocabulary, self.length, self.pad = vocabulary, length, vocabulary[pad]
        self.rank = {tuple(pair): i for i, pair in enumerate(merges)}
        added = [token for token in added if token["content"] not in (BOS, EOS, pad)]
        whole = lambda token: bool(token.get("single_word"))
        written = [token for token in added if not token.get("normalized", True)]
        looked_up = [token for token in added if token.get("normalized", True)]
        # with pad "!" every "!" is a pad
        self.special = finder(dict.fromkeys((BOS, EOS, pad), False)
                              | {token["content"]: whole(token) for token in written})
        self.learned = finder({plain(token["content"]): whole(token) for token in looked_up})
        self.ids = ({token: vocabulary[token] for token in (BOS, EOS, pad)}
                    | {token["content"]: token["id"] for token in written}
                    | {plain(token["content"]): token["id"] for token in looked_up})
        self.word_ids = lru_cache(maxsize=50000)(self._word_ids)

    @classmethod
    def load(cls, path, pad=None):
        """From a folder (tokenizer/ of a diffusers folder), a tokenizer.json or a merges.txt.
        pad None: as the settings there say."""
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        files = [folder / "merges.txt", folder / "tokenizer.json"] if path.is_dir() else [path]
        path = next((file for file in files if file.exists()), None)
        if path is None:
            raise WeightsError(f"no tokenizer in {' or '.join(map(str, files))}; give --tokenizer, "
                               "a folder with merges.txt or tokenizer.json (any repository of "
                               "Stable Diffusion has one)")
        vocabulary, listed, added = None, [], {}
        try:
            if path.suffix == ".json":
                content = read_json(path)
                vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
                listed = content.get("added_tokens", [])
                merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
            else:
                lines = read_text(path, "utf-8").split("\n")
                # a merge may begin with # too
                lines = lines[1:] if lines[0].startswith("#version") else lines
                merges = [line.split(" ") for line in lines if line.strip()]
                if (folder / "vocab.json").is_file():
                    vocabulary = read_json(folder / "vocab.json")
            beside = {file: read_json(folder / file) if (folder / file).is_file() else {}
                      for file in ("tokenizer_config.json", "added_tokens.json")}
            config, old = beside.values()
            listed += [token | {"id": int(number)}
                       for number, token in config.get("added_tokens_decoder", {}).items()]
            listed += [{"content": token, "id": number} for token, number in old.items()]
            for token in listed:
                added.setdefault(token["content"], token)
                if added[token["content"]]["id"] != token["id"]:
                    raise ValueError(f"'{token['content']}' is token {token['id']} in one file of "
                                     f"the folder and {added[token['content']]['id']} in another")
            if config.get("do_lower_case") is False:
                raise ValueError("do_lower_case = False is not supported")
            if any(len(pair) != 2 for pair in merges):
                raise ValueError("a merge is two tokens with a space between")
            if not merges:
                raise ValueError("there is no merge in it")
            numbers = [*(vocabulary or {}).values(), *(token["id"] for token in added.values())]
            wrong = [number for number in numbers if type(number) is not int or number < 0]
            if wrong:
                raise ValueError(f"the id {wrong[0]!r} is no whole number from 0 on")
            made = {"".join(pair) for pair in merges} | added.keys()
            lost = [token for token in vocabulary or () if token not in made
                    and len(token.removesuffix("</w>")) > 1 and not re.match("<.*>$", token)]
            if lost:
                raise ValueError(f"{len(lost)} tokens of its vocabulary are made by no merge, for "
                                 f"example '{lost[0]}'; a file of it is cut off")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{path}: cannot be read as a tokenizer "
                               f"({type(error).__name__}: {error})") from error
        for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the first has the say
            if pad is None and (folder / name).is_file():
                pad = read_json(folder / name).get("pad_token")
                pad = pad.get("content") if isinstance(pad, dict) else pad
                if not isinstance(pad, (str, type(None))):
                    raise WeightsError(f"{folder / name}: the pad_token {pad!r} is no string")
        return cls(merges, vocabulary, pad or EOS, added=added.values())

    def digest(self):
        """A hash of it: when it is the same, so are the ids of any text."""
        said = self.vocabulary, list(self.rank), self.ids, self.pad, self.length
        return hashlib.sha256(repr(said).encode()).hexdigest()

    def _word_ids(self, word):
        """One word -> its ids: the pair of lowest rank is merged, wherever it stands, until no
        known pair is left."""
        parts = [self.letters[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            pair = min(zip(parts, parts[1:]), key=lambda pair: self.rank.get(pair, len(self.rank)))
            if pair not in self.rank:
                break
            merged, i = [], 0
            while i < len(parts):
                both = tuple(parts[i:i + 2]) == pair
                merged.append("".join(pair) if both else parts[i])
                i += 1 + both
            parts = merged
        # unknown: only in cut-down vocabularies
        return [self.vocabulary.get(part, self.vocabulary[EOS]) for part in parts]

    def encode(self, text):
        """Text -> ids, without BOS, EOS and padding, and of any length."""
        ids = []
        for i, part in enumerate(self.special.split(text)):
            if i % 2:
                ids.append(self.ids[part])
                continue
            for j, piece in enumerate(self.learned.split(plain(part))):
                if j % 2:
                    ids.append(self.ids[piece])
                    continue
                for word in words(piece):
                    ids += self.word_ids(word)
        return ids

    def __call__(self, text):
        """Text -> exactly `length` ids; what does not fit is cut off."""
        ids = [self.vocabulary[BOS], *self.encode(text)[:self.length - 2], self.vocabulary[EOS]]
        return ids + [self.pad] * (self.length - len(ids))
