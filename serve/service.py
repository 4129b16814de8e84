"""What every dialect calls: who asks, what may be asked, and the pictures."""

from __future__ import annotations

import asyncio
import base64
import binascii
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from starlette.requests import Request

from diffray.model import ImageRequest, InvalidRequest
from diffray.model.adapters.choices import check_known

from .admission import Admission, Client, Permit
from .config import InvalidConfig, ServeConfig
from .guardrails import Guards
from .keys import Key, Keys, configured
from .refusal import Refusal
from .work import Backend, Event, Finished, ModelCard, Progress, Work

__all__ = ["Client", "RunningView", "Service"]

TIMEOUT_HEADER = "x-timeout-seconds"
"""A client's own deadline; the service's is never exceeded."""
UNREAD = 4
"""Events of one image that wait for a client which reads slowly; older ones are dropped, its picture never."""
MARGIN = 10.0
"""Seconds beyond `limits.seconds` after which an image's place is free whatever its backend does."""
Outcome = int | BaseException
"""The index of an image that has an unread event, or the end of all."""


@dataclass(slots=True, eq=False)
class RunningView:
    """One image of a client that waits or runs."""

    work: Work
    step: int = 0
    steps: int = 0
    preview: bytes | None = None
    started: float = field(default_factory=time.time)
    interrupted: asyncio.Event = field(default_factory=asyncio.Event)
    unread: deque[Event] = field(default_factory=lambda: deque(maxlen=UNREAD))

    def tell(self, event: Event) -> bool:
        """Have the client told, who need not read of a step without a preview once there is a newer one.

        Returns:
            Whether one more event is unread.
        """
        if isinstance(event, Progress):
            self.step, self.steps = event.step, event.steps
            self.preview = event.preview or self.preview
            last = self.unread[-1] if self.unread else None
            if isinstance(last, Progress) and last.preview is None:
                self.unread[-1] = event
                return False
        full = len(self.unread) == UNREAD
        self.unread.append(event)
        return not full


class Service:
    """The service behind all dialects. Belongs to one event loop.

    Raises:
        InvalidConfig: keys, block-list, hooks or rates cannot be read, or anybody could use it.
    """

    def __init__(self, config: ServeConfig, backend: Backend) -> None:
        self.config = config
        self.backend = backend
        self.keys = Keys(config.access.keys)
        self.admission = Admission(config.limits)
        self._guards = Guards(config.guardrails)
        self._running: dict[str, list[RunningView]] = {}
        check_access(config)

    @property
    def anonymous(self) -> bool:
        """Whether a key is needed by nobody."""
        return self.config.access.anonymous or not self.keys.required

    async def client(self, http: Request) -> Client:
        """Who sent this request, by its bearer token or by the password of basic authentication.

        Raises:
            Refusal: 401 without a valid key.
        """
        token = _token(http.headers.get("authorization", ""))
        key = self.keys.find(token) if token and self.keys.required else None
        if key is not None:
            client = _known(key)
        elif self.anonymous:
            client = Client(f"anonymous:{http.client.host if http.client else ''}", "anonymous")
        else:
            raise Refusal(401, "unauthorized", "no valid API key was given (Authorization: Bearer ...)")
        http.state.client = client
        return client

    async def models(self) -> list[ModelCard]:
        """All models, the default one first."""
        return await self.backend.cards()

    async def model(self, name: str | None) -> ModelCard:
        """One model; None is the default.

        Raises:
            Refusal: 404, there is no such model; 503, it cannot be read.
        """
        return await self.backend.model(self.config.default_model if name is None else name)

    async def make(self, http: Request | None, client: Client, works: Sequence[Work]) -> list[Finished]:
        """All pictures, in the order asked.

        Args:
            http: cancels what is not finished when its client goes away; None when nobody listens.

        Raises:
            InvalidRequest, GenerationError, Refusal: the first of any image; the others are cancelled.
        """
        done: dict[int, Finished] = {}
        async with aclosing(self.stream(http, client, works)) as events:
            async for index, event in events:
                if isinstance(event, Finished):
                    done[index] = event
        return [done[index] for index in range(len(works))]

    async def stream(
        self, http: Request | None, client: Client, works: Sequence[Work]
    ) -> AsyncGenerator[tuple[int, Event], None]:
        """Events as they come, each with the index of its work; the first as soon as an engine has it in its queue.

        Closing the generator cancels what is not finished. An image's place is free as soon as it ends, however slowly
        its events are read.
        """
        seconds = None if http is None else _seconds(http)
        works = [_owned(work, client, seconds) for work in works]
        self.admission.check_count(len(works))
        costs = [await self._cost(work) for work in works]
        await self._guards.check_prompts([work.request for work in works])
        with self.admission.admitted(client, costs) as permit:
            await self.admission.charge(client, sum(costs))
            if http is not None:
                http.state.generation = {
                    "models": sorted({w.model for w in works}),
                    "cost": round(sum(costs), 3),
                }
                http.state.works = works
            views = [RunningView(work, steps=work.request.steps or 0) for work in works]
            self._running.setdefault(client.id, []).extend(views)
            events: asyncio.Queue[Outcome] = asyncio.Queue()
            tasks = [asyncio.create_task(self._one(permit, i, view, events)) for i, view in enumerate(views)]
            if http is not None:
                tasks.append(asyncio.create_task(_watch(http, events)))
            try:
                left = len(works)
                while left:
                    item = await events.get()
                    if isinstance(item, BaseException):
                        raise item
                    event = views[item].unread.popleft()
                    left -= isinstance(event, Finished)
                    yield item, event
            finally:
                for task in tasks:
                    task.cancel()
                self._forget(client, views)  # first: who waits here may be cancelled once more
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _cost(self, work: Work) -> float:
        """What the work costs, after everything about its values was checked that can be without an engine."""
        card, request = await self.model(work.model), work.request
        if request.output != "image":
            raise InvalidRequest("output", f"got {request.output!r}, the service makes images")
        check_known(request.adapters, card.adapters)
        if card.config is not None:
            request = request.resolved(card.config)
        else:
            request = replace(
                request,
                width=request.width or card.width,
                height=request.height or card.height,
                steps=request.steps or card.steps,
            )
        _check_pixels(request, self.config.limits.image_pixels)
        return request.cost

    async def _one(
        self, permit: Permit, index: int, view: RunningView, events: asyncio.Queue[Outcome]
    ) -> None:
        interrupted = asyncio.create_task(_interruption(view, events))
        try:
            async with (
                asyncio.timeout(self.config.limits.seconds + MARGIN),
                aclosing(self.backend.run(view.work)) as run,
            ):
                async for event in run:
                    if isinstance(event, Finished):
                        self.admission.finish(permit, index)
                    if view.tell(event):
                        events.put_nowait(index)
        except TimeoutError:
            seconds = self.config.limits.seconds
            events.put_nowait(Refusal(504, "timeout", f"not finished within {seconds:g} s"))
        except Exception as error:
            events.put_nowait(error)
        finally:
            self.admission.give_back(permit, index)
            interrupted.cancel()

    def _forget(self, client: Client, views: list[RunningView]) -> None:
        mine = self._running[client.id]
        mine[:] = [view for view in mine if view not in views]
        if not mine:
            del self._running[client.id]

    def progress(self, client: Client) -> list[RunningView]:
        """The client's images that wait or run, oldest first."""
        return list(self._running.get(client.id, ()))

    def interrupt(self, client: Client) -> int:
        """Cancel all images of the client; their requests raise Refusal "interrupted". Returns how many."""
        views = self.progress(client)
        for view in views:
            view.interrupted.set()
        return len(views)


def check_access(config: ServeConfig) -> None:
    """Returns when somebody can use the service, and nobody by somebody's mistake.

    Raises:
        InvalidConfig: it has no keys, and others can reach it or nobody may use it without.
    """
    anonymous = config.private if config.access.anonymous is None else config.access.anonymous
    if anonymous or configured(config.access.keys):
        return
    reason = f"host {config.host} can be reached by others"
    if config.access.anonymous is False:
        reason = "access.anonymous is false and there are no keys"
    raise InvalidConfig(
        f"{reason}: make keys with `diffray keys add` and name their file as access.keys, or allow everybody with "
        "access.anonymous: true"
    )


def _known(key: Key) -> Client:
    return Client(key.id, key.id, key.requests, key.cost, key.images_at_once, key.weight)


def _check_pixels(request: ImageRequest, most: int) -> None:
    """Raises InvalidRequest for an image of more pixels, those of its second pass if it has one."""
    width, height = (
        round((side or 0) * (request.hires_scale or 1.0)) for side in (request.width, request.height)
    )
    if width * height > most:
        field = "width" if request.hires_scale is None else "hires_scale"
        raise InvalidRequest(field, f"got an image of {width}x{height}, allowed are {most} pixels")


def _owned(work: Work, client: Client, seconds: float | None) -> Work:
    given = [limit for limit in (work.seconds, seconds) if limit is not None]
    return replace(work, client=client.id, weight=client.weight, seconds=min(given, default=None))


def _token(authorization: str) -> str:
    """The key in an Authorization header: a bearer token, or what basic authentication calls the password."""
    kind, _, value = authorization.partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""


def _seconds(http: Request) -> float | None:
    text = http.headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise Refusal(
            400, "invalid_value", f"{TIMEOUT_HEADER}: allowed are seconds above 0", field=TIMEOUT_HEADER
        )
    return seconds


async def _watch(http: Request, events: asyncio.Queue[Outcome]) -> None:
    """Tell when the client is gone; the body has been read by now."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    events.put_nowait(Refusal(499, "disconnected", "the client closed the connection"))


async def _interruption(view: RunningView, events: asyncio.Queue[Outcome]) -> None:
    await view.interrupted.wait()
    events.put_nowait(Refusal(409, "interrupted", "the request was interrupted by its client"))
