"""/v1/diffray on the embedded model: pictures, streams, jobs, retries."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffray.model import Engine, ImageRequest, load_model
from diffray.model.encoding import read_provenance
from diffray.serve.config import ServeConfig, Store
from diffray.serve.dialects.native_bodies import ImagesBody
from diffray.serve.store import Files
from diffray.serve.work import Event, Work

from .ask import Answer, ask, connect
from .live import Live, live
from .paced import paced
from .scripted import Scripted

IMAGES = "/v1/diffray/images"
JOBS = "/v1/diffray/jobs"


def picture(data: bytes | str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data))


def base64_of(image: Image.Image) -> str:
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return base64.b64encode(sink.getvalue()).decode()


def events(answer: Answer) -> list[tuple[str, dict[str, Any]]]:
    blocks = answer.data.decode().split("\n\n")[:-1]
    found = []
    for block in blocks:
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def finished(url: str, job: str) -> dict[str, Any]:
    for _ in range(600):
        state: dict[str, Any] = ask(f"{url}{JOBS}/{job}").json
        if state["status"] != "running":
            return state
        time.sleep(0.1)
    raise AssertionError("the job did not end")


def test_the_body_has_every_field_of_a_request() -> None:
    own = {"model", "n", "format", "quality", "timeout", "stream", "preview_every"}
    missing = {"init_latents", "output"}
    assert set(ImagesBody.model_fields) - own == {f.name for f in fields(ImageRequest)} - missing
    for field in fields(ImageRequest):
        if field.name not in missing | {"seed", "crop", "adapters"}:
            assert ImagesBody.model_fields[field.name].default == field.default, field.name


def test_pixels_are_those_of_the_engine(service_app: Live) -> None:
    body = {"prompt": "a large red circle on a blue background", "seed": 11, "steps": 6, "n": 2}
    made = ask(service_app.url + IMAGES, body).json["images"]
    requests = [ImageRequest(prompt=body["prompt"], seed=11 + i, steps=6) for i in range(2)]  # type: ignore[arg-type]
    expected = Engine(load_model()).generate(requests)
    for answer, result in zip(made, expected, strict=True):
        assert result.image is not None
        assert picture(answer["image"]).tobytes() == result.image.tobytes()
        assert answer["parameters"]["seed"] == result.request.seed
        provenance = read_provenance(base64.b64decode(answer["image"]))
        assert provenance.parameters is not None
        assert provenance.parameters["model_checksum"] == answer["model_checksum"]


def test_a_file_when_an_image_is_accepted(service_app: Live) -> None:
    answer = ask(service_app.url + IMAGES, {"steps": 2, "format": "webp", "seed": 9}, accept="image/webp")
    assert answer.headers["content-type"] == "image/webp"
    assert answer.headers["seed"] == "9"
    assert picture(answer.data).format == "WEBP"


def test_stream_of_progress_previews_and_result(service_app: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    paced(monkeypatch, service_app)
    body = {"prompt": "a green square", "steps": 6, "preview_every": 2, "stream": True, "seed": 1}
    answer = ask(service_app.url + IMAGES, body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    told = events(answer)
    steps = [data["step"] for name, data in told if name == "progress"]
    assert steps[0] <= 1
    assert steps == sorted(steps)
    assert [name for name, _ in told][-1] == "result"
    assert any("preview" in data for name, data in told)
    for _, data in told:
        if "preview" in data:
            assert picture(data["preview"]).format == "JPEG"
        if "percent" in data:
            assert data["percent"] == pytest.approx(100 * data["step"] / 6, abs=0.1)
    again = ask(service_app.url + IMAGES, {**body, "stream": False}).json["images"][0]
    assert told[-1][1]["image"] == again["image"]


def test_source_and_mask(service_app: Live) -> None:
    source = Image.new("RGB", (64, 64), (250, 240, 0))
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    body = {
        "prompt": "a blue circle",
        "init_image": base64_of(source),
        "mask": "data:image/png;base64," + base64_of(mask),
        "paste_back": True,
        "steps": 4,
    }
    made = picture(ask(service_app.url + IMAGES, body).json["images"][0]["image"])
    assert (np.array(made)[:, 33:] == (250, 240, 0)).all()
    assert not (np.array(made)[:, :31] == (250, 240, 0)).all()


def test_refusals_name_the_field(service_app: Live) -> None:
    for body, field in (
        ({"sampler": "nope"}, "sampler"),
        ({"width": 63}, "width"),
        ({"mask": base64_of(Image.new("L", (8, 8)))}, "mask"),
        ({"strength": 0.5}, "strength"),
        ({"steps": 0}, "steps"),
        ({"clip_skip": 11}, "clip_skip"),
    ):
        answer = ask(service_app.url + IMAGES, body)
        assert (answer.status, answer.json["error"]["field"]) == (422, field), answer.data


def test_a_deadline_stops_the_engine(service_app: Live) -> None:
    answer = ask(service_app.url + IMAGES, {"steps": 1000, "timeout": 0.5})
    assert (answer.status, answer.code) == (504, "timeout")
    engines: Any = service_app.service.backend
    resident = engines.residents.get("embedded")
    for _ in range(100):
        if resident.engine.running == 0:
            break
        time.sleep(0.1)
    assert resident.engine.running == 0


def test_job_from_beginning_to_end(service_app: Live) -> None:
    answer = ask(service_app.url + JOBS, {"prompt": "a red circle", "steps": 3, "n": 2, "seed": 4})
    assert answer.status == 202
    identity = answer.json["id"]
    assert answer.headers["location"] == f"{JOBS}/{identity}"
    state = finished(service_app.url, identity)
    assert (state["status"], state["progress"], len(state["images"])) == ("done", 1.0, 2)
    fetched = ask(f"{service_app.url}{JOBS}/{identity}/images/1")
    direct = ask(
        service_app.url + IMAGES, {"prompt": "a red circle", "steps": 3, "seed": 5}, accept="image/png"
    )
    assert fetched.data == direct.data
    assert ask(f"{service_app.url}{JOBS}/{identity}/images/2").status == 404
    assert ask(f"{service_app.url}{JOBS}/{identity}", method="DELETE").status == 200
    assert ask(f"{service_app.url}{JOBS}/{identity}").status == 404


def test_job_is_cancelled_at_the_next_step(service_app: Live) -> None:
    identity = ask(service_app.url + JOBS, {"steps": 1000}).json["id"]
    time.sleep(0.5)
    state = ask(f"{service_app.url}{JOBS}/{identity}", method="DELETE").json
    assert state["status"] == "cancelled"
    assert ask(f"{service_app.url}{JOBS}/{identity}").json["status"] == "cancelled"
    assert service_app.service.admission.images == 0


def test_a_job_for_a_model_that_is_not_there_yet_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffray.serve.jobs.PATIENCE", 0.05)

    class Late(Scripted):
        async def run(self, work: Work) -> AsyncGenerator[Event, None]:
            await asyncio.sleep(0.5)
            async for event in super().run(work):
                yield event

    with live(ServeConfig(log="off"), Late) as running:
        for body, status in (({"steps": 1}, "done"), ({"prompt": "fail"}, "failed")):
            answer = ask(running.url + JOBS, body)
            assert (answer.status, answer.json["status"]) == (202, "running")
            assert finished(running.url, answer.json["id"])["status"] == status
        identity = ask(running.url + JOBS, {"prompt": "wait"}).json["id"]
        assert ask(f"{running.url}{JOBS}/{identity}", method="DELETE").json["status"] == "cancelled"
        assert running.service.admission.images == 0


def test_bad_jobs_are_refused_before_they_begin(service_app: Live) -> None:
    assert ask(service_app.url + JOBS, {"width": 63}).status == 422
    for name in ("nope", "../../etc", "0-" + "0" * 24, "a" * 500):
        assert ask(f"{service_app.url}{JOBS}/{name}").status == 404


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    if request.param == "folder":
        yield {"url": str(tmp_path / "results")}
        return
    from tests.pipelines.s3 import serve

    with serve() as s3:
        yield {"url": s3.folder(), "options": s3.options()}


@pytest.mark.slow
def test_jobs_survive_a_restart_and_end_with_their_time(store: dict[str, Any]) -> None:
    config = ServeConfig(store=Store(**store), log="off")
    with live(config, Scripted) as first:
        identity = ask(first.url + JOBS, {"steps": 1, "seed": 3}).json["id"]
        failed = ask(first.url + JOBS, {"prompt": "late"}).json["id"]
        data = (finished(first.url, identity), ask(f"{first.url}{JOBS}/{identity}/images/0").data)[1]
        assert picture(data).size == (512, 512)
        state = finished(first.url, failed)
        assert (state["status"], state["error"]["code"]) == ("failed", "generation_failed")
    with live(config, Scripted) as second:
        assert ask(f"{second.url}{JOBS}/{identity}/images/0").data == data
        files = Files(config.store)
        assert len(files.places()) == 2
    with live(config.model_copy(update={"store": Store(**store, seconds=0.2)}), Scripted) as third:
        for _ in range(100):
            if not files.places():
                break
            time.sleep(0.1)
        assert files.places() == []
        assert ask(f"{third.url}{JOBS}/{identity}").status == 404


def test_nobody_sees_another_s_job(tmp_path: Path) -> None:
    from diffray.serve import keys
    from diffray.serve.config import Access

    file = tmp_path / "keys.json"
    alice, bob = (f"Bearer {keys.add(file, name)}" for name in ("alice", "bob"))
    with live(ServeConfig(access=Access(keys=str(file)), host="0.0.0.0", log="off"), Scripted) as running:
        identity = ask(running.url + JOBS, {"steps": 1}, authorization=alice).json["id"]
        assert ask(f"{running.url}{JOBS}/{identity}", authorization=alice).status == 200
        assert ask(f"{running.url}{JOBS}/{identity}", authorization=bob).status == 404
        assert ask(f"{running.url}{JOBS}/{identity}/images/0", authorization=bob).status == 404
        assert ask(f"{running.url}{JOBS}/{identity}", method="DELETE", authorization=bob).status == 404


def test_the_same_key_twice_is_one_generation() -> None:
    with live(ServeConfig(log="off"), Scripted) as running:
        backend: Any = running.service.backend
        answers: list[Answer] = []
        body = {"prompt": "x", "steps": 3}

        def send() -> None:
            answers.append(ask(running.url + IMAGES, body, idempotency_key="k-1"))

        threads = [threading.Thread(target=send) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {answer.status for answer in answers} == {200}
        assert len({answer.data for answer in answers}) == 1
        assert len(backend.works) == 1
        assert sum("idempotency-replayed" in answer.headers for answer in answers) == 5
        assert (
            ask(running.url + IMAGES, {"prompt": "y"}, idempotency_key="k-1").code == "idempotency_mismatch"
        )
        assert ask(running.url + IMAGES, body, idempotency_key="k-2").status == 200
        assert len(backend.works) == 2
        assert ask(running.url + IMAGES, body, idempotency_key="k" * 300).status == 400


def test_a_retry_after_a_lost_connection_finds_the_answer() -> None:
    """The client gives up waiting; the generation goes on, and its retry gets it."""
    with live(ServeConfig(), Scripted) as running:
        backend: Any = running.service.backend
        body = {"prompt": "x", "steps": 3}
        data = json.dumps(body).encode()
        wire = connect(running.url)
        head = f"POST {IMAGES} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        wire.sendall(f"{head}idempotency-key: again\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
        wire.close()
        time.sleep(0.2)
        assert ask(running.url + IMAGES, body, idempotency_key="again").status == 200
        assert len(backend.works) == 1


def test_failures_are_not_kept() -> None:
    with live(ServeConfig(log="off"), Scripted) as running:
        body = {"prompt": "busy"}
        backend: Any = running.service.backend
        first = ask(running.url + IMAGES, {**body, "seed": 5}, idempotency_key="b")
        second = ask(running.url + IMAGES, {**body, "seed": 5}, idempotency_key="b")
        assert (first.status, second.status) == (503, 200)
        assert len(backend.works) == 2
