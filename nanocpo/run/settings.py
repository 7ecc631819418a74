"""Every setting, once: its default, what it does, and why it has that value.

A dataclass for each part of the work; the flags of the scripts are made from them (flags.py), and
so is the record that says whether a checkpoint may be used again (utils/checkpoint.py). TOY and
STABLE_DIFFUSION are the two instances. All values are ours: the paper's are not known to us.
Those of Stable Diffusion are not tuned on real weights.
"""
import re
from argparse import ArgumentTypeError
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from ..diffusion import PREDICTIONS
from ..folder.expert import ROUNDS
from ..losses import RULES
from ..utils.cli import SEED, above, encodable, not_empty, number, phrase
from ..utils.device import pick_device

METHODS = ("cpo", "esd", "dpo", "sft")
TEACHES = ("cpo", "esd")            # those in which the auxiliary teaches
NO_FILE_NAME = r"base|auxiliary(_\w+)?|rows|.*_kohya"   # taken by stage 1, the report, adapters


def setting(default, help, *, decides=True, more=False, **argument):
    """A field. decides: whether it is part of what a result was made of; more: only shown by
    --help-all; argument: the rest of argparse's add_argument."""
    return field(default=default, metadata=dict(help=help, decides=decides, more=more,
                                                argument=argument))


@dataclass(frozen=True)
class Common:
    """What all stages share. Data and models have digests, so their names decide nothing."""
    out: str = setting("out", "folder for everything that is written", decides=False)
    data: str = setting("flawed", "flawed or mixed (painted on the fly, see nanocpo/toy/"
                        "paintings.py), or a folder with metadata.jsonl", decides=False)
    tree: str | None = setting(None, "criteria as JSON; default: criteria.json in the folder, else "
                               "nanocpo/toy/paintings.json", decides=False)
    count: int = setting(10000, "number of pictures to paint; 80 %% of them train", type=above(0))
    skip_bad: bool = setting(False, "leave bad lines of a folder out instead of stopping",
                             decides=False)
    seed: int = setting(0, "of weights, batches and samples", type=SEED)
    device: str = setting("auto", "auto, cpu, cuda, mps", decides=False, type=pick_device)
    bf16: bool = setting(False, "run the models in bfloat16; losses and weights stay float32")
    # 64 is hardly better, step by step: the number of steps is what limits (docs/log.md)
    batch: int = setting(32, "pictures in a batch", type=above(0))
    accumulate: int = setting(1, "batches whose gradients make one step", more=True,
                              type=above(0))
    resume: bool = setting(False, "continue a run that stopped, from its last checkpoint",
                           decides=False)
    save_every: int = setting(200, "steps between checkpoints", decides=False, more=True,
                              type=above(0))
    sample_every: int = setting(500, "steps between sample grids (0: none)", decides=False,
                                more=True, type=above(-1))


@dataclass(frozen=True)
class SFT:
    """Stage 1: the base model (only the toy's is trained), then the auxiliary."""
    base: str | None = setting(None, "start from this checkpoint instead of training OUT/base.pt",
                               decides=False, more=True)
    # what two CPU cores do in five minutes each
    base_steps: int = setting(1000, "steps of the base model on plain captions", type=above(0))
    base_lr: float = setting(2e-3, "learning rate of the base model", more=True,
                             type=above(0, float))
    sft_steps: int = setting(1000, "steps of the auxiliary model", type=above(0))
    sft_lr: float = setting(2e-3, "learning rate of the auxiliary model", more=True,
                            type=above(0, float))
    # hue and subject are decided at the noisy end
    sft_lean: float = setting(0.7, "timesteps are T u^lean, u uniform (also for --method dpo and "
                              "sft)", more=True, type=above(0, float))
    min_snr: float | None = setting(None, "largest signal-to-noise ratio that supervised training "
                                    "weighs a timestep with (Min-SNR; 5 is usual); default: no "
                                    "weights", more=True, type=above(0, float))


@dataclass(frozen=True)
class CPO:
    """Stage 2. Its few tries are in docs/log.md, its table in docs/results/methods.md."""
    method: str = setting("cpo", "cpo: nanocpo/method.py; esd: regression to the guided target "
                          "that the rule constant ends at; dpo: Diffusion-DPO on pairs of pictures "
                          "with fewer and more negative attributes; sft: plain fine-tuning on the "
                          "best pictures",
                          choices=METHODS)
    stabilizer: str | None = setting(None, "which share of the loser's gradient is kept (losses."
                                     "RULES); default: constant for cpo, none for dpo",
                                     choices=list(RULES))
    strength: float | None = setting(None, "k of constant and balance, the share that is kept; mu "
                                     "of safeguard, which keeps less with more of it; default: the "
                                     "rule's usual one (constant: 0.3); with --criteria constant "
                                     "takes 0, since a harder pull changes the other branches too",
                                     type=number())
    beta: float | None = setting(None, "preference strength; default for cpo: 4 / gap per sample, "
                                 "the gap being the mean squared difference of the auxiliary's two "
                                 "predictions (1 with --criteria); for dpo 200",
                                 type=above(0, float))
    pairs: str = setting("opposite", "what the auxiliary's two prompts list of the leaves to align "
                         "on. own: the picture's good against its bad ones; completed: also the "
                         "good twins of the bad ones; opposite: all that are judged, good against "
                         "bad; all: every leaf",
                         choices=["own", "completed", "opposite", "all"])
    criteria: list | None = setting(None, "align on these branches of the tree only, by name or "
                                    "path", nargs="+")
    # a target that follows its goal sees such pictures and no flawed ones
    paint: int | None = setting(None, "pictures to train on that the auxiliary paints anew, good "
                                "in what is aligned and else as annotated, instead of the data "
                                "(for dpo as many bad ones too). 0: the data. Default: 512 for "
                                "cpo and esd (1024 with --criteria), else 0; with --weights 0",
                                more=True, type=above(-1))
    paint_guidance: float = setting(1.0, "scale of --paint: 1 asks for the good attributes, more "
                                    "guides away from the bad ones", more=True, type=number())
    best: float = setting(0.1, "share of the data that --method sft keeps", more=True,
                          type=above(0, float))
    apart: int = setting(1, "--method dpo: the two pictures of a pair differ in so many negative "
                         "attributes at least", more=True, type=above(0))
    # the early checkpoint is often the better one
    steps: int = setting(150, "steps of stage 2", type=above(0))
    lr: float = setting(1.2e-3, "learning rate of stage 2 (AdamW)", type=above(0, float))
    # where little of the training picture is left to contradict the prompt
    lean: float = setting(0.4, "cpo and esd train at t = T u^lean, u uniform", more=True,
                          type=above(0, float))
    name: str = setting("target", "name of the checkpoint, its log and its report row",
                        decides=False)

    def filled(self):
        """The same with the defaults that depend on one another in place of None."""
        usual = "none" if self.method == "dpo" else "constant"
        # esd is where constant ends (docs/derivation.md, E17), and asks no other rule
        rule = usual if self.method == "esd" else self.stabilizer or usual
        strength, beta = RULES[rule].strength, None
        if self.criteria:
            # a branch alone: end at z_win, and weight all contexts alike (docs/derivation.md, E19)
            strength, beta = 0.0 if rule == "constant" else strength, 1.0
        if self.method == "dpo":
            beta = 200.0
        paint = self.paint
        if paint is None:
            paint = 0 if self.method not in TEACHES else 1024 if self.criteria else 512
        return replace(self, stabilizer=rule, beta=beta if self.beta is None else self.beta,
                       strength=strength if self.strength is None else self.strength,
                       paint=paint)

    @property
    def teaches(self):
        """Whether stage 2 asks the auxiliary."""
        return self.method in TEACHES or self.filled().paint > 0

    def check(self):
        """Raises ValueError on values that do not go together."""
        if not re.fullmatch(r"[\w.-]{1,99}", self.name) or re.fullmatch(NO_FILE_NAME,
                                                                        self.name.lower()):
            raise ValueError(f"--name '{self.name}' is no name for files, or is taken by stage 1, "
                             "the report or an adapter's second file; choose another")
        here = self.filled()
        if here.stabilizer == "noisy" and here.strength <= 0:
            raise ValueError(f"--strength {here.strength:g}: 'noisy' ends at the reference + s "
                             "(z_win - z_lose), and s must be above 0 (docs/derivation.md, E21)")
        constant = here.method == "esd" or here.method == "cpo" and here.stabilizer == "constant"
        if constant and here.strength >= 1:
            raise ValueError(f"--strength {here.strength:g}: 'constant' needs less than 1; at 1 it "
                             "is 'none' and has no limit (docs/derivation.md, E12)")


@dataclass(frozen=True)
class Report:
    """What is measured at the end."""
    samples: int = setting(512, "pictures a row of the report (0: no report)", type=above(-1))
    sampling_steps: int = setting(12, "sampling steps of every picture", more=True,
                                  type=above(0))
    guidance: float = setting(2.0, "scale of the row auxiliary_guided; with --weights of all "
                              "pictures", more=True, type=number())
    verdict_draws: int = setting(2, "with --weights: noises for each of the auxiliary's verdicts, "
                                 "which count #A_neg in the report (0: not counted)",
                                 type=above(-1))

    def check(self):
        """Raises ValueError on values that do not go together."""
        if self.samples == 1:
            raise ValueError("--samples 1: an interval needs two pictures at least; 0 leaves the "
                             "report out")


@dataclass(frozen=True)
class Weights:
    """Public Stable Diffusion weights (docs/stable_diffusion.md): which, and how they are read."""
    weights: str | None = setting(None, "Stable Diffusion 1, 2 or XL instead of the toy: a folder "
                                  "in diffusers' layout, or a .safetensors or .ckpt file (its own "
                                  "flags: --help --weights X)", decides=False)
    lora: list | None = setting(None, "adapters, FILE or FILE:STRENGTH: in train_cpo.py the ready "
                                "auxiliary, in sample.py what to paint with", decides=False,
                                nargs="+")
    vae: str | None = setting(None, "another VAE: a file, or a folder with one (the latents, which "
                              "are part of the data, tell)", decides=False)
    config: str | None = setting(None, "single file: a folder in diffusers' layout whose configs "
                                 "and tokenizer to use", decides=False)
    tokenizer: str | None = setting(None, "single file: merges.txt, tokenizer.json or a folder with"
                                    " one", decides=False)
    variant: str | None = setting(None, "folder: read the files of this variant, for example fp16",
                                  decides=False)
    prediction: str | None = setting(None, "what the model predicts. Toy: of a base trained from "
                                     "nothing, flow (the default), v or eps; Stable Diffusion: if "
                                     "its files do not say (single file of SD 2), eps or v",
                                     choices=list(PREDICTIONS))
    zero_snr: str | None = setting(None, "whether the noise levels end in pure noise (zero-terminal"
                                   " SNR), if the files do not say", decides=False,
                                   choices=["yes", "no"])
    dtype: str = setting("float32", "of the frozen base (--bf16: bfloat16); float16 is for sampling"
                         " only", choices=["float32", "bfloat16", "float16"])
    resolution: int | None = setting(None, "side of a square picture, other shapes have about the "
                                     "same area; default: what the base was trained on (512; 768 "
                                     "for a single file of SD 2, 1024 for XL)", type=above(0))
    bucket_step: int = setting(64, "sides of pictures are multiples of this", type=above(0))
    rank: int = setting(8, "of the adapters", type=above(0))
    checkpointing: bool = setting(False, "recompute activations: less memory, more time",
                                  decides=False)
    prompts: str | None = setting(None, "file with a prompt a line for the grids of training "
                                  "(--sample-every)", decides=False)
    no_cache: bool = setting(False, "do not keep latents and encoded prompts in OUT/cache",
                             decides=False)

    def check(self):
        """Raises ValueError on values that do not go together."""
        if self.lora and not self.weights:
            raise ValueError("--lora needs --weights: an adapter is nothing without its base")
        if self.weights and self.prediction == "flow":
            raise ValueError("--prediction flow: Stable Diffusion 1, 2 and XL predict eps or v")
        if self.prompts and not self.weights:
            raise ValueError("--prompts needs --weights: the toy knows its data's captions only")


@dataclass(frozen=True)
class Settings:
    """All of it. Field names are unique over the parts, so `of` and `changed` take them flat."""
    common: Common = Common()
    sft: SFT = SFT()
    cpo: CPO = CPO()
    report: Report = Report()
    weights: Weights = Weights()

    def changed(self, **values):
        """The same with some fields of the parts replaced; names of no field are left out."""
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        return Settings(**{name: replace(part, **{f.name: values[f.name] for f in fields(part)
                                                  if f.name in values})
                           for name, part in parts.items()})

    def check(self):
        """Raises ValueError on values that do not go together."""
        for part in (self.cpo, self.report, self.weights):
            part.check()


def flat(settings):
    """{field name: value} of all parts."""
    return {name: value for part in asdict(settings).values() for name, value in part.items()}


def record(*parts):
    """{field name: value} of the fields that decide a result: nothing is listed by hand."""
    return {f.name: getattr(part, f.name) for part in parts for f in fields(part)
            if f.metadata["decides"]}


TOY = Settings()
# --quick: the same story with weaker numbers, in three minutes on two CPU cores
QUICK = TOY.changed(out="out_quick", base_steps=300, sft_steps=300, steps=75, samples=128)
STABLE_DIFFUSION = TOY.changed(
    batch=1, accumulate=4, sft_steps=2000, sft_lr=1e-4, steps=500, lr=1e-4, sample_every=0,
    samples=16, sampling_steps=20, guidance=7.5, paint=0)


@dataclass(frozen=True)
class Sampling:
    """sample.py: what to paint, and how."""
    checkpoint: str = setting("out/target.pt", "the toy's model")
    caption: list | None = setting(None, "captions; default: all that the model knows", nargs="+",
                                   type=encodable)  # the empty one is a caption too
    positive: list = setting((), "attributes to list as good: phrases, leaf names, or all",
                             nargs="+", type=phrase)
    negative: list = setting((), "attributes to list as bad; with guidance, to move away from",
                             nargs="+", type=phrase)
    guidance: float = setting(1.0, "1: none (with --weights also less)", type=number())
    axis: list = setting((), "a knob for each branch, NAME=SCALE: how far to push it from bad to "
                         "good beside the prompt (0: not at all; below 0: the other way). NAME is "
                         "a branch or leaf of the tree; with --weights good phrase / bad phrase",
                         nargs="+", type=phrase)
    count: int = setting(4, "pictures for each caption", type=above(0))
    steps: int = setting(12, "sampling steps", type=above(0))
    eta: float = setting(0.0, "0: DDIM; 1: as much noise as DDPM",
                         type=number(float, -1e-9, 1))
    seed: int = setting(0, "of the noise", type=SEED)
    width: int | None = setting(None, "of a picture, with --weights; default: --resolution",
                                type=above(0))
    height: int | None = setting(None, "the same", type=above(0))
    judge: bool = setting(False, "write the critic's verdict under each picture")
    device: str = setting("auto", "auto, cpu, cuda, mps", type=pick_device)
    out: str = setting("samples.png", "the grid; with --weights the pictures lie beside it")

    def check(self):
        """Raises ValueError on what could not be written, before anything is painted."""
        file = Path(self.out)
        if (file.exists() and not file.is_file()
                or file.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp")):
            raise ValueError(f"--out {self.out}: name the picture of the grid, for example "
                             f"{(file if file.is_dir() else file.parent) / 'samples.png'}")


def knobs(axis):
    """The values of --axis -> [(name, scale)]. Raises ValueError on one that has no scale."""
    found = []
    for text in axis:
        name, _, scale = text.rpartition("=")
        try:
            found.append((not_empty(name).strip(), number()(scale)))
        except (ValueError, ArgumentTypeError) as error:
            raise ValueError(f"--axis '{text}': write NAME=SCALE, for example "
                             "\"Color Relations=2\"") from error
    return found


SAMPLING = {"toy": Sampling(), "stable diffusion": Sampling(guidance=7.5, steps=30, count=1)}


@dataclass(frozen=True)
class Proposing:
    """nanocpo/folder/propose.py: who is asked, about which pictures, and how thoroughly."""
    data: str | None = setting(None, "the folder of the pictures")
    tree: str | None = setting(None, "criteria as JSON; default: criteria.json in the folder, else "
                               "nanocpo/toy/paintings.json")
    checkpoint: str = setting("out/auxiliary.pt", "the toy's auxiliary; with --weights --lora")
    partly: bool = setting(False, "also about the leaves without a verdict at pictures that have "
                           "some")
    draws: int = setting(4, "noises that a picture is judged at in each round", type=above(0))
    rounds: int = setting(ROUNDS, "1: each leaf alone; in each further round beside what was found "
                          "of the others", type=above(0))
    known: int = setting(64, "judged pictures, at most, that say where to cut the scores and how "
                         "often they are right; only those held out from training are taken (0: "
                         "none)", type=above(-1))
    batch: int = setting(32, "pictures at a time", type=above(0))
    seed: int = setting(0, "of the noise", type=SEED)
    device: str = setting("auto", "auto, cpu, cuda, mps", type=pick_device)
    skip_bad = True                     # no field: what training cannot read says nothing here

    def check(self):
        """Raises ValueError where no folder is named."""
        if not self.data or not Path(self.data).is_dir():
            raise ValueError(f"--data {self.data or ''}: name the folder of the pictures")


PROPOSING = {"toy": Proposing(), "stable diffusion": Proposing(batch=1)}
