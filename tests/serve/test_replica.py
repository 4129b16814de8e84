"""What an ingress makes of its replicas, without Ray: a handle that does as the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

from diffray.model import ImageRequest
from diffray.serve import replica
from diffray.serve.config import ServeConfig
from diffray.serve.refusal import Refusal
from diffray.serve.replica import HandleBackend
from diffray.serve.work import Finished, Progress, Work

from .ask import ask
from .live import live
from .scripted import Scripted

CONFIG = ServeConfig.checked({"replicas": {}, "log": "off"})
DONE = Finished(b"", ImageRequest(), "embedded", "", {})
Step = Any
"""An event, an error, or a number: seconds that it takes."""


class Answer:
    """What comes back from a replica, by and by."""

    def __init__(self, steps: list[Step]) -> None:
        self._steps = steps

    def __aiter__(self) -> AsyncGenerator[Any, None]:
        return self._told()

    async def _told(self) -> AsyncGenerator[Any, None]:
        for step in self._steps:
            if isinstance(step, BaseException):
                raise step
            if isinstance(step, float):
                await asyncio.sleep(step)
            else:
                yield step

    def __await__(self) -> Iterator[Any]:
        return anext(self.__aiter__()).__await__()

    async def __anext__(self) -> Any:
        self._running = getattr(self, "_running", None) or self._told()
        return await anext(self._running)

    def cancel(self) -> None:
        """Nobody works on it."""


class Handle:
    """A deployment whose attempts, one after the other, do these steps; then the last one's again."""

    def __init__(self, *attempts: list[Step]) -> None:
        self._attempts = list(attempts)
        self.asked = 0

    def options(self, **_: object) -> Handle:
        return self

    def __getattr__(self, method: str) -> Handle:
        return self

    def remote(self, *_: object) -> Answer:
        steps = self._attempts[min(self.asked, len(self._attempts) - 1)]
        self.asked += 1
        return Answer(steps)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PAUSE", "LOOK_AGAIN"):
        monkeypatch.setattr(replica, name, 0.01)


def made(handle: Handle, seconds: float = 30.0) -> list[Any]:
    """The events of one image."""

    async def collected() -> list[Any]:
        wanted = Work(request=ImageRequest(), model="embedded", seconds=seconds)
        return [event async for event in HandleBackend(CONFIG, handle).run(wanted)]  # type: ignore[arg-type]

    return asyncio.run(collected())


def refused(call: Callable[[], object]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        call()
    return caught.value


def test_that_a_replica_has_it_is_nobody_else_s_business() -> None:
    assert made(Handle([None, Progress(1, 2), DONE])) == [Progress(1, 2), DONE]


def test_a_start_that_takes_longer_than_the_client_s_time() -> None:
    refusal = refused(lambda: made(Handle([30.0]), seconds=0.05))
    assert (refusal.status, refusal.code) == (503, "starting")

    class Cold(Scripted):
        """Knows its models, and has no replica yet."""

        def run(self, work: Work) -> AsyncGenerator[Any, None]:
            return HandleBackend(CONFIG, Handle([30.0])).run(work)  # type: ignore[arg-type]

    with live(ServeConfig(log="off"), Cold) as running:
        answer = ask(running.url + "/v1/diffray/images", {"steps": 1}, x_timeout_seconds="0.1")
        assert (answer.status, answer.code) == (503, "starting")
        assert int(answer.headers["retry-after"]) >= 1


def test_a_replica_that_has_it_and_is_late_is_no_start() -> None:
    refusal = refused(lambda: made(Handle([None, 30.0]), seconds=0.05))
    assert (refusal.status, refusal.code) == (504, "timeout")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DeploymentUnavailableError("engines"), "starting"),  # type: ignore[arg-type]
        (ReplicaUnavailableError("r1"), "replica_lost"),
    ],
)
def test_no_replica_is_a_reason_to_come_back(
    error: Exception, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "PROBE_SECONDS", 60.0)

    async def check() -> None:
        await HandleBackend(CONFIG, Handle([error])).check()  # type: ignore[arg-type]

    for call in (lambda: made(Handle([error])), lambda: asyncio.run(check())):
        refusal = refused(call)
        assert (refusal.status, refusal.code) == (503, code)
        assert refusal.retry_after


def test_an_image_that_kills_its_replica_is_begun_once_more() -> None:
    handle = Handle([None, RayActorError()])
    refusal = refused(lambda: made(handle))
    assert (refusal.status, refusal.code, handle.asked) == (503, "replica_lost", 2)
    once = Handle([None, Progress(1, 2), RayActorError()], [None, Progress(1, 2), DONE])
    assert made(once) == [Progress(1, 2), DONE]


def test_replicas_that_were_dead_before_are_not_counted_as_killed() -> None:
    handle = Handle([RayActorError()], [ReplicaUnavailableError("r1")], [None, RayActorError()], [None, DONE])
    assert made(handle) == [DONE]


def probe(handle: Handle, test: Callable[[HandleBackend], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(HandleBackend(CONFIG, handle)), 30))  # type: ignore[arg-type]


def test_readiness_is_asked_for_once_and_remembered_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async def often(backend: HandleBackend) -> None:
        await asyncio.gather(*(backend.check() for _ in range(20)))
        await backend.check()

    monkeypatch.setattr(replica, "PROBE_LASTS", 3600.0)
    handle = Handle([0.05, "well"])
    probe(handle, often)
    assert handle.asked == 1

    async def later(backend: HandleBackend) -> None:
        await backend.check()
        with pytest.raises(Refusal):
            await backend.check()

    monkeypatch.setattr(replica, "PROBE_LASTS", -1.0)
    probe(Handle(["well"], [DeploymentUnavailableError("engines")]), later)


def test_a_probe_does_not_wait_for_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async def once(backend: HandleBackend) -> None:
        with pytest.raises(Refusal) as caught:
            await backend.check()
        assert caught.value.status == 503

    monkeypatch.setattr(replica, "PROBE_SECONDS", 0.05)
    probe(Handle([600.0]), once)
