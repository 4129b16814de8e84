"""How far a job is: a live display in a terminal, plain lines elsewhere. Both move with every image."""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from .making.pools import Pulse
from .making.tally import STAGES

LINE_EVERY = 10.0
"""Seconds between two plain lines."""
WINDOW = 60.0
"""Rates and shares are those of the last so many seconds."""


class Progress(Protocol):
    """Told by a job how far it is."""

    def start(self, total: int, done: int, rejected: int) -> None:
        """The job has `total` images, of which `done` were ended by earlier runs."""

    def advance(self, images: int, rejected: int) -> None:
        """A shard was committed with so many images and rejected rows."""

    def pulse(self, pulse: Pulse) -> None:
        """How the engines are, about once a second."""

    def stop(self) -> None:
        """Nothing more will come."""


class Silent:
    """Says nothing."""

    def start(self, total: int, done: int, rejected: int) -> None: ...

    def advance(self, images: int, rejected: int) -> None: ...

    def pulse(self, pulse: Pulse) -> None: ...

    def stop(self) -> None: ...


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
        readings = [engine.reading for engine in self.pulse.engines] if self.pulse else []
        live = (
            [engine.reading for engine in self.pulse.engines if engine.state == "running"]
            if self.pulse
            else []
        )
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


class Lines:
    """A line to standard error at the start, every ten seconds, and at the end."""

    def start(self, total: int, done: int, rejected: int) -> None:
        self._standing = Standing(total, done, rejected)
        self._last = time.monotonic()
        self._say()

    def advance(self, images: int, rejected: int) -> None:
        self._standing.advance(images, rejected)
        if self._standing.committed == self._standing.total:
            self._say()
        else:
            self._say_now_and_then()

    def pulse(self, pulse: Pulse) -> None:
        self._standing.see(pulse)
        self._say_now_and_then()

    def stop(self) -> None: ...

    def _say_now_and_then(self) -> None:
        if time.monotonic() - self._last >= LINE_EVERY and self._standing.committed < self._standing.total:
            self._say()

    def _say(self) -> None:
        self._last = time.monotonic()
        now = self._standing
        line = f"{now.ended}/{now.total} images, {now.rejected} rejected, {now.rate:.2f}/s"
        if now.left is not None and now.ended < now.total:
            line += f", {_clock(now.left)} left"
        print("; ".join([line, *_engines(now)]), file=sys.stderr, flush=True)


class Terminal:
    """A live display on standard error."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def start(self, total: int, done: int, rejected: int) -> None:
        self._standing = Standing(total, done, rejected)
        self._bar = _Bar(self._standing, self._console)
        self._bar.start()

    def advance(self, images: int, rejected: int) -> None:
        self._standing.advance(images, rejected)
        self._bar.move()

    def pulse(self, pulse: Pulse) -> None:
        self._standing.see(pulse)
        self._bar.move()

    def stop(self) -> None:
        self._bar.stop()


class _Bar(Bar):
    """A bar with figures, and under it what the engines do."""

    def __init__(self, standing: Standing, console: Console) -> None:
        self._standing = standing
        super().__init__(
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("[bold]{task.completed:,.0f}[/] of {task.total:,.0f} images"),
            _Pace(standing),
            TimeElapsedColumn(),
            console=console,
            expand=True,
        )
        self._only = self.add_task("", total=standing.total, completed=standing.ended)

    def move(self) -> None:
        self.update(self._only, completed=self._standing.ended)

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        style = "red" if self._standing.rejected else "dim"
        dot = Text("  ·  ", style="dim")
        rejected = Text(f"{self._standing.rejected:,} rejected", style=style)
        yield dot.join([rejected, *(Text(part, style="dim") for part in _shards(self._standing))])
        yield dot.join(Text(part, style="dim") for part in _engines(self._standing))


class _Pace(ProgressColumn):
    """Rate and time left."""

    def __init__(self, standing: Standing) -> None:
        self._standing = standing
        super().__init__()

    def render(self, task: Task) -> Text:
        now = self._standing
        left = _clock(now.left) if now.left is not None else "-:--"
        return Text(f"{now.rate:.2f}/s  {left} left" if now.ended < now.total else f"{now.rate:.2f}/s")


def _shards(now: Standing) -> Iterator[str]:
    if now.pulse is not None:
        yield f"{now.pulse.running} shard{'s' * (now.pulse.running != 1)} in work, {now.pulse.waiting:,} waiting"


def _engines(now: Standing) -> Iterator[str]:
    """What there is to say about engines and stages, part by part."""
    if now.pulse is None:
        return
    starting, running = now.engines("starting"), now.engines("running")
    engines = f"{running} engine{'s' * (running != 1)}"
    if now.busy is not None:
        engines += f" {now.busy:.0%} busy"
    if now.filled is not None:
        engines += f", slots {now.filled:.0%} full"
    yield engines + (f", {starting} starting" if starting else "")
    if running:
        yield ", ".join(f"{stage} {images}" for stage, images in now.inside.items())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def for_this_terminal() -> Progress:
    """A live display if standard error is a terminal, else lines."""
    console = Console(stderr=True)
    return Terminal(console) if console.is_terminal else Lines()
