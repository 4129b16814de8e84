"""The text encoders of a checkpoint alone: to encode prompts apart from the images that are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..adapters.adapter import fitting_adapters
from ..adapters.merging import Adapters
from ..networks.text import Choices, Encoded, TextEncoder
from ..precision import exact_float32
from .blueprint import recognise
from .checkpoint import Checkpoint, open_checkpoint
from .families import Options
from .load import dtype_for, place_for, stored_vae, text_encoder, text_parts
from .source import EMBEDDED, resolve


@dataclass(eq=False)
class Texts:
    """Loaded text encoders. One thread at a time.

    Attributes:
        encoder: the towers.
        adapters: those that requests can name; what they change in the UNet is left aside.
        device, dtype: where and in what type the towers run.
    """

    encoder: TextEncoder
    adapters: Adapters
    device: torch.device
    dtype: torch.dtype
    checkpoint: Checkpoint = field(repr=False)

    @cached_property
    def checksum(self) -> str:
        """sha256 of the whole model's files, as `Model.checksum`."""
        return self.checkpoint.checksum()

    def encode(self, prompt: str, clip_skip: int = 0, adapters: Choices = ()) -> Encoded:
        """What an engine on the whole model computes for this prompt, to the bit on the same kind of device.

        Raises:
            InvalidRequest: the prompt is too long, or a tower has no block left after `clip_skip`.
            CheckpointError: an adapter's file turns out to be broken.
        """
        with exact_float32(self.device):
            return self.encoder.encode(prompt, clip_skip, adapters)


def load_texts(
    source: str = EMBEDDED,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    vae: str | None = None,
    adapters: Mapping[str, str] | None = None,
    **options: Any,
) -> Texts:
    """The text encoders of the model that `load_model` with the same arguments would load, and no more of it.

    Raises:
        CheckpointError: as `load_model`; the other networks are checked by their headers.
        UnsafeCheckpoint: it is a pickle.
    """
    place = place_for(device)
    wanted = dtype_for(dtype, place)
    checkpoint = open_checkpoint(resolve(source))
    known = Options.of({k: v for k, v in options.items() if k not in ("vae_dtype", "taesd")})
    blueprint = recognise(checkpoint, known, None if vae is None else stored_vae(vae))
    problems = blueprint.problems()
    problems.check(checkpoint.path)
    fitting = fitting_adapters(adapters or {}, blueprint)
    encoder = text_encoder(blueprint, problems, place, wanted)
    problems.check(checkpoint.path)
    encoder.eval().requires_grad_(False)
    for part in blueprint.parts.values():
        part.stored.weights.close()
    own = Adapters(fitting, text=encoder, towers=text_parts(blueprint))
    return Texts(encoder, own, place, wanted, checkpoint)
