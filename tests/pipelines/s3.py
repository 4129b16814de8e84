"""An S3 server to test against, and a proxy that stands between it and its client and breaks things.

By default the server is moto on loopback. Another one is used when the environment names it:
DIFFRAY_TEST_S3_ENDPOINT, DIFFRAY_TEST_S3_KEY, DIFFRAY_TEST_S3_SECRET and DIFFRAY_TEST_S3_BUCKET (which is
created if need be). moto looks at no signatures and decides about `If-None-Match` without a lock; what depends
on either has to be run against a real server.
"""

from __future__ import annotations

import http.client
import logging
import os
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class S3:
    """A bucket on a server."""

    endpoint: str
    key: str
    secret: str = field(repr=False)
    bucket: str
    real: bool
    """Whether it is another server than moto."""

    def options(self, **more: Any) -> dict[str, Any]:
        """Storage options for fsspec."""
        return {"endpoint_url": self.endpoint, "key": self.key, "secret": self.secret, **more}

    def folder(self) -> str:
        """The URL of a new, empty folder."""
        return f"s3://{self.bucket}/{uuid.uuid4().hex}"

    def fill(self, folder: str, names: Sequence[str]) -> None:
        """Create many small objects."""
        if self.real:
            self.filesystem().pipe({f"{folder}/{name}": b"{}" for name in names})
            return
        from moto.s3.models import s3_backends  # moto takes ten milliseconds for each over HTTP

        bucket, _, prefix = folder.partition("/")
        [(_, backends)] = s3_backends.items()
        for name in names:
            backends["aws"].put_object(bucket, f"{prefix}/{name}", b"{}")

    def filesystem(self) -> Any:
        """A client of its own kind, to look at what is there."""
        import s3fs

        return s3fs.S3FileSystem(**self.options(), use_listings_cache=False)


@contextmanager
def serve() -> Iterator[S3]:
    """The server of the environment, or moto for as long as the context lasts."""
    endpoint = os.environ.get("DIFFRAY_TEST_S3_ENDPOINT")
    bucket = os.environ.get("DIFFRAY_TEST_S3_BUCKET", "diffray-tests")
    server = None
    if endpoint:
        key, secret = os.environ["DIFFRAY_TEST_S3_KEY"], os.environ["DIFFRAY_TEST_S3_SECRET"]
    else:
        from moto.s3.responses import S3Response
        from moto.server import ThreadedMotoServer

        # It looks whether an object is there and puts it then, both without a lock.
        put, one = S3Response.put_object, threading.Lock()

        def alone(self: S3Response) -> Any:
            with one:
                return put(self)

        S3Response.put_object = alone
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        endpoint, key, secret = f"http://{host}:{port}", "test-key", f"test-{uuid.uuid4().hex}"
    os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
    os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
    s3 = S3(endpoint, key, secret, bucket, bool(os.environ.get("DIFFRAY_TEST_S3_ENDPOINT")))
    try:
        files = s3.filesystem()
        if not files.exists(bucket):
            files.mkdir(bucket)
        yield s3
    finally:
        if server is not None:
            server.stop()


Fault = str | float | None
"""What happens to a request: a number delays the answer by so many seconds, and these words mean

    "503"         the server asks to slow down, and nothing was done
    "409"         another conditional request is under way, and nothing was done
    "501"         the server does not know conditional requests
    "expired"     the credentials are not valid any more
    "reset"       the connection breaks before the request arrives
    "lost"        the request is done, but the connection breaks before the answer
    "truncated"   the answer breaks off in the middle of its body
"""
_ANSWERS = {
    "503": (503, "SlowDown"),
    "409": (409, "ConditionalRequestConflict"),
    "501": (501, "NotImplemented"),
    "expired": (403, "ExpiredToken"),
}


class FaultyProxy:
    """Forwards to an S3 server, unless `fault(number, method, path)` says what goes wrong with a request."""

    def __init__(self, upstream: str) -> None:
        self.fault: Callable[[int, str, str], Fault] = lambda number, method, path: None
        self.requests: list[tuple[str, str, Fault]] = []
        self._counting = threading.Lock()
        self.upstream = urlsplit(upstream).netloc
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.proxy = self  # type: ignore[attr-defined]
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def decide(self, method: str, path: str) -> Fault:
        """The fate of the next request."""
        with self._counting:
            fault = self.fault(len(self.requests) + 1, method, path)
            self.requests.append((method, path, fault))
            return fault

    def faults(self) -> int:
        """How many requests went wrong so far."""
        return sum(fault is not None for *_, fault in self.requests)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None: ...

    def _any(self) -> None:
        proxy: FaultyProxy = self.server.proxy  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = proxy.decide(self.command, self.path)
        if fault == "reset":
            return self._break()
        if isinstance(fault, str) and fault in _ANSWERS:
            status, code = _ANSWERS[fault]
            text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code} it is</Message></Error>'
            return self._answer(status, [("Content-Type", "application/xml")], text.encode())
        upstream = http.client.HTTPConnection(proxy.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    upstream.putheader(name, value)
            upstream.endheaders(body or None)
            answer = upstream.getresponse()
            data, headers = answer.read(), answer.getheaders()
        finally:
            upstream.close()
        if fault == "lost":
            return self._break()
        if isinstance(fault, float):
            time.sleep(fault)
        self._answer(answer.status, headers, data, cut=fault == "truncated")

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _any  # noqa: N815

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, *, cut: bool = False) -> None:
        try:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            length = {k.lower(): v for k, v in headers}.get("content-length")
            self.send_header(
                "Content-Length", length if self.command == "HEAD" and length else str(len(data))
            )
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self._break()
        except OSError:
            self.close_connection = True  # the client has given up

    def _break(self) -> None:
        """End the connection with a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.rfile.close()
        self.connection.close()


@contextmanager
def broken(s3: S3) -> Iterator[tuple[FaultyProxy, S3]]:
    """A proxy before a server, and the server as seen through it."""
    proxy = FaultyProxy(s3.endpoint)
    try:
        yield proxy, S3(proxy.endpoint, s3.key, s3.secret, s3.bucket, s3.real)
    finally:
        proxy.close()
