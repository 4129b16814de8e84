"""LoRA files for the embedded model, as trainers write them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

SIDES = {"down_blocks_1": 96, "down_blocks_2": 128, "mid_block": 128, "up_blocks_0": 128, "up_blocks_1": 96}
TEXT = 128
RANK = 4


def write_lora(path: Path, seed: int, strength: float = 0.3) -> Path:
    """A file in kohya's layout with random factors for every cross-attention's keys and values."""
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for block, side in SIDES.items():
        for projection in ("to_k", "to_v"):
            key = f"lora_unet_{block}_attentions_0_transformer_blocks_0_attn2_{projection}"
            tensors[f"{key}.lora_down.weight"] = torch.randn(RANK, TEXT, generator=random) * strength
            tensors[f"{key}.lora_up.weight"] = torch.randn(side, RANK, generator=random) * strength
            tensors[f"{key}.alpha"] = torch.tensor(float(RANK))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path
