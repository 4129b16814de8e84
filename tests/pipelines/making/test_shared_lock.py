"""Many or one: nobody enters beside one that is alone, and one that gives up waiting keeps nobody out."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from diffray.pipelines.making.shared_lock import SharedLock


def test_one_alone_goes_before_newcomers_and_beside_nobody() -> None:
    order: list[str] = []

    async def shared(lock: SharedLock, name: str, until: asyncio.Event) -> None:
        async with lock.shared():
            order.append(name)
            await until.wait()
            order.append(f"{name} ends")

    async def alone(lock: SharedLock) -> None:
        async with lock.exclusive():
            order.append("alone")
            await asyncio.sleep(0)
            order.append("alone ends")

    async def every() -> None:
        lock, go = SharedLock(), asyncio.Event()
        tasks = [asyncio.create_task(shared(lock, name, go)) for name in "ab"]
        await asyncio.sleep(0.01)
        tasks += [asyncio.create_task(alone(lock))]
        await asyncio.sleep(0.01)
        tasks += [asyncio.create_task(shared(lock, "c", go))]
        await asyncio.sleep(0.01)
        assert order == ["a", "b"]
        go.set()
        await asyncio.gather(*tasks)

    asyncio.run(every())
    assert order == ["a", "b", "a ends", "b ends", "alone", "alone ends", "c", "c ends"]


def test_one_that_gives_up_lets_newcomers_in_at_once() -> None:
    async def enter(lock: SharedLock) -> None:
        async with lock.shared():
            pass

    async def alone(lock: SharedLock) -> None:
        async with lock.exclusive():
            raise AssertionError

    async def every() -> None:
        lock = SharedLock()
        async with lock.shared():
            waits = asyncio.create_task(alone(lock))
            await asyncio.sleep(0.01)
            newcomer = asyncio.create_task(enter(lock))
            await asyncio.sleep(0.01)
            assert not newcomer.done()
            waits.cancel()
            with suppress(asyncio.CancelledError):
                await waits
            await asyncio.wait_for(newcomer, 5)

    asyncio.run(every())
