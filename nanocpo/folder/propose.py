"""Propose verdicts for pictures that nobody judged: the auxiliary's, for a person to confirm.

    python -m nanocpo.folder.propose --data paintings --checkpoint out_mine/auxiliary.pt
    python -m nanocpo.folder.propose --data paintings --weights sd15 --lora auxiliary.safetensors

It writes proposals.json into the folder, which the page of nanocpo/folder/annotate.py shows, and
says how often the auxiliary is right about pictures that are judged already and were held out from
training. How it judges: nanocpo/folder/expert.py.
"""
from .annotate import collect
from .proposals import propose, table, unjudged
from .reading import folder_criteria
from ..run.flags import parse_sampling
from ..run.settings import PROPOSING
from ..sd.world import StableDiffusionJudge
from ..toy.world import ToyJudge
from ..utils.cli import command


def main(argv=None):
    """Parse the flags, ask the auxiliary, write DATA/proposals.json; returns its content."""
    how, weights = parse_sampling(__doc__, argv, PROPOSING)
    criteria = folder_criteria(how.data, how.tree)
    rows = unjudged(collect(how.data, criteria), how.partly)
    judge = (StableDiffusionJudge(how, weights, criteria) if weights.weights
             else ToyJudge(how, criteria))
    content = propose(judge, how.data, rows, how.draws, how.rounds, how.known, how.seed, how.batch)
    print(table(content))
    print(f"{how.data}/proposals.json: {len(rows)} pictures; now python -m nanocpo.folder.annotate "
          f"{how.data} shows them")
    return content


if __name__ == "__main__":
    command(main)
