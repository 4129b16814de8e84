"""One process that serves: uvicorn in front of an application whose engines are here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
from asyncio import Transport
from collections.abc import Callable, Generator

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from diffray.model import GenerationError
from diffray.model.allocator import keep_freed_memory

from .app import create_app
from .config import ServeConfig
from .engines import EngineHangs, Engines
from .service import Service

log = logging.getLogger("diffray.serve")
HEALTH_SECONDS = 5.0
"""Between two looks at the engines."""
HEADER_SECONDS = 10.0
"""From a connection, or from an answer's successor's first byte, to the end of its headers."""
READ_SECONDS = 30.0
"""In which a client takes READ_BYTES of an answer that waits for it, or all of it."""
READ_BYTES = 64 * 1024
CONNECTIONS = 4096


class Patient(HttpToolsProtocol):
    """Closes connections whose request headers do not arrive in time (slow loris), and those whose answers are not
    read: the request behind one would wait for ever."""

    seconds = HEADER_SECONDS
    read_seconds = READ_SECONDS

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waiting: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        self._taken()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._watch()
        else:
            self._rest()

    def _watch(self) -> None:
        if self._waiting is None:
            self._waiting = self.loop.call_later(self.seconds, self._late)

    def _rest(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _late(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            )
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        self._taken()
        super().resume_writing()

    def _expect_reading(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._reading = self.loop.call_later(self.read_seconds, self._unread, left)

    def _unread(self, before: int) -> None:
        if self.transport.get_write_buffer_size() > before - READ_BYTES:
            self.transport.abort()
        else:
            self._expect_reading()

    def _taken(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None


class Server(uvicorn.Server):
    """Ends with exit code 0 on a signal: uvicorn would send itself the signal again at the end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


async def supervise(engines: Engines) -> None:
    """End this process where no engine can be made anew in it: one hangs, or the accelerator answers no more.

    Its exit code, 1, has whatever started it start another.
    """
    while True:
        await asyncio.sleep(HEALTH_SECONDS)
        try:
            await engines.check()
        except (EngineHangs, RuntimeError) as error:
            log.critical("this process ends itself: %s", error)
            os._exit(1)
        except GenerationError:
            pass  # not loaded yet, or broken and about to be loaded again


def run(config: ServeConfig, said: Callable[[str], None] = print) -> None:
    """Serve until SIGINT or SIGTERM, then finish what was begun. See also `supervise`.

    Raises:
        CheckpointError, GenerationError: the default model cannot be loaded or makes no image.
        OSError: the address is taken.
    """
    _many_files()
    keep_freed_memory()
    asyncio.run(_serve(config, said))


async def _serve(config: ServeConfig, said: Callable[[str], None]) -> None:
    engines = Engines(config)
    service = Service(config, engines)
    listener = uvicorn.Config(
        create_app(service),
        host=config.host,
        port=config.port,
        http=Patient,
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=int(config.limits.seconds) + 1,
    )
    server = Server(listener)
    socket = listener.bind_socket()
    said(f"http://{config.host}:{socket.getsockname()[1]}/  loading {config.default_model} ...")
    serving = asyncio.create_task(server.serve([socket]))
    loading = asyncio.create_task(engines.start())
    supervising = asyncio.create_task(supervise(engines))
    try:
        await asyncio.wait((serving, loading), return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and loading.exception() is None:
            said("ready")
            await serving
    finally:
        server.should_exit = True
        await asyncio.gather(serving, return_exceptions=True)
        loading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loading
        await engines.close()
        supervising.cancel()


def _many_files() -> None:
    """Every connection is an open file, and many systems allow few by default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS + 1024 if hard == resource.RLIM_INFINITY else min(hard, CONNECTIONS + 1024)
    if soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
