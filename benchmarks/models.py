"""One set of weights in two libraries: diffray's networks, and diffusers' over the same memory.

"sd15" and "sdxl" are the published architectures with random weights (normal, 0.02, cut at two deviations;
norms at one), which cost what trained weights cost. Every other name is a source of `load_model`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffray.model import Model, load_model
from diffray.model.networks.tokenizer import ClipTokenizer
from diffray.model.weights.keys import packing
from diffray.model.weights.source import resolve

WEIGHTS = Path(tempfile.gettempdir()) / "diffray-benchmarks"
DEVIATION = 0.02

XL_BLOCKS: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE_BLOCKS: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "pad_token_id": 49407,
}
BIG_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
    "pad_token_id": 0,
}
IDS: dict[str, int] = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
SCHEDULER = DPMSolverMultistepScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    timestep_spacing="leading",
)


@dataclass(frozen=True, slots=True)
class Pair:
    """diffray's model and diffusers' pipeline over the same UNet and autoencoder tensors."""

    name: str
    ours: Model
    theirs: Any

    @property
    def device(self) -> torch.device:
        return self.ours.device

    @property
    def dtype(self) -> torch.dtype:
        return self.ours.dtype


def source(name: str) -> str:
    """What `load_model` takes for a benchmark's model; random weights are written on first use."""
    if name not in RANDOM:
        return name
    folder = WEIGHTS / name
    if not (folder / "model_index.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        RANDOM[name](folder)
    return str(folder)


def load(name: str, *, device: str = "auto", dtype: str = "auto") -> Pair:
    """Both libraries' model of a name, on one copy of the denoiser's and the autoencoder's weights."""
    place = source(name)
    ours = load_model(place, device=device, dtype=dtype)
    folder = resolve(place)
    unet = _sharing(UNet2DConditionModel, folder / "unet", ours.unet)
    vae = _sharing(AutoencoderKL, folder / "vae", ours.vae)
    index = json.loads((folder / "model_index.json").read_text())
    extra = {"safety_checker": None} if index["_class_name"] == "StableDiffusionPipeline" else {}
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    theirs = DiffusionPipeline.from_pretrained(folder, unet=unet, vae=vae, dtype=ours.dtype, **extra)
    theirs.to(ours.device)
    theirs.set_progress_bar_config(disable=True)
    return Pair(Path(name).name, ours, theirs)


def _sharing(kind: Any, folder: Path, ours: nn.Module) -> Any:
    """diffusers' network of a config, its parameters views of ours (a packed one is cut along its rows)."""
    with torch.device("meta"):
        theirs = kind.from_config(kind.load_config(folder))
    state = {
        key: part
        for name, tensor in ours.state_dict().items()
        for key, part in zip(packing(name), tensor.chunk(len(packing(name))), strict=True)
    }
    theirs.load_state_dict(state, strict=True, assign=True)
    return theirs.eval().requires_grad_(False)


def _sd15(folder: Path) -> None:
    unet = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    _write(folder, "StableDiffusionPipeline", unet, 0.18215, {"": (CLIPTextModel, CLIP_L)})


def _sdxl(folder: Path) -> None:
    unet = {"sample_size": 128, "cross_attention_dim": 2048} | XL_BLOCKS
    towers = {"": (CLIPTextModel, CLIP_L), "_2": (CLIPTextModelWithProjection, BIG_G)}
    _write(folder, "StableDiffusionXLPipeline", unet, 0.13025, towers)


def _write(
    folder: Path,
    pipeline: str,
    unet: dict[str, Any],
    scale: float,
    towers: dict[str, tuple[Any, dict[str, Any]]],
) -> None:
    """A diffusers folder with random weights in half precision; its index, which makes it whole, last."""
    torch.manual_seed(0)
    index: dict[str, Any] = {"_class_name": pipeline, "unet": ["diffusers", "UNet2DConditionModel"]}
    index |= {"vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", type(SCHEDULER).__name__]}
    _random(UNet2DConditionModel, **unet).save_pretrained(folder / "unet")
    vae = VAE_BLOCKS | {"scaling_factor": scale, "sample_size": 8 * unet["sample_size"]}
    _random(AutoencoderKL, **vae).save_pretrained(folder / "vae")
    for suffix, (kind, shape) in towers.items():
        described = CLIPTextConfig(**IDS, max_position_embeddings=77, **shape)
        _random(kind, described).save_pretrained(folder / f"text_encoder{suffix}")
        index[f"text_encoder{suffix}"] = ["transformers", kind.__name__]
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
        for file, text in ClipTokenizer.openai().files(shape["pad_token_id"]).items():
            (folder / f"tokenizer{suffix}").mkdir(exist_ok=True)
            (folder / f"tokenizer{suffix}" / file).write_text(text, encoding="utf-8")
    SCHEDULER.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))


@torch.no_grad()
def _random(kind: Any, *args: Any, **config: Any) -> Any:
    """A network in half precision with random matrices, unit norms and zero biases."""
    with torch.device("meta"):
        network = kind(*args, **config)
    network = network.half().to_empty(device="cpu")
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            values = torch.randn(parameter.shape) * DEVIATION
            parameter.copy_(values.clamp_(-2 * DEVIATION, 2 * DEVIATION))
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return network


RANDOM: dict[str, Callable[[Path], None]] = {"sd15": _sd15, "sdxl": _sdxl}
