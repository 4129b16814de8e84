"""What happens to every request before and after the dialects: ids, log, headers, bodies."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import time
import uuid
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import metrics
from .config import ServeConfig
from .failures import Failures
from .idempotency import HEADER as IDEMPOTENCY
from .jsonbody import check_json
from .refusal import Refusal
from .service import Service

log = logging.getLogger("diffray.serve")
REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
SECURITY = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
PROBES = ("/healthz", "/readyz", "/metrics")
"""Asked every few seconds by machines; not in the access log."""
BODIES_AT_ONCE = 16
"""Bodies of the largest allowed size that are held in memory together; more wait at the door with 503."""


class Logged:
    """Gives every request an id, every answer its headers, and every pair a line in the access log."""

    def __init__(self, app: ASGIApp, config: ServeConfig, failures: Failures) -> None:
        self.app, self.config, self.failures = app, config, failures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        begun, sent = time.perf_counter(), {"status": 0, "bytes": 0}

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent["status"] = message["status"]
                own = {name.lower() for name, _ in message["headers"]}
                extra = [(b"x-request-id", request_id.encode()), *SECURITY]
                message["headers"] = [*message["headers"], *(pair for pair in extra if pair[0] not in own)]
            elif message["type"] == "http.response.body":
                sent["bytes"] += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, named)
        except asyncio.CancelledError:
            sent["status"] = sent["status"] or 499
            raise
        except Exception as error:  # the server's own log would show it once more
            if not sent["status"]:
                await self.failures.answer(Request(scope), error)(scope, receive, named)
            else:
                log.error("answer %s broke off", request_id, exc_info=error)
        finally:
            self._record(scope, sent, time.perf_counter() - begun)

    def _record(self, scope: Scope, sent: dict[str, int], seconds: float) -> None:
        dialect, state = self.failures.dialect_name(scope["path"]), scope["state"]
        metrics.REQUESTS.add(dialect=dialect, status=str(sent["status"]))
        if "generation" in state:
            metrics.REQUEST_SECONDS.observe(seconds, dialect=dialect)
        if self.config.log == "off" or scope["path"] in PROBES:
            return
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request_id": state["request_id"],
            "client": state["client"].id if "client" in state else None,
            "method": scope["method"],
            "path": scope["path"],
            **sent,
            "seconds": round(seconds, 4),
            **state.get("generation", {}),
        }
        if code := state.get("refused"):
            line["refused"] = code
        if works := state.get("works"):
            line["images"] = len(works)
            if self.config.access.log_prompts:
                line["prompts"] = [work.request.prompt for work in works]
        sys.stdout.write(json.dumps(line) + "\n")  # ASCII: nothing in it can look like another line
        sys.stdout.flush()


class Bodies:
    """Reads bodies before anybody works with them: from known clients only, no larger or slower than allowed.

    Images that there is no room for are refused before that: a flood must cost less than it asks for. A request
    with an idempotency key may have its answer already.
    """

    def __init__(self, app: ASGIApp, service: Service, failures: Failures) -> None:
        self.app, self.service, self.failures = app, service, failures
        self._limits = service.config.limits
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self.app(scope, receive, send)
        http = Request(scope)
        chunks: list[bytes] = []
        try:
            try:
                client = await self.service.client(http)
                if self.failures.makes(scope) and IDEMPOTENCY not in http.headers:
                    self.service.admission.check_full(client)
                await self._read(http, receive, chunks)
            except Refusal as refusal:
                return await self.failures.answer(http, refusal)(scope, receive, send)
            await self.app(scope, _replayed(chunks[0], receive), send)
        finally:
            self._held -= sum(map(len, chunks))

    async def _read(self, http: Request, receive: Receive, chunks: list[bytes]) -> None:
        """Leaves the body in `chunks`, as one; what is there when it fails, or is cancelled, is held until then."""
        text = http.headers.get("content-length", "0")
        if not (text.isascii() and text.isdigit()):
            raise Refusal(400, "invalid_length", "content-length is not a number")
        self._check_size(int(text[:20]), more=int(text[:20]))
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                await self._collect(receive, chunks)
        except TimeoutError:
            raise Refusal(
                408, "body_timeout", f"the body did not arrive within {self._limits.body_seconds:g} s"
            ) from None
        chunks[:] = [body := b"".join(chunks)]
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if body and (kind == "application/json" or kind.endswith("+json")):
            check_json(body)

    async def _collect(self, receive: Receive, chunks: list[bytes]) -> None:
        """Every piece counts from its arrival on: a body may never end, or not say how long it will be."""
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refusal(499, "disconnected", "the client closed the connection")
            chunk = message.get("body", b"")
            size += len(chunk)
            self._check_size(size, more=len(chunk))
            chunks.append(chunk)
            self._held += len(chunk)
            more = message.get("more_body", False)

    def _check_size(self, size: int, *, more: int) -> None:
        """Raises Refusal: a body of this size is too large, or there is no room for so many bytes more."""
        most = self._limits.body_bytes
        if size > most:
            raise Refusal(413, "too_large", f"the body is larger than the allowed {most} bytes")
        if self._held + more > BODIES_AT_ONCE * most:
            raise Refusal(503, "queue_full", "too many large requests at once", retry_after=2)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body in one message, then whatever else comes (the disconnect)."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


class Hosts:
    """For services that anybody on this machine may use: answers to local names only.

    Otherwise a web page could reach it through a name that it lets point here (DNS rebinding), or send it forms
    from the visitor's browser.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, failures: Failures) -> None:
        self.app, self.config, self.failures = app, config, failures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            http = Request(scope)
            if refusal := self._refusal(http):
                return await self.failures.answer(http, refusal)(scope, receive, send)
        await self.app(scope, receive, send)

    def _refusal(self, http: Request) -> Refusal | None:
        host = http.headers.get("host", "").rsplit(":", 1)[0].strip("[]").lower()
        if not (host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host)):
            return Refusal(403, "forbidden_host", "without keys, this service answers to local names only")
        origin = http.headers.get("origin")
        if (
            origin
            and origin.split("://")[-1] != http.headers.get("host")
            and origin not in self.config.access.origins
        ):
            return Refusal(403, "forbidden_origin", "without keys, other web pages may not use this service")
        return None
