"""Whole trajectories against diffusers' pipelines: family x sampler x schedule, text to image (I3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffray.model import load_model
from tests.model import oracle
from tests.model.oracle import NEGATIVE, SIDE, TOLERANCE, TWINS

Record = Callable[[str, object], None]

SIZE: dict[str, Any] = {"width": SIDE, "height": SIDE}
STEPS = 5

SPACINGS = ("leading", "linspace", "trailing")
CURVES = ("karras", "exponential", "beta", "leading_karras")
SCHEDULES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(TWINS, SPACINGS + CURVES),
    **dict.fromkeys(("euler_ancestral", "ddim", "ddpm", "pndm"), SPACINGS),
    "dpmpp_2s": ("linspace", "karras", "exponential", "beta"),
    "lcm": ("leading",),
    "tcd": ("leading",),
}
"""What the diffusers class of each sampler supports."""


def every_pair() -> list[Any]:
    """(sampler, schedule): the usual one of each sampler in the fast lane."""
    return [
        pytest.param(sampler, schedule, marks=() if number == 0 else pytest.mark.slow)
        for sampler, schedules in SCHEDULES.items()
        for number, schedule in enumerate(schedules)
    ]


def check(
    record: Record,
    kind: str,
    sampler: str,
    schedule: str,
    *,
    fields: dict[str, Any] | None = None,
    arguments: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    keys: dict[str, Any] | None = None,
    steps: int = STEPS,
    guidance: float = 5.0,
    seed: int = 3,
    tolerance: float = TOLERANCE,
) -> None:
    """Our latents against diffusers'.

    Args:
        fields, arguments: what one side is asked besides the usual.
        options, keys: what our loader and diffusers' scheduler are told about the noise.
    """
    pipe = oracle.pipeline(kind, planner=oracle.scheduler(sampler, schedule, **(keys or {})))
    extra = {"eta": 0.3} if sampler == "tcd" else {}
    wanted = oracle.theirs(
        pipe,
        seed=seed,
        num_inference_steps=steps,
        guidance_scale=guidance,
        **SIZE,
        **extra,
        **(arguments or {}),
    )
    got = oracle.latents(
        oracle.model(kind, **(options or {})),
        seed=seed,
        steps=steps,
        guidance_scale=guidance,
        sampler=sampler,
        schedule=schedule,
        **SIZE,
        **(fields or {}),
    )
    error = oracle.relative(got, wanted)
    record("relative", error)
    assert error < tolerance


@pytest.mark.parametrize(("sampler", "schedule"), every_pair())
def test_every_sampler_and_schedule(sampler: str, schedule: str, record_property: Record) -> None:
    check(record_property, "sd1", sampler, schedule)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [
        ("euler", "trailing"),
        pytest.param("heun", "karras", marks=pytest.mark.slow),
        pytest.param("dpmpp_2m", "karras", marks=pytest.mark.slow),
        pytest.param("dpmpp_2m_sde", "linspace", marks=pytest.mark.slow),
        pytest.param("ddim", "leading", marks=pytest.mark.slow),
        pytest.param("unipc", "linspace", marks=pytest.mark.slow),
        pytest.param("lcm", "leading", marks=pytest.mark.slow),
    ],
)
def test_prediction_types(sampler: str, schedule: str, prediction: str, record_property: Record) -> None:
    told = {"prediction_type": prediction}
    # Of a denoised picture Heun's slope at the last small sigma is a difference of almost equal numbers.
    tolerance = 4e-4 if (sampler, prediction) == ("heun", "sample") else TOLERANCE
    check(
        record_property,
        "sd1",
        sampler,
        schedule,
        options=told,
        keys=told,
        guidance=2.0,
        tolerance=tolerance,
    )


@pytest.mark.parametrize(
    ("sampler", "tolerance"),
    # DDIM has an infinite noise level at zero SNR, of which our 4096 is the same to 1 in 4096.
    [("euler", TOLERANCE), ("ddim", 4e-4), pytest.param("dpmpp_2m", TOLERANCE, marks=pytest.mark.slow)],
)
def test_zero_terminal_snr(sampler: str, tolerance: float, record_property: Record) -> None:
    check(
        record_property,
        "sd1",
        sampler,
        "trailing",
        options={"prediction_type": "v_prediction", "zero_terminal_snr": True},
        keys={"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        fields={"guidance_rescale": 0.7},
        arguments={"guidance_rescale": 0.7},
        tolerance=tolerance,
    )


@pytest.mark.parametrize(("kind", "guidance"), [("sd1", 0.0), ("sdxl", 1.0)])
def test_guidance_off(kind: str, guidance: float, record_property: Record) -> None:
    check(record_property, kind, "euler", "leading", guidance=guidance)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_seeds(seed: int, record_property: Record) -> None:
    check(record_property, "sd1", "euler_ancestral", "linspace", steps=2, seed=seed)


@pytest.mark.parametrize("steps", [1, 2, pytest.param(13, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sampler", ["pndm", "dpmpp_2m", pytest.param("unipc", marks=pytest.mark.slow)])
def test_step_counts(sampler: str, steps: int, record_property: Record) -> None:
    schedule = "leading" if sampler == "pndm" else "linspace"
    check(record_property, "sd1", sampler, schedule, steps=steps)


@pytest.mark.parametrize("size", [(32, 64), (64, 24), (40, 40)])
def test_sizes(size: tuple[int, int], record_property: Record) -> None:
    """Sides whose latents are odd on the way down, and not square."""
    width, height = size
    pipe = oracle.pipeline("sd1", planner=oracle.scheduler("euler", "linspace"))
    wanted = oracle.theirs(pipe, num_inference_steps=2, width=width, height=height)
    got = oracle.latents(
        oracle.model("sd1"), steps=2, sampler="euler", schedule="linspace", width=width, height=height
    )
    assert got.shape == (4, height // 8, width // 8)
    error = oracle.relative(got, wanted)
    record_property("relative", error)
    assert error < TOLERANCE


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_eta(eta: float, record_property: Record) -> None:
    check(record_property, "sd1", "ddim", "leading", fields={"eta": eta}, arguments={"eta": eta})


def test_explicit_sigmas(record_property: Record) -> None:
    sigmas = (12.0, 5.5, 2.0, 0.8, 0.2)
    check(
        record_property,
        "sd1",
        "euler",
        "linspace",
        fields={"sigmas": sigmas},
        arguments={"sigmas": [*sigmas, 0.0]},
    )


@pytest.mark.parametrize("negative", [None, "", NEGATIVE])
@pytest.mark.parametrize("kind", ["sd1", "sdxl", pytest.param("sd2", marks=pytest.mark.slow)])
def test_negative_prompt(kind: str, negative: str | None, record_property: Record) -> None:
    said: dict[str, Any] = {"negative_prompt": negative}
    keys = {"prediction_type": "v_prediction"} if kind == "sd2" else {}
    check(record_property, kind, "euler", "leading", fields=said, arguments=said, keys=keys)


def test_sdxl_absent_and_empty_negative_differ() -> None:
    both = [
        oracle.latents(oracle.model("sdxl"), steps=2, negative_prompt=negative, **SIZE)
        for negative in (None, "")
    ]
    assert oracle.relative(*both) > 100 * TOLERANCE


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [
        ("euler_ancestral", "trailing"),
        ("dpmpp_2m", "karras"),
        pytest.param("ddim", "leading", marks=pytest.mark.slow),
        pytest.param("heun", "trailing", marks=pytest.mark.slow),
        pytest.param("unipc", "exponential", marks=pytest.mark.slow),
        pytest.param("dpmpp_2m_sde", "leading_karras", marks=pytest.mark.slow),
        pytest.param("pndm", "leading", marks=pytest.mark.slow),
        pytest.param("tcd", "leading", marks=pytest.mark.slow),
    ],
)
def test_other_families(kind: str, sampler: str, schedule: str, record_property: Record) -> None:
    keys = {"prediction_type": "v_prediction"} if kind == "sd2" else {}
    check(record_property, kind, sampler, schedule, keys=keys)


def test_sdxl_sizes_and_rescale(record_property: Record) -> None:
    check(
        record_property,
        "sdxl",
        "euler",
        "leading",
        fields={
            "original_size": (48, 96),
            "crop": (4, 8),
            "target_size": (64, 40),
            "guidance_rescale": 0.5,
        },
        arguments={
            "original_size": (48, 96),
            "crops_coords_top_left": (4, 8),
            "target_size": (64, 40),
            "guidance_rescale": 0.5,
        },
    )


@pytest.mark.parametrize("field", ["original_size", "crop", "target_size"])
def test_sdxl_each_size_counts(field: str) -> None:
    plain = oracle.latents(oracle.model("sdxl"), steps=1, **SIZE)
    moved = oracle.latents(oracle.model("sdxl"), steps=1, **SIZE, **{field: (16, 8)})
    assert oracle.relative(moved, plain) > 10 * TOLERANCE


@pytest.mark.parametrize("guidance", [1.0, 8.0])
def test_distilled_guidance(guidance: float, record_property: Record) -> None:
    """LCM's own pipeline, whose network is told the guidance scale."""
    check(record_property, "lcm", "lcm", "leading", guidance=guidance, steps=4)


def test_distilled_guidance_counts() -> None:
    both = [oracle.latents(oracle.model("lcm"), guidance_scale=g, steps=1, **SIZE) for g in (1.0, 8.0)]
    assert oracle.relative(*both) > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [
        ("euler", "leading"),
        ("euler_ancestral", "trailing"),
        ("dpmpp_2m", "karras"),
        pytest.param("ddim", "leading", marks=pytest.mark.slow),
        pytest.param("unipc", "linspace", marks=pytest.mark.slow),
    ],
)
def test_refiner_takes_over(sampler: str, schedule: str, record_property: Record) -> None:
    """Base until 60% of the schedule, refiner from there, each with a generator of its own."""
    share, steps = 0.6, 8
    halves = [
        oracle.pipeline(kind, planner=oracle.scheduler(sampler, schedule)) for kind in ("sdxl", "refiner")
    ]
    common: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 4.0}
    base = oracle.theirs(halves[0], seed=1, denoising_end=share, **common, **SIZE)
    wanted = oracle.theirs(halves[1], seed=2, image=base[None], denoising_start=share, **common)

    ask: dict[str, Any] = {"steps": steps, "guidance_scale": 4.0, "sampler": sampler, "schedule": schedule}
    handed = oracle.latents(oracle.model("sdxl"), seed=1, denoising_end=share, **ask, **SIZE)
    got = oracle.latents(oracle.model("refiner"), seed=2, init_latents=handed, denoising_start=share, **ask)
    error = oracle.relative(got, wanted)
    record_property("relative", error)
    assert error < TOLERANCE


def test_refiner_scores(record_property: Record) -> None:
    pipe = oracle.pipeline("refiner", planner=oracle.scheduler("euler", "leading"))
    start = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    scores = {"aesthetic_score": 7.5, "negative_aesthetic_score": 1.0}
    wanted = oracle.theirs(pipe, image=start, num_inference_steps=4, strength=0.5, **scores)
    got = oracle.latents(oracle.model("refiner"), init_latents=start[0], steps=4, strength=0.5, **scores)
    error = oracle.relative(got, wanted)
    record_property("relative", error)
    assert error < TOLERANCE


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "lcm"])
def test_pictures(kind: str) -> None:
    """The checkpoint's own defaults but for the steps, and the decoded picture, to one level of 255."""
    wanted = oracle.theirs(oracle.pipeline(kind), output="pil", num_inference_steps=3, **SIZE, seed=5)
    guidance = {"guidance_scale": 8.5} if kind == "lcm" else {}  # diffusers' class default
    got = oracle.picture(oracle.model(kind), steps=3, **SIZE, **guidance, seed=5)
    assert oracle.levels(got, wanted) <= 1


@pytest.mark.parametrize(
    "kind",
    ["sd1", *(pytest.param(kind, marks=pytest.mark.slow) for kind in oracle.UNETS if kind != "sd1")],
)
def test_both_layouts_are_the_same_model(kind: str) -> None:
    """The same bytes from a folder and from one file."""
    places = (oracle.folder(kind, full=True), oracle.single_file(kind))
    folder, single = (load_model(str(place), device="cpu", dtype="float32") for place in places)
    # Of fewer than four steps the refiner's strength of 0.3 leaves none.
    ask: dict[str, Any] = {"steps": 4, "sampler": "euler", "schedule": "leading"} | oracle.inputs(kind)
    assert torch.equal(oracle.latents(single, **ask), oracle.latents(folder, **ask))
