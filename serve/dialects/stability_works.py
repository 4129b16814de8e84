"""What bodies of Stability's API ask for, as work for the engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image, ImageOps

from diffray.model import ImageRequest, InvalidRequest

from ..work import ModelCard, Work
from . import stability_bodies as bodies
from .parts import alpha_mask, area_size, check_area, check_mask, covering, flat, grown, seeds

V1_FIELDS = {
    "guidance_scale": "cfg_scale",
    "prompt": "text_prompts",
    "negative_prompt": "text_prompts",
    "mask": "mask_image",
}
"""The client's names of request fields that v1 calls otherwise."""
V2_FIELDS = {
    "guidance_scale": "cfg_scale",
    "init_image": "image",
    "width": "aspect_ratio",
    "height": "aspect_ratio",
}
"""The same for v2beta."""
SEEDS = 2**32


def v1_works(
    body: bodies.V1, card: ModelCard, image: Image.Image | None, mask: Image.Image | None, pixels: int
) -> list[Work]:
    """The images of a v1 body, from a picture and within a mask where there are any.

    Raises:
        InvalidRequest: a value is not allowed, or would have no effect.
    """
    _refuse_style(body.style_preset)
    if getattr(body, "extras", None):
        raise InvalidRequest("extras", "must be empty: there are none")
    prompt, negative = prompts_of(body.text_prompts)
    request = ImageRequest(
        prompt=prompt,
        negative_prompt=negative,
        width=body.width,
        height=body.height,
        steps=body.steps,
        guidance_scale=body.cfg_scale,
        sampler=body.sampler,
    )
    if image is not None:
        size = body.width or _side(image.width, card), body.height or _side(image.height, card)
        check_area(*size, pixels)
        source = _sourced(card, image, mask, size)
        request = replace(request, **source, strength=_v1_strength(body))
    return _works(request, card, body.seed, body.samples, "png")


def v2_works(
    body: bodies.Generate | bodies.Inpaint,
    card: ModelCard,
    image: Image.Image | None,
    mask: Image.Image | None,
    pixels: int,
) -> list[Work]:
    """The image of a v2beta body.

    Raises:
        InvalidRequest: a value is not allowed, or would have no effect.
    """
    _refuse_style(body.style_preset)
    request = ImageRequest(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        steps=body.steps,
        guidance_scale=body.cfg_scale,
    )
    strength: float | None = 1.0
    if isinstance(body, bodies.Generate):
        _check_mode(body, image)
        strength = body.strength
        if body.aspect_ratio is not None:
            across, _, down = body.aspect_ratio.partition(":")
            width, height = area_size(card, int(across) / int(down))
            request = replace(request, width=width, height=height)
    elif mask is not None and body.grow_mask:
        mask = grown(mask, body.grow_mask)
    if image is not None:
        size = area_size(card, image.width / image.height)
        check_area(*size, pixels)
        request = replace(request, **_sourced(card, image, mask, size), strength=strength)
    return _works(request, card, body.seed, 1, body.output_format)


def prompts_of(prompts: Sequence[bodies.TextPrompt]) -> tuple[str, str | None]:
    """(prompt, negative prompt) of weighted prompts.

    A single positive prompt of weight 1, the common case, is taken as it is; others become `(text:weight)`.
    """
    sides: dict[bool, list[str]] = {True: [], False: []}
    for prompt in prompts:
        weight = 1.0 if prompt.weight is None else prompt.weight
        if weight:
            sides[weight > 0].append(_weighted(prompt.text, abs(weight)))
    if not sides[True]:
        raise InvalidRequest("text_prompts", "got none with a weight above 0, at least one is needed")
    return ", ".join(sides[True]), ", ".join(sides[False]) or None


def masked(source: str, image: Image.Image, mask: Image.Image | None) -> Image.Image:
    """White where a v1 `mask_source` wants the picture repainted.

    Raises:
        InvalidRequest: there is no mask, or it has another size than the picture.
    """
    if source == "INIT_IMAGE_ALPHA":
        return alpha_mask(image, "init_image")
    if mask is None:
        raise InvalidRequest("mask_image", f"got nothing, {source} needs one")
    check_mask(image, mask, "mask_image")
    gray = flat(mask).convert("L")
    return ImageOps.invert(gray) if source == "MASK_IMAGE_BLACK" else gray


def _weighted(text: str, weight: float) -> str:
    if weight == 1:
        return text
    plain = text.replace("\\", r"\\")
    for bracket in "()[]":
        plain = plain.replace(bracket, "\\" + bracket)
    return f"({plain}:{weight:.4g})"


def _v1_strength(body: bodies.V1) -> float:
    """How much of the picture is made anew."""
    if not isinstance(body, bodies.ImageToImage):
        return 1.0
    if body.init_image_mode == "IMAGE_STRENGTH":
        return 1 - body.image_strength
    if body.step_schedule_end:
        raise InvalidRequest("step_schedule_end", f"got {body.step_schedule_end}, allowed is 0")
    return body.step_schedule_start


def _sourced(
    card: ModelCard, image: Image.Image, mask: Image.Image | None, size: tuple[int, int]
) -> dict[str, Any]:
    """The request's fields of a picture, scaled to the size of the image that is made."""
    if card.task == "upscale":
        return {"init_image": flat(image)}
    fields = {"width": size[0], "height": size[1], "init_image": covering(flat(image), *size)}
    if mask is None:
        return fields
    if not mask.point([255 * (level >= 128) for level in range(256)]).getbbox():
        raise InvalidRequest("mask", "no part of it says what to repaint")
    return fields | {"mask": covering(mask, *size), "paste_back": True}


def _side(pixels: int, card: ModelCard) -> int:
    return max(pixels // card.factor, 1) * card.factor


def _works(request: ImageRequest, card: ModelCard, seed: int, count: int, format: Any) -> list[Work]:
    return [
        Work(request=replace(request, seed=number % SEEDS), model=card.name, format=format)
        for number in seeds(seed or None, count)
    ]


def _check_mode(body: bodies.Generate, image: Image.Image | None) -> None:
    mode = body.mode or ("text-to-image" if image is None else "image-to-image")
    if mode == "text-to-image":
        for field, value in (("image", image), ("strength", body.strength)):
            if value is not None:
                raise InvalidRequest(field, "mode text-to-image takes none")
        return
    if image is None:
        raise InvalidRequest("image", "got nothing, mode image-to-image needs a picture")
    if body.strength is None:
        raise InvalidRequest("strength", "got nothing, it is needed with an image")
    if body.aspect_ratio is not None:
        raise InvalidRequest("aspect_ratio", "not with an image: its own proportions stay")


def _refuse_style(style: str | None) -> None:
    if style is not None:
        raise InvalidRequest(
            "style_preset", f"got {style!r}; presets are not supported, describe it in the prompt"
        )
