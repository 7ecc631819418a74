"""python -m nanocpo.study NAME (see studies.py)."""
from ..utils.cli import command
from .studies import main

if __name__ == "__main__":                  # not in the processes of --jobs, which import this file
    command(main)
