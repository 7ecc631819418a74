"""Paint with any checkpoint: captions (and attributes) in, a PNG grid out.

    python sample.py --checkpoint out/target.pt --caption "a boat" "a tree" --count 4 --judge
    python sample.py --checkpoint out/auxiliary.pt --positive all --negative all --guidance 2
    python sample.py --checkpoint out/auxiliary.pt --axis "Color Relations=1" "Composition=0.5"
    python sample.py --weights sd15 --lora out_sd/target.safetensors --prompt "a boat on a lake"

A plain model needs the caption only. With --guidance other than 1 the sample is guided from the
negative prompt to the positive one.
"""
from nanocpo.data import to_images
from nanocpo.run.flags import parse_sampling
from nanocpo.sd.world import StableDiffusionPainter
from nanocpo.toy.world import ToyPainter
from nanocpo.utils.cli import command
from nanocpo.utils.grid import save_grid, save_pictures


def main(argv=None):
    """Parse the flags, sample, write the grid; returns the pictures uint8 (N, H, W, 3)."""
    sampling, weights = parse_sampling(__doc__, argv)
    painter = (StableDiffusionPainter(sampling, weights) if weights.weights
               else ToyPainter(sampling))
    captions = [caption for caption in painter.captions for _ in range(sampling.count)]
    prompts, away = painter.prompts(captions)
    images = to_images(painter.model.sample(prompts, away, sampling.guidance, sampling.steps,
                                            sampling.eta, sampling.seed,
                                            axes=painter.axes(captions)))
    save_grid(sampling.out, images, painter.labels(images, captions), zoom=painter.zoom,
              columns=min(len(images), painter.columns))
    if weights.weights:
        notes = [painter.notes(i, *pair)
                 for i, pair in enumerate(zip(prompts, away or [None] * len(prompts)))]
        save_pictures(sampling.out, images, notes)
    print(f"{sampling.out}: {len(images)} pictures")
    return images


if __name__ == "__main__":
    command(main)
