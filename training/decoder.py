"""Sharpen the autoencoder's decoder with the encoder frozen: `python -m training.decoder RUN_FOLDER`.

Runs beside `training.denoiser`, since the latents no longer change. A little noise on the latents makes the
decoder forgive the denoiser's last errors. Writes `decoder.pt` every 100 steps; goes on where it stopped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from diffray.model.vae import Autoencoder

from . import captions
from .autoencoder import CONFIG, rate, weights
from .muon import Muon, orthogonal
from .scenes import draw

BATCH = 16
NOISE = 0.05
MUON_RATE, ADAM_RATE = 3e-3, 1.5e-3


def train(folder: Path, steps: int) -> None:
    saved = torch.load(folder / "dataset.pt", weights_only=True, mmap=True)
    latents, scale = saved["latents"], saved["scale"]
    scenes = captions.scenes()
    model = Autoencoder(CONFIG).to(memory_format=torch.channels_last)
    model.load_state_dict(torch.load(folder / "vae.pt", weights_only=True)["model"])
    model.encoder.requires_grad_(False)
    trained = [(n, p) for n, p in model.named_parameters() if n.startswith(("decoder.", "post_quant_conv."))]
    optimizers: list[torch.optim.Optimizer] = [
        Muon([p for n, p in trained if orthogonal(n, p)], MUON_RATE),
        torch.optim.AdamW([p for n, p in trained if not orthogonal(n, p)], lr=ADAM_RATE, betas=(0.9, 0.99)),
    ]
    state, first = folder / "decoder.pt", 0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        for optimizer, old in zip(optimizers, kept.get("optimizers", ()), strict=False):
            optimizer.load_state_dict(old)
        first = kept["step"]
    started, running = time.time(), 0.0
    for step in range(first, steps):
        for optimizer, peak in zip(optimizers, (MUON_RATE, ADAM_RATE), strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate(step, steps, warmup=50)
        random = torch.Generator().manual_seed(step)
        pick = torch.randint(len(scenes), (BATCH,), generator=random)
        images = np.stack([np.asarray(draw(scenes[i])) for i in pick.tolist()])
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        z = latents[pick] + NOISE * torch.randn(latents[pick].shape, generator=random)
        y = model.decode(z / scale)
        error = y - x
        mse = error.square().mean()
        loss = (weights(x) * (error.abs() + error.square())).mean()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        running = mse.item() if step == first else 0.95 * running + 0.05 * mse.item()
        if step % 25 == 0:
            pace = (time.time() - started) / (step - first + 1)
            print(f"decoder {step} psnr {10 * np.log10(4 / running):.2f} dB {pace:.2f} s/step", flush=True)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            kept = {"model": model.state_dict(), "step": step + 1}
            torch.save(
                {**kept, "optimizers": [o.state_dict() for o in optimizers]}, state.with_suffix(".tmp")
            )
            state.with_suffix(".tmp").rename(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.folder, options.steps)


if __name__ == "__main__":
    main()
