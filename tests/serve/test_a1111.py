"""The AUTOMATIC1111 dialect with `webuiapi` over HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import webuiapi
from PIL import Image, ImageDraw

from diffray.model.encoding import read_provenance
from diffray.model.infotext import parse_infotext
from diffray.serve import keys
from diffray.serve.config import Access, Limits, ServeConfig

from .live import Live, live
from .reference import made
from .scripted import Scripted, encoded

SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 3, "cfg_scale": 3.0}
ENGINE: dict[str, Any] = {
    "width": 64,
    "height": 64,
    "steps": 3,
    "guidance_scale": 3.0,
    "sampler": "Euler a",
    "schedule": "automatic",
}
"""SMALL and what the client adds by default, in the engine's names."""


def client_of(running: Live, **options: Any) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=f"{running.url}/sdapi/v1", **options)


@pytest.fixture
def api(service_app: Live) -> webuiapi.WebUIApi:
    """The client of a service on the embedded model."""
    return client_of(service_app)


@pytest.fixture(scope="module")
def stage() -> Iterator[tuple[Live, Scripted]]:
    """A service that does what prompts say."""
    backend = Scripted()
    with live(ServeConfig(log="off"), lambda config: backend) as running:
        yield running, backend


@pytest.fixture
def scripted(stage: tuple[Live, Scripted]) -> tuple[webuiapi.WebUIApi, Scripted]:
    running, backend = stage
    backend.works.clear()
    return client_of(running), backend


def scene() -> Image.Image:
    image = Image.new("RGB", (64, 64), "blue")
    ImageDraw.Draw(image).ellipse((8, 8, 40, 40), fill="red")
    return image


def hole(box: tuple[int, int, int, int], size: tuple[int, int] = (64, 64)) -> Image.Image:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


def pixels(image: Image.Image) -> Any:
    return np.asarray(image.convert("RGB"), dtype=int)


@pytest.mark.slow
def test_txt2img_is_the_engine_s_image(api: webuiapi.WebUIApi) -> None:
    result = api.txt2img(
        prompt="a red circle", negative_prompt="blue", seed=5, batch_size=2, n_iter=2, **SMALL
    )
    common: dict[str, Any] = {"prompt": "a red circle", "negative_prompt": "blue"} | ENGINE
    for got, seed in zip(result.images, (5, 6, 7, 8), strict=True):
        assert np.array_equal(np.array(got), made(**common, seed=seed))
    assert result.info["all_seeds"] == [5, 6, 7, 8]
    assert result.info["seed"] == 5
    assert result.info["sampler_name"] == "Euler a"
    assert result.info["sd_model_name"] == "embedded"
    assert result.parameters["batch_size"] == 2


def test_the_infotext_is_in_the_answer_and_in_the_file(api: webuiapi.WebUIApi) -> None:
    result = api.txt2img(prompt="a red circle", seed=5, sampler_name="DPM++ 2M", scheduler="Karras", **SMALL)
    text = result.image.info["parameters"]
    assert result.info["infotexts"] == [text]
    found = parse_infotext(text)
    assert found["Sampler"] == "DPM++ 2M"
    assert found["Schedule type"] == "Karras"
    assert found["Seed"] == "5"
    answer = api.png_info(result.image)
    assert answer.info == text
    assert answer.json["parameters"]["Size-1"] == "64"
    assert answer.json["parameters"]["Prompt"] == "a red circle"


def test_a_picture_can_be_made_again_from_its_info(api: webuiapi.WebUIApi) -> None:
    first = api.txt2img(prompt="a star", **SMALL)
    again = api.txt2img(prompt="a star", seed=first.info["seed"], **SMALL)
    other = api.txt2img(prompt="a star", **SMALL)
    assert np.array_equal(pixels(first.image), pixels(again.image))
    assert not np.array_equal(pixels(first.image), pixels(other.image))


def test_hires_fix(api: webuiapi.WebUIApi) -> None:
    result = api.txt2img(
        prompt="a star",
        seed=1,
        enable_hr=True,
        hr_scale=1.5,
        hr_upscaler=webuiapi.HiResUpscaler.Latent,
        hr_second_pass_steps=4,
        denoising_strength=0.5,
        **SMALL,
    )
    assert result.image.size == (96, 96)
    assert parse_infotext(result.info["infotexts"][0])["Hires upscale"] == "1.5"
    resized = api.txt2img(prompt="a star", seed=1, enable_hr=True, hr_resize_x=96, hr_resize_y=96, **SMALL)
    assert resized.image.size == (96, 96)


@pytest.mark.slow
def test_what_an_infotext_says_can_be_asked_again(api: webuiapi.WebUIApi) -> None:
    """Every label that our infotexts have is one that the API takes."""
    for upscaler in ("Latent", "Latent (nearest-exact)", "Lanczos"):
        first = api.txt2img(
            prompt="a star",
            seed=3,
            enable_hr=True,
            hr_scale=1.5,
            hr_upscaler=upscaler,
            sampler_name="UniPC",
            scheduler="Beta",
            denoising_strength=0.6,
            **SMALL,
        )
        said = api.png_info(first.image).json["parameters"]
        again = api.txt2img(
            prompt=said["Prompt"],
            seed=int(said["Seed"]),
            steps=int(said["Steps"]),
            cfg_scale=float(said["CFG scale"]),
            width=int(said["Size-1"]),
            height=int(said["Size-2"]),
            sampler_name=said["Sampler"],
            scheduler=said["Schedule type"],
            enable_hr=True,
            hr_scale=float(said["Hires upscale"]),
            hr_upscaler=said["Hires upscaler"],
            denoising_strength=float(said["Denoising strength"]),
        )
        assert np.array_equal(pixels(first.image), pixels(again.image))


def test_the_asynchronous_client(api: webuiapi.WebUIApi) -> None:
    async def both() -> list[Any]:
        return await asyncio.gather(
            *(api.txt2img(prompt="a star", seed=seed, use_async=True, **SMALL) for seed in (1, 2))
        )

    first, second = asyncio.run(both())
    assert np.array_equal(pixels(first.image), pixels(api.txt2img(prompt="a star", seed=1, **SMALL).image))
    assert not np.array_equal(pixels(first.image), pixels(second.image))


def test_img2img_is_the_engine_s_image(api: webuiapi.WebUIApi) -> None:
    result = api.img2img(images=[scene()], prompt="a star", seed=2, denoising_strength=0.7, **SMALL)
    wanted = made(prompt="a star", init_image=scene(), strength=0.7, seed=2, **ENGINE)
    assert np.array_equal(np.array(result.image), wanted)


def test_a_batch_of_images(api: webuiapi.WebUIApi) -> None:
    other = scene().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    both = api.img2img(images=[scene(), other], batch_size=2, seed=2, denoising_strength=0.4, **SMALL)
    second = api.img2img(images=[other], seed=3, denoising_strength=0.4, **SMALL)
    assert np.array_equal(pixels(both.images[1]), pixels(second.image))


@pytest.mark.parametrize("only_masked", [False, True])
@pytest.mark.parametrize("fill", [0, 1])
def test_inpainting_keeps_what_is_not_masked(api: webuiapi.WebUIApi, only_masked: bool, fill: int) -> None:
    result = api.img2img(
        images=[scene()],
        mask_image=hole((36, 20, 63, 50)),
        mask_blur=0,
        inpainting_fill=fill,
        inpaint_full_res=only_masked,
        inpaint_full_res_padding=4,
        prompt="a green square",
        seed=2,
        denoising_strength=0.9,
        **SMALL,
    )
    kept = np.asarray(hole((36, 20, 63, 50))) == 0
    assert np.array_equal(pixels(result.image)[kept], pixels(scene())[kept])
    assert np.abs(pixels(result.image) - pixels(scene()))[~kept].mean() > 5
    assert parse_infotext(result.image.info["parameters"])["Denoising strength"] == "0.9"


def test_only_masked_paints_into_a_picture_of_another_size(api: webuiapi.WebUIApi) -> None:
    large = scene().resize((200, 120))
    mask = hole((120, 30, 170, 90), large.size)
    result = api.img2img(
        images=[large], mask_image=mask, mask_blur=0, inpaint_full_res=True, prompt="a star", seed=2, **SMALL
    )
    assert result.image.size == (200, 120)
    assert np.array_equal(pixels(result.image)[:, :110], pixels(large)[:, :110])


def test_the_mask_can_be_inverted(api: webuiapi.WebUIApi) -> None:
    common: dict[str, Any] = {
        "images": [scene()],
        "mask_blur": 0,
        "seed": 2,
        "inpaint_full_res": False,
    } | SMALL
    plain = api.img2img(mask_image=hole((0, 0, 31, 63)), **common)
    inverted = api.img2img(mask_image=hole((32, 0, 63, 63)), inpainting_mask_invert=1, **common)
    assert np.array_equal(pixels(plain.image), pixels(inverted.image))


def test_a_blurred_mask_has_a_soft_edge(scripted: tuple[webuiapi.WebUIApi, Scripted]) -> None:
    api, backend = scripted
    white = Image.new("RGB", (512, 512), "white")
    result = api.img2img(
        images=[white],
        mask_image=hole((256, 0, 511, 511), (512, 512)),
        mask_blur=8,
        inpainting_fill=1,
        inpaint_full_res=False,
        seed=0,
        prompt="x",
    )
    row = pixels(result.image)[256, :, 0]
    assert row[200] == 255
    assert row[300] == 10
    assert len(set(row[230:262])) > 8
    request = backend.works[0].request
    assert request.mask is not None
    assert request.mask.getpixel((300, 256)) == 255


@pytest.mark.parametrize(
    ("mode", "left", "middle"),
    [(0, (255, 0, 0), (0, 128, 0)), (1, (0, 128, 0), (0, 128, 0)), (2, (255, 0, 0), (0, 128, 0))],
)
def test_resize_modes(
    scripted: tuple[webuiapi.WebUIApi, Scripted], mode: int, left: tuple[int, ...], middle: tuple[int, ...]
) -> None:
    api, backend = scripted
    wide = Image.new("RGB", (1024, 512), "green")
    wide.paste("red", (0, 0, 200, 512))
    api.img2img(images=[wide], resize_mode=mode, prompt="x", width=512, height=512)
    image = backend.works[0].request.init_image
    assert image is not None
    assert image.size == (512, 512)
    assert image.getpixel((10, 256)) == left
    assert image.getpixel((300, 256)) == middle
    assert image.getpixel((10, 5)) == left


def test_the_model_is_each_client_s_own(stage: tuple[Live, Scripted]) -> None:
    running, backend = stage
    api = client_of(running)
    assert api.util_get_model_names()[0].startswith("other [0ddba11")
    api.util_set_model("other")
    try:
        assert api.util_get_current_model().startswith("other [")
        result = api.txt2img(prompt="x", **SMALL)
        assert result.info["sd_model_name"] == "other"
        once = api.txt2img(prompt="x", override_settings={"sd_model_checkpoint": "scripted"}, **SMALL)
        assert once.info["sd_model_name"] == "scripted"
        assert api.util_get_current_model().startswith("other [")
        assert [work.model for work in backend.works[-2:]] == ["other", "scripted"]
    finally:
        api.set_options({"sd_model_checkpoint": "scripted"})


def test_options_round_trip(scripted: tuple[webuiapi.WebUIApi, Scripted]) -> None:
    api, backend = scripted
    options = api.get_options()
    assert options["sd_model_checkpoint"].startswith("scripted [")
    api.set_options(options)
    api.set_options({"CLIP_stop_at_last_layers": 2, "samples_format": "jpg"})
    try:
        result = api.txt2img(prompt="x", **SMALL)
        assert backend.works[0].request.clip_skip == 1
        assert result.info["clip_skip"] == 2
        assert result.image.format == "JPEG"
    finally:
        api.set_options({"CLIP_stop_at_last_layers": 1, "samples_format": "png"})


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"sd_model_checkpoint": "nothing"}, "sd_model_checkpoint"),
        ({"CLIP_stop_at_last_layers": 0}, "CLIP_stop_at_last_layers"),
        ({"sd_vae": "other.safetensors"}, "sd_vae"),
        ({"token_merging_ratio": 0.5}, "token_merging_ratio"),
        ({"samples_format": "gif"}, "samples_format"),
    ],
)
def test_options_without_effect_are_refused(
    stage: tuple[Live, Scripted], options: dict[str, Any], field: str
) -> None:
    running, _ = stage
    for answer in (
        requests.post(f"{running.url}/sdapi/v1/options", json=options),
        requests.post(f"{running.url}/sdapi/v1/txt2img", json={"prompt": "x", "override_settings": options}),
    ):
        assert answer.status_code == 422
        assert answer.json()["field"] == field


def test_progress_with_preview_and_interruption(scripted: tuple[webuiapi.WebUIApi, Scripted]) -> None:
    api, backend = scripted
    cancelled = backend.cancelled
    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.append(api.txt2img(prompt="wait", steps=10, seed=3, batch_size=2))
    )
    thread.start()
    watcher = webuiapi.WebUIApi(baseurl=api.baseurl)
    seen = wait_for(lambda: (p := watcher.get_progress())["state"]["sampling_step"] == 5 and p)
    assert seen["progress"] == pytest.approx(0.5)
    assert seen["state"]["job_count"] == 2
    assert seen["state"]["sampling_steps"] == 10
    assert seen["eta_relative"] > 0
    preview = Image.open(io.BytesIO(webuiapi.webuiapi.base64.b64decode(seen["current_image"])))
    assert preview.size == (64, 64)
    skipped = requests.get(f"{watcher.baseurl}/progress", params={"skip_current_image": True}).json()
    assert skipped["current_image"] is None
    watcher.interrupt()
    thread.join(10)
    assert [image.size for image in results[0].images] == [(512, 512)] * 2
    assert results[0].info["all_seeds"] == [3, 4]
    assert wait_for(lambda: backend.cancelled == cancelled + 2)
    assert watcher.get_progress()["progress"] == 0
    watcher.util_wait_for_ready()


def wait_for(condition: Any, seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


def test_an_interruption_before_anything_can_be_seen(scripted: tuple[webuiapi.WebUIApi, Scripted]) -> None:
    api, _ = scripted
    answers: list[Any] = []
    body = {"prompt": "wait", "steps": 2}
    thread = threading.Thread(
        target=lambda: answers.append(requests.post(f"{api.baseurl}/txt2img", json=body))
    )
    thread.start()
    wait_for(lambda: api.get_progress()["state"]["sampling_step"] == 1)
    api.skip()
    thread.join(10)
    assert (answers[0].status_code, answers[0].json()["error"]) == (409, "interrupted")


def test_interrupting_nothing(api: webuiapi.WebUIApi) -> None:
    assert api.interrupt() == {}
    assert api.skip() == {}
    assert api.get_progress()["state"]["job_count"] == 0


def test_lists(api: webuiapi.WebUIApi) -> None:
    samplers, schedulers = api.util_get_sampler_names(), api.util_get_scheduler_names()
    assert {"Euler a", "DPM++ 2M", "DDIM", "UniPC"} <= set(samplers)
    assert {"automatic", "karras", "sgm_uniform"} <= set(schedulers)
    assert api.get_loras() == []
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    assert [u["name"] for u in api.get_upscalers()] == ["None", "Lanczos", "Nearest"]
    assert {"name": "Latent"} in api.get_latent_upscale_modes()
    assert api.get_sd_models()[0]["model_name"] == "embedded"
    for empty in (api.get_sd_vae, api.get_hypernetworks, api.get_face_restorers, api.get_prompt_styles):
        assert empty() == []
    assert api.get_realesrgan_models() == []
    assert api.get_cmd_flags()["api"] is True
    assert set(api.get_memory()) == {"ram", "cuda"}
    assert api.refresh_checkpoints() is None


@pytest.mark.slow
def test_every_listed_sampler_and_scheduler_makes_a_picture(api: webuiapi.WebUIApi) -> None:
    chosen: list[dict[str, str]] = [{"sampler_name": name} for name in api.util_get_sampler_names()]
    chosen += [{"scheduler": name} for name in api.util_get_scheduler_names()]
    with ThreadPoolExecutor(8) as pool:
        made = pool.map(lambda names: api.txt2img(**{"prompt": "x"} | SMALL | {"width": 16} | names), chosen)
        assert {result.image.size for result in made} == {(16, 64)}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"cfg_scale": 200.0}, "cfg_scale"),
        ({"steps": 0}, "steps"),
        ({"width": 63}, "width"),
        ({"sampler_name": "DPM adaptive"}, "sampler_name"),
        ({"scheduler": "nonsense"}, "scheduler"),
        ({"seed": -5}, "seed"),
        ({"subseed": 3, "subseed_strength": 0.5}, "subseed_strength"),
        ({"seed_resize_from_w": 512}, "seed_resize_from_w"),
        ({"restore_faces": True}, "restore_faces"),
        ({"tiling": True}, "tiling"),
        ({"styles": ["cinematic"]}, "styles"),
        ({"s_churn": 1}, "s_churn"),
        ({"script_name": "x/y/z plot"}, "script_name"),
        # The client adds to a default argument, so it needs a dictionary that is thrown away.
        (
            {"controlnet_units": [webuiapi.ControlNetUnit(module="canny")], "alwayson_scripts": {}},
            "alwayson_scripts",
        ),
        ({"prompt": "a fox <lora:detail:0.8>"}, "prompt"),
        ({"enable_hr": True, "hr_scale": 9}, "hr_scale"),
        ({"enable_hr": True, "hr_upscaler": webuiapi.HiResUpscaler.ESRGAN_4x}, "hr_upscaler"),
        ({"enable_hr": True, "hr_resize_x": 128, "hr_resize_y": 256}, "hr_resize_x"),
        ({"enable_hr": True, "hr_prompt": "another"}, "hr_prompt"),
        ({"enable_hr": True, "denoising_strength": 1.5}, "denoising_strength"),
        ({"batch_size": 0}, "batch_size"),
        ({"override_settings": {"eta_noise_seed_delta": 31337}}, "eta_noise_seed_delta"),
    ],
)
def test_bad_values_and_missing_features_are_named(
    api: webuiapi.WebUIApi, change: dict[str, Any], field: str
) -> None:
    with pytest.raises(RuntimeError) as caught:
        api.txt2img(**{"prompt": "a star"} | SMALL | change)
    status, text = caught.value.args
    assert status == 422
    assert json.loads(text)["field"] == field
    assert json.loads(text).keys() == {"error", "detail", "body", "errors", "field"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"images": [scene(), scene()], "batch_size": 3}, "init_images"),
        ({"denoising_strength": 0.0}, "denoising_strength"),
        ({"resize_mode": 3}, "resize_mode"),
        ({"mask_image": hole((0, 0, 9, 9)), "inpainting_fill": 3}, "inpainting_fill"),
        ({"mask_image": hole((0, 0, 9, 9)), "inpainting_fill": 2}, "inpainting_fill"),
        ({"mask_image": Image.new("L", (64, 64))}, "mask"),
        ({"mask_image": hole((0, 0, 9, 9), (32, 32))}, "mask"),
        ({"width": 100_000}, "width"),
        ({"width": 8192, "height": 8192}, "width"),
        ({"initial_noise_multiplier": 1.1}, "initial_noise_multiplier"),
    ],
)
def test_bad_sources(api: webuiapi.WebUIApi, change: dict[str, Any], field: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        api.img2img(**{"images": [scene()], "prompt": "a star"} | SMALL | change)
    assert caught.value.args[0] == 422
    assert json.loads(caught.value.args[1])["field"] == field


@pytest.mark.parametrize(
    "text", ["", "http://127.0.0.1/x.png", "file:///etc/passwd", "bm90IGEgcGljdHVyZQ==", "%%%"]
)
def test_what_is_no_picture(service_app: Live, text: str) -> None:
    for path, body in (("img2img", {"init_images": [text]}), ("png-info", {"image": text})):
        answer = requests.post(f"{service_app.url}/sdapi/v1/{path}", json=body)
        assert answer.status_code == 422
        assert answer.json()["field"].split(".")[0] in ("init_images", "image")


def test_keys_that_others_send_are_ignored(service_app: Live) -> None:
    body = {
        "prompt": "x",
        "save_images": True,
        "do_not_save_grid": False,
        "comments": {},
        "hr_prompt": "y",
    } | SMALL
    answer = requests.post(f"{service_app.url}/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200
    quiet = requests.post(f"{service_app.url}/sdapi/v1/txt2img", json=body | {"send_images": False})
    assert quiet.json()["images"] == []
    assert json.loads(quiet.json()["info"])["infotexts"]


def test_extras_resize(api: webuiapi.WebUIApi) -> None:
    doubled = api.extra_single_image(scene(), upscaler_1=webuiapi.Upscaler.Lanczos, upscaling_resize=2)
    assert doubled.image.size == (128, 128)
    exact = api.extra_single_image(
        scene(), resize_mode=1, upscaling_resize_w=100, upscaling_resize_h=50, upscaler_1="Nearest"
    )
    assert exact.image.size == (100, 50)
    same = api.extra_batch_images([scene(), scene()], upscaler_1="None")
    assert [np.array_equal(pixels(image), pixels(scene())) for image in same.images] == [True, True]
    for change in ({"upscaler_1": "SwinIR 4x"}, {"gfpgan_visibility": 1}, {"upscaling_resize": 8}):
        picture = scene().resize((2048, 2048)) if "upscaling_resize" in change else scene()
        with pytest.raises(RuntimeError, match=next(iter(change))):
            api.extra_single_image(picture, **{"upscaler_1": "Lanczos"} | change)


def test_what_there_is_not_is_said_in_the_same_form(api: webuiapi.WebUIApi) -> None:
    with pytest.raises(RuntimeError, match="404") as caught:
        api.interrogate(scene())
    assert "not_found" in str(caught.value)


def sent(image: Image.Image) -> str:
    return base64.b64encode(encoded(image, "png")).decode()


def test_extras_are_admitted_and_charged_as_images() -> None:
    """64 x 64 doubled is 0.016 megapixels, of one step each."""
    single: dict[str, Any] = {"image": sent(scene()), "upscaler_1": "Lanczos"}
    files = [{"data": sent(scene())}] * 3
    batch: dict[str, Any] = {"imageList": files, "upscaler_1": "Lanczos"}
    limits = Limits(images=3, cost=0.05, cost_per_key="2/year", source_pixels=5 * 128 * 64)
    with live(ServeConfig(log="off", limits=limits), Scripted) as running:
        url = f"{running.url}/sdapi/v1/extra"

        def refused(path: str, body: dict[str, Any]) -> str:
            answer = requests.post(f"{url}-{path}", json=body)
            return f"{answer.status_code} {answer.json()['error']}: {answer.json()['detail']}"

        many = refused("batch-images", batch | {"imageList": files + files[:1]})
        assert many == "422 too_many_images: got 4 images, allowed are 3 in a request"
        large = refused("batch-images", batch)  # two of 128 x 128 fit
        assert large.startswith(
            "422 invalid_value: upscaling_resize: makes 128x128, allowed are 40960 pixels"
        )
        assert "8192 are left" in large
        wide = refused(
            "batch-images", batch | {"imageList": [{"data": sent(Image.new("L", (160, 128)))}] * 3}
        )
        assert wide.startswith("422 invalid_value: imageList: got 160x128, allowed are 40960 pixels together")
        small = {"upscaling_resize": 1.5}
        assert requests.post(f"{url}-batch-images", json=batch | small).status_code == 200
        assert requests.post(f"{url}-single-image", json=single).status_code == 200
        assert refused("single-image", single).startswith("429 rate_limited")
        assert running.service.admission.images == 0


def test_extras_cost_no_more_than_one_request_may() -> None:
    with live(ServeConfig(log="off", limits=Limits(cost=0.01)), Scripted) as running:
        body = {"image": sent(scene()), "upscaler_1": "Lanczos"}
        answer = requests.post(f"{running.url}/sdapi/v1/extra-single-image", json=body)
        assert (answer.status_code, answer.json()["error"]) == (422, "over_budget")


def test_pictures_are_not_read_for_more_images_than_allowed() -> None:
    """16 images with as many large pictures would fill the memory before anything else looked at them."""
    flat = sent(Image.new("L", (256, 256)))
    limits = Limits(images=4, source_pixels=3 * 256 * 256)
    with live(ServeConfig(log="off", limits=limits), Scripted) as running:
        url = f"{running.url}/sdapi/v1/img2img"
        many = {"init_images": ["no picture"] * 5, "batch_size": 5}
        assert requests.post(url, json=many).json()["error"] == "too_many_images"
        body = {"init_images": [flat] * 4, "batch_size": 4, "width": 64, "height": 64, "steps": 1}
        answer = requests.post(url, json=body)
        assert (answer.status_code, answer.json()["field"]) == (422, "init_images")
        assert "196608 pixels together" in answer.json()["detail"]
        fewer = body | {"init_images": [flat] * 3, "batch_size": 3}
        assert requests.post(url, json=fewer).status_code == 200


def test_a_key_is_the_password_and_state_is_of_the_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    alice, bob = (keys.add(file, name) for name in ("alice", "bob"))
    with live(ServeConfig(access=Access(keys=str(file)), log="off"), Scripted) as running:
        with pytest.raises(RuntimeError, match="401"):
            client_of(running).txt2img(prompt="x", **SMALL)
        first, second = (client_of(running, username="x", password=token) for token in (alice, bob))
        first.util_set_model("other")
        assert first.util_get_current_model().startswith("other")
        assert second.util_get_current_model().startswith("scripted")
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(first.txt2img(prompt="wait", steps=8)))
        thread.start()
        wait_for(lambda: first.get_progress()["state"]["sampling_step"] == 4)
        assert second.get_progress()["state"]["job_count"] == 0
        second.interrupt()
        assert first.get_progress()["state"]["job_count"] == 1
        first.interrupt()
        thread.join(10)
        assert len(results[0].images) == 1


def test_failures_say_nothing_internal(scripted: tuple[webuiapi.WebUIApi, Scripted]) -> None:
    api, _ = scripted
    with pytest.raises(RuntimeError) as caught:
        api.txt2img(prompt="fail")
    assert caught.value.args[0] == 500
    assert "secret" not in caught.value.args[1]
    with pytest.raises(RuntimeError) as caught:
        api.txt2img(prompt="refuse 429")
    assert caught.value.args[0] == 429


def test_the_file_says_that_it_was_composed(api: webuiapi.WebUIApi) -> None:
    result = api.img2img(images=[scene()], mask_image=hole((0, 0, 31, 63)), prompt="x", seed=2, **SMALL)
    data = webuiapi.webuiapi.base64.b64decode(result.json["images"][0])
    provenance = read_provenance(data)
    assert "composite" in (provenance.source_type or "")
    assert provenance.parameters is not None
    assert provenance.parameters["seed"] == 2
    assert encoded(result.image, "png")
