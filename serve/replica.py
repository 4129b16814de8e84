"""Engines behind Ray Serve: the replica that holds them, and the handle through which an ingress uses many."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from diffray.model import DiffrayError
from diffray.model.allocator import keep_freed_memory

from . import metrics
from .config import ServeConfig
from .engines import ENGINE_DOWN, EngineHangs, Engines
from .refusal import Refusal
from .work import Event, ModelCard, Progress, Work

log = logging.getLogger("diffray.serve")
ATTEMPTS = 4
"""Of one image: a seeded one comes out the same wherever it is made."""
DEATHS = 2
"""Replicas that may die of one image, or beside it: who takes too much memory should not take all of them along."""
FAILED = (RayActorError, RayTaskError, ReplicaUnavailableError)
"""What comes from one replica, or from its loss; `Attempts` knows what follows."""
PAUSE = 1.0
"""Seconds before the next attempt after a broken engine, whose replica is found out by its next health check."""
START_SECONDS = 60.0
"""For which an ingress waits for a replica to start, when there is none."""
OTHER_VERSION = "other_version"
"""While a new version is rolled out an ingress meets replicas of two."""
PROBE_SECONDS = 2.0
"""For which a readiness probe waits; what it heard counts for PROBE_LASTS."""
PROBE_LASTS = 1.0
LOOK_AGAIN = 0.2
"""Seconds until it asks for one of its own again."""


class Replica:
    """One process with engines. Ready when the default model has made an image."""

    async def __init__(self, values: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        self.config = ServeConfig.checked(values)
        self.version = version(self.config)
        keep_freed_memory()
        self.engines = Engines(self.config, renew=False)  # Serve replaces all of this process
        await self.engines.start()
        await self.hold(self.config.default_model)

    async def run(self, work: Work) -> AsyncGenerator[Event | None, None]:
        """See `Backend.run`; Serve cancels it when the ingress does.

        Its first event, None, says that the work is here, whatever it waits for now.
        """
        yield None
        if work.model in self.config.models:
            await self.hold(work.model)
        events = self.engines.run(work)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def hold(self, name: str) -> str:
        """Tells Serve's router which models are here; see `multiplexed`."""
        return name

    async def cards(self, version: str) -> list[ModelCard]:
        """See `Backend.cards`; for an ingress of the same version."""
        self._compare(version)
        return await self.engines.cards()

    async def model(self, version: str, name: str) -> ModelCard:
        """See `Backend.model`; for an ingress of the same version."""
        self._compare(version)
        return await self.engines.model(name)

    def _compare(self, version: str) -> None:
        if version != self.version:
            raise Refusal(503, OTHER_VERSION, "this replica is of another version")

    async def check_health(self) -> None:
        """What Serve asks now and then; a replica that raises is replaced, once its images have ended.

        Those in an engine that hangs never do. So this process ends, and they are made elsewhere while there is time.
        """
        try:
            await self.engines.check()
        except EngineHangs as error:
            log.critical("this replica ends itself: %s", error)
            os._exit(1)


def multiplexed(models: int) -> type[Replica]:
    """A replica that holds so many models at most and whose router sends images to where their model is.

    Which model is dropped when is decided by `Residents`; Serve only hears of it.
    """

    class Multiplexed(Replica):
        @serve.multiplexed(max_num_models_per_replica=models)  # type: ignore[untyped-decorator]
        async def hold(self, name: str) -> str:
            return name

    return Multiplexed


class HandleBackend:
    """A `Backend` of all replicas. What a lost one had begun is begun again on another."""

    def __init__(self, config: ServeConfig, handle: DeploymentHandle[Any]) -> None:
        self._config = config
        self._handle = handle
        self._version = version(config)
        self._cards: dict[str, ModelCard] = {}
        self._probe: asyncio.Task[None] | None = None
        self._probed = 0.0

    async def started(self) -> None:
        """Returns when a replica of this version is up, however long that takes."""
        while True:
            try:
                await self.model(self._config.default_model)
                return
            except Refusal:
                await asyncio.sleep(LOOK_AGAIN)

    async def cards(self) -> list[ModelCard]:
        """See `Backend.cards`."""
        cards: list[ModelCard] = await self._ask("cards", self._version)
        self._cards |= {card.name: card for card in cards}
        return cards

    async def model(self, name: str) -> ModelCard:
        """See `Backend.model`. What a model is does not change, so each is asked for once."""
        if name not in self._cards:
            self._cards[name] = await self._ask("model", self._version, name)
        return self._cards[name]

    async def check(self) -> None:
        """Whether a replica answers, lately; one that scales to zero is well without any."""
        assert self._config.replicas is not None
        if not self._config.replicas.min:
            return
        now = asyncio.get_running_loop().time()
        if self._probe is None or (self._probe.done() and now > self._probed + PROBE_LASTS):
            self._probe = asyncio.create_task(self._ask("check_health", seconds=PROBE_SECONDS))
            self._probe.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._probed = now
        await asyncio.shield(self._probe)

    def sample(self) -> None:
        """The engines' gauges are those of the replicas' processes."""

    async def _ask(self, method: str, *arguments: Any, seconds: float = START_SECONDS) -> Any:
        deadline = asyncio.get_running_loop().time() + seconds
        attempts = Attempts(self._config)
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    try:
                        return await getattr(self._handle, method).remote(*arguments)
                    except FAILED as error:
                        await attempts.after(error)
            except (TimeoutError, DeploymentUnavailableError):
                raise starting() from None

    async def run(self, work: Work) -> AsyncGenerator[Event, None]:
        """See `Backend.run`."""
        most = self._config.limits.seconds
        seconds = most if work.seconds is None else min(work.seconds, most)
        deadline = asyncio.get_running_loop().time() + seconds
        run = self._handle.options(stream=True, multiplexed_model_id=work.model).run
        attempts = Attempts(self._config, work.model)
        reached = -1
        while True:
            response: Any = run.remote(work)
            arrived = False
            try:
                while True:
                    try:
                        async with asyncio.timeout_at(deadline):
                            event = await anext(response)
                    except StopAsyncIteration:
                        return
                    arrived = True
                    if event is None:
                        continue
                    if isinstance(event, Progress) and event.step <= reached:
                        continue  # known from before the replica was lost
                    if isinstance(event, Progress):
                        reached = event.step
                    yield event
            except TimeoutError:
                if not arrived:
                    raise starting() from None
                raise Refusal(504, "timeout", f"not finished within {seconds:g} s") from None
            except DeploymentUnavailableError:
                raise starting() from None
            except BackPressureError:
                raise Refusal(503, "queue_full", "too many images wait already", retry_after=5) from None
            except FAILED as error:
                await attempts.after(error, begun=arrived)
            finally:
                response.cancel()


class Attempts:
    """How often one thing was tried, on whichever replicas."""

    def __init__(self, config: ServeConfig, model: str | None = None) -> None:
        self._known = model in config.models
        self._left = ATTEMPTS
        self._deaths = 0

    async def after(self, error: Exception, begun: bool = False) -> None:
        """Returns when another attempt makes sense; else raises what a client may know.

        Args:
            begun: a replica had it in its hands already.
        """
        cause = error.cause if isinstance(error, RayTaskError) else error
        code = cause.code if isinstance(cause, Refusal) else ""
        if code in (OTHER_VERSION, ENGINE_DOWN) or (code == "model_not_found" and self._known):
            # Not this image's doing, and there is a deadline.
            await asyncio.sleep(PAUSE if code == ENGINE_DOWN else LOOK_AGAIN)
            return
        self._left -= 1
        self._deaths += begun and isinstance(cause, RayActorError)
        broken = code == "engine_broken"
        if isinstance(cause, DiffrayError) and not (broken and self._left):
            raise cause from None
        if not isinstance(cause, RayActorError | ReplicaUnavailableError | Refusal):
            raise error
        if not self._left or self._deaths >= DEATHS:
            raise Refusal(503, "replica_lost", "the replica was lost, try again", retry_after=2) from None
        metrics.RETRIES.add()
        await asyncio.sleep(PAUSE if broken else 0.1)


def version(config: ServeConfig) -> str:
    """What tells one version of a service from another: all that it is made with."""
    return hashlib.sha256(config.model_dump_json().encode()).hexdigest()


def starting() -> Refusal:
    """The refusal while no replica is up yet."""
    return Refusal(503, "starting", "the model is being started, try again", retry_after=15)
