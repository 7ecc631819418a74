"""The auxiliary's verdicts: by hand on a model whose answers are known, and how they are cut."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from toy_tiny import CRITERIA, DATA

from nanocpo.data import Batch, to_tensor
from nanocpo.diffusion import Diffusion
from nanocpo.folder import expert
from nanocpo.folder.expert import agreement, calibrate, in_context, log_ratios
from nanocpo.model import SpaceToDepth

KNOWN = DATA.take(range(6))


class Knows:
    """A model that predicts the picture of the sign that its prompt names: under "good" the true
    goal times `pull`, under "bad" minus that; another leaf than `leaf` it ignores."""
    criteria, latents, device = CRITERIA, SpaceToDepth(2), torch.device("cpu")
    diffusion = Diffusion("straight", "flow")

    @property
    def text(self):
        return self

    def tokens(self, prompts):
        """It reads the prompts themselves; how often is counted."""
        self.encoded = getattr(self, "encoded", 0) + len(prompts)
        return prompts

    def __init__(self, leaf, data):
        self.leaf, self.seen = leaf, []
        self.x0 = self.latents.encode(data.batch(range(len(data))).images)
        self.truth = torch.from_numpy(data.annotations[:, leaf]).view(-1, 1, 1, 1)

    def __call__(self, xt, t, prompts):
        leaf = CRITERIA.leaves[self.leaf]
        side = torch.tensor([(leaf.positive in p.positive) - (leaf.negative in p.negative)
                             for p in prompts]).view(-1, 1, 1, 1)
        self.seen.append((int(t[0]), prompts))
        sigma = (t.view(-1, 1, 1, 1) + 1) / 1000
        goal = (xt - torch.cat([self.x0, self.x0])) / sigma
        return goal * (1 + 0.1 * side * torch.cat([self.truth, self.truth]))


def test_log_ratio_by_hand():
    """|goal - z_bad|^2 - |goal - z_good|^2, the mean over draws: here 0, for both are as far from
    the goal; shifted by 0.1 of the goal towards one side it is that side's."""
    model = Knows(3, KNOWN)
    scores = log_ratios(model, KNOWN, draws=2, size=6)
    assert np.abs(scores).max() < 1e-2 and scores.shape == (6, len(CRITERIA))
    # one call for both prompts of one leaf; evenly spread timesteps
    assert [t for t, _ in model.seen] == [250] * len(CRITERIA) + [750] * len(CRITERIA)
    for i, (_, prompts) in enumerate(model.seen[:len(CRITERIA)]):
        assert [p.positive for p in prompts[:6]] == [(CRITERIA.leaves[i].positive,)] * 6
        assert [p.negative for p in prompts[6:]] == [(CRITERIA.leaves[i].negative,)] * 6
        assert [p.caption for p in prompts] == KNOWN.captions * 2
    assert model.encoded == 2 * 6 * len(CRITERIA)           # once, not at each draw
    shifted = type("Shifted", (Knows,), {"__call__": lambda self, xt, t, prompts: (
        Knows.__call__(self, xt, t, prompts) * 1.1)})(3, KNOWN)
    scores, others = log_ratios(shifted, KNOWN, draws=2, size=6), [0, 1, 2]
    judged = KNOWN.annotations[:, 3] != 0
    # under its own side the prediction is 1.21 times the goal, under the other 0.99 times
    assert (np.sign(scores[judged, 3]) == -KNOWN.annotations[judged, 3]).all()
    assert np.abs(scores[:, others]).max() < 1e-2 < np.abs(scores[judged, 3]).min()


def test_calibration_by_hand():
    """The cut that gets most of both kinds right, each kind weighing the same; 0 without both."""
    scores = np.array([[5.0, 1.0], [6.0, 2.0], [7.0, -3.0], [1.0, 4.0], [2.0, 5.0]])
    annotations = np.array([[1, 1], [1, 1], [1, 1], [-1, 0], [-1, 0]])
    assert calibrate(scores, annotations).tolist() == [3.5, 0.0]
    assert calibrate(scores, -annotations).tolist()[0] == pytest.approx(0.0)
    assert calibrate(np.array([[-1.0], [1.0]]), np.array([[-1], [1]])).tolist() == [0.0]


def test_the_other_leaves_stand_in_both_prompts():
    model = Knows(3, KNOWN)
    log_ratios(model, KNOWN, draws=1, size=6, context=KNOWN.annotations)
    for i, (_, prompts) in enumerate(model.seen):
        for side, some in ((1, prompts[:6]), (-1, prompts[6:])):
            states = KNOWN.annotations.copy()
            states[:, i] = side
            assert some == [CRITERIA.prompt(c, a) for c, a in zip(KNOWN.captions, states)]


def test_pictures_of_several_shapes_keep_their_places(monkeypatch):
    """Only pictures of one shape are asked together, and each score is of its own picture: here the
    sum of its squares, by a model that predicts the picture under "good" and 0 under "bad"."""
    images = np.empty(6, object)
    for i, image in enumerate(KNOWN.images):
        images[i] = image[:16] if i % 2 else image
    shown = []

    class Several(type(KNOWN)):
        def batch(self, rows):
            shown.append(rows)
            return Batch([self.captions[i] for i in rows], self.annotations[rows],
                         images=to_tensor(np.stack([self.images[i] for i in rows])))

    class Sure(Knows):
        diffusion = SimpleNamespace(steps=1000, goal=lambda x0, t, noise: x0)

        def __call__(self, xt, t, prompts):
            return xt * torch.tensor([bool(p.positive) for p in prompts]).view(-1, 1, 1, 1)
    monkeypatch.setattr(expert, "add_noise",
                        lambda model, batch, t, generator: [batch.images] * 2 + [None])
    data = Several(CRITERIA, images, KNOWN.captions, KNOWN.annotations)
    got = log_ratios(Sure(3, KNOWN), data, draws=2, size=2)
    assert shown == [[0, 2], [4], [1, 3], [5]]
    want = [float(to_tensor(image[None]).square().sum()) for image in images]
    np.testing.assert_allclose(got, np.array(want)[:, None].repeat(len(CRITERIA), 1), rtol=1e-5)


def test_rounds_by_hand(monkeypatch):
    """The first round only serves the others, whose mean counts; each has its own noise, and what
    was found of the other leaves so far. What is known stays."""
    rounds = [np.array([[-1.0, 1.0]]), np.array([[4.0, -2.0]]), np.array([[-6.0, -4.0]]),
              np.array([[1.0, 12.0]])]
    seen = []
    monkeypatch.setattr(expert, "log_ratios", lambda model, data, draws, seed, size, context: (
        seen.append((draws, seed, None if context is None else context.tolist()))
        or rounds[seed - 7]))
    assert in_context(None, None, 3, 4, seed=7) == pytest.approx(np.array([[-1 / 3, 2]]))
    assert seen == [(3, 7, None), (3, 8, [[-1, 1]]), (3, 9, [[1, -1]]), (3, 10, [[-1, -1]])]
    assert in_context(None, None, 3, 1, seed=7).tolist() == [[-1, 1]]
    assert in_context(None, None, 3, 2, seed=7).tolist() == [[4, -2]]
    seen.clear()
    in_context(None, None, 3, 2, seed=7, known=np.array([[0, -1]], np.int8))
    assert seen == [(3, 7, [[0, -1]]), (3, 8, [[-1, -1]])]


def test_agreement_by_hand():
    """A picture's own verdict does not move the cut that it is judged by."""
    scores = np.array([[1.0, 2.0], [2.2, -1.0], [3.0, 5.0], [4.0, 1.0]])
    annotations = np.array([[-1, 1], [-1, 1], [1, 0], [1, 1]])
    # with all four the cut is 2.6 and all are right; without 2.2 it is 2.0, without 3.0 it is 3.1
    assert calibrate(scores, annotations).tolist() == [2.6, 0]
    two = CRITERIA.select("Horizon")
    one, other = (leaf.name for leaf in two.leaves)
    assert agreement(scores, annotations, two) == {"verdicts": 7, "share": 4 / 7,
                                                   "leaves": {one: 2 / 4, other: 2 / 3}}
    nothing = agreement(scores, 0 * annotations, two)
    assert nothing == {"verdicts": 0, "share": None, "leaves": {one: None, other: None}}
    assert agreement(scores[:0], annotations[:0], two) == nothing
