"""What the batch pipeline costs on top of the engine that does its work: the same images both ways.

"steady" begins when the model is loaded, on both sides in the process that will make the images, and ends with
the last image made, or with the last one committed: both hold the engine's first calls, and neither any start
of processes. "whole" is everything: for the bare engine loading the model and generating, for the
job also planning, starting Ray and an actor, encoding, committing, proving and reporting.

The bare engine also runs beside a Ray that has nothing to do: what Ray's own processes take from a machine of few
cores is then on both sides, and what is left is the pipeline's.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from diffray.model import Engine, ImageRequest, load_model
from diffray.pipelines import JobConfig, ModelOptions, ShardLimits, Store, Workers, run
from diffray.pipelines.runs import read_runs

from . import machine, workload
from .models import source
from .pairing import Effort, Measurement, distance, ratio

BARE, BESIDE, JOB = "bare engine", "bare engine beside an idle Ray", "job"


@dataclass(frozen=True, slots=True)
class Made:
    """One run: seconds per image with the model loaded, seconds in all, and the images in the order asked."""

    steady: float
    whole: float
    images: Tensor


Arm = Callable[[str, Sequence[ImageRequest], int], Made]


def overhead(model: str, size: int, steps: int, count: int, batch: int, effort: Effort) -> Measurement:
    """Measure `count` images in shards of the default size, in `effort.blocks` blocks, each forwards and backwards."""
    place = source(model)
    requests = workload.same(count, steps, size)
    loaded = load_model(place)
    device, dtype = loaded.device, loaded.dtype
    del loaded
    name = f"job-{count}x{steps}steps-b{batch}-{Path(place).name}-{size}-{str(dtype).removeprefix('torch.')}"
    settings: dict[str, Any] = {"model": Path(place).name, "size": size, "steps": steps, "requests": count}
    settings |= {
        "batch": batch,
        "shard": ShardLimits().images,
        "blocks": effort.blocks,
        "dtype": str(dtype).removeprefix("torch."),
    }
    found = Measurement(name, "image", 1, settings, machine.facts(device), machine.kind(device))
    arms: dict[str, Arm] = {JOB: _job, BARE: _bare, BESIDE: _beside}
    runs: dict[str, list[list[Made]]] = {arm: [] for arm in arms}
    found.yardstick.append(machine.yardstick(device, dtype))
    for _ in range(effort.blocks):
        block: dict[str, list[Made]] = {arm: [] for arm in arms}
        for arm in [*arms, *reversed(arms)]:
            block[arm].append(arms[arm](place, requests, batch))
        for arm, made in block.items():
            runs[arm].append(made)
        found.yardstick.append(machine.yardstick(device, dtype))
    for clock in ("steady", "whole"):
        for arm, blocks in runs.items():
            found.wall[f"{arm}, {clock}"] = [
                sum(getattr(m, clock) for m in made) / len(made) for made in blocks
            ]
    for bare in (BARE, BESIDE):
        found.ratios[bare] = {
            clock: ratio(found.wall[f"{JOB}, {clock}"], found.wall[f"{bare}, {clock}"])
            for clock in ("steady", "whole")
        }
        found.distance[bare] = distance(runs[JOB][-1][-1].images, runs[bare][-1][-1].images)
    return found


def _bare(place: str, requests: Sequence[ImageRequest], batch: int) -> Made:
    """In a new process, as the job's engine has one: a used one has its memory and kernels ready."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_made_here, place, requests, batch, torch.get_num_threads()).result()


def _beside(place: str, requests: Sequence[ImageRequest], batch: int) -> Made:
    import ray

    ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        return _bare(place, requests, batch)
    finally:
        ray.shutdown()


def _made_here(place: str, requests: Sequence[ImageRequest], batch: int, threads: int) -> Made:
    torch.set_num_threads(threads)
    began = time.perf_counter()
    engine = Engine(load_model(place), batch_size=batch)
    loaded = time.perf_counter()
    results = engine.generate(requests)
    ended = time.perf_counter()
    pixels = [np.asarray(result.image) for result in results]
    return Made((ended - loaded) / len(requests), ended - began, _tensor(pixels))


def _job(place: str, requests: Sequence[ImageRequest], batch: int) -> Made:
    folder = Path(tempfile.mkdtemp(prefix="diffray-job-"))
    try:
        rows = [{"id": f"{i:05d}", **_row(request)} for i, request in enumerate(requests)]
        (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = JobConfig(
            input=str(folder / "in.jsonl"),
            output=str(folder / "out"),
            model=ModelOptions(source=place, batch_size=batch),
            workers=Workers(actors=1, cpus=float(torch.get_num_threads())),
        )
        began = time.perf_counter()
        run(config)
        ended = time.perf_counter()
        [record] = read_runs(Store(config.output))
        [engine] = record["engines"]
        start = sum(engine["start"][phase] for phase in ("imports", "fetch", "load"))
        steady = (engine["seconds"] - start) / len(requests)
        return Made(steady, ended - began, _tensor(_pixels(folder / "out")))
    finally:
        shutil.rmtree(folder)


def _row(request: ImageRequest) -> dict[str, Any]:
    names = ("prompt", "seed", "steps", "width", "height", "sampler", "schedule", "guidance_scale")
    return {name: getattr(request, name) for name in names}


def _pixels(output: Path) -> list[np.ndarray[Any, Any]]:
    rows = [row for part in sorted(output.glob("data/*.parquet")) for row in pq.read_table(part).to_pylist()]
    rows.sort(key=lambda row: str(row["row_id"]))
    return [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows]


def _tensor(pixels: Sequence[np.ndarray[Any, Any]]) -> Tensor:
    return torch.from_numpy(np.stack(pixels)).float() / 255
