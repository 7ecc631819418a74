"""What the benchmarks ask of the machine: seconds, memory, the speed of its matrix products."""
import argparse
import resource
import sys
import time

import torch


def multiple(of, kind=int):
    """An argparse type: a positive multiple of `of`, as the layers of a UNet need it."""
    def parse(text):
        value = kind(text)
        if not 0 < value < float("inf") or abs(value / of - round(value / of)) > 1e-9:
            raise argparse.ArgumentTypeError(f"must be a multiple of {of:g}, not {text}")
        return value
    parse.__name__ = kind.__name__
    return parse


def now(device):
    """Seconds, once the GPU has done what it was asked for."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak(device):
    """Peak memory of this process until now, MiB: of the GPU, or resident."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            / (2 ** 20 if sys.platform == "darwin" else 2 ** 10))


def product(device, dtype, size=2048):
    """Floating point operations a second of matrix products, the best of six."""
    size, best = size * (4 if torch.device(device).type == "cuda" else 1), 0
    x = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(6):
        start = now(device)
        x @ x
        best = max(best, 2 * size ** 3 / (now(device) - start))
    return best
