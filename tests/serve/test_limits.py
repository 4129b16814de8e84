"""Every limit: what is over it is refused at once, in the dialect's words, before an engine works."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import select
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from http.client import HTTPResponse
from typing import Any

import pytest

from diffray.model import ImageRequest
from diffray.serve import middleware, service
from diffray.serve.config import Guardrails, InvalidConfig, Limits, ServeConfig
from diffray.serve.server import Patient
from diffray.serve.service import UNREAD, RunningView, Service
from diffray.serve.work import Event, Finished, Progress, Work

from .ask import ask, connect, heard, post
from .live import Live, live
from .scripted import Scripted

IMAGES = "/v1/diffray/images"
JSON_PATHS = (
    IMAGES,
    "/v1/diffray/jobs",
    "/v1/images/generations",
    "/sdapi/v1/txt2img",
    "/sdapi/v1/img2img",
    "/sdapi/v1/extra-batch-images",
    "/v1/generation/scripted/text-to-image",
)
NESTED = (
    "prompt",
    "adapters",
    "lora",
    "alwayson_scripts",
    "override_settings",
    "imageList",
    "text_prompts",
    "extras",
)
"""Fields that are, or may be taken for, more than a text or a number."""


class Hurried(Patient):
    seconds = 2.5
    read_seconds = 0.5


class Unhurried(Patient):
    read_seconds = 2.5


@contextmanager
def limited(http: type[Patient] = Patient, **limits: Any) -> Iterator[Live]:
    with live(ServeConfig(limits=Limits(**limits), log="off"), Scripted, http=http) as running:
        yield running


def works(running: Live) -> int:
    """How many works reached the backend."""
    backend: Any = running.service.backend
    return len(backend.works)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def small() -> Iterator[Live]:
    with limited(cost=10, images=4, body_bytes=4096) as running:
        yield running


@pytest.fixture(scope="module")
def open_() -> Iterator[Live]:
    with limited() as running:
        yield running


def test_budget_of_one_request(small: Live) -> None:
    before = works(small)
    answer = ask(small.url + IMAGES, {"width": 1024, "height": 1024, "steps": 3, "n": 4})
    assert (answer.status, answer.code) == (422, "over_budget")
    assert "12.6 megapixel-steps" in answer.json["error"]["message"]
    assert "10" in answer.json["error"]["message"]
    answer = ask(small.url + IMAGES, {"n": 5, "steps": 1})
    assert (answer.status, answer.code) == (422, "too_many_images")
    assert works(small) == before
    assert ask(small.url + IMAGES, {"width": 1024, "height": 1024, "steps": 2, "n": 4}).status == 200


def test_size_of_one_image() -> None:
    with live(ServeConfig(log="off"), Scripted) as running:
        url = running.url + IMAGES
        answer = ask(url, {"width": 8192, "height": 8192, "steps": 1})
        assert (answer.status, answer.json["error"]["field"]) == (422, "width")
        assert re.search(r"8192x8192.*16777216", answer.json["error"]["message"])
        large = {"width": 2048, "height": 2048, "steps": 1, "hires_steps": 1}
        answer = ask(url, {**large, "hires_scale": 2.5})
        assert (answer.status, answer.json["error"]["field"]) == (422, "hires_scale")
        assert "5120x5120" in answer.json["error"]["message"]
        assert works(running) == 0
        assert ask(url, {**large, "hires_scale": 2}).status == 200


seen: list[tuple[str, str]] = []


def note(request: ImageRequest) -> None:
    seen.append((request.prompt, threading.current_thread().name))


def test_a_prompt_is_checked_once_and_not_on_the_event_loop() -> None:
    rules = Guardrails(prompt=(f"{__name__}:note",))
    limits = Limits(images=4)
    with live(ServeConfig(guardrails=rules, limits=limits, log="off"), Scripted) as running:
        assert ask(running.url + IMAGES, {"prompt": "many", "n": 5}).code == "too_many_images"
        assert not seen
        assert ask(running.url + IMAGES, {"prompt": "few", "n": 4}).status == 200
        loop = asyncio.run_coroutine_threadsafe(current(), running.loop).result()
    assert [prompt for prompt, _ in seen] == ["few"]
    assert loop not in {thread for _, thread in seen}


async def current() -> str:
    return threading.current_thread().name


def test_body_that_says_it_is_too_large(small: Live) -> None:
    with closing(connect(small.url)) as wire:
        wire.sendall(f"POST {IMAGES} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5000\r\n\r\n".encode())
        assert heard(wire, b"\r\n").startswith(b"HTTP/1.1 413 ")  # before a byte of the body was sent


def test_body_that_does_not_say_how_large_it_is(small: Live) -> None:
    with closing(connect(small.url)) as wire:
        head = f"POST {IMAGES} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
        wire.sendall(head.encode() + b"".join(b"400\r\n" + b"x" * 1024 + b"\r\n" for _ in range(5)))
        assert heard(wire, b"\r\n").startswith(b"HTTP/1.1 413 ")  # while it is still open


def test_bodies_count_while_they_arrive(small: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODIES_AT_ONCE", 4)
    head = f"POST {IMAGES} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    with ExitStack() as stack:
        wires = [stack.enter_context(closing(connect(small.url))) for _ in range(5)]
        for wire in wires:  # 4 x 4096 bytes have room, 5 x 4000 have not
            wire.sendall(head + b"fa0\r\n" + b" " * 4000 + b"\r\n")
        ready, _, _ = select.select(wires, [], [], 10)
        answer = heard(ready[0], b"}")
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"queue_full" in answer
    # The others are gone, and their bytes with them.
    wait_for(lambda: ask(small.url + IMAGES, b" " * 4000).code == "invalid_json")


def test_length_of_many_digits(small: Live) -> None:
    for digits, status in (("0" * 5000, b"422"), ("9" * 5000, b"4")):
        with closing(connect(small.url)) as wire:
            wire.sendall(
                f"POST {IMAGES} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {digits}\r\n\r\n".encode()
            )
            assert heard(wire, b"\r\n").startswith(b"HTTP/1.1 " + status)


def test_body_that_never_ends() -> None:
    with limited(body_seconds=1.5) as running, closing(connect(running.url)) as wire:
        wire.sendall(f"POST {IMAGES} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n".encode())
        for _ in range(3):
            wire.sendall(b" ")
            time.sleep(0.1)
        answer = heard(wire, b"}")
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"body_timeout" in answer


def test_headers_that_never_end() -> None:
    with limited(http=Hurried) as running:
        with closing(connect(running.url)) as wire:
            wire.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n")
            for _ in range(4):
                wire.sendall(b"x-slow: 1\r\n")
                time.sleep(0.02)
            assert heard(wire).startswith(b"HTTP/1.1 408 ")  # and closed
        with closing(connect(running.url)) as wire:  # a second request on the same connection, as slow
            wire.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert b"200 OK" in heard(wire, b"}")
            wire.sendall(b"GET /heal")
            assert heard(wire).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[" * 3000, 400),
        (b'{"prompt": NaN}', 400),
        (b'{"guidance_scale": 1e999}', 422),
        (b'{"prompt": "a", "prompt": "b"}', 400),
        (b'{"seed": ' + b"9" * 3000 + b"}", 400),
        (b'{"seed": 9223372036854775808}', 422),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": "\xff"}', 400),
        (b"", 422),
        (b"[]", 422),
        (b'{"step": 5}', 422),
        (b'{"steps": "5"}', 422),
        (b'{"steps": true}', 422),
        (b'{"paste_back": 1}', 422),
        (b'{"crop": [1]}', 422),
        (b'{"output": "latents"}', 422),
        (b'{"init_image": "http://127.0.0.1/x.png"}', 422),
        (b'{"init_image": "file:///etc/passwd"}', 422),
        (b'{"init_image": "data:image/png;base64,AAAA"}', 422),
        (b'{"init_image": "data:image/svg+xml;base64,PHN2Zz48L3N2Zz4="}', 422),
        (b'{"init_image": "!!"}', 422),
        (b'{"model": "../../etc"}', 404),
    ],
)
def test_bodies_that_are_no_request(small: Live, body: bytes, status: int) -> None:
    before = works(small)
    answer = ask(small.url + IMAGES, body)
    assert answer.status == status, answer.data
    assert set(answer.json["error"]) >= {"code", "message", "request_id"}
    assert works(small) == before
    assert not re.search(r"Traceback|\.py|site-packages|/root|/home", answer.data.decode())


@pytest.mark.parametrize("path", JSON_PATHS)
@pytest.mark.parametrize(("opened", "closed"), [(b"[", b"]"), (b'{"a":', b"}")])
@pytest.mark.parametrize("depth", [60, 66, 900, 10**5])
def test_nesting(open_: Live, path: str, opened: bytes, closed: bytes, depth: int) -> None:
    """64 levels are allowed, the field's own among them; 10^5 are too deep for the parser itself."""
    nested = opened * depth + b"1" + closed * depth
    for body in (nested, *(b'{"%s": %s}' % (name.encode(), nested) for name in NESTED)):
        status = ask(open_.url + path, body).status
        assert status == 400 if depth > 64 else status < 500, body[:40]


def test_a_form_is_not_json(small: Live) -> None:
    answer = ask(small.url + IMAGES, b"a=b", content_type="application/x-www-form-urlencoded")
    assert answer.status == 422


def test_full_queue_is_refused_at_once_with_a_time_to_come_back() -> None:
    with limited(queue_images=3) as running:
        waiting = [post(running.url + IMAGES, {"prompt": "wait"}) for _ in range(3)]
        wait_for(lambda: running.service.admission.images == 3)
        answer = ask(running.url + IMAGES, {"prompt": "one too many"})
        assert (answer.status, answer.code) == (503, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        assert running.service.admission.images == 3
        for wire in waiting:
            wire.close()
        wait_for(lambda: running.service.admission.images == 0)
        assert ask(running.url + IMAGES, {"prompt": "now"}).status == 200


def test_queue_is_bounded_by_cost_too() -> None:
    with limited(queue_cost=12) as running:
        wire = post(running.url + IMAGES, {"prompt": "wait", "width": 1024, "height": 1024, "steps": 10})
        wait_for(lambda: running.service.admission.images == 1)
        assert ask(running.url + IMAGES, {"width": 1024, "height": 1024, "steps": 2}).code == "queue_full"
        assert ask(running.url + IMAGES, {"width": 512, "height": 512, "steps": 2}).status == 200
        wire.close()


def test_rates_count_requests_and_cost() -> None:
    with limited(requests_per_key="3/year") as running:
        codes = [ask(running.url + IMAGES, {"steps": 1}) for _ in range(4)]
        assert [answer.status for answer in codes] == [200, 200, 200, 429]
        assert codes[3].code == "rate_limited"
        assert 1 <= int(codes[3].headers["retry-after"]) <= 360 * 86400
        assert ask(running.url + "/v1/diffray/models").status == 200  # looking is free
    with limited(cost_per_key="25/year") as running:
        body = {"width": 1024, "height": 1024, "steps": 10}
        assert [ask(running.url + IMAGES, body).status for _ in range(3)] == [200, 200, 429]


def test_one_client_at_once() -> None:
    with limited(images_at_once=2) as running:
        waiting = [post(running.url + IMAGES, {"prompt": "wait"}) for _ in range(2)]
        wait_for(lambda: running.service.admission.images == 2)
        answer = ask(running.url + IMAGES, {"prompt": "third"})
        assert (answer.status, answer.code) == (429, "too_many_at_once")
        assert "retry-after" in answer.headers
        for wire in waiting:
            wire.close()


@pytest.mark.parametrize(
    "path",
    [
        IMAGES,
        "/v1/diffray/jobs",
        "/v1/images/generations",
        "/v1/images/edits",
        "/sdapi/v1/txt2img",
        "/sdapi/v1/img2img",
        "/sdapi/v1/extra-batch-images",
        "/v1/generation/scripted/text-to-image",
        "/v2beta/stable-image/generate/sd3",
    ],
)
def test_who_has_no_room_is_refused_before_the_body_comes(crowded: Live, path: str) -> None:
    with closing(connect(crowded.url)) as wire:
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n".encode()
        wire.sendall(head)
        answer = HTTPResponse(wire)
        answer.begin()
        assert (answer.status, int(answer.headers["retry-after"]) >= 1) == (429, True)
        answer.read()
        wire.sendall(b" " * 1000 + b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert heard(wire, b"\r\n").startswith(b"HTTP/1.1 200 ")  # the connection is still good


def test_who_has_no_room_may_do_all_but_make_images(crowded: Live) -> None:
    assert ask(crowded.url + IMAGES, b"{", idempotency_key="1").code == "invalid_json"
    assert ask(crowded.url + "/v1/diffray/jobs/none", method="DELETE").status == 404
    assert ask(crowded.url + "/sdapi/v1/png-info", {"image": ""}).status == 422


@pytest.fixture(scope="module")
def crowded() -> Iterator[Live]:
    """Its client has one image there, and may have no more."""
    with limited(images_at_once=1) as running, closing(post(running.url + IMAGES, {"prompt": "wait"})):
        wait_for(lambda: running.service.admission.images == 1)
        yield running


def test_wrong_rates_are_refused_at_the_start() -> None:
    with pytest.raises(InvalidConfig, match="requests_per_key"):
        Service(ServeConfig(limits=Limits(requests_per_key="often")), Scripted())


def test_disconnect_cancels_while_it_runs() -> None:
    with limited() as running:
        backend: Any = running.service.backend
        for body in ({"prompt": "wait"}, {"prompt": "wait", "stream": True}):
            cancelled = backend.cancelled
            wire = post(running.url + IMAGES, body)
            wait_for(lambda: running.service.admission.images == 1)
            wire.close()
            wait_for(lambda count=cancelled: backend.cancelled == count + 1)  # type: ignore[misc]
            wait_for(lambda: running.service.admission.images == 0)


class Bulky(Scripted):
    """Its pictures are larger than what lies between a client and the service."""

    async def run(self, work: Work) -> AsyncGenerator[Event, None]:
        async for event in super().run(work):
            yield replace(event, data=bytes(16_000_000)) if isinstance(event, Finished) else event


def test_who_does_not_read_holds_no_places_and_is_cut_off() -> None:
    config = ServeConfig(limits=Limits(images_at_once=2), log="off")
    with live(config, Bulky, http=Patient) as running:
        body = {"prompt": "x", "steps": 2, "n": 2, "stream": True, "preview_every": 1}
        with closing(post(running.url + IMAGES, body)) as wire:
            backend: Any = running.service.backend
            wait_for(lambda: len(backend.works) == 2)
            wait_for(lambda: running.service.admission.images == 0)
            assert running.service._running  # its answer stands still
            answer = ask(running.url + IMAGES, {"steps": 1, "n": 2, "width": 64, "height": 64})
            assert answer.status == 200
            assert heard(wire, b"\r\n").startswith(b"HTTP/1.1 200 ")
    with live(config, Bulky, http=Hurried) as running, closing(post(running.url + IMAGES, body)) as wire:
        backend = running.service.backend
        wait_for(lambda: len(backend.works) == 2)
        wait_for(lambda: not running.service._running)
        got = b""
        with contextlib.suppress(ConnectionError):
            while piece := wire.recv(1 << 20):
                got += piece
        assert len(got) < 20_000_000  # what lay on the way


def test_slow_reading_is_reading() -> None:
    config = ServeConfig(log="off")
    with (
        live(config, Bulky, http=Unhurried) as running,
        closing(post(running.url + IMAGES, {"steps": 1})) as wire,
    ):
        answer = HTTPResponse(wire)
        answer.begin()
        data = b""
        for _ in range(8):  # longer than it may stand still
            time.sleep(0.4)
            data += answer.read(2_000_000)
        assert len(json.loads(data + answer.read())["images"]) == 1


def test_unread_events_give_way_to_newer_ones_and_the_picture_stays() -> None:
    view = RunningView(Work(request=ImageRequest(), model="m"))
    told = sum(view.tell(Progress(step, 100, b"%d" % step if step % 2 else None)) for step in range(1, 101))
    told += view.tell(finished := Finished(b"", ImageRequest(), "m", "", {}))
    assert told == len(view.unread) == UNREAD
    assert view.unread.pop() is finished
    assert [event.step for event in view.unread if isinstance(event, Progress)] == [97, 99, 100]
    plain = RunningView(Work(request=ImageRequest(), model="m"))
    assert [plain.tell(Progress(step, 3)) for step in (1, 2, 3)] == [True, False, False]
    assert list(plain.unread) == [Progress(3, 3)]


def test_a_backend_that_never_ends_gives_its_places_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MARGIN", 0.1)
    with limited(seconds=0.1) as running:
        answer = ask(running.url + IMAGES, {"prompt": "wait"})  # a scripted one has no deadline of its own
        assert (answer.status, answer.code) == (504, "timeout")
        assert running.service.admission.images == 0


def test_many_at_once_leave_nothing_behind() -> None:
    with limited(queue_images=20, images_at_once=20) as running, ThreadPoolExecutor(40) as pool:
        bodies = [{"prompt": f"p{i}" if i % 5 else "fail", "steps": 2, "seed": i} for i in range(200)]
        statuses = list(pool.map(lambda body: ask(running.url + IMAGES, body).status, bodies))
        assert set(statuses) <= {200, 500, 429, 503}
        assert statuses.count(200) > 20
        assert running.service.admission.images == 0
        assert running.service.admission.cost == 0
        assert not running.service._running


def test_client_deadline_header() -> None:
    with limited() as running:
        answer = ask(running.url + IMAGES, {"prompt": "x"}, x_timeout_seconds="soon")
        assert answer.status == 400
        ask(running.url + IMAGES, {"prompt": "x"}, x_timeout_seconds="7")
        backend: Any = running.service.backend
        assert backend.works[-1].seconds == 7.0


@pytest.mark.parametrize(
    ("prompt", "status", "code", "advice"),
    [("fail", 500, "generation_failed", "another seed"), ("huge", 507, "out_of_memory", "a smaller one")],
)
def test_errors_never_show_what_is_inside(
    small: Live, prompt: str, status: int, code: str, advice: str
) -> None:
    answer = ask(small.url + IMAGES, {"prompt": prompt, "steps": 1})
    assert (answer.status, answer.code) == (status, code)
    assert advice in answer.json["error"]["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert "secret" not in answer.data.decode()
    assert "gpu-17" not in answer.data.decode()
    assert answer.headers["x-request-id"] == answer.json["error"]["request_id"]


def test_logs_cannot_be_forged(capsys: pytest.CaptureFixture[str]) -> None:
    with live(ServeConfig(), Scripted) as running:
        capsys.readouterr()
        ask(running.url + "/v1/diffray/nothing%0a%7b%22forged%22:1%7d", x_request_id="bad id\t")
        ask(running.url + IMAGES, {"prompt": "a secret\nprompt", "steps": 1}, x_request_id="mine-1")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
    assert re.fullmatch("[0-9a-f]{32}", lines[0]["request_id"])
    assert lines[1]["request_id"] == "mine-1"
    assert lines[1]["images"] == 1
    assert "secret" not in json.dumps(lines)
