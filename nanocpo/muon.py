"""The optimiser: Muon for the weight matrices, AdamW for everything else.

At the toy's length of training the number of steps is what limits it, not the noise of the gradient: batches of 64 are hardly better
than batches of 32, step by step. Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) makes each step count: it replaces the
momentum of a matrix by the nearest orthogonal matrix, so that all directions move alike. docs/log.md has the comparison.
"""
import torch


def orthogonalize(matrix, iterations=5):
    """The nearest (semi-)orthogonal matrix to (rows, columns), roughly: singular values end between 0.7 and 1.2.

    A quintic Newton-Schulz iteration, in bfloat16; it needs rows <= columns and a norm of at most 1."""
    x = matrix.bfloat16()
    flip = x.size(0) > x.size(1)
    x = x.T if flip else x
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.T if flip else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """One optimiser for a whole model. Hidden weights (linear and convolution, flattened to matrices) take Muon's step with ten times
    the learning rate; the first and the last layer, norms, biases and embeddings take AdamW's (1711.05101)."""

    def __init__(self, model, lr, weight_decay=0.01, momentum=0.95, betas=(0.9, 0.99)):
        hidden = {name for name, p in model.unet.named_parameters() if p.dim() >= 2 and not name.startswith("conv_")}
        muon = [p for name, p in model.unet.named_parameters() if name in hidden]
        rest = [p for name, p in model.named_parameters() if name.removeprefix("unet.") not in hidden]
        super().__init__([{"params": muon, "muon": True}, {"params": rest, "muon": False}],
                         dict(lr=lr, weight_decay=weight_decay, momentum=momentum, betas=betas))

    @torch.no_grad()
    def step(self):
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, lr = self.state[p], group["lr"] * (10 if group["muon"] else 1)
                if not state:
                    state["step"], state["mean"] = 0, torch.zeros_like(p)
                    if not group["muon"]:
                        state["square"] = torch.zeros_like(p)
                state["step"] += 1
                p.mul_(1 - lr * group["weight_decay"])
                if group["muon"]:
                    state["mean"].lerp_(p.grad, 1 - group["momentum"])
                    rows, columns = p.flatten(1).shape
                    update = orthogonalize(p.grad.lerp(state["mean"], group["momentum"]).flatten(1)).view_as(p)
                    p.add_(update, alpha=-lr * max(1, rows / columns) ** 0.5)
                else:
                    b1, b2 = group["betas"]
                    state["mean"].lerp_(p.grad, 1 - b1)
                    state["square"].lerp_(p.grad ** 2, 1 - b2)
                    mean, square = state["mean"] / (1 - b1 ** state["step"]), state["square"] / (1 - b2 ** state["step"])
                    p.addcdiv_(mean, square.sqrt() + 1e-8, value=-lr)
