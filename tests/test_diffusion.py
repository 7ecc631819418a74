"""Schedules, forward process and sampler against formulas worked out by hand and a Gaussian whose
noise is known exactly."""
import math

import pytest
import torch

from nanocpo.diffusion import Diffusion, cosine_alpha_bar, guide, scaled_linear_alpha_bar

BOTH = pytest.mark.parametrize("schedule", ["cosine", "scaled_linear"])
EACH = pytest.mark.parametrize("prediction", ["eps", "v"])
ALL = pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
MEAN, STD = 0.3, 0.5                                          # of the Gaussian picture


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def answer(diffusion, x0_of):
    """A model that always means x0_of(xt, alpha_bar): what it says in the terms of the
    diffusion."""
    def predict(xt, t):
        a, s = diffusion.alpha_bar[t[0]].sqrt(), (1 - diffusion.alpha_bar[t[0]]).sqrt()
        if diffusion.prediction == "flow":
            a, s = a / (a + s), s / (a + s)
        x0 = x0_of(xt, diffusion.alpha_bar[t[0]])
        eps = (xt - a * x0) / s
        return {"eps": eps, "v": a * eps - s * x0, "flow": eps - x0}[diffusion.prediction]
    return predict


def gaussian(xt, alpha_bar):
    """E[x0 | xt] for x0 ~ N(MEAN, STD^2)."""
    a = alpha_bar.sqrt()
    return MEAN + a * STD ** 2 * (xt - a * MEAN) / (alpha_bar * STD ** 2 + 1 - alpha_bar)


@pytest.mark.parametrize("t", [0, 1, 249, 500, 900, 998])
def test_cosine_by_its_formula(t):
    def f(x):
        return math.cos((x + 0.008) / 1.008 * math.pi / 2) ** 2
    assert float(cosine_alpha_bar()[t]) == pytest.approx(f((t + 1) / 1000) / f(0), rel=1e-9)


def test_cosine_clips_the_last_beta():
    # unclipped, alpha_bar would end at 0 and the conversions would divide by it
    alpha_bar = cosine_alpha_bar()
    assert float(alpha_bar[-1] / alpha_bar[-2]) == pytest.approx(0.001, rel=1e-9)


def test_scaled_linear_by_hand():
    alpha_bar = scaled_linear_alpha_bar()
    assert float(alpha_bar[0]) == pytest.approx(0.99915, abs=1e-12)
    assert float(alpha_bar[-1]) == pytest.approx(0.004660, abs=5e-7)
    middle = (0.00085 ** 0.5 + (0.012 ** 0.5 - 0.00085 ** 0.5) * 499 / 999) ** 2
    assert float(1 - alpha_bar[499] / alpha_bar[498]) == pytest.approx(middle, rel=1e-9)


@BOTH
@pytest.mark.parametrize("steps", [10, 1000])
def test_alpha_bar_falls_between_one_and_zero(schedule, steps):
    alpha_bar = Diffusion(schedule, steps=steps).alpha_bar
    assert alpha_bar.shape == (steps,) and alpha_bar.dtype == torch.float64
    assert (alpha_bar.diff() < 0).all() and 0 < alpha_bar[-1] and alpha_bar[0] < 1


@BOTH
def test_q_sample_has_the_right_moments(schedule):
    diffusion = Diffusion(schedule)
    t = torch.tensor([0, 300, 700, 999])
    x0 = torch.full((4, 1, 200, 200), 0.8)
    xt = diffusion.q_sample(x0, t, randn(4, 1, 200, 200).float()).double()
    alpha_bar = diffusion.alpha_bar[t]
    # 4 standard errors
    assert xt.mean((1, 2, 3)).tolist() == pytest.approx((0.8 * alpha_bar.sqrt()).tolist(), abs=0.02)
    assert xt.var((1, 2, 3)).tolist() == pytest.approx((1 - alpha_bar).tolist(), rel=0.03)


@BOTH
@ALL
def test_x0_and_eps_round_trip(schedule, prediction):
    diffusion = Diffusion(schedule, prediction)
    t = torch.tensor([0, 1, 500, 950, 998])
    x0, noise = randn(5, 3, 4, 4, seed=1), randn(5, 3, 4, 4, seed=2)
    xt = diffusion.q_sample(x0, t, noise)
    got_x0, got_noise = diffusion.x0_and_eps(diffusion.goal(x0, t, noise), xt, t)
    assert xt.dtype == torch.float64
    torch.testing.assert_close(got_x0, x0, atol=1e-9, rtol=0)
    torch.testing.assert_close(got_noise, noise, atol=1e-9, rtol=0)


def test_the_schedule_is_looked_up_on_the_cpu_and_comes_in_the_type_of_the_picture():
    """It is float64, which Apple's GPUs do not have."""
    class OnCPU:
        def __getitem__(self, t):
            assert t.device.type == "cpu"
            return alpha_bar[t]                                   # and nothing else: no .to(device)
    diffusion = Diffusion()
    alpha_bar, diffusion.alpha_bar = diffusion.alpha_bar, OnCPU()
    a, s = diffusion.scales(torch.tensor([0, 999]), torch.zeros(2, 3, 4, 4))
    assert a.dtype == s.dtype == torch.float32 and a.shape == (2, 1, 1, 1)
    torch.testing.assert_close(a.flatten().double(), alpha_bar[[0, 999]].sqrt(), atol=1e-7, rtol=0)


def test_goal_by_hand():
    x0, noise, t = randn(2, 3, 4, 4, seed=1), randn(2, 3, 4, 4, seed=2), torch.tensor([100, 800])
    assert torch.equal(Diffusion(prediction="eps").goal(x0, t, noise), noise)
    v = Diffusion("scaled_linear", "v")
    for i in range(2):
        alpha_bar = float(scaled_linear_alpha_bar()[t[i]])
        by_hand = math.sqrt(alpha_bar) * noise[i] - math.sqrt(1 - alpha_bar) * x0[i]
        torch.testing.assert_close(v.goal(x0, t, noise)[i], by_hand, atol=1e-12, rtol=0)


def test_flow_matching_is_the_straight_line():
    """x_t = (1 - sigma) x_0 + sigma eps, y = eps - x_0, sigma = (t + 1) / T (E20); at pure noise
    too the prediction tells the picture."""
    diffusion, t = Diffusion("straight", "flow"), torch.tensor([0, 249, 998, 999])
    x0, noise = randn(4, 3, 4, 4, seed=1), randn(4, 3, 4, 4, seed=2)
    sigma = torch.tensor([0.001, 0.25, 0.999, 1.0], dtype=torch.float64).view(4, 1, 1, 1)
    xt, y = diffusion.q_sample(x0, t, noise), diffusion.goal(x0, t, noise)
    torch.testing.assert_close(xt, (1 - sigma) * x0 + sigma * noise, atol=1e-12, rtol=0)
    torch.testing.assert_close(y, noise - x0, atol=1e-12, rtol=0)
    got_x0, got_noise = diffusion.x0_and_eps(y, xt, t)
    torch.testing.assert_close(got_x0, xt - sigma * y, atol=1e-12, rtol=0)
    torch.testing.assert_close(got_noise, xt + (1 - sigma) * y, atol=1e-12, rtol=0)
    torch.testing.assert_close(got_x0, x0, atol=1e-12, rtol=0)
    # a step of the sampler is Euler's: x + (sigma' - sigma) y, and the last one leads to x_0
    seen = []
    out = diffusion.sample(lambda x, t: seen.append((x, t)) or y[:1] * (1 + int(t[0]) / 1000),
                           xt[3:], 2)
    (first, t_first), (second, t_second) = seen
    sigmas = [(int(t[0]) + 1) / 1000 for t in (t_first, t_second)]
    moved = first + (sigmas[1] - sigmas[0]) * y[:1] * (1 + int(t_first[0]) / 1000)
    torch.testing.assert_close(second, moved, atol=1e-12, rtol=0)
    torch.testing.assert_close(out, second - sigmas[1] * y[:1] * (1 + int(t_second[0]) / 1000),
                               atol=1e-12, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_flow_on_another_schedule_is_v_in_other_units(eta):
    """Divided by a + s, every x_t of the v-model is one of flow matching: also its noisy steps."""
    v, flow = (Diffusion("scaled_linear", prediction, steps=50) for prediction in ("v", "flow"))
    seen, unit = {"v": [], "flow": []}, lambda t: sum(v.shares(v.alpha_bar[t]))
    x0, start = randn(1, 2, 3, 3, seed=1), randn(1, 2, 3, 3, seed=2)
    outs = [diffusion.sample(
        lambda x, t: seen[diffusion.prediction].append((x, int(t[0]))) or answer(
            diffusion, lambda xt, _: x0)(x, t),
        start / (unit(49) if diffusion is flow else 1), 4, eta, torch.Generator().manual_seed(3))
        for diffusion in (v, flow)]
    assert len(seen["v"]) == len(seen["flow"]) == 4
    for (a, t), (b, _) in zip(seen["v"], seen["flow"]):
        torch.testing.assert_close(a / unit(t), b, atol=1e-12, rtol=0)
    torch.testing.assert_close(*outs, atol=1e-12, rtol=0)


def test_timesteps_for_every_count():
    diffusion = Diffusion()
    for count in range(1, 1001):
        times = diffusion.timesteps(count)
        assert (len(times) == count and times[0] == 999 and times[-1] >= 0
                and (times.diff() < 0).all()), count
    # 996 (1 - (i / 4)^1.5) + 3 - i = 999, 873.5, 644.9, 349.1
    assert diffusion.timesteps(4).tolist() == [999, 874, 645, 349]
    assert diffusion.timesteps(1000).tolist() == list(range(999, -1, -1))


@BOTH
@EACH
def test_ddim_recovers_a_gaussian(schedule, prediction):
    # with eta 0 the sampler is affine in a Gaussian's noise, so two starts tell mean and deviation
    # exactly
    diffusion = Diffusion(schedule, prediction)
    last = diffusion.alpha_bar[-1]
    mean, std = last.sqrt() * MEAN, (last * STD ** 2 + 1 - last).sqrt()
    start = torch.stack([mean, mean + std]).view(2, 1, 1, 1)
    low, high = diffusion.sample(answer(diffusion, gaussian), start, count=1000).flatten().tolist()
    assert low == pytest.approx(MEAN, abs=1e-3) and high - low == pytest.approx(STD, abs=6e-3)


@BOTH
@EACH
def test_ddpm_recovers_a_gaussian(schedule, prediction):
    diffusion = Diffusion(schedule, prediction)
    start = diffusion.q_sample(MEAN + STD * randn(20000, 1, 1, 1), torch.full((20000,), 999),
                               randn(20000, 1, 1, 1, seed=1))
    generator = torch.Generator().manual_seed(2)
    out = diffusion.sample(answer(diffusion, gaussian), start, count=1000, eta=1.0,
                           generator=generator)
    assert (float(out.mean()) == pytest.approx(MEAN, abs=0.015)
            and float(out.std()) == pytest.approx(STD, abs=0.015))
    # the start is forgotten
    assert torch.corrcoef(torch.stack([start.flatten(), out.flatten()]))[0, 1].abs() < 0.2


@BOTH
@EACH
def test_every_ddpm_step_is_the_posterior(schedule, prediction):
    # mean and variance of q(x_{t-1} | x_t, x_0), equations 6 and 7 of 2006.11239, with the very
    # noise that the sampler draws
    diffusion, x0, start = (Diffusion(schedule, prediction, steps=6), randn(2, 3, 4, 4, seed=1),
                            randn(2, 3, 4, 4, seed=2))
    seen, predict = [], answer(diffusion, lambda xt, _: x0)
    generator = torch.Generator().manual_seed(3)
    out = diffusion.sample(lambda xt, t: seen.append((xt, t)) or predict(xt, t), start, 6, 1.0,
                           generator)
    generator, alpha_bar = torch.Generator().manual_seed(3), [1.0] + diffusion.alpha_bar.tolist()
    for i, t in enumerate([5, 4, 3, 2, 1, 0]):
        assert seen[i][1].tolist() == [t, t] and seen[i][1].dtype == torch.int64
        now, before = alpha_bar[t + 1], alpha_bar[t]
        beta = 1 - now / before
        mean = (math.sqrt(before) * beta / (1 - now) * x0
                + math.sqrt(1 - beta) * (1 - before) / (1 - now) * seen[i][0])
        beta_tilde = (1 - before) / (1 - now) * beta
        noise = torch.randn(start.shape, generator=generator, dtype=torch.float64) if t else 0
        torch.testing.assert_close(seen[i + 1][0] if t else out,
                                   mean + math.sqrt(beta_tilde) * noise, atol=1e-9, rtol=0)


@EACH
def test_eta_scales_the_noise_of_a_skipping_step(prediction):
    # equations 12 and 16 of 2010.02502 from t = 9 to t = 5
    diffusion = Diffusion("scaled_linear", prediction, steps=10)
    x0, start = randn(1, 2, 3, 3, seed=1), randn(1, 2, 3, 3, seed=2)
    seen, predict = [], answer(diffusion, lambda xt, _: x0)
    diffusion.sample(lambda xt, t: seen.append(xt) or predict(xt, t), start, 2, 0.6,
                     torch.Generator().manual_seed(3))
    now, to = float(diffusion.alpha_bar[9]), float(diffusion.alpha_bar[5])
    sigma = 0.6 * math.sqrt((1 - to) / (1 - now) * (1 - now / to))
    eps = (start - math.sqrt(now) * x0) / math.sqrt(1 - now)
    by_hand = (math.sqrt(to) * x0 + math.sqrt(1 - to - sigma ** 2) * eps
               + sigma * randn(1, 2, 3, 3, seed=3))
    torch.testing.assert_close(seen[1], by_hand, atol=1e-9, rtol=0)


@ALL
@pytest.mark.parametrize("count", [1, 3])
def test_the_last_step_adds_no_noise(prediction, count):
    diffusion, x0 = Diffusion("scaled_linear", prediction), randn(2, 3, 4, 4, seed=1)
    outs = [diffusion.sample(answer(diffusion, lambda xt, _: x0), randn(2, 3, 4, 4, seed=2), count,
                             1.0, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    for out in outs:
        torch.testing.assert_close(out, x0, atol=1e-12, rtol=0)
    if count == 1:
        assert torch.equal(*outs)


def test_eta_zero_needs_no_randomness_and_eta_one_does():
    diffusion, start = Diffusion(), randn(1, 1, 4, 4)
    predict, before = answer(diffusion, gaussian), torch.manual_seed(0).get_state()
    still = diffusion.sample(predict, start, 5)
    assert torch.equal(before, torch.get_rng_state())
    noisy = [diffusion.sample(predict, start, 5, 1.0, torch.Generator().manual_seed(seed))
             for seed in (0, 0, 1)]
    assert (torch.equal(noisy[0], noisy[1]) and not torch.equal(noisy[1], noisy[2])
            and not torch.equal(still, noisy[0]))


@EACH
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_clip_bounds_x0_and_the_noise_follows(prediction, eta):
    diffusion, start, seen = Diffusion("scaled_linear", prediction), randn(1, 2, 3, 3), []
    predict = answer(diffusion, lambda xt, _: 5 + 0 * xt)
    out = diffusion.sample(lambda xt, t: seen.append(xt) or predict(xt, t), start, 2, eta,
                           torch.Generator().manual_seed(1), clip=lambda x0: x0.clamp(-1, 1))
    torch.testing.assert_close(out, torch.ones_like(out), atol=1e-12, rtol=0)
    if eta == 0:                     # the eps that belongs to the clipped x0, not the predicted one
        now, to = diffusion.alpha_bar[999], diffusion.alpha_bar[645]
        by_hand = to.sqrt() + (1 - to).sqrt() * (start - now.sqrt()) / (1 - now).sqrt()
        torch.testing.assert_close(seen[1], by_hand, atol=1e-12, rtol=0)


def test_sample_keeps_dtype_and_records_no_gradient():
    weight = torch.ones((), requires_grad=True)
    out = Diffusion().sample(lambda xt, t: xt * weight, torch.ones(2, 1, 4, 4), 3, 1.0)
    assert out.dtype == torch.float32 and not out.requires_grad and out.isfinite().all()


def test_guide():
    positive, negative = randn(2, 12, 3, 3, seed=1), randn(2, 12, 3, 3, seed=2)
    torch.testing.assert_close(guide(positive, negative, 1.0), positive)
    assert torch.equal(guide(positive, negative, 0.0), negative)
    # away from the negative
    torch.testing.assert_close(guide(positive, negative, 3.0), 3 * positive - 2 * negative)
    assert (guide(positive, negative, 3.0) != positive).all()                     # on every channel


@pytest.mark.parametrize("arguments", [("linear", "v"), ("cosine", "x0"), ("cosine", "epsilon"),
                                       ("", "eps")])
def test_unknown_schedule_or_prediction_is_refused(arguments):
    with pytest.raises(ValueError, match="cosine, scaled_linear"):
        Diffusion(*arguments)


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_impossible_counts_are_refused(count):
    with pytest.raises(ValueError, match=f"between 1 and 1000, not {count}"):
        Diffusion().sample(lambda xt, t: xt, torch.zeros(1, 1, 2, 2), count)
