"""Requests: what is allowed, what an error says, and what a model's defaults fill in."""

from __future__ import annotations

import dataclasses
import inspect
import math
import pickle

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffray.model import ImageRequest, InvalidRequest
from diffray.model.config import ModelConfig
from diffray.model.request import MAX_PROMPT, MAX_SEED, MAX_SIDE
from tests.model import oracle

INTEGERS: dict[str, tuple[int, int]] = {
    "width": (8, MAX_SIDE),
    "height": (8, MAX_SIDE),
    "steps": (1, 1000),
    "seed": (0, MAX_SEED),
    "noise_level": (0, 350),
    "clip_skip": (0, 11),
    "hires_steps": (1, 1000),
}
NUMBERS: dict[str, tuple[float, float]] = {
    "guidance_scale": (0.0, 100.0),
    "guidance_rescale": (0.0, 1.0),
    "eta": (0.0, 1.0),
    "strength": (math.nextafter(0.0, 1.0), 1.0),
    "image_guidance_scale": (1.0, 100.0),
    "aesthetic_score": (0.0, 10.0),
    "negative_aesthetic_score": (0.0, 10.0),
    "denoising_start": (0.0, 1.0),
    "denoising_end": (0.0, 1.0),
    "hires_scale": (math.nextafter(1.0, 2.0), 8.0),
    "hires_strength": (math.nextafter(0.0, 1.0), 1.0),
}
OPTIONAL = (
    "width",
    "height",
    "steps",
    "guidance_scale",
    "eta",
    "strength",
    "denoising_start",
    "denoising_end",
    "hires_scale",
    "hires_steps",
)
NOT_NUMBERS = st.sampled_from([True, False, "7", [], {}, object(), b"1", 1j, (1,)])


def refused(field: str, value: object) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        ImageRequest(**{field: value})  # type: ignore[arg-type]
    return caught.value


@given(st.data())
def test_integers(data: st.DataObject) -> None:
    field = data.draw(st.sampled_from(sorted(INTEGERS)))
    low, high = INTEGERS[field]
    ImageRequest(**{field: data.draw(st.integers(low, high))})
    bad = data.draw(
        st.integers(max_value=low - 1) | st.integers(min_value=high + 1) | NOT_NUMBERS | st.floats()
    )
    error = refused(field, bad)
    assert error.field == field
    assert f"{low}..{high}" in str(error)


@given(st.data())
def test_numbers(data: st.DataObject) -> None:
    field = data.draw(st.sampled_from(sorted(NUMBERS)))
    low, high = NUMBERS[field]
    ImageRequest(**{field: data.draw(st.floats(low, high))})
    bad = data.draw(
        st.floats(max_value=low, exclude_max=True)
        | st.floats(min_value=high, exclude_min=True)
        | st.just(math.nan)
        | NOT_NUMBERS
    )
    error = refused(field, bad)
    assert error.field == field
    assert f"{high:g}]" in str(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", None),
        ("prompt", b"fox"),
        ("prompt", "x" * (MAX_PROMPT + 1)),
        ("negative_prompt", 3),
        ("negative_prompt", "x" * (MAX_PROMPT + 1)),
        ("sampler", 3),
        ("schedule", ("karras",)),
        ("sigmas", ()),
        ("sigmas", [3.0, 1.0]),
        ("sigmas", 3.0),
        ("sigmas", "31"),
        ("sigmas", (1.0, 1.0)),
        ("sigmas", (1.0, 3.0)),
        ("sigmas", (1.0, 0.0)),
        ("sigmas", (1.0, math.nan)),
        ("sigmas", (math.inf, 1.0)),
        ("sigmas", ("3", "1")),
        ("sigmas", tuple(range(1001, 0, -1))),
        ("original_size", (1, 2, 3)),
        ("original_size", [1, 2]),
        ("original_size", (1, -2)),
        ("target_size", (1.0, 2.0)),
        ("crop", None),
        ("crop", (0, True)),
        ("output", "png"),
        ("output", ["image"]),
        ("output", None),
        ("init_image", "fox.png"),
        ("mask", b""),
        ("depth", 3),
        ("paste_back", "yes"),
        ("paste_back", None),
        ("hires_scale", {"scale": 2}),
        ("hires_upscale", "bicubic"),
        ("hires_upscale", None),
        ("guidance_start", 1.5),
        ("guidance_stop", -0.5),
        *((name, None) for name in (*INTEGERS, *NUMBERS) if name not in OPTIONAL),
    ],
)
def test_bad_values(field: str, value: object) -> None:
    error = refused(field, value)
    assert error.field == field
    assert str(error).startswith(f"{field}: ")


def test_values_that_do_not_go_together() -> None:
    with pytest.raises(InvalidRequest, match="guidance_start"):
        ImageRequest(guidance_start=0.6, guidance_stop=0.5)
    with pytest.raises(InvalidRequest, match="mask"):
        ImageRequest(mask=oracle.mask_image())
    with pytest.raises(InvalidRequest, match="hires_scale"):
        ImageRequest(hires_scale=2.0, output="latents")


def test_errors_survive_pickling() -> None:
    error = refused("steps", 0)
    again = pickle.loads(pickle.dumps(error))
    assert (again.field, again.reason, str(again)) == (error.field, error.reason, str(error))


def test_equality_sees_images() -> None:
    """Equal resolved requests are the same image."""
    first, second = (oracle.source_image(seed=seed) for seed in (0, 1))
    assert ImageRequest(init_image=first) == ImageRequest(init_image=first.copy())
    assert ImageRequest(init_image=first) != ImageRequest(init_image=second)
    assert ImageRequest(init_image=first, mask=first) != ImageRequest(init_image=first, mask=second)
    assert hash(ImageRequest(init_image=first)) == hash(ImageRequest(init_image=first.copy()))


def test_parameters_are_plain_values() -> None:
    values = ImageRequest(prompt="fox", init_image=oracle.source_image()).parameters()
    assert values["prompt"] == "fox"
    assert list(values) == [
        name for name in (f.name for f in dataclasses.fields(ImageRequest)) if name in values
    ]
    assert not any(isinstance(value, Image.Image) for value in values.values())
    assert {"hires_scale", "hires_strength", "hires_steps", "hires_upscale"} <= set(values)
    plain = ImageRequest(prompt="fox", hires_scale=2.0, hires_upscale="lanczos")
    assert ImageRequest(**plain.parameters()) == plain


# Against a model -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return oracle.model("sd1").config


def upright(orientation: int, width: int = 40, height: int = 24) -> Image.Image:
    """A picture whose EXIF says how it is to be turned; `width` x `height` as stored."""
    image = oracle.source_image(width, height)
    image.getexif()[0x0112] = orientation
    return image


@pytest.mark.parametrize(
    ("request_", "size"),
    [
        (ImageRequest(), (32, 32)),
        (ImageRequest(width=64), (64, 32)),
        (ImageRequest(init_image=oracle.source_image(47, 31)), (40, 24)),
        (ImageRequest(init_image=oracle.source_image(47, 31), height=64), (40, 64)),
        (ImageRequest(init_image=oracle.source_image(5, 90)), (8, 88)),
        (ImageRequest(init_latents=torch.zeros(4, 3, 9)), (72, 24)),
        *((ImageRequest(init_image=upright(n)), (40, 24)) for n in (1, 2, 3, 4)),
        *((ImageRequest(init_image=upright(n)), (24, 40)) for n in (5, 6, 7, 8)),
    ],
)
def test_size(request_: ImageRequest, size: tuple[int, int], config: ModelConfig) -> None:
    resolved = request_.resolved(config)
    assert (resolved.width, resolved.height) == size
    assert (resolved.original_size, resolved.target_size) == (size[::-1], size[::-1])


def test_sizes_that_do_not_fit(config: ModelConfig) -> None:
    for request in (
        ImageRequest(width=36),
        ImageRequest(init_image=Image.new("L", (MAX_SIDE + 8, 8))),
        ImageRequest(init_latents=torch.zeros(4, 3, MAX_SIDE)),
    ):
        with pytest.raises(InvalidRequest, match=rf"width: .* multiple of 8 up to {MAX_SIDE}"):
            request.resolved(config)
    wide = ImageRequest(init_image=Image.new("L", (MAX_SIDE // 2, 8)))
    with pytest.raises(InvalidRequest, match="width"):
        wide.resolved(oracle.model("upscaler").config)


def test_resolving_twice_changes_nothing(config: ModelConfig) -> None:
    for request in (
        ImageRequest(),
        ImageRequest(init_image=oracle.source_image()),
        ImageRequest(sigmas=(3.0, 1.0)),
    ):
        once = request.resolved(config)
        assert once.resolved(config) == once
        assert None not in (once.steps, once.sampler, once.schedule, once.guidance_scale)


def test_sigmas_say_the_steps(config: ModelConfig) -> None:
    assert ImageRequest(sigmas=(3.0, 2.0, 1.0), steps=50).resolved(config).steps == 3


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("sd1", ""),
        ("sd1", "Img2Img"),
        ("sd1", "Inpaint"),
        ("sd1-inpaint", "Inpaint"),
        ("pix2pix", "InstructPix2Pix"),
        ("depth", "Depth2Img"),
        ("upscaler", "Upscale"),
        ("sdxl", ""),
        ("sdxl", "Img2Img"),
        ("sdxl", "Inpaint"),
        ("sdxl-inpaint", "Inpaint"),
        ("sdxl-edit", "InstructPix2Pix"),
        ("refiner", "Img2Img"),
        ("lcm", ""),
    ],
)
def test_what_is_left_open_is_filled_as_diffusers_does(kind: str, task: str) -> None:
    """By the signature of its pipeline for the task; a mask on SDXL's own network keeps that one's guidance."""
    xl = "XL" if kind.startswith(("sdxl", "refiner")) else ""
    name = "LatentConsistencyModelPipeline" if kind == "lcm" else f"StableDiffusion{xl}{task}Pipeline"
    signature = inspect.signature(getattr(diffusers, name).__call__).parameters
    given = oracle.inputs(kind)
    if task in ("Img2Img", "Inpaint"):
        given = {"init_image": oracle.source_image()}
    if task == "Inpaint":
        given["mask"] = oracle.mask_image()
    found = ImageRequest(**given).resolved(oracle.model(kind).config)
    wanted = {
        "steps": "num_inference_steps",
        "guidance_scale": "guidance_scale",
        "strength": "strength",
        "image_guidance_scale": "image_guidance_scale",
        "noise_level": "noise_level",
        "guidance_rescale": "guidance_rescale",
        "aesthetic_score": "aesthetic_score",
        "negative_aesthetic_score": "negative_aesthetic_score",
    }
    if (kind, task) == ("sdxl", "Inpaint"):
        del wanted["guidance_scale"]
    for ours, theirs in wanted.items():
        if theirs in signature:
            assert getattr(found, ours) == signature[theirs].default, ours


def test_nothing_to_keep_needs_no_strength(config: ModelConfig) -> None:
    assert ImageRequest().resolved(config).strength is None
