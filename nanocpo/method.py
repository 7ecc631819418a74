"""The method of arXiv 2601.04300: one batch of stage 1 and one batch of stage 2, from pictures to
the loss. What CPO is compared with stands in nanocpo/run/baselines.py.

    stage 1, sft_step    the auxiliary learns prompts that list an image's attributes
    stage 2, cpo_step    the target, which sees plain captions, learns from the auxiliary

"E2" and the like are equations of docs/derivation.md. Random numbers come from one CPU generator,
so a seed means the same on every device. "Leaves" are the attribute pairs at the tree's tips.
"""
import numpy as np
import torch

from .losses import cpo_loss, sft_loss
from .utils.device import send


# --- what is noised, and how much

def draw_t(count, steps, generator, lean):
    """count timesteps t = T u^lean with u uniform in [0, 1) (ours; E18): below 1, `lean` favours
    noise, where hue and subject are decided. Stage 1 takes 0.7 (63 % in the noisy half), CPO 0.4
    (82 %). u is stratified, one in each of `count` equal parts of [0, 1): a batch sees all noise
    levels (2107.00630)."""
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (steps * u ** lean).long().clamp(max=steps - 1)


def add_noise(model, batch, t, generator, noise=None):
    """A Batch at timesteps t (B,), on the CPU, -> (x_t, x_0, noise), each (B, C, h, w) on the
    model's device. noise None: fresh noise."""
    if batch.latents is not None:
        x0 = send(batch.latents, model.device)
    else:
        with torch.autocast(model.device.type, enabled=False):       # --bf16 would round pictures
            x0 = model.latents.encode(send(batch.images, model.device))
    if noise is None:
        noise = send(torch.randn(x0.shape, generator=generator), model.device)
    return model.diffusion.q_sample(x0, t, noise), x0, noise


# --- stage 1: what a model is shown, and its loss

def drop_caption(captions, generator, probability=0.1):
    """Each caption becomes "" with this probability: how the unconditional prompt is learned
    (2207.12598)."""
    chance = torch.rand(len(captions), generator=generator).tolist()
    return ["" if u < probability else caption for caption, u in zip(captions, chance)]


def caption_prompts(criteria, batch, generator):
    """The base model's prompts: captions only, some dropped."""
    return [criteria.prompt(caption) for caption in drop_caption(batch.captions, generator)]


def attribute_prompts(criteria, batch, generator):
    """The auxiliary's prompts: each image's caption with a random part of its annotation, so that
    every kind of prompt that is asked for later was seen, and a dropped caption for guidance.
    Shares (ours): 50 % see all attributes, 20 % a random part, 10 % each the positive ones only,
    the negative ones only, and nothing but the caption."""
    annotations = batch.annotations.copy()                           # (B, leaves)
    count, leaves = annotations.shape
    kind, keep, mask = (torch.rand(shape, generator=generator).numpy()
                        for shape in ((count,), (count, 1), (count, leaves)))
    kind = kind[:, None]
    annotations[(kind < 0.1) & (annotations < 0)] = 0                    # the positive ones only
    annotations[(kind >= 0.1) & (kind < 0.2) & (annotations > 0)] = 0    # the negative ones only
    annotations[(kind >= 0.7) & (mask >= keep)] = 0                      # a random part
    annotations[(kind >= 0.9)[:, 0]] = 0                                 # nothing but the caption
    captions = drop_caption(batch.captions, generator)
    return [criteria.prompt(caption, a) for caption, a in zip(captions, annotations)]


def sft_step(model, criteria, batch, make_prompts, generator, lean, weight=None):
    """Stage 1, one batch: (loss, logs, t) of plain denoising under the prompts that
    make_prompts(criteria, batch, generator) gives: caption_prompts or attribute_prompts.
    weight(t) (B,): of each sample's error; None: 1."""
    t = draw_t(len(batch.captions), model.diffusion.steps, generator, lean)
    xt, x0, noise = add_noise(model, batch, t, generator)
    prompts = make_prompts(criteria, batch, generator)
    prediction = model(xt, send(t, model.device), prompts)
    weights = weight and send(weight(t), model.device)
    return *sft_loss(prediction, model.diffusion.goal(x0, t, noise), weights), t


# --- stage 2: the two prompts, the two targets, and the loss

def preference_prompts(criteria, batch, columns, pairs):
    """The auxiliary's two prompts for each picture: (B towards the good, B towards the bad).

    columns: the leaves to align on. The rest of the annotation stands in both prompts alike, as
    their context, so that the gap is about these leaves only (E2). pairs:
    own         the picture's own positive against its own negative attributes: what we take for
                the paper's A_pos and A_neg
    completed   (ours) each negative attribute's positive twin joins the winner
    opposite    (ours) all that are judged, positive against negative
    all         (ours) the same, whether judged or not"""
    chosen = np.isin(np.arange(len(criteria)), columns)
    win, lose = batch.annotations.copy(), batch.annotations.copy()   # each (B, leaves)
    win[chosen & (win < 0)] = 0 if pairs == "own" else 1
    lose[chosen & (lose > 0)] = -1 if pairs == "opposite" else 0
    if pairs == "all":
        win[:, chosen], lose[:, chosen] = 1, -1
    return tuple([criteria.prompt(caption, a) for caption, a in zip(batch.captions, side)]
                 for side in (win, lose))


@torch.no_grad()
def two_targets(auxiliary, xt, t, win, lose):
    """z_win and z_lose (B, C, h, w): the auxiliary's predictions at the same x_t under two lists
    of prompts. One call for both, so that the rounding of two calls is not taken for the gap."""
    return auxiliary(torch.cat([xt, xt]), torch.cat([t, t]), win + lose).chunk(2)


def cpo_step(target, reference, auxiliary, criteria, batch, generator, *, columns, pairs, lean,
             beta, stabilizer, strength):
    """Stage 2, one batch: (loss, logs, t) of Complex Preference Optimization (E2).

    target is trained; reference (the frozen base) and auxiliary are not. columns, pairs: see
    preference_prompts; lean: see draw_t; the rest: see losses.cpo_loss."""
    # Noise the pictures: one x_t each, for all four predictions.
    t = draw_t(len(batch.captions), target.diffusion.steps, generator, lean)
    xt, _, _ = add_noise(target, batch, t, generator)
    t_device = send(t, target.device)           # t itself stays on the CPU, with the schedule
    # Ask the auxiliary: where would the good attributes lead from here, and where the bad ones?
    win, lose = preference_prompts(criteria, batch, columns, pairs)
    z_win, z_lose = two_targets(auxiliary, xt, t_device, win, lose)
    # The target sees the plain caption only.
    plain = target.text.tokens([criteria.prompt(caption) for caption in batch.captions])
    eps = target(xt, t_device, plain)
    # So does the reference, where the target began.
    with torch.no_grad():
        eps_ref = reference(xt, t_device, plain)
    # Prefer z_win to z_lose, by more than the reference does.
    return *cpo_loss(eps, eps_ref, z_win, z_lose, beta, stabilizer, strength), t
