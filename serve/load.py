"""Load on a service, as its clients see it: Poisson arrivals over HTTP, and the latencies of the answers.

The load is open: a request is sent when it is due, however many earlier ones are unanswered, and its latency counts
from that moment. In a closed loop each client waits for its answer before it asks again: the slower the service
gets the less it is asked, which hides what its users feel.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp
import numpy as np

from .refusal import Refusal

ALONE = 6
"""Requests that measure an idle service."""
PATIENCE = 3600.0
"""Seconds after which a request counts as lost."""
SETTLING = 0.25
"""Share of the capacity's measurement that is left out at its beginning."""
COLOURS = ("red", "green", "blue", "yellow", "white", "purple", "orange", "pink")
SHAPES = ("circle", "square", "triangle", "star")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is asked.

    Attributes:
        sizes, steps: (width, height) and sampler steps; every request draws one of each, all alike likely. No size
            is the model's own.
        shares: offered load over capacity; above 1 the queue grows for as long as the load lasts.
        seconds: for which each load lasts; then all answers are waited for.
        deadline: seconds within which an answer counts as good; None takes a multiple of an idle service's.
        outstanding: requests that are kept unanswered while the capacity is measured.
        capacity: images per second; None measures it.
        model: None is the service's default.
        seed: the same one makes the same requests at the same times.
    """

    steps: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...] = ()
    shares: tuple[float, ...] = (0.5, 0.8, 0.95)
    seconds: float = 30.0
    deadline: float | None = None
    outstanding: int = 32
    capacity: float | None = None
    model: str | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """One request: when it was due, when its answer was whole (seconds), and the HTTP status, 0 for none."""

    due: float
    ended: float
    status: int

    @property
    def latency(self) -> float:
        """Seconds since the request was due, whenever it was sent."""
        return self.ended - self.due


@dataclass(slots=True, kw_only=True)
class Load:
    """All answers of one way of serving at one share of the capacity.

    Attributes:
        rate: requests per second that were offered.
        batch: images that the engine denoises together, where that is known.
        steps, occupied: denoising steps, and the sum over them of the share of the batch that was in use.
    """

    way: str
    share: float
    rate: float
    batch: int | None = None
    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0
    steps: float = 0.0
    occupied: float = 0.0

    def summary(self, deadline: float) -> dict[str, Any]:
        """The figures; latencies in seconds, of the requests that got their picture."""
        made = [answer.latency for answer in self.answers if answer.status == 200]
        quantiles = [float(q) for q in np.quantile(made, (0.5, 0.9, 0.99))] if made else [None] * 3
        return {
            "way": self.way,
            "share": self.share,
            "rate": self.rate,
            "requests": len(self.answers),
            "made": len(made),
            **dict(zip(("p50", "p90", "p99"), quantiles, strict=True)),
            "goodput": sum(latency <= deadline for latency in made) / len(self.answers),
            "images_per_second": len(made) / self.seconds,
            "occupancy": self.occupied / self.steps if self.steps else None,
            "batch": self.batch,
        }


class Target:
    """A service at an address, asked through its native API."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self._url = url.rstrip("/")
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    async def __aenter__(self) -> Target:
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=PATIENCE),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def make(self, body: dict[str, Any]) -> int:
        """Ask for a picture and read it; the status, 0 where no whole answer came."""
        try:
            async with self._session.post(f"{self._url}/v1/diffray/images", json=body) as answer:
                await answer.read()
                return answer.status
        except (aiohttp.ClientError, TimeoutError):
            return 0

    async def steps(self) -> tuple[float, float]:
        """(steps, sum of the shares of the batch in use) since the service began; zeros where it does not tell."""
        try:
            async with self._session.get(f"{self._url}/metrics") as answer:
                text = await answer.text() if answer.status == 200 else ""
        except aiohttp.ClientError:
            text = ""
        return _total(text, "diffray_batch_occupancy_count"), _total(text, "diffray_batch_occupancy_sum")


def _total(text: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def requests(plan: Plan, seed: int) -> Iterator[dict[str, Any]]:
    """Bodies of the plan's mix without end; the same ones for the same seed."""
    rng = random.Random(seed)
    while True:
        prompt = f"a {rng.choice(COLOURS)} {rng.choice(SHAPES)} on a {rng.choice(COLOURS)} background"
        body: dict[str, Any] = {
            "prompt": prompt,
            "steps": rng.choice(plan.steps),
            "seed": rng.randrange(2**32),
        }
        if plan.sizes:
            body["width"], body["height"] = rng.choice(plan.sizes)
        if plan.model:
            body["model"] = plan.model
        yield body


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """When requests are due, in seconds from 0: a Poisson process of `rate` per second. Never empty."""
    rng, times = random.Random(-1 - seed), [0.0]
    while (due := times[-1] + rng.expovariate(rate)) < seconds:
        times.append(due)
    return times


async def alone(target: Target, plan: Plan, count: int = ALONE) -> list[float]:
    """Latencies of requests that nothing else runs beside; one before them, which warms up, is left out.

    Raises:
        Refusal: the service does not answer, or refuses requests like these.
    """
    times = [time.perf_counter()]
    for _, body in zip(range(count + 1), requests(plan, plan.seed), strict=False):
        status = await target.make(body)
        if status == 0:
            raise Refusal(503, "unreachable", "the service does not answer")
        if status != 200:
            raise Refusal(status, "refused", f"the service answers {body} with status {status}")
        times.append(time.perf_counter())
    return [after - before for before, after in pairwise(times[1:])]


async def capacity(target: Target, plan: Plan) -> float:
    """Images per second while `plan.outstanding` requests are unanswered all the time.

    Raises:
        Refusal: the time is too short for a single picture.
    """
    bodies, ended = requests(plan, plan.seed + 1), list[float]()
    begun = time.perf_counter()
    until = begun + plan.seconds

    async def client() -> None:
        while time.perf_counter() < until:
            if await target.make(next(bodies)) == 200:
                ended.append(time.perf_counter())
            else:
                await asyncio.sleep(0.1)  # so many are more than it takes

    await asyncio.gather(*(client() for _ in range(plan.outstanding)))
    since = begun + SETTLING * plan.seconds
    counted = sum(since <= moment <= until for moment in ended)
    if not counted:
        raise Refusal(
            504, "slow", f"no picture was finished within {plan.seconds:g} s; the load must last longer"
        )
    return counted / (until - since)


async def offer(target: Target, plan: Plan, times: Sequence[float], seed: int) -> list[Answer]:
    """Send a request at each of `times` and wait for all answers."""
    start = time.perf_counter() + 0.1
    answers: list[Answer] = []

    async def one(due: float, body: dict[str, Any]) -> None:
        status = await target.make(body)
        answers.append(Answer(due, time.perf_counter() - start, status))

    async with asyncio.TaskGroup() as group:
        for due, body in zip(times, requests(plan, seed), strict=False):
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            group.create_task(one(due, body))
    return answers


async def measure(target: Target, plan: Plan, load: Load, turn: int) -> None:
    """Offer `load` once more and add the answers to it.

    A turn has the same requests at the same times for every way of serving.
    """
    seed = plan.seed + 2 + turn * len(plan.shares) + plan.shares.index(load.share)
    before = await target.steps()
    answers = await offer(target, plan, arrivals(load.rate, plan.seconds, seed), seed)
    after = await target.steps()
    load.answers += answers
    load.seconds += max(answer.ended for answer in answers)
    load.steps += after[0] - before[0]
    load.occupied += after[1] - before[1]
