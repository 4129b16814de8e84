"""Our own API, /v1/diffray: every field of `ImageRequest`, waited for, streamed, or fetched later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response

from diffray.model.encoding import MEDIA_TYPES
from diffray.model.sampling.sampler_names import SAMPLER_NAMES
from diffray.model.sampling.schedule import SCHEDULES

from .. import failures
from ..jobs import Job, jobs_of
from ..refusal import Refusal
from ..service import Service
from ..work import Event, Finished, Work
from . import streams
from .native_bodies import Catalogue, ImagesAnswer, ImagesBody, JobBody, JobState, Made, ModelFacts
from .parts import PICTURE_FILES, base64_text, begun

ROUTES = ("/",)
MAKES = ("/v1/diffray/images", "/v1/diffray/jobs")
"""Paths below which a POST asks for images."""
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ImagesAnswer,
        "content": {**streams.described("progress", "result"), **PICTURE_FILES},
    }
}
FILE: dict[int | str, dict[str, Any]] = {200: {"content": PICTURE_FILES}}


def refused(refusal: Refusal, request_id: str) -> dict[str, Any]:
    """The native form of an error."""
    error: dict[str, Any] = {
        "code": refusal.code,
        "message": refusal.message,
        "field": refusal.field,
        "request_id": request_id,
    }
    if refusal.retry_after is not None:
        error["retry_after"] = round(refusal.retry_after, 1)
    return {"error": error}


def router(service: Service) -> APIRouter:
    """Images, jobs, models."""
    routes = APIRouter(prefix="/v1/diffray", tags=["diffray"])
    pixels = service.config.limits.source_pixels

    @routes.get("/models")
    async def models(http: Request) -> Catalogue:
        """What can be asked for; the first model is the default."""
        await service.client(http)
        found = [ModelFacts.model_validate(asdict(card)) for card in await service.models()]
        return Catalogue(models=found, samplers=list(SAMPLER_NAMES), schedules=list(SCHEDULES))

    @routes.post("/images", responses=ANSWERS, response_model=ImagesAnswer)
    async def images(http: Request, body: ImagesBody) -> Response:
        """Images as JSON; as server-sent events with `stream`; as one file if `Accept` is an image type.

        Events are `progress` ({index, step, steps, percent, preview}), `result` (as in the JSON answer) and `error`.
        """
        client = await service.client(http)
        card = await service.model(body.model)
        works = await asyncio.to_thread(body.works, card.name, pixels, body.preview_every)
        if body.stream:
            events = await begun(service.stream(http, client, works), 0, streams.KEEP_ALIVE)
            return streams.event_stream(_server_sent(http, events, works))
        finished = await service.make(http, client, works)
        media = MEDIA_TYPES[body.format]
        if len(finished) == 1 and media in http.headers.get("accept", ""):
            return Response(
                finished[0].data, media_type=media, headers={"seed": str(finished[0].request.seed)}
            )
        answer = ImagesAnswer(images=[Made.of(index, f, body.format) for index, f in enumerate(finished)])
        return Response(answer.model_dump_json(), media_type="application/json")

    @routes.post("/jobs", status_code=202)
    async def submit(http: Request, response: Response, body: JobBody) -> JobState:
        """Begin a job; ask for its state at /v1/diffray/jobs/{id}."""
        client = await service.client(http)
        card = await service.model(body.model)
        works = await asyncio.to_thread(body.works, card.name, pixels)
        job = await jobs_of(http).submit(client, works)
        response.headers["location"] = f"/v1/diffray/jobs/{job.id}"
        return _state(job)

    @routes.get("/jobs/{job}")
    async def state(http: Request, job: str) -> JobState:
        """How far a job is."""
        return _state(await jobs_of(http).find(await service.client(http), job))

    @routes.get("/jobs/{job}/images/{index}", responses=FILE, response_class=Response)
    async def picture(http: Request, job: str, index: int) -> Response:
        """A finished picture of a job."""
        data, format = await jobs_of(http).picture(await service.client(http), job, index)
        return Response(data, media_type=f"image/{format}")

    @routes.delete("/jobs/{job}")
    async def cancel(http: Request, job: str) -> JobState:
        """Stop a job at its next step; delete it if it is over."""
        return _state(await jobs_of(http).cancel(await service.client(http), job))

    return routes


def _state(job: Job) -> JobState:
    return JobState.model_validate(asdict(job))


async def _server_sent(
    http: Request, events: AsyncGenerator[tuple[int, Event], None], works: list[Work]
) -> AsyncGenerator[str, None]:
    """The stream; a failure after it has begun is its last event."""
    try:
        async with aclosing(events):
            async for index, event in events:
                if isinstance(event, Finished):
                    yield streams.message("result", Made.of(index, event, works[index].format).model_dump())
                    continue
                facts: dict[str, Any] = {"index": index, "step": event.step, "steps": event.steps}
                facts["percent"] = round(100 * event.step / max(event.steps, 1), 1)
                if event.preview is not None:
                    facts["preview"] = base64_text(event.preview)
                yield streams.message("progress", facts)
    except Exception as error:
        yield streams.message("error", refused(failures.noted(http, error), http.state.request_id))
