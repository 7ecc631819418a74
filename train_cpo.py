"""Stage 2: align the target model, which sees plain captions only, with Complex Preference Optimization (not Contrastive).

    python train_cpo.py                                     # from nothing to OUT/target.pt, report.json and report.png
    python train_cpo.py --criteria "Color Relations" --out out --name colour        # align on one branch of the tree only

What is missing before it (base, auxiliary) is trained first by train_sft.py's functions; what is there is used again.
At each step the frozen auxiliary model names two targets at the same noised image, one towards the positive and one towards the
negative attributes, and the target model learns to prefer the first (2601.04300, stage 2; losses.cpo_loss).
"""
import argparse
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from nanocpo.cli import above, command
from nanocpo.data import to_images
from nanocpo.diffusion import guide
from nanocpo.evaluate import evaluate, report_stem, rows_key, table, unfit
from nanocpo.grid import save_grid
from nanocpo.losses import RULES, cpo_loss, dpo_loss, sft_loss
from nanocpo.model import fingerprint, whole_file
from nanocpo.sd import finetune
from nanocpo.train import add_common_arguments, draw, draw_t, load_data, noised
from train_sft import add_sft_arguments, attribute_prompts, caption_prompts, ensure_models, identity, run_stage, sft_step


def add_cpo_arguments(parser):
    """The flags of stage 2. The values are ours; docs/log.md has the few tries behind them."""
    parser.add_argument("--method", choices=["cpo", "esd", "dpo", "sft"], default="cpo", help="esd: regression to the guided target "
                        "that the rule constant ends at; dpo: Diffusion-DPO on pairs of pictures with fewer and more negative attributes; "
                        "sft: plain fine-tuning on the best pictures")
    parser.add_argument("--stabilizer", choices=RULES, help="how far the loser's gradient is held back; default: constant for cpo, "
                        "none for dpo")
    parser.add_argument("--strength", type=float, help="k, mu or share of the stabilizer (losses.restraint); default: 0.55, and 0 with "
                        "--criteria: a branch alone is soon reached, and what is pulled harder takes the rest along")
    parser.add_argument("--beta", type=above(0, float), help="preference strength; default: 4 / gap per sample for cpo, and 1 with --criteria "
                        "(E19); 200 for dpo")
    parser.add_argument("--pairs", choices=["own", "completed", "opposite", "all"], default="opposite",
                        help="what the auxiliary's two prompts list of the leaves to align on. own: the picture's good against its bad ones; "
                        "completed: also the good twins of the bad ones; opposite: all that are judged, good against bad; all: every leaf")
    parser.add_argument("--criteria", nargs="+", help="align on these branches of the tree only, by name or path")
    parser.add_argument("--paint", type=above(-1), default=1024, help="with --criteria: pictures that the auxiliary paints anew, right in the "
                        "branch and else as annotated, to train on instead of the data (0: the data; with --weights always)")
    parser.add_argument("--best", type=above(0, float), default=0.1, help="share of the data that --method sft keeps")
    parser.add_argument("--steps", type=above(0), default=150)
    parser.add_argument("--lr", type=above(0, float), default=6e-4)
    parser.add_argument("--lean", type=above(0, float), default=0.4, help="cpo trains at t = T u^lean, u uniform: where little of the training "
                        "picture is left to contradict the prompt")
    parser.add_argument("--name", default="target", help="name of the checkpoint, its log and its report row")
    parser.add_argument("--samples", type=above(-1), default=512, help="pictures a row of the report (0: no report); with --weights 16")
    parser.add_argument("--sampling-steps", type=above(0), default=12)
    parser.add_argument("--guidance", type=float, default=2.0, help="scale of the row auxiliary_guided; with --weights of all pictures, "
                        "7.5")


def strength_and_beta(args):
    """(--strength, --beta), or their defaults for CPO, which are others for a branch alone: the target ends at z_win (E12), and
    a small beta leaves the mean over the contexts, which it cannot see, unweighted (E19; docs/results/decoupling.md)."""
    defaults = (0.0, 1.0) if args.criteria else (0.55, None)
    return tuple(default if value is None else value for value, default in zip((args.strength, args.beta), defaults))


def painted(args, data, auxiliary, columns):
    """The first --paint pictures of the data as the auxiliary paints them with the chosen leaves positive and the rest as annotated.

    A target that follows its goal soon sees such pictures at every noise level, and no others: what it learns at the data's own
    would be the odds of a world in which the branch is still flawed (ours; docs/log.md)."""
    data = data.take(range(min(args.paint, len(data))))
    annotations = data.annotations.copy()                                 # (N, leaves)
    annotations[:, columns] = 1
    prompts = [data.criteria.prompt(caption, a) for caption, a in zip(data.captions, annotations)]
    images = to_images(auxiliary.sample(prompts, steps=args.sampling_steps, seed=args.seed))
    return replace(data, images=images, annotations=annotations)


def preference_prompts(criteria, batch, columns, pairs):
    """The auxiliary's prompts for each picture: (B winners, B losers). Beside the leaves to align on, `columns`, the annotation stands
    in both alike as their context, so that the gap is about these leaves only (E2).

    own: the picture's own positive against its own negative attributes (the paper's A_pos and A_neg);
    completed (ours): each negative attribute's positive twin joins the winner; opposite (ours): all that are judged, positive against
    negative; all (ours): the same, whether judged or not."""
    chosen = np.isin(np.arange(len(criteria)), columns)
    win, lose = batch.annotations.copy(), batch.annotations.copy()        # each (B, leaves)
    win[chosen & (win < 0)] = 0 if pairs == "own" else 1
    lose[chosen & (lose > 0)] = -1 if pairs == "opposite" else 0
    if pairs == "all":
        win[:, chosen], lose[:, chosen] = 1, -1
    return tuple([criteria.prompt(c, a) for c, a in zip(batch.captions, side)] for side in (win, lose))


def cpo_step(args, data, reference, auxiliary, columns):
    """The loss of one CPO step: one noised batch, four predictions (E2).

    Method esd (2303.07345): plain regression to the target guided at scale 1 / (1 - k), where `constant` ends (E17)."""
    strength, beta = strength_and_beta(args)

    def loss_step(target, generator):
        batch = draw(data, args.batch, generator)
        t = draw_t(args.batch, target.diffusion.steps, generator, args.lean)
        xt, t, _, _ = noised(target, batch.images, generator, t)
        plain = target.text.tokens([data.criteria.prompt(caption) for caption in batch.captions])
        win, lose = preference_prompts(data.criteria, batch, columns, args.pairs)
        with torch.no_grad():
            # both in one batch: their small difference must not be one of kernels
            z_win, z_lose = auxiliary(torch.cat([xt, xt]), torch.cat([t, t]), win + lose).chunk(2)
        eps = target(xt, t, plain)
        if args.method == "esd":
            return *sft_loss(eps, guide(z_win, z_lose, 1 / (1 - strength))), t
        with torch.no_grad():
            eps_ref = reference(xt, t, plain)
        return *cpo_loss(eps, eps_ref, z_win, z_lose, beta, args.stabilizer or "constant", strength), t
    return loss_step


def dpo_step(args, data, reference, columns):
    """The loss of one Diffusion-DPO step (E8): pairs of pictures with one caption, fewer against more negative attributes."""
    rule, beta = args.stabilizer or "none", 200.0 if args.beta is None else args.beta
    strength = strength_and_beta(args)[0]
    badness = (data.annotations[:, columns] < 0).sum(1)
    groups = {caption: np.flatnonzero(np.array(data.captions) == caption) for caption in set(data.captions)}

    def pick(generator):
        """Indices (winner, loser) of one random pair that is not a tie."""
        for _ in range(1000):
            first = torch.randint(len(data), (), generator=generator).item()
            group = groups[data.captions[first]]
            second = group[torch.randint(len(group), (), generator=generator).item()]
            if badness[first] != badness[second]:
                return (first, second) if badness[first] < badness[second] else (second, first)
        raise ValueError("--method dpo found no two pictures of one caption with different numbers of negative attributes")

    def loss_step(target, generator):
        winners, losers = zip(*(pick(generator) for _ in range(args.batch)))
        win, lose = data.batch(winners), data.batch(losers)
        xt_win, t, noise, goal_win = noised(target, win.images, generator)
        xt_lose, _, _, goal_lose = noised(target, lose.images, generator, t.cpu(), noise.cpu())      # same t, same noise
        both, times = torch.cat([xt_win, xt_lose]), torch.cat([t, t])
        plain = target.text.tokens([data.criteria.prompt(caption) for caption in win.captions + lose.captions])
        with torch.no_grad():
            ref_win, ref_lose = reference(both, times, plain).chunk(2)
        eps_win, eps_lose = target(both, times, plain).chunk(2)
        return *dpo_loss(eps_win, ref_win, goal_win, eps_lose, ref_lose, goal_lose, beta, rule, strength), t
    return loss_step


def method_step(args, data, reference, auxiliary):
    """The loss of one step of --method, on these data and the leaves of --criteria."""
    columns = data.criteria.columns(args.criteria)
    if args.method == "sft":                                              # on the pictures with the fewest negative attributes
        badness = (data.annotations[:, columns] < 0).sum(1)
        best = np.argsort(badness, kind="stable")[:max(1, round(len(data) * args.best))]
        return sft_step(args, data.take(best), caption_prompts)
    if args.method == "dpo":
        return dpo_step(args, data, reference, columns)
    if args.criteria and args.paint:
        data = painted(args, data, auxiliary, columns)
    return cpo_step(args, data, reference, auxiliary, columns)


def ingredients(args, auxiliary):
    """What decides, beside data and base, what stage 2 makes, {name: value}: its flags, and a digest of the auxiliary if --method asks it."""
    flags = ("method", "stabilizer", "strength", "beta", "pairs", "criteria", "best", "lean")
    painting = ("paint", "sampling_steps") if args.criteria and args.paint else ()
    teacher = {"auxiliary": fingerprint(auxiliary)} if args.method in ("cpo", "esd") else {}
    return {flag: getattr(args, flag) for flag in flags + painting} | teacher


def align(args, data, base, auxiliary, watch=None):
    """Train OUT/NAME.pt from the base model; returns (the aligned model, frozen; the last log line). watch: see run_stage."""
    target = base.frozen_copy().requires_grad_(True)                      # its own weights: base stays the reference
    step = method_step(args, data.split("train"), base, auxiliary)
    made_of = {"data": identity(args, data), "base": fingerprint(base)} | ingredients(args, auxiliary)
    return run_stage(args, target, step, args.name, args.steps, args.lr, made_of, watch=watch)


def report(args, base, auxiliary, target, seconds):
    """Evaluate the five rows, write OUT/report.json and OUT/report.png (base above target), print the table. The rows of base and
    auxiliary are kept in OUT/rows.json and taken from there as long as models, flags and code stay the same."""
    models = {"base": (base, "plain"), "auxiliary": (auxiliary, "plain"), "auxiliary_prompted": (auxiliary, "prompted"),
              "auxiliary_guided": (auxiliary, "guided"), args.name: (target, "plain")}
    start, out = time.time(), Path(args.out)
    key = rows_key([base, auxiliary], args.samples, args.seed, args.sampling_steps, args.guidance)
    kept = json.loads((out / "rows.json").read_text()) if (out / "rows.json").exists() else {}
    known = kept["rows"] if kept.get("key") == key else {}
    missing = {name: pair for name, pair in models.items() if name == args.name or name not in known}
    result, pictures = evaluate(missing, args.samples, args.seed, args.sampling_steps, args.guidance)
    result["rows"] = {name: (known | result["rows"])[name] for name in models}
    result["seconds"] = {"training": seconds, "evaluation": time.time() - start}
    stem = report_stem(args.name)
    for name, content in (("rows", {"key": key, "rows": {n: row for n, row in result["rows"].items() if n != args.name}}), (stem, result)):
        with whole_file(out / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(content, indent=1))
    labels = [base.captions[i % len(base.captions)] for i in range(min(16, args.samples))]
    prompts = [base.criteria.prompt(caption) for caption in labels]
    first = to_images(base.sample(prompts, steps=args.sampling_steps, seed=args.seed))         # its row may be a kept one, without pictures
    images = np.concatenate([first, pictures[args.name][:len(labels)]])
    save_grid(out / f"{stem}.png", images, labels * 2, columns=len(labels), zoom=3, titles=["base", f"{args.name}: the same captions and seeds"])
    print(table(result))
    print(f"{out / f'{stem}.json'} and .png written; {seconds:.0f} s of training, {time.time() - start:.0f} s of evaluation")
    return result


def main(argv=None):
    """Parse the flags, train what is missing, align, report; returns the report (or the last log line with --samples 0)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_common_arguments(parser)
    add_sft_arguments(parser)
    add_cpo_arguments(parser)
    finetune.add_arguments(parser)
    args = finetune.parse(parser, argv, finetune.TRAINING)
    if not re.fullmatch(r"[\w.-]{1,99}", args.name) or re.fullmatch(r"base|auxiliary(_\w+)?|rows", args.name.lower()):
        parser.error(f"--name '{args.name}' is no name for files, or is taken by stage 1 and the report; choose another")
    constant = args.method == "esd" or args.method == "cpo" and args.stabilizer in (None, "constant")
    if constant and args.strength is not None and args.strength >= 1:
        parser.error(f"--strength {args.strength:g}: 'constant' needs less than 1; at 1 it is 'none' and has no limit (E12)")
    if args.samples == 1:
        parser.error("--samples 1: an interval needs two pictures at least; 0 leaves the report out")
    if args.weights:
        data, base = finetune.start(args)
        return finetune.align(args, data, base, sft_step(args, data.split("train"), attribute_prompts), method_step, ingredients)
    start = time.time()
    data = load_data(args)
    data.criteria.columns(args.criteria)                                  # a wrong name is said before the training, not after
    base, auxiliary = ensure_models(args, data)
    target, line = align(args, data, base, auxiliary)
    reason = unfit(data)
    if reason:
        print(f"no report: {reason}; look at OUT/samples and the log instead")
    if reason or args.samples == 0:
        return line
    return report(args, base, auxiliary, target, time.time() - start)


if __name__ == "__main__":
    command(main)
