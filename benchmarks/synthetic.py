"""A synthetic device, for measuring scheduling alone: an engine that sleeps where a real one computes.

It batches as the real engine does, up to `batch_size` images at every step, whoever asked for them, and its
pictures are all the same gradient. Nothing outside the benchmarks knows it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import Any

from PIL import Image

from diffray.model.request import ImageRequest
from diffray.model.tickets import Result
from diffray.pipelines.models import Models, OpenModel
from diffray.pipelines.options import ModelOptions


class SyntheticTicket:
    """A request, the steps that are left of it, and its future result."""

    def __init__(self, request: ImageRequest) -> None:
        self.request, self.left = request, request.steps or 1
        self.future: Future[Result] = Future()


class SyntheticEngine:
    """Sleeps `step` seconds for every step of a batch."""

    rows = 1
    failure = None

    def __init__(self, config: Any, batch_size: int, step: float) -> None:
        self.batch_size, self.ticks = batch_size, 0
        self._config, self._step = config, step
        self._waiting: deque[SyntheticTicket] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: ImageRequest) -> SyntheticTicket:
        """Queue one image."""
        ticket = SyntheticTicket(request.resolved(self._config))
        with self._changed:
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def close(self) -> None:
        """Stop, whatever waits."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        batch: list[SyntheticTicket] = []
        due = time.monotonic()
        while True:
            with self._changed:
                while not (batch or self._waiting or self._closed):
                    self._changed.wait()
                    due = time.monotonic()
                if self._closed:
                    return
                while self._waiting and len(batch) < self.batch_size:
                    batch.append(self._waiting.popleft())
            due = max(due + self._step, time.monotonic())  # a late wake-up is no longer step
            time.sleep(max(0.0, due - time.monotonic()))
            self.ticks += 1
            batch = [ticket for ticket in batch if self._stepped(ticket)]

    def _stepped(self, ticket: SyntheticTicket) -> bool:
        """Whether a ticket stays after one more step."""
        ticket.left -= 1
        if ticket.future.cancelled():
            return False
        if ticket.left:
            return True
        if ticket.future.set_running_or_notify_cancel():
            size = ticket.request.width or 8, ticket.request.height or 8
            image = Image.linear_gradient("L").resize(size).convert("RGB")
            ticket.future.set_result(Result(image, None, ticket.request, {}))
        return False


class SyntheticModels(Models):
    """Opens synthetic devices; some may be slower than others.

    Args:
        step: seconds of a step.
        slow: factor by which the first process that asks is slower.
        marks: folder in which that process leaves its mark.
    """

    def __init__(self, step: float, slow: float = 1.0, marks: str = "") -> None:
        super().__init__()
        self._seconds, self._slow, self._marks = step, slow, marks

    def open(self, options: ModelOptions) -> OpenModel:
        """A device of its own."""
        seconds = self._seconds * (self._slow if self._first() else 1.0)
        engine: Any = SyntheticEngine(self.config(options), options.batch_size or 8, seconds)
        return OpenModel(engine, "synthetic", "synthetic", "cpu", "float32")

    def _first(self) -> bool:
        if not self._marks or self._slow == 1.0:
            return False
        try:
            with open(f"{self._marks}/first", "x"):
                return True
        except FileExistsError:
            return False
