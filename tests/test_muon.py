"""The optimiser: what Muon's step looks like, and that the rest is AdamW."""
import pytest
import torch

from nanocpo.criteria import Criteria
from nanocpo.model import Model
from nanocpo.unet import UNetConfig
from nanocpo.utils.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_orthogonalize_keeps_directions_and_evens_out_their_sizes(shape):
    torch.manual_seed(0)
    u, s, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = u @ torch.diag(torch.logspace(-1, 0, len(s))) @ vh   # singular values from 0.1 to 1
    out, again = orthogonalize([matrix, 100 * matrix])
    inside = u.T @ out @ vh.T                           # diagonal, if the singular vectors are kept
    values = inside.diagonal()
    assert values.min() > 0.5 and values.max() < 1.4
    assert (inside - torch.diag(values)).abs().max() < 0.15
    torch.testing.assert_close(again, out, rtol=0.05, atol=0.05)


def test_rest_takes_adamw_steps_and_hidden_weights_do_not():
    torch.manual_seed(0)
    config = UNetConfig(channels=(16, 32), depth=(0, 1), heads=(2, 2), groups=8, context_dim=16,
                        vector_dim=16)
    model = Model(Criteria.load(), ["a boat"], config, text_dim=16)
    twin = model.frozen_copy().requires_grad_(True)
    ours = Muon(model, 1e-2, weight_decay=0.1)
    theirs = torch.optim.AdamW(twin.parameters(), 1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(3):
        for (name, p), q in zip(model.named_parameters(), twin.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    hidden = {id(p) for p in ours.param_groups[0]["params"]}
    same = {name: torch.allclose(p, q, atol=1e-6)
            for (name, p), q in zip(model.named_parameters(), twin.parameters())}
    for name, p in model.named_parameters():
        inner = p.dim() >= 2 and name.startswith("unet.") and not name.startswith("unet.conv_")
        assert (id(p) in hidden) == inner and same[name] == (not inner), name


def test_without_hidden_weights_all_is_adamw():
    torch.manual_seed(0)
    model = Model(Criteria.load(), ["a boat"], UNetConfig(channels=(16, 32), depth=(0, 1),
                  heads=(2, 2), groups=8, context_dim=16, vector_dim=16), text_dim=16)
    twin = model.frozen_copy().requires_grad_(True)
    ours = Muon(model, 1e-2, hidden=False)
    theirs = torch.optim.AdamW(twin.parameters(), 1e-2, betas=(0.9, 0.99), weight_decay=0.01)
    for p, q in zip(model.parameters(), twin.parameters()):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    ours.step()
    theirs.step()
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(),
                                                               twin.parameters()))


def test_a_model_may_have_one_weight():
    ours, theirs = (torch.nn.LayerNorm(3, bias=False) for _ in range(2))
    one, other = Muon(ours, 0.1, weight_decay=0.1), torch.optim.AdamW(
        theirs.parameters(), 0.1, betas=(0.9, 0.99), weight_decay=0.1)
    for model, optimizer in ((ours, one), (theirs, other)):
        model.weight.grad = torch.tensor([1.0, -2.0, 0.5])
        optimizer.step()
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6) and (ours.weight != 1).all()


@pytest.mark.parametrize("name, factor", [
    ("mid_block.resnets.0.conv1.weight", 1),
    ("mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight", 8)])
def test_muon_step_has_the_stated_size(name, factor):
    """Ten times the learning rate, and the root of rows / columns (128 x 1152, 1024 x 128) more
    where a matrix is tall."""
    model = Model(Criteria.load(), ["a boat"])
    weight = model.unet.get_parameter(name)
    before = weight.detach().clone()
    weight.grad = torch.randn_like(before)
    Muon(model, 1e-3, weight_decay=0.0).step()
    moved = (weight.detach() - before).flatten(1)
    assert 0.6e-2 < torch.linalg.svdvals(moved).mean() / factor ** 0.5 < 1.2e-2
