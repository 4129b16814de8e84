"""How far a job is, in figures: what displays and metrics show alike."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass

from .making.pools import Pulse
from .making.tally import STAGES

WINDOW = 60.0
"""Rates and shares are those of the last so many seconds."""


@dataclass(frozen=True, slots=True)
class _Moment:
    """Sums over all engines of a run at one moment."""

    time: float
    ended: int
    busy: float = 0.0
    up: float = 0.0
    filled: float = 0.0
    room: float = 0.0


class Standing:
    """What is known of a job's progress: committed shards, and on top what engines say of their open ones.

    An engine's death takes back what it had not committed, since that has to be made again.

    Attributes:
        total, committed, rejected: images of the job; ended ones in committed shards; rejected ones of these.
        ended: committed ones and those ended in open shards.
        pulse: the last one, or None.
    """

    def __init__(self, total: int, done: int, rejected: int) -> None:
        self.total, self.committed, self.rejected = total, done, rejected
        self.ended = done
        self.pulse: Pulse | None = None
        self._samples = deque([_Moment(time.monotonic(), done)])

    def advance(self, images: int, rejected: int) -> None:
        """A shard was committed."""
        self.committed += images + rejected
        self.rejected += rejected
        self._sample()

    def see(self, pulse: Pulse) -> None:
        """The engines were looked at."""
        self.pulse = pulse
        self._sample()

    @property
    def rate(self) -> float:
        """Images ended per second."""
        first, last = self._samples[0], self._samples[-1]
        seconds = last.time - first.time
        return max(0.0, (last.ended - first.ended) / seconds) if seconds > 0 else 0.0

    @property
    def left(self) -> float | None:
        """Seconds until all are ended, at the present rate."""
        return (self.total - self.ended) / self.rate if self.rate else None

    @property
    def busy(self) -> float | None:
        """Share of the engines' time in which they had work, from 0 to 1."""
        first, last = self._samples[0], self._samples[-1]
        return (last.busy - first.busy) / (last.up - first.up) if last.up > first.up else None

    @property
    def filled(self) -> float | None:
        """Share of the busy engines' image slots in use, from 0 to 1."""
        first, last = self._samples[0], self._samples[-1]
        return (last.filled - first.filled) / (last.room - first.room) if last.room > first.room else None

    @property
    def inside(self) -> dict[str, int]:
        """Images in each stage at this moment, over all engines."""
        found: Counter[str] = Counter(dict.fromkeys(STAGES, 0))
        for engine in self.pulse.engines if self.pulse else ():
            if engine.state == "running":
                found.update(engine.reading.inside)
        return dict(found)

    def engines(self, state: str) -> int:
        """Engines that are "starting" or "running"."""
        return sum(engine.state == state for engine in self.pulse.engines) if self.pulse else 0

    def _sample(self) -> None:
        now = time.monotonic()
        engines = self.pulse.engines if self.pulse else ()
        readings = [engine.reading for engine in engines]
        live = [engine.reading for engine in engines if engine.state == "running"]
        open_shards = {shard: ended for reading in live for shard, ended in reading.uncommitted.items()}
        self.ended = min(self.total, self.committed + sum(map(sum, open_shards.values())))
        self._samples.append(
            _Moment(
                now,
                self.ended,
                sum(r.busy for r in readings),
                sum(r.up for r in readings),
                sum(r.filled for r in readings),
                sum(r.busy * r.slots for r in readings),
            )
        )
        while len(self._samples) > 2 and now - self._samples[1].time > WINDOW:
            self._samples.popleft()
