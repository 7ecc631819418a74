"""The auxiliary's verdicts: by hand on a model whose answers are known, and how they are cut."""
import numpy as np
import pytest
import torch

from toy_tiny import CRITERIA, DATA

from nanocpo.diffusion import Diffusion
from nanocpo.folder.expert import calibrate, log_ratios
from nanocpo.model import SpaceToDepth

KNOWN = DATA.take(range(6))


class Knows:
    """A model that predicts the picture of the sign that its prompt names: under "good" the true
    goal times `pull`, under "bad" minus that; another leaf than `leaf` it ignores."""
    criteria, latents, device = CRITERIA, SpaceToDepth(2), torch.device("cpu")
    diffusion = Diffusion("straight", "flow")

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
