"""The losses side by side: SFT, Diffusion-DPO, CPO. Pure functions: tensors in, (loss, logs) out,
no model inside. "E7" and the like are equations of docs/derivation.md.

Conventions, stated once (Diffusion-DPO's, 2311.12908):
- an error is the *mean* over (C, H, W) of a squared difference, per sample: shape (B,). |.|^2
  below is this mean;
- the margin u carries the factor 1/2 and beta, which absorbs T * omega(t) (E7); log-sigmoid is
  taken per sample, then the mean over B;
- `eps` is what the target predicts: noise, or velocity for a v-model, as the toy is. The formulas
  hold in either space. With a fixed beta the margin of v is 1 / alpha_bar_t times that of eps,
  since |dv|^2 = |d eps|^2 / alpha_bar_t at the same x_t; the default beta cancels it (E16);
- everything is computed in float32 at least, whatever comes in: z_win - z_lose (z_w - z_l in the
  docs) is small and would be rounding noise in bfloat16.

logs: {name: detached tensor (B,)}. The mask `valid` marks samples that count.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from .utils.device import send

# E[f(n)], n ~ N(0, 1), is very nearly sum of SHARES f(NODES) (Gauss-Hermite)
NODES, SHARES = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(32))
SHARES = SHARES / SHARES.sum()


def at_least_float32(x):
    """Half precision to float32; float32 and float64 stay."""
    return x if x.dtype == torch.float64 else x.float()


def _dot(a, b):
    """Mean over all but the batch of a * b: (B,)."""
    return (a * b).flatten(1).mean(1)


def _error(a, b):
    """Mean squared difference per sample: (B,)."""
    return _dot(a - b, a - b)


def _change(eps, eps_ref, goal):
    """|goal - eps|^2 - |goal - eps_ref|^2 per sample (B,), as a product: the difference of two
    errors that are almost equal would be rounding noise, and beta magnifies it."""
    return _dot(eps - eps_ref, eps + eps_ref - 2 * goal)


# --- stage 1

def sft_loss(eps, goal, weight=None):
    """Stage 1: mean squared error of the prediction, both (B, C, H, W) (2006.11239, equation
    14). weight: a factor (B,) of each sample's error, which the log does not have."""
    eps, goal = at_least_float32(eps), at_least_float32(goal)
    loss = _error(eps, goal)
    return (loss if weight is None else weight * loss).mean(), {"loss": loss.detach()}


# --- the stabilisers: which share lam of the loser's gradient is kept, and whether the step's noise

def _safeguard(win, lose, dot, mu):
    lam = ((1 - mu) * win / dot.clamp(min=1e-30)).clamp(max=1)
    lam = torch.where(dot > 0, lam, torch.ones_like(win))      # no conflict: the loser may push
    return torch.where(win == 0, torch.zeros_like(win), lam)   # at the winner nothing moves


def _balance(win, lose, dot, strength):
    return strength * (win / lose.clamp(min=1e-30)).sqrt()


class Rule(NamedTuple):
    """One stabiliser: lam (B,) from |g_win|^2, |g_lose|^2, <g_win, g_lose> (each (B,)) and its
    strength; the strength that it usually has (ours, docs/log.md); what it promises (E10-E15,
    E21). More strength goes further from the reference, but for `safeguard`, where it is less.
    noisy: whether the reverse step keeps its noise."""
    lam: Callable
    strength: float
    promise: str
    noisy: bool = False


RULES = {
    "none": Rule(lambda win, lose, dot, s: torch.ones_like(win), 1.0,
                 "no limit: it drifts along z_win - z_lose for ever (E10)"),
    "winner": Rule(lambda win, lose, dot, s: torch.zeros_like(win), 0.0,
                   "ends at z_win: plain regression"),
    "constant": Rule(lambda win, lose, dot, k: k * torch.ones_like(win), 0.3,
                     "ends at z_win + k / (1 - k) (z_win - z_lose), a guided target; k < 1 (E12)"),
    "safeguard": Rule(_safeguard, 0.2,
                      "the winner's error never rises; strength: mu (2511.03317, E13)"),
    "balance": Rule(_balance, 0.85,
                    "at strength 1 the winner's error never rises, the loser's never falls (E14)"),
    "clamped": Rule(lambda *sides: _balance(*sides).clamp(max=1), 0.85,
                    "min(1, balance): ends close to z_win (E15)"),
    "noisy": Rule(lambda win, lose, dot, s: torch.ones_like(win), 1.5,
                  "ends at the reference + s (z_win - z_lose), E4's optimum (E21)", noisy=True),
}


def restraint(rule, g_win, g_lose, strength):
    """lam (B,): the share of the loser's gradient in the update g_win - lam * g_lose, per sample
    (ours; E11). g_win = eps - z_win, g_lose = eps - z_lose, both (B, C, H, W). Raises ValueError
    on an unknown rule."""
    if rule not in RULES:
        raise ValueError(f"unknown stabilizer '{rule}'; it is one of {', '.join(RULES)}")
    sides = _dot(g_win, g_win), _dot(g_lose, g_lose), _dot(g_win, g_lose)
    return RULES[rule].lam(*sides, strength)


# --- stage 2, and what it extends

def preference_loss(win, lose, beta, lam, valid=None, spread=None):
    """-log sigmoid(u), u = -1/2 beta (win - lose) (E5, E7), from the two changes of error (B,):
    the target's less the reference's.

    beta: a number or (B,). lam (B,) is applied straight through: it scales the gradient through
    `lose` and leaves the value of the loss alone (E11). valid (B,) bool: samples that count in
    the mean; if none does, the loss is log 2 without a gradient. spread (B,): the mean of the loss
    over margins u + spread * n, n ~ N(0, 1) (E21)."""
    lose = lose.detach() + lam * (lose - lose.detach())
    margin = -0.5 * beta * (win - lose)
    loss, weight = -F.logsigmoid(margin), torch.sigmoid(-margin)
    if spread is not None:
        nodes, shares = (send(x.to(loss), loss.device) for x in (NODES, SHARES))
        margins = margin[:, None] + spread[:, None] * nodes                     # (B, 32)
        loss, weight = -F.logsigmoid(margins) @ shares, torch.sigmoid(-margins) @ shares
    valid = torch.ones_like(loss, dtype=torch.bool) if valid is None else valid
    logs = {"loss": loss, "margin": margin, "accuracy": (margin > 0).to(loss),
            "weight": weight, "lam": lam, "valid": valid}
    # where, not if: a GPU would have to be waited for
    counted = torch.where(valid, loss, 0).sum() / valid.sum().clamp(min=1)
    counted = torch.where(valid.any(), counted, math.log(2))
    return counted, {name: value.detach() for name, value in logs.items()}


def dpo_loss(eps_win, ref_win, goal_win, eps_lose, ref_lose, goal_lose, beta, stabilizer="none",
             strength=0.0, valid=None):
    """Diffusion-DPO (E8; 2311.12908, equation 14): a preferred and a rejected *picture*, at the
    same t and with the same noise.

    eps_*: the target's predictions at the two noised pictures, ref_*: the reference's, goal_*:
    the noise (or velocity) that was added; all (B, C, H, W). stabilizer "safeguard" makes it SDPO
    (2511.03317), "noisy" keeps the noise of both reverse steps (E21). The four errors stand apart
    in the log: a falling margin has different cures when the winner rises or the loser falls."""
    eps_win, eps_lose = at_least_float32(eps_win), at_least_float32(eps_lose)
    ref_win, goal_win, ref_lose, goal_lose = (
        at_least_float32(x.detach()) for x in (ref_win, goal_win, ref_lose, goal_lose))
    g_win, g_lose = (eps_win - goal_win).detach(), (eps_lose - goal_lose).detach()
    lam, spread = restraint(stabilizer, g_win, g_lose, strength), None
    if RULES[stabilizer].noisy:
        moved = _error(eps_win, ref_win) + _error(eps_lose, ref_lose)
        spread = (beta / strength * moved + 1e-20).sqrt()         # a root's slope at 0 is infinite
    loss, logs = preference_loss(_change(eps_win, ref_win, goal_win),
                                 _change(eps_lose, ref_lose, goal_lose), beta, lam, valid, spread)
    return loss, logs | {"winner": _error(eps_win, goal_win).detach(),
                         "winner_ref": _error(ref_win, goal_win),
                         "loser": _error(eps_lose, goal_lose).detach(),
                         "loser_ref": _error(ref_lose, goal_lose)}


def cpo_loss(eps, eps_ref, z_win, z_lose, beta=None, stabilizer="constant", strength=None):
    """CPO, stage 2 (E7; 2601.04300; the formula is our derivation from the abstract).

    One noised picture x_t, four predictions there, all (B, C, H, W): the target's and the
    reference's under the plain caption, and the frozen auxiliary model's towards the positive
    (z_win) and the negative attributes (z_lose):
        u = -1/2 beta [(|z_win - eps|^2 - |z_win - eps_ref|^2)
                       - (|z_lose - eps|^2 - |z_lose - eps_ref|^2)]
    This is Diffusion-DPO at one x_t; both targets share it, so
    u = beta <z_win - z_lose, eps - eps_ref> (E9).
    beta None takes 4 / |z_win - z_lose|^2 per sample (ours; E16): then u = 4 where eps has gone
    the whole way from z_lose to z_win, whatever the timestep. strength None: the rule's usual
    one. A sample with z_win = z_lose says nothing and is masked out.

    Logged beside dpo_loss's: where eps and eps_ref stand along the gap (place, place_ref: 0 at
    z_lose, 1 at z_win), and how far eps is from eps_ref at right angles to it, in gaps (across)."""
    eps, eps_ref, z_win, z_lose = map(at_least_float32, (eps, eps_ref, z_win, z_lose))
    gap = _error(z_win, z_lose).detach()
    valid = gap > 0
    if beta is None:
        beta = torch.where(valid, 4 / gap.clamp(min=1e-12), torch.zeros_like(gap))
    if strength is None and stabilizer in RULES:
        strength = RULES[stabilizer].strength
    loss, logs = dpo_loss(eps, eps_ref, z_win, eps, eps_ref, z_lose, beta, stabilizer, strength,
                          valid)
    eps, d, per_gap = eps.detach(), z_win - z_lose, gap.clamp(min=1e-12)
    place, place_ref = (_dot(x - z_lose, d) / per_gap for x in (eps, eps_ref))
    across = (_error(eps, eps_ref) / per_gap - (place - place_ref) ** 2).clamp(min=0).sqrt()
    return loss, logs | {"gap": gap, "place": place, "place_ref": place_ref, "across": across}
