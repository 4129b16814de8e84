"""What counts as the same request, and how much of what was answered is kept. See also test_native."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from PIL import Image

from diffray.serve import idempotency
from diffray.serve.config import ServeConfig

from .ask import ask
from .live import Live, live
from .scripted import Scripted, encoded

IMAGES = "/v1/diffray/images"


@pytest.fixture
def service() -> Iterator[Live]:
    with live(ServeConfig(log="off"), Scripted) as running:
        yield running


def count(service: Live) -> int:
    backend: Any = service.service.backend
    return len(backend.works)


def test_a_form_sent_again_has_another_boundary(service: Live) -> None:
    boundaries: set[str] = set()
    with openai.OpenAI(api_key="none", base_url=f"{service.url}/v1") as client:

        def edit(prompt: str) -> str | None:
            picture = ("x.png", encoded(Image.new("RGB", (64, 64)), "png"), "image/png")
            headers = {"Idempotency-Key": "edit-1"}
            raw = client.images.with_raw_response.edit(
                image=picture, prompt=prompt, size="64x64", extra_headers=headers
            )
            boundaries.add(raw.http_request.headers["content-type"])
            answer = raw.parse()
            assert answer.data
            return answer.data[0].b64_json

        assert edit("a star") == edit("a star")  # the seed is random
        assert count(service) == 1
        assert len(boundaries) == 2
        with pytest.raises(openai.BadRequestError) as caught:
            edit("a moon")
        assert caught.value.code == "idempotency_mismatch"


def test_another_kind_of_answer_is_another_request(service: Live) -> None:
    body = {"prompt": "x", "steps": 1}
    assert ask(service.url + IMAGES, body, idempotency_key="k").headers["content-type"] == "application/json"
    file = ask(service.url + IMAGES, body, idempotency_key="k", accept="image/png")
    assert (file.status, file.code) == (422, "idempotency_mismatch")


def test_only_so_many_answers_are_kept(service: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "RECORDINGS", 3)
    body = {"prompt": "x", "steps": 1}
    for key in "abcde":
        assert ask(service.url + IMAGES, body, idempotency_key=key).status == 200
    assert "idempotency-replayed" in ask(service.url + IMAGES, body, idempotency_key="e").headers
    assert "idempotency-replayed" not in ask(service.url + IMAGES, body, idempotency_key="a").headers


def test_what_makes_no_image_is_not_kept(service: Live) -> None:
    for _ in range(2):
        answer = ask(f"{service.url}/sdapi/v1/interrupt", {}, idempotency_key="i")
        assert answer.status == 200
        assert "idempotency-replayed" not in answer.headers
