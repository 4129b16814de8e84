"""Paired timing: every arm runs in every block, forwards and then backwards (A B B A), in one process.

A slow minute of the machine then hits all arms of a block alike, and the ratio inside a block stays honest.
What is reported is the median of the blocks' ratios with its bootstrap interval, and beside it how far the
arms' results are apart, so that a gain that changes the pictures shows.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import machine

RESULTS = Path(__file__).parent / "results"
RESAMPLES = 10_000

Run = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured: blocks, and the least seconds of one sample (an arm is repeated to reach it)."""

    blocks: int = 6
    seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class Interval:
    """A median and the 95 % bootstrap interval around it."""

    median: float
    low: float
    high: float


@dataclass(slots=True)
class Measurement:
    """One comparison. The first arm is diffray's; a ratio is another arm's seconds over its seconds.

    Attributes:
        unit: what one call of an arm makes, and `units` of it.
        wall, cpu: seconds per call, by arm, one value per block. `cpu` counts all threads of this process.
        ratios: by rival and clock ("wall", "cpu"); above 1 diffray is faster.
        distance: by rival, of its result from diffray's: largest difference, and relative L2 norm.
        yardstick: GFLOP/s before, between and after the blocks.
    """

    name: str
    unit: str
    units: float
    settings: dict[str, Any]
    machine: dict[str, Any]
    kind: str
    wall: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    ratios: dict[str, dict[str, Interval]] = field(default_factory=dict)
    distance: dict[str, dict[str, float]] = field(default_factory=dict)
    yardstick: list[float] = field(default_factory=list)

    def save(self, folder: Path = RESULTS) -> Path:
        """Write the raw numbers as JSON; the same comparison on the same kind of machine replaces its file."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}-{self.kind}.json"
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path

    def line(self) -> str:
        """The outcome in one line."""
        parts = [f"{self.name}:"]
        for rival, clocks in self.ratios.items():
            for clock, r in clocks.items():
                parts.append(f"{clock} x{r.median:.3f} [{r.low:.3f}, {r.high:.3f}] of {rival};")
        return " ".join(parts)


def compare(
    name: str,
    arms: dict[str, Run],
    *,
    unit: str,
    units: float,
    settings: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    effort: Effort,
) -> Measurement:
    """Measure `arms` against the first of them.

    Every arm runs at least twice before any timing, which also compiles what is compiled; the result of the
    last of these runs gives the distance.
    """
    results = {arm: _warm(run, device) for arm, run in arms.items()}
    fastest = min(_timed(run, 1, device)[0] for run in arms.values())
    repeats = max(1, math.ceil(effort.seconds / fastest))
    found = Measurement(
        name,
        unit,
        units,
        settings | {"blocks": effort.blocks, "repeats": repeats},
        machine.facts(device),
        machine.kind(device),
    )
    first, *rivals = arms
    found.distance = {rival: distance(results[rival], results[first]) for rival in rivals}
    found.wall = {arm: [] for arm in arms}
    found.cpu = {arm: [] for arm in arms}
    quick = effort.seconds < 0.5
    found.yardstick.append(machine.yardstick(device, dtype, quick=quick))
    for _ in range(effort.blocks):
        order = [*arms, *reversed(arms)]
        samples = [(arm, _timed(arms[arm], repeats, device)) for arm in order]
        for arm in arms:
            found.wall[arm].append(sum(s[0] for a, s in samples if a == arm) / 2 / repeats)
            found.cpu[arm].append(sum(s[1] for a, s in samples if a == arm) / 2 / repeats)
        found.yardstick.append(machine.yardstick(device, dtype, quick=quick))
    clocks = {"wall": found.wall} if device.type == "cuda" else {"wall": found.wall, "cpu": found.cpu}
    found.ratios = {
        rival: {clock: ratio(values[rival], values[first]) for clock, values in clocks.items()}
        for rival in rivals
    }
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> Interval:
    """Median of the blocks' ratios, with its 95 % bootstrap interval."""
    return interval(np.asarray(above) / np.asarray(below))


def interval(values: np.typing.ArrayLike) -> Interval:
    """Median and 95 % percentile-bootstrap interval; always the same for the same values."""
    array = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(0).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.quantile(np.median(array[picks], axis=1), [0.025, 0.975])
    return Interval(float(np.median(array)), float(low), float(high))


def distance(rival: Tensor, ours: Tensor) -> dict[str, float]:
    """Largest absolute difference, and the relative L2 norm of the difference, in float64."""
    a, b = rival.detach().double().cpu(), ours.detach().double().cpu()
    if a.shape != b.shape or not bool(a.isfinite().all() & b.isfinite().all()):
        raise ValueError(f"results cannot be compared: {tuple(a.shape)} and {tuple(b.shape)}, or not finite")
    difference = a - b
    return {
        "max_abs": float(difference.abs().max()),
        "rel_l2": float(difference.norm() / b.norm().clamp(min=1e-30)),
    }


def _warm(run: Run, device: torch.device) -> Tensor:
    run()
    result = run()
    machine.sync(device)
    return result


def _timed(run: Run, repeats: int, device: torch.device) -> tuple[float, float]:
    """Wall and process CPU seconds of `repeats` calls."""
    machine.sync(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        run()
    machine.sync(device)
    return time.perf_counter() - wall, time.process_time() - cpu
