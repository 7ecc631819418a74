"""docs/derivation.md: its table names what exists, every equation is cited by code and by a test;
and the equations of its first half."""
import ast
import inspect
import math
import pkgutil
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from toy_tiny import settings_of

from nanocpo.diffusion import Diffusion, guide
from nanocpo.losses import cpo_loss, dpo_loss, preference_loss
from nanocpo.method import draw_t
from nanocpo.model import Model
from nanocpo.run.stages import alignment_step
from nanocpo.toy.paintings import from_painter
from nanocpo.unet import UNetConfig

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "derivation.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------- the table

def parse_table(text):
    """The rows of the last table: [(equation, [code names], [test names])]."""
    rows = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if re.fullmatch(r"E\d+", cells[0]) and len(cells) == 4:
            rows.append((cells[0], *(re.findall(r"`([\w.]+)`", cell) for cell in cells[2:])))
    return rows


def find_code(name):
    """"losses.cpo_loss" or "train_cpo.main" -> its source; AttributeError or
    ModuleNotFoundError if it is gone. A table like losses.RULES has that of its assignment."""
    full = name if (ROOT / f"{name.split('.')[0]}.py").exists() else f"nanocpo.{name}"
    found = pkgutil.resolve_name(full)
    if callable(found):
        return inspect.getsource(found)
    module, table = full.rsplit(".", 1)
    source = inspect.getsource(pkgutil.resolve_name(module))
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == table:
            return ast.get_source_segment(source, node)
    raise AttributeError(f"{full} is no function, class or table")


@cache
def functions_in(module):
    """{function name: source} of the functions in tests/MODULE.py, decorators aside."""
    source = (ROOT / "tests" / f"{module}.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    return {node.name: "\n".join(lines[node.lineno - 1:node.end_lineno])
            for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def find_test(name):
    """"test_losses.test_x" -> its source; KeyError or FileNotFoundError if there is
    no such test."""
    module, function = name.split(".")
    return functions_in(module)[function]


def cited(source):
    """Numbers of the equations that stand in parentheses: "(E3)", "(ours; E4, E5)" ->
    {"E3", "E4", "E5"}."""
    return {name for inside in re.findall(r"\(([^()]*)\)", source)
            for name in re.findall(r"\bE\d+\b", inside)}


def faults(text):
    """What is wrong with the table, as a list of sentences."""
    rows, out = parse_table(text), []
    tags = re.findall(r"\\tag\{(E\d+)\}", text)
    if tags != [f"E{i + 1}" for i in range(len(tags))]:
        out.append(f"equations are not numbered in order: {tags}")
    if [row[0] for row in rows] != tags:
        out.append(f"rows of the table {[row[0] for row in rows]} are not the equations {tags}")
    for number, code, tests in rows:
        sources = {"function": [], "test": []}
        for kind, names, find in (
                ("function", code, find_code), ("test", tests, find_test)):
            for name in names:
                try:
                    sources[kind].append(find(name))
                except (AttributeError, ImportError, KeyError, FileNotFoundError, ValueError):
                    out.append(f"{number}: the {kind} {name} does not exist")
            if not any(number in cited(source) for source in sources[kind]):
                out.append(f"{number}: no {kind} of {names} cites it")
    return out


def test_every_equation_has_code_and_test_that_cite_it():
    assert not faults(TEXT), "\n".join(faults(TEXT))
    assert len(parse_table(TEXT)) == 21


@pytest.mark.parametrize("old, new, complaint", [
    ("`losses.RULES`", "`losses.RULE`", "E10: the function losses.RULE does not exist"),
    ("`losses.restraint`", "`losses.restrain`", "E11: the function losses.restrain does not exist"),
    ("`losses.RULES`", "`method.np`", "E10: the function method.np does not exist"),
    ("`test_losses.test_half_and_pixel_mean`", "`test_losses.test_half`",
     "E7: the test test_losses.test_half does not exist"),
    ("`method.draw_t`", "`method.drop_caption`",
     "E18: no function of ['method.drop_caption'] cites it"),
    ("`test_derivation.test_share_of_noisy_timesteps`", "`test_losses.test_defaults`",
     "E18: no test of"),
    (r"\tag{E18}", r"\tag{E19}", "equations are not numbered in order"),
    ("| E18 |", "| E17 |", "rows of the table"),
])
def test_the_table_is_really_checked(old, new, complaint):
    assert (old in TEXT
            and any(fault.startswith(complaint) for fault in faults(TEXT.replace(old, new))))


def test_equations_that_the_text_refers_to_exist():
    """And those that any code or test cites."""
    tags = set(re.findall(r"\\tag\{(E\d+)\}", TEXT))
    files = [*ROOT.glob("*.py"), *ROOT.glob("nanocpo/**/*.py"),
             *(path for path in ROOT.glob("tests/*.py") if path != Path(__file__))]
    for path in files:
        assert cited(path.read_text(encoding="utf-8")) <= tags, path.name
    assert set(re.findall(r"\(E\d+\)", TEXT)) <= {f"({tag})" for tag in tags}


# ------------------------------------------------------------------------------------ the equations

def randn(count, shape=(4, 3, 2, 2), seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed),
                       dtype=torch.float64).unbind()


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype).expand_as(a), rtol=0, atol=atol)


def mean(x):
    return x.flatten(1).mean(1)


def tilted(reward, reference, beta):
    """p_ref exp(r / beta) / Z on a finite set of outcomes."""
    return (reference.log() + reward / beta).softmax(0)


def test_tilted_density_is_the_optimum():
    """E[r] - beta KL(p | p_ref) is largest at p_ref exp(r / beta) / Z (E4): against 2,000 others,
    near and far, on seven outcomes."""
    reward, noise = randn(2, (7,))
    reference, beta = noise.softmax(0), 0.7
    best = tilted(reward, reference, beta)
    objective = lambda p: (p * reward).sum(-1) - beta * (p * (p / reference).log()).sum(-1)
    step = (torch.randn(2000, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            * torch.logspace(-3, 1, 2000)[:, None])
    assert (objective((best.log() + step).softmax(1)) <= objective(best) + 1e-12).all()
    # and its value is beta log Z
    close(objective(best), beta * (reference * (reward / beta).exp()).sum().log())


def test_margin_of_the_optimum_is_the_difference_of_rewards():
    """Put p* into DPO's margin (E5): r_w - r_l, Z gone; losses.preference_loss takes -2 log-ratios
    for its changes of error."""
    reward, noise = randn(2, (7,))
    reference, beta = noise.softmax(0), 0.7
    ratio = (tilted(reward, reference, beta) / reference).log()
    win, lose = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
    loss, logs = preference_loss(-2 * ratio[win], -2 * ratio[lose], beta, torch.ones(3).double())
    close(logs["margin"], reward[win] - reward[lose])
    close(loss, -(reward[win] - reward[lose]).sigmoid().log().mean())


def reverse_step(diffusion, xt, z, seed):
    """x_{t-1} from the sampler's first step of DDPM when the prediction is z, and the standard
    normal noise that it drew."""
    seen = []

    def predict(x, t):
        seen.append(x)
        return z
    diffusion.sample(predict, xt, diffusion.steps, eta=1.0,
                     generator=torch.Generator().manual_seed(seed))
    return seen[1], torch.randn(xt.shape, generator=torch.Generator().manual_seed(seed),
                                dtype=xt.dtype)


def step_weight(diffusion, t):
    """omega_t of (E6)."""
    alpha = diffusion.alpha_bar[t] / diffusion.alpha_bar[t - 1]
    return (1 - alpha) / (alpha * (1 - diffusion.alpha_bar[t - 1]))


@pytest.mark.parametrize("schedule", ["cosine", "scaled_linear"])
def test_log_ratio_of_a_reverse_step(schedule):
    """The sampler's own Gaussian step: log p_theta / p_ref at the point that z implies is
    -omega / 2 times a difference of squares (E6), and the mean of it over noisy outcomes is the
    same (not that of the loss: E21)."""
    diffusion = Diffusion(schedule, "eps", steps=5)
    xt, eps, eps_ref, z = randn(4)
    alpha_bar, before = diffusion.alpha_bar[4], diffusion.alpha_bar[3]
    sigma = ((1 - alpha_bar / before) * (1 - before) / (1 - alpha_bar)).sqrt()
    mu = {}
    for name, prediction in (("z", z), ("theta", eps), ("ref", eps_ref)):
        reached, noise = reverse_step(diffusion, xt, prediction, seed=3)
        mu[name] = reached - sigma * noise
        alpha = alpha_bar / before
        # mu_t of the text
        close(mu[name], (xt - (1 - alpha) / (1 - alpha_bar).sqrt() * prediction) / alpha.sqrt())
    log_p = lambda x, name: torch.distributions.Normal(
        mu[name], sigma).log_prob(x).flatten(1).sum(1)
    square = lambda a, b: ((a - b) ** 2).flatten(1).sum(1)
    formula = -0.5 * step_weight(diffusion, 4) * (square(z, eps) - square(z, eps_ref))
    close(log_p(mu["z"], "theta") - log_p(mu["z"], "ref"), formula, 1e-8)
    noise = torch.randn(20_000, *xt.shape, generator=torch.Generator().manual_seed(0),
                        dtype=torch.float64)
    noise = torch.cat([noise, -noise])  # antithetic: the part that is linear in the noise cancels
    noisy = mu["z"] + sigma * noise
    ratio = {name: torch.distributions.Normal(
        mu[name], sigma).log_prob(noisy).flatten(2).sum(2).mean(0) for name in ("theta", "ref")}
    close(ratio["theta"] - ratio["ref"], formula, 1e-8)


def test_margin_of_noisy_steps():
    """Draws of two Gaussian steps of DDPM, log-ratios by their densities: the margins have the mean
    and the variance of (E21), beta = beta_R T omega_t N and s = 1 / (beta_R T); the loss is their
    mean loss. If both draws share the noise, all margins are (E9)'s."""
    diffusion, beta_r, steps = Diffusion("cosine", "eps", steps=50), 0.03, 50
    xt, *predictions = randn(5, (1, 3, 2, 2))
    alpha_bar, before, t = diffusion.alpha_bar[20], diffusion.alpha_bar[19], 20
    alpha = alpha_bar / before
    sigma = ((1 - alpha) * (1 - before) / (1 - alpha_bar)).sqrt()
    theta, ref, win, lose = ((xt - (1 - alpha) / (1 - alpha_bar).sqrt() * z) / alpha.sqrt()
                             for z in predictions)

    def margins(noise_win, noise_lose):
        def ratio(x):
            return -(((x - theta) ** 2 - (x - ref) ** 2) / (2 * sigma ** 2)).flatten(1).sum(1)
        return beta_r * steps * (ratio(win + sigma * noise_win) - ratio(lose + sigma * noise_lose))
    noise = torch.randn(2, 200_000, 3, 2, 2, generator=torch.Generator().manual_seed(0),
                        dtype=torch.float64)
    drawn, shared = margins(*noise), margins(noise[0], noise[0])
    beta, s = beta_r * steps * float(step_weight(diffusion, t)) * 12, 1 / (beta_r * steps)
    loss, logs = cpo_loss(*predictions, beta, "noisy", s)
    moved = float((predictions[0] - predictions[1]).square().mean())
    assert float(drawn.mean()) == pytest.approx(float(logs["margin"]), abs=0.02)
    assert float(drawn.var()) == pytest.approx(2 * beta / s * moved, rel=0.02)
    assert float(-drawn.sigmoid().log().mean()) == pytest.approx(float(loss), rel=0.01)
    close(shared, logs["margin"].expand_as(shared), 1e-8)


def test_beta_absorbs_the_weights_of_the_step():
    """DPO's margin from the log-ratios of (E6), T times per step, is that of cpo_loss with
    beta = beta_R T omega_t N (E7)."""
    diffusion = Diffusion("cosine", "eps", steps=50)
    eps, eps_ref, z_win, z_lose = randn(4)
    square = lambda a, b: ((a - b) ** 2).flatten(1).sum(1)
    weight, beta_r, n = step_weight(diffusion, 20), 0.03, 12
    ratio = [-0.5 * weight * (square(z, eps) - square(z, eps_ref)) for z in (z_win, z_lose)]
    loss, logs = cpo_loss(eps, eps_ref, z_win, z_lose, beta_r * 50 * weight * n, "none")
    close(logs["margin"], beta_r * 50 * (ratio[0] - ratio[1]))
    close(loss, -(beta_r * 50 * (ratio[0] - ratio[1])).sigmoid().log().mean())


def test_cpo_is_diffusion_dpo_at_one_xt():
    """(E7) is (E8) with both pictures' x_t made one and two answers of a model for
    the two noises."""
    eps, eps_ref, z_win, z_lose = randn(4)
    one, other = (cpo_loss(eps, eps_ref, z_win, z_lose, 3.0, "none"),
                  dpo_loss(eps, eps_ref, z_win, eps, eps_ref, z_lose, 3.0))
    close(one[0], other[0])
    close(one[1]["margin"], other[1]["margin"])


def test_certain_preference_has_no_minimiser_and_an_uncertain_one_has():
    """Along eps_ref + a d the loss only falls (E9); if z_lose wins with probability 1 - p, the mean
    loss is least at u = log p / (1 - p)."""
    eps_ref, z_win, z_lose = randn(3, (1, 3, 2, 2))
    a = torch.linspace(-2, 8, 2001, dtype=torch.float64).view(-1, 1, 1, 1)
    eps, d = eps_ref + a * (z_win - z_lose), z_win - z_lose
    same = [x.expand_as(eps) for x in (eps_ref, z_win, z_lose)]
    sure = cpo_loss(eps, *same, 1.0, "none")[1]["loss"]
    unsure = 0.8 * sure + 0.2 * cpo_loss(eps, same[0], same[2], same[1], 1.0, "none")[1]["loss"]
    assert (sure[1:] < sure[:-1]).all()
    u = a.flatten() * mean(d * d)
    assert 0 < unsure.argmin() < 2000 and abs(u[unsure.argmin()] - math.log(4)) < 0.01


def test_scale_free_beta_is_the_same_in_all_spaces():
    """beta = 4 / |d|^2: u = 4 from z_lose to z_win, and eps-, v- and flow-space agree on u, on
    where a stabilizer is, and on the noisy form (E16, E20)."""
    eps, eps_ref, z_win, z_lose, xt = randn(5)
    in_eps = (eps, eps_ref, z_win, z_lose)
    # alpha_bar 0.2; sigma 0.6
    v = [(x - 0.8 ** 0.5 * xt) / 0.2 ** 0.5 for x in in_eps]
    flow = [(x - xt) / 0.4 for x in in_eps]
    for space, scale in ((v, 0.2), (flow, 0.4 ** 2)):
        for rule, strength in (("balance", 0.7), ("noisy", 1.5)):
            (loss, one), (there, other) = (cpo_loss(*x, stabilizer=rule, strength=strength)
                                           for x in (in_eps, space))
            close(loss, there)
            for name in ("margin", "lam", "weight", "place", "place_ref"):
                close(one[name], other[name])
            close(one["across"], other["across"], 1e-6)
            close(other["gap"], one["gap"] / scale)
    close(cpo_loss(z_win, z_lose, z_win, z_lose)[1]["margin"], 4.0)
    k = 0.5  # and the margin at the limit of `constant`, the brake of the text
    close(cpo_loss(z_win + k / (1 - k) * (z_win - z_lose), z_lose, z_win, z_lose)[1]["margin"],
          4 / (1 - k))


# --------------------------------------------------------------------------- in the training script

DATA = from_painter(count=20, seed=1)
TINY = UNetConfig(channels=(16, 32), depth=(0, 1), heads=(2, 2), groups=8, context_dim=16,
                  vector_dim=16)


def one_step(*flags):
    """Loss, logs and the predictions eps, eps_ref (None if it was not asked), z_win, z_lose of one
    stage-2 step between three tiny models."""
    models, seen = [], {}
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(Model(
            DATA.criteria, sorted(set(DATA.captions)), TINY, text_dim=16).frozen_copy())
        # models that differ visibly
        torch.nn.init.normal_(models[-1].unet.conv_out.weight, std=0.1)
        models[-1].register_forward_hook(
            lambda module, arguments, output: seen.update({module: output.double()}))
    reference, auxiliary, target = models
    step = alignment_step(settings_of(*flags), DATA, reference, auxiliary)
    loss, logs, _ = step(target, torch.Generator().manual_seed(0))
    return loss, logs, seen[target], seen.get(reference), *seen[auxiliary].chunk(2)


def test_esd_is_regression_to_the_limit_of_constant():
    """--method esd: mean squared error to guidance at scale 1 / (1 - k), which is
    z_win + k / (1 - k) d (E17)."""
    loss, _, eps, _, z_win, z_lose = one_step("--method", "esd", "--strength", "0.75")
    assert (z_win - z_lose).square().mean() > 1e-6
    close(loss.double(), (eps - (z_win + 3 * (z_win - z_lose))).square().mean(), 1e-5)
    close(guide(z_win, z_lose, 4.0), z_win + 3 * (z_win - z_lose), 1e-9)


def test_unseen_contexts_are_weighted_unless_beta_is_small():
    """One x_t, two contexts, one output for both. With `winner` its gradient is
    sum_j w_j (eps - z_win^j), w_j = beta_j sigma(-u_j), so it ends at their mean with these weights
    (E19). With beta = 4 / gap they start at the inverse ratio of the gaps and end with all of it on
    the large gap; a large beta starts with equal ones and ends with all of it on the small gap; a
    small one leaves them equal."""
    z_win = torch.tensor([1.0, 0.6], dtype=torch.float64).view(2, 1, 1, 1)
    # the gap's two values; their squares are 1 and 0.04
    d = torch.tensor([1.0, 0.2], dtype=torch.float64)
    eps_ref = torch.zeros_like(z_win)

    def weights(beta, eps):
        """The two w_j at this output, after comparing the gradient there with the formula."""
        eps = torch.tensor(eps, dtype=torch.float64, requires_grad=True)
        loss, logs = cpo_loss(eps.expand(2, 1, 1, 1), eps_ref, z_win, z_win - d.view(2, 1, 1, 1),
                              beta, "winner")
        w = (4 / d ** 2 if beta is None else beta) * torch.sigmoid(-logs["margin"])
        close(torch.autograd.grad(loss, eps)[0], (w * (eps.detach() - z_win.flatten())).mean(),
              1e-12)
        return (w[1] / w[0]).item()

    def end(beta):
        """Where gradient flow from the reference ends; small steps, each towards the mean of
        the moment."""
        eps = 0.0
        for _ in range(300):
            ratio = weights(beta, eps)
            eps += 0.05 * ((1.0 + ratio * 0.6) / (1 + ratio) - eps)
        return eps
    assert (weights(None, 0.0) == pytest.approx(25) and weights(None, end(None)) < 1e-4
            and end(None) == pytest.approx(1.0, abs=1e-3))
    assert (weights(20.0, 0.0) == 1 and weights(20.0, end(20.0)) > 1e3
            and end(20.0) == pytest.approx(0.6, abs=1e-3))
    assert (weights(0.001, 0.0) == 1 and weights(0.001, 0.8) == pytest.approx(1, abs=1e-3)
            and end(0.001) == pytest.approx(0.8, abs=1e-3))


@pytest.mark.parametrize("lean", [0.7, 0.4])
def test_share_of_noisy_timesteps(lean):
    """P(t >= T / 2) = 1 - 2^(-1 / lean) (E18): 63 % and 82 %."""
    t = draw_t(20_000, 1000, torch.Generator().manual_seed(0), lean)
    assert abs((t >= 500).double().mean() - (1 - 2 ** (-1 / lean))) < 1e-3
