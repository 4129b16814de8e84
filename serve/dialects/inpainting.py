"""Inpainting as AUTOMATIC1111's clients know it, around an engine that knows a picture and a mask.

A soft mask, its part of the picture enlarged ("only masked"), the hidden part filled from its surroundings, and
the result laid back into the original picture. The order of things follows `processing.py` of AUTOMATIC1111
1.10; where its result depends on the mask's blur we let the blend end where repainting begins, so that no old
content shines through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from diffray.model import InvalidRequest

from .parts import alpha_mask, check_mask, contained, covering, flat

Box = tuple[int, int, int, int]
Floats = NDArray[np.floating[Any]]
Fit = Literal["stretch", "cover", "contain"]


@dataclass(frozen=True, slots=True)
class Inpainting:
    """What goes into the engine, and how its picture goes back.

    Attributes:
        image, mask: for the engine, of one size; white is repainted.
        original: what the result is laid over.
        weights: of the result, of the size of `original`, 0..255.
        box: where in `original` the result belongs.
    """

    image: Image.Image
    mask: Image.Image
    original: Image.Image
    weights: Image.Image
    box: Box

    def finished(self, image: Image.Image) -> Image.Image:
        """The original picture with the repainted part in it."""
        left, top, right, bottom = self.box
        part = image.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        whole = self.original.copy()
        whole.paste(part, (left, top))
        return Image.composite(whole, self.original, self.weights)


def inpainting(
    image: Image.Image,
    mask: Image.Image,
    size: tuple[int, int],
    *,
    fit: Fit = "stretch",
    invert: bool = False,
    blur: tuple[float, float] = (4, 4),
    fill: bool = False,
    padding: int | None = None,
) -> Inpainting:
    """Prepare a picture and its mask.

    Args:
        image, mask: of one size; white is repainted, and a mask with transparency is white where it is opaque.
        size: (width, height) that the engine works at.
        fit: how the whole picture comes to that size.
        invert: black is repainted.
        blur: standard deviation of the mask's edge in pixels, across and down.
        fill: hide what is repainted: the engine sees the colours around it instead.
        padding: enlarge the masked part with so many pixels around it; None works on the whole picture.

    Raises:
        InvalidRequest: the sizes differ, or nothing is repainted.
    """
    check_mask(image, mask, "mask")
    soft = _mask(mask, invert, blur)
    if not _hard(soft).getbbox():
        raise InvalidRequest("mask", "it is blank, so nothing would be repainted")
    image = flat(image)
    if padding is None:
        original, soft = (fitted(picture, size, fit) for picture in (image, soft))
        box: Box = (0, 0, *size)
    else:
        original, box = image, _region(soft, padding, size)
    part, hidden = original.crop(box), soft.crop(box)
    shown = filled(part, _hard(hidden)) if fill else part
    return Inpainting(
        image=fitted(shown, size, "stretch"),
        mask=fitted(hidden, size, "stretch"),
        original=original,
        weights=soft.point([min(2 * level, 255) for level in range(256)]),
        box=box,
    )


def filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """RGB `image` with its white-masked part replaced by smooth colours from around it.

    Push and pull (Gortler et al. 1996, The Lumigraph, section 3.4): halve until every cell has a known colour,
    then double again and keep what is known.
    """
    known = np.asarray(mask, dtype=np.float32)[..., None] < 128
    colours = _pulled(np.asarray(image, dtype=np.float32) * known, known.astype(np.float32))
    return Image.fromarray(colours.clip(0, 255).round().astype(np.uint8))


def _pulled(sums: Floats, weights: Floats) -> Floats:
    """Colours [h, w, 3] of weighted sums [h, w, 3] and weights [h, w, 1]; gaps are filled from coarser levels."""
    known = sums / np.maximum(weights, 1e-6)
    height, width = weights.shape[:2]
    if weights.min() >= 1 or max(height, width) == 1:
        return known
    pad = ((0, height % 2), (0, width % 2), (0, 0))
    sums, weights = np.pad(sums, pad), np.pad(weights, pad)
    quads = [(slice(i, None, 2), slice(j, None, 2)) for i in (0, 1) for j in (0, 1)]
    weight = np.sum([weights[quad] for quad in quads], axis=0)
    share = np.minimum(weight, 1) / np.maximum(weight, 1e-6)
    coarse = _pulled(np.sum([sums[quad] for quad in quads], axis=0) * share, weight * share)
    bands = [_doubled(coarse[..., band])[:height, :width] for band in range(3)]
    share = np.minimum(weights[:height, :width], 1)
    return known * share + np.stack(bands, axis=-1) * (1 - share)


def _doubled(band: Floats) -> Floats:
    image = Image.fromarray(np.ascontiguousarray(band))
    return np.asarray(image.resize((2 * image.width, 2 * image.height), Image.Resampling.BILINEAR))


def _mask(mask: Image.Image, invert: bool, blur: tuple[float, float]) -> Image.Image:
    if "A" in mask.getbands() and mask.getchannel("A").getextrema() != (255, 255):
        mask = ImageOps.invert(alpha_mask(mask, "mask"))
    gray = flat(mask).convert("L")
    gray = ImageOps.invert(gray) if invert else gray
    return gray.filter(ImageFilter.GaussianBlur(blur)) if max(blur) > 0 else gray


def _hard(mask: Image.Image) -> Image.Image:
    """Where the engine repaints: half white and more."""
    return mask.point([255 * (level >= 128) for level in range(256)])


def _region(mask: Image.Image, padding: int, size: tuple[int, int]) -> Box:
    """The masked part with padding, grown to the proportions of `size` as far as the picture goes."""
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    left, top = max(left - padding, 0), max(top - padding, 0)
    right, bottom = min(right + padding, mask.width), min(bottom + padding, mask.height)
    ratio = size[0] / size[1]
    width = min(max(right - left, round((bottom - top) * ratio)), mask.width)
    height = min(max(bottom - top, round(width / ratio)), mask.height)
    left = min(max((left + right - width) // 2, 0), mask.width - width)
    top = min(max((top + bottom - height) // 2, 0), mask.height - height)
    return left, top, left + width, top + height


def fitted(image: Image.Image, size: tuple[int, int], fit: Fit) -> Image.Image:
    """`image` at this size: stretched, cut to cover it, or contained in it."""
    if fit == "cover":
        return covering(image, *size)
    if fit == "contain":
        return contained(image, *size)
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
