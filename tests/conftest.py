"""Fixtures that several files use."""
from functools import partial

import pytest

from toy_tiny import TINY

import nanocpo.toy.world
from nanocpo.model import Model


@pytest.fixture
def tiny(monkeypatch):
    """The scripts train a model of this size from nothing, not the toy's."""
    monkeypatch.setattr(nanocpo.toy.world, "Model", partial(Model, unet=TINY, text_dim=16))
