"""Between PIL images and tensors, by the rules of diffusers' `VaeImageProcessor`.

RGB after EXIF rotation, Lanczos resize, [0, 1] to [-1, 1] and back with rounding to the nearest level (the
original repositories truncate; the difference is one level of 255).
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .errors import GenerationError


def rgb(image: Image.Image, width: int, height: int) -> Image.Image:
    """`image` upright, in RGB, at `width` x `height`; alpha is dropped, not blended."""
    upright = _eight_bit(ImageOps.exif_transpose(image)).convert("RGB")
    if upright.size == (width, height):
        return upright
    return upright.resize((width, height), Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Tensor:
    """[3, H, W] float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return pixels.permute(2, 0, 1) / 127.5 - 1


def mask_tensor(mask: Image.Image, width: int, height: int) -> Tensor:
    """[1, H, W] float32, 1 where the mask is at least half white (repaint), else 0 (keep)."""
    gray = _eight_bit(ImageOps.exif_transpose(mask)).convert("L")
    if gray.size != (width, height):
        gray = gray.resize((width, height), Image.Resampling.LANCZOS)
    return (torch.from_numpy(np.array(gray, dtype=np.float32)) / 255 >= 0.5).float()[None]


def gray_tensor(image: Image.Image, width: int, height: int) -> Tensor:
    """[1, H, W] float32 in the picture's own unit, at its full depth (16 bits, float): for depth maps."""
    upright = ImageOps.exif_transpose(image)
    gray = upright if _deep(upright) else upright.convert("L")
    levels = Image.fromarray(np.asarray(gray, dtype=np.float32))
    if levels.size != (width, height):
        levels = levels.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(levels))[None]


def _deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit gray at 8 bits (Pillow's own conversion clips everything above 255 to white)."""
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    levels = np.asarray(image, dtype=np.float64) / 257
    return Image.fromarray(levels.clip(0, 255).round().astype(np.uint8))


def pasted(image: Image.Image, source: Image.Image, mask: Image.Image) -> Image.Image:
    """`image` where the mask repaints, the source's own pixels elsewhere."""
    repaint = mask_tensor(mask, *image.size)[0].mul(255).byte().numpy()
    return Image.composite(image, rgb(source, *image.size), Image.fromarray(repaint))


def to_image(pixels: Tensor) -> Image.Image:
    """The PIL image of [3, H, W] in [-1, 1]; values outside are clamped.

    Raises:
        GenerationError: a value is not finite.
    """
    if not bool(pixels.isfinite().all()):
        raise GenerationError("decoded image: got non-finite values")
    levels = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())
