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
from .config import Limits, ModelEntry, ServeConfig
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
        """Everything as plain values: the figures, and every request's times under "answers"."""
        values = {name: getattr(self, name) for name in ("capacity", "alone", "deadline", "batch")}
        answers = [
            [[round(a.due, 4), round(a.ended, 4), a.status] for a in load.answers] for load in self.loads
        ]
        rows = [row | {"answers": times} for row, times in zip(self.rows(), answers, strict=True)]
        return {"plan": asdict(self.plan), **values, "loads": rows}


async def measure_service(
    url: str, plan: Plan, key: str | None = None, say: Callable[[str], None] = print
) -> Outcome:
    """Measure the service at `url` as it is.

    Raises:
        Refusal: it does not answer, or refuses the plan's requests.
    """
    async with Target(url, key) as target:
        latency, most = await _idle(target, plan, say)
        loads: dict[tuple[str, float], Load] = {}
        await measure(target, plan, AS_IT_IS, loads, most, 0, say)
        return _outcome(plan, most, latency, None, loads)


async def compare(
    model: ModelEntry, plan: Plan, *, turns: int = 2, say: Callable[[str], None] = print
) -> Outcome:
    """Measure the three ways of serving `model`, each in a service of its own in this process, over HTTP.

    Every turn sends the same requests at the same times to each way, and the next turn takes the ways in the other
    order, so that a slow minute of the machine does not hit one way alone. One at a time gets an engine for single
    images, which pays for no padding.
    """
    async with serving(model, Engines) as (target, batch):
        plan = replace(plan, outstanding=max(plan.outstanding, 3 * batch))
        latency, most = await _idle(target, plan, say)
    ways: dict[str, tuple[ModelEntry, Callable[[ServeConfig], Engines]]] = {
        ONE: (model.model_copy(update={"batch_size": 1}), lambda config: Batches(config, 1)),
        REQUEST_LEVEL: (model, lambda config: Batches(config, batch)),
        STEP_LEVEL: (model, Engines),
    }
    loads: dict[tuple[str, float], Load] = {}
    for turn in range(turns):
        for way, (entry, backend) in list(ways.items())[:: -1 if turn % 2 else 1]:
            async with serving(entry, backend) as (target, size):
                await alone(target, plan)
                await measure(target, plan, way, loads, most, turn, say, batch=size)
    return _outcome(plan, most, latency, batch, loads)


@asynccontextmanager
async def serving(
    model: ModelEntry, backend: Callable[[ServeConfig], Engines]
) -> AsyncIterator[tuple[Target, int]]:
    """A service of one model on a free loopback port: what asks it, and its batch size.

    It has a thread and an event loop of its own, so that a request is sent when it is due, whatever the service does.
    """
    config = ServeConfig(models={"model": model}, limits=NO_LIMITS, page=False, log="off")
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


def _outcome(plan: Plan, most: float, latency: float, batch: int | None, loads: dict[Any, Load]) -> Outcome:
    ordered = sorted(loads.values(), key=lambda load: load.share)  # ways stay in their order
    return Outcome(plan, most, latency, plan.deadline or SLACK * latency, batch, ordered)


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
