"""The theory in a world where the diffusion model is exact: closed forms, the limit and guarantee
of every stabilizer, and CPO by training.

Gradient flow runs on free outputs, through losses.cpo_loss: one prediction per x_t, no network. The
last two tests train a tiny one."""
import math

import pytest
import torch

from nanocpo.diffusion import Diffusion, guide
from nanocpo.losses import cpo_loss
from nanocpo.study.mixture import NEGATIVE, PLAIN, POSITIVE, flawed_world, train_residual

WORLD = flawed_world()
PROMPTS = (PLAIN, POSITIVE, NEGATIVE, (1, 0), (0, 1), (-1, 0), (1, -1))


def noised(count, seed=0, low=0.05, high=0.9, dtype=torch.float64):
    """Pictures that the plain caption asks for, noised: x_t (count, 2, 1, 1), alpha_bar
    (count,)."""
    g = torch.Generator().manual_seed(seed)
    x0, _ = WORLD.sample(count, PLAIN, g)
    alpha_bar = low + (high - low) * torch.rand(count, generator=g, dtype=torch.float64)
    a, s = alpha_bar.sqrt().view(-1, 1, 1, 1), (1 - alpha_bar).sqrt().view(-1, 1, 1, 1)
    return ((a * x0 + s * torch.randn(x0.shape, generator=g, dtype=torch.float64)).to(dtype),
            alpha_bar)


def predictions(xt, alpha_bar):
    """eps_ref, z_win, z_lose of the exact world."""
    return [WORLD.eps(xt, alpha_bar, prompt) for prompt in (PLAIN, POSITIVE, NEGATIVE)]


def mean(x):
    return x.flatten(1).mean(1)


def length(x):
    """Root mean square over channels and pixels, the |.| of docs/derivation.md: (B,)."""
    return mean(x * x).sqrt()


def close(a, b, atol):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype).expand_as(a), rtol=0, atol=atol)


# ------------------------------------------------------------------------------------- closed forms

@pytest.mark.parametrize("prompt", PROMPTS)
def test_eps_is_the_score_of_the_noised_density(prompt):
    """eps = -sqrt(1 - alpha_bar) grad log p_t (E1), the gradient by autograd."""
    xt, alpha_bar = noised(50)
    xt = (2 * xt).requires_grad_()                                # also where hardly any picture is
    score, = torch.autograd.grad(WORLD.log_prob(xt, alpha_bar, prompt).sum(), xt)
    close(WORLD.eps(xt, alpha_bar, prompt).detach(),
          -(1 - alpha_bar).sqrt().view(-1, 1, 1, 1) * score, 1e-10)


@pytest.mark.parametrize("prompt", [PLAIN, POSITIVE, (0, 1)])
def test_eps_is_the_mean_noise_at_xt(prompt):
    """Monte-Carlo from the definition E[eps | x_t] (E1): clean pictures, each weighted by how well
    it explains x_t."""
    xt, _ = noised(8, seed=1)
    for alpha_bar in (0.1, 0.5):
        x0, _ = WORLD.sample(200_000, prompt, torch.Generator().manual_seed(2))
        noise = (xt[:, None] - alpha_bar ** 0.5 * x0) / (1 - alpha_bar) ** 0.5     # (8, N, 2, 1, 1)
        share = (-0.5 * (noise ** 2).sum((2, 3, 4))).softmax(1)
        close(WORLD.eps(xt, alpha_bar, prompt), (share[..., None, None, None] * noise).sum(1), 0.03)


def test_density_is_normalised_and_its_samples_have_its_moments():
    """The integral of p_t is 1 and the plain density is the weighted sum of those of the four full
    annotations (E1)."""
    axis = torch.linspace(-8, 8, 321, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)[..., None, None]
    full = [(1, 1), (-1, 1), (1, -1), (-1, -1)]
    parts = [WORLD.weight[k] * WORLD.log_prob(grid, 0.7, a).exp() for k, a in enumerate(full)]
    density = WORLD.log_prob(grid, 0.7, PLAIN).exp()
    close(density.sum() * 0.05 ** 2, 1.0, 1e-9)
    close(density, sum(parts), 1e-12)
    x0, which = WORLD.sample(40_000, (0, 1), torch.Generator().manual_seed(0))
    close(torch.bincount(which, minlength=4) / 40_000.0, [0.02 / 0.34, 0.32 / 0.34, 0, 0], 0.01)
    close(torch.cov(x0[which == 1].flatten(1).T), WORLD.cov[1], 0.01)


def test_prompt_that_no_picture_answers():
    world = flawed_world()
    world.weight[0] = 0                                           # no masterpiece at all
    with pytest.raises(ValueError, match="no component"):
        world.eps(torch.zeros(1, 2, 1, 1), 0.5, POSITIVE)
    # and 0 times log 0 does not spoil the others
    assert world.eps(torch.zeros(1, 2, 1, 1), 0.5, (0, 1)).isfinite().all()


def test_annotation_per_sample():
    xt, alpha_bar = noised(3)
    together = WORLD.eps(xt, alpha_bar, [POSITIVE, NEGATIVE, (1, 0)])
    for i, prompt in enumerate((POSITIVE, NEGATIVE, (1, 0))):
        close(together[i:i + 1], WORLD.eps(xt[i:i + 1], alpha_bar[i:i + 1], prompt), 1e-12)


def test_gap_is_the_slope_of_the_reward():
    """grad r = -(z_win - z_lose) / sqrt(1 - alpha_bar) (E2, E3), and r itself by Bayes' rule from
    posterior shares."""
    xt, alpha_bar = noised(50)
    xt = xt.requires_grad_()
    reward = WORLD.reward(xt, alpha_bar, POSITIVE, NEGATIVE)
    slope, = torch.autograd.grad(reward.sum(), xt)
    _, z_win, z_lose = predictions(xt.detach(), alpha_bar)
    close(slope, -(z_win - z_lose) / (1 - alpha_bar).sqrt().view(-1, 1, 1, 1), 1e-10)
    shares = [WORLD.weight[k].log() + WORLD.log_prob(xt, alpha_bar, a)
              for k, a in ((0, POSITIVE), (3, NEGATIVE))]
    close(reward.detach(), (shares[0] - shares[1]).detach(), 1e-10)


def test_optimum_under_the_kl_penalty_is_the_reference_moved_along_the_gap():
    """p* ~ p_ref exp(r / beta) has eps* = eps_ref + d / beta at each noise level (E4)."""
    xt, alpha_bar = noised(50)
    xt = xt.requires_grad_()
    log_p = (WORLD.log_prob(xt, alpha_bar, PLAIN)
             + WORLD.reward(xt, alpha_bar, POSITIVE, NEGATIVE) / 0.7)
    score, = torch.autograd.grad(log_p.sum(), xt)
    eps_ref, z_win, z_lose = predictions(xt.detach(), alpha_bar)
    close(-(1 - alpha_bar).sqrt().view(-1, 1, 1, 1) * score, eps_ref + (z_win - z_lose) / 0.7,
          1e-10)


@pytest.mark.parametrize("prompt", [PLAIN, POSITIVE, (1, 0)])
def test_ddim_with_the_exact_eps_recovers_means_and_covariances(prompt):
    """2,000 points, 150 deterministic steps. The share, mean and covariance of each component come
    back."""
    diffusion = Diffusion("cosine", "eps")
    noise = torch.randn(2000, 2, 1, 1, generator=torch.Generator().manual_seed(0),
                        dtype=torch.float64)
    points = diffusion.sample(lambda xt, t: WORLD.eps(xt, diffusion.alpha_bar[t], prompt),
                              noise, 150).flatten(1)
    chosen = WORLD.chosen(prompt)[0].exp()
    which = ((points[:, None] - WORLD.mean) ** 2).sum(2).masked_fill(
        chosen == 0, torch.inf).argmin(1)
    close(torch.bincount(which, minlength=4) / 2000.0, chosen.float(), 0.03)
    for k in range(4):
        if chosen[k] > 0.1:
            some = points[which == k]
            close(some.mean(0), WORLD.mean[k], 0.05)
            close(torch.cov(some.T), WORLD.cov[k], 0.05)


# ------------------------------------------------------------ limits and guarantees on free outputs

XT, ALPHA_BAR = noised(300, seed=5)
REF, WIN, LOSE = predictions(XT, ALPHA_BAR)
GAP = WIN - LOSE
LONG = length(GAP) > 0.05             # where the two targets are nearly one there is nothing to see


def flow(rule, strength, steps, h, start=REF):
    """Gradient flow of losses.cpo_loss on free outputs in Euler steps, in the time in which its
    positive weight beta sigmoid(-u) is 1: yields eps at the start and after every step. The paths
    are those of the loss; only the speed on them is ours."""
    eps, beta = start.clone().requires_grad_(), 0.01
    yield start
    for _ in range(steps):
        loss, logs = cpo_loss(eps, REF, WIN, LOSE, beta, rule, strength)
        grad, = torch.autograd.grad(loss, eps)
        with torch.no_grad():
            eps -= h * grad * eps.numel() / (beta * logs["weight"].view(-1, 1, 1, 1))
        yield eps.detach().clone()


def shrinks(values, slack=1e-12):
    """Whether a list of (B,) tensors never rises."""
    return all((later <= earlier + slack).all() for earlier, later in zip(values, values[1:]))


@pytest.mark.parametrize("k", [0.0, 0.3, 0.5, 0.75])
def test_constant_ends_at_the_guided_target(k):
    """z_win + k / (1 - k) d (E12), which is guidance at scale 1 / (1 - k) (E17); the distance
    shrinks by the factor that (E12) says."""
    limit = WIN + k / (1 - k) * GAP
    path = list(flow("constant", k, 120, 0.25 / (1 - k)))
    distance = [length(eps - limit) for eps in path]
    assert shrinks(distance)
    close(distance[1], 0.75 * distance[0], 1e-10)
    close(path[-1], limit, 1e-10)
    close(limit, guide(WIN, LOSE, 1 / (1 - k)), 1e-10)


@pytest.mark.parametrize("s, beta", [(0.5, None), (1.0, None), (0.7, 0.3), (2.0, 0.1)])
def test_noisy_ends_at_the_optimum_of_the_kl_penalty(s, beta):
    """Its minimum is eps_ref + s d, whatever beta (E21): the optimum of (E4) with 1 / beta_R = s;
    nothing moves at right angles to the gap. Without the noise, or if both draws share it, the same
    descent runs past every point (E9)."""
    eps = (REF + 0.3 * torch.randn(REF.shape, generator=torch.Generator().manual_seed(0),
                                   dtype=torch.float64)).requires_grad_()
    optimizer = torch.optim.LBFGS([eps], max_iter=2000, max_eval=4000, tolerance_grad=1e-13,
                                  tolerance_change=1e-16, history_size=50,
                                  line_search_fn="strong_wolfe")

    def closure(rule="noisy"):
        optimizer.zero_grad()
        loss, _ = cpo_loss(eps, REF, WIN, LOSE, beta, rule, s)
        (1e3 * loss).backward()
        return 1e3 * loss
    optimizer.step(closure)
    close(eps.detach(), REF + s * GAP, 2e-4)
    _, logs = cpo_loss(eps, REF, WIN, LOSE, beta, "noisy", s)
    close(logs["place"] - logs["place_ref"], torch.full_like(logs["place"], s), 2e-4)
    assert logs["across"].max() < 2e-4
    further = cpo_loss(REF + 3 * s * GAP, REF, WIN, LOSE, beta, "none", s)[0]
    assert further < cpo_loss(REF + s * GAP, REF, WIN, LOSE, beta, "none", s)[0]
    assert cpo_loss(REF + 3 * s * GAP, REF, WIN, LOSE, beta, "noisy", s)[0] > logs["loss"].mean()


def test_winner_alone_is_regression():
    """lam = 0 ends at z_win (E11)."""
    path = list(flow("winner", 0.0, 100, 0.25))
    assert shrinks([length(eps - WIN) for eps in path])
    close(path[-1], WIN, 1e-8)


@pytest.mark.parametrize("mu", [0.2, 0.7])
def test_safeguard_never_raises_the_winner_error_and_ends_at_the_winner(mu):
    """|eps - z_win| falls at least as fast as exp(-mu s) (E13), from wherever eps_ref is."""
    h = 0.01
    path = list(flow("safeguard", mu, 1500, h))
    distance = [length(eps - WIN) for eps in path]
    # the bound at every step, and exactly what a step of length h adds
    for now, then, before, after in zip(distance, distance[1:], path, path[1:]):
        assert (then ** 2 <= (1 - 2 * h * mu) * now ** 2 + mean((after - before) ** 2)
                + 1e-12).all()
    # nearer than this an Euler step is longer than the way that is left
    chatter = (h / (2 * mu)) ** 0.5 * length(GAP)
    assert shrinks([torch.maximum(x, 1.2 * chatter) for x in distance])
    assert (distance[-1] < distance[0] * math.exp(-mu * 1500 * h) + 1.2 * chatter).all()


def test_balance_moves_both_errors_the_right_way_conserves_their_sum_and_ends_at_the_tip():
    """The winner's error never rises, the loser's never falls, S = |g_win| + |g_lose| stays (E14);
    limit: midpoint + S / 2 d / |d|."""
    path = list(flow("balance", 1.0, 1200, 0.01))
    win, lose = ([length(eps - z) for eps in path] for z in (WIN, LOSE))
    total = win[0] + lose[0]
    assert shrinks(win, 1e-9) and shrinks([-x for x in lose], 1e-9)
    assert ((win[-1] + lose[-1]) / total - 1).abs().max() < 0.02
    tip = (WIN + LOSE) / 2 + (total / length(GAP)).view(-1, 1, 1, 1) / 2 * GAP
    arrived = length(path[-1] - tip) / total
    assert (arrived[LONG].median() < 0.01
            and (arrived[LONG] < 0.1).double().mean() > 0.9), arrived.max()


def test_balance_below_full_strength_ends_at_the_winner():
    """lam = 0.8 |g_win| / |g_lose|: the winner's error falls at least as exp(-0.2 s), since nothing
    else stops it (E14)."""
    path = list(flow("balance", 0.8, 1500, 0.02))
    distance = [length(eps - WIN) for eps in path]
    assert shrinks(distance, 1e-9)
    assert (distance[-1] <= distance[0] * math.exp(-0.2 * 30) * 1.05).all()


def side_and_offset(eps):
    """How far eps is from the midpoint along d (> 0: nearer to the winner), and its distance rho
    from the axis: (B,) each."""
    off = eps - (WIN + LOSE) / 2
    along = mean(off * GAP) / length(GAP)
    return along, (mean(off * off) - along ** 2).clamp(min=0).sqrt()


def test_clamped_overshoots_the_winner_by_at_most_rho_squared_over_the_gap():
    """From the loser's side of the bisector (E15). On the winner's side it keeps S = |g_win| +
    |g_lose|, and that is the bound."""
    path = list(flow("clamped", 1.0, 1200, 0.01))
    assert shrinks([length(eps - WIN) for eps in path], 1e-9)
    along, rho = side_and_offset(REF)
    beyond = side_and_offset(path[-1])[0] - length(GAP) / 2
    behind = LONG & (along < 0)
    delta = (length(GAP) ** 2 / 4 + rho ** 2).sqrt() - length(GAP) / 2
    assert (50 < behind.sum() and (beyond - delta)[behind].abs().max() < 0.01
            and (delta <= rho ** 2 / length(GAP) + 1e-12)[behind].all())
    start = LONG & (along > 0)
    total = length(REF - WIN) + length(REF - LOSE)
    assert start.sum() > 5 and (beyond[start] <= (total - length(GAP))[start] / 2 + 0.01).all()


def test_clamped_from_the_winners_side_can_overshoot_more():
    """So (E15) needs its condition: from (1, 1) with the targets at (1, 0) and (-1, 0), rho^2 / |d|
    = 0.5; it ends 0.618 beyond."""
    eps_ref, z_win, z_lose = (torch.tensor(x, dtype=torch.float64).view(1, 2, 1, 1)
                              for x in ((1, 1), (1, 0), (-1, 0)))
    eps = eps_ref.clone().requires_grad_()
    for _ in range(600):
        loss, logs = cpo_loss(eps, eps_ref, z_win, z_lose, 1e-3, "clamped", 1.0)
        grad, = torch.autograd.grad(loss, eps)
        eps.data -= 0.02 * grad * 2 / (1e-3 * logs["weight"])
    close(eps.detach().flatten(), [5 ** 0.5 / 2 + 0.5, 0.0], 0.02)


def test_none_drifts_along_the_gap_like_a_logarithm():
    """The gradient flow of vanilla CPO solves u + exp(u) - 1 = beta^2 |d|^2 s exactly (E9, E10): no
    limit, growth by a logarithm."""
    beta, eps, clock, margins = (4 / length(GAP) ** 2, REF.clone().requires_grad_(),
                                 torch.zeros(len(REF)).double(), [])
    for step in range(1, 1001):
        loss, logs = cpo_loss(eps, REF, WIN, LOSE, beta, "none")
        grad, = torch.autograd.grad(loss, eps)
        # time steps that grow as the sigmoid saturates: (B,)
        h = 0.01 / (beta ** 2 * length(GAP) ** 2 * logs["weight"])
        eps.data -= h.view(-1, 1, 1, 1) * grad * eps.numel()
        clock += h * beta ** 2 * length(GAP) ** 2
        if step % 250 == 0:
            u = cpo_loss(eps.detach(), REF, WIN, LOSE, beta, "none")[1]["margin"]
            close((u + u.exp() - 1)[LONG] / clock[LONG], 1.0, 0.02)
            margins.append((u, clock.clone()))
    (before, early), (last, late) = margins[-2:]
    # in the end u grows as the logarithm of time
    close((last - before)[LONG], (late / early).log()[LONG], 0.05)
    moved = eps.detach() - REF
    along = (mean(moved * GAP) / mean(GAP * GAP)).view(-1, 1, 1, 1) * GAP
    close((moved - along)[LONG], 0.0, 1e-9)                       # and nothing pulls it to the axis


def test_winner_error_of_vanilla_falls_then_rises():
    """On eps_ref + a d it is least at a* = <d, z_win - eps_ref> / |d|^2 (E9), although the margin
    goes on growing."""
    best = mean(GAP * (WIN - REF)) / mean(GAP * GAP)
    path = list(flow("none", 1.0, 400, 0.01))
    error = torch.stack([length(eps - WIN) for eps in path])      # (steps, B)
    inside = LONG & (best > 0.02) & (best < 3.9)
    assert inside.sum() > 50
    # one step of flow time 0.01 moves a by 0.01
    close(error.argmin(0)[inside] * 0.01, best[inside], 0.0101)


# -------------------------------------------------------------------------------------- by training

@pytest.fixture(scope="module")
def held_out():
    return noised(1000, seed=77, high=0.8, dtype=torch.float32)


def train(rule, strength, steps, beta, held_out):
    """Train; what the network adds to the reference at the held-out points, after a half and after
    all of the steps."""
    marks = []
    train_residual(WORLD, steps, beta, rule, strength,
                   watch=lambda step, net: marks.append(net(*held_out).detach())
                   if step in (steps // 2, steps) else None)
    return marks


def test_a_tiny_network_trained_with_cpo_lands_on_the_guided_field(held_out):
    """600 steps of `constant` 0.5: within 12 % (root mean square over the plane and noise levels)
    of z_win + d (E12), from 97 %."""
    eps_ref, z_win, z_lose = predictions(*held_out)
    limit = guide(z_win, z_lose, 2.0)
    half, full = train("constant", 0.5, 600, 0.3, held_out)
    size = lambda x: x.square().mean().sqrt()
    assert size(eps_ref - limit) / size(limit) > 0.9
    assert size(eps_ref + full - limit) / size(eps_ref - limit) < 0.12
    assert abs(size(full) / size(half) - 1) < 0.05                # it has arrived


def test_a_tiny_network_trained_without_a_stabilizer_keeps_growing(held_out):
    """The same 600 steps of `none`: the displacement grows on, and its winner's error is far above
    that of the reference (E10)."""
    eps_ref, z_win, z_lose = predictions(*held_out)
    half, full = train("none", 1.0, 600, 0.3, held_out)
    size = lambda x: x.square().mean().sqrt()
    assert (size(full) > 1.1 * size(half)
            and size(full) > 5 * size(guide(z_win, z_lose, 2.0) - eps_ref))
    assert size(eps_ref + full - z_win) > 2 * size(eps_ref - z_win)
