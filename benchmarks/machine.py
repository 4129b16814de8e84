"""What a measurement ran on: hardware, versions, and a matrix product as a yardstick for its clock."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "diffusers", "transformers", "ray", "numpy")


def sync(device: torch.device) -> None:
    """Wait for the accelerator; timers mean nothing before that."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kind(device: torch.device) -> str:
    """The kind of machine as part of a file name: no names of machines."""
    if device.type == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return f"cpu-{os.cpu_count()}core-{torch.get_num_threads()}thread"


def facts(device: torch.device) -> dict[str, str | int | float]:
    """Hardware and software that decide the numbers."""
    found: dict[str, str | int | float] = {
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count() or 0,
        "cpu_capability": str(torch.backends.cpu.get_cpu_capability()),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = int(torch.backends.cudnn.version() or 0)
    return found


def save(folder: Path, name: str, values: dict[str, Any]) -> None:
    """Write what was measured on this machine's CPU as JSON, for `report.py` to read."""
    cpu = torch.device("cpu")
    found = {"name": name, "machine": facts(cpu), "kind": kind(cpu), **values}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}-{found['kind']}.json").write_text(json.dumps(found, indent=1) + "\n")


def yardstick(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> float:
    """GFLOP/s of a plain matrix product: what this machine gives at this moment, whoever else uses it."""
    side = 8192 if device.type == "cuda" and not quick else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(2 if quick else 4):
        sync(device)
        began = time.perf_counter()
        a @ b
        sync(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - began) / 1e9)
    return round(best, 1)


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", path.read_text(), re.MULTILINE) if path.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
