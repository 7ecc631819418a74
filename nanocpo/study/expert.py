"""How good an expert is the auxiliary? (`nanocpo.study expert`): its verdicts on the painter's
pictures, whose attributes are known, against the number of noise draws, of rounds, and of annotated
pictures that it is calibrated on."""
import json
from pathlib import Path

import numpy as np

from ..folder.expert import ROUNDS, calibrate, in_context
from ..toy.paintings import from_painter
from .plots import line_chart

# draws, of each leaf alone; of verdicts found in rounds; annotated pictures
DRAWS, IN_ROUNDS, CALIBRATED = (2, 4, 8, 16), (2, 4), (0, 16, 32, 64)


def agreement(scores, cuts, states):
    """Share of right verdicts of each leaf (leaves,)."""
    return ((scores > cuts) == (states > 0)).mean(0)


def title(draws, rounds, some):
    """Of a row of the table."""
    return f"{draws} draws, {rounds} round{'s' * (rounds > 1)}, calibrated on {some}"


def expert(lab):
    """The auxiliary's verdicts against the painter's, leaf by leaf: pictures with independent
    states that no model was trained on."""
    args, criteria = lab.args, lab.data.criteria
    count = max(CALIBRATED)
    known, asked = (from_painter(criteria, count, "mixed", judged=1.0, seed=10 ** 6 + 50 + i)
                    for i in range(2))
    asks = [(draws, 1) for draws in DRAWS] + [(draws, ROUNDS) for draws in IN_ROUNDS]
    tables = {ask: [in_context(lab.models["auxiliary"], data, *ask, args.seed)
                    for data in (known, asked)] for ask in asks}
    rows = {}
    for (draws, rounds), (before, scores) in tables.items():
        for some in CALIBRATED if (draws, rounds) == (DRAWS[-1], 1) else (0, count):
            cuts = calibrate(before[:some], known.annotations[:some])
            rows[title(draws, rounds, some)] = agreement(scores, cuts, asked.annotations).tolist()
    names = [leaf.name for leaf in criteria.leaves]
    lines = [["draws, rounds and annotated pictures", "mean", *names],
             ["---"] * (len(names) + 2),
             *([name, f"{100 * np.mean(shares):.0f}", *(f"{100 * x:.0f}" for x in shares)]
               for name, shares in rows.items())]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    about = (f"Share of right verdicts in %, {count} pictures; 50 is chance. Without calibration "
             "the cut is at 0. In the first round the prompts name the caption and one leaf, in "
             "further ones what was found of the others too. "
             f"`{args.command}`, base and auxiliary of seed {args.seed}.")
    folder = Path(args.results)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "expert.json").write_text(json.dumps({"leaves": names, "rows": rows}, indent=1),
                                        encoding="utf-8")
    (folder / "expert.md").write_text("\n\n".join(["# expert", text, "![chart](expert.png)", about])
                                      + "\n", encoding="utf-8")
    line_chart(folder / "expert.png",
               {f"{rounds} round{'s' * (rounds > 1)}, {kind}":
                (some, [np.mean(rows[title(d, rounds, cut)]) for d in some], [0] * len(some))
                for rounds, some in ((1, DRAWS), (ROUNDS, IN_ROUNDS))
                for kind, cut in (("cut at 0", 0), ("calibrated", count))},
               "The auxiliary's verdicts against the painter's", "noise draws", "share right")
    print(text)
