"""What a large table costs the driver: `python -m benchmarks.planning`. Time and memory of planning, of starting
again when half of the shards are committed, of planning what is new in a table that grew, and of planning rows that
have ids, or name a picture each, all in processes of their own. No images are made.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffray.pipelines import JobConfig, Store, run
from diffray.pipelines.outputs.commit import Commit, commit_path
from diffray.pipelines.outputs.plan import read_plan

from . import machine
from .pairing import RESULTS

CHUNK = 100_000


class Planned(Exception):
    """Raised where images would be made."""


def table(path: Path, rows: int, *more: str) -> None:
    """A Parquet table of distinct prompts, a label, a seed, and `more`: "id", "image" (paths of files beside it)."""
    fields = [("prompt", pa.string()), ("label", pa.int64()), ("seed", pa.int64())]
    schema = pa.schema([*fields, *((name, pa.string()) for name in more)])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, CHUNK):
            numbers = np.arange(start, min(rows, start + CHUNK))
            prompts = [f"a photograph of object number {n}, studio light" for n in numbers]
            columns: dict[str, Any] = {"prompt": prompts, "label": numbers % 1000, "seed": numbers}
            columns["id"] = [f"row-{n}" for n in numbers]
            columns["image"] = [f"{n // 1000:04d}/{n}.png" for n in numbers]
            writer.write_table(pa.table({name: columns[name] for name in schema.names}, schema))
            if "image" in more:
                _touch(path.parent, columns["image"])


def _touch(folder: Path, names: Sequence[str]) -> None:
    """Empty files; nothing looks into them before they are made into images."""
    for parent in dict.fromkeys(name.partition("/")[0] for name in names):
        (folder / parent).mkdir()
    for name in names:
        (folder / name).touch()


def half_committed(output: str) -> None:
    """Records for every other shard, as large as real ones."""
    store = Store(output)
    plan = read_plan(store)
    assert plan is not None
    each = plan.images // plan.shards
    for shard in range(0, plan.shards, 2):
        file = {"path": f"data/part-{shard:05d}.parquet", "bytes": 10**7, "rows": each, "sha256": "0" * 64}
        sums = {f"{shard:08x}{i:08x}-0": f"{i:064x}" for i in range(each)}
        commit = Commit(
            shard=shard, planned=each, images=each, rejected=0, files=(file,), image_sha256=sums, reasons={}
        )
        store.write(commit_path(shard), json.dumps(asdict(commit)).encode())


def once(folder: Path) -> dict[str, float]:
    """Run the job up to its first image, in this process."""

    def stop(*_: Any) -> Iterator[Any]:
        raise Planned

    before, began = _peak(), time.perf_counter()
    pictures = "image" in pq.read_schema(folder / "in.parquet").names
    config = JobConfig(
        input=str(folder / "in.parquet"),
        output=str(folder / "out"),
        task="augment" if pictures else "generate",
    )
    with suppress(Planned):
        run(config, generate=stop)
    return {"seconds": time.perf_counter() - began, "peak_mib": _peak(), "imports_mib": before}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 1_000_000])
    parser.add_argument("--plan-only", type=int, nargs="*", default=[10_000_000])
    parser.add_argument("--folder", type=Path, help="internal: measure one start in this folder")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(once(options.folder)))
        return
    found = []

    def measure(folder: Path, rows: int, what: str) -> None:
        found.append({"rows": rows, "what": what, **_apart(folder)})
        print(json.dumps(found[-1]), flush=True)

    for rows in (*options.rows, *options.plan_only):
        with _folder() as folder:
            table(folder / "in.parquet", rows)
            measure(folder, rows, "plan")
            if rows in options.rows:
                half_committed(str(folder / "out"))
                measure(folder, rows, "start again, half committed")
                table(folder / "in.parquet", rows + rows // 10)
                measure(folder, rows + rows // 10, "plan the tenth that is new")
        if rows in options.rows:
            with _folder() as folder:
                table(folder / "in.parquet", rows, "id")
                measure(folder, rows, "plan, with ids")
            with _folder() as folder:
                table(folder / "in.parquet", rows, "image")
                measure(folder, rows, "plan, pictures by path")
                half_committed(str(folder / "out"))
                measure(folder, rows, "start again, pictures by path")
    machine.save(options.results, "planning", {"planning": found})


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="diffray-planning-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _apart(folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.planning", "--folder", str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(answer.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
