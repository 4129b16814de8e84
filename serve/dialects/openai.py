"""The OpenAI Images API, for the `openai` package and whatever else speaks it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..documentation import OPEN
from ..jobs import jobs_of
from ..pictures import picture
from ..refusal import Refusal
from ..service import Client, Service
from ..work import Finished, ModelCard
from . import openai_bodies as bodies
from . import streams
from .forms import form_schema, one_file, read_form
from .openai_events import Kind, error_body, server_sent
from .openai_works import Asked, Source, asked, mask_of, usage
from .parts import PICTURE_FILES, base64_text, begun, client_names

ROUTES = ("/v1/images", "/v1/models")
MAKES = ("/v1/images/",)
"""Paths below which a POST asks for images."""
STATUSES = {422: 400}
"""Statuses that this API has another one for."""
FILE: dict[int | str, dict[str, Any]] = {200: {"content": PICTURE_FILES}}


def _answers(kind: Kind) -> dict[int | str, dict[str, Any]]:
    events = streams.described(f"{kind}.partial_image", f"{kind}.completed")
    return {200: {"model": bodies.Images, "content": events}}


def refused(refusal: Refusal, request_id: str) -> dict[str, Any]:
    """The error JSON; its request id is in the header `x-request-id`, where the SDK looks."""
    return error_body(refusal)


def router(service: Service) -> APIRouter:
    """Generations, edits, variations, models."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI Images"])
    started = int(time.time())

    def described(card: ModelCard) -> bodies.Model:
        return bodies.Model(id=card.name, created=started, adapters=list(card.adapters))

    @routes.post("/images/generations", responses=_answers("image_generation"))
    async def generate(http: Request, body: bodies.Generation) -> Response:
        """Images from a prompt; with `stream` as server-sent events."""
        client = await service.client(http)
        wanted = asked(body, await service.model(body.model))
        return await _answer(service, http, client, wanted, "image_generation")

    @routes.get("/images/content/{name}", responses=FILE, response_class=Response, openapi_extra=OPEN)
    async def content(http: Request, name: str) -> Response:
        """A picture by the URL of an answer, for as long as the service keeps results. The URL is the key."""
        data = await jobs_of(http).published(name)
        return Response(
            data,
            media_type=f"image/{name.partition('.')[2]}",
            headers={"cross-origin-resource-policy": "cross-origin"},  # chat pages show it
        )

    @routes.post(
        "/images/edits",
        responses=_answers("image_edit"),
        openapi_extra=form_schema(
            bodies.Edit,
            image="PNG, JPEG or WebP; `image[]` works too. Without a mask, its own transparency is one. *",
            mask="As large as the image; what is transparent here is repainted, the rest stays as it is.",
        ),
    )
    async def edit(http: Request) -> Response:
        """An image made anew, or within a mask, by a prompt."""
        client = await service.client(http)
        body, files = await read_form(http, bodies.Edit, ("image", "mask"))
        wanted = await _from_image(service, body, files)
        return await _answer(service, http, client, wanted, "image_edit")

    @routes.post(
        "/images/variations",
        response_model=bodies.Images,
        openapi_extra=form_schema(bodies.Variation, image="PNG, JPEG or WebP. *"),
    )
    async def variation(http: Request) -> Response:
        """Images like a given one."""
        client = await service.client(http)
        body, files = await read_form(http, bodies.Variation, ("image",))
        wanted = await _from_image(service, body, files)
        return await _answer(service, http, client, wanted, "image_edit")

    @routes.get("/models")
    async def models(http: Request) -> bodies.Models:
        """All models, the default one first."""
        await service.client(http)
        return bodies.Models(data=[described(card) for card in await service.models()])

    @routes.get("/models/{name:path}")
    async def model(http: Request, name: str) -> bodies.Model:
        """One model."""
        await service.client(http)
        return described(await service.model(name))

    return routes


async def _from_image(
    service: Service, body: bodies.Edit | bodies.Variation, files: Mapping[str, list[bytes]]
) -> Asked:
    """What a form with pictures asks for; they are decoded and scaled beside the event loop."""
    card, pixels = await service.model(body.model), service.config.limits.source_pixels

    def prepared() -> Asked:
        image = picture(one_file(files, "image"), "image", pixels=pixels)
        if isinstance(body, bodies.Variation):
            return asked(body, card, Source(image), pixels)
        mask = picture(one_file(files, "mask"), "mask", pixels=pixels) if "mask" in files else None
        return asked(body, card, Source(image, mask_of(image, mask)), pixels)

    return await asyncio.to_thread(prepared)


async def _answer(service: Service, http: Request, client: Client, wanted: Asked, kind: Kind) -> Response:
    """Make the images; errors speak of the body's own names."""
    with client_names(wanted.names):
        if wanted.partial_images is not None:
            events = await begun(service.stream(http, client, wanted.works), 1, streams.KEEP_ALIVE)
            return streams.event_stream(server_sent(http, events, wanted, kind))
        finished = await service.make(http, client, wanted.works)
    answer = bodies.Images(
        created=int(time.time()),
        data=[await _data(http, f, wanted) for f in finished],
        output_format=wanted.works[0].format,
        quality=wanted.quality,
        size=f"{finished[0].request.width}x{finished[0].request.height}",
        usage=usage(wanted, len(finished)),
        safety_identifier=wanted.safety_identifier,
    )
    return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")


async def _data(http: Request, finished: Finished, wanted: Asked) -> bodies.ImageData:
    if not wanted.by_url:
        return bodies.ImageData(b64_json=base64_text(finished.data), seed=finished.request.seed)
    name = await jobs_of(http).publish(finished.data, wanted.works[0].format)
    return bodies.ImageData(url=f"{http.base_url}v1/images/content/{name}", seed=finished.request.seed)
