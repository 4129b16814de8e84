"""How far a job is: a live display in a terminal, plain lines elsewhere. Both move with every image."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from .making.pools import Pulse
from .standing import Standing

LINE_EVERY = 10.0
"""Seconds between two plain lines."""


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
