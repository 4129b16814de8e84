"""Rates that several services count together, in a Redis server."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import fakeredis
import pytest
from fakeredis import TcpFakeServer
from limits.aio.storage import memory
from limits.aio.storage.redis.bridge import RedisBridge

from diffray.serve import keys
from diffray.serve.config import InvalidConfig, ServeConfig
from diffray.serve.rates import Rates
from diffray.serve.refusal import Refusal

from .ask import Answer, ask
from .live import Live, live
from .scripted import Scripted

IMAGES = "/v1/diffray/images"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stands still for a moment is no store that went away, nor one that may be back."""
    monkeypatch.setattr("diffray.serve.rates.STORE_SECONDS", 60.0)
    monkeypatch.setattr("diffray.serve.rates.PAUSE", 3600.0)


@contextmanager
def redis() -> Iterator[str]:
    """A Redis server; its URL."""
    server = TcpFakeServer(("127.0.0.1", 0))
    with fakeredis.FakeRedis(server=server.fake_server) as client:
        # The fake one hangs up after an error, such as that of a script which is not there yet.
        client.script_load(RedisBridge.SCRIPT_SLIDING_WINDOW)
        client.script_load(RedisBridge.SCRIPT_ACQUIRE_SLIDING_WINDOW)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"redis://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def services(count: int, storage: str, folder: Path) -> Iterator[tuple[list[Live], str]]:
    """So many services with one key of 3 requests per year: no window ends while a test runs."""
    file = folder / "keys.json"
    token = f"Bearer {keys.add(file, 'team', requests='3/year')}"
    config = ServeConfig.checked(
        {"access": {"keys": str(file)}, "limits": {"storage": storage}, "log": "off"}
    )
    with ExitStack() as stack:
        yield [stack.enter_context(live(config, Scripted)) for _ in range(count)], token


def shot(service: Live, token: str) -> Answer:
    return ask(service.url + IMAGES, {"prompt": "x", "steps": 1}, authorization=token)


def test_two_services_share_a_rate(tmp_path: Path) -> None:
    with redis() as url, services(2, url, tmp_path) as ((one, two), token):
        assert [shot(service, token).status for service in (one, two, one, two, one)] == [200] * 3 + [429] * 2
        assert 1 <= int(shot(two, token).headers["retry-after"]) <= 360 * 86400


def test_without_a_shared_store_each_counts_for_itself(tmp_path: Path) -> None:
    with services(2, "memory://", tmp_path) as ((one, two), token):
        assert [shot(service, token).status for service in (one, one, one, one, two)] == [200] * 3 + [
            429,
            200,
        ]


def test_a_store_that_goes_away_refuses_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as stack:
        store = ExitStack()
        url = store.enter_context(redis())
        (service,), token = stack.enter_context(services(1, url, tmp_path))
        assert [shot(service, token).status for _ in range(4)] == [200] * 3 + [429]
        store.close()
        with caplog.at_level(logging.ERROR):
            answers = [shot(service, token) for _ in range(4)]
        assert [answer.status for answer in answers] == [200] * 3 + [429], "it counts from zero meanwhile"
        assert sum("store of rates" in record.message for record in caplog.records) == 1
        failures = ask(service.url + "/metrics").data.decode()
        assert "diffray_rate_store_failures_total" in failures


def test_a_store_that_does_not_answer_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffray.serve.rates.STORE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        silent.settimeout(10)
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        with services(1, url, tmp_path) as ((service,), token):
            assert shot(service, token).status == 200
            asked, _ = silent.accept()
            asked.close()
            assert [shot(service, token).status for _ in range(3)] == [200, 200, 429]
            silent.settimeout(0)
            with pytest.raises(BlockingIOError):
                silent.accept()


async def wait_of(rates: Rates, text: str, amount: int) -> int:
    """0 when it was counted, else what Retry-After would be."""
    try:
        await rates.hit("client", text, "requests", amount)
    except Refusal as refusal:
        return math.ceil(refusal.retry_after or 0)
    return 0


@pytest.mark.parametrize("begin", [0.0, 1.0, 1700.5, 3599.0, 3599.9])
@pytest.mark.parametrize(
    ("taken", "amount"), [((1,) * 10, 1), ((1,) * 10, 10), ((10,), 10), ((4, 4), 3), ((7, 3), 5), ((2,), 9)]
)
def test_a_request_fits_after_the_time_it_is_told_and_not_before(
    begin: float, taken: tuple[int, ...], amount: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever in an hour it begins, and again while the hour before is counted."""
    clock = [3600 * 400_000 + begin]
    monkeypatch.setattr(memory.time, "time", lambda: clock[0])

    async def test() -> None:
        rates = Rates("memory://")
        for cost in taken:
            assert await wait_of(rates, "10/hour", cost) == 0
        for _ in range(4):
            wait = await wait_of(rates, "10/hour", amount)
            assert 1 <= wait <= 2 * 3600
            clock[0] += wait - 1.01
            assert await wait_of(rates, "10/hour", amount) > 0, "it fitted earlier"
            clock[0] += 1.01
            assert await wait_of(rates, "10/hour", amount) == 0, "it does not fit yet"
            while await wait_of(rates, "10/hour", amount) == 0:
                pass

    asyncio.run(test())


@pytest.mark.slow
def test_a_shared_store_tells_the_same_time() -> None:
    async def test(url: str) -> None:
        rates = Rates(url)
        assert await wait_of(rates, "10/10second", 10) == 0
        wait = await wait_of(rates, "10/10second", 6)
        assert 1 <= wait <= 20
        await asyncio.sleep(wait)
        assert await wait_of(rates, "10/10second", 6) == 0

    with redis() as url:
        asyncio.run(test(url))


def test_a_store_of_another_kind_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="storage"):
        ServeConfig.checked({"limits": {"storage": "mongodb://localhost"}})
