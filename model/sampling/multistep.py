"""Multistep solvers: rows that use the entries earlier rows pushed (`h1` is the newest).

Written like `solvers.py`. LMS, PLMS and DEIS push noise estimates, the DPM-Solver++ family and UniPC push D.
`lam` below is log(1 / sigma), the half log signal-to-noise ratio.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from .schedule import Schedule
from .solvers import Row, levels, row

Linear = tuple[float, float]
"""Weights of (x, D) that make a quantity of the current evaluation."""


def lms(s: Schedule, begin: int, eta: float) -> Iterator[Row]:
    """Linear multistep of order up to 4 in sigma (k-diffusion's LMS); LMSDiscreteScheduler.

    An image-to-image run starts at order 1, as in k-diffusion. diffusers takes the coefficients of order
    `step_index + 1` there although its history is empty, so that they do not add up to the step.
    """
    points, weights = np.polynomial.legendre.leggauss(2)  # exact for the cubics of order 4
    for i, sigma, target in levels(s, begin):
        known = s.sigmas[i - min(i - begin, 3) : i + 1][::-1]
        tau = sigma + (target - sigma) * (points + 1) / 2
        step = [0.0] * 4
        for k, level in enumerate(known):
            others = np.delete(known, k)
            basis = np.prod((tau[:, None] - others) / (level - others), axis=1)
            step[k] = float(weights @ basis) * (target - sigma) / 2
        slope = 1 / sigma
        yield row(
            s,
            i,
            x=1 + step[0] * slope,
            d=-step[0] * slope,
            h1=step[1],
            h2=step[2],
            h3=step[3],
            push_x=slope,
            push_d=-slope,
        )


ADAMS_BASHFORTH = (
    (1.0, 0.0, 0.0, 0.0),
    (3 / 2, -1 / 2, 0.0, 0.0),
    (23 / 12, -16 / 12, 5 / 12, 0.0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def plms(s: Schedule, begin: int, eta: float) -> Iterator[Row]:
    """Liu et al. 2022 (PNDM) without Runge-Kutta steps; PNDMScheduler with `skip_prk_steps`.

    The first step is made twice: to the second entry, then again from the saved x with the mean of both
    slopes. As in diffusers the history holds what the network predicts, so v stays v, and an
    image-to-image run doubles its own first step but not its entry of the schedule, which leaves x one
    entry behind from there on.
    """
    predicts_v = s.noise.config.prediction_type == "v_prediction"
    for i, sigma, _ in levels(s, begin):
        repeats = i == begin + 1
        start, target = (_repeated_from(s, begin), sigma) if repeats else (sigma, float(s.targets[i]))
        weights = (1 / 2, 1 / 2, 0.0, 0.0) if repeats else ADAMS_BASHFORTH[min(max(i - begin - 1, 0), 3)]
        output = _network_output(sigma, predicts_v)
        from_x, from_output = _noise_estimate(start, predicts_v)
        scale = s.relabel(i, target)
        step = scale * (target - start)
        keep = scale + step * from_x
        now, h1, h2, h3 = (step * from_output * w for w in weights)
        if repeats:
            held = math.sqrt((1 + start**2) / (1 + float(s.sigmas[begin]) ** 2))
            yield row(s, i, base=held * keep, x=now * output[0], d=now * output[1], h1=h1)
        else:
            yield row(
                s,
                i,
                x=keep + now * output[0],
                d=now * output[1],
                push_x=output[0],
                push_d=output[1],
                h1=h1,
                h2=h2,
                h3=h3,
                save=i == begin,
            )


def _repeated_from(s: Schedule, begin: int) -> float:
    """The noise level that the repeated first step of PLMS starts at: on a grid, one stride above."""
    if s.stride is None:
        return float(s.sigmas[begin])
    return float(s.noise.sigma(s.timesteps[begin + 1] + s.stride))


def _network_output(sigma: float, predicts_v: bool) -> Linear:
    """eps = (x - D) / sigma, or v = (x - (1 + sigma^2) D) / (sigma sqrt(1 + sigma^2)), in (x, D)."""
    if not predicts_v:
        return 1 / sigma, -1 / sigma
    root = math.sqrt(1 + sigma**2)
    return 1 / (root * sigma), -root / sigma


def _noise_estimate(sigma: float, predicts_v: bool) -> Linear:
    """eps in (x, network output): the output, or sigma x / (1 + sigma^2) + v / sqrt(1 + sigma^2)."""
    if not predicts_v:
        return 0.0, 1.0
    return sigma / (1 + sigma**2), 1 / math.sqrt(1 + sigma**2)


def deis(s: Schedule, begin: int, eta: float) -> Iterator[Row]:
    """Zhang and Chen 2022 (DEIS), log-rho polynomial of order 2; DEISMultistepScheduler."""
    last_is_first_order = len(s) < 15
    for i, sigma, _ in levels(s, begin):
        target = float(s.targets[i])
        scale, slope = s.relabel(i, target), 1 / sigma
        now, before = target - sigma, 0.0
        final = i == len(s) - 1 and last_is_first_order
        if i > begin and target > 0.0 and not final:
            earlier = float(s.sigmas[i - 1])
            now = _log_linear(target, sigma, earlier) - _log_linear(sigma, sigma, earlier)
            before = _log_linear(target, earlier, sigma) - _log_linear(sigma, earlier, sigma)
        yield row(
            s,
            i,
            x=scale * (1 + now * slope),
            d=-scale * now * slope,
            h1=scale * before,
            push_x=slope,
            push_d=-slope,
        )


def _log_linear(rho: float, one: float, zero: float) -> float:
    """Antiderivative in rho of the function linear in log(rho) that is 1 at `one` and 0 at `zero`."""
    return rho * (math.log(rho / zero) - 1) / math.log(one / zero)


def _h(sigma: float, target: float) -> float:
    """Step in lam, log(sigma / target); infinite down to noise level 0."""
    return math.log(sigma / target) if target > 0.0 else math.inf


def dpmpp_2m(s: Schedule, begin: int, eta: float) -> Iterator[Row]:
    """Lu et al. 2022 (DPM-Solver++ 2M, midpoint), eta 1 for its SDE; DPMSolverMultistepScheduler.

    Order 1 in the first step, and in the last where noise level 0 leaves no other choice.
    """
    for i, sigma, target in levels(s, begin):
        h = _h(sigma, target)
        gain = -math.expm1(-h * (1 + eta))
        bend = 0.0
        if i > begin and target > 0.0:
            bend = gain / 2 * h / _h(float(s.sigmas[i - 1]), sigma)
        keep = math.exp(-h * (1 + eta))
        yield row(s, i, x=keep, d=gain + bend, h1=-bend, noise=_sde_noise(target, h, eta), push_d=1.0)


def dpmpp_3m_sde(s: Schedule, begin: int, eta: float) -> Iterator[Row]:
    """DPM-Solver++ 3M SDE as in k-diffusion; with eta 0 the three-point solver of Lu et al. 2022.

    Not diffusers' solver_order 3: its SDE form has the sign of one 1/2 in the second-difference term turned,
    so that the term does not vanish with the step. All references give that term half its Taylor weight,
    which is followed: the order is 2, with a small constant.
    """
    for i, sigma, target in levels(s, begin):
        h = _h(sigma, target)
        full = h * (1 + eta)
        gain = -math.expm1(-full)
        first = second = 0.0  # weights of the divided differences (D - h1) and (h1 - h2)
        if i > begin and target > 0.0:
            r0 = _h(float(s.sigmas[i - 1]), sigma) / h
            phi2 = 1 - gain / full
            first = phi2 / r0
            if i > begin + 1:
                r1 = _h(float(s.sigmas[i - 2]), float(s.sigmas[i - 1])) / h
                phi3 = phi2 / full - 0.5
                share = (phi2 * r0 - phi3) / (r0 + r1)
                first, second = (phi2 + share) / r0, -share / r1
        yield row(
            s,
            i,
            x=math.exp(-full),
            d=gain + first,
            h1=second - first,
            h2=-second,
            noise=_sde_noise(target, h, eta),
            push_d=1.0,
        )


def _sde_noise(target: float, h: float, eta: float) -> float:
    """Standard deviation of the noise that a step of the reverse SDE adds."""
    return target * math.sqrt(-math.expm1(-2 * eta * h)) if target > 0.0 and eta > 0.0 else 0.0


def unipc(s: Schedule, begin: int, eta: float) -> Iterator[Row]:
    """Zhao et al. 2023 (UniPC) of order 2, B(h) = exp(h) - 1, predicting x0; UniPCMultistepScheduler.

    The corrector of the previous step needs this row's D. It differs from the prediction, which is x, only
    in multiples of D, h1 and h2: so it is added to x, and the corrected x steps on, all in one row.
    """
    previous: tuple[int, float, float] | None = None  # order, h and r of the step before
    for i, sigma, target in levels(s, begin):
        correction = _unipc_correction(*previous) if previous else (0.0, 0.0, 0.0)
        order = min(2, i - begin + 1, len(s) - i)
        h = _h(sigma, target)
        gain = -math.expm1(-h)
        r = _h(float(s.sigmas[i - 1]), sigma) / h if order == 2 else math.nan
        bend = gain / (2 * r) if order == 2 else 0.0
        keep = math.exp(-h)
        yield row(
            s,
            i,
            x=keep,
            d=keep * correction[0] + gain + bend,
            h1=keep * correction[1] - bend,
            h2=keep * correction[2],
            push_d=1.0,
        )
        previous = order, h, r


def _unipc_correction(order: int, h: float, r: float) -> tuple[float, float, float]:
    """Corrected minus predicted x as weights of (D, h1, h2), for a step of size h after one of size r * h."""
    gain = -math.expm1(-h)
    if order == 1:
        return gain / 2, -gain / 2, 0.0
    phi1 = gain / h - 1
    phi2 = -phi1 / h - 0.5
    b1, b2 = -phi1 / gain, -2 * phi2 / gain
    old = (b1 - b2) / (1 + r)  # solves [[1, 1], [-r, 1]] @ (old, new) = (b1, b2)
    new = b1 - old
    change = -gain * (old - 0.5) / r  # weight of h2 - h1
    return gain * new, -gain * new - change, change
