"""Stability's REST API: v1 generation by engine, and v2beta stable-image."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from PIL import Image
from pydantic import BaseModel

from diffray.model.encoding import MEDIA_TYPES

from ..pictures import picture
from ..refusal import Refusal
from ..service import Service
from ..work import Finished, ModelCard, Work
from . import stability_bodies as bodies
from .forms import form_schema, one_file, read_form
from .parts import PICTURE_FILES, alpha_mask, base64_text, check_mask, client_names, flat
from .stability_works import V1_FIELDS, V2_FIELDS, masked, v1_works, v2_works

ROUTES = ("/v1/generation", "/v1/engines", "/v1/user", "/v2beta")
MAKES = ("/v1/generation/", "/v2beta/")
"""Paths below which a POST asks for images."""
STATUSES = {422: 400}
"""Statuses that this API has another one for."""
NAMES = {"invalid_value": "bad_request", "invalid_json": "bad_request", "content_filtered": "invalid_prompts"}
"""What this API calls a refusal that we call otherwise."""
V1_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"model": bodies.Artifacts, "content": {"image/png": PICTURE_FILES["image/png"]}}
}
V2_ANSWER: dict[int | str, dict[str, Any]] = {200: {"model": bodies.Picture, "content": PICTURE_FILES}}
SOURCE = "PNG, JPEG or WebP. *"
Prepared = Callable[[ModelCard], list[Work]]


def refused(refusal: Refusal, request_id: str) -> dict[str, Any]:
    """The error JSON of both versions: v1 has a message, v2beta a list of errors."""
    name = NAMES.get(refusal.code, refusal.code)
    return {"id": request_id, "name": name, "message": refusal.message, "errors": [refusal.message]}


def router(service: Service) -> APIRouter:
    """v1 and v2beta."""
    routes = APIRouter(tags=["Stability"])
    _add_v1(routes, service)
    _add_account(routes, service)
    _add_v2(routes, service)
    return routes


def _add_v1(routes: APIRouter, service: Service) -> None:
    pixels = service.config.limits.source_pixels
    base = "/v1/generation/{engine_id:path}"

    async def answer(http: Request, engine_id: str, body: bodies.V1, prepared: Prepared) -> Response:
        client, card = await service.client(http), await service.model(engine_id)
        wants_image = "image/" in http.headers.get("accept", "")
        if wants_image and body.samples > 1:
            raise Refusal(
                400, "invalid_samples", "samples above 1 need Accept: application/json", field="samples"
            )
        names = V1_FIELDS | {"strength": _strength_name(body), "init_image": "init_image"}
        with client_names(names):
            finished = await service.make(http, client, await asyncio.to_thread(prepared, card))
        return _image(finished[0], "png") if wants_image else _artifacts(finished)

    @routes.post(f"{base}/text-to-image", responses=V1_ANSWER)
    async def text_to_image(http: Request, engine_id: str, body: bodies.TextToImage) -> Response:
        """Images from weighted prompts."""
        return await answer(http, engine_id, body, lambda card: v1_works(body, card, None, None, pixels))

    @routes.post(
        f"{base}/image-to-image/masking",
        responses=V1_ANSWER,
        openapi_extra=form_schema(
            bodies.Masking, init_image=SOURCE, mask_image="As large as the image; see mask_source."
        ),
    )
    async def masking(http: Request, engine_id: str) -> Response:
        """An image repainted where a mask says."""
        body, files = await read_form(http, bodies.Masking, ("init_image", "mask_image"))

        def prepared(card: ModelCard) -> list[Work]:
            image = _picture(files, "init_image", pixels)
            mask = _picture(files, "mask_image", pixels) if "mask_image" in files else None
            return v1_works(body, card, image, masked(body.mask_source, image, mask), pixels)

        return await answer(http, engine_id, body, prepared)

    @routes.post(
        f"{base}/image-to-image",
        responses=V1_ANSWER,
        openapi_extra=form_schema(bodies.ImageToImage, init_image=SOURCE),
    )
    async def image_to_image(http: Request, engine_id: str) -> Response:
        """Images from an image."""
        body, files = await read_form(http, bodies.ImageToImage, ("init_image",))
        return await answer(
            http,
            engine_id,
            body,
            lambda card: v1_works(body, card, _picture(files, "init_image", pixels), None, pixels),
        )


def _add_account(routes: APIRouter, service: Service) -> None:
    @routes.get("/v1/engines/list")
    async def engines(http: Request) -> list[bodies.Engine]:
        """The models, by the names that generation takes."""
        await service.client(http)
        return [
            bodies.Engine(id=c.name, name=c.name, description=f"{c.family}, {c.task}, {c.width}x{c.height}")
            for c in await service.models()
        ]

    @routes.get("/v1/user/account")
    async def account(http: Request) -> bodies.Account:
        """Who asks."""
        name = (await service.client(http)).name
        return bodies.Account(id=name, organizations=[bodies.Organization(id=name, name=name)])

    @routes.get("/v1/user/balance")
    async def balance(http: Request) -> bodies.Balance:
        """Always enough."""
        await service.client(http)
        return bodies.Balance(credits=1_000_000.0)


def _add_v2(routes: APIRouter, service: Service) -> None:
    pixels = service.config.limits.source_pixels

    async def answer(http: Request, body: bodies.Generate | bodies.Inpaint, prepared: Prepared) -> Response:
        client, card = await service.client(http), await service.model(body.model)
        try:
            with client_names(V2_FIELDS):
                (finished,) = await service.make(http, client, await asyncio.to_thread(prepared, card))
        except Refusal as refusal:
            if refusal.code != "content_filtered":
                raise
            raise Refusal(403, "content_moderation", refusal.message, field=refusal.field) from refusal
        if "application/json" not in http.headers.get("accept", ""):
            return _image(finished, body.output_format)
        seed, data = finished.request.seed, base64_text(finished.data)
        return _json(bodies.Picture(image=data, seed=seed))

    async def generate(http: Request) -> Response:
        """An image from a prompt, or from an image and a prompt."""
        body, files = await read_form(http, bodies.Generate, ("image",))

        def prepared(card: ModelCard) -> list[Work]:
            image = _picture(files, "image", pixels) if "image" in files else None
            return v2_works(body, card, image, None, pixels)

        return await answer(http, body, prepared)

    for kind in ("core", "sd3", "ultra"):
        routes.add_api_route(
            f"/v2beta/stable-image/generate/{kind}",
            generate,
            methods=["POST"],
            name=f"stable image {kind}",
            responses=V2_ANSWER,
            openapi_extra=form_schema(bodies.Generate, image="To start from; PNG, JPEG or WebP."),
        )

    @routes.post(
        "/v2beta/stable-image/edit/inpaint",
        responses=V2_ANSWER,
        openapi_extra=form_schema(
            bodies.Inpaint, image=SOURCE, mask="White is repainted; without one, what is transparent is."
        ),
    )
    async def inpaint(http: Request) -> Response:
        """An image repainted where a mask is white."""
        body, files = await read_form(http, bodies.Inpaint, ("image", "mask"))

        def prepared(card: ModelCard) -> list[Work]:
            image = _picture(files, "image", pixels)
            mask = alpha_mask(image, "image") if "mask" not in files else _picture(files, "mask", pixels)
            check_mask(image, mask, "mask")
            return v2_works(body, card, image, flat(mask).convert("L"), pixels)

        return await answer(http, body, prepared)


def _picture(files: Mapping[str, list[bytes]], name: str, pixels: int) -> Image.Image:
    return picture(one_file(files, name), name, pixels=pixels)


def _strength_name(body: bodies.V1) -> str:
    scheduled = getattr(body, "init_image_mode", "") == "STEP_SCHEDULE"
    return "step_schedule_start" if scheduled else "image_strength"


def _image(finished: Finished, format: Any) -> Response:
    headers = {"seed": str(finished.request.seed), "finish-reason": "SUCCESS"}
    return Response(finished.data, media_type=MEDIA_TYPES[format], headers=headers)


def _artifacts(finished: list[Finished]) -> Response:
    artifacts = [bodies.Artifact(base64=base64_text(f.data), seed=f.request.seed) for f in finished]
    return _json(bodies.Artifacts(artifacts=artifacts))


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")
