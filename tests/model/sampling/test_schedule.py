"""Noise schedules: the constants of real models, and diffusers' own tables."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
from diffusers import schedulers as oracle

from diffray.model.config import NoiseConfig
from diffray.model.errors import InvalidRequest
from diffray.model.sampling import schedule as module
from diffray.model.sampling.schedule import (
    DISTILLED,
    GRID,
    MULTISTEP,
    PLMS_GRID,
    SCHEDULES,
    SIGMA,
    Convention,
    NoiseSchedule,
    plan_schedule,
)

SD = NoiseConfig(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    train_steps=1000,
    zero_terminal_snr=False,
    prediction_type="epsilon",
)
NOISE = NoiseSchedule(SD)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(
    ("start", "end", "kind"),
    [(0.00085, 0.012, "scaled_linear"), (0.0001, 0.02, "scaled_linear"), (0.0001, 0.02, "linear")],
)
def test_training_table_equals_diffusers(start: float, end: float, kind: Any, zero_snr: bool) -> None:
    sched = oracle.EulerDiscreteScheduler(
        beta_start=start, beta_end=end, beta_schedule=kind, rescale_betas_zero_snr=zero_snr
    )
    config = replace(SD, beta_start=start, beta_end=end, beta_schedule=kind, zero_terminal_snr=zero_snr)
    noise = NoiseSchedule(config)
    wanted_alphas = sched.alphas_cumprod.double().numpy()
    wanted_sigmas = sched.sigmas[:-1].flip(0).double().numpy()
    # torch's float32 square root is sometimes one unit off, by the processor's instructions; Lin's rescaling amplifies
    # that at the end, and 1 - a at the beginning.
    np.testing.assert_allclose(noise.alphas_cumprod, wanted_alphas, rtol=1e-4 if zero_snr else 1e-6)
    np.testing.assert_allclose(noise.sigmas, wanted_sigmas, rtol=2e-4 if zero_snr else 1e-6)


def test_sigma_range_of_stable_diffusion() -> None:
    assert NOISE.sigma_max == pytest.approx(14.614647, abs=1e-6)
    assert NOISE.sigma_min == pytest.approx(0.029168, abs=1e-6)


def test_zero_terminal_snr_ends_at_4096() -> None:
    assert NoiseSchedule(replace(SD, zero_terminal_snr=True)).sigma_max == pytest.approx(4096.0)


def test_timestep_and_sigma_are_inverse() -> None:
    whole = np.arange(1000)
    np.testing.assert_allclose(NOISE.timestep(NOISE.sigma(whole)), whole, atol=1e-3)
    assert NOISE.timestep(1e-9) == 0.0
    assert NOISE.timestep(1e9) == 999.0
    np.testing.assert_allclose(
        NOISE.timestep(np.exp(NOISE.log_sigma([0.5, 500.25]))), [0.5, 500.25], atol=1e-3
    )


@pytest.mark.parametrize(
    ("name", "steps", "convention", "first", "last"),
    [
        ("leading", 30, SIGMA, [958, 925, 892], 1),
        ("linspace", 30, SIGMA, [999], 0),
        ("trailing", 30, SIGMA, [999, 966, 932], 32),
        ("trailing", 20, SIGMA, [999, 949, 899], 49),
        ("leading", 50, GRID, [981, 961, 941], 1),
        ("leading", 30, GRID, [958, 925], 1),
        ("leading", 50, PLMS_GRID, [981, 961, 961, 941], 1),
        ("linspace", 20, MULTISTEP, [999, 949, 899], 50),
        ("karras", 20, MULTISTEP, [999, 962, 921], 0),
        ("trailing", 1, SIGMA, [999], 999),
        ("trailing", 4, SIGMA, [999, 749, 499, 249], 249),
        ("leading", 4, DISTILLED, [999, 759, 499, 259], 259),
        ("simple", 20, SIGMA, [999, 949, 899], 49),
        ("normal", 4, SIGMA, [999, 666, 333, 0], 0),
        ("sgm_uniform", 4, SIGMA, [999, 749.25, 499.5, 249.75], 249.75),
    ],
)
def test_timesteps(name: str, steps: int, convention: Convention, first: list[float], last: float) -> None:
    plan = plan_schedule(name, steps, NOISE, convention)
    np.testing.assert_allclose(plan.timesteps[: len(first)], first, atol=1e-9)
    assert plan.timesteps[-1] == pytest.approx(last, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "steps", "convention", "first", "last"),
    [
        ("leading", 30, SIGMA, [11.4769], 0.0413),
        ("linspace", 30, SIGMA, [14.6146], 0.0292),
        ("leading_karras", 20, SIGMA, [11.03], 0.0413),
        ("karras", 20, SIGMA, [14.6146], 0.0292),
        ("leading_karras", 20, MULTISTEP, [14.6146], 0.02917),
        ("trailing", 4, SIGMA, [14.6146, 4.0817, 1.6129, 0.6932], 0.6932),
        (
            "kl_optimal",
            5,
            SIGMA,
            [14.6146, math.tan((3 * math.atan(14.6146) + math.atan(0.029168)) / 4)],
            0.0292,
        ),
        ("ays", 10, SIGMA, [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399], 0.152),
    ],
)
def test_sigmas(name: str, steps: int, convention: Convention, first: list[float], last: float) -> None:
    plan = plan_schedule(name, steps, NOISE, convention)
    np.testing.assert_allclose(plan.sigmas[: len(first)], first, atol=6e-4, rtol=3e-4)
    assert plan.sigmas[-2] == pytest.approx(last, abs=1e-4)
    assert plan.sigmas[-1] == 0.0


def test_ays_depends_on_the_family_and_resamples_log_linearly() -> None:
    assert plan_schedule("ays", 10, NOISE, family="sdxl").sigmas[1] == pytest.approx(6.315)
    twenty = plan_schedule("ays", 20, NOISE).sigmas
    np.testing.assert_allclose(twenty[:-1:2], plan_schedule("ays", 10, NOISE).sigmas[:-1])
    assert twenty[1] == pytest.approx((14.615 * 6.475) ** 0.5)


def test_beta_quantile_equals_scipy() -> None:
    p = np.linspace(0, 1, 101)
    np.testing.assert_allclose(
        module._beta_quantile(p), scipy.stats.beta.ppf(p, 0.6, 0.6), rtol=1e-9, atol=1e-12
    )


def test_explicit_sigmas_replace_name_and_steps() -> None:
    plan = plan_schedule("karras", 99, NOISE, sigmas=[5.0, 1.0, 0.2])
    np.testing.assert_array_equal(plan.sigmas, [5.0, 1.0, 0.2, 0.0])
    assert plan.spacing is None


@pytest.mark.parametrize("convention", [SIGMA, MULTISTEP, GRID, PLMS_GRID])
@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_descend_to_zero(name: str, convention: Convention) -> None:
    for steps in (1, 2, 3, 7, 49, 100, 333):
        plan = plan_schedule(name, steps, NOISE, convention)
        steady = plan.sigmas if not convention.doubled else np.unique(plan.sigmas)[::-1]
        assert (np.diff(steady) < 0).all()
        assert len(steady) == steps + 1
        assert plan.sigmas[-1] == 0.0


def test_errors() -> None:
    with pytest.raises(InvalidRequest, match="allowed is one of leading, linspace"):
        plan_schedule("karas", 20, NOISE)
    with pytest.raises(InvalidRequest, match=r"1\.\.1000"):
        plan_schedule("karras", 1001, NOISE)
    with pytest.raises(InvalidRequest, match=r"1\.\.50"):
        plan_schedule("leading", 51, NOISE, DISTILLED)
    with pytest.raises(InvalidRequest, match="share noise levels"):
        plan_schedule("leading", 1000, NOISE, GRID)
