"""Engines in this process: joining, leaving, several models in little memory, failures of one and of all."""

from __future__ import annotations

import asyncio
import io
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from diffray.model import GenerationError, ImageRequest, InvalidRequest, flight, tickets
from diffray.serve import metrics, residents, server
from diffray.serve.config import Guardrails, Limits, Memory, ModelEntry, ServeConfig
from diffray.serve.engines import EngineHangs, Engines
from diffray.serve.refusal import Refusal
from diffray.serve.work import Event, Finished, Progress, Work

THREE = {name: ModelEntry() for name in ("a", "b", "c")}


@asynccontextmanager
async def engines(*, renew: bool = True, **config: Any) -> AsyncIterator[Engines]:
    made = Engines(ServeConfig(**config), renew=renew)
    try:
        yield made
    finally:
        await made.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 120))  # type: ignore[arg-type]


def work(steps: int = 2, seed: int = 0, model: str = "embedded", **more: Any) -> Work:
    return Work(request=ImageRequest(prompt="a red circle", steps=steps, seed=seed), model=model, **more)


async def finish(backend: Engines, wanted: Work) -> Finished:
    async with aclosing(backend.run(wanted)) as events:
        async for event in events:
            if isinstance(event, Finished):
                return event
    raise AssertionError("no picture")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def test_ready_only_after_a_picture_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with engines() as backend:
            with pytest.raises(GenerationError, match="not loaded"):
                await backend.check()
            await backend.start()
            await backend.check()
            assert (await backend.model("embedded")).loaded

    run(test)

    def spoiled(*_: object) -> None:
        raise GenerationError("decoded image: got non-finite values")

    monkeypatch.setattr(flight, "to_image", spoiled)

    async def never() -> None:
        async with engines() as backend:
            with pytest.raises(GenerationError, match="non-finite"):
                await backend.start()

    run(never)


def test_closing_the_stream_frees_the_slot_at_the_next_step() -> None:
    async def test() -> None:
        async with engines() as backend:
            events = backend.run(work(steps=1000))
            async for event in events:
                if isinstance(event, Progress) and event.step >= 2:
                    break
            engine = next(iter(backend.residents)).engine
            assert engine.running == 1
            await events.aclose()
            await until(lambda: engine.running == engine.waiting == 0)

    run(test)


def test_a_request_joins_what_runs_and_nobody_s_pixels_change() -> None:
    async def test() -> None:
        async with engines() as backend:
            alone = (await finish(backend, work(steps=4, seed=5))).data
            long = asyncio.create_task(finish(backend, work(steps=1000, seed=1)))
            await until(lambda: next(iter(backend.residents)).engine.running == 1)
            joined = (await finish(backend, work(steps=4, seed=5))).data
            assert not long.done(), "the short one waited for the long one"
            assert joined == alone
            long.cancel()

    run(test)


def test_deadline_in_the_queue_costs_no_engine_time(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[int] = []
    original = flight.prepare

    def counted(model: Any, request: ImageRequest, *more: Any) -> Any:
        prepared.append(request.seed)
        return original(model, request, *more)

    monkeypatch.setattr(flight, "prepare", counted)

    async def test() -> None:
        async with engines(models={"embedded": ModelEntry(batch_size=1)}) as backend:
            await backend.start()
            busy = [asyncio.create_task(finish(backend, work(steps=1000, seed=s))) for s in (1, 2, 3, 4)]
            await until(lambda: next(iter(backend.residents)).engine.running >= 1)
            with pytest.raises(Refusal) as refused:
                await finish(backend, work(seed=77, seconds=0.3))
            assert (refused.value.status, refused.value.code) == (504, "timeout")
            assert 77 not in prepared
            for task in busy:
                task.cancel()

    run(test)


async def told(backend: Engines, monkeypatch: pytest.MonkeyPatch, **values: Any) -> list[Event]:
    """All events of an image whose engine makes no step before the last one was told."""
    turns, original = threading.Semaphore(0), flight.advance

    def advance(*arguments: Any) -> None:
        turns.acquire(timeout=60)
        original(*arguments)

    await backend.start()
    monkeypatch.setattr(flight, "advance", advance)
    events = []
    async for event in backend.run(work(**values)):
        events.append(event)
        turns.release()
    return events


def test_previews_come_when_they_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with engines() as backend:
            events = await told(backend, monkeypatch, steps=9, preview_every=3)
            shown = [(e.step, e.preview) for e in events if isinstance(e, Progress) and e.preview]
            assert shown
            assert len(shown) <= 3
            for _, data in shown:
                assert Image.open(io.BytesIO(data)).format == "JPEG"
            # A thread that stays would keep an OpenMP team, which slows the engine down.
            await until(
                lambda: not [t for t in threading.enumerate() if t.name.startswith("diffray-preview")]
            )

    run(test)


def test_one_poisoned_image_costs_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    original = flight.prepare

    def poisoned(model: Any, request: ImageRequest, *more: Any) -> Any:
        if request.seed == 13:
            raise ValueError("boom")
        return original(model, request, *more)

    async def test() -> None:
        async with engines() as backend:
            await backend.start()
            clean = [(await finish(backend, work(seed=s, steps=3))).data for s in (1, 2)]
            monkeypatch.setattr(flight, "prepare", poisoned)
            outcomes = await asyncio.gather(
                *(finish(backend, work(seed=s, steps=3)) for s in (1, 13, 2)), return_exceptions=True
            )
            assert isinstance(outcomes[1], GenerationError)
            assert [o.data for o in outcomes if isinstance(o, Finished)] == clean
            await backend.check()

    run(test)


def broken(*_: object) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_broken_engine_is_told_apart_and_fails_the_health_check(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with engines(renew=False) as backend:
            await backend.start()
            monkeypatch.setattr(flight, "advance", broken)
            for code in ("engine_broken", "engine_down"):
                with pytest.raises(Refusal) as refused:
                    await finish(backend, work())
                assert (refused.value.status, refused.value.code) == (503, code)
                assert "CUDA" not in refused.value.message
            with pytest.raises(GenerationError, match="stopped"):
                await backend.check()

    run(test)


def test_a_broken_engine_is_made_anew_once_for_all_whom_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []

    def counted(name: str, entry: ModelEntry) -> residents.Resident:
        loads.append(name)
        return original(name, entry)

    original = residents.load_resident
    monkeypatch.setattr(residents, "load_resident", counted)

    async def test() -> None:
        async with engines() as backend:
            await backend.start()
            expected = (await finish(backend, work(seed=3))).data
            next(iter(backend.residents)).engine.network.unet = broken
            outcomes = await asyncio.gather(
                *(finish(backend, work(seed=s)) for s in range(4)), return_exceptions=True
            )
            assert {o.code for o in outcomes if isinstance(o, Refusal)} <= {"engine_broken", "engine_down"}
            assert sum(isinstance(o, Refusal) for o in outcomes) >= 1
            assert (await finish(backend, work(seed=3))).data == expected
            assert loads == ["embedded", "embedded"]
            await backend.check()

    run(test)


def test_a_process_that_cannot_help_itself_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    faults: list[Exception] = [
        EngineHangs("no step for 150 s"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ]
    codes: list[int] = []

    class Sick:
        def __init__(self, fault: Exception) -> None:
            self.fault = fault

        async def check(self) -> None:
            raise self.fault

    def exit_(code: int) -> None:
        codes.append(code)
        raise SystemExit

    monkeypatch.setattr(server, "HEALTH_SECONDS", 0.01)
    monkeypatch.setattr(os, "_exit", exit_)
    for fault in faults:
        with pytest.raises(SystemExit):
            asyncio.run(server.supervise(Sick(fault)))  # type: ignore[arg-type]
    assert codes == [1, 1]
    unready = GenerationError("the default model is not loaded yet")
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(server.supervise(Sick(unready)), 0.1))  # type: ignore[arg-type]


def test_health_is_answered_during_a_long_generation() -> None:
    async def test() -> None:
        async with engines() as backend:
            await backend.start()
            long = asyncio.create_task(finish(backend, work(steps=1000)))
            await until(lambda: next(iter(backend.residents)).engine.running == 1)
            await backend.check()
            assert not long.done()
            long.cancel()

    run(test)


@pytest.mark.slow
def test_an_engine_that_hangs_fails_the_health_check() -> None:
    """Only while images wait: one that has nothing to do makes no steps either."""

    async def test() -> None:
        async with engines(limits=Limits(seconds=4)) as backend:
            await backend.start()
            await backend.check()
            await asyncio.sleep(2.2)
            await backend.check()
            engine = next(iter(backend.residents)).engine
            begun, over = threading.Event(), threading.Event()
            engine._queue.send(lambda: begun.set() or over.wait())
            await asyncio.to_thread(begun.wait)
            try:
                hung = asyncio.create_task(finish(backend, work(steps=1)))
                await until(lambda: bool(engine.waiting or engine.running))
                await backend.check()
                await asyncio.sleep(2.2)
                with pytest.raises(EngineHangs, match="no step"):
                    await backend.check()
            finally:
                over.set()  # or nothing could ever close the engine
            await asyncio.wait({hung})
            await until(lambda: not (engine.waiting or engine.running))
            await backend.check()

    run(test)


def test_the_least_recently_used_model_makes_room() -> None:
    async def test() -> None:
        async with engines(models=THREE, memory=Memory(models=2)) as backend:
            for name in ("a", "b", "a", "c"):
                made = await finish(backend, work(model=name, steps=1))
                assert made.model == name
            assert [resident.name for resident in backend.residents] == ["a", "c"]
            cards = {card.name: card.loaded for card in await backend.cards()}
            assert cards == {"a": True, "b": False, "c": True}

    run(test)


@pytest.mark.slow
def test_memory_is_counted_in_bytes() -> None:
    def shown() -> float:
        lines = metrics.text()[0].decode().splitlines()
        line = next(line for line in lines if line.startswith('diffray_model_bytes{model="a"}'))
        return float(line.rpartition(" ")[2])

    async def test() -> None:
        async with engines(models=THREE) as backend:
            await finish(backend, work(model="a", steps=1))
            size = next(iter(backend.residents)).bytes
            assert size > 20e6
            assert shown() == size
        assert shown() == 0
        async with engines(models=THREE, memory=Memory(gigabytes=1.5 * size / 1e9)) as backend:
            for name in ("a", "b"):
                await finish(backend, work(model=name, steps=1))
            assert [resident.name for resident in backend.residents] == ["b"]
        async with engines(models=THREE, memory=Memory(gigabytes=2.5 * size / 1e9)) as backend:
            await asyncio.gather(*(finish(backend, work(model=name, steps=1)) for name in "abcabc"))
            assert len(list(backend.residents)) == 2

    run(test)


@pytest.mark.slow
def test_a_model_in_use_is_not_dropped_and_the_other_waits_its_turn() -> None:
    async def test() -> None:
        async with engines(models=THREE, memory=Memory(models=1)) as backend:
            await backend.start()
            first = asyncio.create_task(finish(backend, work(model="a", steps=30, seed=1)))
            await until(lambda: any(r.users for r in backend.residents))
            other = asyncio.create_task(finish(backend, work(model="b", steps=1)))
            await asyncio.sleep(0.05)
            late = asyncio.create_task(finish(backend, work(model="a", steps=1, seed=2)))
            done = [(await task).model for task in (first, other, late)]
            assert done == ["a", "b", "a"]

    run(test)


class Idle:
    """An engine that makes nothing."""

    failure = None
    waiting = running = ticks = 0

    def close(self) -> None:
        """Nothing to do."""


def counted_loads(wanted: str) -> list[str]:
    """What is loaded when these models are asked for at once, with room for one."""

    def load(name: str, entry: ModelEntry) -> residents.Resident:
        loads.append(name)
        return residents.Resident(name, Idle(), "", SimpleNamespace(bytes=0), 0)  # type: ignore[arg-type]

    loads: list[str] = []
    before: list[str] = []

    async def test() -> None:
        held = residents.Residents(THREE, Memory(models=1), load)

        async def use(name: str) -> None:
            resident = await held.enter(name)
            assert resident.name == name
            await asyncio.sleep(0)
            await held.leave(resident)

        await asyncio.gather(*map(use, wanted))
        before.extend(loads)
        absent = [name for name in THREE if held.get(name) is None]
        gone = asyncio.create_task(held.enter(absent[0]))
        await asyncio.sleep(0)
        gone.cancel()
        await use(absent[1])  # whoever gives up keeps nobody from leaving
        await held.close()

    run(test)
    return before


@pytest.mark.parametrize(("wanted", "most"), [("ab", 2), ("abcabc", 3), ("aab", 2), ("abab", 2)])
def test_a_model_that_was_loaded_is_used_before_it_makes_room(wanted: str, most: int) -> None:
    assert len(counted_loads(wanted)) == most


@pytest.mark.slow
def test_loading_disturbs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    original, go_on = residents.load_resident, threading.Event()

    def slow(name: str, entry: ModelEntry) -> residents.Resident:
        if name == "b":
            go_on.wait(60)
        return original(name, entry)

    async def test() -> None:
        backend = Engines(ServeConfig(models=THREE), slow)
        await backend.start()
        loading = [asyncio.create_task(finish(backend, work(model="b", steps=1))) for _ in range(3)]
        await asyncio.sleep(0.1)
        await finish(backend, work(model="a", steps=1))
        assert not any(task.done() for task in loading)
        go_on.set()
        await asyncio.gather(*loading)
        await backend.close()

    run(test)


def test_a_model_that_cannot_be_loaded_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    original, tries = residents.load_resident, []

    def flaky(name: str, entry: ModelEntry) -> residents.Resident:
        tries.append(name)
        if len(tries) == 1:
            raise OSError("/secret/path: disk on fire")
        return original(name, entry)

    async def test() -> None:
        backend = Engines(ServeConfig(), flaky)
        outcomes = await asyncio.gather(
            *(finish(backend, work(steps=1)) for _ in range(3)), return_exceptions=True
        )
        assert all(isinstance(outcome, Refusal) and outcome.status == 503 for outcome in outcomes)
        assert "secret" not in str(outcomes[0])
        assert (await finish(backend, work(steps=1))).model == "embedded"
        assert len(tries) == 2
        await backend.close()

    run(test)


def refuse_everything(image: Image.Image, request: ImageRequest) -> str | None:
    assert image.size == (64, 64)
    return "this picture is not allowed" if request.seed == 6 else None


def test_pictures_are_checked_before_anybody_sees_them() -> None:
    async def test() -> None:
        rules = Guardrails(image=("tests.serve.test_engines:refuse_everything",))
        async with engines(guardrails=rules) as backend:
            with pytest.raises(Refusal) as refused:
                await finish(backend, work(seed=6))
            assert refused.value.code == "content_filtered"
            await finish(backend, work(seed=7))

    run(test)


def test_unfinished_pictures_that_nobody_checked_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        rules = Guardrails(image=("tests.serve.test_engines:refuse_everything",))
        async with engines(guardrails=rules) as backend:
            events = await told(backend, monkeypatch, steps=9, preview_every=1)
            assert [event for event in events if isinstance(event, Progress)]
            assert not any(event.preview for event in events if isinstance(event, Progress))

    run(test)


def test_a_preview_that_fails_costs_no_image(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory for a preview")

    async def test() -> None:
        async with engines() as backend:
            monkeypatch.setattr(tickets, "preview_image", fail)
            events = await told(backend, monkeypatch, steps=9, preview_every=1)
            assert isinstance(events[-1], Finished)
            assert not any(event.preview for event in events if isinstance(event, Progress))
        assert caplog.text.count("preview failed") == 1

    run(test)


def test_refused_values_leave_nothing_behind() -> None:
    async def test() -> None:
        async with engines(limits=Limits(seconds=60)) as backend:
            await backend.start()
            bad = Work(request=ImageRequest(sampler="nope"), model="embedded")
            with pytest.raises(InvalidRequest):
                await finish(backend, bad)
            with pytest.raises(Refusal) as refused:
                await finish(backend, work(model="zzz"))
            assert refused.value.status == 404
            resident = next(iter(backend.residents))
            assert (resident.users, resident.engine.running, resident.engine.waiting) == (0, 0, 0)

    run(test)
