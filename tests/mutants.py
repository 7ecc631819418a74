"""Mutants: bugs planted on purpose, one at a time; the tests must fail on each.

    python tests/mutants.py                 # all of them, two at a time; a run that stopped goes on
    python tests/mutants.py --every 41      # every forty-first: the subset of .ci/run
    python tests/mutants.py --only losses   # those of one file
    python tests/mutants.py --random 300    # as many that a machine made (random_mutants.py)

Each mutant is applied to a copy of the project; the tests of its own file run first, and if they
pass, all the others: only a mutant that passes everything is a survivor. The copy must pass without
any mutant first: were a file missing in it, all would seem caught. A mutant whose old text is gone,
or occurs twice, stops the run: mend it together with the code.
"""
import argparse
import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# file -> its tests, where the names differ
TESTS = {
    "train_cpo": "train", "train_sft": "train", "sample": "train", "data": "data",
    "run/stages": "method", "run/settings": "settings", "run/baselines": "method",
    "run/flags": "settings", "toy/export": "annotate", "study/expert": "study",
    "study/__main__": "study",
    "utils/checkpoint": "checkpoint", "utils/cli": "settings", "utils/muon": "muon",
    "utils/device": "settings", "utils/files": "doors", "utils/log": "train",
    "utils/ranks": "ranks",
    "utils/report": "evaluate", "folder/reading": "folder", "folder/annotate": "annotate",
    "folder/expert": "expert", "folder/proposals": "proposals", "folder/propose": "proposals",
    "folder/annotate.html": "annotate", "toy/critic": "painter", "toy/painter": "painter",
    "toy/paintings": "data", "toy/evaluate": "evaluate", "toy/report": "evaluate",
    "toy/world": "train", "study/lab": "study", "study/studies": "study", "study/figure": "study",
    "study/mixture": "mixture",
    "study/second_opinion": "study", "sd/vae": "sd_parts", "sd/clip": "sd_parts",
    "sd/tokenizer": "sd_parts", "sd/names": "sd_weights", "sd/weights": "sd_weights",
    "sd/files": "sd_weights", "sd/model": "sd_model", "sd/world": "sd_world",
    "sd/latents": "sd_latents", "utils/grid": "pictures", "study/plots": "pictures",
    "sd/report": "sd_report", "sd/lora": "lora"}


@dataclass(frozen=True)
class Mutant:
    file: str
    old: str
    new: str
    why: str
    thread: str = ""                        # where it really happened


def _all(file, *rows):
    return [Mutant(file, *row) for row in rows]


MUTANTS = [
    *_all("nanocpo/diffusion.py",
          ("(x + 0.008) / 1.008", "x", "cosine schedule without its offset"),
          (".clamp(max=0.999)", "", "the last beta is not clipped: alpha_bar reaches 0"),
          ("dtype=torch.float64) ** 2\n", "dtype=torch.float64)\n",
           "scaled-linear betas are not squared"),
          ("negative + scale * (positive - negative)",
           "positive + scale * (positive - negative)", "scale 1 is not the conditional model"),
          ("negative + scale * (positive - negative)",
           "negative + scale * (negative - positive)", "guided the wrong way"),
          ("return negative + scale * (positive - negative)",
           "return torch.cat([(negative + scale * (positive - negative))[:, :3],"
           " positive[:, 3:]], 1)", "guidance on three channels only",
           "facebookresearch/DiT issue 41"),
          ("return a * x0 + s * noise", "return s * x0 + a * noise", "signal and noise exchanged"),
          ("self.alpha_bar[t.cpu()]", "self.alpha_bar.to(t.device)[t]",
           "float64 on a GPU that has none"),
          ("(-s, a), ", "(s, -a), ", "sign of v",
           "yuanchenyang/smalldiffusion: its own tests pass with the target's sign flipped"),
          ("(q * xt - s * prediction) / determinant", "(q * xt - a * prediction) / determinant",
           "x0 from eps with the scales exchanged"),
          ("(a * prediction - p * xt)", "(a * prediction + p * xt)", "v read with the other sign"),
          ("a * q - s * p", "a * q + s * p", "every prediction but eps read at the wrong scale"),
          ("(-1, 1)}", "(1, -1)}", "sign of flow matching's velocity"),
          ("torch.arange(1, steps + 1, dtype=torch.float64) / steps\n    return (1 - s)",
           "torch.arange(steps, dtype=torch.float64) / steps\n    return (1 - s)",
           "flow matching never reaches pure noise"),
          ("(a / (a + s), s / (a + s))", "(a, s)", "flow matching on the circle, not on the line"),
          ("extra = (self.steps - count) *", "extra = (self.steps - count - 1) *",
           "sampling does not begin at T - 1", "2305.08891; one of minDiffusion's two copies"),
          ("if s_next > 0 and eta > 0", "if eta > 0", "noise is added at the last step"),
          ("xt = a_next.to(xt) * x0", "xt = a.to(xt) * x0",
           "a step that stays where it is"),
          ("* s_next) ** 2).clamp(min=0).sqrt()", "* s_next) ** 2).clamp(min=0)",
           "variance taken for its root"),
          ("eps = (xt - a.to(xt) * x0) / s.to(xt)", "pass",
           "eps keeps contradicting the clipped x0"),
          ("generator=generator, dtype=xt.dtype", "dtype=xt.dtype",
           "sampling noise ignores the seed")),
    *_all("nanocpo/losses.py",
          ("loss = _error(eps, goal)", "loss = (eps - goal).abs().flatten(1).mean(1)",
           "SFT with another norm"),
          ("(a * b).flatten(1).mean(1)", "(a * b).flatten(1).sum(1)",
           "sum instead of mean: beta means something else", "conventions of TRL and diffusers"),
          ("-0.5 * beta", "-beta", "the factor 1/2 is missing",
           "Diffusion-DPO against its re-implementations"),
          ("-0.5 * beta", "0.5 * beta", "prefers the loser"),
          ("loss, weight = -F.logsigmoid(margin),",
           "loss, weight = -F.logsigmoid(margin.mean()).expand(len(margin)),",
           "log-sigmoid of the batch mean", "huggingface/diffusers issue 6702"),
          ("loss, weight = -F.logsigmoid(margin),",
           "loss, weight = -torch.log(torch.sigmoid(margin)),", "overflows at large margins"),
          ("margin[:, None] + spread[:, None] * nodes", "margin[:, None] + 0 * nodes",
           "the step's noise is lost: noisy collapses"),
          ("beta / strength * moved", "beta * strength * moved",
           "noisy: more strength pulls back harder"),
          ("_error(eps_win, ref_win) + _error(eps_lose, ref_lose)",
           "_error(eps_win, ref_win)", "noisy: one of the two draws has no noise"),
          ("SHARES = SHARES / SHARES.sum()", "SHARES = SHARES / 2",
           "noisy: the shares of the nodes do not sum to 1"),
          ("place, place_ref = (_dot(x - z_lose, d)", "place, place_ref = (_dot(x - z_win, d)",
           "the place along the gap is counted from the winner"),
          ("- (place - place_ref) ** 2", "", "the way along the gap counts as across it"),
          ("lose = lose.detach() + lam * (lose - lose.detach())", "lose = lam * lose",
           "the stabiliser changes the value of the loss"),
          ("torch.where(valid, loss, 0).sum() / valid.sum()", "loss.mean()",
           "samples without a gap count in the mean"),
          ("-F.logsigmoid(margin), torch.sigmoid(-margin)",
           "-F.logsigmoid(margin), torch.sigmoid(margin)", "the wrong weight in the log"),
          ("k * torch.ones_like(win), 0.3", "(1 - k) * torch.ones_like(win), 0.3",
           "k and 1 - k exchanged"),
          ("torch.zeros_like(win), 0.0,", "torch.ones_like(win), 0.0,",
           "winner-only regression is vanilla"),
          ("(1 - mu) * win / dot", "(1 - mu) * lose / dot",
           "safeguard bounds by the loser's gradient"),
          ("torch.where(dot > 0, lam", "torch.where(dot < 0, lam",
           "safeguard acts where the gradients agree with each other"),
          ("return torch.where(win == 0, torch.zeros_like(win), lam)", "return lam",
           "safeguard leaves a winner that was reached"),
          ("dot.clamp(min=1e-30)).clamp(max=1)", "dot.clamp(min=1e-30))",
           "safeguard's lam above 1"),
          ("(win / lose.clamp(min=1e-30)).sqrt()", "(lose / win.clamp(min=1e-30)).sqrt()",
           "balance upside down"),
          ("(win / lose.clamp(min=1e-30)).sqrt()", "(win / lose.clamp(min=1e-30))",
           "ratio of squares instead of norms"),
          ("_balance(*sides).clamp(max=1)", "_balance(*sides)", "the other rule is clamped"),
          ("return RULES[rule].lam(*sides, strength)",
           "return RULES[rule].lam(*(x.mean().expand(len(x)) for x in sides), strength)",
           "one lam for the whole batch"),
          ("torch.where(valid, 4 / gap", "torch.where(valid, 4 / gap.sqrt()",
           "beta from the gap's root"),
          ("dpo_loss(eps, eps_ref, z_win, eps, eps_ref, z_lose,",
           "dpo_loss(eps, eps_ref, z_lose, eps, eps_ref, z_win,",
           "winner and loser exchanged in CPO"),
          ("_dot(eps - eps_ref, eps + eps_ref - 2 * goal)", "_error(eps, goal)",
           "no reference in the margin"),
          ("_dot(eps - eps_ref, eps + eps_ref - 2 * goal)",
           "_error(eps, goal) - _error(eps_ref, goal)",
           "difference of nearly equal errors in float32"),
          ("else x.float()", "else x", "half precision inside the loss"),
          ("gap = _error(z_win, z_lose).detach()", "gap = _error(z_win, z_lose)",
           "the auxiliary is trained too, through beta"),
          ("at_least_float32(x.detach()) for x in", "at_least_float32(x) for x in",
           "reference and auxiliary are trained too"),
          ("_change(eps_lose, ref_lose, goal_lose), beta, lam, valid,",
           "_change(eps_lose, ref_win, goal_lose), beta, lam, valid,",
           "the loser is compared with the winner's reference"),
          ("valid = gap > 0", "valid = gap >= 0", "samples that say nothing count")),
    *_all("nanocpo/toy/world.py",
          ("torch.manual_seed(self.settings.common.seed)", "torch.manual_seed(0)",
           "--seed does nothing to the base's first weights"),
          ("zip(captions, verdicts.signs, verdicts.captions)",
           "zip(captions[::-1], verdicts.signs, verdicts.captions)",
           "verdicts stand under other pictures"),
          ("return base.frozen_copy().requires_grad_(True)", "return base.requires_grad_(True)",
           "reference and target are one object: the loss stays at 0.693",
           "DPO issue 46 and several public copies"),
          ("if content is None or stopped(path, content, self.settings.common.resume):",
           "if content is None:",
           "a half-trained auxiliary is the teacher"),
          ("common.count, common.data, seed=common.seed", "common.count, seed=common.seed",
           "--data mixed paints flawed data"),
          ("beside = bad if sampling.guidance == 1 else []", "beside = []",
           "--negative does nothing without guidance"),
          ("if rows is None and data.digest() != self.trained_on:", "if False:",
           "that the auxiliary may have seen the held-out pictures is not said")),
    *_all("nanocpo/method.py",
          ("eps = target(xt, t_device, plain)", "eps = target(xt, t_device, win)",
           "the target is shown the attributes"),
          ("eps_ref = reference(xt, t_device, plain)", "eps_ref = reference(xt, t_device, win)",
           "the reference is shown the attributes"),
          ("z_win, z_lose = two_targets(", "z_lose, z_win = two_targets(",
           "learns to prefer the negative attributes"),
          ("win[chosen & (win < 0)]", "win[win < 0]",
           "the gap is about the whole tree, not the chosen branch"),
          ("lose[chosen & (lose > 0)] = -1", "lose[chosen & (lose > 0)] = 1",
           "opposite prompts that are not opposite"),
          ("win[:, chosen], lose[:, chosen] = 1, -1", "win[:], lose[:] = 1, -1",
           "--pairs all leaves the chosen branch"),
          ("target.diffusion.steps, generator, lean)", "target.diffusion.steps, generator, 0.7)",
           "--lean does nothing"),
          ("z_lose, beta, stabilizer, strength), t", "z_lose, None, stabilizer, strength), t",
           "--beta does nothing"),
          ("annotations = batch.annotations.copy()", "annotations = batch.annotations",
           "prompts eat the data set's annotations"),
          ("(kind < 0.1) & (annotations < 0)", "(kind < 0.1) & (annotations > 0)",
           "no prompt with positive attributes only"),
          ("return [criteria.prompt(caption) for caption in"
           " drop_caption(batch.captions, generator)]",
           "return [criteria.prompt(*pair) for pair in"
           " zip(drop_caption(batch.captions, generator), batch.annotations)]",
           "the base model is shown attributes"),
          ('"" if u < probability', '"" if u > probability', "prompt drop inverted",
           "yuanchenyang/smalldiffusion: inverted label dropout passes its tests"),
          ("u ** lean", "u ** (1 / lean)", "timesteps lean to the clean end"),
          ("model.diffusion.goal(x0, t, noise)",
           "model.diffusion.goal(x0, t, torch.randn_like(noise))",
           "the goal is not the noise that was added"),
          ("model.device.type, enabled=False", "model.device.type, enabled=True",
           "--bf16 rounds the pictures and the schedule")),
    *_all("nanocpo/run/baselines.py",
          ("goal_lose, beta, stabilizer,\n", "goal_lose, beta, 'none',\n",
           "--method dpo forgets its --stabilizer"),
          ("lose, t, generator, noise)", "lose, t, generator)",
           "each picture of a DPO pair has its own noise",
           "SalesforceAIResearch/DiffusionDPO issue 3"),
          ("both, times = torch.cat([xt_win, xt_lose]), send(torch.cat([t, t]), target.device)",
           "t_other = draw_t(len(t), diffusion.steps, generator, lean)\n    xt_lose"
           " = diffusion.q_sample(x0_lose, t_other, noise)\n    both, times ="
           " torch.cat([xt_win, xt_lose]), torch.cat([t, t_other])",
           "each picture of a DPO pair has its own t"),
          ("better = self.badness[first] < self.badness[second]",
           "better = self.badness[first] > self.badness[second]", "DPO prefers the worse picture"),
          ("np.argsort(data.badness(columns)", "np.argsort(-data.badness(columns)",
           "SFT on the worst part"),
          ("in (1, -1):\n        annotations", "in (-1, 1):\n        annotations",
           "a branch is learned at pictures that are wrong in it"),
          ("ref_win, ref_lose = reference(", "ref_lose, ref_win = reference(",
           "each DPO picture is compared with the other's reference")),
    *_all("nanocpo/run/settings.py",
          ("strength=strength if self.strength is None else self.strength",
           "strength=self.strength or strength", "--strength 0 is taken for none given"),
          ("if self.criteria:\n", "if False:\n",
           "a branch alone is pulled as hard as the whole tree"),
          ("1024 if self.criteria else 512", "512 if self.criteria else 0",
           "a branch is learned at the flawed pictures"),
          ("|rows|.*_kohya", "|rows", "an adapter's second file overwrites another's first"),
          ('"none" if self.method == "dpo" else "constant"', '"none"',
           "the default method is vanilla")),
    *_all("nanocpo/run/stages.py",
          ("record(settings.common) | kind", "kind", "a run with another --count is resumed"),
          ("lambda: world.trainable(base), sft.sft_steps", "world.new_base, sft.sft_steps",
           "the auxiliary does not start as the base"),
          ("(s / (a * q - s * p)).square()", "(s / a).square()", "Min-SNR weighs v as eps"),
          ('was.get("steps", steps) < steps:', "False:",
           "--resume on what is finished ignores more steps"),
          ('alignment_step(settings, world.data.split("train")',
           'alignment_step(settings, world.data.split("test")', "aligned on the test pictures"),
          ('step, {"base": base.digest()}, exactly)', "step, {}, exactly)",
           "an auxiliary of another base is used"),
          ("lambda: world.trainable(base), sft.sft_steps",
           "lambda: base.requires_grad_(True), sft.sft_steps", "SFT overwrites the base model"),
          ('world.data.split("train"), caption_prompts',
           'world.data.split("test"), caption_prompts', "trained on the test pictures"),
          ('world.data.split("train"), attribute_prompts', "world.data, attribute_prompts",
           "tuned on the test pictures too"),
          ("resume=common.resume", "resume=False", "--resume does nothing"),
          ("seed=common.seed,", "seed=0,", "--seed does nothing"),
          ("accumulate=common.accumulate", "accumulate=1", "--accumulate does nothing"),
          ('    step = alignment_step(settings, world.data.split("train"), base,'
           " auxiliary)", "    step = alignment_step(settings, world.data, base, auxiliary)",
           "stage 2 trains on held-out pictures"),
          ("return world.publish(average, name), line",
           "return world.publish(model, name), line",
           "the file holds the raw adapter, not the one that is reported"),
          ("dict(muon=False)", "dict(muon=True)", "stage 2 takes Muon's steps"),
          ("plateau=0.999, ema=0.0) if steady", "plateau=0.999, ema=0.0) if not steady",
           "curves of steps show the schedule"),
          ("bf16=world.autocast, accumulate", "bf16=False, accumulate", "--bf16 does nothing")),
    *_all("nanocpo/toy/report.py",
          ('record(settings) | {"seed"', '{"samples": settings.samples} | {"seed"',
           "rows of other sampling steps are kept"),
          ("steps=settings.sampling_steps, seed=seed))", "steps=settings.sampling_steps))",
           "base and target are shown from different noise"),
          ('name: (target, "plain")}', 'name: (target, "prompted")}',
           "the report asks the target with attributes"),
          ("fingerprint(base, auxiliary)", "fingerprint(base)",
           "a new auxiliary shows its predecessor's rows"),
          ("args.device), args.kind)", 'args.device), "plain")', "--kind does nothing"),
          ('"code": code_digest(*code())', '"code": ""', "a changed critic keeps its old rows")),
    *_all("nanocpo/train.py",
          ("torch.bfloat16, enabled=bf16)", "torch.bfloat16, enabled=False)",
           "--bf16 does nothing"),
          ("torch.Generator().manual_seed(seed))", "torch.Generator().manual_seed(0))",
           "--seed does nothing to the batches"),
          ("list(self.model.parameters()),\n                                 1 - decay)",
           "list(self.model.parameters()),\n                                 decay)",
           "EMA that hardly averages"),
          ('"ema": self.average.state_dict()', '"ema": self.model.state_dict()',
           "the checkpoint holds the raw weights twice"),
          ('self.optimizer.load_state_dict(state["optimizer"])', "pass",
           "resuming forgets the momentum"),
          ('self.generator.set_state(state["rng"])', "pass",
           "resuming repeats the first batches"),
          ('return state["step"]', "return 0", "resuming starts from step 0"),
          ("model.parameters(), recipe.clip)", "model.parameters(), 1e9)",
           "gradients are not clipped"),
          ("state.optimizer.zero_grad(set_to_none=True)", "pass", "gradients pile up",
           "a classic"),
          ("(loss / len(batches)).backward()", "loss.backward()",
           "accumulated batches weigh more than one"),
          ("enumerate(norms, done - len(norms))", "enumerate(norms)",
           "a diverging run names the wrong step"),
          ("        self.optimizer.step()\n", "", "the optimiser never steps",
           "yuanchenyang/smalldiffusion: passes its tests"),
          ("min(1, (step + 1) / self.warmup)", "1", "no warm-up"),
          ("done / (done + 9)", "1 / (done + 9)", "EMA that forgets everything"),
          ("state.step(recipe.lr_at(step),",
           "state.step(recipe.lr * min(1, done / recipe.warmup),",
           "the rate never falls, but in the log")),
    *_all("nanocpo/utils/log.py",
          ('before.decode(errors="replace")', "before.decode()",
           "a torn byte of the log forbids resuming"),
          ("if _step(line) <= keep]", "if json.loads(line)['step'] <= keep]",
           "a torn line of the log forbids resuming"),
          ("mean(value, valid & (bins == i))", "mean(value, valid)",
           "every timestep bin shows the average"),
          (' - self.line.get("seconds", 0)', "", "a resumed run forgets the time it took")),
    *_all("nanocpo/utils/checkpoint.py",
          ("if file.testzip():", "if False:", "a changed byte is another weight"),
          ('not sealed or content.pop("checksum", None) == _checksum(content)', "True",
           "a kept file that was written into is believed"),
          ('getattr(error, "filename", None)', "isinstance(error, OSError)",
           "a damaged checkpoint is not named"),
          ("for name in kinds.keys() - {\"ema\"}:", "for name in ():",
           "a tensor among the settings ends in a traceback"),
          ("    if wrong:\n        raise ValueError(f\"{what}",
           "    if False:\n        raise ValueError(f\"{what}",
           "resumes whatever run the file holds"),
          ("temporary.unlink(missing_ok=True)", "pass", "a full disk is kept full by half a file"),
          ("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB",
           "two runs write one checkpoint"),
          ("not weight.isfinite().all()", "False", "a checkpoint of NaN is painted with"),
          ("temporary = path.with_name(f\"{path.name}.tmp{ranks.number() or ''}\")",
           "temporary = path",
           "a killed run leaves half a checkpoint"),
          ("weights_only=True", "weights_only=False", "a checkpoint can run code"),
          ("if must is None or name in must]", "if must is None]",
           "an auxiliary of another base is used silently")),
    *_all("nanocpo/data.py",
          ("torch.randint(len(self), (count,), generator=generator)",
           "torch.randint(len(self), (count,))", "batches ignore the seed"),
          ("range(0, 8)", "range(0, 9)", "validation pictures are trained on"),
          (".float() / 127.5 - 1", ".float() / 255", "pictures in [0, 1] for a model of [-1, 1]"),
          ("(*self.images, self.annotations)", "self.images",
           "a folder that was annotated again counts as the same")),
    *_all("nanocpo/model.py",
          ("generator = torch.Generator().manual_seed(seed)\n        noise",
           "generator = torch.Generator().manual_seed(0)\n        noise",
           "--seed does nothing to the pictures"),
          ("torch.linalg.inv(self.mix)", "self.mix.T",
           "decode undoes the rotation but not the scale"),
          ('model.load_state_dict(content["ema"])', 'model.load_state_dict(content["model"])',
           "the averaged weights are not used"),
          ("guide(first, rest.pop(0), guidance)", "guide(rest.pop(0), first, guidance)",
           "guided towards the negative prompt"),
          ("scale * (good - bad)", "scale * (bad - good)", "--axis turns the knobs the other way"),
          ("zip(axes, rest[::2], rest[1::2])", "zip(axes, rest[::2], rest[::2])",
           "--axis does nothing"),
          ("return copy.deepcopy(self).eval()", "return self.eval()",
           "a frozen copy that is no copy"),
          ("(states % 3)", "(states ** 2)", "negative attributes are read as positive"),
          ("annotation(prompt.positive, prompt.negative)", "annotation(prompt.positive)",
           "the negative attributes are left out")),
    *_all("nanocpo/criteria.py",
          ("if states[i] == -side", "if False", "an attribute may be positive and negative"),
          ("a.negative for a, s in pairs if s < 0", "a.negative for a, s in pairs if s <= 0",
           "what was not judged counts as negative"),
          ("if any(tree is parent for parent in above)", "if False",
           "a tree that contains itself")),
    *_all("nanocpo/toy/critic.py",
          ("like[:, corner[:, ::-1]]", "like[:, corner]", "a bare corner on the right is not seen"),
          ("np.where(scores > 0, 1, -1)", "np.where(scores > 0, -1, 1)", "verdicts upside down"),
          ("np.minimum(turn, 1 - turn)", "turn", "hues do not wrap around"),
          ("np.abs(slope), np.abs(place", "slope, np.abs(place",
           "a horizon that falls to the left is level"),
          ("(dark > sky) | (light < sky) & (light > 0)", "dark > 9",
           "a tree's crown does for a sun"),
          ("SOFTNESS = 1.0, 7.0", "SOFTNESS = 1.0, 2.0", "half-blurred edges are called blurred"),
          ("(parts.min(1) > 2) & (np.abs(below) < 8)", "(np.abs(below) < 8)",
           "a hull does for a horizon"),
          ("(light * lost * (lost > 0.3)", "(light * lost", "roughness is called spatter"),
          ("np.exp((error.min(1, keepdims=True) - error) / 0.5)",
           "np.exp((error.min(1, keepdims=True) - error) / 500)",
           "every line explains the picture alike")),
    *_all("nanocpo/toy/painter.py",
          ("rgb *= 0.48", "rgb *= 0.9", "too dark is not dark"),
          ('-0.13 if good["Harmony"] else 0.42', '0.42 if good["Harmony"] else -0.13',
           "clashing and analogous exchanged")),
    *_all("nanocpo/folder/reading.py",
          ('"RGBA", image.size, "white")', '"RGBA", image.size)',
           "transparent parts show the colour that was hidden"),
          ("path.resolve().relative_to(folder.resolve())", "path.resolve()",
           "a line may read any file of the machine"),
          ("ImageOps.exif_transpose(image)", "image", "photographs lie on their side"),
          ("if profile and image.mode", "if False and image.mode",
           "colours of a scan are taken for sRGB"),
          ("if path.resolve() in seen:", "if False:", "a picture may have two verdicts"),
          ('{row[key].strip() for key in ("caption", "text")',
           '{row[key].strip() for key in ("caption",)', "`text` is not read"),
          ("except (NotAFile, PermissionError)", "except NotAFile",
           "a picture that may not be read is called damaged"),
          ("if caption or not beside.exists():", "if caption or True:",
           "captions beside the pictures are not read")),
    *_all("nanocpo/utils/files.py",
          ("if stat.S_ISDIR(mode):", "if False:", "a folder is called a pipe"),
          ("if len(seen) < len(pairs):", "if False:",
           "of a verdict that is there twice one is lost"),
          ("(value, text[at:end])", "(value, json.dumps(value))",
           "numbers and escapes of others are written in another way"),
          ('return not re.search("[\\ud800-\\udfff]", string)', "return True",
           "half a character ends in a traceback when it is encoded")),
    *_all("nanocpo/toy/paintings.py",
          ("(seed, i, 1)))", "(0, i, 1)))", "--seed does nothing to the paintings' hues"),
          (">= math.ceil(len(names) / 3)", ">= math.floor(len(names) / 3)",
           "a third is rounded down")),
    *_all("nanocpo/utils/report.py",
          ("np.concatenate([base, target])", "np.concatenate([target, base])",
           "base and target stand in each other's row"),
          ("/ len(values) ** 0.5", "/ len(values)", "intervals far too narrow")),
    *_all("nanocpo/toy/evaluate.py",
          ("model.captions[i % len(model.captions)] for", "model.captions[0] for",
           "the report asks for one caption only"),
          ("zip(criteria.leaves, negative.mean(0))", "zip(criteria.leaves[::-1], negative.mean(0))",
           "shares stand under the names of other leaves"),
          ("- 2 * cross", "- cross", "Fréchet distance of equal sets is not 0"),
          ("(len(x) * (len(x) - 1))", "len(x) ** 2", "diversity counts a picture against itself"),
          ('if kind == "plain" else positive', 'if kind != "prompted" else positive',
           "the guided row has no attributes"),
          ("steps, seed=seed,", "steps, seed=0,", "every seed samples the same noise"),
          ("np.isin(np.arange(len(criteria)), criteria.columns(name)).astype",
           "np.ones(len(criteria)).astype", "the knob of a branch turns all of them"),
          ("square.min(1), 0)", "square.max(1), 0)", "distance to the farthest painting"),
          ("(steps[1:] - share).max()", "(steps[1:] - share).min()",
           "hues at one end count as covered"),
          ("[0] > 0.03).mean()", "[0] > 0.12).mean()", "faint hatching is not seen")),
    *_all("nanocpo/folder/annotate.html",
          ("x < 0.4 ? 1 : x > 0.6 ? -1 : 0", "x < 0.4 ? -1 : x > 0.6 ? 1 : 0",
           "clicks judge upside down"),
          ("    leaf = i;\n", "", "a click judges another attribute"),
          ("mine.was !== row.was", "false", "what the browser kept wins over a newer file"),
          ('? "pixelated" : "auto"', '? "auto" : "auto"', "small pictures are blurred"),
          ("leaves.filter((l) => row.states[l.name] > 0)",
           "leaves.filter((l) => row.states[l.name] > 0 || (row.proposed[l.name] || [0])[0] > 0)",
           "a proposal is saved as a verdict"),
          ("row.states[l.name] || row.refused[l.name] ?", "row.states[l.name] ?",
           "what was refused is proposed again"),
          ("  row.refused = mine.refused || {};\n", "",
           "what was refused is proposed again when the page is opened again"),
          ("y: () => accept([leaves[leaf]])", "y: () => accept(leaves)",
           "one key confirms what nobody looked at"),
          ("slice(0, -1), ...row.other]", "slice(0, -1)]", "keys of others are lost on saving"),
          ('!== "" || row.other.length)', '!== "")', "a line without a caption is lost on saving")),
    *_all("nanocpo/study/figure.py",
          ("lambda xt, a, prompt=prompt: world", "lambda xt, a: world",
           "all fields of the figure are the last one's")),
    *_all("sample.py",
          ("painter.labels(images, captions)", "painter.labels(images[::-1], captions)",
           "verdicts stand under other pictures"),
          ("model.sample(prompts, away,", "model.sample(away, prompts,", "guides towards the bad")),
    *_all("nanocpo/utils/cli.py",
          ("if sys.flags.dev_mode or not (own or isinstance(error, (OSError,"
           " FloatingPointError))):", "if sys.flags.dev_mode:",
           "a bug is told as if its user could mend it"),
          ('self.register("type", None, not_empty)', "pass", "empty flags are taken"),
          ("c if c.isprintable() else repr(c)[1:-1]", "c", "an error of several lines"),
          ('sys.stdout.reconfigure(errors="backslashreplace")', "pass",
           "a name that is not UTF-8 ends a run in a traceback"),
          ('split(".")[0] == "nanocpo"', 'split(".")[0] == "__main__"',
           "an error of this package is told with a traceback")),
    *_all("nanocpo/study/lab.py",
          ("if \"judged\" in own and self.args.seed:", "if False:",
           "verdicts that another seed damaged are taken for these"),
          ("evaluate.asked(base, len(images)), base",
           "evaluate.asked(base, len(images))[::-1], base",
           "pictures are held against other captions"),
          ("lab.taught(args)[1]", 'lab.models["auxiliary"]',
           "a degraded level is judged by the undegraded auxiliary"),
          ("ready_auxiliary(Toy(settings, data)", "ready_auxiliary(Toy(settings, self.data)",
           "stage 1 sees the whole annotation"),
          ("data, auxiliary = lab.taught(args)",
           "data, auxiliary = lab.data, lab.taught(args)[1]", "stage 2 sees the whole annotation"),
          ("sft_steps=args.sft_steps,\n", "sft_steps=self.args.sft_steps,\n",
           "a short stage 1 is as long as any"),
          ("        elif args.sft_steps == self.args.sft_steps:", "        else:",
           "the folder's auxiliary teaches instead of the short one"),
          ("args.guidance, knobs)", "2.0, knobs)",
           "every point of the guidance curve is at scale 2"),
          ("after = step(moving, generator())[1]", "after = step(model, generator())[1]",
           "`gap` measures the model that did not move"),
          ("args.every, resume=False)", "args.every)", "a resumed curve has lost its first points"),
          (" | self.sources", "", "results of another auxiliary are taken for this one's")),
    *_all("nanocpo/study/studies.py",
          ("np.subtract(negative(level, name),\n", "np.add(negative(level, name),\n",
           "annotation: the difference in pairs is a sum"),
          ("for root in roots for scale in TURNS]\n    save_grid",
           "for scale in TURNS for root in roots]\n    save_grid",
           "axes: the turned pictures stand in each other's places"),
          ("4.30, 3.18", "3.18, 4.30", "quantiles of Student's t exchanged"),
          ("min(slow) / np.mean(steps)", "np.mean(steps) / min(slow)",
           "times fewer steps upside down"),
          ("np.std(values, ddof=1)", "np.std(values)", "intervals over few seeds too narrow"),
          (" >= base_caption - 0.02", " >= 0",
           "a setting that paints the wrong subjects is chosen"),
          ("np.mean(relative(rows, args.validation), 1)",
           "np.array(relative(rows, args.validation))[:, 0]", "one validation seed decides alone"),
          ("search = dict(seed=args.validation[0]", "search = dict(seed=args.seeds[0]",
           "settings are tuned on a reported seed"),
          ("return fixed | setting | pairs", "return fixed | setting",
           "Diffusion-DPO sees twice the pictures"),
          ("np.subtract(values[a], values[b])", "np.subtract(values[b], values[a])",
           "differences of pairs have the wrong sign"),
          ("seed % len(rooms) == i", "i == 0", "all seeds share one base")),
    *_all("nanocpo/folder/expert.py",
          ("(z_good - z_bad) * (2", "(z_bad - z_good) * (2",
           "the auxiliary's verdicts upside down"),
          ("(column[verdicts == side])", "(column[verdicts == 1])",
           "calibrated on one kind of verdict"),
          ("int((draw + 0.5) * model.diffusion.steps / draws)", "int(draw)",
           "all draws at little noise"),
          ("np.where(leaf, side, others)", "np.where(leaf, side, 0)",
           "every round asks about each leaf alone"),
          ("found if number < 2 else", "found if number < 3 else", "a round is forgotten"),
          ("seed + number, size", "seed, size", "every round sees the same noise"),
          ("np.where(known != 0, known, context)", "context",
           "verdicts that stand are overruled for the next round"),
          ("others = ~np.eye(len(scores), dtype=bool)",
           "others = np.ones((len(scores),) * 2, dtype=bool)",
           "a verdict helps to confirm itself"),
          ("alike.setdefault(tuple(image.shape), [])", "alike.setdefault(0, [])",
           "pictures of several shapes are asked as one shape"),
          ("if tenth in parts][:count]", "if True][:count]",
           "training pictures say how good the auxiliary is")),
    *_all("nanocpo/folder/proposals.py",
          ("np.where(asked.annotations == 0, np.where(", "np.where(True, np.where(",
           "what was judged gets a proposal"),
          ("*how, known=asked.annotations)", "*how)", "verdicts that stand are not told"),
          ("known=asked.annotations) - calibrate(*judged)", "known=asked.annotations)",
           "the cuts do nothing"),
          ("(far[None] < far[:, None])", "(far[None] > far[:, None])",
           "the least sure is called the surest")),
    *_all("nanocpo/study/second_opinion.py",
          ("x = x + 2 * (each(blotches)", "x = x + (each(blotches)",
           "half the roughness that is stated"),
          ("(a[0] == b[0]).mean(0)", "(a[0] != b[0]).mean(0)", "agreement is disagreement"),
          ("signs[i] > 0", "signs[i] < 0", "the networks learn the opposite")),
    *_all("nanocpo/utils/muon.py",
          ("max(1, x.size(0) / x.size(1)) ** 0.5", "1", "tall matrices take too small a step"),
          ("A, B, C = 3.4445", "A, B, C = 2.4445", "the iteration does not reach 1"),
          ("product / size.sqrt()", "product / size", "a small gradient takes too large a step"),
          ("if hidden else torch.nn.Module()", "", "stage 2 takes Muon's steps too"),
          ("lr=group[\"lr\"],", "lr=10 * group[\"lr\"],", "AdamW takes Muon's learning rate")),
    *_all("nanocpo/utils/device.py",
          ("device=name)", "device='cpu')", "--device does nothing"),
          ("non_blocking=torch", "non_blocking=False and torch", "each copy waits for the GPU")),
    *_all("nanocpo/utils/ranks.py",
          ("return items[number()::count()]", "return items", "every process takes every batch"),
          ("calls) % count() == number()", "calls) % count() == 0",
           "most of the pictures are encoded by nobody"),
          ("return batch // several, accumulate * several", "return batch, accumulate * several",
           "the step grows with the processes"),
          ("for seed in seeds]", "for _ in seeds for seed in seeds[:1]]",
           "all batches of a step are one"),
          ("    shared = _Together(model)\n", "    return model\n", "gradients stay at home"),
          ("return nullcontext() if now or count() == 1 else model.no_sync()",
           "return nullcontext() if count() == 1 else model.no_sync()",
           "gradients are never exchanged"),
          ("        shared.register_comm_hook(None, _mean_in_order)\n", "        pass\n",
           "a run of three that was resumed rounds otherwise"),
          ("return [item for one in lists for item in one]", "return items",
           "the log is of the first process only")),
    *_all("nanocpo/unet.py",
          ("value, gate = self.proj(x)", "gate, value = self.proj(x)", "GEGLU halves exchanged"),
          ("F.gelu(gate)", 'F.gelu(gate, approximate="tanh")', "the other GELU"),
          ("nn.GroupNorm(config.groups, dim, 1e-6)", "nn.GroupNorm(config.groups, dim, 1e-5)",
           "the transformer's norm with the ResBlock's eps"),
          ("torch.cat([angles.cos(), angles.sin()], dim=1)",
           "torch.cat([angles.sin(), angles.cos()], dim=1)", "sine before cosine"),
          ('"b n (h d) -> b h n d"', '"b n (d h) -> b h n d"',
           "heads are cut across the wrong axis"),
          ("self.time_emb_proj(F.silu(time))", "self.time_emb_proj(time)",
           "the second SiLU of the time embedding is missing")),
    *_all("nanocpo/sd/vae.py",
          ("nn.ZeroPad2d((0, 1, 0, 1))", "nn.ZeroPad2d((1, 0, 1, 0))",
           "the VAE pads on the other side"),
          ("EPS, LATENT = 1e-6, 4", "EPS, LATENT = 1e-5, 4", "the UNet's eps in the VAE's norms"),
          ("self.config.scale * at_least_float32(mean)", "at_least_float32(mean)",
           "latents without their scale")),
    *_all("nanocpo/sd/clip.py",
          ("h * torch.sigmoid(1.702 * h) if self.quick else", "", "OpenCLIP's GELU for ViT-L"),
          ("is_causal=True", "is_causal=False", "a token sees what comes after it"),
          ("penultimate, x = x, layer(x)", "penultimate = x = layer(x)", "XL reads the last layer"),
          ("(ids == eos).int().argmax(1)", "-1",
           "pooled at the padding, not at the first end of text")),
    *_all("nanocpo/sd/tokenizer.py",
          ("'(?:s|t|re|ve|m|ll|d)|", "", "contractions are not words of their own"),
          ("|N|", "|N+|", "numbers are not read digit by digit"),
          ("            if lost:\n", "            if False:\n",
           "a merges.txt that is cut off is read"),
          ("if type(number) is not int or number < 0]", "if number is None]",
           "ids that are no numbers end in a traceback"),
          ("pair not in self.rank", "False", "merges what no merge allows"),
          (' and not "\\x1c" <= c <= "\\x1f"', "", "U+001C to U+001F are taken for spaces"),
          ("key=lambda item: -len(item[0])", "key=lambda item: len(item[0])",
           "the shortest learned word is taken"),
          ("self.learned.split(plain(part))", "[plain(part)]",
           "a learned word is spelled in ordinary pieces")),
    *_all("nanocpo/sd/files.py",
          ("weights_only=True", "weights_only=False", "a checkpoint can run code"),
          ("state |= shard", "state = shard", "the last shard only"),
          ('"numpy.core.multiarray.scalar",', "", "the first public .ckpt files are refused",
           "ComfyUI pull request 10333"),
          ('[f".{variant}", ""] if variant', '[f".{variant}"] if variant',
           "a part without the variant is refused"),
          ('re.search(r"GLOBAL ([\\w.]+)", str(error))', "None",
           "what was refused in a checkpoint is not named")),
    *_all("nanocpo/sd/names.py",
          ("tensor.T.contiguous()", "tensor", "text_projection is not transposed"),
          ('zip("qkv", tensor', 'zip("kqv", tensor', "q and k of OpenCLIP exchanged"),
          ("levels - 1 - int(up[1])", "int(up[1])", "the VAE's decoder upside down"),
          ('if penultimate and "text_projection" in state:', "if penultimate:",
           "a block that is needed is left out of converted files"),
          ("for mark in MARKS if mark in state", "for mark in ()",
           "an XL fine-tune that predicts v is read as eps"),
          ("3 * int(found[2]) + int(found[3]) + 1}", "3 * int(found[2]) + int(found[3])}",
           "XL's adapters have names that sd-scripts does not know"),
          ('{"scaling_factor": 0.13025}', "{}", "an XL file's latents have SD 1's scale"),
          ('"attention_head_dim": [5, 10, 20, 20]', '"attention_head_dim": 8',
           "SD 2 files have SD 1's heads")),
    *_all("nanocpo/sd/weights.py",
          ("or not 0 < scale < math.inf", "", "latents of a scale that is no number"),
          ('get("num_attention_heads") or get("attention_head_dim")',
           'get("attention_head_dim")', "heads where a file says both"),
          ("if xl and not encoders[1].config.projection:", "if False:",
           "XL's pooled vector without its projection"),
          ('zero_snr=bool(config.get("rescale_betas_zero_snr"))', "zero_snr=False",
           "zero-terminal SNR is not read"),
          ('if name == "vae" and dtype == torch.float16', "if False",
           "XL's VAE overflows in float16"),
          ("if value not in only.get(key, (None, False)):", "if False:",
           "settings that change the computation are ignored"),
          ("return config | marked | flags", "return marked | flags | config",
           "what a file says of itself is overruled by a stock config"),
          ('only | {"steps_offset": (1,)}', "only",
           "an XL scheduler without its offset is sampled with it"),
          ("config = DIFFUSION | config", "pass", "a missing beta_schedule is taken for SD's"),
          ("encoder.config.eos = end", "pass", "with learned words XL pools at the start"),
          ("size = 64\n", "pass\n", "an old converter's 32 paints 256 pixels"),
          ("    if broken:\n", "    if False:\n", "weights of NaN paint black"),
          ("if loaded.derived and highest", "if False and highest",
           "of a merges.txt that is cut off the end of a text is another token"),
          ("if scale(own) != scale(config):", "if False:",
           "a VAE whose latents have another scale")),
    *_all("nanocpo/sd/model.py",
          ("parts[:-1] + [more] if fits(more) else parts + [Prompt(**{side: (phrase,)})]",
           "parts[:-1] + [more]", "phrases beyond the window are lost"),
          ('texts == [""] and self.parts.zeros_for_empty', "False", "XL's empty prompt is encoded"),
          ("outputs[1][2][0]", "outputs[1][2][-1]", "XL's pooled vector is of a long prompt's end"),
          ("lora.using(adapter)))", "nullcontext()))", "recomputed with another model's adapter"),
          ("fingerprint(self.parts.unet, *self.parts.encoders)", "fingerprint(self.parts.unet)",
           "a run is resumed with another text encoder"),
          ("with self.backbone.lora.using(self.adapter),", "with", "the adapter does not act"),
          ("noise * (1 - self.diffusion.alpha_bar[-1]).sqrt().to(noise)", "noise",
           "trailing Euler starts with too much noise"),
          ("max(guidance, 1.0)", "guidance", "guidance 0 leaves the prompt out"),
          ("for part in parts if self.resting else ():", "for part in ():",
           "text encoders stay on the GPU"),
          ("self.resting, self.cache = False, None", "self.resting = False",
           "thousands of prompts that are asked once fill the cache"),
          ("            if self.resting:\n                self.rest()\n", "",
           "text encoders stay on the GPU once verdicts were asked")),
    *_all("nanocpo/sd/latents.py",
          ("np.log(b[0] / b[1]) -", "np.log(b[1] / b[0]) -", "broad pictures in tall buckets"),
          ("{image.size} {digest}", "{image.size}", "one picture's latents for all of its size"),
          ("self.images[i].shape == self.images[indices[0]].shape", "True",
           "a batch of several shapes"),
          ('{vae.config} {fingerprint(vae)} {code}', '{vae.config} {code}',
           "latents of another VAE are used"),
          ('{vae.config} {fingerprint(vae)} {code}', '{vae.config} {fingerprint(vae)}',
           "latents that older code encoded are used"),
          ("if not self.digests:", "if True:", "pictures are held out by position")),
    *_all("nanocpo/sd/world.py",
          ("if self.settings.weights.tokenizer:     # a", "if False:     # a",
           "an adapter of another tokenizer is used silently"),
          ("for model in (self.base, average)])", "for model in (average, self.base)])",
           "base and target stand in each other's row"),
          ("if weights.resolution else parts.size", "if weights.resolution else (512, 512)",
           "XL paints at SD 1's size"),
          ("alignment_step(evenly, held, base, auxiliary)",
           'alignment_step(evenly, self.data.split("train"), base, auxiliary)',
           "the report's log is not of held-out pictures"),
          ('self.settings.changed(method="cpo", lean=1.0)', "self.settings.changed(lean=1.0)",
           "--method esd ends in a traceback"),
          ("getattr(torch, dtype or weights.dtype)", "torch.float32", "--dtype does nothing"),
          ("return base.with_adapter(self.settings.weights.rank,"
           " self.settings.common.seed)", "return base.with_adapter(self.settings.weights.rank)",
           "--seed does nothing to an adapter's first weights"),
          ("for c in captions] if bad else None)", "for c in captions] if False else None)",
           "--negative does nothing"),
          ("if self.sampling.guidance <= 1 else ()", "if self.sampling.guidance == 1 else ()",
           "with guidance 0 the negative phrases stand nowhere"),
          ('parts.version == "xl", told)', "False, told)",
           "XL's adapter is written under names that sd-scripts does not know"),
          ("self.shown or [known", "[known", "--prompts does nothing"),
          ("self.model, rows)", "self.model)", "proposals for the pictures that are judged"),
          ("        if stopped(self.path(name), content, self.settings.common.resume):",
           "        if False:", "the files of an earlier run are taken for the one that stopped"),
          ("        say_if_older(path)\n", "", "an adapter of an earlier run is not told")),
    *_all("nanocpo/sd/report.py",
          ("first, second = (to_images", "second, first = (to_images",
           "base and target stand in each other's row"),
          ("(each[..., 1] - each[..., 0])", "(each[..., 0] - each[..., 1])",
           "log-ratio upside down"),
          ("(own <= cuts).sum(1)", "(own > cuts).sum(1)", "the good attributes are counted"),
          ("calibrate(scores, held.annotations)", "calibrate(scores, -held.annotations)",
           "the held-out verdicts are read upside down")),
    *_all("nanocpo/sd/lora.py",
          ("torch.Generator().manual_seed(seed), {}", "torch.Generator().manual_seed(0), {}",
           "all adapters start alike"),
          ("torch.zeros(layer.out_features, rank)", "torch.ones(layer.out_features, rank)",
           "a new adapter changes the model"),
          ("torch.tensor(float(len(a)))", "torch.tensor(1.0)",
           "other programs scale what is written down"),
          ("at_least_float32(weight) + change", "at_least_float32(weight) - change",
           "merged with the wrong sign"),
          ("math.sqrt(rank) if", "rank if", "rank-stabilised adapters are read as others"),
          ('pattern or settings.get("lora_alpha") or rank', "rank", "alpha is ignored"),
          ("if not all(x.isfinite().all()", "if False and not all(x.isfinite().all()",
           "an adapter of NaN is painted with"),
          ("b = strength * b", "pass", "an adapter's strength does nothing"),
          ('"sdxl_base_v1-0" if version == "xl"', '"sd_v1" if version == "xl"',
           "an adapter of XL says that it is of SD 1")),
    *_all("nanocpo/folder/annotate.py",
          ('.replace("<", "\\\\u003c")', "", "a caption ends the page's script"),
          ("sorted(set(known) - set(files))", "[]",
           "annotations of lost pictures are dropped silently"),
          ('json.dumps(row | {"states": judged}, sort_keys', "json.dumps(row, sort_keys",
           "a new leaf makes the browser forget its work"),
          ('proposed.get(row["file_name"], {})', "{}", "no proposal reaches the page"),
          ("path.resolve().is_relative_to(inside)", "True", "links out of the folder are offered"),
          ("raw in other.items()],", "raw in ()],", "what is not ours is lost"),
          ('table.get(file) or', "", "captions of metadata.csv are lost")),
    *_all("nanocpo/utils/grid.py",
          ("enumerate(texts[i])", "enumerate(texts[i - 1])", "labels stand under other pictures"),
          ("(6, 6 + row * step_h)", "(6, 6 + (rows - 1 - row) * step_h)",
           "titles stand above other rows")),
    *_all("nanocpo/study/plots.py",
          ('sheet.text(left - 8, y + 9, name, 13, "rm")',
           'sheet.text(left - 8, y + 9, list(rows)[-1 - i], 13, "rm")',
           "bars have each other's names"),
          ('sheet.text(right + 36, y, name, 12, "lm")',
           'sheet.text(right + 36, y, list(series)[-1 - i], 12, "lm")',
           "lines have each other's names")),
]


def check():
    """Every mutant's old text must occur exactly once, and the mutated file must still be Python: a
    syntax error is caught by any test. Returns the list of complaints."""
    complaints = []
    for m in MUTANTS:
        text = (ROOT / m.file).read_text(encoding="utf-8")
        if text.count(m.old) != 1:
            complaints.append(f"{m.file}: '{m.old}' occurs {text.count(m.old)} times ({m.why})")
        elif m.file.endswith(".py"):
            try:
                ast.parse(text.replace(m.old, m.new))
            except SyntaxError as error:
                complaints.append(f"{m.file}: '{m.new}' is no Python here: {error} ({m.why})")
    return complaints


def _python_files():
    patterns = ("*.py", "nanocpo/**/*", "tests/*.py", "tests/pages/*.txt", "benchmarks/*.py",
                "exercises/**/*", "docs/**/*.md", "docs/*.html", "docs/report.png", "*.toml",
                "*.txt", "README.md")
    return sorted(p for pattern in patterns for p in ROOT.glob(pattern)
                  if p.is_file() and p.suffix != ".pyc")


def copy_files(root, files, folder):
    """Files of the project to the same places in a folder."""
    for path in files:
        copy = folder / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)


def _state():
    """A digest of all files that decide whether a mutant is caught."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in _python_files())).hexdigest()


def _tests():
    """All files of tests but this one's, which would fail on each mutant."""
    return sorted(f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")
                  if path.name != "test_mutants.py")


def _own_test(file):
    """The file of tests that knows a file best."""
    name = file.removeprefix("nanocpo/").removesuffix(".py")
    if name.startswith("exercises/"):
        name = "exercises"
    return f"tests/test_{TESTS.get(name, name)}.py"


def _pytest(folder, files, timeout=1800, told=False):
    """Whether the tests pass in this copy; a run that hangs has noticed something too. told: print
    what pytest says."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    try:
        return subprocess.run(command, cwd=folder, env=environment, capture_output=not told,
                              timeout=timeout).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def survives(mutant):
    """Apply the mutant (None: no change) to a copy and run the tests: its own file's first, then
    all others."""
    with tempfile.TemporaryDirectory() as folder:
        copy_files(ROOT, _python_files(), Path(folder))
        tests = _tests()
        if mutant is None:                  # nothing else runs yet
            return _pytest(folder, ["-n", "2", *tests], told=True)
        path = Path(folder) / mutant.file
        path.write_text(path.read_text(encoding="utf-8").replace(mutant.old, mutant.new),
                        encoding="utf-8")
        own = [test for test in tests if test == _own_test(mutant.file)]
        return _pytest(folder, own) and _pytest(folder, [test for test in tests if test not in own])


def at_random(args):
    """The survivors of a random sample; what is known of this state of the files is kept in a
    folder beside --results."""
    from random_mutants import campaign         # exercises/ read the list above without it
    folder = Path(args.results).resolve().parent / f"random_{_state()[:12]}"
    tests = [test for test in _tests() if test != "tests/test_random_mutants.py"]   # of this alone
    return campaign(ROOT, _python_files(), tests, _own_test, args.random, args.seed, args.jobs,
                    args.only, folder, lambda text: print(text, flush=True))


def main(argv=None):
    """Run the mutants; exit status 1 if one survives."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--every", type=int, default=1, help="take every n-th mutant")
    parser.add_argument("--only", default="",
                        help="take the mutants whose file's name contains this")
    parser.add_argument("--results", default="out/mutants.json",
                        help="what is known so far; forgotten when any file changes")
    parser.add_argument("--random", type=int, default=0,
                        help="plant this many that a machine made instead")
    parser.add_argument("--seed", type=int, default=0, help="which ones of --random")
    args = parser.parse_args(argv)
    if args.random:
        return 1 if at_random(args) else 0
    if check():
        raise SystemExit("mend these mutants first:\n" + "\n".join(check()))
    state = _state()
    results, known = Path(args.results), {}
    if results.exists() and (content := json.loads(results.read_text())).get("state") == state:
        known = content["survived"]
    if "none" not in known:
        if not survives(None):
            raise SystemExit("the tests fail in a copy without any mutant; mend that first")
        known["none"] = True
    todo = [m for m in MUTANTS if args.only in m.file][::args.every]
    results.parent.mkdir(parents=True, exist_ok=True)

    def run(mutant):
        key = repr(astuple(mutant))
        if key not in known:
            known[key] = survives(mutant)
            temporary = results.with_suffix(".tmp")
            temporary.write_text(json.dumps({"state": state, "survived": dict(known)}, indent=1))
            os.replace(temporary, results)
            print("SURVIVED" if known[key] else "caught  ", mutant.file, "|", mutant.why,
                  flush=True)
        return known[key]

    with ThreadPoolExecutor(args.jobs) as pool:
        survivors = [mutant for mutant, alive in zip(todo, pool.map(run, todo)) if alive]
    print(f"{len(todo) - len(survivors)} of {len(todo)} mutants caught")
    for mutant in survivors:
        print(f"survived: {mutant.file}: {mutant.why}\n  {mutant.old}\n  {mutant.new}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
