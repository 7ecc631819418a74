"""Checks that only the grader knows: other sizes and corners. `make` leaves this file out."""
import torch

from nanocpo import diffusion, losses

from .probes import CPO, check, seen


@check(4, "core", "scales below 0 and far above 1")
def far_scales(draw):
    positive, negative = draw.like(2)
    return {str(s): diffusion.guide(positive, negative, s) for s in (-1.0, 12.0)}


@check(9, "core", "one pixel, many channels")
def one_pixel(draw):
    x = {name: draw.normal(5, 7, 1, 1).requires_grad_() for name in CPO}
    return seen(losses.cpo_loss(**x, beta=0.7, stabilizer="winner"), eps=x["eps"])


@check(9, "robust", "no sample says anything")
def nothing_to_say(draw):
    eps, ref, z = draw.like(3)
    loss = losses.cpo_loss(eps, ref, z, z)[0]
    return {"finite": str(bool(torch.isfinite(loss)))}
