"""Painter data as a folder, to see what a folder of your own looks like (nanocpo/folder).

    python -m nanocpo.toy.export --out paintings --count 1000
"""
import argparse
import json
from pathlib import Path

from PIL import Image

from ..folder.reading import DataError
from ..utils.cli import SEED, Parser, above, command
from .paintings import from_painter


def export(data, folder):
    """Write Paintings in the folder form: PNG files, metadata.jsonl and criteria.json. Raises
    DataError where there is one already."""
    folder = Path(folder)
    if (folder / "metadata.jsonl").exists():
        raise DataError(f"{folder / 'metadata.jsonl'} exists and may be work of yours; choose "
                        "another folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "criteria.json").write_text(json.dumps(data.criteria.to_dict(), indent=1),
                                          encoding="utf-8")
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as file:
        rows = zip(data.images, data.captions, data.annotations)
        for i, (image, caption, annotation) in enumerate(rows):
            Image.fromarray(image).save(folder / f"{i:06d}.png")
            prompt = data.criteria.prompt(caption, annotation)
            line = {"file_name": f"{i:06d}.png", "caption": caption,
                    "positive": prompt.positive, "negative": prompt.negative}
            file.write(json.dumps(line) + "\n")


def main(argv=None):
    """Export painter data to a folder."""
    parser = Parser(description=main.__doc__,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--count", type=above(0), default=1000, help="number of pictures")
    parser.add_argument("--regime", choices=["flawed", "mixed", "positive"], default="flawed",
                        help="how states are drawn")
    parser.add_argument("--seed", type=SEED, default=0)
    args = parser.parse_args(argv)
    export(from_painter(count=args.count, regime=args.regime, seed=args.seed), args.out)
    print(f"{args.out}: {args.count} pictures, metadata.jsonl, criteria.json")


if __name__ == "__main__":
    command(main)
