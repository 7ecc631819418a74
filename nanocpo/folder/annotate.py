"""Annotate a folder of pictures in the browser: the page needs no server and no network.

    python -m nanocpo.folder.annotate paintings
        # writes paintings/annotate.html; open it, judge, save metadata.jsonl into paintings

The page shows each picture beside the criteria tree (criteria.json in the folder, --tree, or the
embedded one). It begins with what metadata.jsonl says already; what was judged since is kept by the
browser. Run it again after adding pictures, or after nanocpo.propose: what the auxiliary proposes
is shown with a question mark, and counts once you confirmed it.
"""
import argparse
import csv
import hashlib
import json
from pathlib import Path
from urllib.parse import quote

from ..utils.cli import Parser, command
from . import proposals
from .reading import DataError, caption_of, find_picture, folder_criteria, lines

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"}
TEMPLATE = Path(__file__).with_name("annotate.html")


def collect(folder, criteria):
    """The folder's pictures as the page's rows, with what metadata.jsonl says about them. Raises
    DataError with line and cure."""
    folder = Path(folder)
    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = sorted(path.relative_to(folder).as_posix() for path in paths
                   if path.suffix.lower() in PICTURES)
    hidden = [path.name for path in paths
              if path.suffix.lower() in (".tif", ".tiff", ".avif", ".heic", ".jfif", ".jp2")]
    if hidden:
        some = ", ".join(sorted(hidden)[:3]) + (" ..." if len(hidden) > 3 else "")
        print(f"left out, since not every browser shows such files: {some}; save them as PNG")
    if not files:
        raise DataError(f"{folder}: no picture in it ({', '.join(sorted(PICTURES))})")
    known, listing = {}, folder / "metadata.jsonl"
    for number, line in lines(listing) if listing.exists() else ():
        try:
            row = json.loads(line)
            states = criteria.annotation(row.pop("positive", []), row.pop("negative", []))
            path = find_picture(folder, row.pop("file_name"))
            file = path.relative_to(folder).as_posix()
            if file in known:
                raise ValueError(f"{file} has a line already")
            caption = caption_of(row, path)
            known[file] = caption, states, {k: v for k, v in row.items()
                                            if k not in ("caption", "text")}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{listing}, line {number}: {error}; mend the line, or the page "
                            "would lose it") from error
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
               "other": other}
        # tells the browser whether what it kept began from this very line; a leaf that is new in
        # the tree changes no line
        judged = {name: state for name, state in row["states"].items() if state}
        row["was"] = hashlib.sha256(
            json.dumps(row | {"states": judged}, sort_keys=True).encode()).hexdigest()[:16]
        rows.append(row | {"src": quote(file)})
    return rows


def csv_captions(path):
    """A metadata.csv with the columns file_name and text or caption, as other programs have it ->
    {file_name: caption}; {} if there is none."""
    if not path.is_file():
        return {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        return {(row.get("file_name") or ""): caption_of(row, path) for row in csv.DictReader(file)}


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
    (folder / "annotate.html").write_text(text, encoding="utf-8")
    print(f"open {folder / 'annotate.html'} in a browser; "
          f"put the metadata.jsonl that it saves into {folder}")
    return folder / "annotate.html"


if __name__ == "__main__":
    command(main)
