"""The Stability dialect, by plain `requests` scripts in the manner of its documentation."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import requests
import webuiapi
from PIL import Image, ImageDraw

from diffray.serve.config import Guardrails, ServeConfig
from diffray.serve.dialects.stability_bodies import TextPrompt
from diffray.serve.dialects.stability_works import prompts_of

from .live import Live, live
from .reference import made
from .scripted import Scripted, encoded

JSON = {"Accept": "application/json"}


@pytest.fixture(scope="module")
def stage() -> Iterator[tuple[Live, Scripted]]:
    """A service that does what prompts say."""
    backend = Scripted()
    with live(ServeConfig(log="off"), lambda config: backend) as running:
        yield running, backend


@pytest.fixture
def scripted(stage: tuple[Live, Scripted]) -> tuple[str, Scripted]:
    running, backend = stage
    backend.works.clear()
    return running.url, backend


def scene() -> Image.Image:
    image = Image.new("RGB", (64, 64), "blue")
    ImageDraw.Draw(image).ellipse((8, 8, 40, 40), fill="red")
    return image


def png(image: Image.Image) -> tuple[str, bytes, str]:
    return "image.png", encoded(image, "png"), "image/png"


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def pixels(image: Image.Image) -> Any:
    return np.asarray(image.convert("RGB"))


def text_to_image(url: str, headers: dict[str, str] | None = None, **body: Any) -> requests.Response:
    return requests.post(
        f"{url}/v1/generation/embedded/text-to-image",
        headers=JSON if headers is None else headers,
        json={"text_prompts": [{"text": "a red circle"}], "steps": 3} | body,
    )


def test_v1_text_to_image(service_app: Live) -> None:
    response = text_to_image(
        service_app.url,
        text_prompts=[{"text": "a red circle", "weight": 1}, {"text": "blue", "weight": -1}],
        cfg_scale=4,
        height=64,
        width=48,
        samples=2,
        seed=7,
        sampler="K_EULER_ANCESTRAL",
        clip_guidance_preset="FAST_BLUE",
    )
    assert response.status_code == 200, response.text
    artifacts = response.json()["artifacts"]
    assert [a["seed"] for a in artifacts] == [7, 8]
    assert {a["finishReason"] for a in artifacts} == {"SUCCESS"}
    wanted = made(
        prompt="a red circle",
        negative_prompt="blue",
        guidance_scale=4.0,
        width=48,
        height=64,
        steps=3,
        sampler="euler_ancestral",
        seed=8,
    )
    assert np.array_equal(pixels(opened(base64.b64decode(artifacts[1]["base64"]))), wanted)


def test_v1_answers_with_the_image_itself(service_app: Live) -> None:
    response = text_to_image(service_app.url, {"Accept": "image/png"}, seed=0)
    assert response.headers["content-type"] == "image/png"
    assert response.headers["finish-reason"] == "SUCCESS"
    seed = int(response.headers["seed"])
    assert 0 < seed < 2**32
    again = text_to_image(service_app.url, seed=seed).json()["artifacts"][0]
    assert base64.b64decode(again["base64"]) == response.content


def test_v1_image_to_image(service_app: Live) -> None:
    def ask(**data: Any) -> Any:
        response = requests.post(
            f"{service_app.url}/v1/generation/embedded/image-to-image",
            headers=JSON,
            files={"init_image": png(scene())},
            data={"text_prompts[0][text]": "a star", "text_prompts[0][weight]": 1, "steps": 4, "seed": 5}
            | data,
        )
        assert response.status_code == 200, response.text
        return pixels(opened(base64.b64decode(response.json()["artifacts"][0]["base64"])))

    wanted = made(prompt="a star", init_image=scene(), strength=0.65, steps=4, seed=5, width=64, height=64)
    assert np.array_equal(ask(image_strength=0.35, init_image_mode="IMAGE_STRENGTH"), wanted)
    assert np.array_equal(ask(step_schedule_start=0.65, init_image_mode="STEP_SCHEDULE"), wanted)
    assert np.array_equal(ask(), wanted)


@pytest.mark.parametrize("source", ["MASK_IMAGE_WHITE", "MASK_IMAGE_BLACK", "INIT_IMAGE_ALPHA"])
def test_v1_masking_repaints_only_what_it_should(service_app: Live, source: str) -> None:
    image, mask = scene(), Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    files = {"init_image": png(image), "mask_image": png(mask)}
    if source == "INIT_IMAGE_ALPHA":
        image.putalpha(mask.point(lambda level: 255 - level))
        files = {"init_image": png(image)}
    response = requests.post(
        f"{service_app.url}/v1/generation/embedded/image-to-image/masking",
        headers={"Accept": "image/png"},
        files=files,
        data={"mask_source": source, "text_prompts[0][text]": "a green square", "steps": 3, "seed": 5},
    )
    assert response.status_code == 200, response.text
    got, kept = pixels(opened(response.content)), slice(0, 32)
    if source == "MASK_IMAGE_BLACK":
        kept = slice(32, 64)
    assert np.array_equal(got[:, kept], pixels(scene())[:, kept])
    assert not np.array_equal(got, pixels(scene()))


@pytest.mark.parametrize("kind", ["core", "sd3", "ultra"])
@pytest.mark.parametrize(("format", "name"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_v2_generate(scripted: tuple[str, Scripted], kind: str, format: str, name: str) -> None:
    response = requests.post(
        f"{scripted[0]}/v2beta/stable-image/generate/{kind}",
        headers={"authorization": "Bearer sk-any", "accept": "image/*"},
        files={"none": ""},
        data={"prompt": "a red circle", "output_format": format, "seed": 7, "steps": 2},
    )
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == f"image/{format}"
    assert (response.headers["seed"], response.headers["finish-reason"]) == ("7", "SUCCESS")
    assert opened(response.content).format == name


def test_v2_json_and_image_to_image(service_app: Live) -> None:
    response = requests.post(
        f"{service_app.url}/v2beta/stable-image/generate/sd3",
        headers={"accept": "application/json"},
        files={"image": png(scene())},
        data={"prompt": "a star", "mode": "image-to-image", "strength": 0.5, "seed": 5, "steps": 4},
    )
    body = response.json()
    assert (body["seed"], body["finish_reason"]) == (5, "SUCCESS")
    wanted = made(prompt="a star", init_image=scene(), strength=0.5, steps=4, seed=5, width=64, height=64)
    assert np.array_equal(pixels(opened(base64.b64decode(body["image"]))), wanted)


def test_v2_inpaint(service_app: Live) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (40, 0, 64, 64))
    response = requests.post(
        f"{service_app.url}/v2beta/stable-image/edit/inpaint",
        headers={"accept": "image/*"},
        files={"image": png(scene()), "mask": png(mask)},
        data={"prompt": "a star", "grow_mask": 4, "seed": 5, "steps": 3},
    )
    assert response.status_code == 200, response.text
    got = pixels(opened(response.content))
    assert np.array_equal(got[:, :36], pixels(scene())[:, :36])
    assert not np.array_equal(got[:, 36:40], pixels(scene())[:, 36:40])


@pytest.mark.parametrize(
    ("ratio", "size"),
    [("1:1", (512, 512)), ("16:9", (704, 384)), ("9:21", (320, 768)), ("4:5", (448, 576))],
)
def test_v2_aspect_ratios_keep_the_model_s_area(
    scripted: tuple[str, Scripted], ratio: str, size: tuple[int, int]
) -> None:
    url, backend = scripted
    response = requests.post(
        f"{url}/v2beta/stable-image/generate/core",
        files={"none": ""},
        data={"prompt": "x", "aspect_ratio": ratio},
    )
    assert opened(response.content).size == size
    assert (backend.works[0].request.width, backend.works[0].request.height) == size


def test_lists_and_account(service_app: Live) -> None:
    engines = requests.get(f"{service_app.url}/v1/engines/list").json()
    assert engines[0]["id"] == "embedded"
    assert set(engines[0]) == {"id", "name", "description", "type"}
    assert requests.get(f"{service_app.url}/v1/user/balance").json()["credits"] > 0
    assert requests.get(f"{service_app.url}/v1/user/account").json()["organizations"]


@pytest.mark.parametrize(
    ("prompts", "wanted"),
    [
        ([("a fox", None)], ("a fox", None)),
        ([("a fox", 1), ("blurry", -1)], ("a fox", "blurry")),
        ([("a fox", 0.5), ("snow", 1)], ("(a fox:0.5), snow", None)),
        ([("a (red) fox", 2)], (r"(a \(red\) fox:2)", None)),
        ([("a (red:1.2) fox", 1)], ("a (red:1.2) fox", None)),
        ([("a fox", 1), ("text", -0.5), ("blurry", -1)], ("a fox", "(text:0.5), blurry")),
        ([("a fox", 1), ("nothing", 0)], ("a fox", None)),
    ],
)
def test_weighted_prompts(prompts: list[tuple[str, float | None]], wanted: tuple[str, str | None]) -> None:
    assert prompts_of([TextPrompt(text=text, weight=weight) for text, weight in prompts]) == wanted


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        ({"samples": 11}, "bad_request", "samples"),
        ({"cfg_scale": 36}, "bad_request", "cfg_scale"),
        ({"width": 50}, "bad_request", "width"),
        ({"sampler": "K_NONSENSE"}, "bad_request", "sampler"),
        ({"steps": "30"}, "bad_request", "steps"),
        ({"style_preset": "anime"}, "bad_request", "style_preset"),
        ({"extras": {"x": 1}}, "bad_request", "extras"),
        ({"text_prompts": []}, "bad_request", "text_prompts"),
        ({"text_prompts": [{"text": "x", "weight": -1}]}, "bad_request", "text_prompts"),
        ({"step": 30}, "bad_request", "step"),
        ({"seed": -1}, "bad_request", "seed"),
    ],
)
def test_bad_v1_values(service_app: Live, change: dict[str, Any], name: str, said: str) -> None:
    response = text_to_image(service_app.url, **change)
    assert response.status_code == 400
    error = response.json()
    assert set(error) == {"id", "name", "message", "errors"}
    assert error["name"] == name
    assert said in error["message"]
    assert error["id"] == response.headers["x-request-id"]


def test_several_samples_need_json(service_app: Live) -> None:
    response = text_to_image(service_app.url, {"Accept": "image/png"}, samples=2)
    assert (response.status_code, response.json()["name"]) == (400, "invalid_samples")


def test_an_unknown_engine(service_app: Live) -> None:
    response = requests.post(
        f"{service_app.url}/v1/generation/stable-diffusion-v1-6/text-to-image",
        json={"text_prompts": [{"text": "x"}]},
    )
    assert (response.status_code, response.json()["name"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("files", "data", "said"),
    [
        ({}, {"mode": "image-to-image", "strength": 0.5}, "image"),
        ({"image": png(scene())}, {}, "strength"),
        ({"image": png(scene())}, {"strength": 0}, "strength"),
        ({"image": png(scene())}, {"mode": "text-to-image"}, "image"),
        ({"image": png(scene())}, {"strength": 0.5, "aspect_ratio": "1:1"}, "aspect_ratio"),
        ({"image": ("x.svg", b"<svg/>", "image/svg+xml")}, {"strength": 0.5}, "image"),
        ({"picture": png(scene())}, {}, "picture"),
        ({"none": ""}, {"output_format": "gif"}, "output_format"),
        ({"none": ""}, {"aspect_ratio": "2:1"}, "aspect_ratio"),
        ({"none": ""}, {"seed": 4294967295}, "seed"),
        ({"none": ""}, {"style_preset": "anime"}, "style_preset"),
        ({"none": ""}, {"prompt": ""}, "prompt"),
        ({"none": ""}, {"image": "https://example.com/x.png"}, "image"),
    ],
)
def test_bad_v2_values(service_app: Live, files: dict[str, Any], data: dict[str, Any], said: str) -> None:
    response = requests.post(
        f"{service_app.url}/v2beta/stable-image/generate/sd3",
        files=files or {"none": ""},
        data={"prompt": "x", "steps": 2} | data,
    )
    assert response.status_code == 400
    assert any(said in error for error in response.json()["errors"])


@pytest.mark.parametrize(
    ("data", "masked", "said"),
    [
        ({}, True, "mask_source"),
        ({"mask_source": "MASK_IMAGE_WHITE"}, False, "mask_image"),
        ({"mask_source": "MASK_IMAGE_WHITE"}, True, "mask_image"),
        ({"mask_source": "INIT_IMAGE_ALPHA"}, False, "init_image"),
    ],
)
def test_bad_masks(service_app: Live, data: dict[str, str], masked: bool, said: str) -> None:
    files = {"init_image": png(scene())} | ({"mask_image": png(Image.new("L", (64, 64)))} if masked else {})
    response = requests.post(
        f"{service_app.url}/v1/generation/embedded/image-to-image/masking",
        files=files,
        data={"text_prompts[0][text]": "x"} | data,
    )
    assert response.status_code == 400
    assert said in response.json()["message"]


def test_a_body_that_is_no_form(service_app: Live) -> None:
    response = requests.post(f"{service_app.url}/v2beta/stable-image/generate/core", json={"prompt": "x"})
    assert response.status_code == 415
    assert response.json()["name"] == "unsupported_media_type"


def test_a_blocked_prompt_is_refused_in_each_version_s_way(tmp_path: Path) -> None:
    (tmp_path / "blocked.txt").write_text("forbidden\n")
    config = ServeConfig(guardrails=Guardrails(blocklist=str(tmp_path / "blocked.txt")), log="off")
    with live(config, Scripted) as running:
        v1 = requests.post(
            f"{running.url}/v1/generation/scripted/text-to-image",
            json={"text_prompts": [{"text": "forbidden"}]},
        )
        assert (v1.status_code, v1.json()["name"]) == (400, "invalid_prompts")
        v2 = requests.post(
            f"{running.url}/v2beta/stable-image/generate/core",
            files={"none": ""},
            data={"prompt": "forbidden"},
        )
        assert (v2.status_code, v2.json()["name"]) == (403, "content_moderation")


def test_failures_say_nothing_internal(scripted: tuple[str, Scripted]) -> None:
    url, _ = scripted
    for prompt, status in (("fail", 500), ("refuse 429", 429), ("refuse 503", 503)):
        response = requests.post(
            f"{url}/v1/generation/scripted/text-to-image", json={"text_prompts": [{"text": prompt}]}
        )
        assert response.status_code == status
        assert "secret" not in response.text
        assert status == 500 or response.headers["retry-after"] == "1"


def test_all_dialects_make_the_same_image(service_app: Live) -> None:
    """The same request, by each client's own names."""
    url, pictures = service_app.url, []
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any") as client:
        knobs = {
            "seed": 9,
            "num_inference_steps": 4,
            "guidance_scale": 4,
            "negative_prompt": "blue",
            "sampler": "ddim",
            "scheduler": "karras",
        }
        answer = client.images.generate(prompt="a red star", size="64x48", extra_body=knobs)
        assert answer.data
        pictures.append(base64.b64decode(answer.data[0].b64_json or ""))
    api = webuiapi.WebUIApi(baseurl=f"{url}/sdapi/v1")
    result = api.txt2img(
        prompt="a red star",
        negative_prompt="blue",
        seed=9,
        steps=4,
        cfg_scale=4,
        width=64,
        height=48,
        eta=0,
        sampler_name="DDIM",
        scheduler="Karras",
    )
    pictures.append(base64.b64decode(result.json["images"][0]))
    first, second = (pixels(opened(data)) for data in pictures)
    assert np.array_equal(first, second)
    common = {"seed": 9, "steps": 4, "cfg_scale": 4}
    v1 = text_to_image(
        url,
        {"Accept": "image/png"},
        text_prompts=[{"text": "a red star"}, {"text": "blue", "weight": -1}],
        **common,
    )
    v2 = requests.post(
        f"{url}/v2beta/stable-image/generate/core",
        files={"none": ""},
        data={"prompt": "a red star", "negative_prompt": "blue"} | common,
    )
    assert v1.content == v2.content
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any") as client:
        answer = client.images.generate(
            prompt="a red star",
            extra_body={"seed": 9, "num_inference_steps": 4, "guidance_scale": 4, "negative_prompt": "blue"},
        )
        assert answer.data
        assert base64.b64decode(answer.data[0].b64_json or "") == v1.content


def test_an_upscaler_gets_the_picture_as_it_is() -> None:
    """Whatever size a client's API would have it made at."""
    backend = Scripted(task="upscale", factor=4)
    with live(ServeConfig(log="off"), lambda config: backend) as running:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any") as client:
            answer = client.images.create_variation(image=png(scene()))
            assert answer.size == "256x256"
        webuiapi.WebUIApi(baseurl=f"{running.url}/sdapi/v1").img2img(images=[scene()], prompt="x")
        for path, name, data in (
            ("v1/generation/scripted/image-to-image", "init_image", {"text_prompts[0][text]": "x"}),
            ("v2beta/stable-image/generate/sd3", "image", {"prompt": "x", "strength": 1}),
        ):
            response = requests.post(f"{running.url}/{path}", files={name: png(scene())}, data=data)
            assert response.status_code == 200, response.text
    for work in backend.works:
        assert work.request.init_image is not None
        assert np.array_equal(pixels(work.request.init_image), pixels(scene()))
    assert len(backend.works) == 4
