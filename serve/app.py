"""The HTTP application over a `Service`, and the ways to run it."""

from __future__ import annotations

import asyncio
import importlib.util
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from importlib.metadata import version
from types import ModuleType

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffray.model import DiffrayError

from . import failures
from .config import ServeConfig
from .engines import Engines
from .service import Service

DIALECTS = ("openai", "a1111", "stability", "native")


def create_app(service: Service) -> FastAPI:
    """The application: dialects, errors, health, page."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield

    app = FastAPI(title="diffray", version=version("diffray"), lifespan=lifespan)
    dialects = [
        import_module(f"diffray.serve.dialects.{name}")
        for name in DIALECTS
        if importlib.util.find_spec(f"diffray.serve.dialects.{name}")
    ]
    for dialect in dialects:
        app.include_router(dialect.router(service))
    _handle_errors(app, dialects)
    page = importlib.util.find_spec("diffray.serve.page")
    if service.config.page and page is not None and page.origin is not None:
        import_module("diffray.serve.page").mount(app, service)
    app.add_middleware(RequestId)
    return app


def _handle_errors(app: FastAPI, dialects: list[ModuleType]) -> None:
    async def handle(http: Request, error: Exception) -> Response:
        path = http.url.path
        dialect = next(d for d in dialects if path.startswith(d.ROUTES))
        return failures.answer(http, failures.refusal_of(error), dialect)

    for kind in (Exception, DiffrayError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, handle)


class RequestId:
    """Gives every request an id and every answer a header with it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        await self.app(scope, receive, named)


def run(config: ServeConfig) -> None:
    """Serve until interrupted."""
    import uvicorn

    async def main() -> None:
        service = Service(config, Engines(config))
        server = uvicorn.Server(uvicorn.Config(create_app(service), host=config.host, port=config.port))
        await server.serve()

    asyncio.run(main())
