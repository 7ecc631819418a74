"""docs/explore.html: its script's numbers are those of the analytic world and of the loss."""
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from nanocpo.diffusion import cosine_alpha_bar
from nanocpo.losses import cpo_loss
from nanocpo.study.mixture import NEGATIVE, PLAIN, POSITIVE, flawed_world

PAGE = Path(__file__).resolve().parent.parent / "docs" / "explore.html"
TEXT = PAGE.read_text(encoding="utf-8")
RULES = {"none": 1.0, "winner": 0.0, "constant": 0.3, "safeguard": 0.4, "balance": 0.9,
         "clamped": 1.0, "noisy": 0.8}


def test_the_page_is_one_small_file_that_loads_nothing():
    assert len(TEXT.splitlines()) <= 250
    assert not re.search(r"(src|href)=|https?://|import |fetch\(", TEXT)


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_the_script_computes_what_the_study_computes(tmp_path):
    torch.manual_seed(0)
    points = [[*(2 * torch.randn(4, dtype=torch.float64)).tolist(), int(torch.randint(1000, ())),
               0.1 + float(torch.rand(())), list(RULES)[i % 7]] for i in range(100)]
    script = re.search(r"<script>(.*?)</script>", TEXT, re.S)[1] + f"""
    const rows = {json.dumps(points)}, strengths = {json.dumps(RULES)};
    console.log(JSON.stringify(rows.map(([a, b, c, d, t, beta, rule]) => {{
      const z = [PLAIN, POSITIVE, NEGATIVE].map(p => eps([a, b], ALPHA_BAR[t], p));
      const k = strengths[rule];
      return [ALPHA_BAR[t], z, look([c, d], ...z, beta, rule, k), limit(...z, rule, k)];
    }})));"""
    (tmp_path / "page.js").write_text(script, encoding="utf-8")
    done = subprocess.run(["node", "page.js"], cwd=tmp_path, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    world, schedule = flawed_world(), cosine_alpha_bar()
    near = dict(rtol=1e-9, atol=1e-9)
    for (a, b, c, d, t, beta, rule), (level, z, seen, end) in zip(points, json.loads(done.stdout)):
        torch.testing.assert_close(schedule[t], torch.tensor(level, dtype=torch.float64), **near)
        xt, out = (torch.tensor(v, dtype=torch.float64).view(1, 2, 1, 1)
                   for v in ([a, b], [c, d]))
        exact = [world.eps(xt, schedule[t], p) for p in (PLAIN, POSITIVE, NEGATIVE)]
        torch.testing.assert_close(torch.cat(exact).flatten(1),
                                   torch.tensor(z, dtype=torch.float64), **near)
        loss, logs = cpo_loss(out.requires_grad_(), *exact, beta, rule, RULES[rule])
        gradient, = torch.autograd.grad(loss, out)
        ours = [loss.item(), *(logs[name].item() for name in ("margin", "gap", "lam")),
                *gradient.flatten().tolist()]
        theirs = [seen["loss"], seen["margin"], seen["gap"], seen["lam"], *seen["gradient"]]
        assert theirs == pytest.approx(ours, rel=1e-9, abs=1e-9)
        if rule == "noisy":
            expected = exact[0] + 0.8 * (exact[1] - exact[2])
            assert end == pytest.approx(expected.flatten().tolist(), rel=1e-9)
        if rule == "constant":
            expected = exact[1] + 0.3 / 0.7 * (exact[1] - exact[2])
            assert end == pytest.approx(expected.flatten().tolist(), rel=1e-9)
