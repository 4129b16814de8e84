"""Solvers: each turns a `Schedule` into table rows, one row per network evaluation. One-step solvers here.

Everything is written in sigma space: x = x0 + sigma * noise and D is the denoised estimate at x, so that
(x - D) / sigma is the noise estimate eps. A step of every solver is a linear combination of x, a saved x,
D, earlier entries and noise; `samplers.py` says what the engine does with a row. `begin` is the first step
that is executed: histories are empty there, whatever comes before in the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from .schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One network evaluation at noise level `sigma`, told `timestep`, that belongs to sampler step `step`.

    The other numbers are the coefficients of the update; `save` keeps the x from before it as `base`.
    """

    step: int
    sigma: float
    timestep: float
    x: float = 0.0
    base: float = 0.0
    d: float = 0.0
    h1: float = 0.0
    h2: float = 0.0
    h3: float = 0.0
    noise: float = 0.0
    prev_noise: float = 0.0
    push_x: float = 0.0
    push_d: float = 0.0
    save: bool = False


Solver = Callable[[Schedule, int, float], Iterator[Row]]
"""(schedule, begin, eta) -> rows; a solver without randomness ignores eta."""


def row(s: Schedule, i: int, *, save: bool = False, **weights: float) -> Row:
    """The row that evaluates the network at entry `i` of the schedule."""
    return Row(step=i, sigma=float(s.sigmas[i]), timestep=float(s.timesteps[i]), save=save, **weights)


def middle_row(s: Schedule, i: int, sigma: float, **weights: float) -> Row:
    """The second row of step `i`, at a noise level between two entries of the schedule."""
    return Row(step=i, sigma=sigma, timestep=float(s.noise.timestep(sigma)), save=False, **weights)


def levels(s: Schedule, begin: int) -> Iterator[tuple[int, float, float]]:
    """(step, noise level, next noise level) for the executed steps."""
    for i in range(begin, len(s)):
        yield i, float(s.sigmas[i]), float(s.sigmas[i + 1])


def ancestral(sigma: float, target: float, eta: float) -> tuple[float, float]:
    """Split a step to `target` into one down to a lower level and fresh noise: (lower level, noise added).

    eta 1 is the DDPM posterior, 0 no noise (Song et al. 2020, equation 16, in sigma space).
    """
    share = (target / sigma) ** 2
    down = target * math.sqrt(1 - eta**2 + eta**2 * share)  # = sqrt(target^2 - up^2) without cancellation
    return down, eta * target * math.sqrt(max(1 - share, 0.0))


def first_order(s: Schedule, begin: int, eta: float) -> Iterator[Row]:
    """Euler, Euler a, DDIM and DDPM are one update; eta and the convention of the schedule tell them apart.

    Ho et al. 2020 (DDPM), Song et al. 2020 (DDIM), Karras et al. 2022 (Euler); diffusers' four classes.
    """
    for i, sigma, _ in levels(s, begin):
        target = float(s.targets[i])
        down, up = ancestral(sigma, target, eta)
        scale, ratio = s.relabel(i, target), down / sigma
        yield row(s, i, x=scale * ratio, d=scale * (1 - ratio), noise=scale * up)


def heun(s: Schedule, begin: int, eta: float) -> Iterator[Row]:
    """Karras et al. 2022, algorithm 1 without churn; HeunDiscreteScheduler."""
    for i, sigma, target in levels(s, begin):
        ratio = target / sigma
        if target == 0.0:
            yield row(s, i, d=1.0)
            continue
        yield row(s, i, x=ratio, d=1 - ratio, push_x=1 / sigma, push_d=-1 / sigma, save=True)
        half = (target - sigma) / 2
        second = row(s, i + 1, base=1.0, h1=half, x=half / target, d=-half / target)
        yield replace(second, step=i)


def dpm2(s: Schedule, begin: int, eta: float) -> Iterator[Row]:
    """Karras et al. 2022, algorithm 2, midpoint in log sigma; KDPM2(Ancestral)DiscreteScheduler."""
    for i, sigma, target in levels(s, begin):
        if target == 0.0:
            yield row(s, i, d=1.0)
            continue
        down, up = ancestral(sigma, target, eta)
        middle = math.sqrt(sigma * down)
        slope = (down - sigma) / middle
        yield row(s, i, x=middle / sigma, d=1 - middle / sigma, save=True)
        yield middle_row(s, i, middle, base=1.0, x=slope, d=-slope, noise=up)


def dpmpp_2s_ancestral(s: Schedule, begin: int, eta: float) -> Iterator[Row]:
    """Lu et al. 2022 (DPM-Solver++ 2S) with ancestral noise; k-diffusion's sampler, diffusers has no twin."""
    for i, sigma, target in levels(s, begin):
        if target == 0.0:
            yield row(s, i, d=1.0)
            continue
        down, up = ancestral(sigma, target, eta)
        middle = math.sqrt(sigma * down)
        yield row(s, i, x=middle / sigma, d=1 - middle / sigma, save=True)
        yield middle_row(s, i, middle, base=down / sigma, d=1 - down / sigma, noise=up)


def dpmpp_sde(s: Schedule, begin: int, eta: float) -> Iterator[Row]:
    """Lu et al. 2022 (DPM-Solver++ SDE), midpoint in log sigma; DPMSolverSDEScheduler.

    The noise of the second evaluation is the Brownian increment over the whole step, of which the first
    evaluation has already seen the part down to the midpoint: hence `prev_noise`.
    """
    for i, sigma, target in levels(s, begin):
        if target == 0.0:
            yield row(s, i, d=1.0)
            continue
        middle = math.sqrt(sigma * target)
        down, up = ancestral(sigma, middle, eta)
        yield row(s, i, x=down / sigma, d=1 - down / sigma, noise=up, save=True)
        down, up = ancestral(sigma, target, eta)
        seen = (sigma - middle) / (sigma - target)
        yield middle_row(
            s,
            i,
            middle,
            base=down / sigma,
            d=1 - down / sigma,
            prev_noise=up * math.sqrt(seen),
            noise=up * math.sqrt(1 - seen),
        )


def dpmpp_2s(s: Schedule, begin: int, eta: float) -> Iterator[Row]:
    """Lu et al. 2022, algorithm 1 (DPM-Solver++ 2S); DPMSolverSinglestepScheduler of order 2.

    The midpoints are entries of the schedule: even entries take a first-order step, odd ones redo it from
    the saved x at second order. The last step is of first order.
    """
    for i, sigma, target in levels(s, begin):
        if i % 2 == 0 or i in (begin, len(s) - 1):
            yield row(s, i, x=target / sigma, d=1 - target / sigma, push_d=1.0, save=True)
            continue
        start = float(s.sigmas[i - 1])
        ratio = target / start
        weight = 0.5 * (1 - ratio) * math.log(start / target) / math.log(start / sigma)
        yield row(s, i, base=ratio, d=weight, h1=1 - ratio - weight)


def lcm(s: Schedule, begin: int, eta: float) -> Iterator[Row]:
    """Luo et al. 2023 (latent consistency models); LCMScheduler with timestep_scaling 10, sigma_data 0.5."""
    for i, sigma, target in levels(s, begin):
        scaled = 10.0 * float(s.timesteps[i])
        skip = 0.25 / (scaled**2 + 0.25)
        out = scaled / math.sqrt(scaled**2 + 0.25)
        yield row(s, i, x=skip / math.sqrt(1 + sigma**2), d=out, noise=target)


def tcd(s: Schedule, begin: int, eta: float) -> Iterator[Row]:
    """Zheng et al. 2024 (trajectory consistency distillation), eta is their gamma; TCDScheduler.

    A step goes down to the level of timestep `floor((1 - eta) * next timestep)` and adds noise up to the
    next level; the last goes to timestep 0.
    """
    for i, sigma, target in levels(s, begin):
        if i + 1 == len(s):
            down = min(s.noise.sigma_min, sigma)
            up, scale = 0.0, s.relabel(i, down)
        else:
            lower = float(s.noise.sigma(math.floor((1 - eta) * float(s.timesteps[i + 1]))))
            down = min(lower, target) if eta > 0 else target
            up, scale = math.sqrt(target**2 - down**2), 1.0
        ratio = down / sigma
        yield row(s, i, x=scale * ratio, d=scale * (1 - ratio), noise=up)
