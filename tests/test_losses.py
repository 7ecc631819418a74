"""The losses against hand-computed values, closed forms and their own theory: no model, no data,
no training."""
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from nanocpo.losses import RULES, cpo_loss, dpo_loss, preference_loss, restraint, sft_loss

LOG2 = math.log(2)
# One strength per rule; none of them a power of two, so that lam * x + (1 - lam) * x
# has to be rounded.
STRENGTH = {name: rule.strength for name, rule in RULES.items()}
LAMBDAS = [name for name, rule in RULES.items() if not rule.noisy]    # these differ in lam only
STRENGTH |= {"none": 0.0, "winner": 0.0, "constant": 0.7, "safeguard": 0.3, "balance": 1.0,
             "clamped": 0.85}


def randn(count, shape=(4, 3, 2, 2), seed=0, dtype=torch.float64):
    """`count` independent normal tensors."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed),
                       dtype=dtype).unbind()


def picture(*pixels):
    """One sample with one channel and one row: (1, 1, 1, len(pixels))."""
    return torch.tensor(pixels, dtype=torch.float64).view(1, 1, 1, -1)


def batch(*pictures):
    return torch.cat([picture(*pixels) for pixels in pictures])


def mean(x):
    return x.flatten(1).mean(1)


def close(a, b, atol=1e-10):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b, dtype=a.dtype),
                               rtol=0, atol=atol)


def cpo_grad(eps, eps_ref, z_win, z_lose, **options):
    """Loss, logs and the gradient at eps."""
    eps = eps.detach().clone().requires_grad_()
    loss, logs = cpo_loss(eps, eps_ref, z_win, z_lose, **options)
    return loss.detach(), logs, torch.autograd.grad(loss, eps)[0]


def descend(eps_ref, z_win, z_lose, steps, lr, **options):
    """Gradient descent on eps as a free tensor from eps_ref, beta fixed and small: no weight
    sigmoid(-u) dies on the way."""
    eps = eps_ref.clone()
    for _ in range(steps):
        eps -= (lr * eps.numel() * cpo_grad(eps, eps_ref, z_win, z_lose, beta=0.1, **options)[2]
                / 0.1)
    return eps


# ----------------------------------------------------------------------------------- values by hand

# u = -1/2 0.2 [(0.5 - 4) - (8.5 - 2)] = 1
HAND = dict(eps=picture(1, 2), eps_ref=picture(0, 0), z_win=picture(2, 2), z_lose=picture(0, -2))


def test_cpo_by_hand():
    """Margin with the factor 1/2 and the pixel mean, and every quantity that is logged."""
    loss, logs = cpo_loss(**HAND, beta=0.2, stabilizer="none")
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1)))
    expected = {"winner": 0.5, "winner_ref": 4, "loser": 8.5, "loser_ref": 2, "gap": 10,
                "margin": 1, "accuracy": 1, "valid": 1, "lam": 1, "weight": 1 / (1 + math.e),
                "loss": math.log1p(math.exp(-1)),
                # <eps - z_lose, d> = (1 * 2 + 4 * 4) / 2 = 9, of 10; the reference's is 4. Of
                # |eps - eps_ref|^2 = 2.5 the gap explains 5^2 / 10, so nothing is left
                "place": 0.9, "place_ref": 0.4, "across": 0}
    assert {name: value.item() for name, value in logs.items()} == pytest.approx(expected)


def test_place_and_across_by_hand():
    """From z_lose (0, 0) to z_win (2, 0): the output (1, 3) stands half-way, the reference (0, 1)
    at the start; their difference (1, 2) is 2 across, and the gap 2 long."""
    _, logs = cpo_loss(picture(1, 3), picture(0, 1), picture(2, 0), picture(0, 0))
    assert [logs[name].item() for name in ("place", "place_ref", "across")] == [0.5, 0.0, 1.0]


def test_cpo_gradient_by_hand():
    """Vanilla: -beta sigmoid(-u) d / N with d = (2, 4), N = 2. It points along d only."""
    close(cpo_grad(**HAND, beta=0.2, stabilizer="none")[2], picture(-0.2, -0.4) / (1 + math.e))


def test_dpo_by_hand():
    """The same numbers as above, with the winner and the loser predicted at two pictures."""
    loss, logs = dpo_loss(picture(1, 2), picture(0, 0), picture(2, 2), picture(1, 0), picture(0, 2),
                          picture(0, 4), beta=0.4)
    # winner 0.5, reference 4; loser 8.5, reference 2
    close(logs["margin"], [2.0])
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2)))


def test_sft_by_hand():
    """A mean over pixels and batch: value 2.5 = ((1 + 0) / 2 + (9 + 0) / 2) / 2,
    gradient 2 (eps - goal) / (N B)."""
    eps = batch((1, 2), (3, 4)).requires_grad_()
    loss, logs = sft_loss(eps, batch((0, 2), (0, 4)))
    close(loss, 2.5)
    close(logs["loss"], [0.5, 4.5])
    close(torch.autograd.grad(loss, eps)[0], batch((0.5, 0), (1.5, 0)))


@pytest.mark.parametrize("rule, strength, g_win, g_lose, lam", [
    ("none", 0.5, (1, 0), (2, 0), 1), ("winner", 0.5, (1, 0), (2, 0), 0),
    ("constant", 0.3, (1, 0), (2, 0), 0.3),
    ("safeguard", 0.5, (1, 0), (2, 0), 0.25),  # 0.5 * 1 / 2
    ("safeguard", 0.5, (1, 0), (0.1, 0), 1),   # 0.5 * 1 / 0.1, cut to 1: never more than vanilla
    ("safeguard", 0.5, (1, 0), (-1, 0), 1),    # the loser's term helps the winner: nothing to guard
    ("safeguard", 1.0, (1, 0), (-1, 0), 1),    # also where 1 - mu = 0
    ("safeguard", 0.5, (1, 0), (0, 1), 1),
    ("balance", 1.0, (3, 4), (0, 10), 0.5), ("balance", 0.5, (3, 4), (0, 10), 0.25),
    ("balance", 1.0, (0, 10), (3, 4), 2), ("clamped", 1.0, (3, 4), (0, 10), 0.5),
    ("clamped", 1.0, (0, 10), (3, 4), 1), ("balance", 1.0, (0, 0), (3, 4), 0),
])
def test_restraint_by_hand(rule, strength, g_win, g_lose, lam):
    close(restraint(rule, picture(*g_win), picture(*g_lose), strength), [float(lam)])


@pytest.mark.parametrize("strength", [0.0, 0.5])
@pytest.mark.parametrize("g_lose", [(1, 0), (0, 0)])
def test_safeguard_is_zero_on_the_winner(g_lose, strength):
    """g_win = 0: the dot product is 0 as well, and the 'no conflict, lam = 1' branch would push eps
    off the winner."""
    close(restraint("safeguard", picture(0, 0), picture(*g_lose), strength), [0.0])


def test_unknown_stabilizer():
    """A typo must not train quietly; the message names the typo and the choices."""
    with pytest.raises(ValueError, match="unknown stabilizer 'sdpo'.*" + ".*".join(RULES)):
        cpo_loss(*randn(4), stabilizer="sdpo")


def test_beta_none_gives_margin_4_from_loser_to_winner():
    """The scale-free beta, per sample: u = 4 for gaps a thousand times apart; it is 4 / gap
    as logged."""
    z_win, z_lose = (x * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1, 1)
                     for x in randn(2, (3, 3, 2, 2)))
    _, logs = cpo_loss(z_win, z_lose, z_win, z_lose)
    close(logs["margin"], [4.0, 4.0, 4.0], 1e-6)
    close(cpo_loss(z_win, z_lose, z_win, z_lose, beta=4 / logs["gap"])[1]["margin"], logs["margin"])


def test_defaults():
    """beta 4 / gap and `constant` 0.3 for CPO, each rule's usual strength, no stabilizer for DPO:
    commands and figures rely on them. (DPO's beta, 200, is a setting: test_settings.py.)"""
    a = randn(4)
    _, logs, grad = cpo_grad(*a)
    close(grad, cpo_grad(*a, beta=4 / mean((a[2] - a[3])**2), stabilizer="constant",
                         strength=0.3)[2])
    for rule, (_, strength, *_) in RULES.items():
        close(cpo_loss(*a, stabilizer=rule)[1]["lam"],
              cpo_loss(*a, stabilizer=rule, strength=strength)[1]["lam"])
    close(dpo_loss(*randn(6), beta=200.0)[1]["margin"],
          dpo_loss(*randn(6), beta=200.0, stabilizer="none")[1]["margin"])
    close(dpo_loss(*randn(6), beta=200.0)[1]["lam"], [1.0] * 4)


# --------------------------------------------------------------------- preference losses in general

@pytest.mark.parametrize("beta", [0.1, 200.0, 5000.0, None])
@pytest.mark.parametrize("rule, strength", [("none", 0.0), ("winner", 0.0), ("constant", 0.5)])
def test_target_equal_to_reference_is_log_2(rule, strength, beta):
    """The first step of every run: margin exactly 0, loss log 2, and yet a gradient."""
    eps, z_win, z_lose = randn(3, dtype=torch.float32)
    loss, logs, grad = cpo_grad(eps, eps, z_win, z_lose, beta=beta, stabilizer=rule,
                                strength=strength)
    assert (logs["margin"] == 0).all() and (logs["accuracy"] == 0).all()
    close(loss, LOG2, 1e-6)
    assert grad.flatten(1).norm(dim=1).min() > 1e-3


def test_dpo_target_equal_to_reference_is_log_2():
    eps_win, goal_win, eps_lose, goal_lose = randn(4, dtype=torch.float32)
    loss, logs = dpo_loss(eps_win.requires_grad_(), eps_win.detach(), goal_win, eps_lose, eps_lose,
                          goal_lose, beta=5000.0)
    assert (logs["margin"] == 0).all()
    close(loss.detach(), LOG2, 1e-6)
    assert torch.autograd.grad(loss, eps_win)[0].abs().max() > 1


@pytest.mark.parametrize("beta", [2.0, None])
def test_cpo_autograd_equals_finite_differences(beta):
    eps, *others = randn(4, (2, 1, 2, 2))
    torch.autograd.gradcheck(lambda x: cpo_loss(x, *others, beta=beta, stabilizer="none")[0],
                             eps.requires_grad_())


def test_dpo_autograd_equals_finite_differences():
    eps_win, ref_win, goal_win, eps_lose, ref_lose, goal_lose = randn(6, (2, 1, 2, 2))
    torch.autograd.gradcheck(
        lambda win, lose: dpo_loss(win, ref_win, goal_win, lose, ref_lose, goal_lose, beta=2.0)[0],
        (eps_win.requires_grad_(), eps_lose.requires_grad_()))


def test_gradient_of_noisy_by_hand():
    """By Stein's identity (E21): -beta E[sigmoid(-u)] d + 2 beta / s E[sigmoid sigmoid(-u)] Delta,
    over N B; the means over n by a fine sum."""
    beta, s = 1.7, 0.8
    eps, eps_ref, z_win, z_lose = a = randn(4)
    loss, logs, grad = cpo_grad(*a, beta=beta, stabilizer="noisy", strength=s)
    n = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    weight = torch.exp(-n ** 2 / 2) / (2 * math.pi) ** 0.5 * 0.001
    losses = []
    for i in range(len(eps)):
        d, moved = z_win[i] - z_lose[i], eps[i] - eps_ref[i]
        u = beta * (d * moved).mean() + (2 * beta / s * (moved ** 2).mean()) ** 0.5 * n
        losses.append((weight * -torch.sigmoid(u).log()).sum())
        push, pull = ((weight * torch.sigmoid(-u)).sum(),
                      (weight * torch.sigmoid(u) * torch.sigmoid(-u)).sum())
        by_hand = -beta * push * d + 2 * beta / s * pull * moved
        close(grad[i], by_hand / d.numel() / len(eps), 2e-4)
        close(logs["weight"][i], push, 5e-4)
        close(logs["margin"][i], beta * (d * moved).mean())
    close(loss, sum(losses) / len(losses), 5e-4)
    # more strength, less pull back to the reference
    further = cpo_grad(*a, beta=beta, stabilizer="noisy", strength=2 * s)[0]
    assert further < loss and cpo_loss(*a, beta=beta, stabilizer="none")[0] < further


def test_noisy_at_the_reference():
    """The value is log 2, the gradient vanilla's: finite, where |Delta| has none."""
    eps, z_win, z_lose = randn(3)
    loss, _, grad = cpo_grad(eps, eps, z_win, z_lose, beta=1.7, stabilizer="noisy", strength=1.5)
    close(loss, LOG2)
    close(grad, cpo_grad(eps, eps, z_win, z_lose, beta=1.7, stabilizer="none")[2], 1e-9)


def test_noisy_of_two_pictures_spreads_by_both_displacements():
    """Diffusion-DPO's margins have the variance beta / s (|Delta_w|^2 + |Delta_l|^2) (E21)."""
    eps_win, ref_win, goal_win, eps_lose, ref_lose, goal_lose = a = randn(6)
    loss, logs = dpo_loss(*a, 2.0, "noisy", 0.5)
    spread = (4 * (mean((eps_win - ref_win) ** 2) + mean((eps_lose - ref_lose) ** 2))).sqrt()
    by_hand, _ = preference_loss(
        *(mean((e - g) ** 2) - mean((r - g) ** 2) for e, r, g in (a[:3], a[3:])), 2.0,
        torch.ones(4, dtype=torch.float64), spread=spread)
    close(loss, by_hand, 1e-8)
    assert loss > preference_loss(*(mean((e - g) ** 2) - mean((r - g) ** 2)
                                    for e, r, g in (a[:3], a[3:])), 2.0, torch.ones(4))[0]


@pytest.mark.parametrize("rule", LAMBDAS)
def test_cpo_gradient_equals_closed_form(rule):
    """beta sigmoid(-u) / (N B) times (eps - z_win) - lam (eps - z_lose), lam from each sample
    alone, in plain arithmetic."""
    eps, eps_ref, z_win, z_lose = randn(4)
    k = STRENGTH[rule]
    _, logs, grad = cpo_grad(eps, eps_ref, z_win, z_lose, beta=1.7, stabilizer=rule, strength=k)
    for i in range(len(eps)):
        g_win, g_lose = eps[i] - z_win[i], eps[i] - z_lose[i]
        dot, ratio = (g_win * g_lose).sum().item(), (g_win.norm() / g_lose.norm()).item()
        lam = {"none": 1, "winner": 0, "constant": k,
               "balance": k * ratio, "clamped": min(1, k * ratio),
               "safeguard": min(1, (1 - k) * g_win.norm().item()**2 / dot) if dot > 0 else 1}[rule]
        u = 1.7 * ((z_win[i] - z_lose[i]) * (eps[i] - eps_ref[i])).mean()
        close(logs["weight"][i], torch.sigmoid(-u))
        close(grad[i], 1.7 * torch.sigmoid(-u) * (g_win - lam * g_lose) / g_win.numel() / len(eps))


def test_dpo_gradient_equals_closed_form():
    """With SDPO's safeguard: the winner's gradient is whole, the loser's is scaled by lam and has
    the other sign."""
    eps_win, ref_win, goal_win, eps_lose, ref_lose, goal_lose = randn(6)
    # similar pictures: the guard has work
    eps_lose, goal_lose = eps_win + 0.3 * eps_lose, goal_win + 0.3 * goal_lose
    eps_win, eps_lose = eps_win.requires_grad_(), eps_lose.requires_grad_()
    loss, logs = dpo_loss(eps_win, ref_win, goal_win, eps_lose, ref_lose, goal_lose, 1.7,
                          "safeguard", 0.3)
    win, lose = torch.autograd.grad(loss, (eps_win, eps_lose))
    scale = (1.7 * torch.sigmoid(-logs["margin"]) / 12 / 4).view(4, 1, 1, 1)
    lam = restraint("safeguard", eps_win - goal_win, eps_lose - goal_lose, 0.3).detach()
    assert lam.min() < 1
    close(win, (scale * (eps_win - goal_win)).detach())
    close(lose, (-scale * lam.view(4, 1, 1, 1) * (eps_lose - goal_lose)).detach())


def test_exchanging_winner_and_loser_negates_the_margin():
    eps, eps_ref, z_win, z_lose = randn(4)
    one, other = (cpo_loss(eps, eps_ref, *z, beta=1.7, stabilizer="none")[1]
                  for z in ((z_win, z_lose), (z_lose, z_win)))
    close(one["margin"], -other["margin"])
    close(one["loss"] - other["loss"], -one["margin"])
    close(one["accuracy"] + other["accuracy"], [1.0] * 4)
    assert one["margin"].abs().min() > 1e-2


def test_exchanging_the_pictures_of_dpo_negates_the_margin():
    a = randn(6)
    one, other = dpo_loss(*a, beta=1.7)[1], dpo_loss(*a[3:], *a[:3], beta=1.7)[1]
    close(one["margin"], -other["margin"])
    close(one["loss"] - other["loss"], -one["margin"])


def test_log_sigmoid_is_per_sample():
    """diffusers took the log-sigmoid of the mean margin (issue 6702): right at batch size 1 only.
    Here +3 and -3."""
    zero = torch.zeros(2, dtype=torch.float64)
    loss, logs = preference_loss(torch.tensor([-6.0, 6.0]), zero, beta=1.0, lam=zero + 1)
    close(logs["margin"], [3.0, -3.0])
    # log 2 would be the bug
    close(loss, (math.log1p(math.exp(-3)) + math.log1p(math.exp(3))) / 2, 1e-6)


def test_half_and_pixel_mean():
    """beta with the 1/2 and the mean is beta / 2 without the 1/2, and beta / N with the sum (other
    codes' conventions)."""
    eps, eps_ref, z_win, z_lose = randn(4)
    square = [((a - b)**2).flatten(1)
              for a, b in ((eps, z_win), (eps_ref, z_win), (eps, z_lose), (eps_ref, z_lose))]
    means, sums = ([reduce(x, 1) for x in square] for reduce in (torch.mean, torch.sum))
    margin = cpo_loss(eps, eps_ref, z_win, z_lose, beta=3.0, stabilizer="none")[1]["margin"]
    close(margin, -1.5 * (means[0] - means[1] - means[2] + means[3]))
    close(margin, -1.5 / 12 * (sums[0] - sums[1] - sums[2] + sums[3]))


def test_size_of_the_picture_does_not_matter():
    """Four tiles of a picture have its loss: one beta serves every resolution."""
    a = randn(6)
    tiles = [x.repeat(1, 1, 2, 2) for x in a]
    close(cpo_loss(*tiles[:4], beta=2.0)[0], cpo_loss(*a[:4], beta=2.0)[0])
    close(dpo_loss(*tiles, beta=2.0)[0], dpo_loss(*a, beta=2.0)[0])


def test_dpo_pair_of_equal_pictures_has_no_margin():
    """Same picture, same t, same noise: the margin is 0 although the target is not
    the reference."""
    eps, ref, goal = randn(3)
    loss, logs = dpo_loss(eps, ref, goal, eps, ref, goal, beta=5000.0)
    close(logs["margin"], [0.0] * 4)
    close(loss, LOG2)


@pytest.mark.parametrize("rule", RULES)
def test_cpo_sends_no_gradient_to_reference_and_auxiliary(rule):
    """Even where the caller forgot no_grad."""
    eps, *frozen = [x.requires_grad_() for x in randn(4)]
    cpo_loss(eps, *frozen, stabilizer=rule, strength=STRENGTH[rule])[0].backward()
    assert eps.grad is not None and all(x.grad is None for x in frozen)


def test_dpo_sends_no_gradient_to_reference():
    eps_win, ref_win, goal_win, eps_lose, ref_lose, goal_lose = randn(6)
    references = ref_win.requires_grad_(), ref_lose.requires_grad_()
    dpo_loss(eps_win.requires_grad_(), ref_win, goal_win, eps_lose, ref_lose, goal_lose,
             beta=200.0)[0].backward()
    assert all(x.grad is None for x in references)


def test_logs_are_detached_and_per_sample():
    """Keeping a log must not keep the graph; a mean over t-bins needs one number per sample."""
    eps, *others = randn(4)
    for logs in (cpo_loss(eps.requires_grad_(), *others)[1],
                 dpo_loss(*randn(6), beta=200.0)[1], sft_loss(eps, others[0])[1]):
        assert all(not value.requires_grad and value.shape == (4,) for value in logs.values())


@pytest.mark.parametrize("u, loss, slope", [(1e4, 0.0, 0.0), (-1e4, 1e4, 1.0)])
def test_stable_at_large_margins(u, loss, slope):
    """log(sigmoid(-1e4)) would be -inf, its gradient nan."""
    win, zero = torch.tensor([-2 * u], requires_grad=True), torch.zeros(1)
    value, _ = preference_loss(win, zero, beta=1.0, lam=zero + 1)
    close(value.detach(), loss)
    close(torch.autograd.grad(value, win)[0], [slope / 2])


def test_velocity_weighs_the_margin_by_one_over_alpha_bar():
    """At one x_t, v = (eps - sqrt(1 - alpha_bar) x_t) / sqrt(alpha_bar): all errors are
    over alpha_bar."""
    eps, xt = randn(4), randn(1, seed=1)[0]
    v = [(e - 0.9**0.5 * xt) / 0.1**0.5 for e in eps]
    one, other = (cpo_loss(*x, beta=1.7)[1] for x in (eps, v))
    close(other["margin"], one["margin"] / 0.1)
    close(other["winner"], one["winner"] / 0.1)
    # beta 4 / gap weighs every t alike
    close(cpo_loss(*v)[1]["margin"], cpo_loss(*eps)[1]["margin"])


def test_beta_per_sample():
    a, beta = randn(4), torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    close(cpo_loss(*a, beta=beta)[1]["margin"], beta * cpo_loss(*a, beta=1.0)[1]["margin"])


# ---------------------------------------------------------------------------------------------- CPO

def test_four_errors_equal_the_collapsed_form():
    """Both targets share x_t, so |eps|^2 cancels: u = beta mean(d (eps - eps_ref)),
    gradient -beta sigmoid(-u) d / N."""
    eps, eps_ref, z_win, z_lose = randn(4)
    d = z_win - z_lose
    loss, logs, grad = cpo_grad(eps, eps_ref, z_win, z_lose, beta=1.7, stabilizer="none")
    u = 1.7 * mean(d * (eps - eps_ref))
    close(logs["margin"], u)
    close(loss, -F.logsigmoid(u).mean())
    close(grad, -1.7 * torch.sigmoid(-u).view(4, 1, 1, 1) * d / 12 / 4)


def test_vanilla_is_flat_orthogonal_to_the_gap():
    """Moving eps at right angles to z_win - z_lose changes neither loss nor gradient."""
    eps, eps_ref, z_win, z_lose, p = randn(5)
    d = z_win - z_lose
    p = 10 * (p - (mean(p * d) / mean(d * d)).view(4, 1, 1, 1) * d)
    one, other = (cpo_grad(x, eps_ref, z_win, z_lose, beta=1.7, stabilizer="none")
                  for x in (eps, eps + p))
    close(one[0], other[0])
    close(one[2], other[2])


@pytest.mark.parametrize("rule", RULES)
def test_translation_changes_nothing(rule):
    """Only differences of the four predictions count; so, at a given x_t, the forward noise
    does not."""
    *a, shift = randn(5)
    options = dict(beta=1.7, stabilizer=rule, strength=STRENGTH[rule])
    one, other = cpo_grad(*a, **options), cpo_grad(*(x + 3 * shift for x in a), **options)
    close(one[0], other[0])
    close(one[2], other[2])


@pytest.mark.parametrize("rule", RULES)
def test_scale(rule):
    """Everything times s: u times s^2, lam unchanged. A guidance scale inside the targets asks for
    beta / s^2."""
    a, options = randn(4), dict(stabilizer=rule, strength=STRENGTH[rule])
    one, other = (cpo_loss(*(s * x for x in a), beta=1.7, **options)[1] for s in (1, 3))
    close(other["margin"], 9 * one["margin"])
    close(other["lam"], one["lam"])
    one, other = (cpo_loss(*(s * x for x in a), **options)[1] for s in (1, 3))
    close(other["margin"], one["margin"])  # beta None: scale-free


@pytest.mark.parametrize("rule", RULES)
def test_equal_targets_are_masked_out_of_a_mixed_batch(rule):
    """z_win = z_lose says nothing: the other samples' loss and gradient are as if they were alone,
    its own gradient is 0."""
    eps, eps_ref, z_win, z_lose = randn(4)
    z_lose[1] = z_win[1]
    for beta in (1.7, None):
        options = dict(beta=beta, stabilizer=rule, strength=STRENGTH[rule])
        loss, logs, grad = cpo_grad(eps, eps_ref, z_win, z_lose, **options)
        rest = [0, 2, 3]
        alone = cpo_grad(*(x[rest] for x in (eps, eps_ref, z_win, z_lose)), **options)
        assert logs["valid"].tolist() == [True, False, True, True]
        close(loss, alone[0])
        close(grad[rest], alone[2])
        assert (grad[1] == 0).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("beta", [None, 1.7])
def test_batch_of_equal_targets_is_log_2_without_gradient(rule, beta):
    """No sample counts: log 2 and no gradient, rather than 0 / 0."""
    eps, eps_ref, z = randn(3)
    loss, logs, grad = cpo_grad(eps, eps_ref, z, z, beta=beta, stabilizer=rule,
                                strength=STRENGTH[rule])
    close(loss, LOG2)
    assert not logs["valid"].any()
    close(grad, torch.zeros_like(grad))


def test_valid_is_the_mean_over_valid():
    """Not the sum, not the mean over the whole batch."""
    zero = torch.zeros(4)
    loss, _ = preference_loss(zero, zero, 1.0, zero, torch.tensor([True, True, False, False]))
    close(loss, LOG2, 1e-6)


@pytest.mark.parametrize("rule", LAMBDAS)
def test_straight_through_keeps_the_value(rule):
    """A stabilizer changes the gradient only: loss curves of two rules can be compared."""
    a = randn(4)
    vanilla, other = (cpo_grad(*a, beta=1.7, stabilizer=r, strength=STRENGTH[r])
                      for r in ("none", rule))
    close(other[0], vanilla[0])
    close(other[1]["margin"], vanilla[1]["margin"])


def test_straight_through_changes_the_gradient():
    """Pairwise different, `clamped` from `balance` included."""
    grads = [cpo_grad(*randn(4), beta=1.7, stabilizer=rule, strength=STRENGTH[rule])[2]
             for rule in RULES]
    assert min((a - b).abs().max() for i, a in enumerate(grads) for b in grads[:i]) > 1e-3


@pytest.mark.parametrize("rule", ["constant", "safeguard", "balance", "clamped"])
def test_straight_through_is_exact_in_float32(rule):
    """At the first step u is exactly 0, whatever lam: a rounding error would show as an accuracy
    above 0."""
    eps, z_win, z_lose = randn(3, (64, 3, 2, 2), dtype=torch.float32)
    _, logs = cpo_loss(eps, eps, z_win, z_lose, beta=5000.0, stabilizer=rule,
                       strength=STRENGTH[rule])
    assert (logs["margin"] == 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_lam_is_per_sample(rule):
    """The gradient of a batch is that of its samples one by one: no sample sees another's lam."""
    eps, eps_ref, z_win, z_lose = randn(4)
    scale = torch.tensor([0.1, 0.5, 1.0, 4.0], dtype=torch.float64).view(4, 1, 1, 1)
    eps = z_win + scale * (eps - z_win)  # very different |g_win|
    for beta in (0.5, None):
        options = dict(beta=beta, stabilizer=rule, strength=STRENGTH[rule])
        whole = cpo_grad(eps, eps_ref, z_win, z_lose, **options)[2]
        for i in range(4):
            close(whole[i:i + 1],
                  cpo_grad(*(x[i:i + 1] for x in (eps, eps_ref, z_win, z_lose)), **options)[2] / 4)


@pytest.mark.parametrize("rule, mu", [("safeguard", 0.3), ("balance", 0.0)])
def test_global_lam_breaks_a_sample(rule, mu):
    """One lam for the whole batch is not enough: somebody's winner gets worse. Sample 0 is near its
    winner, sample 1 far."""
    g_win, g_lose = batch((0.1, 0), (5, 1)), batch((1, 0), (0, 3))
    strength = mu if rule == "safeguard" else 1.0

    def worst(lam):
        """The smallest <g_win, update> - mu |g_win|^2: below 0 the bound is broken."""
        return mean(g_win * (g_win - lam.view(-1, 1, 1, 1) * g_lose) - mu * g_win**2).min()

    assert worst(restraint(rule, g_win, g_lose, strength)) > -1e-12
    assert worst(restraint(
        rule, g_win.view(1, 1, 1, -1), g_lose.view(1, 1, 1, -1), strength)) < -1e-2


# ------------------------------------------------------------------------ what each rule guarantees

def test_safeguard_never_raises_the_winner_error():
    """1,000 random triples: <g_win, update> >= mu |g_win|^2, and the bound is met exactly where the
    guard is at work."""
    g_win, g_lose = randn(2, (1000, 1, 2, 2))
    lam = restraint("safeguard", g_win, g_lose, 0.3)
    excess = mean(g_win * (g_win - lam.view(-1, 1, 1, 1) * g_lose)) - 0.3 * mean(g_win**2)
    assert excess.min() > -1e-12
    close(excess[lam < 1], torch.zeros_like(excess[lam < 1]))
    assert 100 < (lam < 1).sum() < 900 and lam.max() == 1 and lam.min() >= 0


@pytest.mark.parametrize("rule, loser_too", [("balance", True), ("clamped", False)])
def test_balance_moves_both_errors_the_right_way(rule, loser_too):
    """1,000 random triples: the winner's error never rises, the loser's never falls (clamped:
    while lam < 1)."""
    eps, z_win, z_lose = randn(3, (1000, 1, 2, 2))
    _, logs, grad = cpo_grad(eps, eps, z_win, z_lose, beta=1.0, stabilizer=rule, strength=1.0)
    # minus the rates of change of the errors
    winner, loser = mean(grad * (eps - z_win)), mean(grad * (eps - z_lose))
    assert winner.min() > -1e-12 and winner.max() > 1e-6
    loser = loser if loser_too else loser[logs["lam"] < 1]
    assert loser.max() < 1e-12 and loser.min() < -1e-6


def test_balance_conserves_the_sum_of_distances():
    """Small Euler steps: eps slides on the ellipse whose foci are the two targets, to its tip
    beyond z_win."""
    z_win, z_lose, eps_ref = picture(1, 0), picture(-1, 0), picture(-0.5, 0.5)
    total = (eps_ref - z_win).norm() + (eps_ref - z_lose).norm()
    eps = descend(eps_ref, z_win, z_lose, 600, 0.04, stabilizer="balance", strength=1.0)
    close((eps - z_win).norm() + (eps - z_lose).norm(), total, 0.02)
    close(eps, picture(total / 2, 0), 0.02)  # midpoint 0 + (S / 2) d / |d|


@pytest.mark.parametrize("rule, strength, limit, atol", [
    ("winner", 0.0, (1, 0), 1e-6),
    ("constant", 0.0, (1, 0), 1e-6),
    ("constant", 0.5, (3, 0), 1e-6),        # z_win + 1 d = 2 z_win - z_lose
    ("constant", 0.75, (7, 0), 1e-4),       # z_win + 3 d
    # lam jumps to 1 where the dot product changes sign: it chatters by a step
    ("safeguard", 0.5, (1, 0), 0.05),
])
def test_limit(rule, strength, limit, atol):
    """Where gradient descent on eps ends, from a point behind the loser and off the axis.
    d = (2, 0)."""
    eps = descend(picture(-1.5, 0.7), picture(1, 0), picture(-1, 0), 500,
                  0.3 if atol < 0.01 else 0.05, stabilizer=rule, strength=strength)
    close(eps, picture(*limit), atol)


def test_limit_of_clamped():
    """Between z_win and an overshoot of rho^2 / |d|, rho being the distance of the start from the
    axis."""
    rho = 0.7
    eps = descend(picture(-0.9, rho), picture(1, 0), picture(-1, 0), 400, 0.08,
                  stabilizer="clamped", strength=1.0)
    close(eps.flatten()[1], 0.0, 0.01)
    assert 0 < eps.flatten()[0] - 1 <= rho**2 / 2


def test_vanilla_has_no_limit():
    """It runs along d, past the winner: the winner's error falls, then rises, while loss and margin
    still improve."""
    z_win, z_lose, eps_ref = picture(1, 0), picture(-1, 0), picture(-1, 0.5)
    path = [descend(eps_ref, z_win, z_lose, steps, 0.3, stabilizer="none") for steps in (0, 8, 100)]
    logs = [cpo_loss(eps, eps_ref, z_win, z_lose, beta=0.1, stabilizer="none")[1] for eps in path]
    assert logs[0]["margin"] < logs[1]["margin"] < logs[2]["margin"]
    assert logs[1]["winner"] < logs[0]["winner"] < logs[2]["winner"]
    close(path[2].flatten()[1], 0.5)  # nothing pulls it to the axis


@pytest.mark.parametrize("rule", ["safeguard", "balance", "clamped"])
def test_no_gradient_where_the_reference_is_the_winner(rule):
    """So the reference must be the base model on the plain prompt: one that already predicts z_win
    teaches nothing."""
    eps, z_lose = randn(2)
    grad = cpo_grad(eps, eps, eps, z_lose, beta=1.7, stabilizer=rule, strength=0.85)[2]
    close(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("rule", LAMBDAS)
def test_dpo_gradient_is_finite_where_the_winner_is_met(rule):
    """lam is detached: the slope of |g_win| at 0 is infinite, and 0 times it would be nan."""
    eps_win, ref_win, eps_lose, ref_lose, goal_lose = randn(5)
    loss, _ = dpo_loss(eps_win.requires_grad_(), ref_win, eps_win.detach(), eps_lose, ref_lose,
                       goal_lose, 1.7, rule, 0.5)
    # not nan; rounding may leave 1e-19
    assert torch.autograd.grad(loss, eps_win)[0].abs().max() < 1e-15


# ---------------------------------------------------------------------------------------- precision

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    """To the bit, the loss of half-precision tensors is that of their float32 copies; the gradient
    has their dtype."""
    a = [x.to(dtype) for x in randn(6)]
    wide = [x.float() for x in a]
    for loss, count in ((cpo_loss, 4), (partial(dpo_loss, beta=200.0), 6), (sft_loss, 2)):
        half, full = loss(*a[:count]), loss(*wide[:count])
        assert half[0].dtype == torch.float32 and half[0] == full[0]
        assert all(torch.equal(half[1][name], full[1][name]) for name in full[1])
    assert cpo_grad(*a[:4])[2].dtype == dtype


def test_bfloat16_targets_that_are_close():
    """One bfloat16 step apart: in bfloat16 the four errors would round the margin away."""
    z_win, eps, eps_ref = (x.bfloat16() for x in randn(3))
    z_lose = z_win * (1 + 2**-7)
    margin = cpo_loss(eps, eps_ref, z_win, z_lose, beta=1000.0)[1]["margin"]
    exact = 1000 * mean((z_win.double() - z_lose.double()) * (eps.double() - eps_ref.double()))
    close(margin.double(), exact, 2e-3)
    assert exact.abs().max() > 1


def test_float64_stays():
    assert (cpo_loss(*randn(4))[0].dtype == dpo_loss(*randn(6), beta=200.0)[0].dtype
            == sft_loss(*randn(2))[0].dtype == torch.float64)


def test_margin_of_a_small_gap_is_not_rounding_noise():
    """Four errors of about 1 taken from one another would leave noise of 1e-7 beta; the products of
    differences do not."""
    eps_ref, middle, step, direction = randn(4, (16, 3, 8, 8), dtype=torch.float32)
    four = eps_ref + 1e-3 * step, eps_ref, middle + 1e-3 * direction, middle - 1e-3 * direction
    margin = cpo_loss(*four, beta=1e7, stabilizer="none")[1]["margin"]
    exact = cpo_loss(*(x.double() for x in four), beta=1e7, stabilizer="none")[1]["margin"]
    assert exact.abs().max() > 1
    torch.testing.assert_close(margin.double(), exact, rtol=1e-2, atol=1e-2)
