"""The HTTP application over a `Service`: dialects, errors, limits, health, documentation."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib import import_module
from importlib.metadata import version
from types import ModuleType

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from diffray.model import DiffrayError

from . import metrics, page
from .documentation import OPEN, document
from .failures import Failures
from .idempotency import Idempotency
from .jobs import Jobs
from .middleware import Bodies, Hosts, Logged
from .service import Service

DIALECTS = ("openai", "a1111", "stability", "native")
"""Modules of `dialects`. The last one answers for every path that is nobody's."""


def create_app(service: Service) -> FastAPI:
    """The application. It has state: one belongs to one service and one event loop."""
    dialects = _dialects()
    failures = Failures(dialects)
    jobs = Jobs(service)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with jobs.sweeping():
            yield

    access = service.config.access
    app = FastAPI(
        title="diffray",
        version=version("diffray"),
        description=DESCRIPTION,
        docs_url=None,  # FastAPI's own is made of scripts from elsewhere; ours is in `page`
        redoc_url=None,
        openapi_url="/openapi.json" if access.docs else None,
        lifespan=lifespan,
        middleware=_middleware(service, failures),
    )
    app.state.jobs = jobs
    for dialect in dialects:
        app.include_router(dialect.router(service))
    _handle_errors(app, failures)
    _add_health(app, service)
    page.mount(app, service)
    document(app, failures, anonymous=service.anonymous)
    return app


DESCRIPTION = """Images from text and from images, by Stable Diffusion models.

The same service speaks four languages: the OpenAI Images API, AUTOMATIC1111's `/sdapi/v1`, Stability's REST API, and
its own, which has every field. Errors come in the language that was asked; each answer has an `x-request-id`.
"""


def _dialects() -> list[ModuleType]:
    names = [f"diffray.serve.dialects.{name}" for name in DIALECTS]
    return [import_module(name) for name in names if importlib.util.find_spec(name)]


def _middleware(service: Service, failures: Failures) -> list[Middleware]:
    """From the outside in."""
    config = service.config
    layers = [Middleware(Logged, config=config, failures=failures)]
    if service.anonymous and config.private:
        layers.append(Middleware(Hosts, config=config, failures=failures))
    if config.access.origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=config.access.origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after", "seed", "finish-reason"],
            )
        )
    layers.append(Middleware(Bodies, service=service, failures=failures))
    layers.append(Middleware(Idempotency, limits=config.limits, failures=failures))
    return layers


def _handle_errors(app: FastAPI, failures: Failures) -> None:
    async def handle(http: Request, error: Exception) -> Response:
        return failures.answer(http, error)

    kinds: Sequence[type[Exception]] = (DiffrayError, HTTPException, RequestValidationError)
    for kind in kinds:
        app.add_exception_handler(kind, handle)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", tags=["operation"], openapi_extra=OPEN)
    async def alive() -> dict[str, str]:
        """200 while this process answers at all."""
        return {"status": "ok"}

    @app.get(
        "/readyz",
        tags=["operation"],
        responses={503: {"description": "Images cannot be made now."}},
        openapi_extra=OPEN,
    )
    async def ready() -> Response:
        """200 when images can be made: the default model is loaded and has made one."""
        try:
            await service.backend.check()
        except Exception:
            return JSONResponse({"status": "not ready"}, 503)
        return JSONResponse({"status": "ready"})

    if service.config.access.metrics:

        @app.get("/metrics", include_in_schema=False)
        async def measured() -> Response:
            service.backend.sample()
            data, media = metrics.text()
            return Response(data, media_type=media)
