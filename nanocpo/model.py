"""One model: latents, prompt encoder, UNet and diffusion together, and its file. Base, auxiliary and target are all this class."""
import copy
import hashlib
import os
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from einops import rearrange
from torch import nn

from .criteria import Criteria
from .diffusion import Diffusion, guide
from .text import TextEncoder
from .unet import UNet, UNetConfig


class SpaceToDepth:
    """The toy's latents: opponent colours, and blocks of pixels as channels. The two methods are those of a VAE (ours).

    Of the three opponent channels the two that carry hue vary about a third as much as lightness. Scaled up somewhat they are not the
    last thing to emerge from the noise (trained on RGB, the model mixes hues up); scaled to the same spread they crowd out the subject."""
    OPPONENT = torch.tensor([[1, 1, 1], [1, 0, -1], [-1, 2, -1]]) / torch.tensor([3, 2, 6]).sqrt()[:, None]      # orthonormal
    SCALE, MEAN = torch.tensor([1.5, 2.4, 2.4]), -0.4                     # of the painter's pictures, rounded

    def __init__(self, block):
        self.block = block
        self.mix = self.SCALE[:, None] * self.OPPONENT                    # (3, 3): colours in, channels out

    def encode(self, images):
        """(B, 3, H, W) in [-1, 1] -> (B, 3 * block^2, H / block, W / block)."""
        colours = torch.einsum("dc,bchw->bdhw", self.mix.to(images), images - self.MEAN)
        return rearrange(colours, "b c (h p) (w q) -> b (c p q) h w", p=self.block, q=self.block)

    def decode(self, latents):
        """The inverse of encode."""
        colours = rearrange(latents, "b (c p q) h w -> b c (h p) (w q)", p=self.block, q=self.block)
        return torch.einsum("cd,bdhw->bchw", torch.linalg.inv(self.mix).to(latents), colours) + self.MEAN

    def clip(self, latents):
        """The nearest latents of a picture whose values lie in [-1, 1]."""
        return self.encode(self.decode(latents).clamp(-1, 1))


class Model(nn.Module):
    """Predicts eps or v for noised latents under a prompt: `model(xt, t, prompts)`."""

    def __init__(self, criteria, captions, unet=None, text_dim=64, block=2, size=32, schedule="cosine", prediction="v"):
        super().__init__()
        unet = unet or UNetConfig()
        self.criteria, self.captions = criteria, list(dict.fromkeys(captions))
        self.config = dict(captions=self.captions, unet=asdict(unet), text_dim=text_dim, block=block, size=size,
                           schedule=schedule, prediction=prediction)
        self.latents, self.diffusion = SpaceToDepth(block), Diffusion(schedule, prediction)
        self.text, self.unet = TextEncoder(criteria, captions, text_dim), UNet(unet)

    @property
    def device(self):
        return self.unet.conv_in.weight.device

    def forward(self, xt, t, prompts):
        """xt (B, C, H, W), t (B,), prompts: B Prompts or their tokens (B, 1 + leaves) -> (B, C, H, W)."""
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
        return torch.stack([torch.randn(self.latent_shape, generator=generator) for _ in range(count)])

    @torch.no_grad()
    def sample(self, prompts, negative=None, guidance=1.0, steps=12, eta=0.0, seed=0, batch=128):
        """prompts: N Prompts; negative: N Prompts to guide away from (with guidance != 1) -> images (N, 3, size, size) in [-1, 1].

        The first noise of picture i depends on seed and i only: two models with the same seed start from the same noise."""
        was_training, out = self.training, []
        self.eval()
        generator = torch.Generator().manual_seed(seed)
        noise, away = self.first_noise(len(prompts), generator), negative if guidance != 1 else None
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            tokens = self.text.tokens([*prompts[part], *away[part]] if away else prompts[part])

            def predict(xt, t):
                if not away:
                    return self(xt, t, tokens)
                return guide(*self(torch.cat([xt, xt]), torch.cat([t, t]), tokens).chunk(2), guidance)
            xt = noise[part].to(self.device)
            latents = self.diffusion.sample(predict, xt, steps, eta, generator, self.latents.clip)
            out.append(self.latents.decode(latents))
        self.train(was_training)
        return torch.cat(out)


@contextmanager
def whole_file(path):
    """Gives the name of a temporary file beside `path` to write, and renames it when the block ends well: never half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_atomic(path, content):
    """torch.save, whole or not at all: a killed run never leaves half a checkpoint."""
    with whole_file(path) as temporary:
        torch.save(content, temporary)


def fingerprint(*modules):
    """A digest of all weights and their type: when it is the same, so is what the models make."""
    digest = hashlib.sha256()
    for module in modules:
        for name, p in module.state_dict().items():
            digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
            digest.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_checkpoint(path):
    """Read a checkpoint's dict to the CPU. Raises ValueError or OSError that names the file and what to do."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["config"], content["criteria"], content["ema"]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such checkpoint; train_cpo.py makes one") from error
    except OSError:                                                       # not the file's fault
        raise
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint of nanocpo, or damaged ({type(error).__name__}); "
                         "delete it and train again") from error
    return content


def load_model(path, device="cpu"):
    """The model (averaged weights) in a checkpoint file, frozen."""
    content = load_checkpoint(path)
    config = content["config"]
    if config.get("kind") == "lora":
        raise ValueError(f"{path}: an adapter of Stable Diffusion that can be trained on, no model of its own. To paint: sample.py --weights "
                         f"BASE --lora {Path(path).with_suffix('.safetensors')}; to train the toy: another --out")
    try:
        model = Model(Criteria(content["criteria"]), **config | {"unet": UNetConfig(**config["unet"])})
        model.load_state_dict(content["ema"])
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: its parts do not fit together ({error}); it is of another version") from error
    return model.to(device).frozen_copy()
