"""What a body of the OpenAI Images API asks for, as work for the engines."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from diffray.model import AdapterChoice, ImageRequest, InvalidRequest
from diffray.model.request import MAX_SIDE

from ..work import ModelCard, Work
from . import openai_bodies as bodies
from .parts import alpha_mask, area_size, check_area, check_mask, client_names, covering, flat, seeds, solver

Body = bodies.Generation | bodies.Edit | bodies.Variation
STEPS = {"low": 0.5, "high": 1.5, "hd": 1.5, "xhigh": 2.0, "max": 2.0}
"""What a quality means: steps over the model's own number."""
DISTILLED = 8
"""Models with so few steps are made for just these: a quality does not change them."""
QUALITIES = {None: "medium", "auto": "medium", "standard": "medium", "hd": "high"}
"""What answers call a quality that they have no name for."""
FIELDS = {
    "steps": "num_inference_steps",
    "schedule": "scheduler",
    "init_image": "image",
    "adapters": "lora",
}
WORDS = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Source:
    """The picture to start from; white in the mask is repainted."""

    image: Image.Image
    mask: Image.Image | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A body as work, and what its answer needs.

    Attributes:
        names: the body's names of request fields that it calls otherwise.
        partial_images: how many per image of a stream; None is no stream.
        size: of every image, in pixels.
        factor: pixels per latent pixel along a side.
        by_url: the answer has URLs of the images instead of the images.
    """

    works: Sequence[Work]
    names: Mapping[str, str]
    partial_images: int | None
    size: tuple[int, int]
    factor: int
    quality: str
    by_url: bool
    safety_identifier: str | None


def asked(body: Body, card: ModelCard, source: Source | None = None, pixels: int = MAX_SIDE**2) -> Asked:
    """The images that a body asks for; sources are scaled to sizes of so many pixels at most.

    Raises:
        InvalidRequest: a value is not allowed; the error has the body's own name for it.
    """
    _check_output(body)
    size = _size(body, card, source)
    names = FIELDS if body.width or body.height else FIELDS | {"width": "size", "height": "size"}
    with client_names(names):
        if size is not None:
            check_area(*size, pixels)
        request = _request(body, card, size, source)
    streams = isinstance(body, bodies.Streamed) and bool(body.stream)
    partial = (getattr(body, "partial_images", None) or 0) if streams else None
    common = Work(
        request=request,
        model=card.name,
        format=body.output_format or "png",
        quality=max(100 if body.output_compression is None else body.output_compression, 1),
        preview_every=_preview_every(request, card, partial or 0),
    )
    return Asked(
        works=[replace(common, request=replace(request, seed=seed)) for seed in _seeds(body)],
        names=names,
        partial_images=partial,
        size=size or (card.width, card.height),
        factor=card.factor,
        quality=QUALITIES.get(body.quality, body.quality or ""),
        by_url=body.response_format == "url",
        safety_identifier=body.safety_identifier or body.user,
    )


def mask_of(image: Image.Image, mask: Image.Image | None) -> Image.Image | None:
    """White where an edit repaints: the transparent parts of the mask, else those of the image, if any.

    Raises:
        InvalidRequest: the mask has no transparency, or another size than the image.
    """
    if mask is None:
        own = alpha_mask(image, "image") if "A" in image.getbands() else None
        return own if own is not None and own.getbbox() else None
    check_mask(image, mask, "mask")
    white = alpha_mask(mask, "mask")
    if not white.getbbox():
        raise InvalidRequest("mask", "no part of it is transparent, so nothing would be repainted")
    return white


def usage(wanted: Asked, images: int) -> bodies.Usage:
    """What was read, and made of so many images, by the definition in `bodies.Usage`."""
    request = wanted.works[0].request
    text = len(WORDS.findall(f"{request.prompt} {request.negative_prompt or ''}"))
    width, height = wanted.size
    each = (width // wanted.factor) * (height // wanted.factor)
    source = 0 if request.init_image is None else each
    return bodies.Usage(
        input_tokens=text + source,
        input_tokens_details=bodies.InputDetails(text_tokens=text, image_tokens=source),
        output_tokens=each * images,
        total_tokens=text + source + each * images,
    )


def _check_output(body: Body) -> None:
    if body.background == "transparent":
        raise InvalidRequest(
            "background", "got 'transparent', the models paint every pixel: allowed is opaque"
        )
    if body.output_format in (None, "png") and body.output_compression not in (None, 100):
        raise InvalidRequest("output_compression", f"got {body.output_compression}, png allows only 100")
    if isinstance(body, bodies.Streamed) and body.partial_images and not body.stream:
        raise InvalidRequest("partial_images", "only a stream has partial images: set stream")
    if body.size not in (None, "auto") and (body.width or body.height):
        raise InvalidRequest("size", f"got {body.size} beside width or height, allowed is one of them")


def _seeds(body: Body) -> list[int]:
    count = body.n or 1
    if not isinstance(body.seed, list):
        return seeds(body.seed, count)
    if len(body.seed) != count:
        raise InvalidRequest("seed", f"got {len(body.seed)} of them for n = {count}")
    return body.seed


def _size(body: Body, card: ModelCard, source: Source | None) -> tuple[int, int] | None:
    """Pixels of the images; None leaves them to the model."""
    if body.size not in (None, "auto"):
        width, _, height = str(body.size).partition("x")
        return int(width), int(height)
    if source is not None and card.task == "upscale":
        return source.image.width * card.factor, source.image.height * card.factor
    if source is not None and not (body.width or body.height):
        return area_size(card, source.image.width / source.image.height)
    if body.width or body.height:
        return body.width or card.width, body.height or card.height
    return None


def _request(
    body: Body, card: ModelCard, size: tuple[int, int] | None, source: Source | None
) -> ImageRequest:
    sampler, schedule = solver(body.sampler, body.scheduler)
    width, height = size or (None, None)
    request = ImageRequest(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        adapters=tuple(AdapterChoice(lora.name, lora.scale) for lora in body.lora or ()),
        width=width,
        height=height,
        steps=_steps(body, card),
        guidance_scale=body.guidance_scale,
        guidance_rescale=body.guidance_rescale or 0.0,
        clip_skip=body.clip_skip or 0,
        sampler=sampler,
        schedule=schedule,
    )
    return request if source is None else replace(request, **_of_source(body, card, size, source))


def _of_source(body: Body, card: ModelCard, size: tuple[int, int] | None, source: Source) -> dict[str, Any]:
    """The fields of a picture to start from, scaled to the size of the image that is made."""
    strength = body.strength if isinstance(body, bodies.FromImage) else None
    if size is None or card.task == "upscale":
        return {"init_image": flat(source.image), "strength": strength}
    if source.mask is None:
        return {"init_image": covering(flat(source.image), *size), "strength": strength}
    # Within a mask an edit replaces; what is outside keeps its pixels.
    strength = 1.0 if strength is None else strength
    mask = covering(source.mask, *size)
    image = covering(source.image, *size)
    return {"init_image": image, "mask": mask, "strength": strength, "paste_back": True}


def _steps(body: Body, card: ModelCard) -> int | None:
    if body.num_inference_steps is not None or body.quality not in STEPS or card.steps <= DISTILLED:
        return body.num_inference_steps
    return max(round(card.steps * STEPS[body.quality]), 1)


def _preview_every(request: ImageRequest, card: ModelCard, partial: int) -> int:
    """Steps between two previews, so that `partial` of them are spread over the steps that run."""
    strength = 1.0 if request.strength is None else request.strength
    steps = math.floor((request.steps or card.steps) * strength)
    return max(steps // (partial + 1), 1) if partial else 0
