"""The figure of docs/derivation.md: the analytic world before and after CPO, and the path of every
stabilizer (`nanocpo.study world`)."""
import numpy as np
import torch
from PIL import Image

from ..diffusion import Diffusion, guide
from ..losses import cpo_loss
from .mixture import NEGATIVE, PLAIN, POSITIVE, flawed_world, train_residual
from .plots import COLOURS, INK, SCALE, Sheet

# pixels; the sheet of the world is the square from -REACH to REACH
PANEL, MARGIN, TOP, REACH = 250, 14, 64, 3.4
# alpha_bar of the drawn fields; k of `constant`, mild; a beta that hardly saturates here
LEVEL, K, BETA = 0.35, 0.2, 0.3
STRENGTHS = {"none": 1.0, "winner": 0.0, "constant": K, "safeguard": 0.3,
         "balance": 1.0, "clamped": 1.0}


def fields(world, steps, seed):
    """{title: eps(xt, alpha_bar)}: three that are exact, two that a tiny network learned by CPO
    from the exact base."""
    learned = {}
    for rule in ("constant", "none"):
        learned[rule] = train_residual(world, steps, BETA, rule, STRENGTHS[rule], seed,
                                       low=0.001, high=0.99)
    exact = {name: lambda xt, a, prompt=prompt: world.eps(xt, a, prompt) for name, prompt in
             (("base", PLAIN), ("positive", POSITIVE), ("negative", NEGATIVE))}

    def aligned(rule):
        def eps(xt, alpha_bar):
            with torch.no_grad():
                return exact["base"](xt, alpha_bar) + learned[rule](xt.float(), alpha_bar).to(xt)
        return eps
    guided = lambda xt, alpha_bar: guide(exact["positive"](xt, alpha_bar),
                                         exact["negative"](xt, alpha_bar), 1 / (1 - K))
    return {"base: the plain caption": exact["base"], "auxiliary: all positive": exact["positive"],
            f"auxiliary guided, scale {1 / (1 - K):g}": guided,
            f"target: CPO, constant k = {K:g}": aligned("constant"),
            "target: CPO, no stabilizer": aligned("none")}


def draw_samples(world, eps, seed, count=1200, steps=60):
    """DDIM with a field: points (count, 2), all from the same noise; x0 is kept on the sheet, as
    that of pictures is in [-1, 1]."""
    diffusion = Diffusion("cosine", "eps")
    noise = torch.randn(count, 2, 1, 1, generator=torch.Generator().manual_seed(seed),
                        dtype=torch.float64)
    predict = lambda xt, t: eps(xt, diffusion.alpha_bar[t[0]])
    return diffusion.sample(predict, noise, steps,
                            clip=lambda x0: x0.clamp(-REACH, REACH)).flatten(1)


def paths(eps_ref, z_win, z_lose, steps=600):
    """{rule: (steps + 1, 2)}: gradient flow of cpo_loss on one free output, in the time in which
    its weight beta sigmoid(-u) is 1 (E11); the steps get smaller towards the end, so that
    `safeguard` does not chatter about the winner."""
    eps_ref, z_win, z_lose = (x.view(1, 2, 1, 1) for x in (eps_ref, z_win, z_lose))
    out = {}
    for rule, strength in STRENGTHS.items():
        eps, path = eps_ref.clone().requires_grad_(), [eps_ref.flatten()]
        for step in range(steps):
            loss, logs = cpo_loss(eps, eps_ref, z_win, z_lose, 0.01, rule, strength)
            grad, = torch.autograd.grad(loss, eps)
            eps.data -= (0.03 * (1 - step / steps) + 1e-4) * grad * 2 / (0.01 * logs["weight"])
            path.append(eps.detach().flatten().clone())
        out[rule] = torch.stack(path)
    return out


def plane(left, top):
    """The map from the sheet of the world to a panel; y grows upwards."""
    return lambda p: (left + (float(p[0]) / REACH + 1) * PANEL / 2,
                      top + (1 - float(p[1]) / REACH) * PANEL / 2)


def draw_density(sheet, world, left, top, alpha_bar):
    """The plain caption's density as shades of blue."""
    n = PANEL * SCALE // 2
    axis = ((torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1) * REACH
    # rows from the top, columns from the left; x before y
    grid = torch.cartesian_prod(-axis, axis).flip(1)
    density = world.log_prob(grid[..., None, None], alpha_bar, PLAIN).exp().view(n, n, 1)
    shade = 255 - (density / density.max()).sqrt().numpy() * (255 - np.array([174, 199, 228]))
    picture = Image.fromarray(shade.round().astype(np.uint8)).resize((PANEL * SCALE, PANEL * SCALE))
    sheet.image.paste(picture, (left * SCALE, top * SCALE))


def draw_field(sheet, eps, left, top, colour):
    """Arrows of -eps on a grid: where the model moves a noised picture. A root of the length, so
    that weak parts still show."""
    axis = torch.linspace(-REACH, REACH, 14, dtype=torch.float64)[1:-1]
    points = torch.cartesian_prod(axis, axis)
    flow, at = -eps(points[..., None, None], LEVEL).flatten(1), plane(left, top)
    length = flow.norm(dim=1, keepdim=True)
    for p, v in zip(points, flow / length * (3.0 + 8.0 * length.clamp(max=4).sqrt())):
        (x, y), (dx, dy) = at(p), (float(v[0]), -float(v[1]))
        sheet.arrow(x - dx / 2, y - dy / 2, dx, dy, colour, 1.1, 4)


def draw_paths(sheet, world, left, top, width):
    """Output space at one x_t: z_l, z_w, eps_ref, the ellipse of `balance` and where each
    rule leads."""
    xt = torch.tensor([-0.55, 0.45], dtype=torch.float64).view(1, 2, 1, 1)
    eps_ref, z_win, z_lose = (world.eps(xt, LEVEL, p).flatten()
                              for p in (PLAIN, POSITIVE, NEGATIVE))
    lines = paths(eps_ref, z_win, z_lose)
    d, middle = z_win - z_lose, (z_win + z_lose) / 2
    along, height = d / d.norm(), 300
    across = torch.stack([-along[1], along[0]])
    scale = 240 / float(d.norm())

    def at(p):                      # the axis from loser to winner lies flat, the loser on the left
        off = p - middle
        return (left + 300 + float(off @ along) * scale,
                top + height / 2 + 20 - float(off @ across) * scale)
    sheet.box(left, top, left + width, top + height, outline="#bbbbbb")
    sheet.text(left + 12, top + 10,
               "one output eps at one x_t, by gradient flow: the paths of the six rules", 14)
    total, tip = float((eps_ref - z_win).norm() + (eps_ref - z_lose).norm()), float(d.norm()) / 2
    a, b = total / 2, (max(total ** 2 / 4 - tip ** 2, 0)) ** 0.5
    angle = torch.linspace(0, 2 * torch.pi, 181, dtype=torch.float64)
    ellipse = [at(middle + a * torch.cos(x) * along + b * torch.sin(x) * across) for x in angle]
    for first, second in list(zip(ellipse, ellipse[1:]))[::2]:
        sheet.line([first, second], "#bbbbbb", 1)
    start, end = at(z_lose - 0.4 * d), at(z_win + 1.9 * d)
    sheet.line([start, end], "#dddddd", 1)
    for i, (rule, path) in enumerate(lines.items()):
        shift = (i - 2.5) * 1.3                           # some run on one line: drawn side by side
        points = [at(p) for p in path[::6]]
        points = [(x, y + shift) for x, y in points if x < left + width - 180]
        sheet.line(points, COLOURS[i], 2.2)
        if rule == "none":
            sheet.arrow(points[-1][0] - 2, points[-1][1], 16, 0, COLOURS[i], 2.2, 9)
        else:
            sheet.dot(*points[-1], 4, COLOURS[i])
        y = top + 48 + 24 * i
        sheet.line([(left + width - 166, y), (left + width - 142, y)], COLOURS[i], 3)
        sheet.text(left + width - 134, y,
                   {"none": "none: for ever", "winner": "winner only",
                    "constant": f"constant, k = {K:g}"}.get(rule, rule), 13, "lm")
    for point, name, dx, dy in ((z_lose, "z_l", -6, 12), (z_win, "z_w", -4, 14),
                                (eps_ref, "eps_ref", -8, -24),
                                (z_win + K / (1 - K) * d, f"z_w + {K / (1 - K):g} d", -14, 14)):
        x, y = at(point)
        sheet.dot(x, y, 4.5, INK)
        sheet.text(x + dx, y + dy, name, 13)
    sheet.text(left + 12, top + height - 22,
               "dashed: the ellipse on which `balance` keeps the sum of the two distances (E14)",
               12)
    return {rule: [round(float(x), 4) for x in (path[-1] - z_win)] for rule, path in lines.items()}


def draw_world(path, steps=1500, seed=0):
    """Write the figure; returns its numbers: of each field's samples the share near the good
    pictures' component (within three standard deviations), their spread and how far their mean is
    from its mean."""
    world = flawed_world()
    shown = fields(world, steps, seed)
    width = len(shown) * (PANEL + MARGIN) + MARGIN
    sheet = Sheet(width, TOP + 2 * (PANEL + 40) + 340 + 16)
    sheet.text(MARGIN, 12,
               "A world with two attributes, right and up; only 2 % of its pictures (blue) are "
               "good in both", 18)
    numbers = {}
    for i, (title, eps) in enumerate(shown.items()):
        left, top, colour = (MARGIN + i * (PANEL + MARGIN), TOP,
                             COLOURS[0] if i < 3 else COLOURS[2] if i == 3 else COLOURS[1])
        sheet.text(left, top - 20, title, 13)
        draw_density(sheet, world, left, top, LEVEL)
        draw_field(sheet, eps, left, top, colour)
        sheet.box(left, top, left + PANEL, top + PANEL, outline="#bbbbbb")
        points = draw_samples(world, eps, seed)
        good = (points - world.mean[0]).norm(dim=1) < 3 * 0.4
        spread = (points - points.mean(0)).square().mean().sqrt()
        numbers[title] = [round(float(x), 4)
                          for x in (good.double().mean(), spread,
                                    (points.mean(0) - world.mean[0]).norm())]
        top += PANEL + 40
        draw_density(sheet, world, left, top, 1.0)
        at = plane(left, top)
        at_edge = (points.abs() >= REACH).any(1).double().mean()
        for p in points:
            sheet.dot(*at(p), 4 if at_edge > 0.9 else 1.3, colour)
        x, y = at(world.mean[0])
        sheet.line([(x - 7, y), (x + 7, y)], INK, 1.6)
        sheet.line([(x, y - 7), (x, y + 7)], INK, 1.6)
        sheet.box(left, top, left + PANEL, top + PANEL, outline="#bbbbbb")
        note = ", all in a corner" if at_edge > 0.9 else ""
        sheet.text(left, top - 20,
                   f"samples: {100 * numbers[title][0]:.0f} % good in both{note}", 13)
    ends = draw_paths(sheet, world, MARGIN, TOP + 2 * (PANEL + 40) + 8, width - 2 * MARGIN)
    sheet.save(path)
    return {"samples": numbers, "path ends, less z_w": ends, "steps": steps, "seed": seed}
