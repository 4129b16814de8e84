"""Source pictures: from bytes to the few modes that requests take, by fixed rules.

formats      PNG, JPEG, WebP, BMP, TIFF, GIF; of several frames the first
orientation  turned upright by EXIF, for masks and depth maps too
alpha        the background colour shows through (`pictures.background`); under a mask it is black
16 bits      each level divided by 257; depth maps keep theirs
palette, CMYK, YCbCr, gray    to RGB; colour profiles are ignored
float        refused, but for depth maps
size         refused by the header beyond `max_pixels`, before anything is decoded
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from diffray.model.errors import InvalidRequest

from ..options import Pictures
from .frames import kept

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
_DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def picture(data: bytes, field: str, rules: Pictures) -> Image.Image:
    """The picture in a file's bytes: RGB as `init_image`; 1, L, P or 16 bits as `mask`; L, 16 bits or F as `depth`.

    Raises:
        InvalidRequest: for `field`: not such a picture, broken, too large, or of a kind that has no rule.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > rules.max_pixels:
            raise InvalidRequest(
                field, f"got {width}x{height}, allowed are {rules.max_pixels} pixels (pictures.max_pixels)"
            )
        image.load()
        upright = ImageOps.exif_transpose(image)
        made = {"mask": _mask, "depth": _depth}.get(field, _colour)(upright, rules)
    except InvalidRequest:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        # Pillow names its stream by an address in memory, which is another one each time.
        known = re.sub(r" ?<_io\.BytesIO object at 0x[0-9a-f]+>", "", f"{type(error).__name__}: {error}")[
            :300
        ]
        raise InvalidRequest(field, f"cannot be read as {', '.join(FORMATS)}: {known}") from None
    return made


def fitted(
    pictures: dict[str, Image.Image], rules: Pictures, width: int | None, height: int | None
) -> dict[str, Image.Image]:
    """Pictures of one row, cut to the shape of `width` x `height` if that is wanted, and none too large.

    What is done to one is done to all, so that a mask stays where it was; masks are resized by nearest value.
    """
    pictures = {name: _cut(image, kept(image.size, rules, width, height)) for name, image in pictures.items()}
    if rules.max_side is None:
        return pictures
    most = rules.max_side
    return {name: _shrunk(image, most, exact=name == "mask") for name, image in pictures.items()}


def _colour(image: Image.Image, rules: Pictures) -> Image.Image:
    image = _eight_bit(image)
    if image.mode == "F":
        raise InvalidRequest("init_image", "got float pixels, which have no range of their own")
    if image.has_transparency_data or image.mode in ("RGBa", "La"):
        top = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", top.size, rules.background), top).convert("RGB")
    return image.convert("RGB")


def painted(mask: Image.Image, classes: Sequence[int] | None = None) -> npt.NDArray[np.bool_]:
    """Where a mask is at least half white, or has one of the values `classes`: gray levels, palette indices."""
    if classes:
        return np.isin(np.asarray(mask), classes)
    return np.asarray(_gray(_eight_bit(mask))) >= 128


def _mask(image: Image.Image, rules: Pictures) -> Image.Image:
    """A class map keeps its numbers: palette indices, gray levels of 8 or 16 bits."""
    if image.mode == "F":
        raise InvalidRequest("mask", "got float pixels, allowed are gray levels, classes or colours")
    return image if image.mode in ("1", "L", "P", *_DEEP) else _gray(image)


def _gray(image: Image.Image) -> Image.Image:
    if image.has_transparency_data or image.mode in ("RGBa", "La"):
        top = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", top.size, "black"), top)
    return image.convert("L")


def _depth(image: Image.Image, rules: Pictures) -> Image.Image:
    return image if image.mode in (*_DEEP, "F", "L") else image.convert("L")


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode not in _DEEP:
        return image
    levels = np.asarray(image, dtype=np.float64) / 257  # Pillow itself clips everything above 255 to white
    return Image.fromarray(levels.clip(0, 255).round().astype(np.uint8))


def _cut(image: Image.Image, part: tuple[int, int, int, int]) -> Image.Image:
    left, top, width, height = part
    if (width, height) == image.size:
        return image
    return image.crop((left, top, left + width, top + height))


def _shrunk(image: Image.Image, most: int, *, exact: bool) -> Image.Image:
    scale = most / max(image.size)
    if scale >= 1:
        return image
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    return image.resize(size, Image.Resampling.NEAREST if exact else Image.Resampling.LANCZOS)
