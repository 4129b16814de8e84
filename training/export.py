"""Write the trained networks as a diffusers folder: `python -m training.export RUN_FOLDER [TARGET]`.

Built through diffusers' own classes, so that the folder is what that library writes and reads.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTokenizer

from diffray.model.networks.tokenizer import ClipTokenizer
from diffray.model.weights.keys import packing

from .autoencoder import CONFIG as VAE
from .captions import POSITIONS
from .denoiser import BETA_END, BETA_START, TRAIN_STEPS, UNET, frozen_text
from .scenes import SIDE

TARGET = Path(__file__).parents[1] / "model" / "embedded"


def unpacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Separate projections, under diffusers' names."""
    return {
        key: part
        for name, tensor in state.items()
        for key, part in zip(packing(name), tensor.chunk(len(packing(name))), strict=True)
    }


def filled(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    network.load_state_dict(unpacked(state), strict=True)
    return network.half()


def pipeline(folder: Path) -> StableDiffusionPipeline:
    """The averaged weights of a run as a diffusers pipeline in half precision."""
    saved = torch.load(folder / "denoiser.pt", weights_only=True)["average"]
    scale = torch.load(folder / "dataset.pt", weights_only=True, mmap=True)["scale"]
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=POSITIONS)
    levels = len(UNET.channels)
    unet = UNet2DConditionModel(
        sample_size=SIDE // VAE.factor, in_channels=4, out_channels=4, block_out_channels=UNET.channels,
        layers_per_block=1, cross_attention_dim=UNET.context_dim, attention_head_dim=UNET.heads,
        use_linear_projection=True, norm_num_groups=UNET.norm_groups,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * (levels - 1)),
        up_block_types=(*("CrossAttnUpBlock2D",) * (levels - 1), "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        sample_size=SIDE, latent_channels=4, block_out_channels=VAE.channels, layers_per_block=VAE.resnets,
        norm_num_groups=VAE.norm_groups, scaling_factor=scale, force_upcast=False,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        beta_start=BETA_START, beta_end=BETA_END, beta_schedule="scaled_linear", num_train_timesteps=TRAIN_STEPS,
        prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=filled(vae, torch.load(folder / "vae.pt", weights_only=True)["model"]),
        unet=filled(unet, saved),
        text_encoder=frozen_text(folder).half(),
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("target", type=Path, nargs="?", default=TARGET)
    options = parser.parse_args()
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.rmtree(options.target / part, ignore_errors=True)
    pipeline(options.folder).save_pretrained(options.target, safe_serialization=True)
    (options.target / "diffray.json").write_text(json.dumps({"steps": 20, "guidance_scale": 3.0}) + "\n")
    files = ClipTokenizer.from_folder(options.target / "tokenizer").files()
    for name in ("vocab.json", "merges.txt"):  # the form that older tools read
        (options.target / "tokenizer" / name).write_text(files[name])


if __name__ == "__main__":
    main()
