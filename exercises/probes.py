"""The checks of every exercise: random inputs, one call, everything that can be seen of the answer.
No formula stands here, so the file can be read before the exercise is solved.

`draw` makes the inputs: another seed, other numbers *and* other shapes. Sizes are unequal and a
batch has at least three samples, or a sum could be taken for a mean and an axis for another.
"""
import inspect
import random
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import torch

from nanocpo import diffusion, losses, method
from nanocpo.criteria import Criteria
from nanocpo.diffusion import Diffusion
from nanocpo.toy import critic
from nanocpo.unet import Attention

Check = namedtuple("Check", "tier run asks")
CHECKS = {}                                 # exercise -> {name: Check}
HALF = torch.bfloat16


def check(number, tier, asks="", when=True):
    """Register a function draw -> {name: value} as a check. asks: what is asked here, where it is
    more than the exercise's equation; when: whether the code has what it is about."""
    def register(run):
        if when:
            CHECKS.setdefault(number, {})[run.__name__] = Check(tier, run, asks)
        return run
    return register


class Draw:
    """Random inputs from a seed (any text)."""

    def __init__(self, seed):
        self.random = random.Random(seed)   # a text seeds it alike everywhere
        self.generator = torch.Generator().manual_seed(self.random.randrange(2 ** 40))

    def whole(self, low, high):
        return self.random.randint(low, high)

    def shape(self, channels=(2, 3)):
        """(B, C, H, W), all of them different."""
        high = self.whole(4, 5)
        return self.whole(3, 4), self.whole(*channels), high, high + self.whole(1, 2)

    def normal(self, *shape, dtype=torch.float64):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def like(self, count, dtype=torch.float64, channels=(2, 3)):
        """`count` pictures' tensors of one shape; they want gradients."""
        shape = self.shape(channels)
        return [self.normal(*shape, dtype=dtype).requires_grad_() for _ in range(count)]

    def times(self, count, steps=1000):
        """A timestep for each of a batch, the first one and the last one among them."""
        middle = [self.whole(100, steps - 100) for _ in range(count - 2)]
        return torch.tensor([0, *middle, steps - 1])


def gradients(loss, **inputs):
    """{"gradient of x": tensor, or None where none arrives}."""
    if not loss.requires_grad:
        return {f"gradient of {name}": None for name in inputs}
    found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    return {f"gradient of {name}": g for name, g in zip(inputs, found)}


def seen(answer, names="margin", **inputs):
    """A loss's answer (loss, logs): value, some logs, gradients with respect to the inputs."""
    loss, logs = answer
    return ({"loss": loss} | {f"log {name}": logs.get(name) for name in names.split()}
            | gradients(loss, **inputs))


# --- 1 and 2: noise, goals, conversions

def has(prediction):
    """Whether this code knows a prediction; flow matching came later."""
    try:
        return bool(Diffusion("cosine", prediction))
    except ValueError:
        return False


@check(1, "core")
def noised(draw):
    x0, noise = draw.like(2)
    return {"x_t": Diffusion("cosine", "v").q_sample(x0, draw.times(len(x0)), noise)}


@check(1, "core")
def goals(draw):
    x0, noise = draw.like(2)
    t = draw.times(len(x0))
    return {f"goal of {kind}": Diffusion("cosine", kind).goal(x0, t, noise)
            for kind in ("eps", "v")}


@check(1, "robust", "half precision comes in and goes out")
def noised_in_half_precision(draw):
    x0, noise = draw.like(2, HALF)
    world = Diffusion("scaled_linear", "v")
    t = draw.times(len(x0))
    return {"x_t": world.q_sample(x0, t, noise), "goal": world.goal(x0, t, noise)}


@check(1, "robust", "the velocity of flow matching (E20), from scales as they are there",
       when=has("flow"))
def flow_goal(draw):
    x0, noise = draw.like(2)
    world, t = Diffusion("cosine", "flow"), draw.times(len(x0))
    return {"x_t": world.q_sample(x0, t, noise), "goal": world.goal(x0, t, noise)}


def converted(draw, kind, dtype=torch.float64):
    prediction, xt = draw.like(2, dtype)
    t = draw.times(len(xt)).clamp(5, 990)
    x0, eps = Diffusion("cosine", kind).x0_and_eps(prediction, xt, t)
    return {"x0": x0, "eps": eps}


@check(2, "core")
def from_eps(draw):
    return converted(draw, "eps")


@check(2, "core")
def from_v(draw):
    return converted(draw, "v")


@check(2, "robust", "half precision comes in and goes out")
def from_v_in_half_precision(draw):
    return converted(draw, "v", HALF)


@check(2, "robust", "the same from flow matching's velocity (E20)", when=has("flow"))
def from_flow(draw):
    return converted(draw, "flow")


# --- 3: one reverse step

def stepped(draw, eta, to_picture=False, clip=None, dtype=torch.float64, kind="v"):
    prediction, xt = (x.detach() for x in draw.like(2, dtype))
    world, now = Diffusion("cosine", kind), draw.whole(400, 800)
    there = torch.tensor(1.0) if to_picture else world.alpha_bar[now - draw.whole(50, 300)]
    return {"x": world.step(prediction, xt, now, there, eta, draw.generator, clip)}


@check(3, "core", "eta 0: no noise is added")
def ddim(draw):
    return stepped(draw, 0.0)


@check(3, "core", "eta 0.6 and 1: noise of standard deviation sigma")
def ddpm(draw):
    return {f"x with eta {eta}": stepped(draw, eta)["x"] for eta in (0.6, 1.0)}


@check(3, "robust", "the last step, alpha_bar_next = 1, ends at x_0")
def to_the_picture(draw):
    return stepped(draw, 1.0, to_picture=True)


@check(3, "robust", "clip moves x_0; the noise in x_t is then what is left of it")
def clipped(draw):
    return stepped(draw, 0.0, clip=lambda x0: x0.clamp(-0.5, 0.5))


@check(3, "robust", "float32 comes in and goes out")
def step_in_float32(draw):
    return stepped(draw, 1.0, dtype=torch.float32, kind="eps")


# --- 4: guidance and prompt drop

@check(4, "core")
def guided(draw):
    positive, negative = draw.like(2, channels=(5, 6))
    out = {f"scale {s}": diffusion.guide(positive, negative, s) for s in (0.0, 1.0, 2.5)}
    return out | gradients(out["scale 2.5"].square().sum(), positive=positive, negative=negative)


@check(4, "core")
def dropped(draw):
    captions = [f"a boat {i}" for i in range(draw.whole(12, 17))]
    return {f"probability {p}": method.drop_caption(captions, draw.generator, p)
            for p in (0.0, 0.3, 1.0)}


@check(4, "robust", "the list that comes in is left as it is; 10 % unless another share is asked")
def dropped_by_default(draw):
    captions = ["a tree"] * draw.whole(40, 60)
    out = method.drop_caption(captions, draw.generator)
    return {"new": out, "old": captions}


@check(4, "robust", "half precision comes in and goes out")
def guided_in_half_precision(draw):
    return {"guided": diffusion.guide(*draw.like(2, HALF), 2.0)}


# --- 5: attention

def attended(draw, context_dim=None, scale=1.0, dtype=torch.float64):
    heads, batch = draw.whole(2, 3), draw.whole(3, 4)
    dim = heads * 4
    layer = Attention(dim, heads, context_dim).double()
    for p in layer.parameters():
        p.data = draw.normal(*p.shape) * scale / p.shape[-1] ** 0.5
    x = draw.normal(batch, 5, dim, dtype=dtype).requires_grad_()
    context = draw.normal(batch, 7, context_dim, dtype=dtype).requires_grad_() \
        if context_dim else None
    return layer.to(dtype), x, context


@check(5, "core", "from x to itself")
def self_attention(draw):
    layer, x, _ = attended(draw)
    return {"out": layer(x)}


@check(5, "core", "from x (B, 5, dim) to a context (B, 7, context_dim)")
def cross_attention(draw):
    layer, x, context = attended(draw, 6)
    return {"out": layer(x, context)}


@check(5, "robust", "large products must not overflow")
def large_products(draw):
    layer, x, context = attended(draw, 6, scale=50.0, dtype=torch.float32)
    return {"out": layer(x, context)}


@check(5, "robust", "gradients reach x and the context")
def attention_gradients(draw):
    layer, x, context = attended(draw, 6)
    return gradients(layer(x, context).square().mean(), x=x, context=context)


# --- 6: the two prompts

TREE = {"name": "T", "children": [
    {"name": "A", "children": [{"name": n, "positive": f"good {n}", "negative": f"bad {n}"}
                               for n in ("one", "two", "three")]},
    *({"name": n, "positive": f"good {n}", "negative": f"bad {n}"} for n in ("four", "five"))]}


def prompted(draw, pairs, columns):
    count = draw.whole(3, 5)
    states = np.array([[(draw.whole(0, 99) + i + j) % 3 - 1 for j in range(5)]
                       for i in range(count)], np.int8)
    states[0] = [1, -1, 0, 1, -1]           # every state in the branch and outside
    batch = SimpleNamespace(captions=[f"a boat {i}" for i in range(count)], annotations=states)
    before = states.copy()
    win, lose = method.preference_prompts(Criteria(TREE), batch, columns, pairs)
    return {"win": [str(p) for p in win], "lose": [str(p) for p in lose],
            "annotations changed": str(bool((before != states).any()))}


@check(6, "core", "pairs own, all leaves")
def own_pairs(draw):
    return prompted(draw, "own", range(5))


@check(6, "core", "pairs completed and opposite, all leaves")
def other_pairs(draw):
    return {f"{key} of {pairs}": value for pairs in ("completed", "opposite")
            for key, value in prompted(draw, pairs, range(5)).items()}


@check(6, "core", "pairs all, whether judged or not")
def all_pairs(draw):
    return prompted(draw, "all", [0, 1, 2])


@check(6, "robust", "columns: the other leaves stand in both prompts as they are")
def a_branch(draw):
    return prompted(draw, "opposite", [0, 2])


# --- 7: SFT and the preference loss

def changes(draw, scale=1.0, dtype=torch.float64):
    """Two changes of error (B,), a beta and a lam for each."""
    count = draw.whole(4, 6)
    win, lose = (scale * draw.normal(count, dtype=dtype) for _ in range(2))
    beta, lam = draw.normal(count, dtype=dtype).abs() + 0.5, draw.normal(count, dtype=dtype).abs()
    return win.requires_grad_(), lose.requires_grad_(), beta, lam


@check(7, "core")
def sft(draw):
    eps, goal = draw.like(2)
    return seen(losses.sft_loss(eps, goal), "loss", eps=eps)


@check(7, "core", "beta a number, lam 1")
def preferred(draw):
    win, lose, _, lam = changes(draw)
    return seen(losses.preference_loss(win, lose, 1.7, torch.ones_like(lam)), win=win, lose=lose)


@check(7, "core", "beta for each sample; lam scales the loser's gradient, not the value")
def straight_through(draw):
    win, lose, beta, lam = changes(draw)
    return seen(losses.preference_loss(win, lose, beta, lam), win=win, lose=lose)


@check(7, "robust", "half precision in, float32 inside; margins of ten thousand; all logs")
def large_margins_and_logs(draw):
    eps, goal = draw.like(2, HALF)
    win, lose, beta, lam = changes(draw, 1e4)
    return ({f"sft {k}": v for k, v in seen(losses.sft_loss(eps, goal), "loss", eps=eps).items()}
            | seen(losses.preference_loss(win, lose, beta, lam),
                   "loss margin accuracy weight lam valid", win=win, lose=lose))


@check(7, "robust", "samples that do not count; if none does, log 2 without a gradient")
def masked(draw):
    win, lose, beta, lam = changes(draw)
    valid = torch.arange(len(win)) % 2 == 0
    out = seen(losses.preference_loss(win, lose, beta, lam, valid), win=win, lose=lose)
    nothing = torch.zeros_like(valid)
    empty = losses.preference_loss(0 * win, 0 * lose, beta, lam, nothing)[0]
    slope = gradients(empty, win=win)["gradient of win"]
    slope = torch.zeros_like(win) if slope is None else slope
    return out | {"no sample": empty, "its slope": slope}


@check(7, "robust", "the step's noise, kept: the mean loss over margins u + spread n (E21)",
       when="spread" in inspect.signature(losses.preference_loss).parameters)
def step_noise(draw):
    win, lose, beta, lam = changes(draw)
    return seen(losses.preference_loss(win, lose, beta, lam, spread=beta + 0.3), "loss margin",
                win=win, lose=lose)


# --- 8: Diffusion-DPO

DPO = "eps_win ref_win goal_win eps_lose ref_lose goal_lose".split()


@check(8, "core")
def pair(draw):
    x = dict(zip(DPO, draw.like(6)))
    return seen(losses.dpo_loss(**x, beta=1.3), eps_win=x["eps_win"], eps_lose=x["eps_lose"])


@check(8, "core", "a stabiliser's lam (restraint) holds the loser back")
def stabilised_pair(draw):
    x = dict(zip(DPO, draw.like(6)))
    out = losses.dpo_loss(**x, beta=0.9, stabilizer="constant", strength=0.4)
    return seen(out, "margin lam", eps_win=x["eps_win"], eps_lose=x["eps_lose"])


@check(8, "robust", "only the target learns; valid is passed on; all logs")
def only_the_target(draw):
    x = dict(zip(DPO, draw.like(6)))
    valid = torch.arange(len(x["eps_win"])) != 1
    return seen(losses.dpo_loss(**x, beta=1.1, stabilizer="safeguard", strength=0.3, valid=valid),
                "loss margin lam valid winner winner_ref loser loser_ref", **x)


@check(8, "robust", "half precision in, float32 inside")
def pair_in_half_precision(draw):
    x = dict(zip(DPO, draw.like(6, HALF)))
    return seen(losses.dpo_loss(**x, beta=1.3), "margin winner loser", eps_win=x["eps_win"])


@check(8, "robust", "errors that are almost equal, in float32: as a product (losses._change)")
def nearly_equal_errors(draw):
    x = {name: value.detach() for name, value in zip(DPO, draw.like(6, torch.float32))}
    x |= {f"eps_{side}": x[f"ref_{side}"] + 1e-5 * x[f"eps_{side}"] for side in ("win", "lose")}
    return seen(losses.dpo_loss(**x, beta=1e4))


# --- 9: CPO

CPO = "eps eps_ref z_win z_lose".split()


@check(9, "core")
def vanilla(draw):
    x = dict(zip(CPO, draw.like(4)))
    return seen(losses.cpo_loss(**x, beta=0.8, stabilizer="none"), eps=x["eps"])


@check(9, "core", "beta None: 4 / |z_win - z_lose|^2 for each sample (E16)")
def scale_free(draw):
    x = dict(zip(CPO, draw.like(4)))
    return seen(losses.cpo_loss(**x, stabilizer="constant", strength=0.3), "margin lam",
                eps=x["eps"])


@check(9, "core", "strength None: the rule's usual one (RULES)")
def usual_strength(draw):
    x = dict(zip(CPO, draw.like(4)))
    return seen(losses.cpo_loss(**x, beta=0.5), "margin lam", eps=x["eps"])


@check(9, "robust", "a sample with z_win = z_lose is masked out; only eps learns; all logs")
def equal_targets(draw):
    x = dict(zip(CPO, draw.like(4)))
    x["z_lose"] = torch.cat([x["z_win"][:1], x["z_lose"][1:]]).detach().requires_grad_()
    answer = losses.cpo_loss(**x)
    return seen(answer, "loss margin valid gap winner winner_ref loser loser_ref weight", **x)


@check(9, "robust", "half precision in, float32 inside: the gap is small")
def small_gap_in_half_precision(draw):
    x = dict(zip(CPO, draw.like(4, HALF)))
    x["z_lose"] = (x["z_win"] + 0.05 * x["z_lose"]).detach()
    return seen(losses.cpo_loss(**x), "margin gap", eps=x["eps"])


# --- 11: the stabilisers

def three(draw, dtype=torch.float64):
    """|g_win|^2, |g_lose|^2 and <g_win, g_lose> of random gradients."""
    win, lose = draw.normal(9, 4), draw.normal(9, 4)
    win[::2] += 2 * lose[::2]                 # with and without a conflict
    return [x.mean(1).to(dtype) for x in (win * win, lose * lose, win * lose)]


@check(11, "core")
def safeguard(draw):
    return {f"lam with mu {mu}": losses._safeguard(*three(draw), mu) for mu in (0.1, 0.7)}


@check(11, "core")
def balance(draw):
    return {f"lam of strength {s}": losses._balance(*three(draw), s) for s in (0.5, 1.0)}


@check(11, "robust", "at the winner nothing moves; at the loser nothing is infinite")
def edges(draw):
    win, lose, dot = three(draw)
    win[0], dot[0], dot[1] = 0, 0, 0
    other = three(draw)
    other[0][1], other[2][1], other[0][2] = 0, 0, 1e-20
    return {"safeguard": losses._safeguard(win, lose, dot, 0.2),
            "balance": losses._balance(*other, 1.0), "balance, far": losses._balance(
                win, lose.clone().index_fill(0, torch.tensor([0]), 0), dot, 1.0)}


@check(11, "robust", "in the loss, each sample its own lam")
def in_the_loss(draw):
    out = {}
    for rule in ("safeguard", "balance", "clamped"):
        x = dict(zip(CPO, draw.like(4)))
        out |= {f"{rule}: {key}": value for key, value in seen(
            losses.cpo_loss(**x, stabilizer=rule), "lam", eps=x["eps"]).items()}
    return out


# --- 12: one measure of the critic

def painted(draw, strength, low=0.4):
    """Lightness (N, 32, 32): a smooth sky, noise, and hatching of this strength."""
    y, x = np.mgrid[:32, :32]
    count = draw.whole(3, 4)
    phase = draw.normal(count, 1, 1).numpy()
    smooth = low + 0.2 * low * np.sin(phase + y / 20)
    wave = strength * np.sin(2 * np.pi / critic.HATCHING * (x + y) + phase)
    return np.clip(smooth * (1 + wave) + 0.01 * low * draw.normal(count, 32, 32).numpy(), 0, 1)


def hatched(draw, strength, low=0.4):
    amplitude, factor = critic.find_hatching(painted(draw, strength, low))
    return {"amplitude": amplitude, "factor at some pixels": factor[:, 3:6, 10:13],
            "factor's spread": np.asarray(factor).std((1, 2))}


@check(12, "core")
def hatching(draw):
    return hatched(draw, 0.25)


@check(12, "core", "a dark picture's hatching counts as much")
def dark_hatching(draw):
    return hatched(draw, 0.2, low=0.1)


@check(12, "robust", "no hatching (amplitude at most 0.05): the factor is 1")
def clean(draw):
    return hatched(draw, 0.0)


@check(12, "robust", "a black picture is no reason to divide by zero")
def black(draw):
    amplitude, factor = critic.find_hatching(0 * painted(draw, 0.0))
    return {"amplitude": amplitude, "factor": factor[:, :2, :2]}
