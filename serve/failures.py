"""Every exception becomes one `Refusal`, and every refusal is written by the dialect it is for."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Scope

from diffray.model import GenerationError, InvalidRequest, OutOfMemory

from . import metrics
from .refusal import Refusal

log = logging.getLogger("diffray.serve")
WASTEFUL = ("generation_failed", "out_of_memory", "timeout", "interrupted", "store_failed")
"""After engine time was spent, or against its client's own wish: the `openai` package would ask again on its own."""
CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 415: "unsupported_media_type"}


def refusal_of(error: Exception) -> Refusal:
    """What a client may know of an error."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, InvalidRequest):
        return Refusal(422, "invalid_value", str(error), field=error.field)
    if isinstance(error, RequestValidationError):
        return _invalid_body(error)
    if isinstance(error, HTTPException):
        if isinstance(error.__cause__, Refusal):
            return error.__cause__
        code = CODES.get(error.status_code, "bad_request")
        return Refusal(error.status_code, code, str(error.detail))
    if isinstance(error, OutOfMemory):
        message = "the image does not fit the device's memory; a smaller one may (width, height, hires_scale)"
        return Refusal(507, "out_of_memory", message)
    if isinstance(error, GenerationError):
        return Refusal(500, "generation_failed", "the image could not be made; another seed may work")
    log.error("request failed", exc_info=error)
    return Refusal(500, "internal", "the service failed; this is not the request's fault")


def _invalid_body(error: RequestValidationError) -> Refusal:
    first: dict[str, Any] = dict(error.errors()[0])
    if first["type"] == "json_invalid":
        return Refusal(400, "invalid_json", "the body is not valid JSON")
    field = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path", "header"))
    reason = "there is no such field" if first["type"] == "extra_forbidden" else first["msg"]
    return Refusal(422, "invalid_value", f"{field or 'body'}: {reason}", field=field or None)


def noted(http: Request, error: Exception) -> Refusal:
    """What a client is told of an error, in an answer or at the end of a stream; counted, and for the access log."""
    refusal = refusal_of(error)
    metrics.REJECTIONS.add(reason=refusal.code)
    http.state.refused = refusal.code
    return refusal


class Failures:
    """Writes refusals in the form of the dialect whose path was asked; the last dialect has all other paths."""

    def __init__(self, dialects: Sequence[ModuleType]) -> None:
        self._dialects = dialects

    def dialect(self, path: str) -> ModuleType:
        """The dialect that a path belongs to."""
        found = (dialect for dialect in self._dialects if path.startswith(dialect.ROUTES))
        return next(found, self._dialects[-1])

    def dialect_name(self, path: str) -> str:
        """Its name in metrics."""
        return self.dialect(path).__name__.rpartition(".")[2]

    def makes(self, scope: Scope) -> bool:
        """Whether a request asks for images."""
        return scope["method"] == "POST" and scope["path"].startswith(self.dialect(scope["path"]).MAKES)

    def answer(self, http: Request, error: Exception) -> JSONResponse:
        """The response that says it, with the headers that clients act on."""
        refusal, dialect = noted(http, error), self.dialect(http.url.path)
        headers: dict[str, str] = {}
        if refusal.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(refusal.retry_after)))
        if refusal.status == 401:
            headers["www-authenticate"] = "Bearer"
        if refusal.code in WASTEFUL:
            headers["x-should-retry"] = "false"
        status = getattr(dialect, "STATUSES", {}).get(refusal.status, refusal.status)
        return JSONResponse(dialect.refused(refusal, http.state.request_id), status, headers)
