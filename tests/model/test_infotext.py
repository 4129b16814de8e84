"""The parameters text: what other tools read, and reading what they write."""

from __future__ import annotations

from typing import Any

import pytest

from diffray.model import ImageRequest
from diffray.model.infotext import SAMPLER_LABELS, SCHEDULE_LABELS, infotext, parse_infotext
from diffray.model.sampling.sampler_names import SAMPLER_NAMES, resolve_sampler, resolve_schedule
from diffray.model.sampling.schedule import SCHEDULES

BASE: dict[str, Any] = {
    "prompt": "a fox",
    "width": 512,
    "height": 768,
    "steps": 20,
    "guidance_scale": 7.0,
    "sampler": "dpmpp_2m",
    "schedule": "karras",
    "seed": 1,
}


def test_the_form_is_that_of_automatic1111() -> None:
    text = infotext(
        ImageRequest(**BASE, negative_prompt="blurry"), model="v1-5", model_hash="cc6cb27103417325"
    )
    head, version = text.rsplit(", ", 1)
    assert head == (
        "a fox\nNegative prompt: blurry\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x768, "
        "Model hash: cc6cb27103, Model: v1-5, RNG: CPU"
    )
    assert version.startswith("Version: diffray ")


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"guidance_scale": 7.25}, {"CFG scale": "7.25"}),
        ({"clip_skip": 1}, {"Clip skip": "2"}),
        ({"sampler": "DPM++ 2M SDE Karras"}, {"Sampler": "DPM++ 2M SDE", "Schedule type": "Karras"}),
        (
            {"sampler": "euler_ancestral", "schedule": "leading"},
            {"Sampler": "Euler a", "Schedule type": "DDIM"},
        ),
        ({"schedule": "trailing_exponential"}, {"Schedule type": "Exponential"}),
        ({"sampler": "homegrown", "schedule": "own"}, {"Sampler": "homegrown", "Schedule type": "own"}),
        (
            {
                "hires_scale": 1.5,
                "hires_strength": 0.4,
                "hires_steps": 10,
                "hires_upscale": "latent-nearest",
            },
            {
                "Denoising strength": "0.4",
                "Hires upscale": "1.5",
                "Hires steps": "10",
                "Hires upscaler": "Latent (nearest)",
                "Size": "512x768",
            },
        ),
    ],
)
def test_fields(change: dict[str, Any], wanted: dict[str, str]) -> None:
    found = parse_infotext(infotext(ImageRequest(**BASE | change)))
    assert wanted.items() <= found.items()


def test_an_explicit_sigma_list_has_no_schedule() -> None:
    found = parse_infotext(infotext(ImageRequest(**BASE, sigmas=(10.0, 1.0))))
    assert "Schedule type" not in found


def test_every_sampler_and_schedule_has_a_label_that_resolves_back() -> None:
    assert set(SAMPLER_LABELS) == set(SAMPLER_NAMES)
    for name, label in SAMPLER_LABELS.items():
        assert resolve_sampler(label) == (name, None)
    plain = {name for name in SCHEDULES if not name.startswith(("leading_", "trailing_"))}
    assert set(SCHEDULE_LABELS) == plain
    near = {"linspace": "normal", "trailing": "sgm_uniform"}
    for name, label in SCHEDULE_LABELS.items():
        assert resolve_schedule(label) == near.get(name, name)


@pytest.mark.parametrize(
    "name", ["a, b: c", 'say "hi"', '"quoted"', "line\nbreak", "back\\slash, x", "plain"]
)
def test_quoted_values_come_back(name: str) -> None:
    assert parse_infotext(infotext(ImageRequest(**BASE), model=name))["Model"] == name


@pytest.mark.parametrize("prompt", ["", "two\nlines", "a, b: c, d: e, f: g", "Steps: 1, x: 2", "☃ 漢字"])
@pytest.mark.parametrize("negative", [None, "low, quality", "two\nlines"])
def test_prompts_come_back(prompt: str, negative: str | None) -> None:
    found = parse_infotext(infotext(ImageRequest(**BASE | {"prompt": prompt}, negative_prompt=negative)))
    assert (found["Prompt"], found["Negative prompt"]) == (prompt, negative or "")


def test_reading_what_automatic1111_wrote() -> None:
    text = """girl with an artist's beret, determined, ((eyeshadow))
(coquettish), detailed
Negative prompt: ugly, (((deformed))), [blurry]
bad anatomy
Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x512, Model hash: 45dee52b, \
Lora hashes: "foo: 1a2b, bar: 3c4d", Hires upscaler: R-ESRGAN 4x+, Token merging ratio: 0.5, Version: v1.10.1"""
    found = parse_infotext(text)
    assert found["Prompt"] == "girl with an artist's beret, determined, ((eyeshadow))\n(coquettish), detailed"
    assert found["Negative prompt"] == "ugly, (((deformed))), [blurry]\nbad anatomy"
    assert found["Seed"] == "965400086"
    assert found["Size"] == "512x512"
    assert found["Lora hashes"] == "foo: 1a2b, bar: 3c4d"
    assert found["Hires upscaler"] == "R-ESRGAN 4x+"
    assert found["Version"] == "v1.10.1"


@pytest.mark.parametrize(
    "text", ["", "\n", "only a prompt", 'a: "', 'x: 1, y: "\\", z: 2', "Negative prompt:"]
)
def test_nothing_is_too_odd_to_read(text: str) -> None:
    assert parse_infotext(text).keys() >= {"Prompt", "Negative prompt"}


def test_a_prompt_alone() -> None:
    assert parse_infotext("a fox, red") == {"Prompt": "a fox, red", "Negative prompt": ""}
