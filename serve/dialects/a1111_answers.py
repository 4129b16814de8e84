"""What AUTOMATIC1111's API answers: finished pictures with their infotext, and the state of a client's own work."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from PIL import Image
from starlette.requests import Request

from diffray.model import ImageRequest
from diffray.model.encoding import encode_image, read_provenance
from diffray.model.infotext import SAMPLER_LABELS
from diffray.model.sampling.sampler_names import resolve_sampler

from ..refusal import Refusal
from ..service import Client, RunningView, Service
from ..work import Finished, ModelCard
from .a1111_bodies import Generated, Processing, Progress, ProgressState
from .a1111_settings import Settings
from .a1111_works import Asked
from .parts import base64_text


@dataclass(frozen=True, slots=True)
class Made:
    """One picture's file and what it was made from."""

    data: bytes
    request: ImageRequest


async def made(
    service: Service, http: Request, client: Client, wanted: Asked, card: ModelCard, settings: Settings
) -> list[Made]:
    """All pictures of a body. After an interruption: those that were finished, and the others as far as they came.

    An interruption before anything can be seen is a refusal.

    Raises:
        InvalidRequest, GenerationError, Refusal: as `Service.make`.
    """
    finished: dict[int, Finished] = {}
    previews: dict[int, bytes] = {}
    try:
        async with aclosing(service.stream(http, client, wanted.works)) as events:
            async for index, event in events:
                if isinstance(event, Finished):
                    finished[index] = event
                elif event.preview:
                    previews[index] = event.preview
    except Refusal as refusal:
        if refusal.code != "interrupted" or not (finished or previews):
            raise
    pictures = []
    for index in range(len(wanted.works)):
        if index in finished:
            pictures.append(await asyncio.to_thread(_finished, finished[index], index, wanted, settings))
        elif index in previews:
            pictures.append(
                await asyncio.to_thread(_unfinished, previews[index], index, wanted, card, settings)
            )
    return pictures


def _finished(finished: Finished, index: int, wanted: Asked, settings: Settings) -> Made:
    repaint = wanted.inpaintings[index]
    if repaint is None:
        return Made(finished.data, finished.request)
    with Image.open(io.BytesIO(finished.data)) as image:
        picture = repaint.finished(image.convert("RGB"))
    request = replace(finished.request, init_image=repaint.image)
    data = _encoded(
        picture, request, settings, finished.model, finished.model_checksum, finished.adapter_checksums
    )
    return Made(data, finished.request)


def _unfinished(preview: bytes, index: int, wanted: Asked, card: ModelCard, settings: Settings) -> Made:
    request, repaint = wanted.works[index].request, wanted.inpaintings[index]
    request = request if card.config is None else request.resolved(card.config)
    with Image.open(io.BytesIO(preview)) as small:
        size = request.width or small.width, request.height or small.height
        picture = small.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    picture = picture if repaint is None else repaint.finished(picture)
    return Made(_encoded(picture, request, settings, card.name, card.checksum, {}), request)


def _encoded(
    picture: Image.Image,
    request: ImageRequest,
    settings: Settings,
    model: str,
    checksum: str,
    adapter_checksums: dict[str, str],
) -> bytes:
    return encode_image(
        picture,
        request,
        format=settings.format,
        quality=settings.quality,
        model=model,
        model_checksum=checksum or None,
        adapter_checksums=adapter_checksums,
    )


def generated(body: Processing, pictures: Sequence[Made], card: ModelCard) -> Generated:
    """The answer of txt2img and img2img."""
    parameters = body.model_dump()
    if not getattr(body, "include_init_images", True):
        parameters |= {"init_images": None, "mask": None}
    return Generated(
        images=[base64_text(picture.data) for picture in pictures] if body.send_images else [],
        parameters=parameters,
        info=json.dumps(_info(body, pictures, card)),
    )


def _info(body: Processing, pictures: Sequence[Made], card: ModelCard) -> dict[str, Any]:
    requests = [picture.request for picture in pictures]
    first = requests[0] if requests else ImageRequest(prompt=body.prompt)
    return {
        "prompt": body.prompt,
        "all_prompts": [body.prompt] * len(requests),
        "negative_prompt": body.negative_prompt or "",
        "all_negative_prompts": [body.negative_prompt or ""] * len(requests),
        "seed": first.seed,
        "all_seeds": [request.seed for request in requests],
        "subseed": 0,
        "all_subseeds": [0] * len(requests),
        "subseed_strength": 0,
        "width": first.width,
        "height": first.height,
        "sampler_name": _label(first),
        "cfg_scale": first.guidance_scale,
        "steps": first.steps,
        "batch_size": body.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": card.name,
        "sd_model_hash": card.checksum[:10],
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": body.denoising_strength,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [read_provenance(picture.data).infotext or "" for picture in pictures],
        "styles": [],
        "job_timestamp": _timestamp(time.time()),
        "clip_skip": first.clip_skip + 1,
        "is_using_inpainting_conditioning": card.task == "inpaint",
        "version": f"diffray {version('diffray')}",
    }


def _label(request: ImageRequest) -> str | None:
    return SAMPLER_LABELS[resolve_sampler(request.sampler)[0]] if request.sampler else None


def progress_of(views: Sequence[RunningView], *, with_image: bool) -> Progress:
    """The state of a client's images, all of which run side by side."""
    if not views:
        return Progress(progress=0.0, eta_relative=0.0, state=ProgressState())
    shares = [view.step / view.steps if view.steps else 0.0 for view in views]
    share = min(sum(shares) / len(shares), 0.99)
    started, preview = (
        min(view.started for view in views),
        next((v.preview for v in views if v.preview), None),
    )
    return Progress(
        # Never 0 while something runs: clients take that for an idle service.
        progress=max(share, 0.01),
        eta_relative=(time.time() - started) * (1 - share) / share if share else 0.0,
        state=ProgressState(
            job=f"diffray({len(views)} running)",
            job_count=len(views),
            job_timestamp=_timestamp(started),
            sampling_step=views[0].step,
            sampling_steps=views[0].steps,
            interrupted=any(view.interrupted.is_set() for view in views),
        ),
        current_image=base64_text(preview) if preview and with_image else None,
    )


def _timestamp(seconds: float) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.localtime(seconds))
