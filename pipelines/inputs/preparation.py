"""What a task makes of a request and its source pictures: the same request, ready for an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from diffray.model.config import ModelConfig
from diffray.model.errors import InvalidRequest
from diffray.model.request import ImageRequest

from ..terms.tasks import SIDES, UPSCALE_STRENGTH, Kind
from .pictures import painted


def prepared(
    kind: Kind,
    request: ImageRequest,
    own: Mapping[str, Any],
    pictures: Mapping[str, Image.Image],
    model: ModelConfig,
) -> ImageRequest:
    """The request with its pictures, made ready for its task.

    Args:
        own: values of the task's own fields.
        pictures: by field; upright, in the modes of `pictures.py`.

    Raises:
        InvalidRequest: a picture is missing, or does not go with the others or the model.
    """
    for name in kind.needs:
        if name not in pictures:
            raise InvalidRequest(name, "got nothing, this task needs one")
    if kind.task == "outpaint":
        return _continued(request, own, pictures["init_image"], model)
    if kind.task == "upscale":
        return _enlarged(request, own, pictures["init_image"], model)
    if "mask" in pictures:
        white = painted(pictures["mask"], own.get("mask_values")) != bool(own.get("mask_invert"))
        pictures = {**pictures, "mask": Image.fromarray(np.where(white, 255, 0).astype(np.uint8))}
    size = pictures["init_image"].size if "init_image" in pictures else None
    for name in ("mask", "depth"):
        if name in pictures and size is not None and not _same_shape(pictures[name].size, size):
            raise InvalidRequest(
                name, f"got {pictures[name].size} pixels beside a picture of {size}: another shape"
            )
    values: dict[str, Any] = dict(pictures)
    return replace(request, **values)


def offset_of(
    kind: Kind, request: ImageRequest, own: Mapping[str, Any], size: tuple[int, int]
) -> tuple[int, int]:
    """Where the source picture lies on what the image shows, from the left and the top."""
    return _margins(request, own, size)[:2] if kind.task == "outpaint" else (0, 0)


def _continued(
    request: ImageRequest, own: Mapping[str, Any], source: Image.Image, model: ModelConfig
) -> ImageRequest:
    """The source on a larger canvas, its border pixels stretched outwards, and the mask of what is new."""
    left, top, right, bottom = _margins(request, own, source.size)
    factor = model.vae.factor
    right += -(left + source.width + right) % factor
    bottom += -(top + source.height + bottom) % factor
    if not any((left, top, right, bottom)):
        raise InvalidRequest(
            "left", "nothing to add: give left, top, right, bottom, or a larger width or height"
        )
    pixels = np.pad(np.asarray(source), ((top, bottom), (left, right), (0, 0)), mode="edge")
    mask = np.full(pixels.shape[:2], 255, np.uint8)
    mask[top : top + source.height, left : left + source.width] = 0
    width, height = left + source.width + right, top + source.height + bottom
    return replace(
        request, width=width, height=height, init_image=Image.fromarray(pixels), mask=Image.fromarray(mask)
    )


def _margins(
    request: ImageRequest, own: Mapping[str, Any], size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Pixels to add on the left, at the top, on the right and at the bottom."""
    given = tuple(int(own.get(side) or 0) for side in SIDES)
    if any(given):
        left, top, right, bottom = given
        return left, top, right, bottom
    width, height = request.width or size[0], request.height or size[1]
    if width < size[0] or height < size[1]:
        raise InvalidRequest("width", f"got {width}x{height}, the picture has {size[0]}x{size[1]}")
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    return left, top, width - size[0] - left, height - size[1] - top


def _enlarged(
    request: ImageRequest, own: Mapping[str, Any], source: Image.Image, model: ModelConfig
) -> ImageRequest:
    scale = own.get("scale")
    if model.task == "upscale":
        if scale not in (None, model.vae.factor):
            raise InvalidRequest("scale", f"got {scale}, this model's is {model.vae.factor}")
        return replace(request, width=None, height=None, init_image=source)
    factor = model.vae.factor
    width, height = (max(round(side * (scale or 2) / factor), 1) * factor for side in source.size)
    strength = UPSCALE_STRENGTH if request.strength is None else request.strength
    return replace(request, width=width, height=height, strength=strength, init_image=source)


def _same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes have the same proportions, give or take a pixel of rounding."""
    return abs(one[0] * other[1] - one[1] * other[0]) <= max(*one, *other)
