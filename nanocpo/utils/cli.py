"""What all commands share: two types of flags, and how errors are told."""
import argparse
import sys

import torch


def above(low, kind=int):
    """An argparse type: a number that must be larger than `low`."""
    def number(text):
        if not kind(text) > low:
            raise argparse.ArgumentTypeError(f"must be above {low}, not {text}")
        return kind(text)
    number.__name__ = kind.__name__                 # argparse's word for what is no number at all
    return number


def pick_device(name):
    """The argparse type of --device: "auto" takes cuda, then mps, then cpu."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available()
                else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:               # torch raises either
        raise argparse.ArgumentTypeError(
            f"torch cannot use {name} ({str(error).splitlines()[0]})") from error


def command(main):
    """Run a script's main(). An error that its user can mend (ValueError or one that this package
    made of it), or that a file system, a diverging training or a full GPU raises, is told in one
    line and ends with status 1; `python -X dev` shows where it arose, as all other errors do."""
    try:
        main()
    except torch.cuda.OutOfMemoryError as error:
        if sys.flags.dev_mode:
            raise
        sys.exit("error: the GPU's memory is full: a smaller --batch needs less in training, "
                 "--checkpointing too (with --weights); with --weights also --dtype bfloat16 and a "
                 f"smaller --resolution ({str(error).split('. ')[0]})")
    except (ValueError, OSError, FloatingPointError) as error:
        # not JSON's or Unicode's ValueError
        own = type(error) is ValueError or type(error).__module__.split(".")[0] == "nanocpo"
        if sys.flags.dev_mode or not (own or isinstance(error, (OSError, FloatingPointError))):
            raise
        sys.exit(f"error: {error}")
