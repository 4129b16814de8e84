"""Our own API, /v1/diffray: every field of `ImageRequest`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from ..refusal import Refusal
from ..service import Service

ROUTES = ("/",)


def refused(refusal: Refusal, request_id: str) -> dict[str, Any]:
    """The native form of an error."""
    error = {"code": refusal.code, "message": refusal.message, "field": refusal.field}
    return {"error": {**error, "request_id": request_id}}


def router(service: Service) -> APIRouter:
    """The native routes."""
    return APIRouter(prefix="/v1/diffray", tags=["diffray"])
