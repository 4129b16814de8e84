"""Checkpoints for tests: tiny random ones written by diffusers, and the published layouts without weights."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

LAYOUTS = Path(__file__).parent / "layouts"
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "F8_E4M3": 1, "U8": 1}
WORDS = ["a", "b", "cat", "red"]
VOCAB = {
    **{letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")},
    **{letter + "</w>": 26 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")},
    "ca": 52,
    "cat</w>": 53,
    "!": 54,
    "<|startoftext|>": 55,
    "<|endoftext|>": 56,
}
MERGES = "#version: 0.2\nc a\nca t</w>\n"

Layout = dict[str, tuple[tuple[int, ...], str]]


def layout(name: str) -> Layout:
    """Tensor names, shapes and types of a published file."""
    with gzip.open(LAYOUTS / f"{name}.json.gz", "rt") as file:
        return {key: (tuple(shape), dtype) for key, (shape, dtype) in json.load(file).items()}


def write_sparse(
    path: Path, tensors: Mapping[str, tuple[tuple[int, ...], str]], metadata: dict[str, str] | None = None
) -> Path:
    """A valid safetensors file of any size that takes no room: all zeros, as a hole in the file."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, (shape, dtype) in tensors.items():
        size = math.prod(shape) * SIZES[dtype]
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return path


def unet_config(family: str, **changes: Any) -> dict[str, Any]:
    """A tiny `unet/config.json` with the topology of a family."""
    cross, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    base: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [32, 64, 64],
        "down_block_types": [cross, cross, plain],
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "norm_num_groups": 16,
    }
    linear = {"use_linear_projection": True, "attention_head_dim": [2, 4, 4]}
    xl = linear | {
        "cross_attention_dim": 64,
        "down_block_types": [plain, cross, cross],
        "transformer_layers_per_block": [1, 1, 2],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 48 + 32,
    }
    pruned_up = {"up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]}
    families: dict[str, dict[str, Any]] = {
        "sd1": {},
        "sd1-inpaint": {"in_channels": 9},
        "pix2pix": {"in_channels": 8},
        "sd2": linear,
        "depth": linear | {"in_channels": 5},
        "unclip": linear | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 48},
        "x4": linear
        | {
            "in_channels": 7,
            "num_class_embeds": 1000,
            "attention_head_dim": 8,
            "down_block_types": [plain, cross, cross],
            "only_cross_attention": [True, True, False],
        },
        "sdxl": xl,
        "refiner": xl | {"cross_attention_dim": 32, "projection_class_embeddings_input_dim": 40 + 32},
        "ssd": xl
        | pruned_up
        | {
            "layers_per_block": 2,
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [[0, 0], [2, 2], [3, 3]],
            "reverse_transformer_layers_per_block": [[3, 3, 4], [2, 1, 1], 0],
        },
        "koala": xl | pruned_up | {"mid_block_type": None, "transformer_layers_per_block": [1, 2, 3]},
        "lcm": {"time_cond_proj_dim": 16},
    }
    config = base | families[family] | changes
    config.setdefault(
        "up_block_types", [t.replace("Down", "Up") for t in reversed(config["down_block_types"])]
    )
    return config


def vae_config(family: str) -> dict[str, Any]:
    """A tiny `vae/config.json`."""
    xl = family in ("sdxl", "refiner", "ssd", "koala")
    channels = [16, 32] if family == "x4" else [16, 16, 32]
    return {
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": 64,
        "scaling_factor": 0.13025 if xl else 0.08333 if family == "x4" else 0.18215,
    }


def text_model(*, projection: bool = False, act: str = "quick_gelu") -> Any:
    """A tiny CLIP text tower, seeded."""
    config = CLIPTextConfig(
        vocab_size=len(VOCAB),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act=act,
        projection_dim=32,
        bos_token_id=VOCAB["<|startoftext|>"],
        eos_token_id=VOCAB["<|endoftext|>"],
        pad_token_id=VOCAB["!"],
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def scheduler(family: str, **changes: Any) -> Any:
    """The scheduler of a published folder of the family."""
    betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if family in ("sdxl", "refiner", "ssd", "koala"):
        return diffusers.EulerDiscreteScheduler(
            **betas, steps_offset=1, timestep_spacing="leading", **changes
        )
    if family.startswith("sd1"):
        return diffusers.PNDMScheduler(**betas, skip_prk_steps=True, steps_offset=1, **changes)
    return diffusers.DDIMScheduler(
        **betas, steps_offset=1, clip_sample=False, set_alpha_to_one=False, **changes
    )


def write_folder(
    path: Path, family: str = "sd1", *, seed: int = 0, unet: dict[str, Any] | None = None, **noise: Any
) -> Path:
    """A complete diffusers folder with random weights, written by diffusers and transformers themselves."""
    torch.manual_seed(seed)
    xl, refiner = family in ("sdxl", "ssd", "koala"), family == "refiner"
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if xl or refiner else "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    model = diffusers.UNet2DConditionModel(**unet_config(family, **(unet or {})))
    # The published networks were trained, so no weight is zero or one; random ones show a swapped key.
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(path / "unet")
    diffusers.AutoencoderKL(**vae_config(family)).save_pretrained(path / "vae")
    if not refiner:
        # All but SD1 and SDXL's first tower come from OpenCLIP.
        act = "quick_gelu" if xl or family in ("sd1", "sd1-inpaint", "pix2pix", "lcm") else "gelu"
        text_model(act=act).save_pretrained(path / "text_encoder")
        write_tokenizer(path / "tokenizer", "<|endoftext|>" if act == "quick_gelu" else "!")
        index |= {
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
        }
    if xl or refiner:
        text_model(projection=True, act="gelu").save_pretrained(path / "text_encoder_2")
        write_tokenizer(path / "tokenizer_2", "!")
        index |= {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "force_zeros_for_empty_prompt": xl,
            "requires_aesthetics_score": refiner,
        }
    planner = scheduler(family, **noise)
    planner.save_pretrained(path / "scheduler")
    index["scheduler"] = ["diffusers", type(planner).__name__]
    (path / "model_index.json").write_text(json.dumps(index, indent=2))
    return path


def write_tokenizer(folder: Path, pad: str) -> None:
    """A tokenizer of 57 tokens, in CLIP's file format."""
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(VOCAB))
    (folder / "merges.txt").write_text(MERGES)
    names = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77} | names)
    )


def edit(file: Path, change: Any, metadata: dict[str, str] | None = None) -> None:
    """Rewrites a safetensors file after `change(tensors)`."""
    tensors = load_file(file)
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata=metadata)
