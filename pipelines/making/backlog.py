"""Which shards wait, who holds the others, and what an engine gets next. No Ray in here.

Engines pull: a shard belongs to an engine only from the moment that it can begin. While much is left, an
engine holds several shards, so that it never runs dry between two; towards the end each gets fewer, down to
one, so that none holds work that others could do. And when an engine has nothing to do, while a slower one is
not expected to finish sooner than the idle one could do the whole shard, that shard is asked back: a shard
moves, it is never made twice at once, so that its files have one writer.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

GAIN = 1.0
"""Seconds that moving a shard must be expected to save."""


@dataclass(slots=True)
class Holder:
    """One engine's part of the backlog."""

    shards: list[int] = field(default_factory=list)
    """Held now, in the order in which it got them."""
    since: float = 0.0
    """When it last ended a shard, or began to hold one."""
    pace: float | None = None
    """Seconds from one ended shard to the next; None before the first."""
    returned: set[int] = field(default_factory=set)
    """Asked back from it; somebody else is to make them."""


class Backlog:
    """The shards of one model that are not final yet. Times are any clock's seconds.

    Args:
        shards: in the order in which they are to be made.
        in_flight: shards that one engine holds at most.
    """

    def __init__(self, shards: Iterable[int], in_flight: int) -> None:
        self._waiting = deque(shards)
        self._in_flight = in_flight
        self._holders: dict[str, Holder] = {}
        self._recalled: set[int] = set()

    @property
    def waiting(self) -> int:
        """Shards that nobody holds."""
        return len(self._waiting)

    @property
    def left(self) -> int:
        """Shards that are not final yet."""
        return len(self._waiting) + sum(len(holder.shards) for holder in self._holders.values())

    def __contains__(self, engine: object) -> bool:
        return engine in self._holders

    def join(self, engine: str) -> None:
        """There is an engine, or will soon be, that can take shards."""
        self._holders.setdefault(engine, Holder())

    def leave(self, engine: str) -> None:
        """An engine is gone; what it held goes first again, and what others gave back for it they may have again."""
        holder = self._holders.pop(engine, None)
        if holder is not None:
            self._recalled -= set(holder.shards)
            self._waiting.extendleft(reversed(holder.shards))
            for other in self._holders.values():
                other.returned.clear()

    def holds(self, engine: str, shard: int) -> bool:
        """Whether this engine holds this shard."""
        return engine in self._holders and shard in self._holders[engine].shards

    def keep(self, engine: str, shard: int) -> None:
        """An engine says that it holds a shard, which only it can know; ignored where somebody else does."""
        if shard in self._waiting:
            self._waiting.remove(shard)
            self._holders[engine].shards.append(shard)

    def take(self, engine: str, now: float) -> int | None:
        """The next shard for an engine, or None when it is to get none at present."""
        holder = self._holders[engine]
        share = -(-len(self._waiting) // len(self._holders))
        if len(holder.shards) >= max(1, min(self._in_flight, share)):
            return None
        others = len(self._holders) > 1
        shard = next((s for s in self._waiting if not (others and s in holder.returned)), None)
        if shard is None:
            return None
        self._waiting.remove(shard)
        if not holder.shards:
            holder.since = now
        holder.shards.append(shard)
        return shard

    def done(self, engine: str, shard: int, now: float) -> None:
        """A shard is final, whoever was thought to hold it."""
        self._recalled.discard(shard)
        if shard in self._waiting:
            self._waiting.remove(shard)
        for other in self._holders.values():
            if shard in other.shards and other is not self._holders.get(engine):
                other.shards.remove(shard)
        if not self.holds(engine, shard):
            return
        holder = self._holders[engine]
        holder.shards.remove(shard)
        took = now - holder.since
        holder.pace = took if holder.pace is None else (holder.pace + took) / 2
        holder.since = now

    def give_back(self, engine: str, shard: int) -> None:
        """An engine gave a shard back, as it was asked to."""
        holder = self._holders[engine]
        holder.shards.remove(shard)
        holder.returned.add(shard)
        self._recalled.discard(shard)
        self._waiting.appendleft(shard)

    def recall(self, engine: str, now: float) -> tuple[str, int] | None:
        """For an engine without work: the engine and shard to ask back for it, each shard only once.

        None where no move is expected to end the job sooner.
        """
        own = self._holders[engine]
        if self._waiting or own.shards:
            return None
        gain, holder, shard = max(
            (
                (_gain(other, position, own.pace, now), name, shard)
                for name, other in self._holders.items()
                for position, shard in enumerate(other.shards, start=1)
                if shard not in self._recalled and shard not in own.returned
            ),
            default=(0.0, "", -1),
        )
        if gain < GAIN:
            return None
        self._recalled.add(shard)
        return holder, shard


def _gain(holder: Holder, position: int, own: float | None, now: float) -> float:
    """Seconds that an idle engine of pace `own` ends the shard sooner which `holder` has at `position` (from 1).

    What is overdue is expected to take as long again as it is late. An unknown pace is taken to be the other's;
    with both unknown a shard that is not its holder's first has hardly begun.
    """
    pace = holder.pace or own
    if pace is None:
        return math.inf if position > 1 else 0.0
    return abs(position * pace - (now - holder.since)) - (own or pace)
