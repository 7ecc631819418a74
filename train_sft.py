"""Stage 1: supervised fine-tuning (SFT) gives the auxiliary model the expert's knowledge.

    python train_sft.py                      # trains what is missing: out/base.pt, out/auxiliary.pt
    python train_sft.py --data paintings     # the same from a folder with metadata.jsonl
    python train_sft.py --weights sd15 --data paintings --out out_sd    # on Stable Diffusion

The *base* model is trained on plain captions; it stands for the public model that the paper starts
from. The *auxiliary* model starts as a copy of it and sees prompts that also list an image's
positive and negative attributes (2601.04300, stage 1). About ten minutes on two CPU cores.

One batch is nanocpo/method.py's sft_step, the loop is nanocpo/train.py's fit.
"""
from nanocpo.run.flags import parse_training
from nanocpo.run.stages import stage_1
from nanocpo.sd.world import StableDiffusion
from nanocpo.toy.world import Toy
from nanocpo.utils.cli import command


def main(argv=None):
    """Parse the flags, train what is missing; returns (base, auxiliary)."""
    settings = parse_training(__doc__, argv, ("common", "sft"))
    world = StableDiffusion(settings) if settings.weights.weights else Toy(settings)
    return stage_1(world)


if __name__ == "__main__":
    command(main, several=True)
