"""From the dataclasses of settings.py to command-line flags, and back."""
import argparse
import sys
from contextlib import contextmanager
from dataclasses import fields

from ..utils import ranks
from ..utils.cli import Parser
from .settings import QUICK, SAMPLING, STABLE_DIFFUSION, TOY, Weights


class _HelpAll(argparse.Action):
    """--help-all: --help with the flags that are rarely needed."""

    def __init__(self, option_strings, dest, **rest):
        super().__init__(option_strings, dest, nargs=0, help="every flag, also those that are "
                         "rarely needed")

    def __call__(self, parser, *rest):
        for action in parser._actions:
            action.help = getattr(action, "full_help", action.help)
        parser.print_help()
        parser.exit()


def add_flags(parser, part):
    """A flag for every field of `part`, an instance of a dataclass of settings.py, whose values
    are the defaults."""
    for f in fields(part):
        default, names = getattr(part, f.name), ["--" + f.name.replace("_", "-")]
        if f.name == "caption":
            names.append("--prompt")
        if f.type is bool:
            action = parser.add_argument(*names, action="store_true", help=f.metadata["help"])
        else:
            told = "" if default in (None, ()) else " (default: %(default)s)"
            action = parser.add_argument(*names, default=default, help=f.metadata["help"] + told,
                                         **f.metadata["argument"])
        action.full_help = action.help
        if f.metadata["more"]:
            action.help = argparse.SUPPRESS


def _parser(description, argv, toy, stable_diffusion):
    """(parser, argv) with the flags of the parts `toy`, or with --weights of `stable_diffusion`;
    only then the flags of Stable Diffusion are shown."""
    argv = sys.argv[1:] if argv is None else argv
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--weights")
    weights = first.parse_known_args(argv)[0].weights
    parser = Parser(description=description.split("\n")[0], allow_abbrev=False,
                    usage="%(prog)s [flags]")
    parser.add_argument("--help-all", action=_HelpAll)
    for part in stable_diffusion if weights else toy:
        add_flags(parser, part)
    group = parser.add_argument_group("Stable Diffusion (docs/stable_diffusion.md)")
    add_flags(group, Weights())
    for action in () if weights else group._group_actions:
        if action.dest != "weights":
            action.help = argparse.SUPPRESS
    return parser, argv


@contextmanager
def _told(parser):
    """A ValueError inside, values that do not go together, is told by the parser."""
    try:
        yield
    except ValueError as error:
        parser.error(str(error))


def parse_training(description, argv, names, check=None, extend=None):
    """The flags of a training script -> Settings. names: the parts that it has flags for. Ends
    the program on wrong flags.

    extend(parser): adds flags of one's own, check(Namespace): raises ValueError where they do not
    go together; with extend, (Settings, Namespace) is returned."""
    pick = lambda settings: [getattr(settings, name) for name in names]
    argv = sys.argv[1:] if argv is None else argv
    toy = QUICK if "--quick" in argv else TOY
    parser, argv = _parser(description, argv, pick(toy), pick(STABLE_DIFFUSION))
    parser.add_argument("--quick", action="store_true",
                        help="three minutes instead of ten, and weaker numbers: other defaults of "
                        "--base-steps, --sft-steps, --steps, --samples and --out")
    if extend:
        extend(parser)
    args = parser.parse_args(argv)
    settings = (STABLE_DIFFUSION if args.weights else toy).changed(**vars(args))
    with _told(parser):
        settings.check()
        if args.quick and args.weights:
            raise ValueError("--quick is the toy's; with --weights choose --sft-steps and --steps")
    settings = _for_processes(parser, settings)
    if check:
        with _told(parser):
            check(args)
    return (settings, args) if extend else settings


def _for_processes(parser, settings):
    """The same settings with a step that the processes of torchrun can share; says what a step
    is then."""
    common, several = settings.common, ranks.count()
    if several == 1:
        return settings
    with _told(parser):
        batch, accumulate = ranks.divided(common.batch, common.accumulate)
    print(f"{several} processes; a step is {batch * accumulate} pictures, {accumulate} batches of "
          f"{batch}: the run of --batch {batch} --accumulate {accumulate} in one process")
    return settings.changed(batch=batch, accumulate=accumulate)


def parse_sampling(description, argv, kinds=SAMPLING):
    """The flags of sample.py, or with kinds=PROPOSING of folder/propose.py -> (Sampling or
    Proposing, Weights). Ends the program on wrong flags."""
    toy, stable_diffusion = kinds.values()
    parser, argv = _parser(description, argv, [toy], [stable_diffusion])
    args = vars(parser.parse_args(argv))
    asked, weights = (type(part)(**{f.name: args[f.name] for f in fields(part)})
                      for part in (toy, Weights()))
    with _told(parser):
        weights.check()
        asked.check()
    return asked, weights
