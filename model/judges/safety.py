"""Stable Diffusion's safety checker: a CLIP image tower and twenty concepts that a picture must not be near.

It says what it found and changes nothing. The weights are the `safety_checker` folder of SD 1.x checkpoints;
the rule is that of CompVis and diffusers, down to the rounding at three digits.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ..errors import CheckpointError
from .vision import JudgeFolder, clip_pixels, judge_device

CARE = 0.01
"""Added to every concept's score when a special-care concept (children) is near."""


@dataclass(frozen=True, slots=True)
class SafetyVerdict:
    """What the checker says about one picture.

    Attributes:
        nsfw: one of the concepts is nearer than its threshold.
        nsfw_score: the largest cosine similarity minus threshold; above 0 is flagged.
    """

    nsfw: bool
    nsfw_score: float


class SafetyChecker(nn.Module):
    """The loaded checker; call it with a picture. Pictures are looked at one by one, so that none depends on others.

    Args:
        source: the folder, or one with a subfolder `safety_checker`; a path, URL or hub id.
        device: "auto", "cpu" or a CUDA device; it runs in float32.

    Raises:
        CheckpointError: the folder holds no whole safety checker.
    """

    def __init__(self, source: str | os.PathLike[str], *, device: str = "auto") -> None:
        super().__init__()
        folder = JudgeFolder.open(source, "safety_checker")
        shapes = {key: entry.shape for key, entry in folder.weights.entries.items()}
        try:
            stated = dict(folder.config["vision_config"])
            (concepts, width), cared = shapes["concept_embeds"], shapes["special_care_embeds"][0]
            config: Any = CLIPVisionConfig(**{**stated, "projection_dim": width})
            tower: Any = CLIPVisionModelWithProjection(config)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder.path}: no safety checker: {type(error).__name__}: {error}"
            ) from error
        self.tower, self.side = tower.eval().requires_grad_(False), int(config.image_size)
        self.register_buffer("concept_embeds", torch.empty(concepts, width))
        self.register_buffer("special_care_embeds", torch.empty(cared, width))
        self.register_buffer("concept_embeds_weights", torch.empty(concepts))
        self.register_buffer("special_care_embeds_weights", torch.empty(cared))
        folder.fill(self, _renamed)
        self.to(judge_device(device))

    @torch.inference_mode()
    def forward(self, image: Image.Image) -> SafetyVerdict:
        """The verdict on one picture."""
        place = self.get_buffer("concept_embeds").device
        embedded = self.tower(clip_pixels(image, self.side).to(place)).image_embeds
        care = self._above(embedded, "special_care_embeds", 0.0)
        score = max(self._above(embedded, "concept_embeds", CARE if max(care) > 0 else 0.0))
        return SafetyVerdict(nsfw=score > 0, nsfw_score=score)

    def _above(self, embedded: torch.Tensor, name: str, adjustment: float) -> list[float]:
        """Cosine similarity to each concept minus its threshold, rounded to three digits.

        diffusers raises the adjustment in the middle of its list of special-care concepts; that can change the
        scores of those after it, but never whether there is one above 0.
        """
        near = F.normalize(embedded) @ F.normalize(self.get_buffer(name)).T
        limits = self.get_buffer(f"{name}_weights").tolist()
        values = near[0].float().cpu().tolist()
        return [round(v - limit + adjustment, 3) for v, limit in zip(values, limits, strict=True)]


def _renamed(key: str) -> str | None:
    """A file's key as this module's; older files name the tower twice and store position ids."""
    if key.endswith("position_ids"):
        return None
    if key.startswith(("vision_model.", "visual_projection.")):
        return "tower." + key.replace("vision_model.vision_model.", "vision_model.")
    return key
