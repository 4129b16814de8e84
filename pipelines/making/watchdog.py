"""Noticing that a worker hangs: a kernel that never returns, a driver that is stuck, a thread that waits for ever.

A worker is alive as long as its engine makes steps, its sources are read or its images end. One that does none of
it, although there is work, is as good as dead; it ends like one, and its rows are found out like those that kill
(`outputs/attempts.py`). A storage that answers slowly, or at the third attempt, is no hanging; a read that never ends
is.
"""

from __future__ import annotations

import asyncio
import faulthandler
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


class Hanging(Exception):
    """Nothing moved for too long although there was work."""


class Watchdog:
    """Watches one worker.

    Args:
        patience: seconds without any progress that are too long.
        progress: a value that changes whenever something got done.

    Attributes:
        last_resort: end the process by a timer of its own, with a traceback, when even this watchdog gets no
            turn: native code may hang with Python's lock in its hand.
    """

    def __init__(self, patience: float, progress: Callable[[], object]) -> None:
        self._patience, self._progress = patience, progress
        self._watched = 0
        self._last: object = None
        self._since = time.monotonic()
        self.last_resort = False

    async def watch(self, work: Awaitable[T]) -> T:
        """The result of `work`.

        Raises:
            Hanging: neither it nor anything else of this worker moved for too long.
        """
        task = asyncio.ensure_future(work)
        self._watched += 1
        self._since = time.monotonic()
        try:
            while True:
                self._rearm()
                done, _ = await asyncio.wait({task}, timeout=min(1.0, self._patience / 4))
                if done:
                    return task.result()
                self._look()
        except BaseException:
            task.cancel()
            raise
        finally:
            self._watched -= 1
            self._rearm()

    def _look(self) -> None:
        now, state = time.monotonic(), self._progress()
        if state != self._last:
            self._last, self._since = state, now
        elif now - self._since > self._patience:
            raise Hanging(f"hangs: no step, read or image was finished in {self._patience:g} s")

    def _rearm(self) -> None:
        if not self.last_resort:
            return
        if self._watched:
            faulthandler.dump_traceback_later(2 * self._patience, exit=True, file=2)
        else:
            faulthandler.cancel_dump_traceback_later()
