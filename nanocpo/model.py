"""One model: latents, prompt encoder, UNet and diffusion together. Base, auxiliary and target are
all of this class."""
import copy
from dataclasses import asdict
from pathlib import Path

import torch
from einops import rearrange
from torch import nn

from .criteria import Criteria
from .diffusion import Diffusion, guide
from .unet import UNet, UNetConfig
from .utils.checkpoint import fingerprint, fitting, is_finished, load_checkpoint
from .utils.device import send


class SpaceToDepth:
    """The toy's latents: opponent colours, and blocks of pixels as channels (ours). The methods
    are those of a VAE.

    Of the three opponent channels the two that carry hue vary about a third as much as lightness.
    Scaled up somewhat they are not the last thing to emerge from the noise (trained on RGB, the
    model mixes hues up); scaled to the same spread they crowd out the subject."""
    OPPONENT = torch.tensor([[1, 1, 1], [1, 0, -1], [-1, 2, -1]])
    OPPONENT = OPPONENT / torch.tensor([3, 2, 6]).sqrt()[:, None]         # orthonormal
    SCALE, MEAN = torch.tensor([1.5, 2.4, 2.4]), -0.4    # of the painter's pictures, rounded

    def __init__(self, block):
        self.block = block
        self.mix = self.SCALE[:, None] * self.OPPONENT   # (3, 3): colours in, channels out

    def encode(self, images):
        """(B, 3, H, W) in [-1, 1] -> (B, 3 * block^2, H / block, W / block)."""
        colours = torch.einsum("dc,bchw->bdhw", self.mix.to(images), images - self.MEAN)
        return rearrange(colours, "b c (h p) (w q) -> b (c p q) h w", p=self.block, q=self.block)

    def decode(self, latents):
        """The inverse of encode."""
        colours = rearrange(latents, "b (c p q) h w -> b c (h p) (w q)", p=self.block, q=self.block)
        unmix = torch.linalg.inv(self.mix).to(latents)
        return torch.einsum("cd,bdhw->bchw", unmix, colours) + self.MEAN

    def clip(self, latents):
        """The nearest latents of a picture whose values lie in [-1, 1]."""
        return self.encode(self.decode(latents).clamp(-1, 1))


class PromptEncoder(nn.Module):
    """The toy's prompt encoder: a token for the caption and one for every leaf of the tree (ours).

    A leaf's token is the sum of the embeddings of all nodes on its path, each in the leaf's state
    (not mentioned, positive, negative), so "positive" is partly learned once for a whole branch.
    Every prompt has the same number of tokens: nothing is padded or masked. The empty caption ""
    is always known: it is the unconditional prompt."""

    def __init__(self, criteria, captions, dim):
        super().__init__()
        self.captions = {caption: i for i, caption in enumerate(dict.fromkeys(["", *captions]))}
        self.criteria = criteria
        nodes = [node.path for node in criteria.tree.walk() if node.path]
        on_path = [[leaf.path == path or leaf.path.startswith(path + "/") for path in nodes]
                   for leaf in criteria.leaves]
        self.register_buffer("on_path", torch.tensor(on_path, dtype=torch.float32),
                             persistent=False)                            # (leaves, nodes)
        self.caption = nn.Embedding(len(self.captions), dim)
        self.node = nn.Parameter(torch.randn(3, len(nodes), dim) * 0.5)   # (states, nodes, dim)
        self.norm = nn.LayerNorm(dim)

    def tokens(self, prompts):
        """list of B Prompts -> int64 (B, 1 + leaves): the caption's number, then each leaf's
        state 0, 1, 2 (negative). Raises ValueError on a caption, CriteriaError on a phrase, that
        the model was not built for.

        The detour, from an annotation to phrases (Criteria.prompt) and here back to numbers, is
        on purpose: a Prompt of words is what every model is asked with, and Stable Diffusion
        reads nothing else."""
        rows = []
        for prompt in prompts:
            if prompt.caption not in self.captions:
                raise ValueError(f"unknown caption '{prompt.caption}'; this model knows: "
                                 + ", ".join(filter(None, self.captions)))
            states = self.criteria.annotation(prompt.positive, prompt.negative)
            # a negative state, -1, is row 2 of the embeddings
            rows.append([self.captions[prompt.caption], *(states % 3).tolist()])
        return send(torch.tensor(rows), self.on_path.device)

    def forward(self, tokens):
        """tokens (B, 1 + leaves) -> context (B, 1 + leaves, dim), pooled (B, dim)."""
        table = torch.einsum("ln,snd->sld", self.on_path, self.node)      # (3, leaves, dim)
        leaves = table[tokens[:, 1:], torch.arange(len(self.on_path), device=tokens.device)]
        tokens = torch.cat([self.caption(tokens[:, :1]), leaves], dim=1)  # (B, 1 + leaves, dim)
        pooled = tokens[:, 0] + leaves.sum(1) / leaves.shape[1] ** 0.5    # caption and tree alike
        return self.norm(tokens), pooled


class Model(nn.Module):
    """Predicts eps or v for noised latents under a prompt: `model(xt, t, prompts)`."""

    def __init__(self, criteria, captions, unet=None, text_dim=64, block=2, size=32,
                 schedule="straight", prediction="flow"):
        super().__init__()
        unet = unet or UNetConfig()
        self.criteria, self.captions = criteria, list(dict.fromkeys(captions))
        self.config = dict(captions=self.captions, unet=asdict(unet), text_dim=text_dim,
                           block=block, size=size, schedule=schedule, prediction=prediction)
        self.latents, self.diffusion = SpaceToDepth(block), Diffusion(schedule, prediction)
        self.text, self.unet = PromptEncoder(criteria, captions, text_dim), UNet(unet)

    @property
    def device(self):
        return self.unet.conv_in.weight.device

    def forward(self, xt, t, prompts):
        """xt (B, C, H, W), t (B,), prompts: B Prompts or their tokens -> (B, C, H, W)."""
        tokens = prompts if torch.is_tensor(prompts) else self.text.tokens(prompts)
        context, pooled = self.text(tokens)
        return self.unet(xt, t, context, pooled)

    def frozen_copy(self):
        """A copy that nothing trains: evaluation mode, no gradients."""
        return copy.deepcopy(self).eval().requires_grad_(False)

    @property
    def latent_shape(self):
        """(C, h, w) of one picture's latents."""
        edge = self.config["size"] // self.config["block"]
        return self.unet.config.in_channels, edge, edge

    def first_noise(self, count, generator):
        """Noise (count, C, h, w) from the CPU, one picture after the other."""
        return torch.stack([torch.randn(self.latent_shape, generator=generator)
                            for _ in range(count)])

    @torch.no_grad()
    def sample(self, prompts, negative=None, guidance=1.0, steps=12, eta=0.0, seed=0, batch=128,
               axes=()):
        """prompts: N Prompts; negative: N Prompts to guide away from (with guidance != 1) ->
        images (N, 3, size, size) in [-1, 1]. axes: (scale, N Prompts, N Prompts) each; scale times
        the difference of their predictions is added, a knob for each branch of the tree
        (2512.10237).

        The first noise of picture i depends on seed and i only: two models with the same seed
        start from the same noise."""
        was_training, out = self.training, []
        self.eval()
        generator = torch.Generator().manual_seed(seed)
        noise = self.first_noise(len(prompts), generator)
        away = [negative] if negative and guidance != 1 else []
        asked = [prompts, *away, *(side for _, *sides in axes for side in sides)]
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            tokens = self.text.tokens([prompt for side in asked for prompt in side[part]])

            def predict(xt, t):
                # all questions in one call
                n = len(asked)
                first, *rest = self(torch.cat([xt] * n), torch.cat([t] * n), tokens).chunk(n)
                if away:
                    first = guide(first, rest.pop(0), guidance)
                return first + sum(scale * (good - bad) for (scale, *_), good, bad
                                   in zip(axes, rest[::2], rest[1::2]))
            xt = send(noise[part], self.device)
            latents = self.diffusion.sample(predict, xt, steps, eta, generator, self.latents.clip)
            out.append(self.latents.decode(latents))
        self.train(was_training)
        return torch.cat(out)

    def digest(self):
        """A hash of the weights: when it is the same, so is what the model makes."""
        return fingerprint(self)

    def content(self):
        """What of it a checkpoint keeps beside weights, to build it again."""
        return {"config": self.config, "criteria": self.criteria.to_dict()}


def load_model(path, device="cpu", content=None):
    """The model (averaged weights) in a checkpoint file, frozen. content: what load_checkpoint
    gave, if the file was read already. Raises ValueError that names the file and what to do."""
    content = content or load_checkpoint(path)
    config = content["config"]
    if not is_finished(content):
        print(f"{path} is not finished: step {content['step']} of {content['steps']}")
    if config.get("kind") == "lora":
        raise ValueError(
            f"{path}: an adapter of Stable Diffusion that can be trained on, no model of its own. "
            f"To paint: sample.py --weights BASE --lora {Path(path).with_suffix('.safetensors')}; "
            "to train the toy: another --out")
    with fitting(path):
        unet = UNetConfig(**config["unet"])
        if min(*unet.channels, *unet.heads, unet.layers, unet.groups) < 1:
            raise ValueError("a size below 1")
        model = Model(Criteria(content["criteria"]), **config | {"unet": unet})
        model.load_state_dict(content["ema"])
    return model.to(device).frozen_copy()
