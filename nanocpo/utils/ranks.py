"""Several processes that train one model: the only module that knows of ranks.

    torchrun --nproc_per_node=2 train_cpo.py --batch 16 --accumulate 2

A step is `accumulate` batches; the processes share these among them, and DistributedDataParallel
(DDP) gives each the mean of all gradients. So all hold the same weights, and which run it is
depends on the flags and not on the number of processes: the line above is the run of
`python train_cpo.py --batch 16 --accumulate 2`, up to the rounding of sums. The first process,
number 0, writes all files. Without torchrun every function here does nothing.
"""
import os
import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def count():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def number():
    """Which of them this is, 0 to count - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def first():
    """Whether this is the process that writes files and talks."""
    return number() == 0


def start():
    """Join the other processes that torchrun started, if it did: gloo for tensors on the CPU, nccl
    for those on GPUs, of which each process takes its own."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if not first():
        sys.stdout = open(os.devnull, "w")


def stop():
    """Leave them, at the end of the program."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_of_another(error):
    """Whether this RuntimeError says that the connection to another process is lost."""
    marks = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
    return count() > 1 and (isinstance(error, dist.DistError)
                            or any(mark in str(error) for mark in marks))


def wait():
    """Until all have come here: what the first one wrote is there."""
    if count() > 1:
        dist.barrier()


def divided(batch, accumulate):
    """How N processes divide a step: (batch, accumulate), the same product, N a divisor of
    accumulate. Raises ValueError where there is no such division."""
    several = count()
    if accumulate % several == 0:
        return batch, accumulate
    if batch % several == 0:
        return batch // several, accumulate * several
    raise ValueError(f"{several} processes cannot share --accumulate {accumulate} batches of "
                     f"--batch {batch}: make one of the two a multiple of {several}")


def generators(parent, batches):
    """A random generator for each batch of a step: the parent itself for one; else one for each,
    seeded from the parent, so that every process can draw its own batches without the others'."""
    if batches == 1:
        return [parent]
    seeds = torch.randint(2 ** 62, (batches,), generator=parent).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def share(items):
    """This process's part of a list: every N-th."""
    return items[number()::count()]


def every_nth(function):
    """The same function, but only every N-th call of it is this process's; None for the others."""
    calls = iter(range(sys.maxsize))
    return lambda *args: function(*args) if next(calls) % count() == number() else None


class _Together(DistributedDataParallel):
    """DDP that can be asked for everything that the model can."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


def together(model):
    """The model, with gradients that become the mean over all processes."""
    if count() == 1:
        return model
    shared = _Together(model)
    if model.device.type == "cpu":
        shared.register_comm_hook(None, _mean_in_order)
    return shared


def _mean_in_order(_, bucket):
    """How DDP on processors takes the mean of a bucket of gradients: added up from the first
    process to the last. Its own sums begin somewhere else for each part of a bucket, and the
    buckets change after the first step: a run of three that was resumed would round otherwise."""
    here = bucket.buffer()
    everyone = [torch.empty_like(here) for _ in range(count())]
    done = dist.all_gather(everyone, here, async_op=True).get_future()
    return done.then(lambda _: torch.stack(everyone).mean(0))


def exchange(model, now):
    """A with-block for one batch's forward and backward pass. now: whether gradients are exchanged
    after it, as after the last batch of a step; before, they only add up here."""
    return nullcontext() if now or count() == 1 else model.no_sync()


def gathered(items):
    """The lists of all processes as one; every process must call it."""
    if count() == 1:
        return items
    lists = [None] * count()
    dist.all_gather_object(lists, items)
    return [item for one in lists for item in one]
