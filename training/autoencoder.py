"""Train the embedded model's autoencoder: `python -m training.autoencoder RUN_FOLDER`.

64x64 pixels to 16x16x4 latents. Loss: L1 + MSE + 1e-6 KL (no adversarial part: flat colours need none).
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
from diffray.model.vae import Autoencoder

from .scenes import draw, random_scene

CONFIG = VAEConfig(
    image_channels=3, latent_channels=4, channels=(32, 32, 64), resnets=1, quant_conv=True, scale=1.0, shift=0.0,
    latents_mean=None, latents_std=None, force_upcast=False, norm_groups=8,
)  # fmt: skip
BATCH = 16
PEAK_RATE = 2e-3


def pictures(rng: np.random.Generator, count: int) -> Tensor:
    """`count` random scenes as [count, 3, 64, 64] in [-1, 1]."""
    images = np.stack([np.asarray(draw(random_scene(rng))) for _ in range(count)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def rate(step: int, steps: int, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + float(np.cos(np.pi * min(step / steps, 1.0))))


def train(folder: Path, steps: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = Autoencoder(CONFIG).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    state = folder / "vae.pt"
    first = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    started = time.time()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * rate(step, steps)
        x = pictures(np.random.default_rng(step), BATCH)
        mean, std = model.moments(x)
        y = model.decode(model.scaled(mean + std * torch.randn_like(mean)))
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        mse = F.mse_loss(y, x)
        loss = F.l1_loss(y, x) + mse + 1e-6 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            psnr = 10 * np.log10(4 / mse.item())
            pace = (time.time() - started) / (step - first + 1)
            print(f"vae {step} psnr {psnr:.2f} dB loss {loss.item():.4f} {pace:.2f} s/step", flush=True)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, state
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.folder, options.steps)


if __name__ == "__main__":
    main()
