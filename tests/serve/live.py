"""A service in a background thread: real HTTP on a free loopback port."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from diffray.serve.app import create_app
from diffray.serve.config import ServeConfig
from diffray.serve.engines import Engines
from diffray.serve.service import Service
from diffray.serve.work import Backend


@dataclass(frozen=True)
class Live:
    """A service that answers on `url`; its `loop` runs in another thread."""

    url: str
    service: Service
    loop: asyncio.AbstractEventLoop


@contextmanager
def live(
    config: ServeConfig, backend: Callable[[ServeConfig], Backend] = Engines, **options: Any
) -> Iterator[Live]:
    """Serve in a background thread; `options` are uvicorn's."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    ready = threading.Event()
    made: dict[str, Any] = {}

    async def main() -> None:
        engines = backend(config)
        service = Service(config, engines)
        if isinstance(engines, Engines):
            await engines.start()
        server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="warning", **options))
        made.update(service=service, server=server, loop=asyncio.get_running_loop())
        task = asyncio.create_task(server.serve([listener]))
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        ready.set()
        await task
        if isinstance(engines, Engines):
            await engines.close()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert ready.wait(180), "the service did not start"
    try:
        yield Live(f"http://127.0.0.1:{port}", made["service"], made["loop"])
    finally:
        made["server"].should_exit = True
        thread.join(30)
