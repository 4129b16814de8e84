"""Requests that are sent twice and answered once: what the header `Idempotency-Key` asks for.

The first request with a key is carried out even if its sender goes away, so that a retry after a time-out finds
the answer instead of a second generation. Same client, same key, same content: same answer, byte for byte. Only
answers that succeeded are kept; a refused request may be sent again, and so may one that asks for no images.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import metrics
from .config import Limits
from .failures import Failures
from .refusal import Refusal

HEADER = "idempotency-key"
MAX_KEY = 255
RECORDINGS = 4096
"""Answers kept, however small they are."""
BOUNDARY = re.compile(r';\s*boundary="?([^";]*)"?', re.IGNORECASE)


@dataclass(eq=False)
class Recording:
    """An answer, or the beginning of one."""

    fingerprint: bytes
    begun: float = field(default_factory=time.monotonic)
    messages: list[Message] = field(default_factory=list)
    bytes: int = 0
    over: bool = False
    error: BaseException | None = None
    grown: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def status(self) -> int:
        """The HTTP status; 0 before it is known."""
        return int(self.messages[0]["status"]) if self.messages else 0


class Idempotency:
    """Middleware inside of `Bodies`, which has read the body and knows the client."""

    def __init__(self, app: ASGIApp, limits: Limits, failures: Failures) -> None:
        self.app, self.limits, self.failures = app, limits, failures
        self._recordings: OrderedDict[bytes, Recording] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        makes = scope["type"] == "http" and self.failures.makes(scope)
        key = Request(scope).headers.get(HEADER) if makes else None
        if key is None:
            return await self.app(scope, receive, send)
        try:
            name, fingerprint, message = await self._identify(scope, receive, key)
            known = self._recordings.get(name)
            if known is not None and known.fingerprint != fingerprint:
                raise Refusal(
                    422, "idempotency_mismatch", "this Idempotency-Key was used for another request"
                )
        except Refusal as refusal:
            return await self.failures.answer(Request(scope), refusal)(scope, receive, send)
        if known is None:
            known = self._begin(name, fingerprint, scope, message)
            replayed = False
        else:
            metrics.REPLAYS.add()
            replayed = True
        await _play(known, send, replayed)

    async def _identify(self, scope: Scope, receive: Receive, key: str) -> tuple[bytes, bytes, Message]:
        if not 0 < len(key) <= MAX_KEY:
            raise Refusal(
                400, "invalid_value", f"{HEADER}: allowed are 1..{MAX_KEY} characters", field=HEADER
            )
        message = await receive()
        client = scope["state"]["client"].id
        name = hashlib.sha256(f"{client}\n{key}".encode()).digest()
        return name, _fingerprint(scope, message.get("body", b"")), message

    def _begin(self, name: bytes, fingerprint: bytes, scope: Scope, message: Message) -> Recording:
        """Carry the request out in a task of its own."""
        self._expire()
        recording = self._recordings[name] = Recording(fingerprint)
        task = asyncio.create_task(self._record(name, recording, scope, message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return recording

    async def _record(self, name: bytes, recording: Recording, scope: Scope, message: Message) -> None:
        messages = [message]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()  # this request's client never goes away
            raise AssertionError

        async def keep(message: Message) -> None:
            async with recording.grown:
                recording.messages.append(message)
                recording.bytes += len(message.get("body", b""))
                recording.grown.notify_all()

        try:
            await self.app(scope, receive, keep)
        except Exception as error:
            recording.error = error
        finally:
            recording.over = True
            whole = recording.error is None and 200 <= recording.status < 300
            if not whole or recording.bytes > self.limits.idempotency_bytes:
                self._recordings.pop(name, None)
            async with recording.grown:
                recording.grown.notify_all()

    def _expire(self) -> None:
        """Drop what is too old, and the oldest while all is too much."""
        total = sum(recording.bytes for recording in self._recordings.values())
        oldest = time.monotonic() - self.limits.idempotency_seconds
        for name, recording in list(self._recordings.items()):
            full = total > self.limits.idempotency_bytes or len(self._recordings) > RECORDINGS
            if recording.over and (recording.begun < oldest or full):
                total -= recording.bytes
                del self._recordings[name]


def _fingerprint(scope: Scope, body: bytes) -> bytes:
    """What makes two requests the same: path, query, kinds of body and answer, and the body.

    The line between the parts of a form is not of them: clients draw it anew for every attempt.
    """
    headers = Request(scope).headers
    kind = headers.get("content-type", "")
    if boundary := BOUNDARY.search(kind):
        kind = kind.replace(boundary[0], "")
        body = body.replace(b"--" + boundary[1].encode("latin-1"), b"--")
    head = [scope["path"], scope["query_string"].decode("latin-1"), kind, headers.get("accept", "")]
    return hashlib.sha256("\n".join(head).encode() + b"\n" + body).digest()


async def _play(recording: Recording, send: Send, replayed: bool) -> None:
    """Send what there is, and what still comes."""
    at = 0
    while True:
        async with recording.grown:
            await recording.grown.wait_for(lambda: len(recording.messages) > at or recording.over)  # noqa: B023
            fresh = recording.messages[at:]
        for message in fresh:
            if replayed and message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"idempotency-replayed", b"true")]}
            await send(dict(message))
        at += len(fresh)
        if recording.over and at == len(recording.messages):
            if recording.error is not None:
                raise recording.error
            return
