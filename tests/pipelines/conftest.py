"""Jobs on the fake engine, in this process or on one shared Ray (`on_ray`)."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from diffray.pipelines import JobConfig, JobResult, Store, run
from diffray.pipelines.making.worker import Share, Task, Worker, WorkerBroken
from diffray.pipelines.models import Models
from diffray.pipelines.report import TIMED_FILES

from . import fake
from .s3 import S3, serve

os.environ.setdefault(
    "RAY_worker_niceness", "0"
)  # Ray's workers are nice; on a busy machine they would starve


def in_process(
    config: JobConfig, number: int, store: Store, models: Models, shares: Sequence[Share]
) -> Iterator[tuple[int, int]]:
    """One worker per model in this process, all of its shards in flight at once."""

    async def every(worker: Worker, shards: Sequence[int]) -> list[tuple[int, int]]:
        commits = await asyncio.gather(*(worker.make(shard) for shard in shards))
        return [(commit.images, commit.rejected) for commit in commits]

    for share in shares:
        worker = Worker(Task(config, number, share.model), store, models)
        try:
            yield from asyncio.run(every(worker, share.shards))
        finally:
            worker.close()


def restarting(
    config: JobConfig, number: int, store: Store, models: Models, shares: Sequence[Share]
) -> Iterator[tuple[int, int]]:
    """As Ray does it: a broken worker is replaced, and all of its shards are sent again."""
    while True:
        try:
            return iter(list(in_process(config, number, store, models, shares)))
        except WorkerBroken:
            continue


class Place:
    """A folder with an input table and outputs, and short ways to run jobs on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = path / "log"

    def write(self, text: str | bytes, name: str = "prompts.csv") -> str:
        data = text.encode() if isinstance(text, str) else text
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_bytes(data)
        return str(self.path / name)

    def config(self, input: str, output: str = "out", **values: Any) -> JobConfig:
        values.setdefault("model", {"options": {"log": str(self.log)}})
        values.setdefault("shards", {"images": 3})
        values.setdefault("contact_sheet", 4)
        values.setdefault("max_rejected", 1)
        return JobConfig.checked({"input": input, "output": str(self.path / output), **values})

    def job(self, input: str, output: str = "out", **values: Any) -> JobResult:
        return self.run(self.config(input, output, **values))

    def run(self, config: JobConfig, **arguments: Any) -> JobResult:
        arguments = {"models": fake.FakeModels(), "generate": in_process, **arguments}
        return run(config, **arguments)

    def begun(self) -> list[int]:
        """The seeds of all images that any engine began, in order."""
        return (
            [int(line.split()[0]) for line in self.log.read_text().splitlines()] if self.log.exists() else []
        )

    def rows(self, output: str = "out", folder: str = "data") -> list[dict[str, Any]]:
        import pyarrow.parquet as pq

        parts = sorted((self.path / output / folder).glob("*.parquet"))
        return [row for part in parts for row in pq.read_table(part).to_pylist()]

    def bytes(self, output: str = "out") -> dict[str, str]:
        """Path to checksum of everything a user sees, but for the two files that hold times."""
        root = self.path / output
        return {
            str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(root.rglob("*"))
            if path.is_file() and "_diffray" not in path.parts and path.name not in TIMED_FILES
        }


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """`datasets` without the hub; its folder for what it has read."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return str(tmp_path / "cache")


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    import ray
    import ray.cloudpickle

    mode = os.environ.get("RAY_AUTH_MODE")  # Ray sets it and leaves it behind
    ray.cloudpickle.register_pickle_by_value(fake)
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _system_config={"metrics_report_interval_ms": 1000},  # what has a test wait for metrics
    )
    yield
    ray.shutdown()
    if mode is None:
        os.environ.pop("RAY_AUTH_MODE", None)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """A bucket on moto, or on the server that the environment names."""
    with serve() as server:
        yield server
