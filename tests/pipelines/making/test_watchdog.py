"""Hanging is noticed, working is not taken for it, and a row that hangs costs one row."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from diffray.pipelines.inputs.blobs import ATTEMPTS
from diffray.pipelines.making import watchdog
from diffray.pipelines.making.watchdog import Hanging, Watchdog
from diffray.pipelines.making.worker import WorkerBroken

from ..conftest import Place, in_process, restarting
from ..pictures import png

FOLDER = Path(watchdog.__file__).parent


@pytest.mark.slow
def test_work_that_moves_is_left_alone_and_work_that_stands_still_is_not() -> None:
    moved = 0

    async def slow() -> str:
        nonlocal moved
        for _ in range(15):
            await asyncio.sleep(0.1)
            moved += 1
        return "done"

    dog = Watchdog(1.0, lambda: moved)
    assert asyncio.run(dog.watch(slow())) == "done"
    time.sleep(1.2)  # idle time is not hanging time
    assert asyncio.run(dog.watch(slow())) == "done"
    with pytest.raises(Hanging, match=r"no step, read or image was finished in 1 s"):
        asyncio.run(dog.watch(asyncio.sleep(60)))


def test_errors_and_cancelling_pass_through() -> None:
    async def fails() -> None:
        raise KeyError("x")

    async def cancelled() -> bool:
        inner = asyncio.ensure_future(asyncio.sleep(60))
        watching = asyncio.ensure_future(Watchdog(9, lambda: 0).watch(inner))
        await asyncio.sleep(0.05)
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching
        await asyncio.sleep(0)
        return inner.cancelled()

    with pytest.raises(KeyError):
        asyncio.run(Watchdog(9, lambda: 0).watch(fails()))
    assert asyncio.run(cancelled())


def test_a_process_that_hangs_with_the_lock_in_its_hand_is_ended_with_a_traceback() -> None:
    code = (
        f"import asyncio, sys, time; sys.path.insert(0, {str(FOLDER)!r})\n"
        "from watchdog import Watchdog\n"
        "async def native():\n"
        "    time.sleep(60)\n"
        "watchdog = Watchdog(2.0, lambda: 0)\n"
        "watchdog.last_resort = True\n"
        "asyncio.run(watchdog.watch(native()))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False
    )
    assert ended.returncode == 1
    assert "in native" in ended.stderr


@pytest.mark.slow
def test_a_row_that_hangs_is_rejected_and_its_neighbours_are_not(place: Place) -> None:
    good = "prompt\n" + "".join(f"p{i}\n" for i in range(5))
    place.job(place.write(good, "good.csv"), "good")
    config = place.config(place.write(good + "HANG\n"), shards={"images": 4}, workers={"patience": 1.5})
    result = place.run(config, generate=restarting)
    assert (result.images, result.rejected) == (5, 1)
    [row] = place.rows(folder="rejected")
    assert (row["prompt"], row["attempts"]) == ("HANG", 3)
    assert "hangs: no step, read or image was finished in 1.5 s" in row["reason"]
    assert {r["id"]: r["sha256"] for r in place.rows()} == {r["id"]: r["sha256"] for r in place.rows("good")}


@pytest.mark.slow
@pytest.mark.parametrize("last", [0.3, 9.0], ids=["slow", "endless"])
def test_a_slow_storage_is_no_hanging_unless_one_read_does_not_end(
    place: Place, monkeypatch: pytest.MonkeyPatch, last: float
) -> None:
    """Each attempt at a picture but the last takes less than the patience, all of them take more."""
    (place.path / "a.png").write_bytes(png("red"))
    table = place.write("prompt,image\nx,a.png\n")
    config = place.config(table, task="augment", workers={"patience": 6.0})
    read, times = LocalFileSystem.cat_file, 0

    def slow(self: Any, path: str, *arguments: Any, **more: Any) -> Any:
        nonlocal times
        if not path.endswith("a.png"):
            return read(self, path, *arguments, **more)
        times += 1
        time.sleep(last if times == ATTEMPTS else 1.8)
        if times < ATTEMPTS:
            raise ConnectionResetError("by peer")
        return read(self, path, *arguments, **more)

    def later(*arguments: Any) -> Any:
        monkeypatch.setattr(LocalFileSystem, "cat_file", slow)
        return in_process(*arguments)

    if last < 6:
        assert place.run(config, generate=later).images == 1
    else:
        with pytest.raises(WorkerBroken, match="hangs"):
            place.run(config, generate=later)
    assert times == ATTEMPTS
