"""The toy as a world (see World in nanocpo/run/stages.py): paintings or a folder of small pictures,
a small model trained from nothing, the critic's report."""
import operator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ..criteria import Criteria
from ..data import to_images
from ..folder.reading import from_folder
from ..model import Model, load_model
from ..run.settings import knobs
from ..utils import ranks
from ..utils.checkpoint import CURE, load_checkpoint, stopped, use_again
from ..utils.device import pick_device
from ..utils.grid import save_grid
from .critic import judge, unmeasured
from .evaluate import all_prompts, knob, unfit
from .paintings import REGIMES, from_painter
from .report import report

# the schedule on which each prediction is learned
SCHEDULE = {"flow": "straight", "v": "cosine", "eps": "cosine"}
KINDS = ("plain", "positive", "negative")   # of prompts, a row of the auxiliary's grids each


class Toy:
    """Raises ValueError (or its DataError, CriteriaError) with the cure where the data that the
    settings name cannot be used."""
    cure = CURE

    def __init__(self, settings, data=None):
        """data: instead of what the settings name, as a study degrades it."""
        self.settings, self.autocast = settings, settings.common.bf16
        self.device = pick_device(settings.common.device)
        self.painted = data is None and settings.common.data in REGIMES
        if data is not None:
            self.data = data

    @cached_property
    def data(self):
        common = self.settings.common
        criteria = Criteria.load(common.tree) if common.tree else None
        if self.painted:
            return from_painter(criteria, common.count, common.data, seed=common.seed)
        return from_folder(common.data, criteria, skip_bad=common.skip_bad)

    def path(self, name):
        return Path(self.settings.common.out) / f"{name}.pt"

    @property
    def prediction(self):
        return self.settings.weights.prediction or "flow"

    def sources(self):
        """Painted data are the same, of any seed and number, if they are flawed or mixed alike."""
        named = self.settings.common.data
        return {"data": named if self.painted else self.data.digest(),
                "prediction": self.prediction}

    def given(self, name):
        if name != "base" or not self.settings.sft.base:
            return None
        path = self.settings.sft.base
        return self._load(path, load_checkpoint(path), "choose another --base")

    def stored(self, name, base):
        path = self.path(name)
        content = load_checkpoint(path) if path.exists() else None
        if content is None or stopped(path, content, self.settings.common.resume):
            return None
        return path, self._load(path, content), content.get("made_of")

    def _load(self, path, content, cure=CURE):
        """The model of a checkpoint, which must know the tree and all captions of the data, and
        predict what is asked for."""
        model = load_model(path, self.device, content)
        use_again(path, {"prediction": model.diffusion.prediction, "tree": content["criteria"],
                         "captions": sorted(model.captions)},
                  {"prediction": self.prediction, "tree": self.data.criteria.to_dict(),
                   "captions": sorted({*model.captions, *self.data.captions})}, cure=cure)
        return model

    def new_base(self):
        torch.manual_seed(self.settings.common.seed)
        return Model(self.data.criteria, sorted(set(self.data.captions)),
                     schedule=SCHEDULE[self.prediction], prediction=self.prediction
                     ).to(self.device)

    def trainable(self, base):
        return base.frozen_copy().requires_grad_(True)

    def publish(self, model, name):
        return model

    def pictures(self, name):
        common, kinds = self.settings.common, KINDS if name == "auxiliary" else KINDS[:1]

        def paint(average, step):
            captions = [average.captions[i % len(average.captions)] for i in range(8)]
            prompts = dict(zip(KINDS, all_prompts(average.criteria, captions)))
            images = np.concatenate([to_images(average.sample(prompts[kind], seed=common.seed))
                                     for kind in kinds])
            save_grid(Path(common.out) / "samples" / f"{name}_{step:05d}.png", images,
                      captions * len(kinds),
                      titles=[f"{name}, step {step}: {kind} prompt" for kind in kinds])
        return paint

    def wants_auxiliary(self):
        return True                         # its rows stand in every report

    def report(self, base, auxiliary, target, seconds):
        reason = unfit(self.data)
        if reason:
            print(f"no report: {reason}; look at OUT/samples and the log instead")
            return None
        settings = self.settings
        if not ranks.first():
            return None
        return report(settings.common.out, settings.cpo.name, base, auxiliary, target,
                      settings.report, settings.common.seed, seconds)


# --- nanocpo/folder/propose.py

class ToyJudge:
    """What folder/propose.py asks of the toy (see Judge in nanocpo/folder/proposals.py). Raises
    ValueError where the auxiliary knows another tree than the folder's, criteria."""

    def __init__(self, how, criteria):
        content = load_checkpoint(how.checkpoint)
        use_again(how.checkpoint, {"tree": content["criteria"]}, {"tree": criteria.to_dict()},
                  cure="name an auxiliary that was trained on this folder, or its --tree")
        self.how, self.criteria = how, criteria
        self.model = load_model(how.checkpoint, how.device, content)
        self.trained_on = content.get("made_of", {}).get("data")

    def pictures(self, rows=None):
        data = from_folder(self.how.data, self.criteria, self.model.config["size"],
                           skip_bad=self.how.skip_bad, rows=rows)
        if rows is None and data.digest() != self.trained_on:
            print(f"{self.how.checkpoint} was not trained on this folder as it is now: of its "
                  "judged pictures it may have seen some, and be right about them too often")
        known = [caption if caption in self.model.captions else "" for caption in data.captions]
        if known != data.captions:
            lost = sum(map(operator.ne, known, data.captions))
            print(f"{lost} of {len(data)} captions are unknown to the auxiliary; it judges these "
                  "pictures without them")
        return replace(data, captions=known)


# --- sample.py

class ToyPainter:
    """What sample.py asks of the toy: a checkpoint, prompts from captions and attributes, labels.
    Raises ValueError where --judge is asked of what the critic cannot measure."""
    zoom = 5

    def __init__(self, sampling):
        self.sampling = sampling
        if sampling.width or sampling.height:
            raise ValueError("--width and --height need --weights: the toy paints one size")
        self.model = load_model(sampling.checkpoint, sampling.device)
        self.captions = sampling.caption or self.model.captions
        self.columns = max(sampling.count, 4)
        missing = unmeasured(self.model.criteria, self.model.captions)
        if sampling.judge and missing:
            raise ValueError(f"--judge: the critic has no measure for {', '.join(missing)}; leave "
                             "it out")

    def prompts(self, captions):
        """captions: N -> (N Prompts, N Prompts to guide away from)."""
        criteria, sampling = self.model.criteria, self.sampling
        good, bad = ([leaf.name for leaf in criteria.leaves] if words == ["all"] else list(words)
                     for words in (sampling.positive, sampling.negative))
        beside = bad if sampling.guidance == 1 else []    # without guidance one prompt has both
        return ([criteria.prompt(c, criteria.annotation(good, beside)) for c in captions],
                [criteria.prompt(c, criteria.annotation((), bad)) for c in captions])

    def axes(self, captions):
        """captions: N -> (scale, N Prompts good in the branch, N Prompts bad in it) for each
        --axis."""
        return [knob(self.model.criteria, captions, name, scale)
                for name, scale in knobs(self.sampling.axis)]

    def labels(self, images, captions):
        """What stands under each picture; with --judge the critic's verdict, and its means are
        printed."""
        if not self.sampling.judge:
            return list(captions)
        criteria, labels = self.model.criteria, []
        verdicts = judge(images, criteria)
        for caption, signs, seen in zip(captions, verdicts.signs, verdicts.captions):
            faults = [leaf.negative for leaf, sign in zip(criteria.leaves, signs) if sign < 0]
            labels.append("\n".join([f"{caption}: seen {seen}",
                                     f"{len(faults)} of {len(criteria)} negative"] + faults))
        right = [a == b for a, b in zip(captions, verdicts.captions)]
        print(f"#A_neg {np.mean((verdicts.signs < 0).sum(1)):.2f} of {len(criteria)}, caption "
              f"{np.mean(right):.2f}")
        return labels
