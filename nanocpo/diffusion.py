"""Diffusion: noise schedules, the forward process, eps / v / x0 conversions, one sampler for DDPM and DDIM, guidance.

x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, t = 0 .. T-1 (2006.11239, equation 4). Tensors are (B, C, H, W), t is (B,) int64.
"""
import torch


def cosine_alpha_bar(steps=1000):
    """alpha_bar (steps,) float64 of the cosine schedule; beta is clipped at 0.999 (2102.09672, equation 17)."""
    x = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((x + 0.008) / 1.008 * torch.pi / 2) ** 2
    return torch.cumprod(1 - (1 - f[1:] / f[:-1]).clamp(max=0.999), 0)


def scaled_linear_alpha_bar(steps=1000):
    """alpha_bar (steps,) float64 of Stable Diffusion's schedule: beta is the square of a line (2112.10752)."""
    return torch.cumprod(1 - torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, steps, dtype=torch.float64) ** 2, 0)


SCHEDULES = {"cosine": cosine_alpha_bar, "scaled_linear": scaled_linear_alpha_bar}
SPACINGS, SAMPLERS = ("late", "leading", "trailing"), ("list", "ddim")


def zero_terminal_snr(alpha_bar):
    """Shift and stretch sqrt(alpha_bar) so that it ends at exactly 0: the last step is pure noise (2305.08891, algorithm 1)."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def guide(positive, negative, scale):
    """Classifier-free guidance (2207.12598) from the negative prompt's prediction to the positive one's, on all channels;
    scale 1 is the positive prompt alone; scale 1 / (1 - k) is the limit of CPO's rule `constant` (E17)."""
    return negative + scale * (positive - negative)


class Diffusion:
    """A schedule and what the model predicts: "eps", or "v" = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (2202.00512).

    spacing: which timesteps are sampled ("late" is the toy's, the others are Stable Diffusion's). sampler: where a step leads.
    "list": to the next of them, and from the last to the picture: with eta 0 this is Euler's method on the probability-flow ODE
    (in x / sqrt(alpha_bar) it is the line x0 + sigma eps), with eta 1 it is DDPM. "ddim": to t - T // count, and from the last to
    alpha_bar_0, as Stable Diffusion does."""

    def __init__(self, schedule="cosine", prediction="v", steps=1000, zero_snr=False, spacing="late", sampler="list"):
        if schedule not in SCHEDULES or prediction not in ("eps", "v"):
            raise ValueError(f"schedule is one of {', '.join(SCHEDULES)} and prediction eps or v, not {schedule}, {prediction}")
        if spacing not in SPACINGS or sampler not in SAMPLERS:
            raise ValueError(f"spacing is one of {', '.join(SPACINGS)} and sampler {' or '.join(SAMPLERS)}, not {spacing}, {sampler}")
        if zero_snr and prediction == "eps":
            raise ValueError("zero-terminal SNR needs prediction v: pure noise does not tell x0 from eps")
        self.prediction, self.steps, self.spacing, self.sampler = prediction, steps, spacing, sampler
        self.alpha_bar = SCHEDULES[schedule](steps)
        if zero_snr:
            self.alpha_bar = zero_terminal_snr(self.alpha_bar)

    def scales(self, t, like):
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) for t (B,), shaped (B, 1, 1, 1) and in the dtype of `like`."""
        alpha_bar = self.alpha_bar[t.cpu()].view(-1, *[1] * (like.dim() - 1))       # Apple's GPUs have no float64
        return alpha_bar.sqrt().to(like), (1 - alpha_bar).sqrt().to(like)

    def q_sample(self, x0, t, noise):
        """The forward process (E1): x_t from x_0 and noise, both (B, C, H, W)."""
        a, s = self.scales(t, x0)
        return a * x0 + s * noise

    def goal(self, x0, t, noise):
        """What the model should predict at x_t: the noise, or the velocity."""
        a, s = self.scales(t, x0)
        return noise if self.prediction == "eps" else a * noise - s * x0

    def x0_and_eps(self, prediction, xt, t):
        """The model's prediction at x_t -> (x0, eps) that it implies."""
        a, s = self.scales(t, xt)
        if self.prediction == "eps":
            return (xt - s * prediction) / a, prediction
        return a * xt - s * prediction, s * xt + a * prediction

    def timesteps(self, count):
        """`count` different timesteps, falling. leading: multiples of T // count, plus 1; trailing: even parts from T-1 down.
        late: the first is pure noise (2305.08891); where few are asked for, the noisy end, where hue and subject are decided,
        takes the smaller steps (ours: 20 of these do what 60 even ones do, docs/log.md)."""
        most = self.steps - (self.spacing == "leading")                   # leading adds 1, and T is no timestep
        if not 1 <= count <= most:
            raise ValueError(f"sampling steps must be between 1 and {most}, not {count}")
        if self.spacing == "leading":
            return torch.arange(count - 1, -1, -1) * (self.steps // count) + 1
        if self.spacing == "trailing":
            step = (self.steps - self.steps / count) - self.steps         # -T / count, but halves round as numpy.arange's in diffusers
            return (self.steps + torch.arange(count, dtype=torch.float64) * step).round().long() - 1
        i = torch.arange(count, dtype=torch.float64)                      # one for each, and the T - count left over go to late steps
        return ((self.steps - count) * (1 - (i / count) ** 1.5)).round().long() + count - 1 - torch.arange(count)

    @torch.no_grad()
    def sample(self, predict, xt, count=12, eta=0.0, generator=None, clip=None):
        """Run the reverse process from noise xt (B, C, H, W). predict(xt, t) -> eps or v.

        eta 0 is DDIM (2010.02502, equation 12), eta 1 with sampler "list" is DDPM with the posterior variance (E6); noise is added
        unless a step leads to the picture itself, and drawn on the CPU, as the generator's. clip: a function that brings x0 back
        among the latents of pictures; None: no bounds."""
        times = self.timesteps(count)
        for i, now in enumerate(times):
            t = torch.full((len(xt),), int(now), device=xt.device)
            x0, eps = self.x0_and_eps(predict(xt, t), xt, t)
            a_now, a_next = self.alpha_bar[now], self.alpha_bar[times[i + 1]] if i + 1 < count else torch.tensor(1.0)
            if self.sampler == "ddim":
                a_next = self.alpha_bar[max(int(now) - self.steps // count, 0)]
            if clip:
                x0 = clip(x0)
                eps = (xt - a_now.sqrt().to(xt) * x0) / (1 - a_now).sqrt().to(xt)
            sigma = eta * ((1 - a_next) / (1 - a_now) * (1 - a_now / a_next)).sqrt()
            xt = a_next.sqrt().to(xt) * x0 + (1 - a_next - sigma ** 2).clamp(min=0).sqrt().to(xt) * eps
            if a_next < 1 and eta > 0:
                xt = xt + sigma.to(xt) * torch.randn(xt.shape, generator=generator, dtype=xt.dtype).to(xt.device)
        return xt
