"""Peak memory of one CPO step at SD 1.5's full size, and the time of a step against diffusers' \
UNet. Random weights, no file is read.

    python benchmarks/sd.py memory [--dtype bfloat16] [--checkpointing]
        # two adapters on one base against three UNets
    python benchmarks/sd.py time [--width 0.5]
        # forward and backward, ours against diffusers'
"""
import argparse
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a clone without installing
from nanocpo.losses import cpo_loss  # noqa: E402
from nanocpo.sd.lora import LoRA  # noqa: E402
from nanocpo.sd.model import recomputed  # noqa: E402
from nanocpo.sd.names import PRESETS  # noqa: E402
from nanocpo.sd.weights import unet_config  # noqa: E402
from nanocpo.unet import UNet  # noqa: E402


def settings(width):
    """SD 1.5's, with the channels times `width`."""
    return PRESETS["1"]["unet"] | {
        "block_out_channels": [int(c * width) for c in (320, 640, 1280, 1280)]}


def random_unet(args):
    """A UNet with weights that cost no initialisation."""
    with torch.device("meta"):
        unet = UNet(unet_config(settings(args.width)))
    unet = unet.to(getattr(torch, args.dtype)).to_empty(device=args.device)
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return unet


def cpo_step(args, three):
    """One whole step, the optimiser's included. three: a full fine-tune beside two frozen UNets;
    else two adapters on one."""
    noised, t = (torch.randn(1, 4, args.size, args.size, device=args.device,
                             dtype=getattr(torch, args.dtype)),
                 torch.tensor([500], device=args.device))
    context = torch.randn(2, 77, 768, device=args.device, dtype=noised.dtype)
    if three:
        target, reference, auxiliary = unets = [random_unet(args) for _ in range(3)]
        parameters = list(target.parameters())
        for unet in unets[1:]:
            unet.requires_grad_(False)
    else:
        unet = random_unet(args)
        places = LoRA(unet)
        adapters = [places.new(args.rank, seed=i) for i in range(2)]
        parameters = list(adapters[0].parameters())

        def acting(adapter):
            def run(*inputs):
                with places.using(adapter):
                    return unet(*inputs)
            return run
        target, reference, auxiliary, unets = (
            acting(adapters[0]), acting(None), acting(adapters[1]), [unet])
    if args.checkpointing:
        for level in (*unets[0].down_blocks, unets[0].mid_block, *unets[0].up_blocks):
            level.step = partial(recomputed, level.step,
                                 LoRA(torch.nn.Module()) if three else places)
    # foreach would hold a copy of everything at once
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=False)
    with torch.no_grad():
        eps_ref = reference(noised, t, context[:1])
        z_win, z_lose = auxiliary(torch.cat([noised] * 2), torch.cat([t] * 2), context).chunk(2)
    cpo_loss(target(noised, t, context[:1]), eps_ref, z_win, z_lose + 0.01)[0].backward()
    optimizer.step()


def peak(device):
    """Peak memory of this process until now, MiB: of the GPU, or resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2 ** 20
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            / (2 ** 20 if sys.platform == "darwin" else 2 ** 10))


def measure_time(args):
    """Forward and backward on the CPU, alternating: the median ratio of ours to diffusers', in
    seconds of processor time, which other programs disturb less than the clock's."""
    try:
        import diffusers
    except ImportError as error:
        raise SystemExit("benchmarks/sd.py time compares with diffusers, which is not installed: "
                         "pip install -e '.[oracle]'") from error
    theirs = diffusers.UNet2DConditionModel(**settings(args.width))
    ours = UNet(unet_config(settings(args.width)))
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


def main(argv=None):
    """Parse the flags, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("what", choices=["memory", "time", "adapters", "unets"],
                        help="the last two measure one half of memory")
    parser.add_argument("--width", type=float, default=1.0,
                        help="share of the channels: 0.1, 0.2 ..., for groups of 32")
    parser.add_argument("--size", type=int, default=64, help="of the latent")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", default="cpu", help="memory only")
    args = parser.parse_args(argv)
    if args.what == "time":
        return measure_time(args)
    if args.what != "memory":
        before, start = 0 if args.device.startswith("cuda") else peak(args.device), time.time()
        cpo_step(args, args.what == "unets")
        print(f"{peak(args.device) - before:.0f} {time.time() - start:.1f}")
        return None
    found = {}
    for kind in ("adapters", "unets"):                    # a process each, since a peak never falls
        flags = sum(([f"--{name}", str(getattr(args, name))]
                     for name in ("width", "size", "rank", "dtype", "device")), [])
        flags += ["--checkpointing"] * args.checkpointing
        out = subprocess.run([sys.executable, __file__, kind, *flags], stdout=subprocess.PIPE,
                             text=True, check=True).stdout
        found[kind], seconds = map(float, out.split())
        print(f"{kind}: {found[kind]:.0f} MiB over the imports, {seconds:.1f} s")
    print(f"ratio {found['adapters'] / found['unets']:.3f}")
    return found


if __name__ == "__main__":
    main()
