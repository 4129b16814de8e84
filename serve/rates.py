"""How much each client may ask for in a time: rates, counted here or in a Redis that several services share.

They are counted in windows that follow each other, of which the one before fades out while the next runs; so a rate of
one per hour may let two pass shortly after each other, where two windows meet, and then none for an hour.

A shared store that cannot be reached refuses nobody: until it answers again each service counts for itself, so that a
client gets its rate from each of them at most.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any, cast

from limits import RateLimitItem, parse
from limits.aio.storage import SlidingWindowCounterSupport, Storage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import StorageError
from limits.storage import storage_from_string

from . import metrics
from .config import InvalidConfig
from .refusal import Refusal

log = logging.getLogger("diffray.serve")
LOCAL = "memory://"
STORE_SECONDS = 1.0
"""For an answer of the shared store; a request waits no longer for it."""
PAUSE = 5.0
"""Seconds without the shared store after it failed."""
ROUNDING = 0.001
"""Seconds; the stores' own clocks and fractions are no finer."""


class Rates:
    """Counters of clients. Belongs to one event loop."""

    def __init__(self, storage: str) -> None:
        self._own = _limiter(LOCAL)
        self._shared = None if storage == LOCAL else _limiter(storage)
        self._away_until = 0.0

    async def hit(self, client: str, text: str | None, unit: str, amount: int) -> None:
        """Count an amount against a client's rate; None allows any.

        Raises:
            Refusal: 422, it can never fit; 429, with the time after which it does.
        """
        rate = parsed(text, unit)
        if rate is None:
            return
        if amount > rate.amount:
            raise Refusal(
                422, "over_budget", f"this request takes {amount} {unit}, allowed are {text} in all"
            )
        wait = await self._wait(rate, unit, client, amount)
        if wait:
            raise Refusal(429, "rate_limited", f"allowed are {text} ({unit})", retry_after=wait)

    async def _wait(self, rate: RateLimitItem, unit: str, client: str, amount: int) -> float:
        """0 when it was counted, else seconds until it may fit."""
        if self._shared is not None and time.monotonic() >= self._away_until:
            try:
                return await _counted(self._shared, rate, unit, client, amount)
            except (StorageError, OSError) as error:
                self._away_until = time.monotonic() + PAUSE
                metrics.RATE_STORE_FAILURES.add()
                log.error("the store of rates cannot be reached, this service counts for itself: %s", error)
        return await _counted(self._own, rate, unit, client, amount)


def parsed(text: str | None, name: str) -> RateLimitItem | None:
    """A rate such as "100/minute".

    Raises:
        InvalidConfig: it is none.
    """
    if text is None:
        return None
    try:
        return parse(text)
    except ValueError:
        raise InvalidConfig(f'{name}: got {text!r}, allowed is a rate such as "100/minute"') from None


def _limiter(url: str) -> SlidingWindowCounterRateLimiter:
    options: dict[str, Any] = {}
    if url != LOCAL:
        options = {
            "implementation": "redispy",
            "socket_timeout": STORE_SECONDS,
            "socket_connect_timeout": STORE_SECONDS,
        }
    storage = storage_from_string(f"async+{url}", wrap_exceptions=True, **options)
    assert isinstance(storage, Storage)
    return SlidingWindowCounterRateLimiter(storage)


async def _counted(
    limiter: SlidingWindowCounterRateLimiter, rate: RateLimitItem, unit: str, client: str, amount: int
) -> float:
    if await limiter.hit(rate, unit, client, cost=amount):
        return 0.0
    storage = cast("SlidingWindowCounterSupport", limiter.storage)
    window = rate.get_expiry()
    return _fits_after(
        amount, rate.amount, window, *await storage.get_sliding_window(rate.key_for(unit, client), window)
    )


def _fits_after(
    amount: int, allowed: int, window: int, before: int, before_ends: float, now: int, now_ends: float
) -> float:
    """Whole seconds after which an amount fits, if nothing else comes.

    What counts is `now`, of the running window, and of `before`, of the window before, the share that a window ending
    now would still cover: it falls to none at `before_ends`. `now` becomes `before` when its window ends, and is
    forgotten one more window later, at `now_ends`. (The sliding window counter of `limits`, whose own reset time is
    when *anything* gets free, not when the amount fits.)
    """
    room = allowed - amount + 1  # what counts must be less, since its fraction is dropped
    if now < room:
        free = before_ends - window * (room - now) / before if before else 0.0
    else:
        free = now_ends - window * room / now
    return math.floor(max(0.0, free) + ROUNDING) + 1.0
