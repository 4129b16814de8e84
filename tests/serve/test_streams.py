"""Server-sent events: silence that keeps the connection, of which the client sees nothing, and failures at the end."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator
from contextlib import closing

import openai
import pytest

from diffray.serve.config import ServeConfig
from diffray.serve.dialects import streams
from diffray.serve.work import Event, Work

from .ask import ask, post
from .live import live
from .scripted import Scripted


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "KEEP_ALIVE", 0.05)


def test_silence_is_filled_and_nothing_is_lost() -> None:
    async def slow() -> AsyncGenerator[str, None]:
        yield "a"
        yield "b"
        await asyncio.sleep(0.3)
        yield "c"

    async def collected() -> list[str]:
        return [text async for text in streams.kept_alive(slow())]

    texts = asyncio.run(collected())
    assert texts[:3] == ["a", "b", ": still here\n\n"]
    assert [text for text in texts if not text.startswith(":")] == ["a", "b", "c"]


def test_leaving_in_a_silence_ends_what_was_waited_for() -> None:
    ended: list[str] = []

    async def endless() -> AsyncGenerator[str, None]:
        try:
            yield "a"
            await asyncio.sleep(3600)
        finally:
            ended.append("ended")

    async def left() -> None:
        stream = streams.kept_alive(endless())
        assert [await anext(stream), (await anext(stream))[0]] == ["a", ":"]
        await stream.aclose()

    asyncio.run(left())
    assert ended == ["ended"]


@pytest.mark.parametrize(
    ("path", "more"),
    [("/v1/diffray/images", {}), ("/v1/images/generations", {"partial_images": 1, "size": "64x64"})],
)
def test_a_stream_that_waits_says_so_until_its_client_leaves(path: str, more: dict[str, object]) -> None:
    with live(ServeConfig(log="off"), Scripted) as running:
        backend = running.service.backend
        assert isinstance(backend, Scripted)
        with closing(post(running.url + path, {"prompt": "wait", "stream": True, **more})) as wire:
            heard = b""
            while heard.count(b": still here") < 3:
                heard += wire.recv(65536)
        assert b"text/event-stream" in heard
        for _ in range(1200):
            if backend.cancelled:
                break
            asyncio.run(asyncio.sleep(0.05))
        assert backend.cancelled == 1


@pytest.mark.parametrize(
    ("path", "more"), [("/v1/diffray/images", {}), ("/v1/images/generations", {"size": "64x64"})]
)
def test_a_stream_answers_before_its_turn_comes(path: str, more: dict[str, object]) -> None:
    class Busy(Scripted):
        async def run(self, work: Work) -> AsyncGenerator[Event, None]:
            if not turn.is_set():
                await asyncio.to_thread(turn.wait, 60)
            async for event in super().run(work):
                yield event

    turn = threading.Event()
    with live(ServeConfig(log="off"), Busy) as running:
        try:
            with closing(post(running.url + path, {"prompt": "x", "stream": True, **more})) as wire:
                heard = b""
                while b": still here" not in heard:
                    heard += wire.recv(65536)
                assert b"event:" not in heard
                turn.set()
                while b"event: result" not in heard and b".completed" not in heard:
                    heard += wire.recv(65536)
        finally:
            turn.set()


def test_the_sdk_skips_comments() -> None:
    class Slow(Scripted):
        async def run(self, work: Work) -> AsyncGenerator[Event, None]:
            async for event in super().run(work):
                yield event
                await asyncio.sleep(0.12)

    with live(ServeConfig(log="off"), Slow) as running:
        client = openai.OpenAI(base_url=running.url + "/v1", api_key="none")
        options = {"num_inference_steps": 4}
        stream = client.images.generate(
            prompt="x", size="64x64", stream=True, partial_images=2, extra_body=options
        )
        kinds = [event.type for event in stream]
    assert kinds[-1] == "image_generation.completed"
    assert set(kinds[:-1]) == {"image_generation.partial_image"}


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/diffray/images", {"preview_every": 1}),
        ("/v1/images/generations", {"partial_images": 1, "size": "64x64"}),
    ],
)
def test_a_failure_at_the_end_of_a_stream_is_seen_by_operators(
    path: str, more: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    def failures(url: str) -> float:
        lines = ask(url + "/metrics").data.decode().splitlines()
        name = 'diffray_rejections_total{reason="generation_failed"} '
        return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    with live(ServeConfig(), Scripted) as running:
        before = failures(running.url)
        capsys.readouterr()
        answer = ask(running.url + path, {"prompt": "late", "stream": True, **more})
        assert answer.status == 200
        assert b"event: error" in answer.data
        assert failures(running.url) == before + 1
    line = json.loads(capsys.readouterr().out)
    assert (line["path"], line["status"], line["refused"]) == (path, 200, "generation_failed")
