"""What tests start as processes of their own: train_cpo.py with the tiny model."""
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_cpo  # noqa: E402
from toy_tiny import TINY  # noqa: E402

import nanocpo.toy.world  # noqa: E402
from nanocpo.model import Model  # noqa: E402
from nanocpo.utils.cli import command  # noqa: E402

if __name__ == "__main__":
    nanocpo.toy.world.Model = partial(Model, unet=TINY, text_dim=16)
    command(train_cpo.main, several=True)
