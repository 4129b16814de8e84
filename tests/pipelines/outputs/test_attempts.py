"""Whose death it was: the row's, the shard's, or the whole run's."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from diffray.model.errors import JobError
from diffray.pipelines import Store
from diffray.pipelines.making import images, worker
from diffray.pipelines.making.worker import Task, Worker
from diffray.pipelines.outputs.attempts import Attempts
from diffray.pipelines.outputs.commit import Commit

from ..conftest import Place, in_process
from ..crashes import Crash

LIMIT = 3


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "out"))


def attempt(store: Store, run: int, guilty: str = "", *, error: str = "", first: bool = False) -> Attempts:
    """One attempt at a shard of the rows a and b, which dies: of `guilty`, or killed while b is made."""
    attempts = Attempts.read(store, 0, run, LIMIT)
    record = attempts.begin(first=first)
    if attempts.alone:
        for row in sorted({"a", "b"} - attempts.killers, key=lambda row: -attempts.deaths[row]):
            record = attempts.begin_row(row)
            if row == (guilty or "b"):
                break
            attempts.end_row(record)
    if error:
        attempts.blame(record, error)
    return attempts


def now(store: Store, run: int) -> Attempts:
    return Attempts.read(store, 0, run, LIMIT)


def test_kills_of_whole_runs_are_nobodys_death(store: Store) -> None:
    for run in range(1, 6):
        attempt(store, run)
    found = now(store, 6)
    assert (found.alone, found.killers) == (False, set())


def test_kills_of_whole_runs_while_a_row_is_alone_do_not_convict_it(store: Store) -> None:
    for _ in range(2):
        attempt(store, 1, error="CUDA error")
    for run in range(2, 7):
        assert attempt(store, run).alone
    found = now(store, 7)
    assert (found.alone, found.killers, found.deaths["b"]) == (True, set(), 0)


@pytest.mark.parametrize("error", ["", "hangs"])
def test_a_killer_is_found_however_often_its_runs_are_killed(store: Store, error: str) -> None:
    """Two attempts a run, of which the second one's end is seen by nobody, unless it could name its error."""
    run = 0
    while "a" not in now(store, run + 1).killers:
        run += 1
        assert run < 9
        for _ in range(2):
            attempt(store, run, "a", error=error)
    assert now(store, run + 1).killers == {"a"}
    assert run == (3 if error else 5)


def test_an_attempt_that_was_given_back_shows_that_its_run_lived_on(store: Store) -> None:
    for run in (1, 2):
        attempt(store, run)
        attempts = Attempts.read(store, 0, run, LIMIT)
        attempts.end_row(attempts.begin())
    assert now(store, 3).alone


def test_runs_that_die_before_any_shard_is_made_stop_the_job_at_last(store: Store) -> None:
    for run in range(1, 10):
        attempt(store, run, first=True)
    with pytest.raises(JobError, match=r"9 runs were killed while shard 0 was the first .*crashes above 3"):
        now(store, 10)
    assert not Attempts.read(store, 0, 10, LIMIT + 1).killers


def test_runs_that_get_on_with_other_shards_never_stop_the_job(store: Store) -> None:
    for run in range(1, 20):
        attempt(store, run)
    assert not now(store, 20).alone


def test_a_job_whose_first_runs_were_killed_loses_no_row(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = place.config(place.write("prompt\np\nq\n"))

    async def killed(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(worker.Maker, "make", killed)
        for _ in range(5):
            with pytest.raises(Crash):
                place.run(config, generate=in_process)
    result = place.run(config)
    assert (result.images, result.rejected) == (2, 0)
    store = Store(config.output)
    assert Attempts.read(store, 0, 6, 2).deaths == {}
    with pytest.raises(JobError, match="5 runs were killed while shard 0"):
        Attempts.read(store, 0, 6, 1)


@pytest.mark.parametrize(
    ("slow", "alone"),
    [("begin", False), ("make", False), ("begin", True), ("begin_row", True), ("make", True)],
)
def test_a_recall_is_no_death_even_while_the_attempt_is_being_recorded(
    place: Place, monkeypatch: pytest.MonkeyPatch, slow: str, alone: bool
) -> None:
    """A thread that writes a record cannot be stopped: it writes it although its shard is given back."""
    began, go_on = threading.Event(), threading.Event()

    def record(self: Attempts, *arguments: Any, **more: Any) -> str:
        began.set()
        go_on.wait(10)
        return str(write(self, *arguments, **more))

    async def make(*_: Any) -> Any:
        began.set()
        await asyncio.sleep(10)

    async def recalled(worker: Worker) -> None:
        making = asyncio.create_task(worker.make(0))
        await asyncio.to_thread(began.wait, 10)
        worker.give_back(0)
        await asyncio.sleep(0.05)  # the recall arrives before the record is there
        worker.give_back(0)  # a second one changes nothing
        go_on.set()
        assert await making is None
        began.clear()
        go_on.clear()

    async def recalls(worker: Worker) -> Commit | None:
        with monkeypatch.context() as patched:
            if slow == "make":
                patched.setattr(images.Maker, "make", make)
            else:
                patched.setattr(Attempts, slow, record)
            for _ in range(LIMIT + 3):
                await recalled(worker)
        return await worker.make(0)

    def generate(config: Any, number: int, store: Store, models: Any, shares: Any) -> Any:
        for _ in range(2 * alone):  # deaths of the whole shard
            attempts = Attempts.read(store, 0, number, LIMIT)
            attempts.blame(attempts.begin(), "CUDA error")
        worker = Worker(Task(config, number, shares[0].model), store, models)
        try:
            commit = asyncio.run(recalls(worker))
        finally:
            worker.close()
        assert commit is not None
        yield commit.images, commit.rejected
        found = now(store, number)
        assert (found.alone, found.deaths.total()) == (alone, 0)

    write = getattr(Attempts, slow, None)
    result = place.run(place.config(place.write("prompt\np\nq\n")), generate=generate)
    assert (result.images, result.rejected) == (2, 0)
