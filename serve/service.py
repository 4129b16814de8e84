"""What every dialect calls: who asks, what may be asked, and the pictures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from starlette.requests import Request

from .config import ServeConfig
from .refusal import Refusal
from .work import Backend, Event, Finished, ModelCard, Progress, Work


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks. `id` never changes for one key; `name` is for people."""

    id: str
    name: str


@dataclass(slots=True, eq=False)
class RunningView:
    """One image of a client that waits or runs."""

    work: Work
    step: int = 0
    steps: int = 0
    preview: bytes | None = None
    started: float = field(default_factory=time.time)
    interrupted: asyncio.Event = field(default_factory=asyncio.Event)


class Service:
    """The service behind all dialects."""

    def __init__(self, config: ServeConfig, backend: Backend) -> None:
        self.config = config
        self.backend = backend
        self._running: dict[str, list[RunningView]] = {}

    async def client(self, http: Request) -> Client:
        """Who sent this request.

        Raises:
            Refusal: 401 without a valid key, 429 above a rate.
        """
        return Client("anonymous", "anonymous")

    async def models(self) -> list[ModelCard]:
        """All models, the default one first."""
        return await self.backend.cards()

    async def model(self, name: str | None) -> ModelCard:
        """One model; None is the default.

        Raises:
            Refusal: 404, there is no such model.
        """
        cards = await self.models()
        found = [card for card in cards if name is None or card.name == name]
        if not found:
            names = ", ".join(card.name for card in cards)
            raise Refusal(
                404, "model_not_found", f"there is no model {name!r}; there are {names}", field="model"
            )
        return found[0]

    async def make(self, http: Request, client: Client, works: Sequence[Work]) -> list[Finished]:
        """All pictures, in the order asked.

        Raises:
            InvalidRequest, GenerationError, Refusal.
        """
        done: dict[int, Finished] = {}
        async with aclosing(self.stream(http, client, works)) as events:
            async for index, event in events:
                if isinstance(event, Finished):
                    done[index] = event
        return [done[index] for index in range(len(works))]

    async def stream(
        self, http: Request, client: Client, works: Sequence[Work]
    ) -> AsyncGenerator[tuple[int, Event], None]:
        """Events as they come, each with the index of its work. The first comes at once, after admission.

        Closing the generator cancels what is not finished.
        """
        views = [RunningView(work) for work in works]
        self._running.setdefault(client.id, []).extend(views)
        events: asyncio.Queue[tuple[int, Event] | BaseException] = asyncio.Queue()
        tasks = [asyncio.create_task(self._one(i, view, events)) for i, view in enumerate(views)]
        tasks.append(asyncio.create_task(_watch(http, events)))
        try:
            left = len(works)
            while left:
                item = await events.get()
                if isinstance(item, BaseException):
                    raise item
                left -= isinstance(item[1], Finished)
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            mine = self._running[client.id]
            mine[:] = [view for view in mine if view not in views]
            if not mine:
                del self._running[client.id]

    async def _one(
        self, index: int, view: RunningView, events: asyncio.Queue[tuple[int, Event] | BaseException]
    ) -> None:
        interrupted = asyncio.create_task(self._interruption(view, events))
        try:
            async with aclosing(self.backend.run(view.work)) as run:
                async for event in run:
                    if isinstance(event, Progress):
                        view.step, view.steps = event.step, event.steps
                        view.preview = event.preview or view.preview
                    events.put_nowait((index, event))
        except Exception as error:
            events.put_nowait(error)
        finally:
            interrupted.cancel()

    async def _interruption(
        self, view: RunningView, events: asyncio.Queue[tuple[int, Event] | BaseException]
    ) -> None:
        await view.interrupted.wait()
        events.put_nowait(Refusal(409, "interrupted", "the request was interrupted by its client"))

    def progress(self, client: Client) -> list[RunningView]:
        """The client's images that wait or run, oldest first."""
        return list(self._running.get(client.id, ()))

    def interrupt(self, client: Client) -> int:
        """Cancel all images of the client; their requests raise Refusal "interrupted". Returns how many."""
        views = self.progress(client)
        for view in views:
            view.interrupted.set()
        return len(views)


async def _watch(http: Request, events: asyncio.Queue[tuple[int, Event] | BaseException]) -> None:
    """Tell when the client is gone; the body has been read by now."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    events.put_nowait(Refusal(499, "disconnected", "the client closed the connection"))
