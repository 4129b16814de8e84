"""What one worker has done and is doing, counted per image: for displays and reports, never for decisions."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

ENGINE, ENCODE, STORE = STAGES = ("engine", "encode", "store")
"""Where an image can be: waiting for or in the engine, being encoded, in a shard that is being stored."""
TEXT = "text"
"""And, in a job that has a pool of text encoders, waiting for its prompts."""


class Meter(Protocol):
    """Told about every image as it ends."""

    def made(self, seconds: Mapping[str, float]) -> None:
        """An image was made; seconds by phase."""

    def rejected(self, stage: str) -> None:
        """A row was rejected."""

    def occupancy(self, share: float) -> None:
        """How full the engine is at this moment."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A worker's tally at one moment.

    Attributes:
        images, rejected: ended by this worker, whether committed yet or not; rejected by stage.
        uncommitted: (images, rejected) of each shard that is not committed yet.
        inside: images in each of `STAGES` now, and in `TEXT` if there is such a stage.
        prompts: how many were "encoded" for this worker, and "shared" with others.
        up: seconds since the worker began.
        busy: seconds of these in which its engine had work.
        filled: integral of the engine's images over time, at most `slots` of them counted.
        slots: images that the engine denoises together.
        first_image: seconds from the first submitted image to the first made one; None before.
    """

    images: int = 0
    rejected: Mapping[str, int] = field(default_factory=dict)
    uncommitted: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    inside: Mapping[str, int] = field(default_factory=dict)
    prompts: Mapping[str, int] = field(default_factory=dict)
    up: float = 0.0
    busy: float = 0.0
    filled: float = 0.0
    slots: int = 1
    first_image: float | None = None

    @property
    def occupancy(self) -> float:
        """Share of the engine's slots that had an image, while it had any."""
        return self.filled / (self.busy * self.slots) if self.busy else 0.0


class Tally:
    """Kept by one worker on its event loop.

    Args:
        slots: images that the engine denoises together.
        meter: told about every image too.
        prompts: says how many prompts were encoded so far.
    """

    def __init__(
        self, slots: int = 1, meter: Meter | None = None, prompts: Callable[[], Mapping[str, int]] = dict
    ) -> None:
        self.slots, self._meter, self._prompts = max(1, slots), meter, prompts
        self._began = self._changed = time.monotonic()
        self._images = 0
        self._rejected: Counter[str] = Counter()
        self._uncommitted: dict[int, list[int]] = {}
        self._inside: Counter[str] = Counter()
        self._busy = self._filled = 0.0
        self._submitted: float | None = None
        self._first: float | None = None

    @contextmanager
    def inside(self, stage: str, images: int = 1) -> Iterator[None]:
        """So many images are in a stage for the time of the block."""
        self._move(stage, images)
        try:
            yield
        finally:
            self._move(stage, -images)

    def begin(self, shard: int) -> None:
        """A shard's images follow."""
        self._uncommitted[shard] = [0, 0]

    def made(self, shard: int, seconds: Mapping[str, float]) -> None:
        """An image of a shard is made."""
        self._images += 1
        if shard in self._uncommitted:
            self._uncommitted[shard][0] += 1
        if self._meter is not None:
            self._meter.made(seconds)

    def rejected(self, shard: int, stage: str) -> None:
        """A row of a shard is rejected."""
        self._rejected[stage] += 1
        if shard in self._uncommitted:
            self._uncommitted[shard][1] += 1
        if self._meter is not None:
            self._meter.rejected(stage)

    def end(self, shard: int) -> None:
        """A shard is committed, or this worker makes it no more."""
        self._uncommitted.pop(shard, None)

    def reading(self) -> Reading:
        """All of it, now."""
        self._integrate()
        return Reading(
            images=self._images,
            rejected=dict(self._rejected),
            uncommitted={shard: (made, rejected) for shard, (made, rejected) in self._uncommitted.items()},
            inside=dict(self._inside),
            prompts=dict(self._prompts()),
            up=self._changed - self._began,
            busy=self._busy,
            filled=self._filled,
            slots=self.slots,
            first_image=None
            if self._first is None or self._submitted is None
            else self._first - self._submitted,
        )

    def _move(self, stage: str, images: int) -> None:
        if stage == ENGINE:
            self._integrate()
            if images > 0 and self._submitted is None:
                self._submitted = self._changed
            if images < 0 and self._first is None:
                self._first = self._changed
        self._inside[stage] += images
        if stage == ENGINE and self._meter is not None:
            self._meter.occupancy(min(self._inside[ENGINE], self.slots) / self.slots)

    def _integrate(self) -> None:
        now = time.monotonic()
        passed, self._changed = now - self._changed, now
        if in_engine := self._inside[ENGINE]:
            self._busy += passed
            self._filled += passed * min(in_engine, self.slots)
