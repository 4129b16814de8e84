"""Other ways of serving, made of the same engine by holding work back, to compare step-level batching with."""

from __future__ import annotations

from asyncio import Future, get_running_loop
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

from .config import ServeConfig
from .engines import Engines
from .work import Event, Work


class Batches(Engines):
    """Engines whose works enter in batches: the next is let in when the last work of a batch has ended.

    A batch is whatever waits at that moment, `size` works at most; nobody waits for it to fill. With `size` 1 works
    run one at a time. This is kinder than most servers of its kind: the works of a batch may differ in everything,
    and each is answered when it is done, not when its batch is.
    """

    def __init__(self, config: ServeConfig, size: int) -> None:
        super().__init__(config)
        self._size = size
        self._inside = 0
        self._waiting: deque[Future[None]] = deque()

    async def run(self, work: Work) -> AsyncGenerator[Event, None]:
        """See `Backend.run`; it begins when the work's batch does."""
        async with self._place(), aclosing(super().run(work)) as events:
            async for event in events:
                yield event

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        turn = get_running_loop().create_future()
        self._waiting.append(turn)
        self._let_in()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._inside -= 1
                self._let_in()

    def _let_in(self) -> None:
        if self._inside:
            return
        while self._waiting and self._inside < self._size:
            turn = self._waiting.popleft()
            if not turn.done():  # otherwise its client has gone
                turn.set_result(None)
                self._inside += 1
