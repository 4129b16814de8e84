"""How well engines are kept busy: `python -m benchmarks.scale`, on synthetic devices through the real pipeline.

Every engine gets the same work (weak scaling), so the ideal time is that of one engine. An engine counts from
its model being loaded until the job's end, so that waiting for shards, reading and storing them and the tail
are in the figure, and starting processes is not (it is reported beside it). With `--slow` one engine is that
many times slower than the others: what is left over is what its last shards cost.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from diffray.pipelines import JobConfig, ModelOptions, ShardLimits, Store, Workers, run
from diffray.pipelines.runs import read_runs

from . import machine, synthetic
from .pairing import RESULTS
from .synthetic import SyntheticModels

STEPS, BATCH = 20, 8


def measured(engines: int, shards: int, images: int, step: float, slow: float) -> dict[str, Any]:
    """One job of `shards` shards of `images` images for each engine."""
    folder = Path(tempfile.mkdtemp(prefix="diffray-scale-"))
    try:
        count = engines * shards * images
        (folder / "in.jsonl").write_text(
            "".join(json.dumps({"prompt": f"image {i}"}) + "\n" for i in range(count))
        )
        config = JobConfig(
            input=str(folder / "in.jsonl"),
            output=str(folder / "out"),
            model=ModelOptions(batch_size=BATCH),
            defaults={"steps": STEPS, "width": 64, "height": 64},
            shards=ShardLimits(images=images),
            workers=Workers(actors=engines, cpus=1),
            contact_sheet=0,
        )
        result = run(config, models=SyntheticModels(step, slow, str(folder)))
        if result.images != count:
            raise RuntimeError(f"{result.rejected} of {count} images were rejected")
        [record] = read_runs(Store(config.output))
        facts = record["engines"]
        starts = [{k: v for k, v in e["start"].items() if k not in ("place", "first_image")} for e in facts]
        up = sum(e["seconds"] - sum(start.values()) for e, start in zip(facts, starts, strict=True))
        speed = engines - 1 + 1 / slow
        ideal = count * STEPS * step / BATCH / speed * engines
        return {
            "engines": engines,
            "images": result.images,
            "efficiency": ideal / up,
            "busy": sum(e["busy_seconds"] for e in facts) / up,
            "occupancy": sum(e["occupancy"] * e["busy_seconds"] for e in facts)
            / max(1e-9, sum(e["busy_seconds"] for e in facts)),
            "start_seconds": median(sum(e["start"].values()) for e in facts),
            "job_seconds": record["seconds"]["all"],
        }
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument(
        "--step", type=float, default=0.2, help="seconds of a step, as measured on a real device"
    )
    parser.add_argument("--shards", type=int, default=20, help="shards for each engine")
    parser.add_argument("--images", type=int, default=8, help="images of a shard")
    parser.add_argument("--slow", type=float, default=1.0, help="how many times slower one engine is")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    import ray

    ray.cloudpickle.register_pickle_by_value(synthetic)
    cores = 2 * max(options.engines)
    ray.init("local", num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    runs = []
    for engines in options.engines:
        found = measured(engines, options.shards, options.images, options.step, options.slow)
        runs.append(found)
        print(json.dumps(found), flush=True)
    ray.shutdown()
    name = "scale-synthetic" + (f"-slow{options.slow:g}" if options.slow != 1 else "")
    settings = {
        "step_seconds": options.step,
        "steps": STEPS,
        "batch": BATCH,
        "shards_per_engine": options.shards,
        "images_per_shard": options.images,
        "slow": options.slow,
    }
    machine.save(options.results, name, {"settings": settings, "scale": runs})


if __name__ == "__main__":
    main()
