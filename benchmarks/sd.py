"""One CPO step at the full size of Stable Diffusion: memory, seconds, and the same step elsewhere.
Random weights, no file is read.

    python benchmarks/sd.py memory [--dtype bfloat16] [--checkpointing]
        # two adapters on one base against three UNets
    python benchmarks/sd.py time [--width 0.5]
        # forward and backward, ours against diffusers', on the CPU
    python benchmarks/sd.py step --device cuda --dtype bfloat16 [--model xl --size 128]
        # seconds and memory of a step, beside the same written plainly on diffusers and peft
    python benchmarks/sd.py flops --model xl --size 128
        # operations of a step, counted without computing anything
"""
import argparse
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]                  # run from a clone without installing
from machine import multiple, now, peak, product  # noqa: E402

from nanocpo.losses import cpo_loss  # noqa: E402
from nanocpo.sd.lora import LoRA  # noqa: E402
from nanocpo.sd.model import recomputed  # noqa: E402
from nanocpo.sd.names import PRESETS  # noqa: E402
from nanocpo.sd.weights import unet_config  # noqa: E402
from nanocpo.unet import UNet  # noqa: E402
from nanocpo.utils.cli import Parser, above, command  # noqa: E402
from nanocpo.utils.device import pick_device  # noqa: E402

CHANNELS = {"1": (320, 640, 1280, 1280), "xl": (320, 640, 1280)}
COMPARED = {"memory": ("adapters", "unets"), "step": ("adapters", "peft")}


def settings(args):
    """The base's UNet config, as its files hold it, with the channels times --width."""
    return PRESETS[args.model]["unet"] | {
        "block_out_channels": [int(c * args.width) for c in CHANNELS[args.model]]}


def random_unet(args, make):
    """A UNet with weights that cost no initialisation."""
    with torch.device("meta"):
        unet = make()
    unet = unet.to(getattr(torch, args.dtype)).to_empty(device=args.device)
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return unet


def our_models(args, three):
    """(parameters, target, reference, auxiliary), the models as functions of (x_t, t, context,
    pooled, sizes). three: a full fine-tune beside two frozen UNets; else two adapters on one."""
    make = partial(random_unet, args, lambda: UNet(unet_config(settings(args))))
    if three:
        models = [make() for _ in range(3)]
        for unet in models[1:]:
            unet.requires_grad_(False)
        whole, places, parameters = models[0], LoRA(torch.nn.Module()), list(models[0].parameters())
    else:
        whole = make()
        places = LoRA(whole)
        target, auxiliary = (places.new(args.rank, seed=i) for i in range(2))
        parameters = list(target.parameters())

        def acting(adapter):
            def run(*inputs):
                with places.using(adapter):
                    return whole(*inputs)
            return run
        models = [acting(target), acting(None), acting(auxiliary)]
    if args.checkpointing:
        for level in (*whole.down_blocks, whole.mid_block, *whole.up_blocks):
            level.step = partial(recomputed, level.step, places)
    return parameters, *models


def peft_models(args):
    """The same with diffusers' UNet and two of peft's adapters on it."""
    import diffusers
    import peft
    unet = random_unet(args, lambda: diffusers.UNet2DConditionModel(**settings(args)))
    unet.requires_grad_(False)
    for name in ("auxiliary", "target"):
        unet.add_adapter(peft.LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=[
            "to_q", "to_k", "to_v", "to_out.0"]), name)
    for name, p in unet.named_parameters():
        if ".target." in name:
            p.data = p.data.float()
    if args.checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()

    def acting(name):
        def run(xt, t, context, pooled, sizes):
            unet.enable_adapters() if name else unet.disable_adapters()
            if name:
                unet.set_adapter(name)
            added = None if pooled is None else {"text_embeds": pooled, "time_ids": sizes}
            with torch.autocast(xt.device.type, xt.dtype, enabled=xt.dtype != torch.float32):
                return unet(xt, t, context, added_cond_kwargs=added).sample
        return run
    parameters = [p for name, p in unet.named_parameters() if ".target." in name]
    return parameters, acting("target"), acting(None), acting("auxiliary")


def inputs(args):
    """f(rows): what a model is called with for those of two prompts, at one noised picture."""
    config, dtype = unet_config(settings(args)), getattr(torch, args.dtype)
    draw = lambda *shape: torch.randn(*shape, device=args.device, dtype=dtype)
    noised, context, pooled, sizes = (draw(1, 4, args.size, args.size).repeat(2, 1, 1, 1),
                                      draw(2, 77, config.context_dim), None, None)
    t = torch.tensor([500, 500], device=args.device)
    if config.vector_dim:
        side = 8.0 * args.size
        sizes = torch.tensor([[side, side, 0, 0, side, side]] * 2, device=args.device)
        pooled = draw(2, config.vector_dim - 6 * config.size_dim)
    return lambda rows: tuple(None if x is None else x[rows]
                              for x in (noised, t, context, pooled, sizes))


def cpo_steps(args, kind, count):
    """(seconds of `count` whole CPO steps, the optimiser's part included; floating point operations
    of one, 0 if count is 1). The auxiliary is asked for its two prompts in one call, plainly (peft)
    in two. The first step, which counts the operations, takes longer than the others."""
    parameters, target, reference, auxiliary = (
        peft_models(args) if kind == "peft" else our_models(args, three=kind == "unets"))
    asked = inputs(args)
    # foreach would hold a copy of everything at once
    optimizer, seconds = torch.optim.AdamW(parameters, lr=1e-4, foreach=False), []
    counter = FlopCounterMode(display=False)

    def step():
        optimizer.zero_grad()
        with torch.no_grad():
            eps_ref = reference(*asked(slice(1)))
            if kind == "peft":
                z_win, z_lose = (auxiliary(*asked(slice(i, i + 1))) for i in range(2))
            else:
                z_win, z_lose = auxiliary(*asked(slice(2))).chunk(2)
        eps = target(*asked(slice(1)))
        cpo_loss(eps, eps_ref, z_win, z_lose + 0.01)[0].backward()
        optimizer.step()
    for i in range(count):
        start = now(args.device)
        with counter if count > 1 and i == 0 else nullcontext():
            step()
        seconds.append(now(args.device) - start)
    return seconds, counter.get_total_flops() if count > 1 else 0


def oracles():
    """diffusers; ends the program with the cure where it is missing."""
    try:
        import diffusers
        import peft  # noqa: F401
    except ImportError as error:
        raise SystemExit("this benchmark compares with diffusers and peft, which are not "
                         "installed: pip install -e '.[oracle]'") from error
    return diffusers


def measure_time(args):
    """Forward and backward on the CPU, alternating: the median ratio of ours to diffusers', in
    seconds of processor time, which other programs disturb less than the clock's."""
    theirs = oracles().UNet2DConditionModel(**settings(args))
    ours = UNet(unet_config(settings(args)))
    ours.load_state_dict({name: p[:, :, 0, 0] if "proj_" in name and p.dim() == 4 else p
                          for name, p in theirs.state_dict().items()})
    x, t, context = (torch.randn(1, 4, args.size, args.size), torch.tensor([500]),
                     torch.randn(1, 77, 768))
    seconds = {"ours": [], "diffusers": []}
    for _ in range(args.rounds + 1):                              # the first round warms up
        for name, run in (("ours", lambda: ours(x, t, context)),
                          ("diffusers", lambda: theirs(x, t, context).sample)):
            start = time.process_time()
            run().square().mean().backward()
            seconds[name].append(time.process_time() - start)
    ratios = sorted(a / b for a, b in list(zip(*seconds.values()))[1:])
    print(f"ours {min(seconds['ours'][1:]):.2f} s, "
          f"diffusers {min(seconds['diffusers'][1:]):.2f} s; median ratio "
          f"{ratios[len(ratios) // 2]:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")


def one(args):
    """Print the peak memory over the imports (MiB), the seconds of a step of one kind, and its
    share of the speed of matrix products (0: not measured)."""
    before = 0 if torch.device(args.device).type == "cuda" else peak(args.device)
    seconds, flops = cpo_steps(args, args.what, args.steps)
    later = sorted(seconds[1:] or seconds)
    median, most = later[len(later) // 2], peak(args.device)
    share = flops / median / product(args.device, getattr(torch, args.dtype)) if flops else 0
    print(f"{most - before:.0f} {median:.4f} {share:.3f}")


def flops(args):
    """Print the operations of a CPO step in the two adapters' models, in TFLOP and in forward
    passes of one picture, and the number of trained parameters. On torch's "meta" device: shapes
    only."""
    args.device = "meta"
    parameters, _, reference, _ = our_models(args, three=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        reference(*inputs(args)(slice(1)))
    forward = counter.get_total_flops()
    step = cpo_steps(args, "adapters", 2)[1]
    trained = sum(p.numel() for p in parameters)
    print(f"forward {forward / 1e12:.3f} TFLOP, CPO step {step / 1e12:.3f} TFLOP = "
          f"{step / forward:.2f} forward passes, {trained} trained parameters")
    return forward, step, trained


def main(argv=None):
    """Parse the flags, measure, print."""
    parser = Parser(description=__doc__.split("\n")[0],
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("what", choices=["memory", "time", "step", "flops", "adapters", "unets",
                                         "peft"],
                        help="the last three measure one kind of memory and step")
    parser.add_argument("--model", choices=list(CHANNELS), default="1")
    parser.add_argument("--width", type=multiple(0.1, float), default=1.0,
                        help="share of the channels: 0.1, 0.2 ..., for groups of 32")
    parser.add_argument("--size", type=above(0), default=64, help="of the latent, an eighth of the "
                        "picture's")
    parser.add_argument("--rank", type=above(0), default=8)
    parser.add_argument("--rounds", type=above(0), default=5, help="of time")
    parser.add_argument("--steps", type=above(0), default=1,
                        help="steps of each kind; with more than one the first does not count")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", type=pick_device, default="cpu",
                        help="cpu or cuda; time is for the CPU")
    args = parser.parse_args(argv)
    if args.what in ("time", "flops"):
        return measure_time(args) if args.what == "time" else flops(args)
    if args.what not in COMPARED:
        return one(args)
    if args.what == "step":
        oracles()
    found, names = {}, ("model", "width", "size", "rank", "steps", "dtype", "device")
    for kind in COMPARED[args.what]:                      # a process each, since a peak never falls
        flags = sum(([f"--{name}", str(getattr(args, name))] for name in names), [])
        flags += ["--checkpointing"] * args.checkpointing
        out = subprocess.run([sys.executable, __file__, kind, *flags], stdout=subprocess.PIPE,
                             text=True, check=True).stdout
        found[kind] = tuple(map(float, out.split()))
        memory, seconds, share = found[kind]
        print(f"{kind}: {memory:.0f} MiB, {seconds:.3f} s"
              + f", {share:.0%} of a matrix product's speed" * (share > 0))
    ratios = [a / b if b else 0 for a, b in zip(*found.values())]
    print(f"ratio: memory {ratios[0]:.3f}, time {ratios[1]:.3f}")
    return found


if __name__ == "__main__":
    command(main)
