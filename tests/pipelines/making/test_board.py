"""Turns, engines and the board together, in one process: the actor's class without Ray around it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from diffray.pipelines.job import run
from diffray.pipelines.making import actors, backlog, board
from diffray.pipelines.making.board import Board
from diffray.pipelines.making.pools import TURNS, turns
from diffray.pipelines.making.worker import Task
from diffray.pipelines.models import Models
from diffray.pipelines.outputs.commit import committed
from diffray.pipelines.outputs.store import Store

from ..conftest import Place
from ..fake import FakeModels


class Posted:
    """A board that is called like a Ray actor."""

    def __init__(self, board: Board) -> None:
        self.board = board

    def __getattr__(self, name: str) -> Any:
        return type("Method", (), {"remote": staticmethod(_started(getattr(self.board, name)))})


def _started(method: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
    return lambda *arguments: asyncio.ensure_future(method(*arguments))


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> Callable[..., actors.ShardActor]:
    numbers = itertools.count()
    monkeypatch.setattr(board, "TICK", 0.02)
    monkeypatch.setattr(actors, "ImageMeter", lambda model: None)
    current = {"actor": ""}
    monkeypatch.setattr(actors, "_place", lambda: {"actor": current["actor"], "node": "n", "accelerator": ""})

    def made(task: Task, store: Store, models: Models, posted: Posted, actor: str | None = None) -> Any:
        current["actor"] = actor or f"a{next(numbers)}"
        return actors.ShardActor(task, store, models, posted, None)

    return made


def planned(place: Place, rows: str, **values: Any) -> tuple[Task, Store]:
    """A job that has its plan and nothing more."""
    config = place.config(place.write(rows), **values)
    with pytest.raises(ZeroDivisionError):
        run(config, models=FakeModels(), generate=lambda *_: [1 / 0])  # type: ignore[arg-type, return-value]
    return Task(config, 1, config.model), Store(config.output)


async def take_turn(actor: actors.ShardActor, number: int, shards: int = 1) -> list[Any]:
    batch = {"turn": [number], "shards": [shards]}
    return [failure async for row in actor(batch) for failure in row["failure"]]


def test_turns_make_all_shards_and_the_board_knows(
    place: Place, actor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog, "GAIN", 1e9)  # no shard moves, however slow the machine is

    async def every() -> dict[str, Any]:
        task, store = planned(place, "prompt,n\np,7\nPOISON,1\n")
        posted = Posted(Board([0, 1, 2], 2))
        one, two = (actor(task, store, FakeModels(), posted) for _ in range(2))
        ended = await asyncio.gather(
            *(take_turn(e, 2 * n + k) for n in range(4) for k, e in enumerate((one, two)))
        )
        assert ended == [[None]] * 8, "turns without a shard end too"
        assert committed(store) == {0, 1, 2}
        return await posted.board.look(0.0, 0)

    found = asyncio.run(every())
    assert sorted(found["ended"]) == [(0, 3, 0), (1, 3, 0), (2, 1, 1)]
    assert (found["waiting"], found["running"]) == (0, 0)
    engines = list(found["engines"].values())
    assert sum(engine["reading"]["images"] for engine in engines) == 7
    assert sum(engine["reading"]["rejected"].get("generate", 0) for engine in engines) == 1
    assert all(set(engine["start"]) == {"imports", "fetch", "load"} for engine in engines)


def test_an_engine_on_a_gpu_says_the_gpus_own_name(
    place: Place, actor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnGpu(FakeModels):
        def open(self, *arguments: Any) -> Any:
            return replace(super().open(*arguments), device="cuda")

    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")

    async def every(models: Models) -> str:
        task, store = planned(place, "prompt\np\n", output=f"for {type(models).__name__}")
        posted = Posted(Board([0], 1))
        await take_turn(actor(task, store, models, posted), 0)
        [engine] = (await posted.board.look(0.0, 0))["engines"].values()
        return str(engine["accelerator"])

    assert [asyncio.run(every(models)) for models in (OnGpu(), FakeModels())] == ["NVIDIA H100 80GB HBM3", ""]


def test_a_dead_process_frees_its_shards_and_its_waiting_turns_take_none(place: Place, actor: Any) -> None:
    async def every() -> set[int]:
        task, store = planned(place, "prompt,n\np,6\n")
        posted = Posted(Board([0, 1], 1))
        await posted.join.remote("dead", {"actor": "a", "node": "n", "accelerator": "", "seconds": 0.0})
        assert await posted.take.remote(0, "dead") == 0
        waiting = posted.take.remote(1, "dead")  # the process dies in the middle of this call
        await asyncio.sleep(0.05)
        again = actor(task, store, FakeModels(), posted, "a")
        assert await take_turn(again, 0, shards=2) == [None]
        assert await waiting is None
        return committed(store)

    assert asyncio.run(every()) == {0, 1}


def test_a_turn_that_is_repeated_while_its_first_call_still_runs_makes_nothing_twice(
    place: Place, actor: Any
) -> None:
    """Ray does that when an engine lives but could not be reached for a moment."""

    async def every() -> dict[str, Any]:
        task, store = planned(place, "prompt,n\nSLOW p,4\n", shards={"images": 4})
        posted = Posted(Board([0], 1))
        engine = actor(task, store, FakeModels(), posted)
        assert await asyncio.gather(take_turn(engine, 0), take_turn(engine, 0)) == [[None], [None]]
        assert committed(store) == {0}
        return await posted.board.look(0.0, 0)

    found = asyncio.run(every())
    assert (found["waiting"], found["running"]) == (0, 0)
    assert len(place.begun()) == 4


@pytest.mark.slow
def test_an_idle_engine_gets_the_shard_of_a_slow_one(place: Place, actor: Any) -> None:
    async def every() -> dict[str, Any]:
        task, store = planned(place, "prompt,n\nSLOW p,80\n", shards={"images": 40})
        posted = Posted(Board([0, 1], 4))
        slow = actor(task, store, FakeModels(), posted)
        held = asyncio.gather(*(take_turn(slow, n) for n in range(2)))
        await asyncio.sleep(0.2)
        quick = actor(task, store, FakeModels(), posted)
        await asyncio.gather(held, *(take_turn(quick, n) for n in range(2, 4)))
        assert committed(store) == {0, 1}
        return await posted.board.look(0.0, 0)

    images = [engine["reading"]["images"] for engine in asyncio.run(every())["engines"].values()]
    assert images[1] == 40, "one shard moved, whole"
    assert 40 <= images[0] < 80


def test_a_closed_board_ends_all_turns(place: Place, actor: Any) -> None:
    async def every() -> set[int]:
        task, store = planned(place, "prompt,n\nSLOW p,600\n", shards={"images": 600})
        posted = Posted(Board([0], 1))
        engine = actor(task, store, FakeModels(), posted)
        turns = asyncio.gather(take_turn(engine, 0), take_turn(engine, 1))
        await asyncio.sleep(0.3)
        await posted.close.remote()
        assert await asyncio.wait_for(turns, 60) == [[None], [None]]
        return committed(store)

    assert asyncio.run(every()) == set()


def test_a_board_that_was_restarted_learns_who_holds_what() -> None:
    async def every() -> None:
        fresh = Board([0, 1, 2], 4)
        facts = {"actor": "a", "node": "n", "accelerator": "", "start": {}}
        reading = {"uncommitted": {1: (5, 0)}, "images": 5}
        assert await fresh.report("old", facts, reading) == []
        await fresh.join("new", {"actor": "b", "node": "n", "accelerator": "", "seconds": 0.0})
        assert await fresh.take(0, "new") == 0
        await fresh.done(0, "new", 0, 6, 0)
        assert await fresh.take(1, "new") == 2, "not 1, which the old engine holds"
        await fresh.done(9, "old", 1, 5, 0)
        assert (await fresh.look(0.0, 0))["ended"] == [(0, 6, 0), (1, 5, 0)]

    asyncio.run(every())


def test_turns_of_a_long_job_make_several_shards_each() -> None:
    rows = turns(range(10 * TURNS), 3, 4)
    assert sum(row["shards"] for row in rows) >= 10 * TURNS
    assert TURNS <= len(rows) <= TURNS + 24
    assert [row["turn"] for row in rows] == list(range(len(rows)))
