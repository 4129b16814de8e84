"""Every sampler table against diffusers' own scheduler loop, and against mathematics where it has none."""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import schedulers as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from diffray.model.config import NoiseConfig
from diffray.model.errors import InvalidRequest
from diffray.model.sampling.sampler_names import (
    SAMPLER_NAMES,
    resolve_sampler,
    resolve_schedule,
    sampler_from_scheduler_config,
)
from diffray.model.sampling.samplers import COLUMNS, SAMPLERS, SamplerTable, build_table
from diffray.model.sampling.schedule import DISTILLED_STEPS, GRIDS, SCHEDULES, SPACINGS, NoiseSchedule

Array = np.ndarray[Any, Any]
Denoiser = Callable[[Array, float, float], Array]

SD = NoiseConfig(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    train_steps=1000,
    zero_terminal_snr=False,
    prediction_type="epsilon",
)
NOISE = {p: NoiseSchedule(replace(SD, prediction_type=p)) for p in ("epsilon", "v_prediction", "sample")}
SD_KEYS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
STEPS = (1, 2, 4, 10, 20, 30)
SHAPE = (2, 8)
WEIGHTS = np.random.default_rng(0).standard_normal((8, 8)) / 4

TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
ONLY_SPACINGS = ("euler_ancestral", "ddim", "ddpm", "pndm")
TWIN_SCHEDULES = {
    "dpmpp_2s": ("linspace", "karras", "exponential", "beta"),
    "lcm": ("leading",),
    "tcd": ("leading",),
    **dict.fromkeys(ONLY_SPACINGS, ("leading", "linspace", "trailing")),
}
ALL_SCHEDULES = ("leading", "linspace", "trailing", "karras", "leading_karras", "exponential", "beta")
NO_SAMPLE_PREDICTION = ("euler_ancestral", "dpm2", "dpm2_ancestral", "dpmpp_sde", "pndm")


def network(x: Array, t: float) -> Array:
    """A fixed, smooth, nonlinear function of the scaled latent and the timestep."""
    return np.asarray(0.6 * x + 0.4 * np.tanh(x @ WEIGHTS + np.cos(t / 150.0 + np.arange(8))))


def denoised(x: Array, sigma: float, t: float, prediction: str) -> Array:
    root = np.sqrt(1 + sigma**2)
    out = network(x / root, t)
    if prediction == "epsilon":
        return np.asarray(x - sigma * out)
    return np.asarray(out if prediction == "sample" else x / root**2 - sigma / root * out)


def run_table(table: SamplerTable, x: Array, denoise: Denoiser, rng: np.random.Generator) -> Array:
    """The engine's update, row by row, as the head of samplers.py defines it."""
    base = h1 = h2 = h3 = noise = np.zeros_like(x)
    for k in range(len(table)):
        c = dict(zip(COLUMNS, table.coefficients[k], strict=True))
        d = denoise(x, float(table.sigmas[k]), float(table.timesteps[k]))
        fresh = rng.standard_normal(x.shape) if table.draws[k] else np.zeros_like(x)
        entry = c["push_x"] * x + c["push_d"] * d
        new = (
            c["x"] * x
            + c["base"] * base
            + c["d"] * d
            + c["h1"] * h1
            + c["h2"] * h2
            + c["h3"] * h3
            + c["noise"] * fresh
            + c["prev_noise"] * noise
        )
        base = x if table.saves[k] else base
        h1, h2, h3 = (entry, h1, h2) if table.pushes[k] else (h1, h2, h3)
        noise = fresh if table.draws[k] else noise
        x = new
    return x


@functools.cache
def make_oracle(sampler: str, schedule: str, prediction: str, **extra: Any) -> Any:
    """diffusers' scheduler with the keys of Stable Diffusion; `set_timesteps` resets all its state."""
    name, keys = TWINS[sampler]
    spacing, _, curve = schedule.rpartition("_")
    if curve in ("karras", "exponential", "beta"):
        keys = {**keys, f"use_{curve}_sigmas": True, "timestep_spacing": spacing or "linspace"}
    else:
        keys = {**keys, "timestep_spacing": schedule}
    if sampler == "dpmpp_2s":
        keys.pop("timestep_spacing")
    else:
        keys["steps_offset"] = 1
    if sampler == "dpmpp_sde":  # needs torchsde only for the noise sampler, which `Brownian` replaces
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
            cls = importlib.import_module(
                "diffusers.schedulers.scheduling_dpmsolver_sde"
            ).DPMSolverSDEScheduler
        return cls(**SD_KEYS, **keys, prediction_type=prediction, **extra)
    return getattr(oracle, name)(**SD_KEYS, **keys, prediction_type=prediction, **extra)


class Brownian:
    """A Brownian path over sigma, drawn point by point on the way down."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.path: list[tuple[float, Array]] = []

    def at(self, sigma: float) -> Array:
        for known, value in self.path:
            if abs(known - sigma) < 1e-5 * sigma:
                return value
        if self.path:
            last, before = self.path[-1]
            self.path.append((sigma, before + np.sqrt(last - sigma) * self.rng.standard_normal(SHAPE)))
        else:
            self.path.append((sigma, np.zeros(SHAPE)))
        return self.path[-1][1]

    def __call__(self, sigma: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        high, low = float(sigma), float(target)
        start = self.at(high)
        return torch.from_numpy((self.at(low) - start) / np.sqrt(high - low))


def run_oracle(
    sched: Any,
    sampler: str,
    steps: int,
    rng: np.random.Generator,
    start: Array,
    *,
    image: Array | None = None,
    strength: float | None = None,
    eta: float | None = None,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Array, list[float]]:
    """diffusers' pipeline loop: (result, timesteps the network was told)."""

    def draw(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(tuple(shape))).to(dtype)

    module = importlib.import_module(type(sched).__module__)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", draw)
    sched.set_timesteps(steps)
    if sampler == "dpmpp_sde":
        sched.noise_sampler = Brownian(rng)
    timesteps = sched.timesteps
    if strength is None:
        x = torch.from_numpy(start) * sched.init_noise_sigma
    else:
        begin = (steps - min(int(steps * strength), steps)) * sched.order
        timesteps = timesteps[begin:]
        if hasattr(sched, "set_begin_index"):
            sched.set_begin_index(begin)
        x = sched.add_noise(torch.from_numpy(image), torch.from_numpy(start), timesteps[:1].repeat(SHAPE[0]))
    extra = {} if eta is None else {"eta": eta}
    told = []
    for t in timesteps:
        told.append(float(t))
        out = network(sched.scale_model_input(x, t).double().numpy(), float(t))
        x = sched.step(torch.from_numpy(out), t, x, **extra).prev_sample
    return x.double().numpy(), told


def compare(
    sampler: str,
    schedule: str,
    steps: int,
    prediction: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    strength: float | None = None,
    eta: float | None = None,
    sched: Any = None,
) -> float:
    """Largest difference between diffusers' result and ours, relative to the largest value."""
    draws = np.random.default_rng(1)
    start, image = draws.standard_normal(SHAPE), draws.standard_normal(SHAPE)
    sched = sched or make_oracle(sampler, schedule, prediction)
    wanted, told = run_oracle(
        sched,
        sampler,
        steps,
        np.random.default_rng(2),
        start,
        image=image,
        strength=strength,
        eta=eta,
        monkeypatch=monkeypatch,
    )
    table = build_table(sampler, schedule, steps, NOISE[prediction], strength=strength, eta=eta)
    np.testing.assert_allclose(table.timesteps, told, atol=1e-2)
    x = table.init_scale * start if strength is None else image + table.sigmas[0] * start
    got = run_table(table, x, lambda x, s, t: denoised(x, s, t, prediction), np.random.default_rng(2))
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def cases() -> Iterator[tuple[str, str, str]]:
    for sampler in TWINS:
        for schedule in TWIN_SCHEDULES.get(sampler, ALL_SCHEDULES):
            yield sampler, schedule, "epsilon"
            if schedule in ("leading", "karras"):
                yield sampler, schedule, "v_prediction"
                if sampler not in NO_SAMPLE_PREDICTION:
                    yield sampler, schedule, "sample"


@pytest.mark.parametrize(("sampler", "schedule", "prediction"), list(cases()))
def test_text_to_image_equals_diffusers(
    sampler: str, schedule: str, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sched = make_oracle(sampler, schedule, prediction)
    # One step of DEIS on a curve: diffusers aims at the level it starts from, so nothing happens.
    wanted = STEPS if prediction == "epsilon" else (2, 20)
    steps = [n for n in wanted if n > 1 or sampler != "deis" or schedule in SPACINGS]
    errors = {n: compare(sampler, schedule, n, prediction, monkeypatch, sched=sched) for n in steps}
    assert max(errors.values()) < 1e-4, errors


IMAGE_TO_IMAGE = [
    (sampler, schedule)
    for sampler in TWINS
    for schedule in (*TWIN_SCHEDULES.get(sampler, ("leading", "trailing", "karras")),)
    if sampler != "lms" and schedule not in ("exponential", "beta")
]


@pytest.mark.parametrize(("sampler", "schedule"), IMAGE_TO_IMAGE)
def test_image_to_image_equals_diffusers(
    sampler: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sched = make_oracle(sampler, schedule, "epsilon")
    for steps, strength in ((10, 0.1), (10, 0.55), (20, 0.8), (30, 1.0)):
        error = compare(sampler, schedule, steps, "epsilon", monkeypatch, strength=strength, sched=sched)
        assert error < 1e-4, (steps, strength)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.4), ("ddim", 1.0), ("tcd", 0.0), ("tcd", 1.0)])
def test_eta_equals_diffusers(
    sampler: str, eta: float, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for steps in (1, 4, 20):
        assert compare(sampler, "leading", steps, prediction, monkeypatch, eta=eta) < 1e-4


def test_image_to_image_lms_starts_at_order_one_like_k_diffusion() -> None:
    whole = build_table("lms", "linspace", 20, SD)
    part = build_table("lms", "linspace", 20, SD, strength=0.5)
    alone = build_table("lms", None, 0, SD, sigmas=tuple(whole.sigmas[10:]))
    np.testing.assert_allclose(part.coefficients, alone.coefficients, rtol=1e-9)
    np.testing.assert_allclose(part.coefficients[0, 3:6], 0.0)
    np.testing.assert_allclose(part.coefficients[:, [0, 2]].sum(1), 1.0)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m", "unipc", "ddim", "ddpm"])
def test_zero_terminal_snr_equals_diffusers(
    sampler: str, spacing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SD, zero_terminal_snr=True, prediction_type="v_prediction")
    monkeypatch.setitem(NOISE, "v_prediction", NoiseSchedule(config))
    table = build_table(sampler, spacing, 10, config)
    assert table.sigmas[0] == pytest.approx(4096.0)
    # DDIM and DDPM keep an infinite sigma there, of which 4096 is the same to 1 in 4096.
    tolerance = 4e-4 if sampler.startswith("dd") else 1e-4
    for steps in (1, 4, 10, 30) if spacing == "trailing" else (4, 10, 30):
        sched = make_oracle(sampler, spacing, "v_prediction", rescale_betas_zero_snr=True)
        assert compare(sampler, spacing, steps, "v_prediction", monkeypatch, sched=sched) < tolerance


def test_explicit_sigmas_equal_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = (14.0, 7.5, 3.0, 1.1, 0.4, 0.1)
    sched = make_oracle("euler", "linspace", "epsilon")
    sched.set_timesteps(sigmas=[*wanted, 0.0])
    table = build_table("euler", "karras", 99, SD, sigmas=wanted)
    assert (table.schedule, table.steps) == ("sigmas", 6)
    np.testing.assert_allclose(table.timesteps, sched.timesteps.numpy(), atol=1e-3)
    np.testing.assert_allclose(table.sigmas, wanted)
    assert table.init_scale == pytest.approx(float(sched.init_noise_sigma))


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m", "heun", "unipc"])
@pytest.mark.parametrize("share", [0.2, 0.8])
def test_hand_over_is_seamless(sampler: str, share: float) -> None:
    whole = build_table(sampler, None, 25, SD)
    base = build_table(sampler, None, 25, SD, denoising_end=share)
    refiner = build_table(sampler, None, 25, SD, denoising_start=share)
    assert base.steps + refiner.steps == 25
    assert refiner.final_sigma == 0.0
    assert base.final_sigma == refiner.sigmas[0]
    np.testing.assert_array_equal(np.append(base.sigmas, refiner.sigmas), whole.sigmas)
    np.testing.assert_array_equal(base.coefficients, whole.coefficients[: len(base)])


def test_hand_over_equals_the_sdxl_pipelines() -> None:
    sched = make_oracle("euler", "leading", "epsilon")
    sched.set_timesteps(40)
    cutoff = round(1000 - 0.8 * 1000)
    base = build_table("euler", "leading", 40, SD, denoising_end=0.8)
    refiner = build_table("euler", "leading", 40, SD, denoising_start=0.8)
    np.testing.assert_array_equal(base.timesteps, [t for t in sched.timesteps.tolist() if t >= cutoff])
    np.testing.assert_array_equal(refiner.timesteps, [t for t in sched.timesteps.tolist() if t < cutoff])
    assert base.final_sigma == pytest.approx(float(sched.sigmas[len(base)]))


def k_diffusion_2s_ancestral(
    x: Array, sigmas: Array, denoise: Callable[[Array, float], Array], rng: Any
) -> Array:
    """DPM++ 2S a from its definition, in lam = -log sigma, eta 1."""
    for sigma, target in itertools.pairwise(sigmas):
        d = denoise(x, sigma)
        if target == 0:
            return d
        up = min(target, np.sqrt(target**2 * (sigma**2 - target**2) / sigma**2))
        down = np.sqrt(target**2 - up**2)
        t, goal = -np.log(sigma), -np.log(down)
        h = goal - t
        middle = np.exp(-(t + h / 2))
        x2 = middle / sigma * x - np.expm1(-h / 2) * d
        x = down / sigma * x - np.expm1(-h) * denoise(x2, middle) + up * rng.standard_normal(x.shape)
    return x


def k_diffusion_3m_sde(x: Array, sigmas: Array, denoise: Callable[[Array, float], Array], rng: Any) -> Array:
    """DPM++ 3M SDE from its definition: divided differences of D in lam, weighted with phi functions."""
    seen: list[tuple[Array, float]] = []
    for sigma, target in itertools.pairwise(sigmas):
        d = denoise(x, sigma)
        if target == 0:
            return d
        h = np.log(sigma / target)
        x = np.exp(-2 * h) * x - np.expm1(-2 * h) * d
        phi2 = np.expm1(-2 * h) / (2 * h) + 1
        phi3 = phi2 / (2 * h) - 0.5
        if len(seen) >= 1:
            slope = (d - seen[-1][0]) * h / seen[-1][1]
            bend = np.zeros_like(d)
            if len(seen) >= 2:
                earlier = (seen[-1][0] - seen[-2][0]) * h / seen[-2][1]
                share = seen[-1][1] / (seen[-1][1] + seen[-2][1])
                bend = (slope - earlier) * h / (seen[-1][1] + seen[-2][1])
                slope = slope + (slope - earlier) * share
            x = x + phi2 * slope - phi3 * bend
        x = x + target * np.sqrt(-np.expm1(-2 * h)) * rng.standard_normal(x.shape)
        seen.append((d, h))
    return x


@pytest.mark.parametrize(
    ("sampler", "reference"),
    [("dpmpp_2s_ancestral", k_diffusion_2s_ancestral), ("dpmpp_3m_sde", k_diffusion_3m_sde)],
)
@pytest.mark.parametrize("schedule", ["karras", "normal", "trailing"])
def test_samplers_without_twin_equal_their_definition(sampler: str, reference: Any, schedule: str) -> None:
    for steps in STEPS:
        table = build_table(sampler, schedule, steps, SD)
        x = table.init_scale * np.random.default_rng(1).standard_normal(SHAPE)
        sigmas = np.append([table.sigmas[table.step == i][0] for i in range(steps)], 0.0)

        def denoise(x: Array, sigma: float, t: float = 0.0) -> Array:
            return denoised(x, sigma, sigma, "epsilon")

        wanted = reference(x, sigmas, denoise, np.random.default_rng(2))
        got = run_table(table, x, denoise, np.random.default_rng(2))
        np.testing.assert_allclose(got, wanted, rtol=1e-7, atol=1e-9)


SPREAD = 0.7


def gaussian(x: Array, sigma: float, t: float) -> Array:
    """The exact denoiser of data N(0, SPREAD^2)."""
    return np.asarray(x * SPREAD**2 / (SPREAD**2 + sigma**2))


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        ("euler", 1),
        ("ddim", 1),
        ("heun", 2),
        ("dpm2", 2),
        ("dpmpp_2s", 2),
        ("dpmpp_2s_ancestral", 2),
        ("dpmpp_sde", 2),
        ("dpmpp_2m", 2),
        ("dpmpp_2m_sde", 2),
        ("dpmpp_3m_sde", 2),
        ("deis", 2),
        ("pndm", 2),
        ("unipc", 3),
        ("lms", 2),
    ],
)
def test_order_of_accuracy(sampler: str, order: int) -> None:
    """On the probability flow ODE of Gaussian data, halving the steps divides the error by 2^order."""
    errors = []
    for steps in (40, 80):
        sigmas = np.geomspace(10.0, 0.1, steps + 1)
        table = build_table(sampler, None, 0, SD, sigmas=tuple(sigmas), eta=0.0)
        keep = table.step < table.step[-1]
        table = replace(
            table,
            **{
                name: getattr(table, name)[keep]
                for name in ("sigmas", "timesteps", "coefficients", "pushes", "saves", "draws", "step")
            },
        )
        got = run_table(table, np.ones(1), gaussian, np.random.default_rng(0))
        wanted = np.sqrt((SPREAD**2 + 0.1**2) / (SPREAD**2 + 10.0**2))
        errors.append(abs(got.item() / wanted - 1))
    assert np.log2(errors[0] / errors[1]) > order - 0.3, errors


@pytest.mark.parametrize(
    "sampler",
    [
        "euler_ancestral",
        "ddpm",
        "dpm2_ancestral",
        "dpmpp_2s_ancestral",
        "dpmpp_sde",
        "dpmpp_2m_sde",
        "dpmpp_3m_sde",
    ],
)
def test_stochastic_samplers_reach_the_data_distribution(sampler: str) -> None:
    table = build_table(sampler, "karras", 60, SD)
    rng = np.random.default_rng(3)
    got = run_table(table, table.init_scale * rng.standard_normal(20_000), gaussian, rng)
    assert float(got.std()) == pytest.approx(SPREAD, rel=0.07)
    assert table.draws.sum() >= 59


@settings(max_examples=200, deadline=None)
@given(
    sampler=st.sampled_from(SAMPLER_NAMES),
    schedule=st.sampled_from(SCHEDULES),
    steps=st.integers(1, 100),
    eta=st.none() | st.floats(0, 1),
    strength=st.none() | st.floats(0.01, 1),
    prediction=st.sampled_from(sorted(NOISE)),
    family=st.sampled_from(["sd1", "sdxl"]),
)
def test_every_table_is_finite_and_reads_only_what_it_wrote(
    sampler: str,
    schedule: str,
    steps: int,
    eta: float | None,
    strength: float | None,
    prediction: str,
    family: str,
) -> None:
    noise = NOISE[prediction]
    none_left = strength is not None and int(steps * strength) == 0
    too_many = SAMPLERS[sampler].convention.distilled and schedule not in GRIDS and steps > DISTILLED_STEPS
    if none_left or too_many:
        with pytest.raises(InvalidRequest):
            build_table(sampler, schedule, steps, noise, strength=strength)
        return
    table = build_table(sampler, schedule, steps, noise, eta=eta, strength=strength, family=family)
    for array in (table.sigmas, table.timesteps, table.coefficients):
        assert np.isfinite(array).all()
    assert (table.sigmas > 0).all()
    assert ((table.timesteps >= 0) & (table.timesteps <= 999)).all()
    assert table.final_sigma == 0.0
    assert set(table.step) == set(range(table.steps))
    column = dict(zip(COLUMNS, table.coefficients.T, strict=True))
    pushed = np.cumsum(table.pushes) - table.pushes
    for depth, name in enumerate(("h1", "h2", "h3"), 1):
        assert (pushed[column[name] != 0] >= depth).all()
    assert (np.cumsum(table.saves) > table.saves)[column["base"] != 0].all()
    assert (np.cumsum(table.draws) > table.draws)[column["prev_noise"] != 0].all()


@settings(max_examples=50, deadline=None)
@given(
    sampler=st.sampled_from(SAMPLER_NAMES),
    sigmas=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20, unique=True),
)
def test_every_explicit_list_gives_finite_coefficients(sampler: str, sigmas: list[float]) -> None:
    levels = np.sort(sigmas)[::-1]
    if (levels[:-1] / levels[1:] < 1.001).any():
        return
    table = build_table(sampler, None, 1, SD, sigmas=tuple(levels))
    assert np.isfinite(table.coefficients).all()


@pytest.mark.parametrize(
    ("kwargs", "field"),
    [
        ({"strength": 0.0}, "strength"),
        ({"strength": 0.04}, "strength"),
        ({"denoising_end": 0.0}, "denoising_end"),
        ({"denoising_start": 1.0}, "denoising_start"),
        ({"denoising_start": 0.9, "denoising_end": 0.5}, "denoising_end"),
        ({"eta": 1.5}, "eta"),
        ({"sigmas": (1.0, 2.0)}, "sigmas"),
        ({"sigmas": ()}, "sigmas"),
        ({"schedule": "karas"}, "schedule"),
        ({"sampler": "eulr"}, "sampler"),
        ({"steps": 0}, "steps"),
        ({"steps": 51, "sampler": "lcm"}, "steps"),
        ({"steps": 1000, "schedule": "leading"}, "steps"),
    ],
)
def test_impossible_requests_name_the_field(kwargs: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        build_table(**{"sampler": "euler", "schedule": "linspace", "steps": 20, "noise": SD, **kwargs})
    assert caught.value.field == field


def test_unknown_names_show_the_closest() -> None:
    with pytest.raises(InvalidRequest, match=r"'dpmp_2m', did you mean dpmpp_2m.*allowed is one of euler, "):
        resolve_sampler("dpmp_2m")


DIFFUSERS_CLASSES = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "deis",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "DPMSolverSinglestepScheduler": "dpmpp_2s",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": "dpm2_ancestral",
    "KDPM2DiscreteScheduler": "dpm2",
    "LCMScheduler": "lcm",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "pndm",
    "TCDScheduler": "tcd",
    "UniPCMultistepScheduler": "unipc",
}
COMFYUI = {
    "euler": "euler",
    "euler_ancestral": "euler_ancestral",
    "heun": "heun",
    "dpm_2": "dpm2",
    "dpm_2_ancestral": "dpm2_ancestral",
    "lms": "lms",
    "dpmpp_2s_ancestral": "dpmpp_2s_ancestral",
    "dpmpp_sde": "dpmpp_sde",
    "dpmpp_sde_gpu": "dpmpp_sde",
    "dpmpp_2m": "dpmpp_2m",
    "dpmpp_2m_sde": "dpmpp_2m_sde",
    "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",
    "dpmpp_3m_sde": "dpmpp_3m_sde",
    "dpmpp_3m_sde_gpu": "dpmpp_3m_sde",
    "ddpm": "ddpm",
    "lcm": "lcm",
    "deis": "deis",
    "ddim": "ddim",
    "uni_pc": "unipc",
    "uni_pc_bh2": "unipc",
}
"""Of `KSAMPLER_NAMES`, those of the samplers that are here."""
AUTOMATIC1111 = {
    "DPM++ 2M": "dpmpp_2m",
    "DPM++ SDE": "dpmpp_sde",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "DPM++ 2S a": "dpmpp_2s_ancestral",
    "DPM++ 3M SDE": "dpmpp_3m_sde",
    "Euler a": "euler_ancestral",
    "Euler": "euler",
    "LMS": "lms",
    "Heun": "heun",
    "DPM2": "dpm2",
    "DPM2 a": "dpm2_ancestral",
    "DDIM": "ddim",
    "PLMS": "pndm",
    "UniPC": "unipc",
    "LCM": "lcm",
}
"""Labels since 1.9; before, a schedule was part of the label, in the forms of `AUTOMATIC1111_WITH_SCHEDULE`."""
AUTOMATIC1111_WITH_SCHEDULE = {
    "DPM++ 2M Karras": ("dpmpp_2m", "karras"),
    "DPM++ SDE Karras": ("dpmpp_sde", "karras"),
    "DPM++ 2M SDE Exponential": ("dpmpp_2m_sde", "exponential"),
    "DPM++ 2M SDE Karras": ("dpmpp_2m_sde", "karras"),
    "DPM++ 2S a Karras": ("dpmpp_2s_ancestral", "karras"),
    "DPM++ 3M SDE Karras": ("dpmpp_3m_sde", "karras"),
    "DPM++ 3M SDE Exponential": ("dpmpp_3m_sde", "exponential"),
    "LMS Karras": ("lms", "karras"),
    "DPM2 Karras": ("dpm2", "karras"),
    "DPM2 a Karras": ("dpm2_ancestral", "karras"),
}
AUTOMATIC1111_ALIASES = {
    "k_euler": "euler",
    "k_euler_a": "euler_ancestral",
    "k_lms": "lms",
    "k_heun": "heun",
    "k_dpm_2": "dpm2",
    "k_dpm_2_a": "dpm2_ancestral",
    "k_dpmpp_2s_a": "dpmpp_2s_ancestral",
    "k_dpmpp_2m": "dpmpp_2m",
    "k_dpmpp_sde": "dpmpp_sde",
    "k_dpmpp_2m_sde": "dpmpp_2m_sde",
    "k_dpmpp_3m_sde": "dpmpp_3m_sde",
}
STABILITY = {
    "DDIM": "ddim",
    "DDPM": "ddpm",
    "K_DPMPP_2M": "dpmpp_2m",
    "K_DPMPP_2S_ANCESTRAL": "dpmpp_2s_ancestral",
    "K_DPM_2": "dpm2",
    "K_DPM_2_ANCESTRAL": "dpm2_ancestral",
    "K_EULER": "euler",
    "K_EULER_ANCESTRAL": "euler_ancestral",
    "K_HEUN": "heun",
    "K_LMS": "lms",
}
PLAIN = [DIFFUSERS_CLASSES, COMFYUI, AUTOMATIC1111, AUTOMATIC1111_ALIASES, STABILITY]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [(n, (w, None)) for names in PLAIN for n, w in names.items()] + [*AUTOMATIC1111_WITH_SCHEDULE.items()],
)
def test_sampler_names_of_other_tools(name: str, wanted: tuple[str, str | None]) -> None:
    for written in (name, name.lower(), name.upper()):
        assert resolve_sampler(written) == wanted


def test_every_diffusers_scheduler_for_this_family_is_known() -> None:
    """Its own list of interchangeable schedulers, but for the one with noise levels of another family."""
    names = {kind.name for kind in oracle.KarrasDiffusionSchedulers} - {"EDMEulerScheduler"}
    assert names | {"LCMScheduler", "TCDScheduler"} == set(DIFFUSERS_CLASSES)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("simple", "simple"),  # ComfyUI's `SCHEDULER_NAMES` but for that of video models
        ("sgm_uniform", "sgm_uniform"),
        ("karras", "karras"),
        ("exponential", "exponential"),
        ("ddim_uniform", "leading"),
        ("beta", "beta"),
        ("normal", "normal"),
        ("kl_optimal", "kl_optimal"),
        ("Uniform", "normal"),  # AUTOMATIC1111's labels
        ("Karras", "karras"),
        ("Exponential", "exponential"),
        ("Polyexponential", "exponential"),
        ("SGM Uniform", "sgm_uniform"),
        ("KL Optimal", "kl_optimal"),
        ("Align Your Steps", "ays"),
        ("align_your_steps", "ays"),
        ("Simple", "simple"),
        ("Normal", "normal"),
        ("DDIM", "leading"),
        ("Beta", "beta"),
        ("Turbo", "trailing"),
        ("leading", "leading"),  # diffusers' `timestep_spacing`
        ("linspace", "linspace"),
        ("trailing", "trailing"),
        ("Leading Karras", "leading_karras"),
    ],
)
def test_schedule_names_of_other_tools(name: str, wanted: str) -> None:
    assert resolve_schedule(name) == wanted
    assert resolve_sampler(f"DPM++ 2M SDE {name}") == ("dpmpp_2m_sde", wanted)


def test_automatic_schedule_depends_on_the_sampler() -> None:
    assert resolve_schedule("Automatic", "dpmpp_2m") == "karras"
    assert resolve_schedule("Automatic", "dpmpp_3m_sde") == "exponential"
    assert resolve_schedule("Automatic") == "normal"


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_every_canonical_name_has_a_table(name: str) -> None:
    assert resolve_sampler(name) == (name, None)
    assert name in SAMPLERS
    assert len(SAMPLERS) == len(SAMPLER_NAMES)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, ("pndm", "leading")),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}, ("ddim", "trailing")),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}, ("euler", "leading")),
        ({"_class_name": "EulerDiscreteScheduler"}, ("euler", "linspace")),
        (
            {
                "_class_name": "EulerDiscreteScheduler",
                "timestep_spacing": "leading",
                "use_karras_sigmas": True,
            },
            ("euler", "leading_karras"),
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, ("dpmpp_2m", "karras")),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
            ("dpmpp_2m_sde", "linspace"),
        ),
        (
            {
                "_class_name": "DPMSolverMultistepScheduler",
                "algorithm_type": "sde-dpmsolver++",
                "solver_order": 3,
                "use_exponential_sigmas": True,
            },
            ("dpmpp_3m_sde", "exponential"),
        ),
        (
            {"_class_name": "UniPCMultistepScheduler", "solver_order": 2, "timestep_spacing": "trailing"},
            ("unipc", "trailing"),
        ),
        ({"_class_name": "LCMScheduler"}, ("lcm", "leading")),
    ],
)
def test_scheduler_config(config: dict[str, Any], wanted: tuple[str, str]) -> None:
    assert sampler_from_scheduler_config(config) == wanted


def test_scheduler_config_without_sampler_is_refused() -> None:
    for name in ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep"):
        with pytest.raises(InvalidRequest, match="order 3"):
            sampler_from_scheduler_config({"_class_name": f"{name}Scheduler", "solver_order": 3})
    with pytest.raises(InvalidRequest, match="dpmsolver of order 2"):
        sampler_from_scheduler_config(
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}
        )
    with pytest.raises(InvalidRequest, match="FlowMatch"):
        sampler_from_scheduler_config({"_class_name": "FlowMatchEulerDiscreteScheduler"})
