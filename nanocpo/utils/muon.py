"""The optimiser: Muon for the weight matrices, AdamW for everything else.

In stage 1 of the toy the number of steps is what limits it, not the noise of the gradient: batches
of 64 are hardly better than batches of 32, step by step. Muon (Jordan et al. 2024,
kellerjordan.github.io/posts/muon) makes each step count: it replaces the momentum of a matrix by
the nearest orthogonal matrix, so that all directions move alike. docs/log.md has the comparison,
docs/performance.md what it costs. Stage 2 is short and moves little: AdamW alone aligns as well.
"""
import torch
from torch.optim.adamw import adamw

A, B, C = 3.4445, -4.7750, 2.0315      # of Muon's quintic iteration


def orthogonalize(matrices, iterations=5):
    """The nearest (semi-)orthogonal matrix to each of a list, roughly: singular values of more than
    a hundredth of the largest end between 0.7 and 1.2.

    The iteration is Newton-Schulz's, x <- (A + B x x^T + C (x x^T)^2) x. Each factor is a
    polynomial of the same small square matrix x x^T, so the factors are multiplied there, all
    matrices with equally many rows at once, and the wide matrix is met only twice."""
    wide = [x.mT if x.size(0) > x.size(1) else x for x in matrices]
    by_rows = {}
    for i, x in enumerate(wide):
        by_rows.setdefault(len(x), []).append(i)
    out = list(matrices)
    for members in by_rows.values():
        square = torch.stack([wide[i].float() @ wide[i].float().mT for i in members])
        # Singular values must begin at 1 or below. The norm of x x^T bounds the largest one's
        # square, and more closely than that of x would.
        size = square.norm(dim=(1, 2), keepdim=True) + 1e-14
        square, product = square / size, None
        for i in range(iterations):
            factor = torch.baddbmm(square, square, square, beta=B, alpha=C)
            factor.diagonal(dim1=1, dim2=2).add_(A)
            product = factor if product is None else factor @ product
            if i + 1 < iterations:
                square = factor @ square @ factor
        for i, factors in zip(members, product / size.sqrt()):
            turned = factors.to(matrices[i].dtype) @ wide[i]
            out[i] = turned.mT if wide[i] is not matrices[i] else turned
    return out


def _fused(p):
    """Whether torch has AdamW there as one pass over the memory instead of ten."""
    return p.device.type in ("cpu", "cuda")


class Muon(torch.optim.Optimizer):
    """One optimiser for a whole model. Hidden weights (linear and convolution, flattened to
    matrices) take Muon's step with ten times the learning rate; the first and the last layer,
    norms, biases and embeddings take AdamW's (1711.05101), which is torch's. With hidden=False, and
    for a LoRA adapter, which has no hidden weights in this sense, it is AdamW for all."""

    def __init__(self, model, lr, hidden=True, weight_decay=0.01, momentum=0.95, betas=(0.9, 0.99)):
        unet = getattr(model, "unet", torch.nn.Module()) if hidden else torch.nn.Module()
        names = {name for name, p in unet.named_parameters()
                 if p.dim() >= 2 and not name.startswith("conv_")}
        matrices = [p for name, p in unet.named_parameters() if name in names]
        rest = [p for name, p in model.named_parameters()
                if name.removeprefix("unet.") not in names]
        super().__init__([{"params": matrices, "muon": True}, {"params": rest, "muon": False}],
                         dict(lr=lr, weight_decay=weight_decay, momentum=momentum, betas=betas))

    @torch.no_grad()
    def step(self):
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["mean"] = torch.zeros_like(p)
                    if not group["muon"]:
                        self.state[p]["square"] = torch.zeros_like(p)
                        # fused kernels count on the device; else nobody may wait for it
                        where = p.device if _fused(p) else "cpu"
                        self.state[p]["step"] = torch.zeros((), device=where)
            (self._muon if group["muon"] else self._adamw)(group, params, [p.grad for p in params])

    def _all(self, params, name):
        return [self.state[p][name] for p in params]

    def _muon(self, group, params, grads):
        lr, means = 10 * group["lr"], self._all(params, "mean")
        # "foreach" functions take a whole list: less overhead than a loop in Python
        torch._foreach_lerp_(means, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, means, group["momentum"])
        updates = orthogonalize([x.flatten(1) for x in updates])
        # a tall matrix moves each of its outputs as far as a wide one does
        tall = [max(1, x.size(0) / x.size(1)) ** 0.5 for x in updates]
        torch._foreach_mul_(updates, [-lr * factor for factor in tall])
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, [x.view_as(p) for x, p in zip(updates, params)])

    def _adamw(self, group, params, grads):
        adamw(params, grads, self._all(params, "mean"), self._all(params, "square"), [],
              self._all(params, "step"), fused=_fused(params[0]),
              amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
              weight_decay=group["weight_decay"], eps=1e-8, maximize=False)
