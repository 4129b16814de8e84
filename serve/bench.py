"""What ways of serving give under the same load: each is started here, the same requests are sent to each."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from threading import Thread
from typing import Any

import uvicorn

from .app import create_app
from .config import Access, Limits, ModelEntry, ServeConfig
from .engines import Engines
from .load import Load, Plan, Target, alone, capacity, measure
from .rivals import Batches
from .service import Service

STEP_LEVEL, REQUEST_LEVEL, ONE = "step-level batching", "request-level batching", "one at a time"
AS_IT_IS = "the service"
SLACK = 5.0
"""The deadline that is not given, in mean latencies of an idle service."""
NO_LIMITS = Limits(cost=1e9, queue_cost=1e9, queue_images=10**6, images_at_once=10**6, seconds=3600.0)
"""Everything waits: a refused request has no latency that could be compared."""
WARM = 3
"""Requests to a fresh service that nobody counts."""
BACKLOG = 2048
"""Connections that may wait to be accepted."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was measured.

    Attributes:
        capacity: images per second that the service makes when it is never idle: the loads are shares of it.
        alone: mean latency in seconds of a request that nothing else runs beside.
        deadline: seconds within which an answer counts as good.
        batch: images that the engine denoises together; None where the service does not tell.
    """

    plan: Plan
    capacity: float
    alone: float
    deadline: float
    batch: int | None
    loads: list[Load]

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary of figures for each load."""
        return [load.summary(self.deadline) for load in self.loads]

    def raw(self) -> dict[str, Any]:
        """Everything as plain values: the figures, and when every request was due and ended, in seconds."""
        values = {name: getattr(self, name) for name in ("capacity", "alone", "deadline", "batch")}
        loads = [
            row
            | {
                "due": [round(answer.due, 3) for answer in load.answers],
                "ended": [round(answer.ended, 3) for answer in load.answers],
                "status": [answer.status for answer in load.answers],
            }
            for row, load in zip(self.rows(), self.loads, strict=True)
        ]
        return {"plan": asdict(self.plan), **values, "loads": loads}


async def measure_service(
    url: str, plan: Plan, key: str | None = None, say: Callable[[str], None] = print
) -> Outcome:
    """Measure the service at `url` as it is.

    Raises:
        Refusal: it does not answer, or refuses the plan's requests.
    """
    async with Target(url, key) as target:
        latency, most = await _idle(target, plan, say)
        loads = [Load(way=AS_IT_IS, share=share, rate=share * most) for share in plan.shares]
        for load in loads:
            say(f"{load.rate:.2f} requests/s ...")
            await measure(target, plan, load, 0)
        return Outcome(plan, most, latency, plan.deadline or SLACK * latency, None, loads)


async def compare(
    model: ModelEntry, plan: Plan, *, turns: int = 2, say: Callable[[str], None] = print
) -> Outcome:
    """Measure the three ways of serving `model`, each in a service of its own in this process, over HTTP.

    At each share the ways follow each other, under the same requests at the same times, and in the next turn in the
    other order, so that a slow minute of the machine does not hit one of them alone. One at a time gets an engine for
    single images, which pads nothing.
    """
    async with serving(model, Engines) as (target, batch):
        plan = replace(plan, outstanding=max(plan.outstanding, 3 * batch))
        latency, most = await _idle(target, plan, say)
    ways: dict[str, tuple[ModelEntry, Callable[[ServeConfig], Engines]]] = {
        ONE: (model.model_copy(update={"batch_size": 1}), lambda config: Batches(config, 1)),
        REQUEST_LEVEL: (model, lambda config: Batches(config, batch)),
        STEP_LEVEL: (model, Engines),
    }
    loads = [Load(way=way, share=share, rate=share * most) for share in plan.shares for way in ways]
    for turn in range(turns):
        for load in loads[:: -1 if turn % 2 else 1]:
            entry, backend = ways[load.way]
            say(f"turn {turn + 1} of {turns}: {load.rate:.2f} requests/s, {load.way} ...")
            async with serving(entry, backend) as (target, load.batch):
                await alone(target, plan, WARM)
                await measure(target, plan, load, turn)
    return Outcome(plan, most, latency, plan.deadline or SLACK * latency, batch, loads)


@asynccontextmanager
async def serving(
    model: ModelEntry, backend: Callable[[ServeConfig], Engines]
) -> AsyncIterator[tuple[Target, int]]:
    """A service of one model on a free loopback port: what asks it, and its batch size.

    It has a thread and an event loop of its own, so that a request is sent when it is due, whatever the service does.
    """
    access = Access(anonymous=True)  # whatever keys the environment has
    config = ServeConfig(models={"model": model}, limits=NO_LIMITS, access=access, page=False, log="off")
    ready: Future[tuple[uvicorn.Server, int]] = Future()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = Thread(target=lambda: asyncio.run(_serve(config, backend, listener, ready)), daemon=True)
        thread.start()
        server, batch = await asyncio.wrap_future(ready)
        try:
            async with Target(f"http://127.0.0.1:{listener.getsockname()[1]}") as target:
                yield target, batch
        finally:
            server.should_exit = True
            await asyncio.to_thread(thread.join)


async def _serve(
    config: ServeConfig,
    backend: Callable[[ServeConfig], Engines],
    listener: socket.socket,
    ready: Future[tuple[uvicorn.Server, int]],
) -> None:
    engines = backend(config)
    try:
        await engines.start()
        resident = engines.residents.get("model")
        assert resident is not None
        server = uvicorn.Server(uvicorn.Config(create_app(Service(config, engines)), log_level="warning"))
        listener.listen(BACKLOG)
        ready.set_result((server, resident.engine.batch_size))
        await server.serve([listener])
    except BaseException as error:
        if ready.done():
            raise
        ready.set_exception(error)
    finally:
        await engines.close()


async def _idle(target: Target, plan: Plan, say: Callable[[str], None]) -> tuple[float, float]:
    """(mean latency alone, capacity) of a service."""
    say("an idle service ...")
    latencies = await alone(target, plan)
    latency = sum(latencies) / len(latencies)
    if plan.capacity is not None:
        return latency, plan.capacity
    say(f"  {latency:.3f} s for one request; its capacity ...")
    most = await capacity(target, plan)
    say(f"  {most:.3f} images/s")
    return latency, most


HEAD = ("load", "served", "p50, s", "p90, s", "p99, s", "goodput", "images/s", "batch", "requests", "refused")


def table(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The figures of `Outcome.rows` as text, a tuple for each load, under `HEAD`."""
    return [
        (
            f"{row['share']:.0%}, {row['rate']:.2f}/s",
            row["way"],
            *("-" if row[p] is None else f"{row[p]:.2f}" for p in ("p50", "p90", "p99")),
            f"{row['goodput']:.0%}",
            f"{row['images_per_second']:.2f}",
            _occupancy(row),
            str(row["requests"]),
            str(row["requests"] - row["made"]),
        )
        for row in rows
    ]


def _occupancy(row: dict[str, Any]) -> str:
    share, batch = row["occupancy"], row["batch"]
    if share is None:
        return "-"
    return f"{share:.0%}" if batch is None else f"{share * batch:.1f} of {batch}"
