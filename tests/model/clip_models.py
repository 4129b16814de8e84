"""Small random models that judge pictures, saved in the true layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from diffray.model.networks.tokenizer import ClipTokenizer
from diffray.model.weights.source import embedded

SIDE = 28
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION: dict[str, Any] = {**TOWER, "image_size": SIDE, "patch_size": 14, "projection_dim": 16}


def safety_checker() -> StableDiffusionSafetyChecker:
    """diffusers' own class with random weights, some pictures above and some below its thresholds."""
    torch.manual_seed(0)
    config = CLIPConfig(projection_dim=16, text_config={**TOWER, "vocab_size": 100}, vision_config=VISION)
    checker = StableDiffusionSafetyChecker(config).eval()
    with torch.no_grad():
        for name in ("concept_embeds", "special_care_embeds"):
            getattr(checker, name).normal_()
            getattr(checker, f"{name}_weights").uniform_(-0.1, 0.5)
    return checker


def save_safety_checker(folder: Path, *, threshold: float | None = None) -> None:
    """As the SD 1.x repositories have it: the tower named twice, position ids stored."""
    safety_checker().save_pretrained(folder)
    weights = {
        key.replace("vision_model.", "vision_model.vision_model.", 1): tensor
        for key, tensor in load_file(folder / "model.safetensors").items()
    }
    weights["vision_model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    if threshold is not None:
        weights["concept_embeds_weights"] = torch.full((17,), threshold)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def tokenizer() -> ClipTokenizer:
    """The embedded model's small vocabulary."""
    return ClipTokenizer.from_folder(embedded() / "tokenizer")


def save_clip(folder: Path) -> None:
    """A whole CLIP model with a tokenizer."""
    torch.manual_seed(1)
    words = tokenizer()
    text = {
        **TOWER,
        "vocab_size": words.vocab_size,
        "max_position_embeddings": 16,
        "projection_dim": 16,
        "eos_token_id": words.eos_id,
        "bos_token_id": words.bos_id,
    }
    CLIPModel(CLIPConfig(projection_dim=16, text_config=text, vision_config=VISION)).save_pretrained(folder)
    for name, content in words.files().items():
        (folder / name).write_text(content)
