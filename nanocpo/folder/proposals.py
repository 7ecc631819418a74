"""Verdicts that the auxiliary proposes for pictures that nobody judged: FOLDER/proposals.json.
nanocpo/folder/propose.py writes it, the page of annotate.py shows it; training never reads it.

A teacher proposes here what it will be taught: confirm what you see, not what it says.
"""
from pathlib import Path
from typing import Protocol

import numpy as np

from ..criteria import Criteria
from ..data import Paintings
from ..model import Model
from ..utils.checkpoint import save_json
from ..utils.files import parse, read_text
from .expert import agreement, calibrate, held_out, in_context, told
from .reading import DataError

FILE = "proposals.json"


class Judge(Protocol):
    """An auxiliary that is asked about a folder: nanocpo/toy/world.py and nanocpo/sd/world.py have
    one each."""
    model: Model
    criteria: Criteria

    def pictures(self, rows=None) -> Paintings:
        """The folder's judged pictures, or those of rows [(file name, caption, annotation)]."""


def unjudged(rows, partly=False):
    """Of the page's rows (annotate.collect) those of pictures without any verdict; partly: those
    that miss a verdict on some leaf. Raises DataError where there is none."""
    asked = [row for row in rows
             if (any, all)[not partly](not state for state in row["states"].values())]
    if not asked:
        raise DataError("every picture has a verdict" + (
            " on every leaf; there is nothing to propose" if partly else
            " already; --partly asks about the leaves that have none"))
    return asked


def propose(judge, folder, rows, draws, rounds, known, seed, size):
    """Ask about the pictures of rows (see unjudged), write FOLDER/proposals.json; returns its
    content.

    known: so many judged pictures at most, of those that training holds out, say where to cut each
    leaf's score, and how often the auxiliary is right. draws and the rest: see expert.in_context.
    """
    folder, leaves, how = Path(folder), judge.criteria.leaves, (draws, rounds, seed, size)
    asked = judge.pictures([(row["file_name"], row["caption"],
                             np.array(list(row["states"].values()), np.int8)) for row in rows])
    judged = np.empty((2, 0, len(leaves)))
    if known and (folder / "metadata.jsonl").is_file():       # training reads no other list
        held = held_out(judge.pictures(), known)
        judged = in_context(judge.model, held, *how), held.annotations
    beyond = in_context(judge.model, asked, *how, known=asked.annotations) - calibrate(*judged)
    # how sure: the share of these pictures whose score is nearer to the cut
    far = np.abs(beyond)
    sure = (far[None] < far[:, None]).mean(1)
    sides = np.where(asked.annotations == 0, np.where(beyond > 0, 1, -1), 0)
    content = {"draws": draws, "rounds": rounds,
               "agreement": agreement(*judged, judge.criteria), "rows": []}
    for row, states, shares in zip(rows, sides, sure.round(2).tolist()):
        prompt = judge.criteria.prompt("", states)
        content["rows"].append({
            "file_name": row["file_name"], "positive": prompt.positive, "negative": prompt.negative,
            "sure": {leaf.name: share for leaf, state, share in zip(leaves, states, shares)
                     if state}})
    save_json(folder / FILE, content)
    return content


def table(content):
    """How often the auxiliary is right, leaf by leaf, as text."""
    lines = [f"{name:24} {100 * share:3.0f} % right" for name, share in
             content["agreement"]["leaves"].items() if share is not None]
    return "\n".join([*lines, told(content["agreement"])])


def read(folder, criteria):
    """FOLDER/proposals.json -> ({file name: {leaf name: [side, how sure]}}, what to tell of them);
    ({}, "") where there is none. Raises DataError with the cure."""
    path, found = Path(folder) / FILE, {}
    if not path.exists():
        return found, ""
    try:
        content = parse(read_text(path))
        for row in content["rows"]:
            states = criteria.annotation(row["positive"], row["negative"])
            here = {leaf.name: [int(state), row["sure"][leaf.name]]
                    for leaf, state in zip(criteria.leaves, states) if state}
            if not all(0 <= sure <= 1 for _, sure in here.values()):
                raise ValueError(f"{row['file_name']}: how sure is a share from 0 to 1")
            found[row["file_name"]] = here
        return found, told(content["agreement"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{path}: these are no proposals for this tree ({error}); delete the file, "
                        "or have propose.py write it again") from error
