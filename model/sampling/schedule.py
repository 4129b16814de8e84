"""Noise schedules: which noise levels (sigmas) a sampler visits, and what timestep the network is told.

Everything is float64 numpy, and a noise level is the sigma of `noise.py`. A schedule name is one of

    leading, linspace, trailing    evenly spaced training timesteps (diffusers' `timestep_spacing`)
    karras, exponential, beta      a curve between two noise levels; `leading_karras` and the like take the
                                   ends of that spacing, plain `karras` those of linspace
    normal, sgm_uniform, simple    k-diffusion's and ComfyUI's evenly spaced timesteps
    ays                            Align Your Steps (Sabour et al. 2024), an optimised table
    kl_optimal                     equal steps of arctan(sigma) (the same paper, theorem 3.1)

diffusers' scheduler classes read the same name differently. Those differences belong to a family of
samplers, and each family is one documented `Convention`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import InvalidRequest
from .noise import Floats as Floats
from .noise import NoiseSchedule as NoiseSchedule

Rounding = Callable[[Floats], Floats]

SPACINGS = ("leading", "linspace", "trailing")
CURVES = ("karras", "exponential", "beta")
GRIDS = ("normal", "sgm_uniform", "simple", "ays", "kl_optimal")
SCHEDULES = (*SPACINGS, *CURVES, *(f"{s}_{c}" for s in ("leading", "trailing") for c in CURVES), *GRIDS)

STEPS_OFFSET = 1
"""`leading` counts from timestep 1, as every Stable Diffusion scheduler config says (`steps_offset`)."""
DISTILLED_STEPS = 50
"""LCM and TCD are distilled on this many evenly spaced timesteps and can visit no others."""

AYS_SIGMAS = {
    "sd1": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Convention:
    """How a family of diffusers' scheduler classes reads a schedule name.

    Attributes:
        spacing: the class's own default.
        drop_last: spacings (but not trailing) divide the range into steps + 1 points and leave out the
            lowest.
        whole: the timesteps of a spacing are rounded to integers.
        full_range: a curve runs between the ends of the training table, not between those of the spacing.
        rounding: what happens to the timesteps of a curve, by curve; fractional where nothing is named.
        aims_low: the last step aims at the lowest training noise level instead of 0.
        strided: on a spacing, a step aims `T // steps` timesteps lower, which is the next entry of the list
            for leading but need not be for linspace and trailing; the last aims at the lowest noise level
            (`set_alpha_to_one=False`).
        doubled: the second entry is visited twice (PLMS has no history yet and starts with a Heun step).
        distilled: every spacing means an even choice of the distilled timesteps (LCM, TCD).
    """

    spacing: str = "linspace"
    drop_last: bool = False
    whole: bool = False
    full_range: bool = False
    rounding: Mapping[str, Rounding] = field(default_factory=dict)
    aims_low: bool = False
    strided: bool = False
    doubled: bool = False
    distilled: bool = False


_MULTISTEP_ROUNDING: dict[str, Rounding] = {"karras": np.round, "exponential": np.floor, "beta": np.floor}

SIGMA = Convention()
"""Euler, Heun, LMS, DPM++ SDE: fractional timesteps everywhere."""
SIGMA_ROUNDED = Convention(rounding={"karras": np.round})
"""DPM2 and DPM2 a: as Euler, but Karras timesteps are rounded."""
MULTISTEP = Convention(drop_last=True, whole=True, full_range=True, rounding=_MULTISTEP_ROUNDING)
"""DPM++ 2M and its SDE forms, DPM++ 2S, UniPC."""
MULTISTEP_LOW = Convention(
    drop_last=True, whole=True, full_range=True, rounding=_MULTISTEP_ROUNDING, aims_low=True
)
"""DEIS, which cannot divide by a noise level of 0."""
ANCESTRAL_GRID = Convention(spacing="leading", whole=True, full_range=True)
"""DDPM: each step aims at the next timestep of the list, the last at 0."""
GRID = Convention(spacing="leading", whole=True, full_range=True, strided=True)
"""DDIM."""
PLMS_GRID = Convention(spacing="leading", whole=True, full_range=True, strided=True, doubled=True)
"""PNDM with `skip_prk_steps`: one more evaluation than steps."""
DISTILLED = Convention(spacing="leading", whole=True, full_range=True, distilled=True)
"""LCM and TCD."""


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """The noise levels one sampler visits.

    Attributes:
        noise: the training schedule behind it.
        spacing: the spacing behind it, or None; it decides the scale of the initial noise.
        sigmas: [M + 1] where the network is evaluated, descending (PLMS: one repeated), then 0.
        timesteps: [M] what the network is told, in [0, T-1].
        targets: [M] the noise level each step aims at: `sigmas[1:]` but for strided and low-aiming families.
        stride: training timesteps per step on a strided spacing, else None.
    """

    noise: NoiseSchedule
    spacing: str | None
    sigmas: Floats
    timesteps: Floats
    targets: Floats
    stride: int | None

    def __len__(self) -> int:
        return len(self.timesteps)

    def relabel(self, index: int, target: float) -> float:
        """What x is multiplied with after step `index` that aimed at `target`.

        Variance-preserving samplers hand `x / sqrt(1 + sigma^2)` on to the next step whatever its noise
        level is, and out as the result. In sigma space that is a factor; 1 where target and next level agree.
        """
        return float(np.sqrt((1.0 + self.sigmas[index + 1] ** 2) / (1.0 + target**2)))


def plan_schedule(
    name: str | None,
    steps: int,
    noise: NoiseSchedule,
    convention: Convention = SIGMA,
    *,
    sigmas: Sequence[float] | None = None,
    family: str = "sd1",
) -> Schedule:
    """The noise levels of `steps` steps.

    Args:
        name: one of `SCHEDULES`; None takes the convention's own spacing.
        steps: at least 1; ignored when `sigmas` are given.
        noise: the model's training schedule.
        convention: how the sampler's family reads the name.
        sigmas: explicit descending positive noise levels that replace name and steps; a final 0 is implied.
        family: selects the table of `ays`; everything but SDXL takes that of SD1.

    Raises:
        InvalidRequest: an unknown name, or more steps than there are distinct noise levels.
    """
    name = name or convention.spacing
    if name not in SCHEDULES:
        raise InvalidRequest("schedule", f"got {name!r}, allowed is one of {', '.join(SCHEDULES)}")
    if sigmas is not None:
        spacing, curve, steps = None, None, len(sigmas)
        levels = np.asarray(sigmas, dtype=np.float64)
        times = noise.timestep(levels)
    elif name in GRIDS:
        _check_steps(steps, noise.train_steps)
        spacing, curve = None, None
        levels, times = _grid(name, steps, noise, family)
    else:
        _check_steps(steps, DISTILLED_STEPS if convention.distilled else noise.train_steps)
        spacing, curve = _split(name)
        times = _spaced(spacing, steps, noise.train_steps, convention)
        levels = noise.sigma(times)
        if curve is not None:
            ends = (noise.sigma_max, noise.sigma_min) if convention.full_range else (levels[0], levels[-1])
            levels = _curve(curve, steps, *ends)
            times = convention.rounding.get(curve, np.asarray)(noise.timestep(levels))
    if not np.isfinite(levels).all() or not (levels[-1:] > 0.0).any() or (np.diff(levels) >= 0.0).any():
        if sigmas is not None:
            raise InvalidRequest("sigmas", f"got {sigmas}, allowed are descending positive numbers")
        raise InvalidRequest("steps", f"{steps} steps of {name!r} share noise levels, allowed are fewer")
    return _assemble(noise, spacing, curve, levels, times, convention)


def _assemble(
    noise: NoiseSchedule,
    spacing: str | None,
    curve: str | None,
    levels: Floats,
    times: Floats,
    how: Convention,
) -> Schedule:
    """Append the end, double an entry and find the targets, as the convention says."""
    stride = noise.train_steps // len(times) if how.strided and spacing and curve is None else None
    if how.doubled and len(times) > 1:
        levels, times = (np.insert(values, 1, values[1]) for values in (levels, times))
    if stride is not None:
        targets = noise.sigma(times - stride)
    else:
        targets = np.append(levels[1:], noise.sigma_min if how.aims_low and spacing else 0.0)
    return Schedule(noise, spacing, np.append(levels, 0.0), times, targets, stride)


def _split(name: str) -> tuple[str, str | None]:
    """`leading_karras` -> (leading, karras), `karras` -> (linspace, karras), `leading` -> (leading, None)."""
    head, _, tail = name.rpartition("_")
    if tail in CURVES:
        return head or "linspace", tail
    return name, None


def _check_steps(steps: int, most: int) -> None:
    if not 1 <= steps <= most:
        raise InvalidRequest("steps", f"got {steps}, allowed is 1..{most} with this sampler")


def _spaced(spacing: str, steps: int, train_steps: int, how: Convention) -> Floats:
    """[steps] descending training timesteps of a spacing."""
    if how.distilled:
        apart = train_steps // DISTILLED_STEPS
        indices = np.floor(np.linspace(0, DISTILLED_STEPS, steps, endpoint=False))
        return np.asarray((DISTILLED_STEPS - indices) * apart - 1)
    if spacing == "trailing":
        return np.asarray(np.round(train_steps - np.arange(steps) * (train_steps / steps)) - 1)
    points = steps + how.drop_last
    if spacing == "leading":
        rising = np.arange(points) * float(train_steps // points) + STEPS_OFFSET
    else:
        rising = np.linspace(0, train_steps - 1, points)
        rising = np.round(rising) if how.whole else rising
    return np.asarray(rising[::-1][:steps])


def _curve(name: str, steps: int, high: float, low: float) -> Floats:
    """[steps] noise levels from `high` down to `low`, both included."""
    ramp = np.linspace(0.0, 1.0, steps)
    if name == "karras":  # Karras et al. 2022, equation 5, rho = 7
        root = high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))
        return np.asarray(root**7)
    if name == "exponential":
        return np.asarray(np.exp(np.log(high) + ramp * (np.log(low) - np.log(high))))
    return np.asarray(low + _beta_quantile(1.0 - ramp) * (high - low))


def _grid(name: str, steps: int, noise: NoiseSchedule, family: str) -> tuple[Floats, Floats]:
    """[steps] noise levels and timesteps of the schedules that do not depend on the sampler's family."""
    top = noise.train_steps - 1
    if name == "ays":
        table = np.log(AYS_SIGMAS["sdxl" if family.startswith("sdxl") else "sd1"])
        where = np.linspace(0, len(table) - 1, steps + 1)[:-1]  # the lowest level gives way to 0
        levels = np.exp(np.interp(where, np.arange(len(table)), table))
        return levels, noise.timestep(levels)
    if name == "kl_optimal":
        angles = np.linspace(np.arctan(noise.sigma_max), np.arctan(noise.sigma_min), steps)
        levels = np.tan(angles)
        return levels, noise.timestep(levels)
    if name == "normal":
        times = np.linspace(top, 0, steps)
    elif name == "sgm_uniform":
        times = np.linspace(top, 0, steps + 1)[:-1]
    else:
        times = top - np.floor(np.arange(steps) * (noise.train_steps / steps))
    return np.exp(noise.log_sigma(times)), times


def _beta_quantile(p: Floats, shape: float = 0.6) -> Floats:
    """Quantiles of the symmetric Beta(shape, shape) distribution, by bisection of its power series."""
    order = np.arange(1, 64)
    terms = np.cumprod(np.append(1.0, (order - shape) / order)) / (shape + np.append(0, order))

    def mass(x: Floats) -> Floats:  # proportional to P(X <= x); the series converges for x <= 1/2
        return np.asarray(x**shape * np.polynomial.polynomial.polyval(x, terms))

    tail = np.minimum(p, 1.0 - p)
    low, high = np.zeros_like(tail), np.full_like(tail, 0.5)
    wanted = 2.0 * tail * mass(high)
    for _ in range(60):
        middle = (low + high) / 2
        below = mass(middle) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    quantile = np.where(tail == 0.0, 0.0, (low + high) / 2)
    return np.where(p > 0.5, 1.0 - quantile, quantile)
