"""The page at `/` and the documentation at `/docs`: static files, whose headers let them talk to this service only."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from .service import Service

POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' blob: data:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
"""`no-cache`: the browser asks each time, and gets 304 as long as the file is the same."""
TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}
"""Some systems' own tables have others, with which browsers refuse to run a module."""
DOCS_LINK = b'<a class="quiet" href="docs">API documentation</a>'


def mount(app: FastAPI, service: Service) -> None:
    """Serve the page at `/`, the documentation at `/docs` and their files under `/page/`, as far as configured.

    The files are read once, here: what is not among them cannot be asked for.
    """
    config = service.config
    routes = {"index.html": ("/", config.page), "docs.html": ("/docs", config.access.docs)}
    if not any(wanted for _, wanted in routes.values()):
        return
    for entry in files("diffray.serve").joinpath("static").iterdir():
        path, wanted = routes.get(entry.name, (f"/page/{entry.name}", True))
        data = entry.read_bytes()
        if entry.name == "index.html" and not config.access.docs:
            data = data.replace(DOCS_LINK, b"")
        if wanted:
            app.add_route(path, _sender(entry.name, data), include_in_schema=False)


def _sender(name: str, data: bytes) -> Callable[[Request], Awaitable[Response]]:
    suffix = name[name.rindex(".") :]
    media = TYPES.get(suffix) or mimetypes.guess_type(name)[0]
    headers = {**HEADERS, "etag": f'"{hashlib.sha256(data).hexdigest()[:32]}"'}

    async def send(http: Request) -> Response:
        if headers["etag"] in http.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(data, media_type=media, headers=headers)

    return send
