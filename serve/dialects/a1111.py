"""AUTOMATIC1111's /sdapi/v1, for `webuiapi` and whatever else speaks it.

Its state is one process' there; here progress, interrupting and options are each client's own.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from diffray.model import InvalidRequest
from diffray.model.encoding import Provenance, read_provenance
from diffray.model.infotext import parse_infotext

from ..pictures import opened, picture_bytes
from ..refusal import Refusal
from ..service import Service
from ..work import ModelCard
from . import a1111_bodies as bodies
from . import a1111_catalogue as catalogue
from . import a1111_extras as extras
from .a1111_answers import generated, made, progress_of
from .a1111_settings import Kept, Settings, shown
from .a1111_works import FIELDS, Asked, image_works, text_works
from .parts import client_names

ROUTES = ("/sdapi/v1",)
MAKES = ("/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/sdapi/v1/extra-")
"""Paths below which a POST asks for images."""
PAIR = re.compile(r"(\d+)x(\d+)")


def refused(refusal: Refusal, request_id: str) -> dict[str, Any]:
    """The keys that AUTOMATIC1111's own errors have, and the field that is to blame."""
    message = refusal.message
    return {"error": refusal.code, "detail": message, "body": "", "errors": message, "field": refusal.field}


def router(service: Service) -> APIRouter:
    """Everything under /sdapi/v1."""
    routes = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])
    kept = Kept()
    _add_generation(routes, service, kept)
    _add_state(routes, service, kept)
    _add_lists(routes, service, kept)
    _add_pictures(routes, service)
    return routes


def _add_generation(routes: APIRouter, service: Service, kept: Kept) -> None:
    pixels = service.config.limits.source_pixels

    async def answer(
        http: Request, body: bodies.Processing, works: Callable[[ModelCard, Settings], Asked]
    ) -> Response:
        client = await service.client(http)
        service.admission.check_count(body.batch_size * body.n_iter)  # before as many pictures are read
        settings = kept.of(client.id)
        if body.override_settings:
            settings = settings.changed(body.override_settings, await service.models())
            if not body.override_settings_restore_afterwards:
                kept.keep(client.id, settings)
        card = await service.model(settings.model)
        wanted = await asyncio.to_thread(works, card, settings)
        with client_names(FIELDS):
            pictures = await made(service, http, client, wanted, card, settings)
        text = await asyncio.to_thread(lambda: generated(body, pictures, card).model_dump_json())
        return Response(text, media_type="application/json")

    @routes.post("/txt2img", response_model=bodies.Generated)
    async def txt2img(http: Request, body: bodies.TextToImage) -> Response:
        """Images from a prompt, on request with a second pass at a higher resolution."""
        return await answer(http, body, lambda card, settings: text_works(body, card, settings))

    @routes.post("/img2img", response_model=bodies.Generated)
    async def img2img(http: Request, body: bodies.ImageToImage) -> Response:
        """Images from an image, on request only within a mask."""
        return await answer(http, body, lambda card, settings: image_works(body, card, settings, pixels))


def _add_state(routes: APIRouter, service: Service, kept: Kept) -> None:
    @routes.get("/progress")
    async def progress(http: Request, skip_current_image: bool = False) -> bodies.Progress:
        """How far the client's own images are, with a preview of the oldest."""
        client = await service.client(http)
        return progress_of(service.progress(client), with_image=not skip_current_image)

    @routes.post("/interrupt")
    @routes.post("/skip")
    async def interrupt(http: Request) -> dict[str, Any]:
        """Stop the client's own images; what there is of them is the answer of their requests.

        All images of a request run side by side, so that skipping the current ones is the same.
        """
        service.interrupt(await service.client(http))
        return {}

    @routes.get("/options")
    async def options(http: Request) -> dict[str, Any]:
        """The client's own options."""
        client = await service.client(http)
        return shown(kept.of(client.id), await service.models())

    @routes.post("/options")
    async def set_options(http: Request, body: dict[str, Any]) -> None:
        """Change some of the client's own options, such as `sd_model_checkpoint`."""
        client = await service.client(http)
        kept.keep(client.id, kept.of(client.id).changed(body, await service.models()))


def _add_lists(routes: APIRouter, service: Service, kept: Kept) -> None:
    @routes.get("/sd-models")
    async def sd_models(http: Request) -> list[dict[str, Any]]:
        """The models that `sd_model_checkpoint` can be set to."""
        await service.client(http)
        return catalogue.models(await service.models())

    @routes.get("/loras")
    async def loras(http: Request) -> list[dict[str, Any]]:
        """What `<lora:name:weight>` in a prompt can name, for the model that the client has set."""
        client = await service.client(http)
        return catalogue.loras(await service.model(kept.of(client.id).model))

    @routes.post("/refresh-checkpoints")
    @routes.post("/refresh-loras")
    async def refresh(http: Request) -> None:
        """Nothing to do: the service's models and their adapters are those of its config."""
        await service.client(http)

    fixed = {
        "samplers": catalogue.samplers(),
        "schedulers": catalogue.schedulers(),
        "upscalers": catalogue.upscalers(),
        "latent-upscale-modes": [{"name": name} for name in catalogue.LATENT_UPSCALE_MODES],
        **catalogue.CONSTANT,
    }
    for name, value in fixed.items():
        routes.add_api_route(f"/{name}", _constant(service, value), name=name, methods=["GET"])


def _constant(service: Service, value: Any) -> Callable[[Request], Any]:
    async def listed(http: Request) -> Any:
        """What there is."""
        await service.client(http)
        return value

    return listed


def _add_pictures(routes: APIRouter, service: Service) -> None:
    pixels = service.config.limits.source_pixels

    @routes.post("/png-info")
    async def png_info(http: Request, body: bodies.PngInfo) -> bodies.PngInfoAnswer:
        """What a picture of ours, or of AUTOMATIC1111's, says about its making."""
        await service.client(http)
        found = await asyncio.to_thread(_provenance, body.image, pixels)
        text = found.infotext or ""
        parameters = parse_infotext(text) if text else {}
        for key, value in list(parameters.items()):
            match = PAIR.fullmatch(value)
            if match:
                parameters |= {f"{key}-1": match[1], f"{key}-2": match[2]}
        items = {"parameters": text} if text else {}
        return bodies.PngInfoAnswer(info=text, items=items, parameters=parameters)

    async def resized(http: Request, texts: Sequence[str], field: str, body: bodies.Extras) -> list[str]:
        """Admitted and charged as images of one step are, but made here."""
        client = await service.client(http)
        service.admission.check_count(len(texts))
        wanted = await asyncio.to_thread(extras.resizings, texts, field, body, pixels)
        costs = [each.cost for each in wanted]
        with service.admission.admitted(client, costs):
            await service.admission.charge(client, sum(costs))
            return [await asyncio.to_thread(each.made) for each in wanted]

    @routes.post("/extra-single-image")
    async def extra_single(http: Request, body: bodies.ExtrasSingle) -> bodies.Resized:
        """A picture at another size."""
        return bodies.Resized(image=(await resized(http, [body.image], "image", body))[0])

    @routes.post("/extra-batch-images")
    async def extra_batch(http: Request, body: bodies.ExtrasBatch) -> bodies.ResizedBatch:
        """Pictures at another size."""
        texts = [each.data for each in body.image_list]
        return bodies.ResizedBatch(images=await resized(http, texts, "imageList", body))


def _provenance(text: str, pixels: int) -> Provenance:
    """What a picture says, once it is known to be none that Pillow, which may decode it, would fill the memory with."""
    data = picture_bytes(text, "image")
    opened(data, "image", pixels=pixels)
    try:
        return read_provenance(data)
    except ValueError:
        raise InvalidRequest("image", "got no readable picture, allowed are PNG, JPEG and WebP") from None
