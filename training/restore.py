"""Rebuild a run folder from exported weights, so that training goes on from them:
`python -m training.restore RUN_FOLDER [MODEL_FOLDER]`.

Brings back the autoencoder, the tokenizer and the UNet; the text encoder is `training.captions`' work, and
optimizer states are not exported.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from diffray.model import load_model

from .export import TARGET


def restore(folder: Path, source: Path) -> None:
    """Write `vae.pt`, `denoiser.pt` (both at step 0) and `tokenizer/`."""
    model = load_model(str(source), device="cpu", dtype="float32")
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.vae.state_dict(), "step": 0}, folder / "vae.pt")
    weights = model.unet.state_dict()
    torch.save({"model": weights, "average": weights, "step": 0}, folder / "denoiser.pt")
    shutil.copytree(source / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("source", type=Path, nargs="?", default=TARGET)
    options = parser.parse_args()
    restore(options.folder, options.source)


if __name__ == "__main__":
    main()
