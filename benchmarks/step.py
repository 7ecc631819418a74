"""What one training step of the toy costs, and where the time goes. Random weights, painted data.

    python benchmarks/step.py                 # our steps, and the same CPO step written plainly on
                                              # diffusers, alternating; shares of the parts
    python benchmarks/step.py --bf16          # all of them under torch.autocast to bfloat16
    python benchmarks/step.py growth          # seconds and memory against batch, size and width,
                                              # with a plot (--plot FILE)

Seconds on a shared machine say little; the ratios of one run do. The table of the first command
names the median of --rounds rounds, and its range.
"""
import argparse
import io
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]                  # run from a clone without installing
from machine import multiple, peak, product  # noqa: E402

import nanocpo.method as method  # noqa: E402
import nanocpo.train as train  # noqa: E402
import nanocpo.utils.log as log  # noqa: E402
from nanocpo.criteria import Criteria  # noqa: E402
from nanocpo.data import Paintings  # noqa: E402
from nanocpo.losses import cpo_loss  # noqa: E402
from nanocpo.model import Model, PromptEncoder  # noqa: E402
from nanocpo.run.settings import TOY  # noqa: E402
from nanocpo.run.stages import alignment_step, sft_loss_step  # noqa: E402
from nanocpo.unet import UNetConfig  # noqa: E402
from nanocpo.utils.cli import Parser, above, command  # noqa: E402
from nanocpo.utils.device import pick_device  # noqa: E402
from nanocpo.utils.muon import Muon  # noqa: E402

KINDS = ("sft", "dpo", "cpo")


class Enough(Exception):
    """Ends a run of fit() in the middle."""


class Bench:
    """Models and data of one size, and what a step on them costs."""

    def __init__(self, batch=32, size=32, width=1.0, device="cpu", bf16=False):
        generator, criteria = np.random.default_rng(0), Criteria.load()
        count, captions = 256, ["a boat", "a tree", "a house"]
        self.data = Paintings(
            criteria, generator.integers(0, 256, (count, size, size, 3), np.uint8),
            [captions[i % 3] for i in range(count)],
            generator.integers(-1, 2, (count, len(criteria))).astype(np.int8))
        torch.manual_seed(0)
        unet = UNetConfig(channels=tuple(int(c * width) for c in UNetConfig().channels))
        base = Model(criteria, captions, unet, size=size).to(device)
        for p in base.parameters():                  # the last layer begins at 0: no gradients
            p.data += 0.01 * torch.randn_like(p)
        self.base, self.auxiliary = base.frozen_copy(), base.frozen_copy()
        self.auxiliary.unet.conv_in.weight.data *= 1.1
        self.settings = TOY.changed(batch=batch, device=str(device), paint=0)   # no sampling first
        self.device, self.bf16 = torch.device(device), bf16

    def loss_step(self, kind):
        """What fit() is given for a step of this kind, as the training scripts give it."""
        if kind == "sft":
            return sft_loss_step(self.settings, self.data, method.attribute_prompts)
        return alignment_step(self.settings.changed(method=kind), self.data, self.base,
                              self.auxiliary)

    def ours(self, kind, steps):
        """Seconds of each of `steps` steps in the real loop, after two that warm up: from one call
        of loss_step to the next, so optimiser, average and log are in it."""
        loss_step, entered = self.loss_step(kind), []

        def timed(model, generator):
            self.wait()
            entered.append(time.perf_counter())
            if len(entered) == steps + 3:
                raise Enough
            return loss_step(model, generator)
        with tempfile.TemporaryDirectory() as out, redirect_stderr(io.StringIO()):
            try:
                train.fit(self.base.frozen_copy().requires_grad_(True), timed,
                          train.Recipe(1000, 1e-4, muon=kind == "sft"), Path(out) / "x.pt",
                          name="x", bf16=self.bf16, save_every=10 ** 6)
            except Enough:
                return np.diff(entered)[2:]

    def plain(self, steps):
        """The same for a CPO step as one would write it on diffusers: three UNets, two calls of
        the auxiliary, AdamW, a loop for the averaged weights."""
        target, reference, auxiliary = (self.diffusers_unet() for _ in range(3))
        optimiser = torch.optim.AdamW(target.parameters(), lr=1e-4)
        average = [p.detach().clone() for p in target.parameters()]
        leaves, generator = len(self.data.criteria), torch.Generator().manual_seed(0)
        words = torch.randn(3, self.settings.common.batch, 1 + leaves, 64, device=self.device)
        entered, batch = [], self.settings.common.batch
        for _ in range(steps + 3):
            self.wait()
            entered.append(time.perf_counter())
            pictures = self.data.draw(batch, generator).images.to(self.device)
            x0 = self.base.latents.encode(pictures)
            t = torch.randint(1000, (batch,), generator=generator)
            noise = torch.randn(x0.shape, generator=generator).to(self.device)
            xt, t = self.base.diffusion.q_sample(x0, t, noise), t.to(self.device)

            def call(unet, context):
                return unet(xt, t, context, class_labels=context.mean(1)).sample
            optimiser.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                with torch.no_grad():
                    z_win, z_lose = call(auxiliary, words[0]), call(auxiliary, words[1])
                    eps_ref = call(reference, words[2])
                loss = cpo_loss(call(target, words[2]), eps_ref, z_win, z_lose)[0]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(target.parameters(), 1.0)
            optimiser.step()
            with torch.no_grad():
                for mean, p in zip(average, target.parameters()):
                    mean.lerp_(p, 0.005)
        return np.diff(entered)[2:]

    def diffusers_unet(self):
        """The toy's UNet in diffusers."""
        import diffusers
        ours, edge = self.base.unet.config, self.base.latent_shape[1]
        levels = len(ours.channels)
        unet = diffusers.UNet2DConditionModel(
            sample_size=edge, in_channels=ours.in_channels, out_channels=ours.out_channels,
            block_out_channels=ours.channels, layers_per_block=ours.layers,
            down_block_types=["DownBlock2D"] * levels, up_block_types=["UpBlock2D"] * levels,
            cross_attention_dim=ours.context_dim, attention_head_dim=ours.heads[0],
            norm_num_groups=ours.groups, use_linear_projection=True,
            class_embed_type="projection", projection_class_embeddings_input_dim=ours.vector_dim)
        here, there = (sum(p.numel() for p in net.parameters()) for net in (self.base.unet, unet))
        assert here == there, f"{here} parameters, in diffusers {there}"
        return unet.to(self.device)

    def wait(self):
        """Until the GPU has done what it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def flops(self, kind):
        """Floating point operations of matrix products and convolutions in one step of the
        models."""
        model, generator = self.base.frozen_copy().requires_grad_(True), torch.Generator()
        with FlopCounterMode(display=False) as counter:
            loss, _, _ = self.loss_step(kind)(model, generator)
            loss.backward()
        return counter.get_total_flops()

    def forward_flops(self):
        """The same of one model's forward pass on a batch."""
        batch, x = self.settings.common.batch, self.base.latent_shape
        prompts = [self.base.criteria.prompt("a boat")] * batch
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.base(torch.randn(batch, *x, device=self.device),
                      torch.zeros(batch, dtype=torch.long, device=self.device), prompts)
        return counter.get_total_flops()

    def parts(self, steps=20):
        """{part: share of a CPO step}, over steps of which one writes the log; the copies of the
        model at the start are in "the rest"."""
        watch = Stopwatch(self.wait)
        forward = Model.forward

        def named_forward(model, *inputs):
            part = "reference" if model is self.base else "target, forward"
            with nullcontext() if model is self.auxiliary else watch.part(part):
                return forward(model, *inputs)
        Model.forward = named_forward
        places = [(Paintings, "draw", "data"), (PromptEncoder, "tokens", "prompts"),
                  (method, "add_noise", "noise"), (method, "preference_prompts", "prompts"),
                  (method, "two_targets", "auxiliary"), (method, "cpo_loss", "loss"),
                  (torch.Tensor, "backward", "backward"),
                  (torch.nn.utils, "clip_grad_norm_", "gradient norm"),
                  (Muon, "step", "optimiser"),
                  (train.TrainingState, "step", "average"), (log.Log, "write", "log")]
        try:
            with watch.on(places), watch.part("the rest"):
                self.ours("cpo", steps)
        finally:
            Model.forward = forward
        total = sum(watch.seconds.values())
        return {name: seconds / total for name, seconds in watch.seconds.items()}


class Stopwatch:
    """Adds up the seconds of parts; what a part inside a part takes counts for the inner one."""

    def __init__(self, wait):
        self.wait, self.seconds, self.open = wait, {}, []

    @contextmanager
    def part(self, name):
        self.wait()
        start = time.perf_counter()
        self.open.append(0.0)
        try:
            yield
        finally:
            self.wait()
            whole = time.perf_counter() - start
            inner = self.open.pop()
            self.seconds[name] = self.seconds.get(name, 0) + whole - inner
            if self.open:
                self.open[-1] += whole

    @contextmanager
    def on(self, places):
        """Watch the functions (owner, attribute, name of the part) inside the with-block."""
        def watched(function, name):
            def run(*args, **named):
                with self.part(name):
                    return function(*args, **named)
            return run
        before = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in places]
        try:
            for owner, attribute, name in places:
                setattr(owner, attribute, watched(getattr(owner, attribute), name))
            yield
        finally:
            for owner, attribute, function in before:
                setattr(owner, attribute, function)


def middle(values):
    """(median, smallest, largest)."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2], ordered[0], ordered[-1]


def has_diffusers():
    try:
        import diffusers  # noqa: F401
    except ImportError:
        print("without diffusers (pip install -e '.[oracle]') the plain step is left out\n")
        return False
    return True


def compare(args):
    """Alternate all steps, print the tables; returns {kind: median seconds}."""
    bench = Bench(args.batch, device=args.device, bf16=args.bf16)
    kinds = [*KINDS, "plain"] if has_diffusers() else list(KINDS)
    seconds, products = {kind: [] for kind in kinds}, []
    for _ in range(args.rounds):
        products.append(product(bench.device, torch.bfloat16 if bench.bf16 else torch.float32))
        for kind in kinds:
            run = bench.plain if kind == "plain" else lambda n: bench.ours(kind, n)
            seconds[kind].extend(run(args.steps))
    unit, peak = bench.forward_flops(), max(products)
    flops = {kind: bench.flops(kind) for kind in KINDS}
    flops["plain"] = flops["cpo"]
    print(f"{where(bench)}; batch {args.batch}, {'bfloat16' if args.bf16 else 'float32'}; "
          f"{args.rounds} rounds of {args.steps} steps")
    print(f"matrix product {peak / 1e9:.0f} GFLOP/s; forward pass of a batch "
          f"{unit / 1e9:.2f} GFLOP\n")
    print("| step | ms (range) | to the plain CPO step | forward units | GFLOP/s | "
          "of the matrix product |\n|---|---|---|---|---|---|")
    medians = {kind: middle(seconds[kind])[0] for kind in kinds}
    for kind in kinds:
        median, low, high = (1000 * x for x in middle(seconds[kind]))
        rate = flops[kind] / medians[kind]
        ratio = f"{medians[kind] / medians['plain']:.2f}" if "plain" in medians else ""
        name = "CPO, plain, on diffusers" if kind == "plain" else kind.upper()
        print(f"| {name} | {median:.1f} ({low:.1f} to {high:.1f}) | {ratio} | "
              f"{flops[kind] / unit:.1f} | {rate / 1e9:.0f} | {rate / peak:.0%} |")
    print("\n| part of a CPO step | share |\n|---|---|")
    for name, share in sorted(bench.parts().items(), key=lambda item: -item[1]):
        print(f"| {name} | {share:.1%} |")
    if bench.device.type == "cuda":
        print(f"\nthe host waits for the GPU {synchronisations(bench)} times in a step; peak "
              f"memory {torch.cuda.max_memory_allocated() / 2 ** 20:.0f} MiB")
    return medians


def synchronisations(bench):
    """How often the host waits for the GPU in one CPO step (loss, backward, optimiser)."""
    bench.ours("cpo", 1)
    bench.wait, wait = (lambda: None), bench.wait
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        bench.ours("cpo", 10)
        torch.cuda.set_sync_debug_mode("default")
    bench.wait = wait
    return sum("synchroniz" in str(w.message) for w in seen) / 13


def where(bench):
    """The machine in words."""
    if bench.device.type == "cuda":
        name = torch.cuda.get_device_name(bench.device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text(encoding="utf-8") if info.exists() else ""
        names = [line.split(":")[1].strip() for line in lines.splitlines() if "model name" in line]
        name = f"{(names or ['processor'])[0]}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


# --- growth

GROWTH = {"batch": (8, 16, 32, 64), "size": (16, 32, 64, 128), "width": (0.5, 1.0, 2.0, 4.0)}


def one(args):
    """Seconds and peak memory (MiB over the imports) of a CPO step of one size."""
    before = peak(args.device)
    bench = Bench(args.batch, args.size, args.width, args.device, args.bf16)
    print(f"{middle(bench.ours('cpo', args.steps))[0]} {peak(args.device) - before}")


def growth(args):
    """A process for each size, since a peak never falls; the table, the exponents, the plot."""
    found = {}
    for name, values in GROWTH.items():
        for value in values:
            flags = [f"--{name}", str(value), "--device", str(args.device), "--steps",
                     str(args.steps), *["--bf16"] * args.bf16]
            out = subprocess.run([sys.executable, __file__, "one", *flags],
                                 stdout=subprocess.PIPE, text=True, check=True).stdout
            found[name, value] = tuple(map(float, out.split()))
    print("| | value | ms | MiB | exponent of time | of memory |\n|---|---|---|---|---|---|")
    for name, values in GROWTH.items():
        for before, value in zip((None, *values), values):
            here, exponents = found[name, value], ["", ""]
            if before:
                step = np.log(value / before)
                exponents = [f"{np.log(b / a) / step:.2f}"
                             for a, b in zip(found[name, before], here)]
            print(f"| {name} | {value:g} | {1000 * here[0]:.0f} | {here[1]:.0f} | "
                  + " | ".join(exponents) + " |")
    if args.plot:
        plot(found, args.plot)
    return found


def plot(found, path):
    """Each curve against its own default, both axes in doublings: the slope is the exponent."""
    from nanocpo.study.plots import line_chart
    default, series = {"batch": 32, "size": 32, "width": 1.0}, {}
    for i, what in enumerate(("time", "memory")):
        for name, values in GROWTH.items():
            middle = found[name, default[name]][i]
            series[f"{what}, {name}"] = (
                [float(np.log2(value / default[name])) for value in values],
                [float(np.log2(found[name, value][i] / middle)) for value in values],
                [0.0] * len(values))
    line_chart(path, series, "A CPO step against batch, side of the pictures, width of the UNet",
               "doublings from 32 pictures, 32 pixels, full width", "doublings of time or memory")


def main(argv=None):
    """Parse the flags, measure, print."""
    parser = Parser(description=__doc__.split("\n")[0],
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["compare", "growth", "one"],
                        default="compare", help="one: a single size of growth")
    parser.add_argument("--rounds", type=above(0), default=5)
    parser.add_argument("--steps", type=above(0), default=5, help="of a round")
    parser.add_argument("--batch", type=above(0), default=32)
    parser.add_argument("--size", type=multiple(8), default=32, help="side of a picture (one)")
    parser.add_argument("--width", type=multiple(0.25, float), default=1.0,
                        help="share of the UNet's channels (one)")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", type=pick_device, default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--plot", help="growth: write the curves to this PNG")
    args = parser.parse_args(argv)
    return {"compare": compare, "growth": growth, "one": one}[args.what](args)


if __name__ == "__main__":
    command(main)
