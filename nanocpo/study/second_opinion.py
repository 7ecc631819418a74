"""A second opinion on the critic: two small networks, taught by the painter, judge the same
pictures (`nanocpo.study critic`).

On the painter's own pictures the truth is known. On what a model paints it is not: there the
critic is one reader, and the networks are two others that share none of its arithmetic. They are
trained with different seeds and different disturbances, so that where the three disagree it can be
seen who is the odd one out. They are no part of the critic.
"""
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data import to_images, to_tensor
from ..model import load_model
from ..toy.critic import judge
from ..toy.evaluate import evaluate
from ..toy.painter import CAPTIONS, SIZE, paint
from .plots import matrix_chart

# of training: up to how much a painting is disturbed
NETWORKS = {"first": dict(seed=1, blur=0.9, noise=0.06, blotches=0.08),
            "second": dict(seed=2, blur=0.4, noise=0.04, blotches=0.06)}
DISTURBED = {"clean": {}, "blur": dict(blur=0.6, noise=0.02), "noise": dict(noise=0.02),
             "blotches": dict(blotches=0.06, noise=0.03)}
STEPS, COUNT, HELD_OUT = 2000, 6000, 1000


def paintings(criteria, count, seed):
    """`count` paintings of random captions and independent states -> captions, signs int8
    (count, leaves), images uint8 (count, 32, 32, 3)."""
    rng, names = np.random.default_rng(seed), [leaf.name for leaf in criteria.leaves]
    captions = [str(caption) for caption in rng.choice(CAPTIONS, count)]
    signs = rng.choice([-1, 1], (count, len(names))).astype(np.int8)
    return captions, signs, np.stack([paint(caption, dict(zip(names, row)), (seed, i)) for
                                      i, (caption, row) in enumerate(zip(captions, signs))])


def disturb(x, blur=0.0, noise=0.0, blotches=0.0, generator=None):
    """x float (B, 3, 32, 32) in [-1, 1] -> the same after a Gaussian blur of `blur` pixels (sigma),
    an offset for each 4x4 block and channel and one for each pixel and channel (standard
    deviations, of the range 1 of a colour); each (a number or (B,))."""
    each = lambda amount: torch.as_tensor(amount, dtype=x.dtype).expand(len(x)).view(-1, 1, 1, 1)
    distance = torch.arange(-3, 4) ** 2
    # (B, 1, 1, 7)
    weights = torch.softmax(-distance / (2 * each(blur).clamp(min=0.05) ** 2), 3)
    for axis in (2, 3):
        pad = (0, 0, 3, 3) if axis == 2 else (3, 3, 0, 0)
        x = (F.pad(x, pad, "replicate").unfold(axis, 7, 1) * weights[..., None, :]).sum(4)
    normal = lambda *shape: torch.randn(len(x), 3, *shape, generator=generator)
    blocks = normal(SIZE // 4, SIZE // 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    x = x + 2 * (each(blotches) * blocks + each(noise) * normal(SIZE, SIZE))
    return x.clamp(-1, 1)


class Network(nn.Sequential):
    """Pictures (B, 3, 32, 32) in [-1, 1] -> logits (B, leaves + captions)."""

    def __init__(self, leaves):
        layers, width = [], 3
        for wider, kernel, stride in ((32, 4, 2), (64, 3, 1), (64, 3, 2), (64, 3, 1)):
            layers += [nn.Conv2d(width, wider, kernel, stride, 1), nn.BatchNorm2d(wider), nn.ReLU()]
            width = wider
        super().__init__(*layers, nn.Flatten(), nn.Linear(width * 64, 128), nn.ReLU(),
                         nn.Linear(128, leaves + len(CAPTIONS)))


def train_network(criteria, seed, blur, noise, blotches, batch=64):
    """A network that has seen COUNT paintings, mirrored half of the time and disturbed by up to
    the given amounts (see disturb)."""
    captions, signs, images = paintings(criteria, COUNT, 10 ** 7 + seed)
    x, signs = to_tensor(images), torch.from_numpy(signs)
    kinds = torch.tensor([CAPTIONS.index(caption) for caption in captions])
    torch.manual_seed(seed)
    network, generator = Network(len(criteria)), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, STEPS)
    for _ in range(STEPS):
        i = torch.randint(COUNT, (batch,), generator=generator)
        some = lambda most: most * torch.rand(batch, generator=generator)
        shown = disturb(x[i], some(blur), some(noise), some(blotches), generator)
        shown = torch.where(some(1).view(-1, 1, 1, 1) < 0.5, shown.flip(3), shown)
        logits = network(shown)
        loss = (F.binary_cross_entropy_with_logits(logits[:, :len(criteria)],
                                                   (signs[i] > 0).float())
                + 0.3 * F.cross_entropy(logits[:, len(criteria):], kinds[i]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def opinion(network, images):
    """uint8 (N, 32, 32, 3) -> signs (N, leaves) int8 and N captions, as the critic's."""
    logits = torch.cat([network(to_tensor(part)) for part in np.array_split(images, 16)])
    leaves = logits.shape[1] - len(CAPTIONS)
    return (np.where(logits[:, :leaves] > 0, 1, -1).astype(np.int8),
            [CAPTIONS[k] for k in logits[:, leaves:].argmax(1)])


def agreement(a, b):
    """Share of equal verdicts in each column, the caption's last: two pairs of signs (N, leaves)
    and N captions -> a list."""
    return [*(a[0] == b[0]).mean(0).tolist(), float(np.mean([x == y for x, y in zip(a[1], b[1])]))]


def readings(networks, images, criteria):
    """{reader: (signs, captions)} of the critic and the networks, and the share of the critic's
    scores within half a unit of the threshold, leaf by leaf."""
    verdicts = judge(images, criteria)
    return ({"critic": (verdicts.signs, verdicts.captions)}
            | {name: opinion(network, images) for name, network in networks.items()},
            (np.abs(verdicts.scores) < 0.5).mean(0).tolist())


def critic(lab):
    """The critic against the painter and, where no truth is known, against two trained networks."""
    args, criteria = lab.args, lab.data.criteria
    models = {"base": (lab.models["base"], "plain"),
              "prompted": (lab.models["auxiliary"], "prompted"),
              "guided": (lab.models["auxiliary"], "guided")}
    if (path := Path(args.out) / "target.pt").exists():
        models["target"] = load_model(path, lab.world.device), "plain"
    networks = {}
    for name, how in NETWORKS.items():
        print(f"critic: training the {name} network", flush=True)
        networks[name] = train_network(criteria, **how)
    captions, signs, images = paintings(criteria, HELD_OUT, 77)
    truth, known = (signs, captions), {}
    for name, how in DISTURBED.items():
        x = disturb(to_tensor(images), **how, generator=torch.Generator().manual_seed(1))
        read, _ = readings(networks, to_images(x), criteria)
        known[name] = {reader: agreement(found, truth) for reader, found in read.items()}
    _, pictures = evaluate(models, args.samples, args.seed, args.sampling_steps, args.guidance)
    pairs = [("critic", "first"), ("critic", "second"), ("first", "second")]
    seen, negative, close = {}, {}, {}
    for row, images in pictures.items():
        read, close[row] = readings(networks, images, criteria)
        seen[row] = {f"{a}, {b}": agreement(read[a], read[b]) for a, b in pairs}
        negative[row] = {reader: (found[0] < 0).mean(0).tolist() for reader, found in read.items()}
    names = [leaf.name for leaf in criteria.leaves]

    def table(columns, rows):
        """{title: lists by leaf} -> Markdown; several lists in one cell are parted by a slash."""
        body = [[name, *(" / ".join(f"{100 * x[i]:.0f}" for x in lists)
                         for lists in columns.values())] for i, name in enumerate(rows)]
        lines = [["leaf", *columns], ["---"] * (len(columns) + 1), *body]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    lists = lambda table: {title: list(by.values()) for title, by in table.items()}
    parts = ["# critic", "All numbers are in %. Agreement with the painter on "
             f"{HELD_OUT} held-out paintings: critic / first / second network.",
             table(lists(known), [*names, "caption"]),
             "Agreement on what the models paint: critic with first / critic with second / the "
             "networks with each other. No truth is known here: where the networks differ from "
             "one another, pictures lie between the two states of a leaf.",
             table(lists(seen), [*names, "caption"]),
             "Share called negative: critic / first / second.", table(lists(negative), names),
             "Share of the critic's scores within half a unit of the threshold.",
             table({row: [by] for row, by in close.items()}, names), "![chart](critic.png)",
             f"`{args.command}`; {args.samples} pictures a row, "
             f"{args.sampling_steps} sampling steps, sampling seed {args.seed}; the target, if "
             f"there is one, is OUT/target.pt; networks: {STEPS} steps of 64."]
    folder = Path(args.results)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "critic.json").write_text(json.dumps(
        {"leaves": names, "painter": known, "samples": seen, "negative": negative,
         "near the threshold": close}, indent=1), encoding="utf-8")
    (folder / "critic.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    matrix_chart(folder / "critic.png",
                 [[np.mean([by["critic, first"][i], by["critic, second"][i]])
                   for by in seen.values()] for i in range(len(names) + 1)],
                 [*names, "caption"], list(seen),
                 "The critic's agreement with the networks", middle=0.93)
    print("\n\n".join(parts))
