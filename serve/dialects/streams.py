"""Server-sent events: how a message is written, and what is said while there is nothing to say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from fastapi.responses import StreamingResponse

KEEP_ALIVE = 15.0
"""Seconds of silence before a comment is sent: proxies cut connections that are silent for 30 or 60."""


def described(*events: str) -> dict[str, Any]:
    """What the document says of an answer that is a stream of such events: the schema is that of each."""
    properties = {
        "event": {"type": "string", "enum": [*events, "error"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    }
    schema = {"type": "object", "properties": properties, "required": ["event", "data"]}
    return {"text/event-stream": {"schema": schema}}


def message(event: str, facts: Mapping[str, Any]) -> str:
    """One event."""
    return f"event: {event}\ndata: {json.dumps(facts)}\n\n"


def event_stream(messages: AsyncGenerator[str, None]) -> StreamingResponse:
    """The answer that sends messages as they come, and comments in between; nothing on the way may hold it back."""
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(kept_alive(messages), media_type="text/event-stream", headers=headers)


async def kept_alive(messages: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """`messages`, with a comment, which clients skip, after each `KEEP_ALIVE` seconds without one."""
    async with aclosing(messages):
        while True:
            coming = asyncio.ensure_future(anext(messages, None))
            try:
                while not (await asyncio.wait([coming], timeout=KEEP_ALIVE))[0]:
                    yield ": still here\n\n"
            finally:
                if not coming.done():
                    coming.cancel()
                    await asyncio.gather(coming, return_exceptions=True)
            text = coming.result()
            if text is None:
                return
            yield text
