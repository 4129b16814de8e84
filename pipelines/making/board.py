"""The backlog as an actor: turns ask it for shards, engines report to it, the driver looks at it.

It holds no truth. What is committed is known by the commit records alone; should the board die, Ray starts it
with the job's shards again, and those that are final cost their engine a look.

Its code is sent to its process by value, with nothing but the standard library in it, so that it starts in a
moment and weighs little; so everything that goes in and out is plain data.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from .backlog import Backlog

SILENCE = 30.0
"""Seconds after which an engine that reports no more counts as lost, and its shards go to others."""
TICK = 1.0
"""Seconds between two reports of an engine, and between two looks at who waits."""


class Board:
    """One pool's backlog. A turn is a call of the pool's actors that makes a few shards, one after the other.

    Args:
        shards: what is to be made.
        in_flight: shards that one engine holds at most.
    """

    def __init__(self, shards: Sequence[int], in_flight: int) -> None:
        self._backlog = Backlog(shards, in_flight)
        self._began = time.monotonic()
        self._engines: dict[str, dict[str, Any]] = {}
        self._turns: dict[int, tuple[str, int]] = {}
        self._recalls: dict[str, set[int]] = {}
        self._ended: list[tuple[int, int, int]] = []
        self._dead: set[str] = set()
        """Engines whose calls, should some still wait here, are nobody's any more."""
        self._closed = False
        self._changed = asyncio.Condition()

    async def join(self, engine: str, facts: dict[str, Any]) -> None:
        """A process has begun to load its model. `facts`: actor, node, accelerator, seconds since it began.

        A process that lived in the same actor before is dead.
        """
        for name, other in list(self._engines.items()):
            if other["actor"] == facts["actor"] and name != engine:
                self._dead.add(name)
                await self._lose(name)
        place = max(0.0, time.monotonic() - self._began - facts["seconds"])
        self._engines[engine] = {**facts, "state": "starting", "place": place, "heard": time.monotonic()}
        self._backlog.join(engine)

    async def take(self, turn: int, engine: str) -> int | None:
        """The next shard for a turn of an engine, as soon as it is to have one; None when there is no more.

        A turn that already has a shard is being replayed after a death, which frees that shard.
        """
        async with self._changed:
            if turn in self._turns:
                holder, shard = self._turns.pop(turn)
                if holder == engine:
                    self._turns[turn] = holder, shard
                    return shard
                if self._backlog.holds(holder, shard):
                    self._backlog.give_back(holder, shard)
            while not self._closed and self._backlog.left and engine not in self._dead:
                if engine in self._backlog:
                    now = time.monotonic()
                    if (found := self._backlog.take(engine, now)) is not None:
                        self._turns[turn] = engine, found
                        return found
                    if (recalled := self._backlog.recall(engine, now)) is not None:
                        self._recalls.setdefault(recalled[0], set()).add(recalled[1])
                await self._wait()
            return None

    async def done(self, turn: int, engine: str, shard: int, images: int, rejected: int) -> None:
        """A turn's shard is committed."""
        async with self._changed:
            self._turns.pop(turn, None)
            self._ended.append((shard, images, rejected))
            self._backlog.done(engine, shard, time.monotonic())
            self._changed.notify_all()

    async def give_back(self, turn: int, engine: str, shard: int) -> None:
        """A turn's shard was stopped, as asked."""
        async with self._changed:
            self._turns.pop(turn, None)
            if self._backlog.holds(engine, shard):
                self._backlog.give_back(engine, shard)
            self._changed.notify_all()

    async def report(self, engine: str, facts: dict[str, Any], reading: dict[str, Any]) -> list[int]:
        """An engine lives; returns the shards that it is to stop. `facts` as for `join`, and its `start`."""
        known = self._engines.setdefault(engine, {**facts, "place": 0.0})
        known |= {**facts, "state": "running", "heard": time.monotonic(), "reading": reading}
        self._backlog.join(engine)
        for shard in reading["uncommitted"]:
            self._backlog.keep(engine, shard)
        if self._closed:
            return list(reading["uncommitted"])
        return list(self._recalls.pop(engine, ()))

    async def look(self, began: float, listed: int) -> dict[str, Any]:
        """Everything for the driver; of the committed shards those after the first `listed` ones, or all if the
        board that listed these began at another time."""
        now = time.monotonic()
        for name, engine in list(self._engines.items()):
            if engine["state"] == "running" and now - engine["heard"] > SILENCE:
                await self._lose(name)
        return {
            "engines": {name: dict(engine) for name, engine in self._engines.items()},
            "began": self._began,
            "ended": self._ended[listed if began == self._began else 0 :],
            "listed": len(self._ended),
            "waiting": self._backlog.waiting,
            "running": self._backlog.left - self._backlog.waiting,
        }

    async def close(self) -> None:
        """Let every turn end, without its shard if that is not nearly final."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def _lose(self, engine: str) -> None:
        async with self._changed:
            self._engines[engine]["state"] = "lost"
            self._backlog.leave(engine)
            self._changed.notify_all()

    async def _wait(self) -> None:
        """Until something changes, but not longer than a tick, as time alone may make a recall worth it."""
        try:
            await asyncio.wait_for(self._changed.wait(), TICK)
        except TimeoutError:
            return
