"""The engine's side that any thread may touch: who waits, who is unsettled, who was taken back."""

from __future__ import annotations

import time
from collections import deque
from threading import Condition

from .errors import GenerationError
from .tickets import Result, Ticket


class Queue:
    """Every submitted ticket from `enter` until `settle`, which happens exactly once.

    Attributes:
        withdrawn: tickets whose holders cancelled them since the last `leavers`.
        failure: what stopped the engine for good.
        closed: nobody is let in any more.
    """

    def __init__(self) -> None:
        self.withdrawn: deque[Ticket] = deque()
        self.failure: BaseException | None = None
        self._changed = Condition()
        self._live: set[Ticket] = set()
        self._waiting: deque[Ticket] = deque()
        self.closed = False

    @property
    def waiting(self) -> bool:
        """Whether a ticket has not been taken yet."""
        return bool(self._waiting)

    def enter(self, tickets: list[Ticket]) -> None:
        """Add all of them, or none.

        Raises:
            GenerationError: the engine is closed or broken.
        """
        with self._changed:
            if self.failure is not None or self.closed:
                raise GenerationError(f"engine: closed ({self.failure or 'close was called'})")
            for ticket in tickets:
                ticket._since = time.perf_counter()
                ticket.future.add_done_callback(ticket._settled)
            self._live.update(tickets)
            self._waiting.extend(tickets)
            self._changed.notify_all()

    def take(self) -> Ticket:
        """The one that waits longest."""
        with self._changed:
            return self._waiting.popleft()

    def leavers(self) -> set[Ticket]:
        """The unsettled tickets among those taken back; they wait no more."""
        gone: set[Ticket] = set()
        while self.withdrawn:
            gone.add(self.withdrawn.popleft())
        with self._changed:
            gone &= self._live
            if gone:
                self._waiting = deque(ticket for ticket in self._waiting if ticket not in gone)
        return gone

    def withdraw_all(self) -> None:
        """As if every holder had cancelled."""
        with self._changed:
            self.withdrawn.extend(self._live)

    def settle(self, ticket: Ticket, outcome: Result | Exception) -> None:
        """Every ticket ends here, once. A future that its holder cancelled stays cancelled."""
        with self._changed:
            if ticket not in self._live:
                return
            self._live.remove(ticket)
        ticket._denoised = None  # a kept ticket must not keep the device's memory
        if not ticket.future.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Result):
            ticket.future.set_result(outcome)
        else:
            ticket.future.set_exception(outcome)

    def fail(self, error: BaseException) -> None:
        """Settle everything with `error`, which closes the queue unless it is only an interruption."""
        with self._changed:
            if isinstance(error, Exception):
                self.failure = error
            self._waiting.clear()
            tickets = list(self._live)
        for ticket in tickets:
            self.settle(ticket, GenerationError(f"engine stopped: {type(error).__name__}: {error}"))

    def close(self) -> None:
        """Let nobody in any more."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def wait(self) -> bool:
        """Wait until a ticket waits; False when none ever will."""
        with self._changed:
            while not self._waiting:
                if self.closed or self.failure is not None:
                    return False
                self._changed.wait()
            return True
