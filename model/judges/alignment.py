"""CLIP score: how well a picture fits its prompt, by any CLIP model in Hugging Face's layout."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPModel

from ..errors import CheckpointError
from ..networks.tokenizer import ClipTokenizer
from ..prompt import parse
from .vision import JudgeFolder, clip_pixels, judge_device


class ClipScore(nn.Module):
    """The loaded model; call it with a picture and a prompt.

    The score is 100 max(cos, 0) of the two embeddings (Hessel et al. 2021 without their factor 2.5): about 20 for a
    picture of something else, above 30 for a good fit with OpenAI's models. Prompt weights and `BREAK` are
    taken out; text beyond 77 tokens is not seen.

    Args:
        source: a folder with `config.json`, safetensors weights and a tokenizer; a path, URL or hub id.
        device: "auto", "cpu" or a CUDA device; it runs in float32.

    Raises:
        CheckpointError: the folder holds no whole CLIP model.
    """

    def __init__(self, source: str | os.PathLike[str], *, device: str = "auto") -> None:
        super().__init__()
        folder = JudgeFolder.open(source)
        self.tokenizer = ClipTokenizer.from_folder(folder.path)
        stated = {
            name: folder.config[name]
            for name in ("text_config", "vision_config", "projection_dim")
            if name in folder.config
        }
        if "vision_config" not in stated or "text_config" not in stated:
            raise CheckpointError(f"{folder.path}: config.json describes no CLIP model")
        config: Any = CLIPConfig(**stated)
        # Older configs name an end-of-text id that is not the tokenizer's; what is pooled is the tokenizer's.
        config.text_config.eos_token_id = self.tokenizer.eos_id
        try:
            clip: Any = CLIPModel(config)
        except (TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{folder.path}: no CLIP model: {error}") from error
        self.clip = clip.eval().requires_grad_(False)
        self.side, self.length = (
            int(config.vision_config.image_size),
            int(config.text_config.max_position_embeddings),
        )
        ids, rows = self.tokenizer.vocab_size, int(config.text_config.vocab_size)
        if ids > rows:
            raise CheckpointError(f"{folder.path}: the tokenizer has {ids} ids, the model {rows}")
        folder.fill(self.clip, lambda key: None if key.endswith("position_ids") else key)
        self.to(judge_device(device))

    @torch.inference_mode()
    def forward(self, image: Image.Image, prompt: str) -> float:
        """The score of one picture, rounded to four digits."""
        words = self.tokenizer.encode(_plain(prompt))[: self.length - 2]
        ids = torch.tensor([[self.tokenizer.bos_id, *words, self.tokenizer.eos_id]], device=self.clip.device)
        pixels = clip_pixels(image, self.side).to(self.clip.device)
        found = self.clip(input_ids=ids, pixel_values=pixels)
        similarity = F.cosine_similarity(found.text_embeds, found.image_embeds).item()
        return round(100 * max(similarity, 0.0), 4)


def _plain(prompt: str) -> str:
    """A prompt without its weights and `BREAK`s."""
    return " ".join("".join(piece.text for piece in section) for section in parse(prompt))
