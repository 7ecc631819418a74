"""One batch of each stage, and of what they are compared with: noise, prompts, targets, loss."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from toy_tiny import CRITERIA, DATA, plain, settings_of, tiny_model

from nanocpo import method
from nanocpo.data import Batch
from nanocpo.losses import cpo_loss
from nanocpo.method import (add_noise, attribute_prompts, caption_prompts, cpo_step, draw_t,
                            drop_caption, preference_prompts, sft_step)
from nanocpo.run import baselines
from nanocpo.run.baselines import painted
from nanocpo.run.stages import alignment_step


# ---------------------------------------------------------------- the noise

def test_t_is_stratified_over_the_whole_range_and_leans_to_the_noisy_half():
    t = draw_t(8, 1000, torch.Generator().manual_seed(0), 0.7)
    edges = [1000 * (i / 8) ** 0.7 for i in range(9)]
    assert t.dtype == torch.int64 and all(math.floor(low) <= x <= high
                                          for low, high, x in zip(edges, edges[1:], t.tolist()))
    t = draw_t(40000, 1000, torch.Generator().manual_seed(0), 0.7)
    assert t.min() == 0 and t.max() == 999
    assert (abs((t >= 500).float().mean() - (1 - 0.5 ** (1 / 0.7))) < 0.01
            and abs(t.float().mean() - 1000 / 1.7) < 2)
    assert abs(draw_t(40000, 1000, torch.Generator(), 0.4).float().mean() - 1000 / 1.4) < 2


def test_stage_1_draws_t_over_the_whole_range(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(model, "forward", lambda xt, t, prompts: xt)
    batch = Batch(["a boat"] * 12000, None, latents=torch.zeros(12000, 12, 1, 1))
    prompts = lambda criteria, batch, generator: None
    t = sft_step(model, CRITERIA, batch, prompts, torch.Generator().manual_seed(0), 0.7)[2]
    assert t.min() == 0 and t.max() == 999


def test_noise_is_added_at_the_given_timesteps_and_what_is_given_is_used():
    model, generator = tiny_model(), torch.Generator().manual_seed(0)
    batch, t, ones = DATA.batch([0, 0]), torch.tensor([5, 5]), torch.ones(2, 12, 16, 16)
    xt, x0, noise = add_noise(model, batch, t, generator, ones)
    assert torch.equal(noise, ones) and torch.equal(xt[0], xt[1])
    assert torch.equal(x0, model.latents.encode(batch.images))
    goal = model.diffusion.goal(x0, t, noise)
    torch.testing.assert_close(model.diffusion.x0_and_eps(goal, xt, t)[0], x0, rtol=0, atol=1e-5)
    # latents are taken as they are, and without a given noise every picture has its own
    ready = Batch(batch.captions, batch.annotations, latents=2 * x0)
    xt, twice, noise = add_noise(model, ready, t, generator)
    assert torch.equal(twice, 2 * x0) and not torch.equal(noise[0], noise[1])
    torch.testing.assert_close(xt, model.diffusion.q_sample(2 * x0, t, noise))


def test_bfloat16_is_for_the_models_and_not_for_the_noised_pictures():
    def once():
        generator = torch.Generator().manual_seed(0)
        t = draw_t(8, 1000, generator, 0.7)
        xt, x0, noise = add_noise(tiny_model(), DATA.batch(range(8)), t, generator)
        return xt, t, noise, tiny_model().diffusion.goal(x0, t, noise)
    with torch.autocast("cpu", torch.bfloat16):
        low = once()
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(low, once(), strict=True))


# ---------------------------------------------------------------- the prompts of both stages

def test_captions_are_dropped_with_the_stated_probability():
    dropped = drop_caption(["a boat"] * 10000, torch.Generator().manual_seed(0), 0.1)
    assert abs(dropped.count("") / 10000 - 0.1) < 0.01 and set(dropped) == {"", "a boat"}


def test_sft_prompts_are_subsets_of_the_annotation_and_every_kind_occurs():
    batch = DATA.batch(np.arange(60).repeat(20))
    prompts = attribute_prompts(CRITERIA, batch, torch.Generator().manual_seed(0))
    kinds = {"whole": 0, "part": 0, "all positive": 0, "all negative": 0, "caption only": 0,
             "nothing": 0}
    for prompt, caption, annotation in zip(prompts, batch.captions, batch.annotations):
        full = CRITERIA.prompt(caption, annotation)
        assert (set(prompt.positive) <= set(full.positive)
                and set(prompt.negative) <= set(full.negative))
        assert prompt.caption in (caption, "")
        size = len(prompt.positive) + len(prompt.negative)
        kinds["whole"] += size == len(full.positive) + len(full.negative)
        kinds["part"] += 0 < size < len(full.positive) + len(full.negative)
        kinds["all positive"] += prompt.positive == full.positive and not prompt.negative
        kinds["all negative"] += prompt.negative == full.negative and not prompt.positive
        kinds["caption only"] += size == 0 and prompt.caption != ""
        kinds["nothing"] += size == 0 and prompt.caption == ""
    # of 1,200: 50 % whole, 20 % a random part, 10 % each all of one side and no attribute at all, a
    # tenth of these without caption
    assert kinds["whole"] > 540 and all(kinds[side] > 80 for side in (
        "part", "all positive", "all negative", "caption only")), kinds
    assert kinds["nothing"] >= 8


def test_base_prompts_are_captions_only():
    batch = DATA.batch(np.arange(60))
    prompts = caption_prompts(CRITERIA, batch, torch.Generator().manual_seed(0))
    assert not any(prompt.positive or prompt.negative for prompt in prompts)
    assert 45 < sum(prompt.caption == caption
                    for prompt, caption in zip(prompts, batch.captions)) < 60


@pytest.mark.parametrize("pairs, win, lose", [
    ("own", [1, 0, 0, 1], [0, -1, 0, 0]), ("completed", [1, 1, 0, 1], [0, -1, 0, 0]),
    ("opposite", [1, 1, 0, 1], [-1, -1, 0, -1]), ("all", [1, 1, 1, 1], [-1, -1, -1, -1])])
def test_preference_prompts_by_hand(pairs, win, lose):
    criteria = CRITERIA.select(["Horizon", "Color Relations"])
    batch = Batch(["a boat"], np.array([[1, -1, 0, 1]], np.int8))
    got = preference_prompts(criteria, batch, [0, 1, 2, 3], pairs)
    assert got == ([criteria.prompt("a boat", win)], [criteria.prompt("a boat", lose)])
    assert batch.annotations.tolist() == [[1, -1, 0, 1]]          # the data is not written to
    flipped = preference_prompts(criteria, Batch(["a boat"], -batch.annotations),
                                 [0, 1, 2, 3], pairs)
    # where the verdicts' signs do not matter, nor do wrong ones
    assert (flipped == got) == (pairs in ("opposite", "all"))


def test_the_winner_is_what_the_auxiliary_predicts_towards_the_good():
    """Its error and the loser's, by hand, at the x_t that the step draws."""
    base, auxiliary = tiny_model().frozen_copy(), tiny_model(seed=5).frozen_copy()
    batch, columns = DATA.batch(range(6)), CRITERIA.columns()
    how = dict(columns=columns, pairs="opposite", lean=0.4, beta=None, stabilizer="constant",
               strength=0.55)
    _, logs, t = cpo_step(base, base, auxiliary, CRITERIA, batch,
                          torch.Generator().manual_seed(3), **how)
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(t, draw_t(6, 1000, generator, 0.4))
    xt, _, _ = add_noise(base, batch, t, generator)
    with torch.no_grad():
        eps = base(xt, t, plain(batch.captions))
        for name, prompts in zip(("winner", "loser"),
                                 preference_prompts(CRITERIA, batch, columns, "opposite")):
            by_hand = (eps - auxiliary(xt, t, prompts)).square().flatten(1).mean(1)
            torch.testing.assert_close(logs[name], by_hand)
            torch.testing.assert_close(logs[f"{name}_ref"], by_hand)


def test_branch_prompts_share_their_context():
    batch = DATA.batch(range(60))
    columns = CRITERIA.columns("Color Relations")
    phrases = {p for i in columns
               for p in (CRITERIA.leaves[i].positive, CRITERIA.leaves[i].negative)}
    for pairs in ("own", "completed", "opposite", "all"):
        for win, lose in zip(*preference_prompts(CRITERIA, batch, columns, pairs)):
            assert set(win.positive) - phrases == set(lose.positive) - phrases
            assert set(win.negative) - phrases == set(lose.negative) - phrases
            assert not set(win.negative) & phrases and not set(lose.positive) & phrases
            assert win.caption == lose.caption


# ---------------------------------------------------------------- stage 2

def test_first_cpo_step_has_loss_log_2_and_a_gradient():
    base, auxiliary = tiny_model().frozen_copy(), tiny_model(seed=5).frozen_copy()
    target = base.frozen_copy().requires_grad_(True)
    step = alignment_step(settings_of(), DATA, base, auxiliary)
    loss, logs, t = step(target, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6) and logs["margin"].abs().max() < 1e-6
    assert {"winner", "winner_ref", "loser", "loser_ref", "margin", "accuracy", "weight",
            "lam", "gap"} <= set(logs)
    loss.backward()
    assert sum(p.grad.abs().sum() for p in target.parameters() if p.grad is not None) > 0


def test_a_cpo_step_takes_rule_strength_and_beta_from_the_flags():
    base, auxiliary, target = (tiny_model(seed).frozen_copy() for seed in range(3))

    def logs(*flags):
        step = alignment_step(settings_of("--paint", "0", *flags), DATA, base, auxiliary)
        return step(target, torch.Generator().manual_seed(0))[1]
    assert logs()["lam"].tolist() == pytest.approx([0.3] * 8)            # the default: constant
    assert (logs("--stabilizer", "none")["lam"].tolist() == [1] * 8
            and logs("--criteria", "Finish")["lam"].tolist() == [0] * 8)
    torch.testing.assert_close(logs("--beta", "4")["margin"], 2 * logs("--beta", "2")["margin"])


def test_every_method_that_has_a_rule_keeps_it():
    """Share of the loser's gradient: --method dpo has vanilla's of its own."""
    base, auxiliary, target = (tiny_model(seed).frozen_copy() for seed in range(3))

    def shares(*flags):
        step = alignment_step(settings_of("--paint", "0", *flags), DATA, base, auxiliary)
        return set(step(target, torch.Generator().manual_seed(0))[1]["lam"].tolist())
    for name in ("cpo", "dpo"):
        for rule, strength, share in (("none", "0.5", {1.0}), ("winner", "0.5", {0.0}),
                                      ("constant", "0.5", {0.5}), ("constant", "0.25", {0.25})):
            assert shares("--method", name, "--stabilizer", rule, "--strength", strength) == share
    assert shares("--method", "dpo") == {1.0}


def test_cpo_leans_to_noisy_timesteps_as_told():
    base = tiny_model().frozen_copy()
    # u^100 is near 0 for seven of eight u
    for lean, low, high in ((0.01, 950, 999), (100, 0, 300)):
        flags = "--lean", str(lean), "--criteria", CRITERIA.leaves[0].name, "--paint", "0"
        step = alignment_step(settings_of(*flags), DATA, base, base)
        t = step(base.frozen_copy(), torch.Generator().manual_seed(0))[2]
        assert ((t >= low) & (t <= high)).sum() >= 7


def test_cpo_shows_attributes_to_the_auxiliary_only():
    base, auxiliary = tiny_model().frozen_copy(), tiny_model(seed=5).frozen_copy()
    target, seen = base.frozen_copy(), {}
    for name, model in (("base", base), ("target", target), ("auxiliary", auxiliary)):
        def keep(module, arguments, name=name, model=model):
            prompts = arguments[2]
            seen[name] = (prompts if torch.is_tensor(prompts) else model.text.tokens(prompts),
                          arguments[0], arguments[1])
        model.register_forward_pre_hook(keep)
    step = alignment_step(settings_of(), DATA, base, auxiliary)
    step(target, torch.Generator().manual_seed(0))
    assert (seen["base"][0][:, 1:] == 0).all() and (seen["target"][0][:, 1:] == 0).all()
    win, lose = seen["auxiliary"][0].chunk(2)
    assert ((win[:, 1:] == 1).any() and not (win[:, 1:] == 2).any()
            and (lose[:, 1:] == 2).any() and not (lose[:, 1:] == 1).any())
    for part in (1, 2):  # all four predictions at the same x_t and t
        first, second = seen["auxiliary"][part].chunk(2)
        assert (torch.equal(first, second) and torch.equal(first, seen["target"][part])
                and torch.equal(first, seen["base"][part]))


def test_cpo_prefers_where_the_positive_attributes_lead():
    """The step's loss is that of its four predictions: the first half of the auxiliary's, asked
    for the good attributes (see above), is the winner."""
    (base, auxiliary, target), seen = (tiny_model(seed).frozen_copy() for seed in range(3)), {}
    for model in (base, auxiliary, target):
        torch.nn.init.normal_(model.unet.conv_out.weight, std=0.1)        # they differ visibly
        model.register_forward_hook(
            lambda module, arguments, output: seen.update({module: output}))
    step = alignment_step(settings_of("--beta", "2"), DATA, base, auxiliary)
    loss, logs, _ = step(target, torch.Generator().manual_seed(0))
    z_win, z_lose = seen[auxiliary].chunk(2)
    expected, by_hand = cpo_loss(seen[target], seen[base], z_win, z_lose, 2.0, "constant", 0.55)
    assert by_hand["margin"].abs().max() > 1e-3
    torch.testing.assert_close(logs["margin"], by_hand["margin"])
    torch.testing.assert_close(loss, expected)


def test_a_branch_is_learned_at_pictures_that_are_right_in_it(monkeypatch):
    """--paint: what the auxiliary paints when the branch is positive and the rest as annotated; and
    the step draws from these."""
    columns = CRITERIA.columns(["Tone"])
    base, auxiliary, asked = tiny_model().frozen_copy(), tiny_model(seed=5).frozen_copy(), []

    def sampled(prompts, away, guidance, steps, seed):
        asked.append((prompts, steps, seed) if guidance == 1
                     else (prompts, away, guidance, steps, seed))
        return torch.full((len(prompts), 3, 32, 32), 0.5 - len(asked) % 2)
    monkeypatch.setattr(auxiliary, "sample", sampled)
    train = DATA.split("train")
    new = painted(train, auxiliary, columns, 7, steps=3, seed=5)
    others = [i for i in range(len(CRITERIA)) if i not in columns]
    assert len(new) == 7 and new.captions == train.captions[:7] and (new.images == 64).all()
    assert ((new.annotations[:, columns] == 1).all()
            and (new.annotations[:, others] == train.annotations[:7, others]).all())
    assert (train.annotations[:7, columns] < 0).any()             # the data themselves stay
    prompts = [CRITERIA.prompt(c, a) for c, a in zip(new.captions, new.annotations)]
    assert asked == [(prompts, 3, 5)]

    def drawn(*flags):
        step, seen = alignment_step(settings_of(*flags), train, base, auxiliary), []
        with monkeypatch.context() as patch:
            patch.setattr(method, "add_noise", lambda model, batch, *rest: (
                seen.append(batch.images) or add_noise(model, batch, *rest)))
            step(base, torch.Generator().manual_seed(0))
        return seen[0]
    grey = lambda images: (images.abs() - 0.5).abs().max() < 0.01
    flags = "--criteria", "Tone", "--paint", "7", "--sampling-steps", "3", "--seed", "5"
    assert grey(drawn(*flags)) and asked == [(prompts, 3, 5)] * 2         # as the flags say
    assert not grey(drawn("--criteria", "Tone", "--paint", "0")) and not grey(drawn("--paint", "0"))
    assert grey(drawn("--paint", "7", "--method", "sft")) and grey(drawn("--paint", "7"))


def test_the_teacher_s_pictures_guided_and_in_pairs(monkeypatch):
    """--paint-guidance: away from the other side; for Diffusion-DPO as many bad ones, from the same
    noise, and a pair is a good one and a bad one."""
    base, auxiliary, asked = tiny_model().frozen_copy(), tiny_model(seed=5).frozen_copy(), []

    def sampled(prompts, away, guidance, steps, seed):
        asked.append((prompts, away, guidance, steps, seed))
        return torch.full((len(prompts), 3, 32, 32), 1.5 - len(asked))
    monkeypatch.setattr(auxiliary, "sample", sampled)
    columns, train = CRITERIA.columns(["Tone"]), DATA.split("train")
    pairs = painted(train, auxiliary, columns, 6, 3, seed=5, guidance=2.5, bad_too=True)
    good, bad = ([CRITERIA.prompt(c, a) for c, a in zip(pairs.captions[part],
                                                        pairs.annotations[part])]
                 for part in (slice(6), slice(6, 12)))
    assert asked == [(good, bad, 2.5, 3, 5), (bad, good, 2.5, 3, 5)]
    assert (pairs.annotations[:6, columns] == 1).all() and pairs.captions == train.captions[:6] * 2
    assert (pairs.annotations[6:, columns] == -1).all()
    assert (pairs.images[:6] == 191).all() and (pairs.images[6:] == 64).all()
    asked.clear()
    one = painted(train, auxiliary, columns, 6, 3, seed=5, guidance=2.5)
    assert asked == [(good, bad, 2.5, 3, 5)] and len(one) == 6

    asked.clear()
    step = alignment_step(settings_of("--method", "dpo", "--paint", "40", "--apart",
                                      str(len(CRITERIA)), "--paint-guidance", "3"),
                          train, base, auxiliary)
    assert [x[2] for x in asked] == [3.0, 3.0]
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(baselines, "add_noise", lambda model, batch, *rest: (
            seen.append(batch.images) or add_noise(model, batch, *rest)))
        step(base, torch.Generator().manual_seed(0))
    assert (seen[0] > 0.4).all() and (seen[1] < -0.4).all()       # winners first


def test_pairs_lie_as_far_apart_as_they_are_told():
    pairs = baselines.Pairs(DATA, list(range(len(CRITERIA))), apart=3)
    generator = torch.Generator().manual_seed(0)
    picked = [pairs.pick(generator) for _ in range(50)]
    assert min(pairs.badness[b] - pairs.badness[a] for a, b in picked) == 3
    with pytest.raises(ValueError, match="differ in 13 negative attributes; lower --apart"):
        baselines.Pairs(DATA, list(range(len(CRITERIA))), apart=13).pick(generator)


# ---------------------------------------------------------------- what CPO is compared with

@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_dpo_and_sft_lean_as_stage_1_does(method):
    base = tiny_model().frozen_copy()
    for lean, low, high in ((0.01, 950, 999), (100, 0, 300)):
        settings = settings_of("--method", method, "--sft-lean", str(lean))
        t = alignment_step(settings, DATA, base, None)(base, torch.Generator().manual_seed(0))[2]
        assert ((t >= low) & (t <= high)).sum() >= 7


def test_dpo_pairs_share_caption_t_and_noise_and_the_winner_has_fewer_negatives():
    base, seen = tiny_model().frozen_copy(), {}
    target = base.frozen_copy()
    target.register_forward_pre_hook(
        lambda module, arguments: seen.update(xt=arguments[0], t=arguments[1], tokens=arguments[2]))
    data = DATA.split("train")
    step = alignment_step(settings_of("--method", "dpo"), data, base, None)
    step(target, torch.Generator().manual_seed(0))
    (t_win, t_lose), (tokens_win, tokens_lose) = seen["t"].chunk(2), seen["tokens"].chunk(2)
    assert torch.equal(t_win, t_lose) and torch.equal(tokens_win, tokens_lose)
    xt_win, xt_lose = seen["xt"].chunk(2)
    a, s = base.diffusion.scales(t_win, xt_win)
    x0 = base.latents.encode(data.batch(range(len(data))).images)
    badness = (data.annotations < 0).sum(1)
    for i in range(len(t_win)):  # with the same noise the difference is a * (x0_win - x0_lose)
        difference = (xt_win[i] - xt_lose[i]) / a[i]
        pair = ((x0[:, None] - x0[None]) - difference).abs().amax((2, 3, 4))
        j = pair.argmin().item()
        assert pair.flatten()[j] < 1e-2 and badness[j // len(x0)] < badness[j % len(x0)]


def test_each_dpo_picture_is_compared_with_its_own_reference():
    """A target that is the reference has equal errors on both sides, picture by picture, and the
    loss log 2."""
    base = tiny_model().frozen_copy()
    step = alignment_step(settings_of("--method", "dpo"), DATA.split("train"), base, None)
    loss, logs, _ = step(base, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)
    for side in ("winner", "loser"):
        torch.testing.assert_close(logs[side], logs[f"{side}_ref"])
    assert not torch.allclose(logs["winner"], logs["loser"])


@pytest.mark.parametrize("criteria", [None, ["Color Relations"]])
def test_sft_keeps_the_pictures_with_the_fewest_negative_attributes(criteria):
    negative = (DATA.annotations[:, CRITERIA.columns(criteria)] < 0).sum(1)
    most = np.sort(negative)[5]                                   # of the best tenth of 60
    assert (negative > most).sum() > 20
    data = replace(DATA, captions=[c if n <= most else "a ghost"
                                   for c, n in zip(DATA.captions, negative)])
    settings = settings_of("--method", "sft", "--best", "0.1",
                           *(["--criteria", *criteria] if criteria else []))
    for seed in range(3):
        step = alignment_step(settings, data, None, None)
        step(tiny_model(), torch.Generator().manual_seed(seed))
