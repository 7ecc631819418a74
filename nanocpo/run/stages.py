"""The flow of both stages, the same for the toy and for Stable Diffusion.

A *world* is what differs between the two: nanocpo/toy/world.py and nanocpo/sd/world.py are its
implementations. Only what stands in World is asked of it.
"""
from pathlib import Path
from typing import Protocol

from ..data import Paintings
from ..diffusion import PREDICTIONS
from ..method import attribute_prompts, caption_prompts, cpo_step, sft_step
from ..model import Model
from ..train import Recipe, fit
from ..utils.checkpoint import alone, use_again
from . import baselines
from .settings import Settings, record


class World(Protocol):
    """A kind of model with its data, opened once."""
    settings: Settings
    data: Paintings
    autocast: bool              # whether training runs under torch.autocast to bfloat16
    cure: str                   # what to do about a model that belongs to another run

    def path(self, name) -> Path:
        """The checkpoint of this name in OUT."""

    def sources(self) -> dict:
        """{name: digest} of what everything trained here starts from, the base apart."""

    def given(self, name) -> Model | None:
        """The frozen model that a flag names instead of training base or auxiliary, if any."""

    def stored(self, name, base) -> tuple[Path, Model, dict] | None:
        """OUT's finished model of this name: its file, itself, frozen, and the record of what it
        was made of; None if there is none."""

    def new_base(self) -> Model:
        """A base model to be trained from nothing."""

    def trainable(self, base) -> Model:
        """A model that starts as the base; training it leaves the base alone."""

    def publish(self, model, name) -> Model:
        """Write what others read of a trained model beside its checkpoint; returns the frozen
        model to go on with."""

    def pictures(self, name):
        """f(averaged model, step): the grid that is painted during training."""

    def wants_auxiliary(self) -> bool:
        """Whether the report needs the auxiliary even if the method does not."""

    def report(self, base, auxiliary, target, seconds):
        """Measure, write OUT/report.json and .png, print the table; returns the report, or None
        where nothing can be measured."""


def stage_1(world):
    """(base, auxiliary), both frozen: what is there is used again (utils/checkpoint.use_again),
    what is missing is trained. The auxiliary is None where nobody asks it."""
    settings, sft = world.settings, world.settings.sft
    step = sft_loss_step(settings, world.data.split("train"), caption_prompts)
    base = ready(world, "base", None, world.new_base, sft.base_steps, sft.base_lr, step, {})
    if not settings.cpo.teaches and not world.wants_auxiliary():
        return base, None
    return base, ready_auxiliary(world, base)


def ready_auxiliary(world, base, exactly=False):
    """The auxiliary on this base: stage 1 of the paper. exactly: one that is there must agree in
    every setting."""
    settings, sft = world.settings, world.settings.sft
    step = sft_loss_step(settings, world.data.split("train"), attribute_prompts)
    return ready(world, "auxiliary", base, lambda: world.trainable(base), sft.sft_steps, sft.sft_lr,
                 step, {"base": base.digest()}, exactly)


def ready(world, name, base, start, steps, lr, loss_step, made_of, exactly=False):
    """The model `name` of stage 1: given by a flag, there already, or trained now from start()."""
    model = world.given(name)
    if model is not None:
        return model
    stored = world.stored(name, base)
    if stored is None:
        return train(world, name, start(), steps, lr, loss_step, made_of)[0]
    file, model, was = stored
    if world.settings.common.resume and was and was.get("steps", steps) < steps:
        flag = "--base-steps" if name == "base" else "--sft-steps"
        raise ValueError(f"{file} is finished after {was['steps']} steps, and what is finished is "
                         f"not made longer; {flag} {was['steps']} uses it as it is, and if you "
                         f"delete it another is trained")
    # of other data, or on another base, it would silently be another model
    use_again(file, was, everything(world, steps, lr, made_of),
              must=None if exactly else {"base", *world.sources()}, cure=world.cure)
    return model


def stage_2(world, base, auxiliary, watch=None, steady=False):
    """Align a target that starts as the base -> OUT/NAME.pt; returns (the target, frozen; the
    last log line). watch(averaged model, step): called instead of painting grids. steady: one
    learning rate from the first step to the last and no averaging, so that a curve of steps shows
    the rule and not the schedule."""
    settings, cpo = world.settings, world.settings.cpo.filled()
    made_of = {"base": base.digest()} | record(cpo)
    if cpo.teaches:
        made_of["auxiliary"] = auxiliary.digest()
    if cpo.paint:
        made_of["sampling_steps"] = settings.report.sampling_steps
    step = alignment_step(settings, world.data.split("train"), base, auxiliary)
    recipe = dict(muon=False) | (dict(warmup=1, plateau=0.999, ema=0.0) if steady else {})
    return train(world, cpo.name, world.trainable(base), cpo.steps, cpo.lr, step, made_of, watch,
                 **recipe)


def train(world, name, model, steps, lr, loss_step, made_of, watch=None, **recipe):
    """fit() as the settings say; recipe: other fields of train.Recipe. Returns (the averaged model,
    frozen; the last log line)."""
    common = world.settings.common
    with alone(world.path(name)):
        average, line = fit(
            model, loss_step, Recipe(steps, lr, **recipe), world.path(name), name=name,
            seed=common.seed, bf16=world.autocast, accumulate=common.accumulate,
            resume=common.resume, save_every=common.save_every, sample_every=common.sample_every,
            pictures=watch or world.pictures(name), made_of=everything(world, steps, lr, made_of))
    return world.publish(average, name), line


def everything(world, steps, lr, made_of):
    """The record of what a model is made of: digests, and every setting that decides."""
    settings = world.settings
    own = {"steps": steps, "lr": lr, "sft_lean": settings.sft.sft_lean}
    if settings.sft.min_snr:                # what was trained before it was there had none
        own["min_snr"] = settings.sft.min_snr
    kind = record(settings.weights) if settings.weights.weights else {}
    return own | record(settings.common) | kind | world.sources() | made_of


# --- a training step: draw a batch, and hand it to the method

def min_snr(diffusion, t, gamma):
    """Weights (B,) of the error at timesteps t: min(SNR_t, gamma) of the picture's, whatever is
    predicted (2303.09556; docs/derivation.md, section 10)."""
    a, s = diffusion.shares(diffusion.alpha_bar[t])
    p, q = PREDICTIONS[diffusion.prediction](a, s)
    # an error of the prediction is s / (a q - s p) times as large in the picture
    return ((a / s).square().clamp(max=gamma) * (s / (a * q - s * p)).square()).float()


def sft_loss_step(settings, data, make_prompts):
    """loss_step(model, generator) of supervised training; make_prompts: see method.sft_step."""
    sft = settings.sft

    def loss_step(model, generator):
        batch = data.draw(settings.common.batch, generator)
        weight = sft.min_snr and (lambda t: min_snr(model.diffusion, t, sft.min_snr))
        return sft_step(model, data.criteria, batch, make_prompts, generator, sft.sft_lean, weight)
    return loss_step


def alignment_step(settings, data, reference, auxiliary):
    """loss_step(target, generator) of stage 2, by --method, on these data."""
    cpo, batch, criteria = settings.cpo.filled(), settings.common.batch, data.criteria
    columns = criteria.columns(cpo.criteria)
    if cpo.paint:
        data = baselines.painted(data, auxiliary, columns, cpo.paint,
                                 settings.report.sampling_steps, settings.common.seed,
                                 cpo.paint_guidance, bad_too=cpo.method == "dpo")
    if cpo.method == "sft":
        best = data if cpo.paint else baselines.best_pictures(data, columns, cpo.best)
        return sft_loss_step(settings, best, caption_prompts)
    how = dict(stabilizer=cpo.stabilizer, strength=cpo.strength, beta=cpo.beta)
    if cpo.method == "dpo":
        pairs = baselines.Pairs(data, columns, cpo.apart)
        return lambda target, generator: baselines.dpo_step(
            target, reference, criteria, pairs.draw(batch, generator), generator,
            lean=settings.sft.sft_lean, **how)
    asked = dict(columns=columns, pairs=cpo.pairs, lean=cpo.lean)
    if cpo.method == "esd":
        return lambda target, generator: baselines.esd_step(
            target, auxiliary, criteria, data.draw(batch, generator), generator,
            strength=cpo.strength, **asked)
    return lambda target, generator: cpo_step(
        target, reference, auxiliary, criteria, data.draw(batch, generator), generator,
        **asked, **how)
