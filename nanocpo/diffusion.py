"""Diffusion: noise schedules, the forward process, what a model predicts, guidance, and one sampler
for DDPM, DDIM and flow matching.

    x_t = a x_0 + s eps       a = sqrt(alpha_bar_t), s = sqrt(1 - alpha_bar_t)     (E1)

(2006.11239, equation 4). Flow matching divides a and s by their sum, so that x_t lies on the
straight line from picture to noise (E20). t = 0 .. T-1. Tensors are (B, C, H, W), t is (B,) int64.
"E1" and the like are equations of docs/derivation.md.
"""
import torch

from .utils.device import send


def cosine_alpha_bar(steps=1000):
    """alpha_bar (steps,) float64 of the cosine schedule; beta is clipped at 0.999 (2102.09672,
    equation 17)."""
    x = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((x + 0.008) / 1.008 * torch.pi / 2) ** 2
    return torch.cumprod(1 - (1 - f[1:] / f[:-1]).clamp(max=0.999), 0)


def scaled_linear_alpha_bar(steps=1000):
    """alpha_bar (steps,) float64 of Stable Diffusion's schedule: beta is the square of a line
    (2112.10752)."""
    beta = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, steps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - beta, 0)


def straight_alpha_bar(steps=1000):
    """alpha_bar (steps,) float64 for which s / (a + s) is (t + 1) / T: flow matching in even steps
    (E20; 2209.03003)."""
    s = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    return (1 - s) ** 2 / ((1 - s) ** 2 + s ** 2)


SCHEDULES = {"cosine": cosine_alpha_bar, "scaled_linear": scaled_linear_alpha_bar,
             "straight": straight_alpha_bar}
# What a model predicts, p x_0 + q eps at x_t = a x_0 + s eps: (p, q) from (a, s).
PREDICTIONS = {"eps": lambda a, s: (0, 1),         # the noise (2006.11239)
               "v": lambda a, s: (-s, a),          # the velocity on the circle (2202.00512)
               "flow": lambda a, s: (-1, 1)}       # the velocity on the line (2209.03003)
SPACINGS = ("power", "leading", "trailing")


def zero_terminal_snr(alpha_bar):
    """Shift and stretch sqrt(alpha_bar) so that it ends at exactly 0: the last step is pure noise
    (2305.08891, algorithm 1)."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def guide(positive, negative, scale):
    """Classifier-free guidance (2207.12598) from the negative prompt's prediction to the positive
    one's. Scale 1 is the positive prompt alone; scale 1 / (1 - k) is the limit
    of CPO's rule `constant` (E17)."""
    return negative + scale * (positive - negative)


class Diffusion:
    """A schedule and what the model predicts: a row of SCHEDULES and one of PREDICTIONS.

    spacing: which timesteps are sampled; "power" is the toy's, "leading" and "trailing" are
    Stable Diffusion's. fixed_stride: where a step leads. False: to the next of these timesteps,
    and from the last to the picture, as in DDIM's paper; with eta 0 this is Euler's method on
    the probability-flow ODE (in x / sqrt(alpha_bar) it is a line in the noise level), with eta 1
    it is DDPM. True: to t - T // count, and from the last to alpha_bar_0, as Stable Diffusion's
    DDIM does."""

    def __init__(self, schedule="cosine", prediction="v", steps=1000, zero_snr=False,
                 spacing="power", fixed_stride=False):
        if schedule not in SCHEDULES or prediction not in PREDICTIONS:
            raise ValueError(f"schedule is one of {', '.join(SCHEDULES)} and prediction one of "
                             f"{', '.join(PREDICTIONS)}, not {schedule}, {prediction}")
        if spacing not in SPACINGS:
            raise ValueError(f"spacing is one of {', '.join(SPACINGS)}, not {spacing}")
        self.prediction, self.steps = prediction, steps
        self.spacing, self.fixed_stride = spacing, fixed_stride
        self.alpha_bar = SCHEDULES[schedule](steps)
        if zero_snr:
            self.alpha_bar = zero_terminal_snr(self.alpha_bar)
        if prediction == "eps" and self.alpha_bar[-1] == 0:
            raise ValueError("zero-terminal SNR needs prediction v: pure noise does not tell x0 "
                             "from eps")

    def shares(self, alpha_bar):
        """a and s, the shares of picture and noise in x_t, at noise levels alpha_bar (any
        shape)."""
        a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        return (a / (a + s), s / (a + s)) if self.prediction == "flow" else (a, s)

    def scales(self, t, like):
        """a and s for t (B,), shaped (B, 1, 1, 1), with the dtype and on the device of `like`. t is
        best on the CPU, where the schedule is."""
        alpha_bar = self.alpha_bar[t.cpu()]                    # Apple's GPUs have no float64
        alpha_bar = alpha_bar.view(-1, *[1] * (like.dim() - 1))
        return tuple(send(x.to(like.dtype), like.device) for x in self.shares(alpha_bar))

    def q_sample(self, x0, t, noise):
        """The forward process (E1): x_t from x_0 and noise, both (B, C, H, W)."""
        a, s = self.scales(t, x0)
        return a * x0 + s * noise

    def goal(self, x0, t, noise):
        """What the model should predict at x_t: the noise, or a velocity."""
        p, q = PREDICTIONS[self.prediction](*self.scales(t, x0))
        return p * x0 + q * noise

    def x0_and_eps(self, prediction, xt, t):
        """The model's prediction at x_t -> (x0, eps) that it implies."""
        a, s = self.scales(t, xt)
        p, q = PREDICTIONS[self.prediction](a, s)
        # two equations, x_t and the prediction, for two unknowns
        determinant = a * q - s * p
        return ((q * xt - s * prediction) / determinant,
                (a * prediction - p * xt) / determinant)

    def timesteps(self, count):
        """`count` different timesteps, falling. leading: multiples of T // count, plus 1;
        trailing: even parts from T-1 down. power: 1 - (i / count)^1.5 of T, so the first is pure
        noise (2305.08891). When there are few steps, those at the noisy end are the smaller ones,
        because hue and subject are decided there (ours: 20 of these do what 60 even ones do,
        docs/log.md)."""
        most = self.steps - (self.spacing == "leading")      # leading adds 1, and T is no timestep
        if not 1 <= count <= most:
            raise ValueError(f"sampling steps must be between 1 and {most}, not {count}")
        if self.spacing == "leading":
            return torch.arange(count - 1, -1, -1) * (self.steps // count) + 1
        i = torch.arange(count, dtype=torch.float64)
        if self.spacing == "trailing":
            # it is -T / count, but halves are rounded as by numpy.arange in diffusers
            step = (self.steps - self.steps / count) - self.steps
            return (self.steps + i * step).round().long() - 1
        # one for each, and the T - count that are left over go to late steps
        extra = (self.steps - count) * (1 - (i / count) ** 1.5)
        return extra.round().long() + count - 1 - torch.arange(count)

    def step(self, prediction, xt, now, alpha_bar_next, eta=0.0, generator=None, clip=None):
        """One step of the reverse process: x_t at timestep `now` (an int), and the model's
        prediction there, -> a sample at the noise level alpha_bar_next (a scalar tensor).

        eta 0 is DDIM (2010.02502, equation 12), eta 1 the posterior of DDPM (E6). Noise is added
        unless the step leads to the picture itself (alpha_bar_next = 1); it is drawn on the CPU,
        as the generator's. clip: brings x0 back among the latents of pictures; None: no bounds."""
        a, s = self.shares(self.alpha_bar[now])
        a_next, s_next = self.shares(alpha_bar_next.double())
        # Which picture, and which noise in it, does the prediction imply?
        x0, eps = self.x0_and_eps(prediction, xt, torch.full((len(xt),), now))
        if clip:
            x0 = clip(x0)
            eps = (xt - a.to(xt) * x0) / s.to(xt)
        # The same picture with less noise: a part of the old one, sigma of it new.
        sigma = eta * s_next / s * (s ** 2 - (a / a_next * s_next) ** 2).clamp(min=0).sqrt()
        old = (s_next ** 2 - sigma ** 2).clamp(min=0).sqrt()
        xt = a_next.to(xt) * x0 + old.to(xt) * eps
        if s_next > 0 and eta > 0:
            noise = torch.randn(xt.shape, generator=generator, dtype=xt.dtype)
            xt = xt + sigma.to(xt) * noise.to(xt.device)
        return xt

    @torch.no_grad()
    def sample(self, predict, xt, count=12, eta=0.0, generator=None, clip=None):
        """Run the reverse process from noise xt (B, C, H, W) in `count` steps (see `step`).
        predict(xt, t (B,)) -> eps or v."""
        times = self.timesteps(count).tolist()
        for now, following in zip(times, [*times[1:], None]):
            if self.fixed_stride:
                alpha_bar_next = self.alpha_bar[max(now - self.steps // count, 0)]
            else:
                alpha_bar_next = (torch.tensor(1.0) if following is None
                                  else self.alpha_bar[following])
            prediction = predict(xt, torch.full((len(xt),), now, device=xt.device))
            xt = self.step(prediction, xt, now, alpha_bar_next, eta, generator, clip)
        return xt
