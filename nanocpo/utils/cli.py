"""What all commands share: types of flags, and how errors are told."""
import argparse
import math
import os
import re
import sys

import torch

from . import ranks
from .files import is_text


def number(kind=float, above=-math.inf, to=math.inf):
    """An argparse type: a number that is finite, larger than `above` and at most `to`."""
    def parse(text):
        value = kind(text)
        if not above < value <= to or value in (math.inf, -math.inf):
            bounds = [f"above {above}"] * (above > -math.inf) + [f"at most {to}"] * (to < math.inf)
            raise argparse.ArgumentTypeError(
                f"must be {' and '.join(bounds) or 'a finite number'}, not {text}")
        return value
    parse.__name__ = kind.__name__                  # argparse's word for what is no number at all
    return parse


def above(low, kind=int):
    """An argparse type: a finite number that must be larger than `low`."""
    return number(kind, low)


SEED = number(int, -1, 2 ** 63 - 1)     # what torch's generators take


def not_empty(text):
    """An argparse type: text that says something."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def encodable(text):
    """An argparse type: any text, even none, that a prompt can hold."""
    if not is_text(text):
        raise argparse.ArgumentTypeError("is not UTF-8")
    return text


def phrase(text):
    """An argparse type: text that a prompt can hold and that says something."""
    return not_empty(encodable(text))


def printable(text, most=2000):
    """Text that may hold what a file or a flag says, as one line for a terminal: line breaks and
    control characters are escaped, and of more than `most` characters the middle is left out."""
    if len(text) > most:
        text = text[:most - 700] + " ... " + text[-700:]        # the cure stands at its end
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class Parser(argparse.ArgumentParser):
    """Tells a wrong flag in one line, without the list of all flags before it. A flag without a
    type of its own takes text that is not empty."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.register("type", None, not_empty)

    def error(self, message):
        self.exit(2, f"error: {printable(message)} (--help shows the flags)\n")


def command(main, several=False):
    """Run a script's main(). An error that its user can mend (ValueError or one that this package
    made of it), or that a file system, a diverging training or a full GPU raises, is told in one
    line and ends with status 1; `python -X dev` shows where it arose, as all other errors do.

    several: whether it may be one of several processes (torchrun)."""
    if hasattr(sys.stdout, "reconfigure"):      # what a terminal cannot show is escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if several:
            ranks.start()
        elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("only train_sft.py and train_cpo.py can be started with torchrun")
        main()
        ranks.stop()
    except KeyboardInterrupt:
        if sys.flags.dev_mode:
            raise
        print("stopped" + ("; --resume goes on from the last checkpoint" if several else ""),
              file=sys.stderr)
        sys.exit(130)                       # what shells expect after Ctrl-C
    except torch.cuda.OutOfMemoryError as error:
        if sys.flags.dev_mode:
            raise
        sys.exit("error: the GPU's memory is full: a smaller --batch needs less in training, "
                 "--checkpointing too (with --weights); with --weights also --dtype bfloat16 and a "
                 f"smaller --resolution ({str(error).split('. ')[0]})")
    except MemoryError:
        if sys.flags.dev_mode:
            raise
        sys.exit("error: the memory is full: a smaller --batch, --count or --samples needs less")
    except (ValueError, OSError, FloatingPointError) as error:
        # not JSON's or Unicode's ValueError
        own = type(error) is ValueError or type(error).__module__.split(".")[0] == "nanocpo"
        if sys.flags.dev_mode or not (own or isinstance(error, (OSError, FloatingPointError))):
            raise
        where = f" in process {ranks.number()}" if ranks.count() > 1 else ""
        sys.exit(f"error{where}: {printable(str(error))}")
    except RuntimeError as error:
        asked = re.search(r"you tried to allocate (\d+) bytes", str(error))
        if asked and not sys.flags.dev_mode:
            sys.exit(f"error: the memory is full: {int(asked[1]) / 2 ** 30:,.1f} GiB were asked "
                     "for at once; a smaller --batch, --count or --samples needs less")
        if sys.flags.dev_mode or not ranks.is_of_another(error):
            raise
        sys.exit("error: another process of this run has ended; which one stands below, in "
                 "torchrun's lines (root cause). --resume goes on from the last checkpoint")
