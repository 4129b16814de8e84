"""One driver at a time: who owns an output, who is dead, and what a driver that was taken over may still do."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from diffray.model.errors import JobConflict, StorageError
from diffray.pipelines import JobConfig, Store, job_status, verify
from diffray.pipelines.making.worker import Share
from diffray.pipelines.models import Models
from diffray.pipelines.outputs import lock
from diffray.pipelines.outputs.fingerprint import JOB
from diffray.pipelines.outputs.lock import Lock

from ..conftest import Place, in_process

TABLE = "prompt\np\nq\n"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "LEASE", 6.0)


def elsewhere(**values: object) -> bytes:
    return json.dumps({"host": "elsewhere", "pid": 7, "since": "then", **values}).encode()


def test_a_second_driver_is_told_who_owns_the_output(place: Place) -> None:
    table, seen = place.write(TABLE), []

    def meanwhile(
        config: JobConfig, number: int, store: Store, models: Models, shares: Sequence[Share]
    ) -> Iterator[tuple[int, int]]:
        with pytest.raises(JobConflict, match=f"process {os.getpid()} on {socket.gethostname()}"):
            place.job(table)
        seen.append(job_status(Store(config.output)).phase)
        yield from in_process(config, number, store, models, shares)

    place.run(place.config(table), generate=meanwhile)
    assert seen == ["running"]
    assert job_status(Store(str(place.path / "out"))).phase == "complete"


LINUX = pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="only Linux tells who sees whom")


def left_behind(store: Store, **values: object) -> None:
    """The lock of a process of this host that is gone now, but for `values`."""
    with Lock.acquire(store) as own:
        record = json.loads(store.read(f"_diffray/locks/{own.run:05d}.json"))
    store.write(
        f"_diffray/locks/{own.run + 1:05d}.json", json.dumps({**record, "pid": 2**22 + 1, **values}).encode()
    )


@LINUX
def test_the_lock_of_a_process_that_is_gone_is_taken_over_at_once(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    left_behind(Store(str(place.path / "out")))
    assert place.job(place.write(TABLE)).images == 2
    assert "watching" not in caplog.text


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"host": "elsewhere"}, id="another host"),
        pytest.param({"among": f"{uuid.uuid4()} pid:[4026531836]"}, id="another boot"),
        pytest.param({"among": f"{str(lock._among()).split()[0]} pid:[1]"}, id="another container"),
        pytest.param({"among": None}, id="unknown"),
    ],
)
def test_a_process_that_cannot_be_seen_from_here_is_watched(
    tmp_path: Path,
    other: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(lock, "LEASE", 0.2)
    store = Store(str(tmp_path))
    left_behind(store, **other)
    Lock.acquire(store).release()
    assert "watching for signs of life" in caplog.text


def test_where_nobody_can_tell_the_owner_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "LEASE", 0.2)
    monkeypatch.setattr(lock, "_among", lambda: None)
    store = Store(str(tmp_path))
    left_behind(store)
    Lock.acquire(store).release()
    assert "watching for signs of life" in caplog.text


@pytest.mark.slow
def test_a_living_owner_outside_a_container_of_the_same_hostname_is_not_taken_over(tmp_path: Path) -> None:
    inside = f"""if True:
        from diffray.pipelines import Store
        from diffray.pipelines.outputs.lock import Lock
        Lock.acquire(Store({str(tmp_path)!r}))"""
    apart = ["unshare", "--pid", "--fork", "--mount-proc"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*apart, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("a namespace of process ids needs root")
    with Lock.acquire(Store(str(tmp_path))):
        tried = subprocess.run(
            [*apart, sys.executable, "-c", inside], capture_output=True, text=True, check=False
        )
    assert f"process {os.getpid()} on {socket.gethostname()}" in tried.stderr.splitlines()[-1]
    assert "it shows signs of life" in tried.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_silent_owner_elsewhere_is_taken_over_and_a_living_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    store.write("_diffray/locks/00001.json", elsewhere())
    with monkeypatch.context() as patch:
        patch.setattr(lock, "LEASE", 0.5)
        Lock.acquire(store).release()
    assert "process 7 on elsewhere since then may be at work" in caplog.text
    store.write("_diffray/locks/00003.json", elsewhere())
    stop = threading.Event()

    def live() -> None:
        beat = 0
        while not stop.wait(0.3):
            beat += 1
            store.write("_diffray/locks/00003.json", elsewhere(beat=beat))

    living = threading.Thread(target=live)
    living.start()
    try:
        with pytest.raises(JobConflict, match="process 7 on elsewhere since then; it shows signs of life"):
            Lock.acquire(store)
        Lock.acquire(store, take_over=True).release()
    finally:
        stop.set()
        living.join()


def test_a_record_that_is_just_being_rewritten_is_a_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some storages show neither the old nor the new object for a moment."""
    store = Store(str(tmp_path))
    store.write("_diffray/locks/00001.json", elsewhere())
    read, reads = Store.read, []

    def gone_for_a_moment(self: Store, name: str) -> bytes:
        reads.append(name)
        if len(reads) == 5:
            raise FileNotFoundError(name)
        return read(self, name)

    monkeypatch.setattr(Store, "read", gone_for_a_moment)
    with pytest.raises(JobConflict, match="on elsewhere since then; it shows signs of life"):
        Lock.acquire(store)


def test_of_many_drivers_at_once_one_wins(tmp_path: Path) -> None:
    won, lost = [], []

    def attempt() -> None:
        try:
            won.append(Lock.acquire(Store(str(tmp_path)), take_over=True))
        except JobConflict as error:
            lost.append(str(error))

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = [one.run for one in won]
    assert len(set(numbers)) == len(numbers)
    assert len(won) + len(lost) == 8
    for one in won:
        one.release()


def test_a_driver_that_was_taken_over_commits_nothing(place: Place) -> None:
    def overtaken(
        config: JobConfig, number: int, store: Store, models: Models, shares: Sequence[Share]
    ) -> Iterator[tuple[int, int]]:
        Lock.acquire(store, take_over=True)
        yield from in_process(config, number, store, models, shares)

    with pytest.raises(JobConflict, match="run 1 of the job was taken over by run 2"):
        place.run(place.config(place.write(TABLE)), generate=overtaken)
    assert not list((place.path / "out/_diffray/commits").glob("*"))


def test_a_driver_that_was_taken_over_while_it_planned_leaves_the_plan_of_the_next_alone(
    place: Place,
) -> None:
    first = place.config(place.write("prompt\na\nb\nc\nd\n", "first.csv"))
    second = place.config(place.write("prompt\nw\nx\ny\nz\n", "second.csv"))

    class Overtaken(Store):
        def write(self, name: str, data: bytes) -> None:
            super().write(name, data)
            if name == JOB:  # what comes next is the plan
                place.run(second, take_over=True)

    with pytest.raises(JobConflict, match="run 1 of the job was taken over by run 2"):
        place.run(first, store=Overtaken(first.output))
    assert verify(Store(first.output)).faults == ()
    assert {row["prompt"] for row in place.rows()} == {"w", "x", "y", "z"}


def test_a_driver_that_was_taken_over_after_its_last_shard_writes_no_pages(place: Place) -> None:
    table = place.write(TABLE)

    def overtaken(*arguments: Any) -> Iterator[tuple[int, int]]:
        yield from in_process(*arguments)
        place.run(place.config(table, license="mit"), take_over=True)

    with pytest.raises(JobConflict, match="run 1 of the job was taken over by run 2"):
        place.run(place.config(table, license="apache-2.0"), generate=overtaken)
    assert "license: mit" in (place.path / "out/README.md").read_text()


def test_run_one_hundred_thousand_is_newer_than_the_one_before(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for number in (9_999, 99_999, 100_000):
        store.write(f"_diffray/locks/{number:05d}.json", json.dumps({"released": True}).encode())
    assert lock.newest(store) == 100_000
    with Lock.acquire(store) as mine:
        assert mine.run == 100_001


class Careless(Store):
    """A storage that takes `If-None-Match` and does not honour it."""

    def put_if_absent(self, name: str, data: bytes) -> bool:
        self.write(name, data)
        return True


def test_a_storage_without_conditional_puts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="ignores If-None-Match"):
        Lock.acquire(Careless(str(tmp_path)))


def test_the_error_that_ends_a_job_is_not_hidden_by_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))

    def full(*_: object) -> None:
        raise StorageError("disk full")

    def work() -> None:
        with Lock.acquire(store):
            monkeypatch.setattr(Store, "write", full)
            raise ValueError("the reason")

    with pytest.raises(ValueError, match="the reason"):
        work()
