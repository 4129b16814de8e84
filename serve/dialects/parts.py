"""What the dialects share: seeds, names of fields, source pictures at the asked size, streams that have begun."""

from __future__ import annotations

import asyncio
import base64
import secrets
from collections.abc import AsyncGenerator, Awaitable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any

import numpy as np
from PIL import Image

from diffray.model import InvalidRequest
from diffray.model.encoding import MEDIA_TYPES
from diffray.model.images import rgb
from diffray.model.sampling.sampler_names import resolve_sampler, resolve_schedule

from ..work import Event, ModelCard, Progress

RANDOM_SEEDS = 2**32 - 1
"""A seed that the service chooses is below this: every dialect's clients can send it back."""


PICTURE_FILES: dict[str, Any] = {
    media: {"schema": {"type": "string", "format": "binary"}} for media in MEDIA_TYPES.values()
}
"""What the document says of an answer that is a picture's file."""


def seeds(first: int | None, count: int) -> list[int]:
    """Seeds of the images of one request: counted up from `first`, or from a random one."""
    start = 1 + secrets.randbelow(RANDOM_SEEDS - 1) if first is None else first
    return [start + index for index in range(count)]


@contextmanager
def client_names(names: Mapping[str, str]) -> Iterator[None]:
    """Errors about a request's fields speak of them by the names that the client used."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(names.get(error.field, error.field), error.reason) from error


def solver(sampler: str | None, scheduler: str | None) -> tuple[str | None, str | None]:
    """(sampler, schedule) where `scheduler` is a noise schedule or, as diffusers has it, a sampler's class.

    Raises:
        InvalidRequest: `scheduler` is neither.
    """
    if scheduler is None:
        return sampler, None
    try:
        resolve_schedule(scheduler)
    except InvalidRequest:
        if sampler is None:
            with client_names({"sampler": "scheduler"}):
                resolve_sampler(scheduler)
            return scheduler, None
        raise
    return sampler, scheduler


def base64_text(data: bytes) -> str:
    """Plain base64, without a `data:` prefix."""
    return base64.b64encode(data).decode("ascii")


async def begun(
    events: AsyncGenerator[tuple[int, Event], None], step: int, seconds: float
) -> AsyncGenerator[tuple[int, Event], None]:
    """`events` from this step on, which is waited for: what is refused is refused before an answer's status is
    sent. After so many seconds it is waited for no longer, as the client would hear nothing for too long.

    Raises:
        InvalidRequest, GenerationError, Refusal: before that step or time.
    """
    until = asyncio.get_running_loop().time() + seconds
    while True:
        first = asyncio.ensure_future(anext(events))
        try:
            await asyncio.wait([first], timeout=max(0.0, until - asyncio.get_running_loop().time()))
        except asyncio.CancelledError:
            first.cancel()
            raise
        if not first.done():
            return continued(first, events)
        _, event = first.result()
        if not isinstance(event, Progress) or event.step >= step:
            return continued(first, events)


async def continued(
    first: Awaitable[tuple[int, Event]], events: AsyncGenerator[tuple[int, Event], None]
) -> AsyncGenerator[tuple[int, Event], None]:
    """`events` with the one that was already asked for."""
    async with aclosing(events):
        yield await first
        async for event in events:
            yield event


def check_area(width: int | None, height: int | None, most: int) -> None:
    """Raises InvalidRequest for a size that pictures should not even be scaled to."""
    if (width or 1) * (height or 1) > most:
        raise InvalidRequest("width", f"got {width}x{height}, allowed are {most} pixels together")


def area_size(card: ModelCard, ratio: float) -> tuple[int, int]:
    """Width and height with about the model's own number of pixels, and proportions near `ratio`.

    Sides are multiples of 64 where the model's own are (those sizes are what models were trained on), else of
    the smallest step that it can do.
    """
    whole = card.width % 64 == 0 and card.height % 64 == 0 and min(card.width, card.height) >= 512
    step = 64 if whole and 64 % card.factor == 0 else card.factor
    area = card.width * card.height
    width, height = (area * ratio) ** 0.5, (area / ratio) ** 0.5
    return max(round(width / step), 1) * step, max(round(height / step), 1) * step


def covering(image: Image.Image, width: int, height: int) -> Image.Image:
    """`image` scaled and cut around its centre to exactly this size, its proportions kept."""
    if image.size == (width, height):
        return image
    scale = max(width / image.width, height / image.height)
    across, down = width / scale, height / scale
    left, top = (image.width - across) / 2, (image.height - down) / 2
    box = (left, top, left + across, top + down)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def contained(image: Image.Image, width: int, height: int) -> Image.Image:
    """`image` scaled to fit into this size, its outermost rows or columns stretched over what stays free."""
    scale = min(width / image.width, height / image.height)
    inner = image.resize(
        (max(round(image.width * scale), 1), max(round(image.height * scale), 1)), Image.Resampling.LANCZOS
    )
    left, top = (width - inner.width) // 2, (height - inner.height) // 2
    right, bottom = left + inner.width, top + inner.height
    whole = Image.new(inner.mode, (width, height))
    whole.paste(inner, (left, top))
    for edge, box in (
        ((0, 0, inner.width, 1), (left, 0, right, top)),
        ((0, inner.height - 1, inner.width, inner.height), (left, bottom, right, height)),
        ((0, 0, 1, inner.height), (0, top, left, bottom)),
        ((inner.width - 1, 0, inner.width, inner.height), (right, top, width, bottom)),
    ):
        across, down = box[2] - box[0], box[3] - box[1]
        if across and down:
            whole.paste(inner.crop(edge).resize((across, down)), box[:2])
    return whole


def flat(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white."""
    if "A" not in image.getbands():
        return rgb(image, *image.size)
    colours = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours).convert("RGB")


def check_mask(image: Image.Image, mask: Image.Image, field: str) -> None:
    """Raises InvalidRequest unless the mask, the client's `field`, has the size of its picture."""
    if mask.size != image.size:
        got, wanted = (f"{picture.width}x{picture.height}" for picture in (mask, image))
        raise InvalidRequest(field, f"got {got}, allowed is the size of the picture, {wanted}")


def alpha_mask(image: Image.Image, field: str, *, most: int = 127) -> Image.Image:
    """White where `image` is transparent (alpha at most `most`), black elsewhere.

    Raises:
        InvalidRequest: it has no transparency.
    """
    if "A" not in image.getbands():
        raise InvalidRequest(field, f"got a {image.mode} picture without an alpha channel, which it needs")
    return image.getchannel("A").point(lambda alpha: 255 if alpha <= most else 0)


def grown(mask: Image.Image, pixels: int) -> Image.Image:
    """A gray `mask` whose white grows by so many pixels on all sides.

    As Pillow's `MaxFilter`, whose time grows with the square of `pixels` and which stops all other threads meanwhile:
    here a largest value of twice as many rows is that of two largest values, and columns follow rows.
    """
    levels, window = np.pad(np.asarray(mask), pixels), 2 * pixels + 1
    for _ in ("rows", "columns"):
        width = 1
        while width < window:
            more = min(width, window - width)
            levels = np.maximum(levels[:-more], levels[more:])
            width += more
        levels = levels.T
    return Image.fromarray(np.ascontiguousarray(levels))
