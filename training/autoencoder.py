"""Train the embedded model's autoencoder: `python -m training.autoencoder RUN_FOLDER`.

64x64 pixels to 16x16x4 latents. Loss: L1 + MSE, objects and their edges counted four times (small stars lose their
points otherwise), + 1e-6 KL; no adversarial part: flat colours need none. Muon on filters, AdamW on the rest.
Checkpoints every 250 steps; started again it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffray.model.config import VAEConfig
from diffray.model.networks.vae import Autoencoder

from .muon import Muon, orthogonal
from .scenes import draw, random_scene

CONFIG = VAEConfig(
    image_channels=3, latent_channels=4, channels=(32, 32, 64), resnets=1, quant_conv=True, scale=1.0, shift=0.0,
    latents_mean=None, latents_std=None, force_upcast=False, norm_groups=8,
)  # fmt: skip
BATCH = 16
MUON_RATE, ADAM_RATE = 3e-3, 1.5e-3
OBJECT_WEIGHT = 4.0


def pictures(rng: np.random.Generator, count: int) -> Tensor:
    """`count` random scenes as [count, 3, 64, 64] in [-1, 1]."""
    images = np.stack([np.asarray(draw(random_scene(rng))) for _ in range(count)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def weights(x: Tensor) -> Tensor:
    """How much each pixel of pictures [N, 3, H, W] counts [N, 1, H, W]: objects and two pixels around them more."""
    differs = (x - x[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.02
    near = F.max_pool2d(differs.float(), 5, 1, 2)
    return 1 + (OBJECT_WEIGHT - 1) * near


def rate(step: int, steps: int, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + float(np.cos(np.pi * min(step / steps, 1.0))))


def train(folder: Path, steps: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = Autoencoder(CONFIG).to(memory_format=torch.channels_last)
    named = list(model.named_parameters())
    optimizers: list[torch.optim.Optimizer] = [
        Muon([p for n, p in named if orthogonal(n, p)], MUON_RATE),
        torch.optim.AdamW([p for n, p in named if not orthogonal(n, p)], lr=ADAM_RATE, betas=(0.9, 0.99)),
    ]
    state = folder / "vae.pt"
    first = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, old in zip(optimizers, saved.get("optimizers", ()), strict=False):
            optimizer.load_state_dict(old)
        first = saved["step"]
    started = time.time()
    for step in range(first, steps):
        for optimizer, peak in zip(optimizers, (MUON_RATE, ADAM_RATE), strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate(step, steps)
        x = pictures(np.random.default_rng(step), BATCH)
        mean, std = model.moments(x)
        y = model.decode(model.scaled(mean + std * torch.randn_like(mean)))
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        error, weight = y - x, weights(x)
        mse = error.square().mean()
        loss = (weight * (error.abs() + error.square())).mean() + 1e-6 * kl
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 50 == 0:
            psnr = 10 * np.log10(4 / mse.item())
            pace = (time.time() - started) / (step - first + 1)
            print(f"vae {step} psnr {psnr:.2f} dB loss {loss.item():.4f} {pace:.2f} s/step", flush=True)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            kept = {"model": model.state_dict(), "step": step + 1}
            torch.save(
                {**kept, "optimizers": [o.state_dict() for o in optimizers]}, state.with_suffix(".tmp")
            )
            state.with_suffix(".tmp").rename(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.folder, options.steps)


if __name__ == "__main__":
    main()
