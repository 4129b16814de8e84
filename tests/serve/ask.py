"""A client for tests: plain HTTP, and raw sockets where a real client would not misbehave enough."""

from __future__ import annotations

import http.client
import json
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def code(self) -> str:
        """Of a native error."""
        return str(self.json["error"]["code"])


def ask(
    url: str, body: object = None, *, method: str | None = None, timeout: float = 120, **headers: str
) -> Answer:
    """One request; `body` is JSON, or bytes as they are. Header names have `_` for `-`."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    if data is not None:
        named.setdefault("content-type", "application/json")
    try:
        target = parts._replace(scheme="", netloc="").geturl()
        connection.request(method or ("GET" if body is None else "POST"), target, data, named)
        response = connection.getresponse()
        answered = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, answered, response.read())
    finally:
        connection.close()


def connect(url: str) -> socket.socket:
    """A bare connection."""
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname or "", parts.port or 80), timeout=30)


def heard(wire: socket.socket, end: bytes = b"") -> bytes:
    """What comes until it has `end` (empty: until the other side closes); an answer may come in pieces."""
    answer = b""
    while not (end and end in answer) and (piece := wire.recv(4096)):
        answer += piece
    return answer


def post(url: str, body: object) -> socket.socket:
    """A request on a connection of its own, whose answer nobody reads yet."""
    data = json.dumps(body).encode()
    connection = connect(url)
    head = f"POST {urlsplit(url).path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    return connection
