"""What all commands share: two types of flags, and how errors are told."""
import argparse
import os
import sys

import torch

from . import ranks


def above(low, kind=int):
    """An argparse type: a number that must be larger than `low`."""
    def number(text):
        if not kind(text) > low:
            raise argparse.ArgumentTypeError(f"must be above {low}, not {text}")
        return kind(text)
    number.__name__ = kind.__name__                 # argparse's word for what is no number at all
    return number


class Parser(argparse.ArgumentParser):
    """Tells a wrong flag in one line, without the list of all flags before it."""

    def error(self, message):
        self.exit(2, f"error: {message} (--help shows the flags)\n")


def command(main, several=False):
    """Run a script's main(). An error that its user can mend (ValueError or one that this package
    made of it), or that a file system, a diverging training or a full GPU raises, is told in one
    line and ends with status 1; `python -X dev` shows where it arose, as all other errors do.

    several: whether it may be one of several processes (torchrun)."""
    try:
        if several:
            ranks.start()
        elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("only train_sft.py and train_cpo.py can be started with torchrun")
        main()
        ranks.stop()
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
        where = f" in process {ranks.number()}" if ranks.count() > 1 else ""
        sys.exit(f"error{where}: {error}")
    except RuntimeError as error:
        if sys.flags.dev_mode or not ranks.is_of_another(error):
            raise
        sys.exit("error: another process of this run has ended; which one stands below, in "
                 "torchrun's lines (root cause). --resume goes on from the last checkpoint")
