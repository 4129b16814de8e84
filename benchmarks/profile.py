"""Where a tick of the engine goes: `python -m benchmarks.profile [--model ...] [--images 8] [--trace FILE]`.

Prints how long a tick takes and how much of it is the network (the rest is the engine's own), then the
operators by time.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from diffray.model import Engine, load_model

from . import machine, workload
from .models import source


class Watched:
    """A network that counts the seconds of its calls."""

    def __init__(self, network: Any, device: torch.device) -> None:
        self._network, self._device = network, device
        self.cpu = self.wall = 0.0
        self.calls = 0

    def __call__(self, *args: Any) -> Any:
        machine.sync(self._device)
        wall, cpu = time.perf_counter(), time.process_time()
        result = self._network(*args)
        machine.sync(self._device)
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        self.calls += 1
        return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--ticks", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=int, help="rows of a network call")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trace", type=Path, help="write a Chrome trace")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(source(options.model), device=options.device)
    engine = Engine(model, batch_size=options.images, rows=options.rows)
    for request in workload.same(options.images, 2 * options.ticks + 4, options.size):
        engine.submit(request)
    for _ in range(3):
        engine.step()
    watched = Watched(engine.network.unet, model.device)
    engine.network.unet = watched
    machine.sync(model.device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(options.ticks):
        engine.step()
    machine.sync(model.device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    per = 1000 / options.ticks
    print(f"{options.images} images, {watched.calls / options.ticks:g} calls of {engine.rows} rows a tick")
    print(f"tick    {wall * per:9.2f} ms wall {cpu * per:9.2f} ms CPU")
    print(f"network {watched.wall * per:9.2f} ms wall {watched.cpu * per:9.2f} ms CPU")
    activities = [ProfilerActivity.CPU]
    if model.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        for _ in range(options.ticks):
            engine.step()
    order = "self_cuda_time_total" if model.device.type == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=40))
    if options.trace:
        found.export_chrome_trace(str(options.trace))


if __name__ == "__main__":
    main()
