"""What a body of AUTOMATIC1111's API asks for, as work for the engines; what would be ignored is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from diffray.model import ImageRequest, InvalidRequest, prompt_adapters

from ..pictures import picture_text, picture_texts
from ..work import ModelCard, Work
from .a1111_bodies import ImageToImage, Processing, TextToImage
from .a1111_settings import Settings
from .inpainting import Fit, Inpainting, fitted, inpainting
from .parts import check_area, client_names, flat, seeds

PREVIEW_EVERY = 2
"""Steps; an interruption answers with the last preview."""
FIELDS = {
    "guidance_scale": "cfg_scale",
    "sampler": "sampler_name",
    "schedule": "scheduler",
    "strength": "denoising_strength",
    "init_image": "init_images",
    "image_guidance_scale": "image_cfg_scale",
    "clip_skip": "CLIP_stop_at_last_layers",
    "adapters": "prompt",
    "hires_scale": "hr_scale",
    "hires_strength": "denoising_strength",
    "hires_steps": "hr_second_pass_steps",
    "hires_upscale": "hr_upscaler",
}
"""The client's names of request fields that it calls otherwise."""
UPSCALES = {
    "Latent": "latent",
    "Latent (nearest-exact)": "latent-nearest",
    "Latent (nearest)": "latent-nearest",  # what infotexts call it
    "Lanczos": "lanczos",
    "None": "lanczos",  # AUTOMATIC1111 resizes with Lanczos then, too
}
RESIZE_MODES: tuple[Fit, ...] = ("stretch", "cover", "contain")
NOTHING: tuple[object, ...] = (None, "", "None", False, 0, -1)
REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "styles": ((None, []), "there are no styles"),
    "subseed_strength": ((None, 0), "variations between seeds are not supported"),
    "seed_resize_from_h": (NOTHING, "resizing the noise of a seed is not supported"),
    "seed_resize_from_w": (NOTHING, "resizing the noise of a seed is not supported"),
    "restore_faces": (NOTHING, "face restoration is not supported"),
    "tiling": (NOTHING, "tiling pictures are not supported"),
    "s_min_uncond": (NOTHING, "it is not supported"),
    "s_churn": (NOTHING, "it is not supported"),
    "s_noise": ((None, 1), "it is not supported"),
    "refiner_checkpoint": (NOTHING, "refiners are not supported here"),
    "infotext": (NOTHING, "send the parameters themselves"),
    "script_name": (NOTHING, "there are no scripts"),
    "firstphase_width": (NOTHING, "use hr_scale"),
    "firstphase_height": (NOTHING, "use hr_scale"),
    "hr_checkpoint_name": ((*NOTHING, "Use same checkpoint"), "the second pass has the first one's"),
    "hr_prompt": (NOTHING, "the second pass has the first one's"),
    "hr_negative_prompt": (NOTHING, "the second pass has the first one's"),
    "initial_noise_multiplier": ((None, 1), "it is not supported"),
}
"""Fields that would change the picture in ways that are not supported: allowed values, and what to say."""
HYPERNETWORK = re.compile(r"<hypernet:[^>]*>")


@dataclass(frozen=True, slots=True)
class Asked:
    """A body as work, the seeds of its images, and how to finish an inpainted picture."""

    works: Sequence[Work]
    inpaintings: Sequence[Inpainting | None]


def text_works(body: TextToImage, card: ModelCard, settings: Settings) -> Asked:
    """The images of a txt2img body.

    Raises:
        InvalidRequest: a value is not allowed; the error has the body's own name for it.
    """
    refuse_unsupported(body)
    with client_names(FIELDS):
        request = replace(_request(body, settings), **_hires(body, card))
        return _asked(body, card, settings, [(request, None)])


def image_works(
    body: ImageToImage,
    card: ModelCard,
    settings: Settings,
    pixels: int,
) -> Asked:
    """The images of an img2img body, from pictures of so many pixels together and scaled to as many at most.

    Raises:
        InvalidRequest: a value is not allowed; the error has the body's own name for it.
    """
    refuse_unsupported(body)
    _refuse_image_options(body)
    with client_names(FIELDS):
        common = _request(body, settings)
        if body.image_cfg_scale is not None and card.task == "edit":
            common = replace(common, image_guidance_scale=body.image_cfg_scale)
        strength = 0.75 if body.denoising_strength is None else body.denoising_strength
        check_area(body.width, body.height, pixels)
        common = replace(common, width=body.width or card.width, height=body.height or card.height)
        mask = picture_text(body.mask, "mask", pixels=pixels) if body.mask else None
        pairs = []
        for picture in picture_texts(body.init_images, "init_images", pixels=pixels):
            image, hole, repaint = _source(body, card, picture, mask)
            request = replace(common, init_image=image, mask=hole, strength=strength)
            pairs.append((request, repaint))
        return _asked(body, card, settings, pairs)


def refuse_unsupported(body: Processing) -> None:
    """Raises InvalidRequest if something is asked for that would not show in the picture."""
    for name, (allowed, reason) in REFUSED.items():
        value = getattr(body, name, None)
        if value not in allowed and (not name.startswith("hr_") or getattr(body, "enable_hr", False)):
            raise InvalidRequest(name, f"got {value!r}; {reason}")
    for script, values in (body.alwayson_scripts or {}).items():
        arguments = values.get("args") if isinstance(values, dict) else values
        if not _switched_off(arguments):
            raise InvalidRequest("alwayson_scripts", f"got {script!r}; there are no scripts or extensions")
    for name in ("prompt", "negative_prompt"):
        network = HYPERNETWORK.search(getattr(body, name) or "")
        if network:
            raise InvalidRequest(name, f"got {network[0]}; hypernetworks are not supported")


def _switched_off(arguments: object) -> bool:
    """No arguments, or units that say that they are off."""
    if isinstance(arguments, dict):
        return arguments.get("enabled") is False
    if isinstance(arguments, list):
        return all(_switched_off(argument) for argument in arguments)
    return arguments in (None, False)


def _refuse_image_options(body: ImageToImage) -> None:
    if body.resize_mode == 3:
        raise InvalidRequest("resize_mode", "got 3 (latent), allowed is 0, 1 or 2")
    if body.mask and body.inpainting_fill == 3:
        raise InvalidRequest("inpainting_fill", "got 3 (latent nothing), allowed is 0 or 1")
    if body.mask and body.inpainting_fill == 2 and body.denoising_strength != 1:
        raise InvalidRequest("inpainting_fill", "got 2 (latent noise), allowed at denoising_strength 1 only")
    if len(body.init_images) not in (1, body.batch_size):
        count = len(body.init_images)
        raise InvalidRequest("init_images", f"got {count}, allowed is one, or one for each of a batch")


def _request(body: Processing, settings: Settings) -> ImageRequest:
    sampler = body.sampler_name or body.sampler_index
    prompt, adapters = prompt_adapters(body.prompt)
    with client_names({"prompt": "negative_prompt"}):
        negative, more = prompt_adapters(body.negative_prompt or "")
    return ImageRequest(
        prompt=prompt,
        negative_prompt=negative or None,  # zeros on SDXL, as AUTOMATIC1111 does
        adapters=adapters + more,
        width=body.width,
        height=body.height,
        steps=body.steps,
        guidance_scale=body.cfg_scale,
        sampler=sampler,
        schedule=body.scheduler or ("automatic" if sampler else None),
        eta=body.eta,
        clip_skip=settings.clip_stop - 1,
    )


def _asked(
    body: Processing,
    card: ModelCard,
    settings: Settings,
    pairs: Sequence[tuple[ImageRequest, Inpainting | None]],
) -> Asked:
    """All images of a body; those of one batch take turns with the source pictures."""
    count = body.batch_size * body.n_iter
    works, inpaintings = [], []
    for index, seed in enumerate(seeds(None if body.seed in (None, -1) else body.seed, count)):
        request, repaint = pairs[index % len(pairs)]
        works.append(
            Work(
                request=replace(request, seed=seed),
                model=card.name,
                # An inpainted picture is composed and written again, so it must come without loss.
                format="png" if repaint else settings.format,
                quality=settings.quality,
                preview_every=PREVIEW_EVERY,
            )
        )
        inpaintings.append(repaint)
    return Asked(works, inpaintings)


def _hires(body: TextToImage, card: ModelCard) -> dict[str, Any]:
    if not body.enable_hr:
        return {}
    for name, own in (("hr_sampler_name", body.sampler_name), ("hr_scheduler", body.scheduler)):
        value = getattr(body, name)
        if value not in (None, "", own, f"Use same {name.removeprefix('hr_').removesuffix('_name')}"):
            raise InvalidRequest(name, f"got {value!r}; the second pass has the first one's")
    upscaler = body.hr_upscaler or "Latent"
    if upscaler not in UPSCALES:
        raise InvalidRequest("hr_upscaler", f"got {upscaler!r}, allowed is one of {', '.join(UPSCALES)}")
    return {
        "hires_scale": _hires_scale(body, card),
        "hires_strength": 0.75 if body.denoising_strength is None else body.denoising_strength,
        "hires_steps": body.hr_second_pass_steps or None,
        "hires_upscale": UPSCALES[upscaler],
    }


def _hires_scale(body: TextToImage, card: ModelCard) -> float:
    width, height = body.width or card.width, body.height or card.height
    if not body.hr_resize_x and not body.hr_resize_y:
        return body.hr_scale
    across, down = body.hr_resize_x / width, body.hr_resize_y / height
    if across and down and abs(across * height - body.hr_resize_y) >= card.factor:
        asked = f"{body.hr_resize_x}x{body.hr_resize_y}"
        raise InvalidRequest("hr_resize_x", f"got {asked} from {width}x{height}, proportions must stay")
    return across or down


def _source(
    body: ImageToImage, card: ModelCard, image: Image.Image, mask: Image.Image | None
) -> tuple[Image.Image, Image.Image | None, Inpainting | None]:
    """Picture and mask for the engine, and the way back of an inpainting."""
    size = body.width or card.width, body.height or card.height
    fit = RESIZE_MODES[body.resize_mode]
    if card.task == "upscale":
        return flat(image), None, None
    if mask is None:
        return fitted(flat(image), size, fit), None, None
    blur = 4 if body.mask_blur is None else body.mask_blur
    prepared = inpainting(
        image,
        mask,
        size,
        fit=fit,
        invert=bool(body.inpainting_mask_invert),
        blur=(
            blur if body.mask_blur_x is None else body.mask_blur_x,
            blur if body.mask_blur_y is None else body.mask_blur_y,
        ),
        fill=body.inpainting_fill == 0,
        padding=body.inpaint_full_res_padding if body.inpaint_full_res else None,
    )
    return prepared.image, prepared.mask, prepared
