"""What all commands share: how their flags are read, which device they take, how they end."""
import argparse
import sys

import torch


def above(low, kind=int):
    """An argparse type: a number that must be larger than `low`."""
    def number(text):
        if not kind(text) > low:
            raise argparse.ArgumentTypeError(f"must be above {low}, not {text}")
        return kind(text)
    number.__name__ = kind.__name__                                       # argparse's word for what is no number at all
    return number


def pick_device(name="auto"):
    """"auto" takes cuda, then mps, then cpu. Raises ValueError if torch cannot use a device that is named."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:               # torch raises either
        raise ValueError(f"--device {name}: torch cannot use it ({str(error).splitlines()[0]})") from error


def command(main):
    """Run a script's main(). What its user can mend is told in one line and ends with status 1; `python -X dev` shows where it arose."""
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        if sys.flags.dev_mode:
            raise
        sys.exit(f"error: {error}")
