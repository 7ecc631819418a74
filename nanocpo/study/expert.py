"""How good an expert is the auxiliary? (`nanocpo.study expert`): its verdicts on the painter's
pictures, whose attributes are known, against the number of noise draws and of annotated pictures
that it is calibrated on."""
import json
from pathlib import Path

import numpy as np

from ..folder.expert import calibrate, log_ratios
from ..toy.paintings import from_painter
from .plots import line_chart

DRAWS, CALIBRATED = (2, 4, 8, 16, 32), (0, 16, 48, 96)


def agreement(scores, cuts, states):
    """Share of right verdicts of each leaf (leaves,)."""
    return ((scores > cuts) == (states > 0)).mean(0)


def expert(lab):
    """The auxiliary's verdicts against the painter's, leaf by leaf: pictures with independent
    states that no model was trained on."""
    args, criteria = lab.args, lab.data.criteria
    count = max(CALIBRATED)
    known, asked = (from_painter(criteria, count, "mixed", judged=1.0, seed=10 ** 6 + 50 + i)
                    for i in range(2))
    tables = {draws: [log_ratios(lab.models["auxiliary"], data, draws, args.seed)
                      for data in (known, asked)] for draws in DRAWS}
    rows = {}
    for draws, (before, scores) in tables.items():
        for some in CALIBRATED if draws == DRAWS[-2] else (0, count):
            cuts = calibrate(before[:some], known.annotations[:some])
            rows[f"{draws} draws, calibrated on {some}"] = agreement(
                scores, cuts, asked.annotations).tolist()
    names = [leaf.name for leaf in criteria.leaves]
    lines = [["draws and annotated pictures", "mean", *names],
             ["---"] * (len(names) + 2),
             *([name, f"{100 * np.mean(shares):.0f}", *(f"{100 * x:.0f}" for x in shares)]
               for name, shares in rows.items())]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    about = (f"Share of right verdicts in %, {count} pictures; 50 is chance. Without calibration "
             "the cut is at 0. Prompts: the caption and one leaf. `python -m nanocpo.study "
             f"expert`, base and auxiliary of seed {args.seed}.")
    folder = Path(args.results)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "expert.json").write_text(json.dumps({"leaves": names, "rows": rows}, indent=1),
                                        encoding="utf-8")
    (folder / "expert.md").write_text("\n\n".join(["# expert", text, "![chart](expert.png)", about])
                                      + "\n", encoding="utf-8")
    line_chart(folder / "expert.png",
               {kind: (DRAWS, [np.mean(rows[f"{d} draws, calibrated on {some}"]) for d in DRAWS],
                       [0] * len(DRAWS)) for kind, some in (("cut at 0", 0),
                                                            ("calibrated", count))},
               "The auxiliary's verdicts against the painter's", "noise draws", "share right")
    print(text)
