"""Pictures that clients send: the only place where their bytes are decoded."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Sequence

from PIL import Image, ImageOps

from diffray.model import InvalidRequest

FORMATS = ("PNG", "JPEG", "WEBP")
DATA_URI = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(;[\w=.+-]+)*;base64,", re.ASCII)
URL = re.compile(r"\s*[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def picture(data: bytes, field: str, *, pixels: int, used: int = 0) -> Image.Image:
    """The first frame of PNG, JPEG or WebP bytes, upright, loaded, without metadata.

    Raises:
        InvalidRequest: as `opened`, or it is broken.
    """
    image = opened(data, field, pixels=pixels, used=used)
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
    except Exception as error:
        raise _unreadable(field) from error
    if upright.mode not in ("RGB", "RGBA", "L", "LA", "I;16", "I"):
        upright = upright.convert("RGBA" if "transparency" in upright.info or "A" in upright.mode else "RGB")
    upright.info.clear()
    return upright


def opened(data: bytes, field: str, *, pixels: int, used: int = 0) -> Image.Image:
    """A picture of which only the beginning was read: nothing is decoded that has more pixels than allowed.

    Args:
        field: the name by which the client knows it, for errors.
        pixels: width x height at most.
        used: how many of them other pictures of the request have.

    Raises:
        InvalidRequest: no PNG, JPEG or WebP, or too large.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise _unreadable(field) from error
    if image.width * image.height > pixels - used:
        others = f" together, {used} of them in others" if used else ""
        raise InvalidRequest(field, f"got {image.width}x{image.height}, allowed are {pixels} pixels{others}")
    return image


def _unreadable(field: str) -> InvalidRequest:
    return InvalidRequest(field, "got no readable picture, allowed are PNG, JPEG and WebP")


def picture_text(text: str, field: str, *, pixels: int) -> Image.Image:
    """The picture in base64 text, with or without a `data:` prefix. No other URL is ever followed.

    Raises:
        InvalidRequest: as `picture`, or the text is no base64.
    """
    return picture(picture_bytes(text, field), field, pixels=pixels)


def picture_texts(texts: Sequence[str], field: str, *, pixels: int) -> list[Image.Image]:
    """The pictures in several texts, as `picture_text`, of so many pixels together.

    Raises:
        InvalidRequest: as `picture_text`.
    """
    found: list[Image.Image] = []
    for text in texts:
        used = sum(image.width * image.height for image in found)
        found.append(picture(picture_bytes(text, field), field, pixels=pixels, used=used))
    return found


def picture_bytes(text: str, field: str) -> bytes:
    """What base64 text holds, with or without a `data:` prefix; nothing is decoded yet.

    Raises:
        InvalidRequest: the text is no base64.
    """
    prefix = DATA_URI.match(text)
    if prefix is None and URL.match(text[:40]):
        raise InvalidRequest(field, "got a URL, allowed is base64 or a data: URI")
    try:
        return base64.b64decode("".join(text[prefix.end() if prefix else 0 :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(field, "got no base64") from error
