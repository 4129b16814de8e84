"""Streams of the OpenAI Images API: partial and finished images as server-sent events."""

from __future__ import annotations

import asyncio
import io
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

from PIL import Image
from starlette.requests import Request

from .. import failures
from ..refusal import Refusal
from ..work import Event, Finished
from .openai_works import Asked, usage
from .parts import base64_text, client_names
from .streams import message

Kind = Literal["image_generation", "image_edit"]
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

CODES = {
    "unauthorized": "invalid_api_key",
    "rate_limited": "rate_limit_exceeded",
    "content_filtered": "content_policy_violation",
}
"""What this API calls a refusal that we call otherwise."""


def error_body(refusal: Refusal) -> dict[str, Any]:
    """The error with the four keys that the SDK reads."""
    kind = TYPES.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "server_error")
    code = CODES.get(refusal.code, refusal.code)
    error = {"message": refusal.message, "type": kind, "param": refusal.field, "code": code}
    return {"error": error}


async def server_sent(
    http: Request, events: AsyncGenerator[tuple[int, Event], None], wanted: Asked, kind: Kind
) -> AsyncGenerator[str, None]:
    """The stream. `index` (an extension) tells the images of a request for several apart.

    A failure after the stream has begun is its last event, with the error in the form that the SDK raises.
    """
    sent: Counter[int] = Counter()
    try:
        with client_names(wanted.names):
            async with aclosing(events):
                async for index, event in events:
                    if isinstance(event, Finished):
                        yield _message(f"{kind}.completed", _completed(event, index, wanted))
                    elif event.preview and sent[index] < (wanted.partial_images or 0):
                        facts = await asyncio.to_thread(_partial, event.preview, index, wanted)
                        yield _message(f"{kind}.partial_image", facts | {"partial_image_index": sent[index]})
                        sent[index] += 1
    except Exception as error:
        yield _message("error", error_body(failures.noted(http, error)))


def _message(event: str, facts: dict[str, Any]) -> str:
    return message(event, {"type": event} | facts)


def _common(index: int, data: bytes, wanted: Asked) -> dict[str, Any]:
    width, height = wanted.size
    return {
        "b64_json": base64_text(data),
        "created_at": int(time.time()),
        "size": f"{width}x{height}",
        "quality": wanted.quality,
        "background": "opaque",
        "output_format": wanted.works[index].format,
        "index": index,
    }


def _completed(finished: Finished, index: int, wanted: Asked) -> dict[str, Any]:
    used = usage(wanted, 1).model_dump()
    identifier = wanted.safety_identifier
    facts = {"seed": finished.request.seed, "usage": used, "safety_identifier": identifier}
    return _common(index, finished.data, wanted) | facts


def _partial(preview: bytes, index: int, wanted: Asked) -> dict[str, Any]:
    """The facts of a preview, in the format and at the size of the finished image, as this API has it."""
    format = wanted.works[index].format
    with Image.open(io.BytesIO(preview)) as small:
        picture = small.convert("RGB").resize(wanted.size, Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    picture.save(sink, format, **({"compress_level": 1} if format == "png" else {"quality": 80}))
    return _common(index, sink.getvalue(), wanted)
