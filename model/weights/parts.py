"""The parts of a checkpoint: where each lies in its file, which rules find its tensors, and what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import TextConfig, UNetConfig, VAEConfig
from ..errors import CheckpointError
from .checkpoint import PART_FILES, Checkpoint, Layout
from .keys import UNET_PREFIX, VAE_PREFIX, Rule, Shape
from .safefile import Weights

SINGLE_PARTS: tuple[tuple[str, str, str], ...] = (
    ("unet", UNET_PREFIX, ""),
    ("vae", VAE_PREFIX, ""),
    ("text_encoder", "cond_stage_model.transformer.", "clip"),
    ("text_encoder", "cond_stage_model.model.", "openclip"),
    ("text_encoder", "conditioner.embedders.0.transformer.", "clip"),
    ("text_encoder_2", "conditioner.embedders.1.model.", "openclip"),
    ("text_encoder_2", "conditioner.embedders.0.model.", "openclip"),
)
"""Part, its prefix in a single file, and whose names its tensors have."""


@dataclass(frozen=True)
class Stored:
    """One part as it lies in a file.

    Attributes:
        weights: the tensors of the file, other parts' too.
        layout: whose names they have.
        prefix: with which this part's names start.
        style: for text towers, "clip" (Hugging Face's names) or "openclip"; else empty.
        config: the part's `config.json`, where there is one.
    """

    weights: Weights
    layout: Layout
    prefix: str = ""
    style: str = ""
    config: Mapping[str, Any] | None = None

    def shapes(self) -> dict[str, Shape]:
        """Shapes by name without the prefix."""
        cut, entries = len(self.prefix), self.weights.entries
        return {key[cut:]: entry.shape for key, entry in entries.items() if key.startswith(self.prefix)}


@dataclass(frozen=True)
class Part:
    """One network: its config, its folder tensors and the rules that find them.

    `dropped` are prefixes of stored tensors that the family never uses.
    """

    name: str
    config: UNetConfig | VAEConfig | TextConfig
    stored: Stored
    shapes: Mapping[str, Shape]
    rules: list[Rule]
    dropped: tuple[str, ...] = ()


@dataclass
class Problems:
    """What keeps a checkpoint from filling its networks; each list has one line per tensor."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)

    def lines(self, limit: int = 10) -> list[str]:
        """One line per kind that occurs: its count and its first names."""
        named = (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of the wrong shape or type", self.misshapen),
            ("not finite", self.not_finite),
        )
        return [
            f"{len(keys)} {name}: {', '.join(keys[:limit])}{', ...' if len(keys) > limit else ''}"
            for name, keys in named
            if keys
        ]

    def check(self, where: object) -> None:
        """Raises one CheckpointError with everything that is wrong."""
        if lines := self.lines():
            raise CheckpointError(f"{where}: tensors do not fit the model.\n  " + "\n  ".join(lines))


def stored_parts(checkpoint: Checkpoint) -> dict[str, Stored]:
    """Where each part lies."""
    configs = {name: checkpoint.config(f"{name}/config.json") for name in PART_FILES}
    if checkpoint.layout == "folder":
        style = {name: "clip" if name.startswith("text") else "" for name in checkpoint.weights}
        return {
            name: Stored(w, "folder", "", style[name], configs[name])
            for name, w in checkpoint.weights.items()
        }
    weights = checkpoint.weights[""]
    return {
        name: Stored(weights, "single", prefix, style, configs[name])
        for name, prefix, style in SINGLE_PARTS
        if any(key.startswith(prefix) for key in weights.entries)
    }


def pieces(part: Part, problems: Problems, largest: float = float("inf")) -> dict[str, Tensor]:
    """Every folder tensor of a part, as a view of the file; values that are not finite go to `problems`.

    `largest` is the greatest magnitude that the wanted type holds.
    """
    result: dict[str, Tensor] = {}
    for rule in part.rules:
        tensor = part.stored.weights.read(rule.file)
        if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            tensor = tensor.to(torch.float16)
        if tensor.numel():
            low, high = (float(x) for x in torch.aminmax(tensor))
            if not (-largest <= low and high <= largest) or abs(low) == float("inf") or high == float("inf"):
                problems.not_finite.append(f"{label(part, rule.file)} (from {low:g} to {high:g})")
        result.update(zip(rule.folder, rule.unpack(tensor), strict=True))
    return result


def label(part: Part, key: str) -> str:
    """A tensor's name, with its part in front where files are per part."""
    return f"{part.name}: {key}" if part.stored.layout == "folder" else key
