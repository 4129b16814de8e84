"""What is let in: every limit is checked here, before any accelerator works.

Costs are megapixel-steps (`ImageRequest.cost`). What is refused is refused at once, with the time after which
trying again makes sense.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from . import metrics
from .config import Limits
from .rates import Rates, parsed
from .refusal import Refusal

SPEED_MEMORY = 60.0
"""Seconds over which the service's speed is averaged, for guesses of how long a queue lasts."""


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks.

    Attributes:
        id: never changes for one key.
        name: for logs.
        requests, cost, images_at_once: its own limits, None where the service's count.
        weight: its share of the engines beside other clients'.
    """

    id: str
    name: str
    requests: str | None = None
    cost: str | None = None
    images_at_once: int | None = None
    weight: float = 1.0


@dataclass(slots=True, eq=False)
class Permit:
    """What one admitted request holds: its images' costs, given back one by one."""

    client: Client
    costs: dict[int, float] = field(default_factory=dict)


class Admission:
    """The counters of one ingress. Not thread safe: belongs to one event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held: Counter[str] = Counter()
        self._cost = 0.0
        self._speed = Speed()
        self._rates = Rates(limits.storage)
        for name in ("requests_per_key", "cost_per_key"):
            parsed(getattr(limits, name), name)

    @property
    def images(self) -> int:
        """Admitted and not finished."""
        return self._held.total()

    @property
    def cost(self) -> float:
        """Of the images admitted and not finished."""
        return self._cost

    @contextmanager
    def admitted(self, client: Client, costs: Sequence[float]) -> Iterator[Permit]:
        """Room for one request's images until the end of the block; `finish` and `give_back` free some earlier.

        Raises:
            Refusal: 422 over the budget of one request, 429 over the client's images at once, 503 queue full.
        """
        self._check_budget(costs)
        self._check_room(client, costs)
        permit = Permit(client, dict(enumerate(costs)))
        self._held[client.id] += len(costs)
        self._cost += sum(costs)
        self._show()
        try:
            yield permit
        finally:
            for index in list(permit.costs):
                self.give_back(permit, index)

    def check_count(self, images: int) -> None:
        """Returns when a request may have so many images.

        Raises:
            Refusal: 422.
        """
        if images > (most := self._limits.images):
            raise Refusal(422, "too_many_images", f"got {images} images, allowed are {most} in a request")

    def check_full(self, client: Client) -> None:
        """Returns when there is room for one more image of this client, whatever it is.

        Raises:
            Refusal: 429 or 503, as `admitted`.
        """
        self._check_room(client, (0.0,))

    def finish(self, permit: Permit, index: int) -> None:
        """One image was made: its room is free and its cost shows how fast the service is."""
        self._speed.add(permit.costs.get(index, 0.0))
        self.give_back(permit, index)

    def give_back(self, permit: Permit, index: int) -> None:
        """One image ended somehow: its room is free."""
        if (cost := permit.costs.pop(index, None)) is None:
            return
        self._held[permit.client.id] -= 1
        if not self._held[permit.client.id]:
            del self._held[permit.client.id]
        self._cost = self._cost - cost if self._held else 0.0  # no drift of rounding errors
        self._show()

    def _show(self) -> None:
        metrics.ADMITTED_IMAGES.set(self.images)
        metrics.ADMITTED_COST.set(self.cost)

    def _check_budget(self, costs: Sequence[float]) -> None:
        self.check_count(len(costs))
        limits, total = self._limits, sum(costs)
        if total > limits.cost:
            raise Refusal(
                422,
                "over_budget",
                f"this request costs {total:.1f} megapixel-steps (width x height x steps x images / 1,000,000), "
                f"allowed are {limits.cost:g}",
            )

    def _check_room(self, client: Client, costs: Sequence[float]) -> None:
        limits, total = self._limits, sum(costs)
        at_once = client.images_at_once or limits.images_at_once
        if self._held[client.id] + len(costs) > at_once:
            held = self._held[client.id]
            if len(costs) > at_once:
                raise Refusal(
                    422,
                    "too_many_images",
                    f"got {len(costs)} images, allowed are {at_once} of one client at once",
                )
            raise Refusal(
                429,
                "too_many_at_once",
                f"{held} images of this client wait or run, allowed are {at_once} at once",
                retry_after=self._speed.seconds(self._cost / max(1, self.images)),
            )
        full = self.images + len(costs) > limits.queue_images or self._cost + total > limits.queue_cost
        if full and self.images:  # a request within its budget fits an empty queue
            wait = self._speed.seconds(max(total, self._cost / 4))
            raise Refusal(503, "queue_full", "too many images wait already", retry_after=wait)

    async def charge(self, client: Client, cost: float) -> None:
        """Count a request and its cost against the client's rates.

        Raises:
            Refusal: 429, with the time after which it fits.
        """
        requests = client.requests or self._limits.requests_per_key
        await self._rates.hit(client.id, requests, "requests", 1)
        budget = client.cost or self._limits.cost_per_key
        await self._rates.hit(client.id, budget, "megapixel-steps", max(1, round(cost)))


class Speed:
    """Cost that the service gets done per second, lately."""

    def __init__(self) -> None:
        self._done = 0.0
        self._since = time.monotonic()

    def add(self, cost: float) -> None:
        """So much was done now."""
        now = time.monotonic()
        elapsed = now - self._since
        if elapsed > SPEED_MEMORY:
            self._done *= SPEED_MEMORY / elapsed
            self._since = now - SPEED_MEMORY
        self._done += cost

    def seconds(self, cost: float) -> float:
        """A guess of how long this cost takes, in 1..60."""
        elapsed = max(time.monotonic() - self._since, 0.1)
        speed = self._done / elapsed
        return min(60.0, max(1.0, cost / speed)) if speed else 5.0
