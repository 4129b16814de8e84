"""How far a job is: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from .pools import Pulse

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
        self._total, self._before, self._done, self._rejected = total, done, done, rejected
        self._began = time.monotonic()
        self._last = 0.0
        self._say()

    def advance(self, images: int, rejected: int) -> None:
        self._done += images + rejected
        self._rejected += rejected
        if time.monotonic() - self._last >= LINE_EVERY or self._done == self._total:
            self._say()

    def pulse(self, pulse: Pulse) -> None: ...

    def stop(self) -> None: ...

    def _say(self) -> None:
        self._last = time.monotonic()
        seconds = self._last - self._began
        rate = (self._done - self._before) / seconds if seconds > 0 else 0.0
        left = (
            f", {(self._total - self._done) / rate:.0f} s left" if rate and self._done < self._total else ""
        )
        print(
            f"{self._done}/{self._total} images, {self._rejected} rejected, {rate:.2f}/s{left}",
            file=sys.stderr,
            flush=True,
        )


class Terminal:
    """A live bar on standard error."""

    def __init__(self, console: Console) -> None:
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rejected]} rejected"),
            TextColumn("{task.fields[rate]:.2f}/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )

    def start(self, total: int, done: int, rejected: int) -> None:
        self._began, self._made, self._rejected = time.monotonic(), 0, rejected
        self._task = self._bar.add_task("images", total=total, completed=done, rejected=rejected, rate=0.0)
        self._bar.start()

    def advance(self, images: int, rejected: int) -> None:
        self._made += images + rejected
        self._rejected += rejected
        rate = self._made / (time.monotonic() - self._began)
        self._bar.update(self._task, advance=images + rejected, rejected=self._rejected, rate=rate)

    def pulse(self, pulse: Pulse) -> None: ...

    def stop(self) -> None:
        self._bar.stop()


def for_this_terminal() -> Progress:
    """A bar if standard error is a terminal, else lines."""
    console = Console(stderr=True)
    return Terminal(console) if console.is_terminal else Lines()
