"""A sampler is a table: `build_table` turns a name and a schedule into the coefficients of every update.

The engine keeps, per image: x, the latent in sigma space (x = x0 + sigma * noise); `base`, a saved x; the
last three pushed entries h1, h2, h3, newest first; and the noise drawn last. One row is one evaluation of
the network, which yields D (`denoised`) at x. Then the engine does exactly this, whatever the sampler:

    noise = a fresh draw from the image's own generator if `draws`
    entry = push_x * x + push_d * D
    x, base = (x * COLUMNS.x + base * COLUMNS.base + D * COLUMNS.d + h1 * COLUMNS.h1 + h2 * COLUMNS.h2
               + h3 * COLUMNS.h3 + noise * COLUMNS.noise + previous noise * COLUMNS.prev_noise),
              (the x from before this update if `saves` else base)
    h1, h2, h3 = (entry, h1, h2) if `pushes` else (h1, h2, h3)

(`COLUMNS.x` stands for that column of `coefficients`.) base, history and previous noise start as zeros;
no row reads one that was not written in the same table. Solvers of two evaluations a step take two rows.

Text-to-image starts from `init_scale * noise`; image-to-image from `x0 + sigmas[0] * noise`. The network is
fed x / sqrt(1 + sigma^2) and told `timesteps`. Where diffusers' variance-preserving schedulers end on a
noise level above 0 (DDIM, PNDM, DEIS, TCD), the last row contains the scale of their result, so that the
last x is the finished latent in all samplers. A table cut short by `denoising_end` ends with x in sigma
space at `final_sigma`, which is how a second table takes over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..config import NoiseConfig
from ..errors import InvalidRequest
from . import multistep, solvers
from .sampler_names import resolve_sampler, resolve_schedule
from .schedule import (
    ANCESTRAL_GRID,
    DISTILLED,
    GRID,
    MULTISTEP,
    MULTISTEP_LOW,
    PLMS_GRID,
    SIGMA,
    SIGMA_ROUNDED,
    Convention,
    Floats,
    NoiseSchedule,
    Schedule,
    plan_schedule,
)
from .solvers import Row, Solver

COLUMNS = ("x", "base", "d", "h1", "h2", "h3", "noise", "prev_noise", "push_x", "push_d")
"""The columns of `SamplerTable.coefficients`, fields of `Row`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """A solver, how its family reads schedules, and what it does when a request leaves things open.

    Attributes:
        solver: makes the rows.
        convention: how schedule names are read.
        eta: the default stochasticity in [0, 1]; None where the solver has no randomness to scale.
        preserves_variance: text-to-image starts at variance 1 + sigma^2 whatever the schedule, as in
            diffusers' schedulers that work on x / sqrt(1 + sigma^2).
    """

    solver: Solver
    convention: Convention
    eta: float | None = None
    preserves_variance: bool = False


def _sigma(solver: Solver, eta: float | None = None, convention: Convention = SIGMA) -> Sampler:
    return Sampler(solver=solver, convention=convention, eta=eta)


def _vp(solver: Solver, convention: Convention = MULTISTEP, eta: float | None = None) -> Sampler:
    return Sampler(solver=solver, convention=convention, eta=eta, preserves_variance=True)


SAMPLERS: dict[str, Sampler] = {
    "euler": _sigma(solvers.first_order),
    "euler_ancestral": _sigma(solvers.first_order, 1.0),
    "heun": _sigma(solvers.heun),
    "dpm2": _sigma(solvers.dpm2, convention=SIGMA_ROUNDED),
    "dpm2_ancestral": _sigma(solvers.dpm2, 1.0, SIGMA_ROUNDED),
    "lms": _sigma(multistep.lms),
    "dpmpp_2s": _vp(solvers.dpmpp_2s),
    "dpmpp_2s_ancestral": _sigma(solvers.dpmpp_2s_ancestral, 1.0),
    "dpmpp_sde": _sigma(solvers.dpmpp_sde, 1.0),
    "dpmpp_2m": _vp(multistep.dpmpp_2m),
    "dpmpp_2m_sde": _vp(multistep.dpmpp_2m, eta=1.0),
    "dpmpp_3m_sde": _vp(multistep.dpmpp_3m_sde, eta=1.0),
    "ddim": _vp(solvers.first_order, GRID, 0.0),
    "ddpm": _vp(solvers.first_order, ANCESTRAL_GRID, 1.0),
    "pndm": _vp(multistep.plms, PLMS_GRID),
    "unipc": _vp(multistep.unipc),
    "deis": _vp(multistep.deis, MULTISTEP_LOW),
    "lcm": _vp(solvers.lcm, DISTILLED),
    "tcd": _vp(solvers.tcd, DISTILLED, 0.3),
}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SamplerTable:
    """All that the engine needs to sample one image; K rows, one network evaluation each.

    Attributes:
        sampler, schedule: canonical names; schedule is "sigmas" for an explicit list.
        sigmas: [K] noise level of x when the network sees it.
        timesteps: [K] what the network is told, fractional, in [0, T-1].
        coefficients: [K, len(COLUMNS)] float64.
        pushes, saves, draws: [K] bool, what the row does besides the update.
        step: [K] int, the sampler step a row belongs to, from 0; `steps` of them in all.
        steps: sampler steps in this table (after strength and cuts), at least 1.
        init_scale: text-to-image starts from this times unit noise.
        final_sigma: noise level of the last x; 0 but for a table cut by `denoising_end`.
    """

    sampler: str
    schedule: str
    sigmas: Floats
    timesteps: Floats
    coefficients: Floats
    pushes: NDArray[np.bool_]
    saves: NDArray[np.bool_]
    draws: NDArray[np.bool_]
    step: NDArray[np.int64]
    steps: int
    init_scale: float
    final_sigma: float

    def __len__(self) -> int:
        return len(self.sigmas)


def build_table(
    sampler: str,
    schedule: str | None,
    steps: int,
    noise: NoiseConfig | NoiseSchedule,
    *,
    eta: float | None = None,
    sigmas: Sequence[float] | None = None,
    strength: float | None = None,
    denoising_start: float | None = None,
    denoising_end: float | None = None,
    family: str = "sd1",
) -> SamplerTable:
    """The table of one image.

    Args:
        sampler: any name `resolve_sampler` knows; a schedule in it ("DPM++ 2M Karras") wins over `schedule`.
        schedule: any name `resolve_schedule` knows; None takes the default of the sampler's diffusers class.
        steps: steps of the whole schedule, before strength and cuts.
        noise: the model's training schedule.
        eta: stochasticity in [0, 1]; None takes the sampler's default. Samplers without any ignore it.
        sigmas: explicit descending noise levels instead of schedule and steps; a final 0 is implied.
        strength: image-to-image; the last `min(int(steps * strength), steps)` steps run, as in diffusers.
        denoising_start: run the steps whose timestep is below `round(T - start * T)`; replaces strength.
        denoising_end: run the steps whose timestep is at least `round(T - end * T)`. Steps of two
            evaluations are taken or left whole, by the timestep of the first (diffusers cuts between rows,
            after the first evaluation of a step which the second model then repeats).
        family: the model's family; selects the table of the `ays` schedule.

    Raises:
        InvalidRequest: an unknown name, an impossible number of steps, or nothing left to run.
    """
    name, wanted = resolve(sampler, schedule)
    kind = SAMPLERS[name]
    noise = noise if isinstance(noise, NoiseSchedule) else NoiseSchedule(noise)
    plan = plan_schedule(wanted, steps, noise, kind.convention, sigmas=sigmas, family=family)
    count = steps if sigmas is None else len(sigmas)
    begin, end = _executed(plan, count, strength, denoising_start, denoising_end)
    rows = [r for r in kind.solver(plan, begin, _eta(kind, eta)) if r.step < end]
    levels, times, coefficients = _assemble(rows)
    column = dict(zip(COLUMNS, coefficients.T, strict=True))
    first = float(plan.sigmas[begin])
    unit = kind.preserves_variance or plan.spacing == "leading"
    return SamplerTable(
        sampler=name,
        schedule="sigmas" if sigmas is not None else wanted or kind.convention.spacing,
        sigmas=levels,
        timesteps=times,
        coefficients=coefficients,
        pushes=(column["push_x"] != 0) | (column["push_d"] != 0),
        saves=np.array([r.save for r in rows]),
        draws=column["noise"] != 0,
        step=np.array([r.step - begin for r in rows]),
        steps=end - begin,
        init_scale=float(np.sqrt(1.0 + first**2)) if unit else first,
        final_sigma=float(plan.sigmas[end]),
    )


def resolve(sampler: str, schedule: str | None) -> tuple[str, str | None]:
    """The canonical names of both; a schedule in the sampler's name wins, None stays None.

    Raises:
        InvalidRequest: an unknown name.
    """
    name, implied = resolve_sampler(sampler)
    return name, implied or (resolve_schedule(schedule, name) if schedule is not None else None)


def _eta(kind: Sampler, eta: float | None) -> float:
    if eta is not None and not 0.0 <= eta <= 1.0:
        raise InvalidRequest("eta", f"got {eta}, allowed is [0, 1]")
    if kind.eta is None:
        return 0.0
    return kind.eta if eta is None else float(eta)


def _executed(
    plan: Schedule, steps: int, strength: float | None, start: float | None, end: float | None
) -> tuple[int, int]:
    """The half-open range of entries of the schedule that run."""
    first, last = 0, len(plan)
    if start is not None:
        first = _above(plan, start)
    elif strength is not None:
        run = min(int(steps * strength), steps)
        if run < 1:
            raise InvalidRequest(
                "strength", f"{strength} of {steps} steps leaves none to run, allowed is more"
            )
        first = steps - run
    if end is not None:
        last = _above(plan, end)
    if first >= last:
        raise InvalidRequest(
            "denoising_start" if end is None else "denoising_end",
            f"no step of {len(plan)} lies between start {start or 0.0} and end {1.0 if end is None else end}",
        )
    return first, last


def _above(plan: Schedule, share: float) -> int:
    """How many entries lie in the first `share` of the schedule, by timestep value."""
    train_steps = plan.noise.train_steps
    return int((plan.timesteps >= round(train_steps - share * train_steps)).sum())


def _assemble(rows: list[Row]) -> tuple[Floats, Floats, Floats]:
    """sigmas [K], timesteps [K] and coefficients [K, len(COLUMNS)] of the rows, read-only."""
    arrays = (
        np.array([r.sigma for r in rows]),
        np.array([r.timestep for r in rows]),
        np.array([[getattr(r, name) for name in COLUMNS] for r in rows]),
    )
    for array in arrays:
        array.setflags(write=False)
    return arrays
