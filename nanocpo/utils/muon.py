"""The optimiser: Muon for the weight matrices, AdamW for everything else.

At the toy's length of training the number of steps is what limits it, not the noise of the
gradient: batches of 64 are hardly better than batches of 32, step by step. Muon (Jordan et al.
2024, kellerjordan.github.io/posts/muon) makes each step count: it replaces the momentum of a matrix
by the nearest orthogonal matrix, so that all directions move alike. docs/log.md has the comparison.
"""
import torch


def orthogonalize(matrices, iterations=5):
    """The nearest (semi-)orthogonal matrices to (..., rows, columns), roughly: singular values end
    between 0.7 and 1.2.

    Muon's quintic Newton-Schulz iteration x <- (a + b x x^T + c (x x^T)^2) x. Each factor is a
    polynomial of the same small square matrix x x^T, so all five are multiplied there, and the wide
    matrix is met only twice."""
    flip = matrices.size(-2) > matrices.size(-1)
    x = (matrices.mT if flip else matrices).float()
    # the iteration needs singular values of at most 1
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    one = product = torch.eye(x.size(-2), device=x.device)
    square = x @ x.mT
    for _ in range(iterations):
        factor = 3.4445 * one + (-4.7750 * one + 2.0315 * square) @ square
        product, square = factor @ product, factor @ square @ factor
    x = product @ x
    return (x.mT if flip else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """One optimiser for a whole model. Hidden weights (linear and convolution, flattened to
    matrices) take Muon's step with ten times the learning rate; the first and the last layer,
    norms, biases and embeddings take AdamW's (1711.05101)."""

    def __init__(self, model, lr, weight_decay=0.01, momentum=0.95, betas=(0.9, 0.99)):
        # a LoRA adapter has none: AdamW for all of it
        unet = getattr(model, "unet", torch.nn.Module())
        hidden = {name for name, p in unet.named_parameters()
                  if p.dim() >= 2 and not name.startswith("conv_")}
        muon = [p for name, p in unet.named_parameters() if name in hidden]
        rest = [p for name, p in model.named_parameters()
                if name.removeprefix("unet.") not in hidden]
        super().__init__([{"params": muon, "muon": True}, {"params": rest, "muon": False}],
                         dict(lr=lr, weight_decay=weight_decay, momentum=momentum, betas=betas))

    @torch.no_grad()
    def step(self):
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            lr, shapes = group["lr"] * (10 if group["muon"] else 1), {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"], state["mean"] = 0, torch.zeros_like(p)
                    if not group["muon"]:
                        state["square"] = torch.zeros_like(p)
                state["step"] += 1
                p.mul_(1 - lr * group["weight_decay"])
                if group["muon"]:
                    state["mean"].lerp_(p.grad, 1 - group["momentum"])
                    update = p.grad.lerp(state["mean"], group["momentum"]).flatten(1)
                    shapes.setdefault(update.shape, []).append((p, update))
                else:
                    b1, b2 = group["betas"]
                    state["mean"].lerp_(p.grad, 1 - b1)
                    state["square"].lerp_(p.grad ** 2, 1 - b2)
                    mean, square = (state["mean"] / (1 - b1 ** state["step"]),
                                    state["square"] / (1 - b2 ** state["step"]))
                    p.addcdiv_(mean, square.sqrt() + 1e-8, value=-lr)
            # matrices of one shape are turned together
            for (rows, columns), pairs in shapes.items():
                for (p, _), update in zip(
                        pairs, orthogonalize(torch.stack([update for _, update in pairs]))):
                    p.add_(update.view_as(p), alpha=-lr * max(1, rows / columns) ** 0.5)
