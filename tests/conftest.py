"""Fixtures that several files use; and one thread a process: the tests are many small ones, two
threads gain little on an idle machine and stall each other on a busy one."""
import os
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")           # before torch is imported

import pytest  # noqa: E402

from toy_tiny import TINY  # noqa: E402

import nanocpo.toy.world  # noqa: E402
from nanocpo.model import Model  # noqa: E402


@pytest.fixture
def tiny(monkeypatch):
    """The scripts train a model of this size from nothing, not the toy's."""
    monkeypatch.setattr(nanocpo.toy.world, "Model", partial(Model, unet=TINY, text_dim=16))
