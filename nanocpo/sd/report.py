"""What can honestly be said about pictures that no exact critic can judge: how `train_cpo.py \
--weights` ends.

    errors      of the prediction on held-out pictures, per timestep bin: base and target under
                the plain caption, base and auxiliary told the attributes
    cpo         the log of stage 2 on held-out pictures: does the preference hold where it was
                not trained?
    log_ratio   the auxiliary's opinion of sampled pictures: likelier with the positive or with
                the negative attributes?
    counted     their #A_neg, the number of negative attributes, by the auxiliary's verdicts, and
                how often these are right on held-out pictures
    report.png  base above target, each column with one caption and one noise: somebody has to
                look

The teacher judges its pupil: the target was trained to please this auxiliary. A log_ratio that
grows, or a #A_neg that falls, says that stage 2 did its work, not that people like the pictures.
And verdicts that are right on held-out pictures may be wrong on sampled ones. `agreement` is the
share of held-out pictures where the auxiliary prefers the annotation to its opposite; near 0.5 its
opinion is noise.
"""
import numpy as np
import torch

from ..data import Batch, to_images
from ..folder.expert import agreement, calibrate, in_context, noised, told
from ..losses import sft_loss
from ..utils.log import BINS, summarize
from ..utils.report import interval, write_report
from .latents import LatentPaintings

PAIRS = 8                           # in the PNG, at most


def errors(model, latents, *prompts, seed=0):
    """How well K prompts explain each picture: array (N, BINS, K) of |prediction - goal|^2, one t
    in the middle of each bin.

    latents: of N pictures, (4, h, w) each; prompts: K lists of N Prompts. The K share the noise,
    which depends on the seed and the shapes before: so do two models that are asked about the same
    pictures."""
    generator, out = torch.Generator().manual_seed(seed), []
    for x0, *asked in zip(latents, *prompts):
        tokens = model.text.tokens(asked)
        for xt, t, goal in noised(model, Batch([""], None, latents=x0[None]), BINS, generator):
            prediction = model(torch.cat([xt] * len(asked)), torch.cat([t] * len(asked)), tokens)
            out.append(sft_loss(prediction, goal.expand_as(prediction))[1]["loss"].cpu())
    return torch.stack(out).double().view(-1, BINS, len(prompts)).numpy()


def log_ratio(each):
    """errors() of the auxiliary under (positive, negative) prompts ->
    log p(positive | x) - log p(negative | x): (N,).

    |z_lose - e|^2 - |z_win - e|^2, e the added noise (or v), is the mean over the timesteps with
    equal weights, as in diffusion classifiers (2303.16203). Its unit is the error's; to read the
    reward (E3) off whole pictures so is ours."""
    return (each[..., 1] - each[..., 0]).mean(1)


def on_held_out(held, seed, base, auxiliary, target, cpo_step, batch):
    """The report's part on held-out pictures (at least one): errors, and with an auxiliary its
    agreement and the log."""
    told, plain, wrong = ([held.criteria.prompt(c, sign * a)
                           for c, a in zip(held.captions, held.annotations)]
                          for sign in (1, 0, -1))
    of_base = errors(base, held.images, plain, told, seed=seed)
    # in batches like the base's: the same rounding
    of_target = errors(target, held.images, plain, told, seed=seed)
    found = {"base": of_base[..., 0], "target": of_target[..., 0], "base_told": of_base[..., 1]}
    result = {}
    if auxiliary:
        both, judged = (errors(auxiliary, held.images, told, wrong, seed=seed),
                        held.annotations.any(1))
        found["auxiliary_told"] = both[..., 0]
        result["agreement"] = float((log_ratio(both)[judged] > 0).mean()) if judged.any() else None
        generator = torch.Generator().manual_seed(seed)
        steps = [cpo_step(target, generator) for _ in range(-(-BINS * len(held) // batch))]
        result["cpo"] = summarize([(t, logs) for _, logs, t in steps], base.diffusion.steps)
    return {"errors": {name: {"mean": float(x.mean()), "per_t": x.mean(0).tolist()}
                       for name, x in found.items()}} | result


def with_interval(pairs):
    """{"base": numbers, "target": numbers} of the same captions and noises -> mean and interval of
    each, and of their differences."""
    rows = pairs | {"difference": pairs["target"] - pairs["base"]}
    return {name: dict(zip(("mean", "ci"), interval(values))) for name, values in rows.items()}


def counted(auxiliary, held, sampled, draws, seed, size):
    """#A_neg of sampled pictures {"base": data, "target": data} by the auxiliary's verdicts, cut by
    those on the held-out pictures, with their agreement there. draws ...: see in_context."""
    with auxiliary.backbone.at_hand():
        scores, *ours = (in_context(auxiliary, data, draws, seed=seed, size=size)
                         for data in (held, *sampled.values()))
    cuts = calibrate(scores, held.annotations)
    negative = {name: (own <= cuts).sum(1) for name, own in zip(sampled, ours)}
    return {"leaves": len(cuts), "draws": draws, "negative": with_interval(negative),
            "agreement": agreement(scores, held.annotations, held.criteria)}


@torch.no_grad()
def report(settings, held, base, auxiliary, target, columns, cpo_step=None):
    """Write OUT/report.json and report.png (report_NAME if the target has another --name), print
    the table; returns the report.

    settings: all of them; held: the held-out pictures; a folder of fewer than nine has none: then
    only samples are measured. columns: the leaves that were aligned on; cpo_step: stage 2's loss
    step on held-out pictures. auxiliary None: what needs one is left out."""
    criteria, common, how = held.criteria, settings.common, settings.report
    result = {"about": __doc__.split("\n")[0], "held_out": len(held), "samples": how.samples,
              "seed": common.seed, "guidance": how.guidance,
              "sampling_steps": how.sampling_steps, "errors": {}}
    if len(held):
        result |= on_held_out(held, common.seed, base, auxiliary, target, cpo_step, common.batch)

    known, pictures = sorted(set(held.captions)) or base.captions, {}
    captions = [known[i % len(known)] for i in range(how.samples)]
    for name, model in (("base", base), ("target", target)):
        images = model.sample(captions, guidance=how.guidance, steps=how.sampling_steps,
                              seed=common.seed)
        pictures[name] = images.clamp(-1, 1)
    if auxiliary:
        chosen = np.isin(np.arange(len(criteria)), columns).astype(np.int8)
        sides = [[criteria.prompt(c, sign * chosen) for c in captions] for sign in (1, -1)]
        encode = auxiliary.latents.encode
        with auxiliary.backbone.awake(auxiliary.latents):
            again = {name: [encode(x[None])[0] for x in some] for name, some in pictures.items()}
        ratios = {name: log_ratio(errors(auxiliary, latents, *sides, seed=common.seed))
                  for name, latents in again.items()}
        result["log_ratio"] = with_interval(ratios)
        if how.verdict_draws:
            sampled = {name: LatentPaintings(criteria, np.fromiter(latents, object), captions,
                                             np.zeros((len(captions), len(criteria)), np.int8))
                       for name, latents in again.items()}
            result["counted"] = counted(auxiliary, held, sampled, how.verdict_draws, common.seed,
                                        common.batch)

    first, second = (to_images(some[:PAIRS]) for some in pictures.values())
    write_report(common.out, settings.cpo.name, result, first, second, captions[:PAIRS], zoom=1,
                 alike="captions and noise")
    print(table(result))
    return result


def table(result):
    """The report as text."""
    lines = [f"no exact critic exists for these pictures; {result['held_out']} held-out pictures, "
             f"{result['samples']} sampled pairs"]
    for name, row in result["errors"].items():
        lines.append(f"error, {name:15} {row['mean']:.4f}; per t "
                     + " ".join(f"{x:.3f}" for x in row["per_t"]))
    if "cpo" in result:
        shown = ("margin", "accuracy", "winner", "winner_ref", "loser", "loser_ref")
        lines.append("stage 2, held out: "
                     + ", ".join(f"{key} {result['cpo'][key]}" for key in shown))
        lines.append(f"the auxiliary agrees with {result['agreement']} of the held-out annotations")
    for name, row in result.get("log_ratio", {}).items():
        low, high = row["ci"]
        lines.append(f"log-ratio, {name:11} {row['mean']:+.5f} ({low:+.5f} to {high:+.5f})")
    if "counted" in result:
        counts = result["counted"]
        for name, row in counts["negative"].items():
            low, high = row["ci"]
            lines.append(f"#A_neg of {counts['leaves']}, {name:11} {row['mean']:.2f} ({low:.2f} to "
                         f"{high:.2f})")
        lines.append("#A_neg is the auxiliary's count: the teacher judges its pupil. "
                     + told(counts["agreement"]))
    return "\n".join(lines)
