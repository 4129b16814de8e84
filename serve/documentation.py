"""The OpenAPI document: what every operation may answer besides what its dialect says."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from .failures import Failures
from .idempotency import HEADER as IDEMPOTENCY
from .idempotency import MAX_KEY
from .refusal import Refusal
from .service import TIMEOUT_HEADER

STATUSES = {
    400: ("invalid_json", "The body is not valid, or its content is not allowed here."),
    401: ("unauthorized", "No valid key was given."),
    403: ("forbidden_host", "Not from here."),
    404: ("not_found", "There is no such thing."),
    408: ("body_timeout", "The body did not arrive in time."),
    409: ("interrupted", "The client itself interrupted the request."),
    413: ("too_large", "The body is too large."),
    415: ("unsupported_media_type", "Not in this form."),
    422: ("invalid_value", "A value is not allowed, or the request is over its budget."),
    429: ("rate_limited", "Too much for this key now; see Retry-After."),
    500: ("generation_failed", "The image could not be made."),
    503: ("queue_full", "Too much for the service now; see Retry-After."),
    504: ("timeout", "Not finished in time."),
    507: ("out_of_memory", "The image does not fit the device's memory."),
}
"""An example's code and what the status means."""
READING = (401, 403, 404, 422, 500, 503)
"""Statuses of operations without a body."""


OPEN: dict[str, Any] = {"security": []}
"""The `openapi_extra` of what answers without a key."""
HEADERS: dict[str, dict[str, Any]] = {
    IDEMPOTENCY: {
        "schema": {"type": "string", "minLength": 1, "maxLength": MAX_KEY},
        "description": "A key of the client's choice: the same request with the same key gets the answer of the first, "
        "for some minutes, instead of other images.",
    },
    TIMEOUT_HEADER: {
        "schema": {"type": "number", "exclusiveMinimum": 0},
        "description": "Seconds after which nobody wants the images any more.",
    },
}
"""What requests for images may have; see `UNTIMED`."""
UNTIMED = ("/v1/diffray/jobs", "/sdapi/v1/extra-")
"""Paths below which nobody waits for engines."""


def document(app: FastAPI, failures: Failures, *, anonymous: bool) -> None:
    """Let the application's document name every status, the headers that are read, and the scheme of keys."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = original()
            for path, operations in schema["paths"].items():
                for method, operation in operations.items():
                    _add_statuses(operation, method, path, failures)
                    _add_headers(operation, method, path, failures)
            schemes = schema.setdefault("components", {}).setdefault("securitySchemes", {})
            schemes["key"] = {"type": "http", "scheme": "bearer"}
            schema["security"] = [{"key": []}, {}] if anonymous else [{"key": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _add_statuses(operation: dict[str, Any], method: str, path: str, failures: Failures) -> None:
    dialect = failures.dialect(path)
    renamed: dict[int, int] = getattr(dialect, "STATUSES", {})
    for status in READING if method == "get" else STATUSES:
        code, meaning = STATUSES[status]
        final = str(renamed.get(status, status))
        example = dialect.refused(Refusal(status, code, meaning), "5f3c")
        known = operation["responses"].get(final, {})
        content = {"application/json": {"schema": {"type": "object"}, "example": example}}
        if "content" not in known or final == "422":  # FastAPI's own form of 422 is never sent
            operation["responses"][final] = {
                "description": known.get("description", meaning),
                "content": content,
            }
    for unused in renamed:
        if unused not in renamed.values():
            operation["responses"].pop(str(unused), None)


def _add_headers(operation: dict[str, Any], method: str, path: str, failures: Failures) -> None:
    if not failures.makes({"method": method.upper(), "path": path}):
        return
    parameters = operation.setdefault("parameters", [])
    for name, facts in HEADERS.items():
        if name != TIMEOUT_HEADER or not path.startswith(UNTIMED):
            parameters.append({"name": name, "in": "header", "required": False, **facts})
