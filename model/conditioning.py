"""What the network is told about one image besides the noisy latents: text, sizes, extra channels.

A `Branch` is one row of a network call. With guidance an image has two branches (prompt, negative prompt),
instruct-pix2pix three; the outputs are combined as a weighted sum, so that every form of classifier-free
guidance is one tuple of weights that sum to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .networks.layers import sinusoid
from .networks.text import Encoded
from .request import ImageRequest

if TYPE_CHECKING:
    from .weights.load import Model


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """One row of a network call.

    Attributes:
        context: [L, D] text states.
        added: [added_dim] pooled text and size sinusoids, or None.
        label: [] int64 noise level for a class embedding, or None.
        guidance: [guidance_dim] guidance embedding of distilled networks, or None.
        extra: [Cx, h, w] channels appended to the latents, or None.
    """

    context: Tensor
    added: Tensor | None = None
    label: Tensor | None = None
    guidance: Tensor | None = None
    extra: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """The branches of one image, prompt first, and the weights of their outputs while guidance is on."""

    branches: tuple[Branch, ...]
    weights: tuple[float, ...]


def condition(model: Model, request: ImageRequest, extra: Tensor | None, label: int | None) -> Conditioning:
    """The conditioning of a resolved request.

    Args:
        extra: the task's channels beside the latents (mask and masked image, source image, depth, ...).
        label: the class label, for networks that take one.
    """
    scale = request.guidance_scale or 0.0
    distilled = model.config.unet.guidance_dim
    positive, negative = encode_prompts(model, request)
    embedding = None if distilled is None else guidance_embedding(scale - 1, distilled).to(model.device)
    level = None if label is None else torch.tensor(label, device=model.device)
    first = Branch(positive.context, _added(model, request, positive, positive=True), level, embedding, extra)
    if negative is None:
        return Conditioning((first,), (1.0,))
    other = replace(first, context=negative.context, added=_added(model, request, negative, positive=False))
    if model.config.task != "edit":
        return Conditioning((first, other), (scale, 1 - scale))
    # Brooks et al. 2023, eq. 3: the prompt is dropped first, then the source image too.
    blind = replace(other, extra=None if extra is None else torch.zeros_like(extra))
    image_scale = request.image_guidance_scale
    return Conditioning((first, other, blind), (scale, image_scale - scale, 1 - image_scale))


def guided(model: Model, request: ImageRequest) -> bool:
    """Whether the network also runs on the negative prompt."""
    return (request.guidance_scale or 0.0) > 1 and model.config.unet.guidance_dim is None


def encode_prompts(model: Model, request: ImageRequest) -> tuple[Encoded, Encoded | None]:
    """Prompt and negative prompt, equally long; None without guidance."""
    text, skip = model.text, request.clip_skip
    own = model.adapters.of_text(request.adapters)
    positive = text.encode(request.prompt, skip, own)
    if not guided(model, request):
        return positive, None
    if request.negative_prompt is None and model.config.zero_empty_negative:
        return positive, text.zeros(positive.chunks)
    words = request.negative_prompt or ""
    chunks = max(positive.chunks, text.encode(words, skip, own).chunks)
    return (
        text.encode_padded(request.prompt, chunks, skip, own),
        text.encode_padded(words, chunks, skip, own),
    )


def _added(model: Model, request: ImageRequest, text: Encoded, *, positive: bool) -> Tensor | None:
    """Pooled text, then one sinusoid per size number (Podell et al. 2023, section 2.2)."""
    width = model.config.unet.added_dim
    if width is None or text.pooled is None or model.config.unet.added_kind != "text_time":
        return None
    numbers: list[float] = [*(request.original_size or ()), *request.crop]
    if model.config.aesthetic_score:
        numbers.append(request.aesthetic_score if positive else request.negative_aesthetic_score)
    else:
        numbers.extend(request.target_size or ())
    pooled = text.pooled.float()
    sizes = torch.tensor(numbers, device=pooled.device)
    return torch.cat([pooled, sinusoid(sizes, (width - len(pooled)) // len(numbers)).flatten()])


def guidance_embedding(scale: float, dim: int) -> Tensor:
    """Sinusoid [dim] of a guidance scale, sines first (Luo et al. 2023, as diffusers feeds LCM networks)."""
    half = dim // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10_000.0) / (half - 1)))
    angles = scale * 1000.0 * rates
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, dim % 2))
