"""The service under load: `diffray bench serve` with the machine's facts beside its figures."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffray.serve.bench import Outcome, compare
from diffray.serve.config import ModelEntry
from diffray.serve.load import Plan

from . import machine
from .models import source
from .pairing import RESULTS


@dataclass(frozen=True, slots=True)
class Served:
    """One comparison of ways of serving, as `Measurement` is one of programs."""

    name: str
    kind: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    yardstick: list[float]
    outcome: Outcome

    def save(self, folder: Path = RESULTS) -> Path:
        """Write the figures and every request's times as JSON."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}-{self.kind}.json"
        facts = {name: getattr(self, name) for name in ("name", "kind", "machine", "settings", "yardstick")}
        text = json.dumps(facts | self.outcome.raw(), indent=1)
        path.write_text(re.sub(r"\[[-\d.,\s]+\]", _in_one_line, text) + "\n")
        return path

    def line(self) -> str:
        """The outcome in one line."""
        parts = [f"{row['way']} at {row['share']:.0%}: p50 {row['p50']:.2f} s" for row in self.outcome.rows()]
        return f"{self.name}: {'; '.join(parts)}"


def serving(model: str, plan: Plan, *, device: str, dtype: str, batch: int | None, turns: int) -> Served:
    """Compare the ways of serving under the loads of `plan`."""
    place = source(model)
    entry = ModelEntry(source=place, device=device, dtype=dtype, batch_size=batch)
    on = torch.device(
        "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
    )
    speeds = [machine.yardstick(on, torch.float32)]
    outcome = asyncio.run(compare(entry, plan, turns=turns))
    speeds.append(machine.yardstick(on, torch.float32))
    settings = {"model": Path(place).name, "turns": turns, "dtype": dtype, "batch": outcome.batch}
    side = max(max(size) for size in plan.sizes)
    name = f"serve-{min(plan.steps)}to{max(plan.steps)}steps-b{outcome.batch}-{Path(place).name}-{side}"
    return Served(name, machine.kind(on), machine.facts(on), settings, speeds, outcome)


def _in_one_line(numbers: re.Match[str]) -> str:
    return " ".join(numbers[0].split())
