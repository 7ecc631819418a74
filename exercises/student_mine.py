"""Exercise 10: your own tests of the losses. They must pass with right losses and fail with wrong
ones; the grader plants bugs and counts how many your tests notice."""
import pytest
import torch

from nanocpo.losses import cpo_loss, dpo_loss, preference_loss  # noqa: F401

pytestmark = pytest.mark.ex10


def test_the_collapse():
    torch.manual_seed(0)
    raise NotImplementedError("exercise 10: E9")
