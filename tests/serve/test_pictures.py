"""Pictures that clients send, to every route that takes one: never fetched, never too large, of three formats."""

from __future__ import annotations

import asyncio
import base64
import io
import select
import socket
import threading
import zlib
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import requests
from PIL import Image

from diffray.serve.config import ServeConfig

from .live import live
from .scripted import Scripted, encoded

PROMPT: dict[str, Any] = {"prompt": "x", "steps": 1, "width": 64, "height": 64}
FAST: dict[str, Any] = {"prompt": "x", "num_inference_steps": 1, "size": "64x64"}
WEIGHTED: dict[str, Any] = {"text_prompts[0][text]": "x", "steps": 1}
FORMS: dict[str, tuple[str, dict[str, Any], str]] = {
    "openai edit": ("/v1/images/edits", FAST, "image"),
    "openai mask": ("/v1/images/edits", FAST, "mask"),
    "openai variation": ("/v1/images/variations", FAST, "image"),
    "v1": ("/v1/generation/scripted/image-to-image", WEIGHTED, "init_image"),
    "v1 mask": (
        "/v1/generation/scripted/image-to-image/masking",
        WEIGHTED | {"mask_source": "MASK_IMAGE_WHITE"},
        "mask_image",
    ),
    "v2 generate": (
        "/v2beta/stable-image/generate/sd3",
        {"prompt": "x", "strength": 0.5, "steps": 1},
        "image",
    ),
    "v2 inpaint": ("/v2beta/stable-image/edit/inpaint", {"prompt": "x", "steps": 1}, "image"),
    "v2 mask": ("/v2beta/stable-image/edit/inpaint", {"prompt": "x", "steps": 1}, "mask"),
}
"""Path, text fields and the file's name; beside a mask there is a picture."""
JSON = (
    "init_image",
    "mask",
    "depth",
    "job",
    "img2img",
    "img2img mask",
    "png-info",
    "extra-single-image",
    "extra-batch-images",
)
ROUTES = (*FORMS, *JSON)


def scene(size: tuple[int, int] = (64, 64)) -> bytes:
    return encoded(Image.new("RGB", size, "red"), "png")


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def as_json(route: str, text: str) -> tuple[str, dict[str, Any]]:
    """Path and body with a text where a picture is expected."""
    other = text_of(scene())
    own: dict[str, dict[str, Any]] = {
        "init_image": {"init_image": text},
        "mask": {"init_image": other, "mask": text},
        "depth": {"init_image": other, "depth": text},
    }
    if route in own:
        return "/v1/diffray/images", PROMPT | own[route]
    if route == "job":
        return "/v1/diffray/jobs", PROMPT | {"init_image": text}
    theirs: dict[str, dict[str, Any]] = {
        "img2img": PROMPT | {"init_images": [text]},
        "img2img mask": PROMPT | {"init_images": [other], "mask": text},
        "png-info": {"image": text},
        "extra-single-image": {"image": text},
        "extra-batch-images": {"imageList": [{"data": other}, {"data": text}]},
    }
    return f"/sdapi/v1/{route.partition(' ')[0]}", theirs[route]


def send(url: str, route: str, data: bytes | str) -> requests.Response:
    """A request with file bytes, or with a text, in the place of a picture."""
    if route in JSON:
        path, body = as_json(route, text_of(data) if isinstance(data, bytes) else data)
        return requests.post(url + path, json=body, timeout=60)
    path, fields, name = FORMS[route]
    files: dict[str, Any] = (
        {} if name == "image" else {"init_image" if "v1" in path and "gen" in path else "image": scene()}
    )
    if isinstance(data, bytes):
        return requests.post(url + path, data=fields, files=files | {name: data}, timeout=60)
    files = files or {"none": ("", b"")}  # a multipart body all the same
    return requests.post(url + path, data=fields | {name: data}, files=files, timeout=60)


@pytest.fixture(scope="module")
def strangers() -> set[threading.Thread]:
    """Threads older than the service: the tests' own, and what earlier tests left (Ray Data's ask for a Prometheus)."""
    return set(threading.enumerate())


@pytest.fixture(scope="module")
def service(strangers: set[threading.Thread]) -> Iterator[tuple[str, Scripted]]:
    backend = Scripted()
    with live(ServeConfig(log="off"), lambda config: backend) as running:
        yield running.url, backend


@pytest.mark.parametrize("route", ROUTES)
def test_a_picture_is_read_beside_the_event_loop(
    service: tuple[str, Scripted], route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    looping: list[str] = []
    original = Image.open

    def open_(*arguments: Any, **named: Any) -> Any:
        threads.append(threading.current_thread().name)
        try:
            asyncio.get_running_loop()
            looping.append(route)
        except RuntimeError:
            pass
        return original(*arguments, **named)

    monkeypatch.setattr(Image, "open", open_)
    assert send(service[0], route, scene()).status_code in (200, 202, 400, 422)
    assert threads
    assert not looping


@pytest.mark.parametrize("route", ROUTES)
def test_references_are_never_followed(
    service: tuple[str, Scripted],
    strangers: set[threading.Thread],
    route: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, backend = service
    reached: list[object] = []

    def watched(original: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            if threading.current_thread() not in strangers:
                reached.append(arguments)
            return original(*arguments, **named)

        return call

    monkeypatch.setattr(socket.socket, "connect", watched(socket.socket.connect))
    monkeypatch.setattr(socket, "getaddrinfo", watched(socket.getaddrinfo))
    before = len(backend.works)
    with closing(socket.create_server(("127.0.0.1", 0))) as trap:
        port = trap.getsockname()[1]
        for text in (
            f"http://127.0.0.1:{port}/x.png",
            f" HTTPS://127.0.0.1:{port}/x.png",
            f"http:\\\\127.0.0.1:{port}\\x.png",
            f"\\\\127.0.0.1@{port}\\x.png",
            f"//127.0.0.1:{port}/x.png",
            f"http://[::1]:{port}/x.png",
            f"http://[::ffff:127.0.0.1]:{port}/x.png",
            f"http://2130706433:{port}/x.png",
            f"ftp://127.0.0.1:{port}/x.png",
            f"gopher://127.0.0.1:{port}/_x",
            f"s3://127.0.0.1:{port}/x.png",
            f"data:image/png,http://127.0.0.1:{port}/x.png",
            "file:///etc/passwd",
            "/etc/passwd",
        ):
            answer = send(url, route, text)
            assert answer.status_code in (400, 422), (text, answer.text)
            assert "root:" not in answer.text
        assert not select.select([trap], [], [], 0)[0]
    assert not reached
    assert len(backend.works) == before


def refused(service: tuple[str, Scripted], route: str, data: bytes) -> str:
    """What the service says to a picture that it must not take."""
    before = len(service[1].works)
    answer = send(service[0], route, data)
    assert answer.status_code in (400, 422), answer.text
    assert len(service[1].works) == before
    return answer.text


def chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)


def png_beginning(width: int, height: int) -> bytes:
    """A PNG of this size whose pixels never come."""
    header = width.to_bytes(4) + height.to_bytes(4) + b"\x08\x00\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


@pytest.mark.parametrize("route", ROUTES)
def test_a_pixel_bomb_is_refused_by_its_size(service: tuple[str, Scripted], route: str) -> None:
    """Before a pixel is decoded: there are none."""
    assert "got 4097x4096, allowed are 16777216 pixels" in refused(service, route, png_beginning(4097, 4096))
    refused(service, route, png_beginning(2**31 - 1, 2**31 - 1))


def others() -> dict[str, bytes]:
    image = Image.new("RGB", (64, 64), "red")
    card = b"".join(
        line.ljust(80)
        for line in (
            b"SIMPLE  =                    T",
            b"BITPIX  =                    8",
            b"NAXIS   =                    2",
            b"NAXIS1  =                   64",
            b"NAXIS2  =                   64",
            b"END",
        )
    ).ljust(2880)
    made = {
        name: encoded(image, name)
        for name in ("gif", "tiff", "eps", "pdf", "bmp", "ico", "ppm", "tga", "jpeg2000")
    }
    made |= {"fits": card + bytes(64 * 64), "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}
    return made | {"nothing": b"x"}


@pytest.mark.parametrize("route", ROUTES)
def test_other_formats_are_refused(service: tuple[str, Scripted], route: str) -> None:
    for format, data in others().items():
        assert "allowed are PNG, JPEG and WebP" in refused(service, route, data), format


@pytest.mark.parametrize("format", ["png", "webp"])
def test_of_many_frames_the_first_is_taken(service: tuple[str, Scripted], format: str) -> None:
    url, backend = service
    colours = [(0, 0, 255), *((index % 256, index // 256, 0) for index in range(600))]
    first, *rest = (Image.new("RGB", (64, 64), colour) for colour in colours)
    sink = io.BytesIO()
    first.save(
        sink, format, save_all=True, append_images=rest, **({"lossless": True} if format == "webp" else {})
    )
    assert send(url, "init_image", sink.getvalue()).status_code == 200
    taken = backend.works[-1].request.init_image
    assert isinstance(taken, Image.Image)
    assert taken.convert("RGB").getcolors() == [(64 * 64, (0, 0, 255))]
