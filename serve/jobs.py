"""Asynchronous jobs: asked now, fetched later.

A job's record and pictures lie in the configured store under a name that says whose and how old it is, so that any
ingress can answer for it, and what is too old is found by listing alone:

    <store>/<client>/<time>-<random>/job.json, 0.png, 1.png, ...
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from starlette.requests import Request

from .admission import Client
from .failures import refusal_of
from .refusal import Refusal
from .service import Service
from .store import Files
from .work import Event, Finished, Work

log = logging.getLogger("diffray.serve")
Told = tuple[int, Event]
Events = AsyncGenerator[Told, None]
Status = Literal["running", "done", "failed", "cancelled"]
SWEEP_SECONDS = 60.0
PATIENCE = 2.0
"""Seconds that a submission waits for an engine to have looked at it."""


@dataclass(eq=False)
class Job:
    """One job: what its owner sees of it."""

    id: str
    status: Status
    created: float
    expires: float
    total: int
    progress: float = 0.0
    """Share of all steps that are done, 0..1."""
    images: list[dict[str, Any]] = field(default_factory=list)
    """index, file, format, model, checksums, parameters, timings of each finished picture."""
    error: dict[str, Any] | None = None


class Jobs:
    """The jobs of one service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lifetime = service.config.store.seconds
        self._store = Files(service.config.store)
        self._live: dict[str, tuple[Client, Job, asyncio.Task[None]]] = {}

    async def submit(self, client: Client, works: Sequence[Work]) -> Job:
        """Begin a job; it counts against the client's limits like a request.

        What is wrong with it is mostly known at once; a model that has to be loaded first is not waited for.

        Raises:
            InvalidRequest, Refusal: it was not admitted.
        """
        events = self._service.stream(None, client, works)
        first = asyncio.ensure_future(anext(events))
        await asyncio.wait({first}, timeout=PATIENCE)
        if first.done():
            first.result()
        now = time.time()
        identity = f"{int(now):x}-{secrets.token_hex(12)}"
        job = Job(identity, "running", now, now + self._lifetime, len(works))
        task = asyncio.create_task(self._run(client, job, works, first, events))
        self._live[identity] = (client, job, task)
        task.add_done_callback(lambda _: self._live.pop(identity, None))
        return job

    async def find(self, client: Client, identity: str) -> Job:
        """A job of this client.

        Raises:
            Refusal: 404, it has none of this id (any more).
        """
        if identity in self._live and self._live[identity][0].id == client.id:
            return self._live[identity][1]
        job = Job(**json.loads(await self._read(client, identity, "job.json")))
        if job.status == "running" and _age(identity) > self._service.config.limits.seconds + SWEEP_SECONDS:
            job.status = "failed"
            job.error = {"code": "lost", "message": "the service ended while the job ran", "field": None}
        return job

    async def picture(self, client: Client, identity: str, index: int) -> tuple[bytes, str]:
        """A finished picture's file and its format.

        Raises:
            Refusal: 404, there is no such picture (yet, or any more).
        """
        job = await self.find(client, identity)
        found = [image for image in job.images if image["index"] == index]
        if not found:
            raise Refusal(404, "not_found", f"job {job.id} has no finished image {index}")
        return await self._read(client, identity, found[0]["file"]), found[0]["format"]

    async def cancel(self, client: Client, identity: str) -> Job:
        """Stop it at the next step, keep what is finished; deletes the job if it is over.

        Raises:
            Refusal: 404, as `find`.
        """
        job = await self.find(client, identity)
        if identity in self._live:
            task = self._live[identity][2]
            job.status = "cancelled"
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        else:
            await asyncio.to_thread(self._store.remove, _place(client, identity))
            job.status = "cancelled" if job.status == "running" else job.status
        return job

    async def publish(self, data: bytes, format: str) -> str:
        """Keep a picture for anybody who knows its name, which nobody can guess; returns the name.

        Raises:
            Refusal: 503, the store fails.
        """
        name = f"{int(time.time()):x}-{secrets.token_hex(12)}.{format}"
        await self._put(_public(name), data)
        return name

    async def published(self, name: str) -> bytes:
        """A published picture's file.

        Raises:
            Refusal: 404, there is none of this name (any more).
        """
        identity = name.partition(".")[0]
        if _named(identity) and name.partition(".")[2].isalpha() and _age(identity) <= self._lifetime:
            with suppress(FileNotFoundError):
                return await asyncio.to_thread(self._store.read, _public(name))
        raise Refusal(404, "not_found", "there is no such picture, or not any more")

    async def _run(
        self, client: Client, job: Job, works: Sequence[Work], first: asyncio.Future[Told], events: Events
    ) -> None:
        place = _place(client, job.id)
        shares = [0.0] * len(works)

        async def note(told: Told) -> None:
            index, event = told
            if isinstance(event, Finished):
                shares[index] = 1.0
                job.images.append(await self._keep(place, index, event, works[index].format))
            else:
                shares[index] = event.step / max(event.steps, 1)
            job.progress = round(sum(shares) / len(shares), 4)

        try:
            try:
                await self._write(place, job)
                await note(await first)
                async for told in events:
                    await note(told)
            finally:
                first.cancel()
                await asyncio.wait({first})
                await events.aclose()
            job.status = "done"
        except asyncio.CancelledError:
            if job.status != "cancelled":  # then it was not its owner
                job.status = "failed"
                job.error = {"code": "stopped", "message": "the service was stopped", "field": None}
        except Exception as error:
            refusal = refusal_of(error)
            job.status = "failed"
            job.error = {"code": refusal.code, "message": refusal.message, "field": refusal.field}
        with suppress(Exception):
            await self._write(place, job)

    async def _keep(self, place: str, index: int, finished: Finished, format: str) -> dict[str, Any]:
        file = f"{index}.{format}"
        await asyncio.to_thread(self._store.write, f"{place}/{file}", finished.data)
        return {
            "index": index,
            "file": file,
            "format": format,
            "model": finished.model,
            "model_checksum": finished.model_checksum,
            "adapter_checksums": finished.adapter_checksums,
            "parameters": finished.request.parameters(),
            "timings": {name: round(seconds, 4) for name, seconds in finished.timings.items()},
        }

    async def _write(self, place: str, job: Job) -> None:
        await self._put(f"{place}/job.json", json.dumps(asdict(job)).encode())

    async def _put(self, name: str, data: bytes) -> None:
        try:
            await asyncio.to_thread(self._store.write, name, data)
        except Exception as error:
            log.error("the store of results failed", exc_info=error)
            raise Refusal(503, "store_failed", "results cannot be stored now", retry_after=30) from error

    async def _read(self, client: Client, identity: str, file: str) -> bytes:
        gone = Refusal(404, "not_found", f"there is no job {identity[:64]!r}")
        if not _named(identity) or _age(identity) > self._lifetime:
            raise gone
        try:
            return await asyncio.to_thread(self._store.read, f"{_place(client, identity)}/{file}")
        except FileNotFoundError:
            raise gone from None

    @asynccontextmanager
    async def sweeping(self) -> AsyncIterator[None]:
        """Delete what is too old, now and then, until the end of the block; then finish what runs.

        Jobs whose results go with the service are not waited for, the others as long as an image may take.
        """
        task = asyncio.create_task(self._sweep())
        try:
            yield
        finally:
            task.cancel()
            live = [running for _, _, running in self._live.values()]
            if live and self._service.config.store.url is not None:
                await asyncio.wait(live, timeout=self._service.config.limits.seconds)
            for running in live:
                running.cancel()
            await asyncio.gather(task, *live, return_exceptions=True)
            self._store.close()

    async def _sweep(self) -> None:
        while True:
            try:
                for place in await asyncio.to_thread(self._store.places):
                    if _age(place.rpartition("/")[2]) > self._lifetime:
                        await asyncio.to_thread(self._store.remove, place)
            except Exception as error:
                log.error("the store of results cannot be swept", exc_info=error)
            await asyncio.sleep(min(SWEEP_SECONDS, self._lifetime / 2))


def jobs_of(http: Request) -> Jobs:
    """The jobs of the application that a request came to."""
    jobs: Jobs = http.app.state.jobs
    return jobs


def _public(name: str) -> str:
    return f"public/{name.partition('.')[0]}/{name}"


def _place(client: Client, identity: str) -> str:
    return f"{hashlib.sha256(client.id.encode()).hexdigest()[:16]}/{identity}"


def _named(identity: str) -> bool:
    stamp, dash, rest = identity.partition("-")
    return (
        bool(dash) and len(rest) == 24 and len(stamp) <= 12 and set(stamp + rest) <= set("0123456789abcdef")
    )


def _age(identity: str) -> float:
    stamp = identity.partition("-")[0]
    return time.time() - int(stamp, 16) if _named(identity) else 0.0
