"""A world whose diffusion model is known exactly: a conditional Gaussian mixture in the plane
(ours). Nothing in it is trained.

Each component is one combination of attribute states, as a painting is; a prompt keeps the
components that agree with it. So eps(x_t | attributes) is closed form for every prompt and
timestep, and with it z_w, z_l and the limit of every stabilizer (docs/derivation.md).
tests/test_mixture.py checks the theory here; `python -m nanocpo.study world` draws it. Predictions
are (B, 2, 1, 1): pictures of two channels and one pixel, as losses.cpo_loss wants them.
"""
import torch
from torch import nn

from ..losses import cpo_loss


class Mixture:
    """mean (K, D), cov (K, D, D), weight (K,) of K Gaussians, and states (K, leaves) of -1 / +1:
    what each of them shows."""

    def __init__(self, mean, cov, weight, states):
        self.mean, self.cov, self.weight = (torch.as_tensor(x, dtype=torch.float64)
                                            for x in (mean, cov, weight))
        self.states = torch.as_tensor(states)
        # (K, D), and (K, D, D) with the axes in columns
        self.variance, self.axes = torch.linalg.eigh(self.cov)

    def chosen(self, annotation):
        """annotation (leaves,) or (B, leaves) of -1, 0, +1 (0: not mentioned) -> log weights
        (1 or B, K) of the components that agree with it, -inf for the others; they sum to 1. Raises
        ValueError where none agrees."""
        asked = torch.atleast_2d(torch.as_tensor(annotation))[:, None]    # (B, 1, leaves)
        agrees = ((asked == 0) | (asked == self.states)).all(2) & (self.weight > 0)  # (B, K)
        if not agrees.any(1).all():
            raise ValueError("no component of the mixture agrees with the annotation")
        return torch.where(agrees, self.weight.log(), -torch.inf).log_softmax(1)

    def _parts(self, xt, alpha_bar, annotation):
        """log of each component's weight times density at x_t (B, K), and
        C_k^-1 (x_t - sqrt(alpha_bar) mu_k) (B, K, D), where C_k = alpha_bar cov_k +
        (1 - alpha_bar) I is the component's covariance at this noise level (E1)."""
        alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float64).view(-1, 1, 1)
        off = xt.flatten(1).double()[:, None] - alpha_bar.sqrt() * self.mean         # (B, K, D)
        # in each component's own axes C_k is diagonal
        along = torch.einsum("bkd,kde->bke", off, self.axes)
        variance = alpha_bar * self.variance + 1 - alpha_bar              # (1 or B, K, D)
        pull = torch.einsum("bke,kde->bkd", along / variance, self.axes)
        log_density = -0.5 * (along ** 2 / variance + (2 * torch.pi * variance).log()).sum(2)
        return self.chosen(annotation) + log_density, pull

    def log_prob(self, xt, alpha_bar, annotation):
        """log p_t(x_t | annotation): xt (B, D, ...), alpha_bar a number or (B,) -> (B,)."""
        return self._parts(xt, alpha_bar, annotation)[0].logsumexp(1)

    def eps(self, xt, alpha_bar, annotation):
        """E[eps | x_t, annotation] = -sqrt(1 - alpha_bar) grad log p_t (E1), in the shape and dtype
        of xt.

        Each component pulls towards itself; its share is its posterior probability at x_t."""
        log_part, pull = self._parts(xt, alpha_bar, annotation)
        mean_pull = (log_part.softmax(1)[..., None] * pull).sum(1)                   # (B, D)
        scale = (1 - torch.as_tensor(alpha_bar, dtype=torch.float64)).sqrt().view(-1, 1)
        return (scale * mean_pull).view(xt.shape).to(xt)

    def reward(self, xt, alpha_bar, positive, negative):
        """log p(positive | x_t) - log p(negative | x_t) (E3), by Bayes' rule: (B,). That is
        log p(x_t | positive) - log p(x_t | negative) and a constant; p_ref exp(reward / beta) is
        the optimum (E4)."""
        plain = torch.zeros_like(self.states[0])
        share = [self.chosen(plain)[0][self.chosen(a)[0] > -torch.inf].logsumexp(0)
                 for a in (positive, negative)]
        return (self.log_prob(xt, alpha_bar, positive) + share[0]
                - self.log_prob(xt, alpha_bar, negative) - share[1])

    def sample(self, count, annotation, generator=None):
        """count clean points x_0 (count, D, 1, 1) float64, and which component each one is
        from (count,)."""
        which = torch.multinomial(self.chosen(annotation)[0].exp(), count, replacement=True,
                                  generator=generator)
        noise = torch.randn(count, self.mean.shape[1], generator=generator, dtype=torch.float64)
        x0 = self.mean[which] + (torch.linalg.cholesky(self.cov)[which] @ noise[..., None])[..., 0]
        return x0[..., None, None], which


def flawed_world():
    """Two attributes, four kinds of picture. The first attribute is positive on the right, the
    second at the top; only 2 % of the pictures are good in both, as with real paintings: what a
    plain caption asks for is hardly ever the masterpiece."""
    return Mixture(mean=[(1.5, 1.3), (-1.5, 1.3), (1.5, -1.3), (-1.5, -1.3)],
                   cov=[((0.16, 0.0), (0.0, 0.16)), ((0.30, 0.10), (0.10, 0.20)),
                        ((0.20, -0.10), (-0.10, 0.30)), ((0.25, 0.0), (0.0, 0.25))],
                   weight=[0.02, 0.32, 0.32, 0.34], states=[(1, 1), (-1, 1), (1, -1), (-1, -1)])


# the annotations of the three prompts of flawed_world
PLAIN, POSITIVE, NEGATIVE = (0, 0), (1, 1), (-1, -1)


class Residual(nn.Module):
    """A tiny network for what the target adds to the exact reference:
    (x_t (B, 2, 1, 1), alpha_bar (B,)) -> (B, 2, 1, 1), 0 at first.

    Its output is multiplied by sqrt(alpha_bar), as every difference of two predictions is at much
    noise: the sampler divides by it."""

    def __init__(self, width=64):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.SiLU(),
                                    nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, xt, alpha_bar):
        alpha_bar = torch.as_tensor(alpha_bar).to(xt).expand(len(xt))[:, None]
        out = self.layers(torch.cat([xt.flatten(1), alpha_bar.sqrt(), (1 - alpha_bar).sqrt()], 1))
        return (alpha_bar.sqrt() * out).view(xt.shape)


def train_residual(world, steps, beta, rule, strength, seed=0, batch=256, lr=3e-3, low=0.05,
                   high=0.8, watch=None):
    """CPO in this world: the target is the exact plain eps plus a Residual, z_win and z_lose are
    exact; returns the Residual.

    alpha_bar is uniform between low and high, as x_t comes from the plain caption; watch(step, net)
    is called after every step."""
    torch.manual_seed(seed)
    net, generator = Residual(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(                 # constant, then to zero
        optimizer, lambda step: min(1, 2 * (1 - step / steps)))
    for step in range(1, steps + 1):
        x0, _ = world.sample(batch, torch.zeros_like(world.states[0]), generator)
        alpha_bar = low + (high - low) * torch.rand(batch, generator=generator, dtype=torch.float64)
        a, s = alpha_bar.sqrt().view(-1, 1, 1, 1), (1 - alpha_bar).sqrt().view(-1, 1, 1, 1)
        xt = (a * x0 + s * torch.randn(x0.shape, generator=generator, dtype=torch.float64)).float()
        eps_ref, z_win, z_lose = (world.eps(xt, alpha_bar, prompt)
                                  for prompt in (PLAIN, POSITIVE, NEGATIVE))
        loss, _ = cpo_loss(eps_ref + net(xt, alpha_bar), eps_ref, z_win, z_lose,
                           beta, rule, strength)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if watch:
            watch(step, net)
    return net
