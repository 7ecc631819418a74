"""Annotate a folder of pictures in the browser: the page needs no server and no network.

    python -m nanocpo.folder.annotate paintings
        # writes paintings/annotate.html; open it, judge, save metadata.jsonl into paintings

The page shows each picture beside the criteria tree (criteria.json in the folder, --tree, or the
embedded one). It begins with what metadata.jsonl says already; what was judged since is kept by the
browser. Run it again after adding pictures, or after propose.py: what the auxiliary proposes
is shown with a question mark, and counts once you confirmed it.
"""
import argparse
import csv
import hashlib
import io
import json
from pathlib import Path
from urllib.parse import quote

from ..criteria import CriteriaError
from ..utils.checkpoint import atomic_write
from ..utils.cli import Parser, command, printable
from ..utils.files import is_text, read_text
from . import proposals
from .reading import DataError, caption_of, folder_criteria, lines, read_line, said

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"}
TEMPLATE = Path(__file__).with_name("annotate.html")


def collect(folder, criteria):
    """The folder's pictures as the page's rows, with what metadata.jsonl says about them. Raises
    DataError with line and cure."""
    folder = Path(folder)
    files = offered(folder)
    known, listing = {}, folder / "metadata.jsonl"
    for number, line in lines(listing) if listing.exists() else ():
        try:
            path, caption, states, other = read_line(folder, line, criteria)
            file = path.relative_to(folder).as_posix()
            if file in known:
                raise DataError(f"{file} has a line already; keep one of the two")
            known[file] = caption, states, other
        except (DataError, CriteriaError) as error:
            raise DataError(f"{listing}, line {number}: {error} (the page would lose the line)"
                            ) from error
    table = csv_captions(folder / "metadata.csv")
    lost = sorted(set(known) - set(files))
    if lost:
        raise DataError(f"{listing}: {lost[0]} is no picture of {folder} that every browser shows "
                        f"({', '.join(sorted(PICTURES))}); add it, save it as such a one, or "
                        "remove the line: the page would lose it")
    rows = []
    for file in files:
        nothing = (table.get(file) or caption_of({}, folder / file), [0] * len(criteria), {})
        caption, states, other = known.get(file, nothing)
        row = {"file_name": file, "caption": caption,
               "states": {leaf.name: int(s) for leaf, s in zip(criteria.leaves, states)},
               "other": {key: json.loads(raw) for key, raw in other.items()}}
        # tells the browser whether what it kept began from this very line; a leaf that is new in
        # the tree changes no line
        judged = {name: state for name, state in row["states"].items() if state}
        row["was"] = hashlib.sha256(
            json.dumps(row | {"states": judged}, sort_keys=True).encode()).hexdigest()[:16]
        # what is not ours goes through the page as it stands: JavaScript rounds long numbers, and
        # knows no NaN
        rows.append(row | {"other": [f"{json.dumps(key)}: {raw}" for key, raw in other.items()],
                           "src": quote(file)})
    return rows


def offered(folder):
    """The names of the folder's pictures that the page can show and training can read, sorted;
    says which are left out. Raises DataError if there is none."""
    files, left_out, inside = [], {}, folder.resolve()
    for path in folder.rglob("*"):
        name, kind = path.relative_to(folder).as_posix(), path.suffix.lower()
        if kind in PICTURES and path.is_file():
            why = (("their names are not UTF-8", "rename them") if not is_text(name) else
                   None if path.resolve().is_relative_to(inside) else
                   ("they are links out of the folder", "copy the pictures into it"))
        elif kind in (".tif", ".tiff", ".avif", ".heic", ".jfif", ".jp2") and path.is_file():
            why = "not every browser shows such files", "save them as PNG"
        else:
            continue
        left_out.setdefault(why, []).append(name) if why else files.append(name)
    for (why, cure), names in left_out.items():
        some = ", ".join(map(printable, sorted(names)[:3])) + (" ..." if len(names) > 3 else "")
        print(f"left out, since {why}: {some}; {cure}")
    if not files:
        raise DataError(f"{folder}: no picture in it ({', '.join(sorted(PICTURES))})")
    return sorted(files)


def csv_captions(path):
    """A metadata.csv with the columns file_name and text or caption, as other programs have it ->
    {file_name: caption}; {} if there is none. Raises DataError that names the file."""
    if not path.exists():
        return {}
    captions, table = {}, csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        for row in table:
            captions[row.get("file_name")] = said(row)
    except (DataError, csv.Error) as error:
        raise DataError(f"{path}, near line {table.line_num}: {error}") from error
    return captions


def page(folder, criteria):
    """The HTML of the page. The data stand in a JSON block where no text can end the
    script element."""
    proposed, told = proposals.read(folder, criteria)
    data = {"folder": str(Path(folder).resolve()), "tree": criteria.to_dict(), "told": told,
            "rows": [row | {"proposed": proposed.get(row["file_name"], {})}
                     for row in collect(folder, criteria)]}
    safe = json.dumps(data).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return TEMPLATE.read_text(encoding="utf-8").replace("DATA", safe, 1)


def main(argv=None):
    """Write FOLDER/annotate.html; returns its path."""
    parser = Parser(description=main.__doc__,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder",
                        help="folder with pictures, and perhaps metadata.jsonl and criteria.json")
    parser.add_argument("--tree",
                        help="criteria as JSON; default: criteria.json in the folder, else the "
                        "embedded tree")
    args = parser.parse_args(argv)
    folder = Path(args.folder)
    text = page(folder, folder_criteria(folder, args.tree))
    with atomic_write(folder / "annotate.html") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"open {folder / 'annotate.html'} in a browser; "
          f"put the metadata.jsonl that it saves into {folder}")
    return folder / "annotate.html"


if __name__ == "__main__":
    command(main)
