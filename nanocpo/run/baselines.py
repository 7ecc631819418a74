"""What CPO is compared with, batch by batch like nanocpo/method.py: Diffusion-DPO on pairs of
pictures, plain fine-tuning on the best pictures, ESD, and pictures that the auxiliary painted.
"E8" and the like are equations of docs/derivation.md."""
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..data import Paintings, to_images
from ..diffusion import guide
from ..losses import dpo_loss, sft_loss
from ..method import add_noise, draw_t, preference_prompts, two_targets
from ..utils.device import send


def best_pictures(data, columns, share):
    """The share of the data with the fewest negative attributes among the leaves `columns`: what
    --method sft is trained on."""
    order = np.argsort(data.badness(columns), kind="stable")
    return data.take(order[:max(1, round(len(data) * share))])


@dataclass
class Pairs:
    """Pairs of pictures with one caption, of which one has fewer negative attributes."""
    data: Paintings
    columns: list                            # leaves that are counted
    apart: int = 1                           # how many fewer at least

    def __post_init__(self):
        self.badness = self.data.badness(self.columns)
        captions = np.array(self.data.captions)
        self.groups = {caption: np.flatnonzero(captions == caption)
                       for caption in set(self.data.captions)}

    def pick(self, generator):
        """Indices (winner, loser) of one random pair that lies far enough apart."""
        for _ in range(1000):
            first = torch.randint(len(self.data), (), generator=generator).item()
            group = self.groups[self.data.captions[first]]
            second = group[torch.randint(len(group), (), generator=generator).item()]
            if abs(self.badness[first] - self.badness[second]) >= self.apart:
                better = self.badness[first] < self.badness[second]
                return (first, second) if better else (second, first)
        raise ValueError("--method dpo found no two pictures of one caption that differ in "
                         f"{self.apart} negative attributes; lower --apart")

    def draw(self, count, generator):
        """`count` random pairs: (Batch of winners, Batch of losers)."""
        winners, losers = zip(*(self.pick(generator) for _ in range(count)))
        return self.data.batch(winners), self.data.batch(losers)


def dpo_step(target, reference, criteria, pair, generator, *, lean, beta, stabilizer, strength):
    """One batch of Diffusion-DPO (E8): (loss, logs, t). pair: (winners, losers) of Pairs.draw."""
    win, lose = pair
    diffusion = target.diffusion
    t = draw_t(len(win.captions), diffusion.steps, generator, lean)
    xt_win, x0_win, noise = add_noise(target, win, t, generator)
    xt_lose, x0_lose, _ = add_noise(target, lose, t, generator, noise)       # same t, same noise
    both, times = torch.cat([xt_win, xt_lose]), send(torch.cat([t, t]), target.device)
    plain = target.text.tokens([criteria.prompt(c) for c in win.captions + lose.captions])
    with torch.no_grad():
        ref_win, ref_lose = reference(both, times, plain).chunk(2)
    eps_win, eps_lose = target(both, times, plain).chunk(2)
    goal_win, goal_lose = (diffusion.goal(x0, t, noise) for x0 in (x0_win, x0_lose))
    return *dpo_loss(eps_win, ref_win, goal_win, eps_lose, ref_lose, goal_lose, beta, stabilizer,
                     strength), t


def esd_step(target, auxiliary, criteria, batch, generator, *, columns, pairs, lean, strength):
    """One batch of ESD (erasing concepts from diffusion models, 2303.07345): (loss, logs, t) of
    plain regression to the target guided at scale 1 / (1 - k), k = strength, where CPO's rule
    `constant` ends (E17)."""
    t = draw_t(len(batch.captions), target.diffusion.steps, generator, lean)
    xt, _, _ = add_noise(target, batch, t, generator)
    t_device = send(t, target.device)
    z_win, z_lose = two_targets(auxiliary, xt, t_device,
                                *preference_prompts(criteria, batch, columns, pairs))
    eps = target(xt, t_device, target.text.tokens([criteria.prompt(c) for c in batch.captions]))
    return *sft_loss(eps, guide(z_win, z_lose, 1 / (1 - strength))), t


def painted(data, auxiliary, columns, count, steps, seed, guidance=1.0, bad_too=False):
    """The first `count` pictures of the data as the auxiliary paints them, with the leaves
    `columns` positive and the rest as annotated; bad_too: then the same with them negative, from
    the same noise. guidance: away from the opposite (1: none).

    A target that follows its goal soon sees such pictures at every noise level, and no others:
    what it learns at the data's own would be the odds of a world in which the branch is still
    flawed (ours; docs/log.md)."""
    data = data.take(range(min(count, len(data))))
    sides = []
    for sign in (1, -1):
        annotations = data.annotations.copy()                                # (N, leaves)
        annotations[:, columns] = sign
        sides.append((annotations, [data.criteria.prompt(c, a)
                                    for c, a in zip(data.captions, annotations)]))
    parts = []
    for (annotations, prompts), (_, away) in ([sides, sides[::-1]] if bad_too else [sides]):
        images = to_images(auxiliary.sample(prompts, away, guidance, steps, seed=seed))
        parts.append(replace(data, images=images, annotations=annotations))
    return replace(data, images=np.concatenate([part.images for part in parts]),
                   captions=data.captions * len(parts),
                   annotations=np.concatenate([part.annotations for part in parts]))
