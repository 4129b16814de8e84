"""The OpenAI dialect with the `openai` package over HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import requests
from PIL import Image, ImageDraw

from diffray.serve import keys
from diffray.serve.config import Access, Guardrails, Limits, ServeConfig
from diffray.serve.dialects.openai_bodies import Generation
from diffray.serve.dialects.openai_works import asked
from diffray.serve.store import Files

from .live import Live, live
from .paced import paced
from .reference import made
from .scripted import Scripted, encoded

FAST = {"seed": 3, "num_inference_steps": 2}


@pytest.fixture
def api(service_app: Live) -> Iterator[openai.OpenAI]:
    """The client of a service on the embedded model."""
    with client_of(service_app) as client:
        yield client


@pytest.fixture(scope="module")
def stage() -> Iterator[tuple[Live, Scripted]]:
    """A service that does what prompts say."""
    backend = Scripted()
    with live(ServeConfig(log="off"), lambda config: backend) as running:
        yield running, backend


@pytest.fixture
def scripted(stage: tuple[Live, Scripted]) -> Iterator[tuple[openai.OpenAI, Scripted]]:
    running, backend = stage
    backend.works.clear()
    with client_of(running) as client:
        yield client, backend


def client_of(running: Live, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", **{"api_key": "any", "max_retries": 0} | options)


def pictures(answer: Any) -> list[Image.Image]:
    return [picture(data.b64_json) for data in answer.data]


def picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def png(image: Image.Image) -> tuple[str, bytes, str]:
    return "image.png", encoded(image, "png"), "image/png"


def scene(mode: str = "RGB", size: tuple[int, int] = (64, 64)) -> Image.Image:
    image = Image.new(mode, size, "blue")
    ImageDraw.Draw(image).ellipse((8, 8, 40, 40), fill="red")
    return image


def test_generation_is_the_engine_s_image(api: openai.OpenAI) -> None:
    answer = api.images.generate(
        prompt="a red circle",
        n=2,
        size="48x64",
        extra_body=FAST | {"negative_prompt": "blue", "guidance_scale": 4, "sampler": "Euler a"},
    )
    common: dict[str, Any] = {"prompt": "a red circle", "negative_prompt": "blue", "width": 48, "height": 64}
    for got, seed in zip(pictures(answer), (3, 4), strict=True):
        wanted = made(**common, steps=2, guidance_scale=4.0, sampler="Euler a", seed=seed)
        assert got.format == "PNG"
        assert np.array_equal(np.array(got), wanted)
    assert answer.size == "48x64"
    assert [data.model_extra["seed"] for data in answer.data if data.model_extra] == [3, 4]
    assert answer.usage is not None
    assert answer.usage.output_tokens == 2 * 12 * 16
    assert answer.usage.input_tokens_details.text_tokens == 4


def test_the_size_and_seed_of_a_bare_request(api: openai.OpenAI) -> None:
    first, second = (
        api.images.generate(prompt="a star", extra_body={"num_inference_steps": 1}) for _ in range(2)
    )
    assert pictures(first)[0].size == (64, 64)
    assert first.data
    assert second.data
    again = api.images.generate(
        prompt="a star", extra_body={"num_inference_steps": 1, **(first.data[0].model_extra or {})}
    )
    assert first.data[0].b64_json != second.data[0].b64_json
    assert again.data
    assert again.data[0].b64_json == first.data[0].b64_json


@pytest.mark.parametrize(("format", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_output_formats(api: openai.OpenAI, format: Any, kind: str) -> None:
    answer = api.images.generate(prompt="a star", output_format=format, extra_body=FAST)
    assert pictures(answer)[0].format == kind
    assert answer.output_format == format


def test_compression_makes_smaller_files(api: openai.OpenAI) -> None:
    sizes = [
        len(
            pictures_bytes(
                api.images.generate(
                    prompt="a star", output_format="jpeg", output_compression=q, extra_body=FAST
                )
            )
        )
        for q in (95, 20)
    ]
    assert sizes[1] < sizes[0]


def pictures_bytes(answer: Any) -> bytes:
    return base64.b64decode(answer.data[0].b64_json)


@pytest.mark.slow
def test_many_at_once_are_the_same_as_one_by_one(service_app: Live) -> None:
    """Strangers share every step; nobody's picture changes."""

    async def asked(client: openai.AsyncOpenAI, seed: int) -> str | None:
        body = {"seed": seed, "num_inference_steps": 2 + seed % 3, "guidance_scale": 1 + seed % 2}
        answer = await client.images.generate(prompt=f"a star {seed}", size="32x32", extra_body=body)
        return answer.data[0].b64_json if answer.data else None

    async def both() -> tuple[list[str | None], list[str | None]]:
        async with openai.AsyncOpenAI(base_url=f"{service_app.url}/v1", api_key="any") as client:
            together = await asyncio.gather(*(asked(client, seed) for seed in range(8)))
            return list(together), [await asked(client, seed) for seed in range(8)]

    together, alone = asyncio.run(both())
    assert together == alone
    assert len(set(together)) == 8


def test_an_edit_keeps_what_the_mask_does_not_open(api: openai.OpenAI) -> None:
    source = scene()
    mask = Image.new("RGBA", (64, 64), "black")
    mask.paste((0, 0, 0, 0), (32, 0, 64, 64))
    answer = api.images.edit(
        image=png(source),
        mask=png(mask),
        prompt="a green square",
        extra_body={"seed": 3, "num_inference_steps": 4},
    )
    got = np.array(pictures(answer)[0])
    assert np.array_equal(got[:, :32], np.array(source)[:, :32])
    assert not np.array_equal(got[:, 32:], np.array(source)[:, 32:])
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.image_tokens == 16 * 16


def test_the_transparency_of_an_image_is_its_mask(api: openai.OpenAI) -> None:
    source = scene("RGBA")
    hole = source.copy()
    hole.putalpha(Image.new("L", (64, 64), 255))
    hole.paste((0, 0, 255, 0), (32, 0, 64, 64))
    mask = Image.new("RGBA", (64, 64), "black")
    mask.paste((0, 0, 0, 0), (32, 0, 64, 64))
    plain = hole.convert("RGB")
    first = api.images.edit(image=png(hole), prompt="a star", extra_body=FAST)
    second = api.images.edit(image=png(plain), mask=png(mask), prompt="a star", extra_body=FAST)
    assert first.data
    assert second.data
    assert np.array_equal(np.array(pictures(first)[0]), np.array(pictures(second)[0]))


def test_an_edit_of_a_list_of_one_image(api: openai.OpenAI) -> None:
    """The SDK calls the field of a list `image[]`."""
    single = api.images.edit(image=png(scene()), prompt="a star", n=2, extra_body=FAST | {"strength": 0.6})
    listed = api.images.edit(image=[png(scene())], prompt="a star", n=2, extra_body=FAST | {"strength": 0.6})
    assert single.data
    assert listed.data
    assert [d.b64_json for d in single.data] == [d.b64_json for d in listed.data]
    assert single.data[0].b64_json != single.data[1].b64_json


def test_a_seed_for_each_image_of_an_edit(api: openai.OpenAI) -> None:
    """The SDK sends a list in a form as several fields `seed[]`."""
    body = {"seed": [5, 9], "num_inference_steps": 2}
    answer = api.images.edit(image=png(scene()), prompt="a star", n=2, extra_body=body)
    assert [(data.model_extra or {})["seed"] for data in answer.data or []] == [5, 9]


def test_a_variation_is_image_to_image(api: openai.OpenAI) -> None:
    answer = api.images.create_variation(
        image=png(scene()), n=1, extra_body={"strength": 0.5, "seed": 5, "num_inference_steps": 4}
    )
    wanted = made(init_image=scene(), strength=0.5, seed=5, steps=4, width=64, height=64)
    assert np.array_equal(np.array(pictures(answer)[0]), wanted)


def test_a_stream_of_partial_images(
    api: openai.OpenAI, service_app: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    paced(monkeypatch, service_app)
    body = {"seed": 3, "num_inference_steps": 12}
    events = list(api.images.generate(prompt="a red circle", stream=True, partial_images=3, extra_body=body))
    assert [event.type for event in events] == [
        *["image_generation.partial_image"] * 3,
        "image_generation.completed",
    ]
    assert [getattr(event, "partial_image_index", None) for event in events] == [0, 1, 2, None]
    assert all(picture(event.b64_json).size == (64, 64) for event in events)
    assert all(picture(event.b64_json).format == "PNG" for event in events)
    whole = api.images.generate(prompt="a red circle", extra_body=body)
    assert whole.data
    assert events[-1].b64_json == whole.data[0].b64_json
    assert events[-1].type == "image_generation.completed"
    assert events[-1].usage.output_tokens == 256


def test_partial_images_approach_the_result(
    api: openai.OpenAI, service_app: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    paced(monkeypatch, service_app)
    body = {"seed": 3, "num_inference_steps": 12}
    *partial, last = api.images.generate(
        prompt="a red circle", stream=True, partial_images=2, extra_body=body
    )
    final = np.array(picture(last.b64_json), dtype=float)
    errors = [np.abs(np.array(picture(p.b64_json), dtype=float) - final).mean() for p in partial]
    assert errors[1] < errors[0]


def test_a_stream_of_edits(api: openai.OpenAI, service_app: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    paced(monkeypatch, service_app)
    events = list(
        api.images.edit(
            image=png(scene()),
            prompt="a star",
            stream=True,
            partial_images=1,
            n=2,
            extra_body={"seed": 3, "num_inference_steps": 6, "strength": 0.7},
        )
    )
    kinds = [event.type for event in events]
    assert kinds.count("image_edit.completed") == 2
    assert kinds.count("image_edit.partial_image") == 2
    assert {(event.model_extra or {})["index"] for event in events} == {0, 1}


def test_urls_work_without_a_key_until_results_are_gone(api: openai.OpenAI) -> None:
    answer = api.images.generate(prompt="a star", n=2, response_format="url", extra_body=FAST)
    whole = api.images.generate(prompt="a star", n=2, extra_body=FAST)
    assert answer.data
    urls = [data.url or "" for data in answer.data]
    for url, data in zip(urls, whole.data or [], strict=True):
        got = requests.get(url)
        assert got.headers["content-type"] == "image/png"
        assert got.content == base64.b64decode(data.b64_json or "")
    another = "1" if urls[0][-5] == "0" else "0"
    for wrong in (f"{urls[0][:-5]}{another}.png", urls[0][:-3] + "jpeg", urls[0].rpartition("/")[0] + "/x"):
        assert requests.get(wrong).status_code == 404


def test_models(api: openai.OpenAI) -> None:
    names = [model.id for model in api.models.list()]
    assert names[0] == "embedded"
    assert api.models.retrieve("embedded").object == "model"
    with pytest.raises(openai.NotFoundError, match="no model 'dall-e-3'") as caught:
        api.models.retrieve("dall-e-3")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"size": "50x64"}, "size"),
        ({"size": "64"}, "size"),
        ({"size": "64x64", "extra_body": {"width": 64}}, "size"),
        ({"n": 11}, "n"),
        ({"n": 0}, "n"),
        ({"background": "transparent"}, "background"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"partial_images": 2}, "partial_images"),
        ({"partial_images": 4, "stream": True}, "partial_images"),
        ({"extra_body": {"num_inference_steps": 0}}, "num_inference_steps"),
        ({"extra_body": {"num_inference_steps": "20"}}, "num_inference_steps"),
        ({"extra_body": {"guidance_scale": 1000}}, "guidance_scale"),
        ({"extra_body": {"sampler": "nonsense"}}, "sampler"),
        ({"extra_body": {"scheduler": "nonsense"}}, "scheduler"),
        ({"extra_body": {"seed": -1}}, "seed"),
        ({"extra_body": {"seed": [1, 2]}}, "seed"),
        ({"extra_body": {"step": 20}}, "step"),
        ({"extra_body": {"width": 50}}, "width"),
    ],
)
def test_bad_values_are_named_by_the_client_s_own_name(
    api: openai.OpenAI, change: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.images.generate(**{"prompt": "a star"} | change)
    assert (caught.value.param or "").split(".")[0] == param
    assert caught.value.type == "invalid_request_error"
    assert set(caught.value.response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("files", "param"),
    [
        ({"image": ("x.png", b"no picture", "image/png")}, "image"),
        ({"image": [png(scene()), png(scene())]}, "image"),
        ({"image": png(scene()), "mask": png(scene())}, "mask"),
        ({"image": png(scene()), "mask": png(Image.new("RGBA", (32, 32)))}, "mask"),
        ({"image": png(scene()), "mask": png(Image.new("RGBA", (64, 64), "red"))}, "mask"),
        ({"image": png(scene()), "input_fidelity": "high"}, "input_fidelity"),
        ({"image": png(scene()), "extra_body": {"strength": 2}}, "strength"),
        ({"image": png(scene()), "size": "50x64"}, "size"),
    ],
)
def test_bad_edits(api: openai.OpenAI, files: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.images.edit(prompt="a star", **files)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (409, openai.ConflictError),
        (429, openai.RateLimitError),
        (503, openai.InternalServerError),
        (504, openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_are_the_sdk_s_exceptions(
    scripted: tuple[openai.OpenAI, Scripted], status: int, error: type[openai.APIStatusError], stream: bool
) -> None:
    client, _ = scripted
    with pytest.raises(error) as caught:
        client.images.generate(prompt=f"refuse {status}", stream=stream)
    assert caught.value.status_code == status
    assert caught.value.request_id
    assert caught.value.response.headers["retry-after"] == "1"
    assert "no, since the test says so" in caught.value.message


def test_a_failed_image_says_nothing_internal_and_is_not_tried_again(stage: tuple[Live, Scripted]) -> None:
    running, backend = stage
    with client_of(running, max_retries=2) as client, pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(prompt="fail")
    assert [work.request.prompt for work in backend.works].count("fail") == 1
    assert not {"secret", "gpu-17"} & set(caught.value.response.text.replace("/", " ").split())


def test_what_its_client_interrupted_is_not_tried_again(stage: tuple[Live, Scripted]) -> None:
    running, backend = stage
    backend.works.clear()

    def interrupt() -> None:
        while not running.service.admission.images:
            time.sleep(0.01)
        requests.post(f"{running.url}/sdapi/v1/interrupt")

    thread = threading.Thread(target=interrupt)
    thread.start()
    with (
        client_of(running, max_retries=1, timeout=20) as client,
        pytest.raises(openai.ConflictError) as caught,
    ):
        client.images.generate(prompt="wait")
    thread.join()
    assert caught.value.code == "interrupted"
    assert len(backend.works) == 1


def test_an_image_that_cannot_be_stored_is_not_made_twice(
    scripted: tuple[openai.OpenAI, Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Files, name: str, data: bytes) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(Files, "write", fail)
    client, backend = scripted
    with pytest.raises(openai.InternalServerError) as caught:
        client.with_options(max_retries=2).images.generate(prompt="x", response_format="url")
    assert caught.value.code == "store_failed"
    assert len(backend.works) == 1


def test_the_sdk_tries_again_after_the_time_it_is_told(stage: tuple[Live, Scripted]) -> None:
    running, _ = stage
    with client_of(running, max_retries=2) as client:
        answer = client.images.generate(prompt="busy", extra_body={"seed": 1})
    assert len(pictures(answer)) == 1


def test_a_stream_that_fails_late_raises_in_the_sdk(scripted: tuple[openai.OpenAI, Scripted]) -> None:
    client, _ = scripted
    with pytest.raises(openai.APIError, match="could not be made"):
        list(client.images.generate(prompt="late", stream=True, partial_images=1))


def test_leaving_a_stream_stops_its_images(scripted: tuple[openai.OpenAI, Scripted]) -> None:
    client, backend = scripted
    cancelled = backend.cancelled
    stream = client.images.generate(prompt="wait", stream=True, partial_images=3)
    assert next(iter(stream)).type == "image_generation.partial_image"
    stream.close()
    end = time.monotonic() + 10
    while backend.cancelled == cancelled:
        assert time.monotonic() < end, "it goes on"
        time.sleep(0.01)


def test_keys_rates_budgets_and_blocked_words(tmp_path: Path) -> None:
    token = keys.add(tmp_path / "keys.json", "alice", requests="1/year")
    (tmp_path / "blocked.txt").write_text("forbidden thing\n")
    config = ServeConfig(
        access=Access(keys=str(tmp_path / "keys.json")),
        guardrails=Guardrails(blocklist=str(tmp_path / "blocked.txt")),
        limits=Limits(cost=20),
        log="off",
    )
    with live(config, Scripted) as running:
        with client_of(running) as stranger, pytest.raises(openai.AuthenticationError) as refused:
            stranger.images.generate(prompt="a fox")
        assert refused.value.code == "invalid_api_key"
        with client_of(running, api_key=token) as client:
            with pytest.raises(openai.BadRequestError, match="megapixel-steps") as over:
                client.images.generate(prompt="a fox", size="2048x2048")
            assert over.value.code == "over_budget"
            with pytest.raises(openai.BadRequestError) as blocked:
                client.images.generate(prompt="a Forbidden  thing")
            assert (blocked.value.code, blocked.value.param) == ("content_policy_violation", "prompt")
            answer = client.images.generate(prompt="a fox", response_format="url")
            assert answer.data
            assert requests.get(answer.data[0].url or "").headers["content-type"] == "image/png"
            with pytest.raises(openai.RateLimitError) as fast:
                client.images.generate(prompt="a fox")
            assert fast.value.code == "rate_limit_exceeded"
            assert int(fast.value.response.headers["retry-after"]) >= 1


def test_errors_of_the_engine_have_the_client_s_names(scripted: tuple[openai.OpenAI, Scripted]) -> None:
    client, _ = scripted
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="invalid")
    assert caught.value.param == "scheduler"


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({}, {"steps": None, "width": None, "sampler": None, "guidance_scale": None}),
        ({"quality": "low"}, {"steps": 10}),
        ({"quality": "high"}, {"steps": 30}),
        ({"quality": "hd"}, {"steps": 30}),
        ({"quality": "max"}, {"steps": 40}),
        ({"quality": "auto"}, {"steps": None}),
        ({"quality": "low", "extra_body": {"num_inference_steps": 7}}, {"steps": 7}),
        ({"extra_body": {"scheduler": "karras"}}, {"schedule": "karras", "sampler": None}),
        ({"extra_body": {"scheduler": "EulerDiscreteScheduler"}}, {"sampler": "EulerDiscreteScheduler"}),
        ({"extra_body": {"width": 640}}, {"width": 640, "height": 512}),
        (
            {"extra_body": {"clip_skip": 1, "guidance_rescale": 0.5}},
            {"clip_skip": 1, "guidance_rescale": 0.5},
        ),
        ({"style": "vivid", "moderation": "low", "user": "me", "background": "opaque"}, {}),
    ],
)
def test_fields_become_the_request(
    scripted: tuple[openai.OpenAI, Scripted], body: dict[str, Any], wanted: dict[str, Any]
) -> None:
    client, backend = scripted
    client.images.generate(prompt="a fox", **body)
    (work,) = backend.works
    assert {name: getattr(work.request, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("steps", "quality", "wanted"), [(20, "low", 10), (4, "low", None), (8, "high", None), (9, "high", 14)]
)
def test_a_quality_does_not_change_the_steps_of_distilled_models(
    steps: int, quality: str, wanted: int | None
) -> None:
    body = Generation.model_validate({"prompt": "x", "quality": quality})
    (work,) = asked(body, replace(Scripted().card, steps=steps)).works
    assert work.request.steps == wanted


@pytest.mark.parametrize(
    ("size", "asked", "wanted"),
    [
        ((1024, 1024), "auto", (512, 512)),
        ((1600, 900), "auto", (704, 384)),
        ((1600, 900), "512x512", (512, 512)),
        ((300, 600), "auto", (384, 704)),
    ],
)
def test_edits_are_made_at_a_size_the_model_is_good_at(
    scripted: tuple[openai.OpenAI, Scripted], size: tuple[int, int], asked: str, wanted: tuple[int, int]
) -> None:
    client, backend = scripted
    client.images.edit(image=png(Image.new("RGB", size)), prompt="a fox", size=asked)
    request = backend.works[0].request
    assert request.init_image is not None
    assert (request.width, request.height) == request.init_image.size == wanted


def test_another_size_cuts_instead_of_stretching(scripted: tuple[openai.OpenAI, Scripted]) -> None:
    client, backend = scripted
    wide = Image.new("RGB", (1024, 512), "green")
    wide.paste("red", (0, 0, 200, 512))
    client.images.edit(image=png(wide), prompt="a fox", size="512x512")
    image = backend.works[0].request.init_image
    assert image is not None
    assert image.getpixel((4, 256)) == (0, 128, 0)
