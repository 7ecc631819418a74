"""The device: which one, how tensors get there, and how much memory the machine has."""
import argparse
import math
import os

import torch


def pick_device(name):
    """The argparse type of --device: "auto" takes cuda, then mps, then cpu."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available()
                else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:               # torch raises either
        raise argparse.ArgumentTypeError(
            f"torch cannot use {name} ({str(error).splitlines()[0]})") from error


def memory():
    """Bytes of memory of this machine; infinity where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf


def send(x, device):
    """A tensor of the CPU on the device. A GPU is not waited for: an ordinary copy would first let
    it finish all that it was asked before, and the Python of the next step could not run ahead."""
    return x.to(device, non_blocking=torch.device(device).type == "cuda")
