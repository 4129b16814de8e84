"""Train the embedded model's UNet: `python -m training.denoiser RUN_FOLDER`.

v-prediction (Salimans & Ho 2022) on the autoencoder's latents against the frozen text encoder; timesteps half
uniform, half logit-normal around the middle (Esser et al. 2024), where shapes are decided; 10 % of captions dropped
for classifier-free guidance; Muon on matrices and filters, AdamW on the rest; an exponential moving average of the
weights is what is kept. Checkpoints every 200 steps; started again it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextModel

from diffray.model.config import UNetConfig
from diffray.model.networks.unet import UNet
from diffray.model.networks.vae import Autoencoder

from . import captions
from .autoencoder import CONFIG as VAE_CONFIG
from .autoencoder import rate
from .captions import WIDTH
from .muon import Muon, orthogonal
from .scenes import draw

BETA_START, BETA_END, TRAIN_STEPS = 0.00085, 0.02, 1000
MUON_RATE, ADAM_RATE = 4e-3, 2e-3
EMA_DECAY = 0.998
UNET = UNetConfig(
    in_channels=4, out_channels=4, channels=(32, 96, 128), down=((0,), (1,), (1,)), mid_resnets=2, mid_depth=1,
    up=((0, 0), (1, 1), (1, 1)), heads=(4, 4, 4), context_dim=WIDTH, linear_projection=True,
    cross_attention_only=(False, False, False), added_dim=None, added_kind=None, class_count=None,
    guidance_dim=None, norm_groups=16,
)  # fmt: skip


def alpha_bar() -> Tensor:
    """Cumulative signal share [1000] of the scaled-linear schedule; beta_end is higher than SD's because small
    latents average less noise away, and would otherwise betray the picture's mean at the last timestep."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


@torch.no_grad()
def dataset(folder: Path) -> tuple[Tensor, Tensor]:
    """Scaled latents [SCENES, 4, 16, 16] and caption ids [SCENES, POSITIONS]; cached, with the scale factor."""
    cache = folder / "dataset.pt"
    if cache.exists():
        saved = torch.load(cache, weights_only=True)
        return saved["latents"], saved["ids"]
    vae = Autoencoder(VAE_CONFIG).eval()
    vae.load_state_dict(torch.load(folder / "vae.pt", weights_only=True)["model"])
    scenes = captions.scenes()
    ids = captions.tokens(captions.tokenizer(folder), [scene.caption for scene in scenes])
    latents = []
    for start in range(0, len(scenes), 100):
        images = np.stack([np.asarray(draw(scene)) for scene in scenes[start : start + 100]])
        latents.append(vae.moments(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)[0])
    z = torch.cat(latents)
    scale = round(1 / z.std().item(), 5)
    torch.save({"latents": z * scale, "ids": ids, "scale": scale}, cache)
    return z * scale, ids


def frozen_text(folder: Path) -> CLIPTextModel:
    """The run's text encoder as `training.captions` left it."""
    text = CLIPTextModel(captions.config(len(captions.tokenizer(folder)))).eval().requires_grad_(False)
    text.load_state_dict(torch.load(folder / "text.pt", weights_only=True)["model"])
    return text


def timesteps(count: int, random: torch.Generator) -> Tensor:
    """Training timesteps [count] in 0..999."""
    middle = torch.sigmoid(0.3 + torch.randn(count, generator=random))
    even = torch.rand(count, generator=random)
    chosen = torch.where(torch.rand(count, generator=random) < 0.5, middle, even)
    return (chosen * TRAIN_STEPS).long().clamp_(max=TRAIN_STEPS - 1)


def train(folder: Path, steps: int, batch: int) -> None:
    text = frozen_text(folder)
    latents, ids = dataset(folder)
    blank = captions.tokens(captions.tokenizer(folder), [""])
    torch.manual_seed(0)
    model = UNet(UNET).to(memory_format=torch.channels_last)
    average = copy.deepcopy(model)
    optimizers = [
        Muon([p for n, p in model.named_parameters() if orthogonal(n, p)], MUON_RATE),
        torch.optim.AdamW(
            [p for n, p in model.named_parameters() if not orthogonal(n, p)], lr=ADAM_RATE, betas=(0.9, 0.99)
        ),
    ]
    state, first = folder / "denoiser.pt", 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        for optimizer, old in zip(optimizers, saved.get("optimizers", ()), strict=False):
            optimizer.load_state_dict(old)
        first = saved["step"]
    signal = alpha_bar().sqrt()[:, None, None, None]
    noise_share = (1 - alpha_bar()).sqrt()[:, None, None, None]
    started, running = time.time(), 0.0
    for step in range(first, steps):
        for optimizer, peak in zip(optimizers, (MUON_RATE, ADAM_RATE), strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate(step, steps)
        random = torch.Generator().manual_seed(step)
        pick = torch.randint(len(latents), (batch,), generator=random)
        t = timesteps(batch, random)
        x0, noise = latents[pick], torch.randn(batch, *latents.shape[1:], generator=random)
        caption = torch.where(torch.rand(batch, 1, generator=random) < 0.1, blank, ids[pick])
        with torch.no_grad():
            context = text(input_ids=caption).last_hidden_state
        x = signal[t] * x0 + noise_share[t] * noise
        v = signal[t] * noise - noise_share[t] * x0
        loss = F.mse_loss(model(x, t.float(), context), v)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        running = loss.item() if step == first else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0:
            pace = (time.time() - started) / (step - first + 1)
            print(f"denoiser {step} loss {running:.4f} {pace:.2f} s/step", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            kept = {"model": model.state_dict(), "average": average.state_dict(), "step": step + 1}
            torch.save(
                {**kept, "optimizers": [o.state_dict() for o in optimizers]}, state.with_suffix(".tmp")
            )
            state.with_suffix(".tmp").rename(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.folder, options.steps, options.batch)


if __name__ == "__main__":
    main()
