"""The engine's side that any thread may touch: who waits, who is unsettled, who was taken back."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from heapq import heappop, heappush
from itertools import count
from threading import Condition
from typing import Any

from .errors import GenerationError
from .tickets import Result, Ticket


class Queue:
    """Every submitted ticket from `enter` until `settle`, which happens exactly once.

    Clients share the engine by cost, whatever each of them submits (start-time fair queueing, Goyal et al.
    1996): a ticket starts, in virtual time, where its client's last one ended, or now if that is past; it
    lasts its cost over the client's weight; who starts first is taken first, as far as there is a place for
    its bucket. Those of one client and bucket keep their order.

    Attributes:
        withdrawn: tickets whose holders cancelled them since the last `leavers`.
        failure: what stopped the engine for good.
        closed: nobody is let in any more.
    """

    def __init__(self) -> None:
        self.withdrawn: deque[Ticket] = deque()
        self.failure: BaseException | None = None
        self.closed = False
        self._changed = Condition()
        self._live: set[Ticket] = set()
        self._waiting: set[Ticket] = set()
        self._kinds: Counter[Hashable] = Counter()
        """How many tickets of each bucket wait."""
        self._errands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._lines: dict[str, dict[Hashable, deque[Ticket]]] = {}
        """What each client waits for, by bucket; none is empty."""
        self._ends: dict[str, float] = {}
        """Virtual time up to which each client has been served."""
        self._starts: list[tuple[float, int, str]] = []
        """A heap: when the next ticket of each client starts."""
        self._order = count()
        self._now = 0.0

    @property
    def waiting(self) -> int:
        """How many tickets have not been taken yet."""
        return len(self._waiting)

    @property
    def unsettled(self) -> int:
        """How many tickets wait or run."""
        return len(self._live)

    def enter(self, tickets: list[Ticket]) -> None:
        """Add all of them, or none.

        Raises:
            GenerationError: the engine is closed or broken.
        """
        with self._changed:
            self._check_open()
            for ticket in tickets:
                ticket._since = time.perf_counter()
                ticket.future.add_done_callback(ticket._settled)
                if ticket.client not in self._lines:
                    self._lines[ticket.client] = {}
                    self._stand(ticket.client)
                self._lines[ticket.client].setdefault(ticket._bucket, deque()).append(ticket)
                ticket._place = next(self._order)
            self._kinds.update(ticket._bucket for ticket in tickets)
            self._live.update(tickets)
            self._waiting.update(tickets)
            self._changed.notify_all()

    def _stand(self, client: str) -> None:
        """Now is not later than the turn of those whose buckets are full: they save up nothing against others."""
        now = min(self._now, self._starts[0][0]) if self._starts else self._now
        heappush(self._starts, (max(now, self._ends.get(client, 0.0)), next(self._order), client))

    def send(self, work: Callable[[], Any]) -> Future[Any]:
        """Have a call made on the engine's thread, between two steps.

        Raises:
            GenerationError: the engine is closed or broken.
        """
        future: Future[Any] = Future()
        with self._changed:
            self._check_open()
            self._errands.append((work, future))
            self._changed.notify_all()
        return future

    @property
    def errands(self) -> bool:
        """Whether a call has not been made yet."""
        return bool(self._errands)

    def errand(self) -> tuple[Callable[[], Any], Future[Any]] | None:
        """The call that waits longest, if its future was not cancelled."""
        while self._errands:
            work, future = self._errands.popleft()
            if future.set_running_or_notify_cancel():
                return work, future
        return None

    def take(self, fits: Callable[[Hashable], bool] = lambda bucket: True) -> Ticket | None:
        """The next one whose turn it is among those whose bucket fits; None when none does."""
        with self._changed:
            buckets = {bucket for bucket in self._kinds if fits(bucket)}
            passed: list[tuple[float, int, str]] = []
            taken = None
            while buckets and self._starts and taken is None:
                turn = heappop(self._starts)
                if taken := self._first(turn[2], buckets):
                    self._serve(taken, turn[0])
                elif turn[2] in self._lines:
                    passed.append(turn)
            for turn in passed:
                heappush(self._starts, turn)
            if taken is not None and taken.client in self._lines:
                self._stand(taken.client)
            self._forget()
            return taken

    def _first(self, client: str, buckets: set[Hashable]) -> Ticket | None:
        """The client's oldest ticket in one of the buckets; its line is dropped when nobody stands in it."""
        lines = self._lines[client]
        for bucket, line in list(lines.items()):
            while line and line[0] not in self._waiting:  # taken back while it waited
                line.popleft()
            if not line:
                del lines[bucket]
        if not lines:
            del self._lines[client]
        heads = [line[0] for bucket, line in lines.items() if bucket in buckets]
        return min(heads, key=lambda ticket: ticket._place, default=None)

    def _serve(self, ticket: Ticket, start: float) -> None:
        lines = self._lines[ticket.client]
        lines[ticket._bucket].popleft()
        if not lines[ticket._bucket]:
            del lines[ticket._bucket]
        if not lines:
            del self._lines[ticket.client]
        self._leave({ticket})
        self._now = max(self._now, start)
        self._ends[ticket.client] = start + ticket.request.cost / ticket.weight

    def _leave(self, tickets: set[Ticket]) -> None:
        """They wait no more."""
        self._kinds.subtract(ticket._bucket for ticket in tickets & self._waiting)
        self._kinds = +self._kinds
        self._waiting -= tickets

    def _forget(self) -> None:
        """Clients whose share is used up by nobody start afresh anyway."""
        if not self._lines:
            self._ends.clear()
            self._now = 0.0
        elif len(self._ends) > 64 + 2 * len(self._lines):
            self._ends = {client: end for client, end in self._ends.items() if end > self._now}

    def leavers(self) -> set[Ticket]:
        """The unsettled tickets among those taken back; they wait no more."""
        gone: set[Ticket] = set()
        while self.withdrawn:
            gone.add(self.withdrawn.popleft())
        with self._changed:
            gone &= self._live
            self._leave(gone)
            if not self._waiting:
                self._lines.clear()
                self._starts.clear()
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
            self._kinds.clear()
            self._lines.clear()
            self._starts.clear()
            tickets = list(self._live)
        reason = f"engine stopped: {type(error).__name__}: {error}"
        for ticket in tickets:
            self.settle(ticket, GenerationError(reason))
        while errand := self.errand():
            errand[1].set_exception(GenerationError(reason))

    def close(self) -> None:
        """Let nobody in any more."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def wait(self) -> bool:
        """Wait until a ticket or a call waits; False when none ever will."""
        with self._changed:
            while not self._waiting and not self._errands:
                if self.closed or self.failure is not None:
                    return False
                self._changed.wait()
            return True

    def _check_open(self) -> None:
        if self.failure is not None or self.closed:
            raise GenerationError(f"engine: closed ({self.failure or 'close was called'})")
