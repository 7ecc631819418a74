"""Stage 2: align the target model with Complex Preference Optimization (not Contrastive).

    python train_cpo.py                                 # from nothing to out/target.pt and a report
    python train_cpo.py --criteria "Color Relations" --name colour      # one branch of the tree
    python train_cpo.py --weights sd15 --data paintings --out out_sd    # on Stable Diffusion

What is missing before it (base, auxiliary) is trained first, as train_sft.py does; what is there is
used again. At each step the frozen auxiliary names two targets at the same noised image, one
towards the positive and one towards the negative attributes, and the target model, which sees plain
captions only, learns to prefer the first (2601.04300, stage 2). About a minute on two CPU cores
once base and auxiliary are there; #A_neg, the number of negative attributes in a picture, falls
from about 6.7 of 12 to a tenth of one. --quick tells the same story in three minutes.

One batch is nanocpo/method.py's cpo_step, its loss nanocpo/losses.py's cpo_loss.
"""
import time

from nanocpo.run.flags import parse_training
from nanocpo.run.stages import stage_1, stage_2
from nanocpo.sd.world import StableDiffusion
from nanocpo.toy.world import Toy
from nanocpo.utils.cli import command


def main(argv=None):
    """Parse the flags, train what is missing, align, report; returns the report (or the last log
    line, where there is none)."""
    settings = parse_training(__doc__, argv, ("common", "sft", "cpo", "report"))
    start = time.time()
    world = StableDiffusion(settings) if settings.weights.weights else Toy(settings)
    world.data.criteria.columns(settings.cpo.criteria)      # a wrong name is said before training
    base, auxiliary = stage_1(world)
    target, line = stage_2(world, base, auxiliary)
    if settings.report.samples == 0:
        return line
    return world.report(base, auxiliary, target, time.time() - start) or line


if __name__ == "__main__":
    command(main, several=True)
