"""A pool that is stopped, as the driver hears of it. Ray is played by plain calls of the board."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from diffray.model.errors import JobError
from diffray.pipelines.making import pools
from diffray.pipelines.making.board import Board
from diffray.pipelines.making.pools import Ended, Pool, Pulse

READING = {"images": 5, "busy": 3.0, "uncommitted": {}}


class Handle:
    """A board as an actor's handle has it."""

    def __init__(self, board: Board) -> None:
        self.board, self.closed = board, threading.Event()

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Any:
            result = asyncio.run(getattr(self.board, name)(*arguments))
            if name == "close":
                self.closed.set()
            return result

        return SimpleNamespace(remote=remote)


class Turns:
    """The dataset of a pool with one engine. Of its two shards it commits one that was nearly final as the pool
    stops."""

    def __init__(self, handle: Handle, failure: JobError | None) -> None:
        self.handle, self.failure = handle, failure

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        facts = {"actor": "1", "node": "n", "accelerator": "", "start": {"load": 1.0}}
        call = self.handle
        call.join.remote("a", {**facts, "seconds": 0.5})
        call.report.remote("a", facts, {**READING, "images": 0, "busy": 0.0})
        shard = call.take.remote(0, "a")
        if self.failure is not None:
            yield {"failure": pickle.dumps(self.failure)}
        call.closed.wait(10)
        call.done.remote(0, "a", shard, 4, 1)
        call.report.remote("a", facts, READING)
        yield {"failure": None}


def listen(pool: Pool, told: list[Ended | Pulse]) -> None:
    for event in pool.run():
        told.append(event)


@pytest.mark.parametrize("failure", [None, JobError("no such luck")])
def test_what_is_committed_while_a_pool_stops_is_told_before_the_reason(
    monkeypatch: pytest.MonkeyPatch, failure: JobError | None
) -> None:
    import ray

    monkeypatch.setattr(ray, "get", lambda result, timeout=None: result)
    handle = Handle(Board([0, 1], 1))
    pool = Pool(
        Turns(handle, failure),  # type: ignore[arg-type]
        handle,
        model="m",
        share=1.0,
        least=1,
        patience=100.0,
    )
    if failure is None:

        def interrupted(_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Pool, "_next_row", interrupted)
    told: list[Ended | Pulse] = []
    with pytest.raises(KeyboardInterrupt if failure is None else JobError):
        listen(pool, told)
    assert [event for event in told if isinstance(event, Ended)] == [Ended(4, 1)]
    assert isinstance(told[-1], Pulse)
    [engine] = told[-1].engines
    assert (engine.state, engine.reading.images, engine.reading.busy) == ("finished", 5, 3.0)


def test_a_pool_does_not_wait_for_ever_for_an_engine_that_hangs_when_all_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    monkeypatch.setattr(ray, "get", lambda result, timeout=None: result)
    monkeypatch.setattr(pools, "PATIENCE", 0.5)
    handle, ends = Handle(Board([0], 1)), threading.Event()

    class Hanging(Turns):
        def iter_rows(self) -> Iterator[dict[str, Any]]:
            self.handle.closed.set()
            yield from super().iter_rows()
            ends.wait(30)

    pool = Pool(Hanging(handle, None), handle, model="m", share=1.0, least=1, patience=100.0)  # type: ignore[arg-type]
    told: list[Ended | Pulse] = []
    listening = threading.Thread(target=listen, args=(pool, told), daemon=True)
    listening.start()
    listening.join(15)
    assert not listening.is_alive()
    ends.set()
    assert [event for event in told if isinstance(event, Ended)] == [Ended(4, 1)]
