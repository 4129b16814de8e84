"""AUTOMATIC1111's "extras": pictures at another size, by plain resampling."""

from __future__ import annotations

import io

from PIL import Image

from diffray.model import InvalidRequest

from ..pictures import picture_text
from .a1111_bodies import Extras
from .a1111_catalogue import UPSCALERS
from .parts import base64_text, covering, flat

FILTERS = {"Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}


def resized(text: str, field: str, body: Extras, pixels: int) -> str:
    """The picture in a text at the size that the body asks for, as the base64 of a PNG.

    Raises:
        InvalidRequest: the picture cannot be read, the result has more than `pixels`, or it would take a network.
    """
    _refuse_networks(body)
    image = flat(picture_text(text, field, pixels=pixels))
    if body.upscaler_1 != "None":
        image = _scaled(image, body, pixels)
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return base64_text(sink.getvalue())


def _scaled(image: Image.Image, body: Extras, pixels: int) -> Image.Image:
    wanted = body.upscaling_resize_w, body.upscaling_resize_h
    exact = body.resize_mode == 1
    scale = max(wanted[0] / image.width, wanted[1] / image.height) if exact else body.upscaling_resize
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    if size[0] * size[1] > pixels:
        name = "upscaling_resize_w" if exact else "upscaling_resize"
        raise InvalidRequest(name, f"makes {size[0]}x{size[1]}, allowed are {pixels} pixels")
    larger = image.resize(size, FILTERS[body.upscaler_1])
    return covering(larger, *wanted) if exact and body.upscaling_crop else larger


def _refuse_networks(body: Extras) -> None:
    if body.upscaler_1 not in UPSCALERS:
        raise InvalidRequest(
            "upscaler_1", f"got {body.upscaler_1!r}, allowed is one of {', '.join(UPSCALERS)}"
        )
    for name in ("extras_upscaler_2_visibility", "gfpgan_visibility", "codeformer_visibility"):
        if getattr(body, name):
            raise InvalidRequest(name, f"got {getattr(body, name)}, only 0 is supported")
