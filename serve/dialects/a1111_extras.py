"""AUTOMATIC1111's "extras": pictures at another size, by plain resampling."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from diffray.model import InvalidRequest

from ..pictures import picture_texts
from .a1111_bodies import Extras
from .a1111_catalogue import UPSCALERS
from .parts import base64_text, covering, flat

FILTERS = {"Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}
Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Resizing:
    """A picture, the size that it is scaled to, and the size that is then cut out of its middle."""

    image: Image.Image
    scaled: Size
    cut: Size
    method: Image.Resampling

    @property
    def cost(self) -> float:
        """In megapixel-steps, as images have it: the result's pixels, once."""
        return self.scaled[0] * self.scaled[1] / 1e6

    def made(self) -> str:
        """The result as the base64 of a PNG."""
        image = flat(self.image)
        if image.size != self.scaled:
            image = image.resize(self.scaled, self.method)
        sink = io.BytesIO()
        covering(image, *self.cut).save(sink, "PNG")
        return base64_text(sink.getvalue())


def resizings(texts: Sequence[str], field: str, body: Extras, pixels: int) -> list[Resizing]:
    """What is to be done to the pictures in some texts.

    Raises:
        InvalidRequest: a picture cannot be read, the pictures or the results have more than `pixels` together, or it
            would take a network.
    """
    _refuse_networks(body)
    found, left = [], pixels
    for image in picture_texts(texts, field, pixels=pixels):
        resizing = _resizing(image, body)
        across, down = resizing.scaled
        if across * down > left:
            name = "upscaling_resize_w" if body.resize_mode == 1 else "upscaling_resize"
            rest = f", of which {left} are left" if left < pixels else ""
            raise InvalidRequest(name, f"makes {across}x{down}, allowed are {pixels} pixels{rest}")
        left -= across * down
        found.append(resizing)
    return found


def _resizing(image: Image.Image, body: Extras) -> Resizing:
    if body.upscaler_1 == "None":
        return Resizing(image, image.size, image.size, FILTERS["Nearest"])
    wanted = body.upscaling_resize_w, body.upscaling_resize_h
    exact = body.resize_mode == 1
    scale = max(wanted[0] / image.width, wanted[1] / image.height) if exact else body.upscaling_resize
    scaled = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    return Resizing(
        image, scaled, wanted if exact and body.upscaling_crop else scaled, FILTERS[body.upscaler_1]
    )


def _refuse_networks(body: Extras) -> None:
    if body.upscaler_1 not in UPSCALERS:
        raise InvalidRequest(
            "upscaler_1", f"got {body.upscaler_1!r}, allowed is one of {', '.join(UPSCALERS)}"
        )
    for name in ("extras_upscaler_2_visibility", "gfpgan_visibility", "codeformer_visibility"):
        if getattr(body, name):
            raise InvalidRequest(name, f"got {getattr(body, name)}, only 0 is supported")
