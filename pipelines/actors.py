"""Generating on Ray: a dataset of one row per shard, through a pool of engine actors.

Images never travel: an actor writes its shard itself and hands back one small row. A dead process is
restarted by Ray and its shards are replayed, which is safe because a shard's commit is idempotent.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffray.model.errors import DiffrayError, JobError

from .config import JobConfig
from .models import Models
from .store import Store
from .worker import Share, Task, Worker, WorkerBroken

CORES_PER_ENGINE = 8
"""On CPU one engine gains little from more cores than this."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Size of the actor pool, and what each actor takes: GPUs, or CPU cores where there are none."""

    actors: int
    cpus: float
    gpus: float


class ShardActor:
    """The class that Ray Data runs: `Worker` in an actor."""

    def __init__(self, task: Task, store: Store, models: Models, threads: int | None) -> None:
        self._error: DiffrayError | None = None
        try:
            if threads:
                import torch

                torch.set_num_threads(threads)
            self._worker = Worker(task, store, models)
        except Exception as error:
            self._error = _reportable(error)

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, list[Any]]]:
        for shard in batch["shard"]:
            # Errors travel as data: an exception would reach the driver as the text of a traceback only.
            images, rejected, failure = 0, 0, self._error
            try:
                if failure is None:
                    commit = await self._worker.make(int(shard))
                    images, rejected = commit.images, commit.rejected
            except WorkerBroken as error:
                # Ray would send the retry to this same broken process, so it has to go.
                print(f"worker gives up: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            except Exception as error:
                failure = _reportable(error)
            yield {"images": [images], "rejected": [rejected], "failure": [pickle.dumps(failure)]}


def generate_on_ray(
    config: JobConfig, run: int, store: Store, models: Models, shares: Sequence[Share]
) -> Iterator[tuple[int, int]]:
    """Make shards on the cluster; yields (images, rejected) of each as it is committed.

    Raises:
        DiffrayError: whatever stopped a worker, as it was raised there.
        JobError: anything else that stopped the job.
    """
    import ray
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext
    from ray.exceptions import RayError

    [(model, shards)] = [(share.model, share.shards) for share in shares]
    with _Cluster(config):
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        pool = _pool(config, resources, len(shards))
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_no_progress_timeout_s = -1  # a shard may honestly take hours on a CPU
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        threads = None if pool.gpus else max(1, int(pool.cpus))
        source = ray.data.from_items([{"shard": n} for n in shards], override_num_blocks=len(shards))
        dataset = source.map_batches(
            ShardActor,
            fn_constructor_args=(Task(config, run, model), store, models, threads),
            batch_size=1,
            batch_format="numpy",
            compute=ActorPoolStrategy(
                min_size=1,
                max_size=pool.actors,
                initial_size=pool.actors,
                max_tasks_in_flight_per_actor=2 * config.workers.shards_in_flight,
                max_concurrent_calls_per_actor=config.workers.shards_in_flight,
            ),
            num_cpus=None if pool.gpus else pool.cpus,
            num_gpus=pool.gpus or None,
            udf_modifying_row_count=False,
        )
        try:
            for row in dataset.iter_rows():
                if (failure := pickle.loads(row["failure"])) is not None:
                    raise failure
                yield int(row["images"]), int(row["rejected"])
        except RayError as error:
            first = next((line for line in str(error).splitlines() if line.strip()), "")
            raise JobError(f"Ray stopped the job: {type(error).__name__}: {first}") from error


def _pool(config: JobConfig, resources: Mapping[str, float], shards: int) -> Pool:
    """How many actors of which size fit the cluster; never more than there are shards."""
    workers, device = config.workers, config.model.device
    gpus, cpus = resources.get("GPU", 0.0), max(1.0, resources.get("CPU", 1.0))
    wants_gpu = gpus > 0 and device != "cpu" if workers.gpus is None else workers.gpus > 0
    if wants_gpu:
        each = workers.gpus or 1.0
        if gpus < each:
            raise JobError(f"each actor asks for {each:g} GPU, the cluster has {gpus:g}")
        return Pool(max(1, min(workers.actors or int(gpus / each), shards)), 0.0, each)
    if device.startswith("cuda"):
        raise JobError(f"device {device} asked for, but the cluster has no GPU")
    actors = workers.actors or max(1, int(cpus / (workers.cpus or CORES_PER_ENGINE)))
    actors = max(1, min(actors, shards))
    each = workers.cpus or max(1.0, cpus // actors)
    if each > cpus:
        raise JobError(f"each actor asks for {each:g} CPU cores, the cluster has {cpus:g}")
    return Pool(actors, each, 0.0)


class _Cluster:
    """Ray, connected for the time of a job; what was up before stays up."""

    def __init__(self, config: JobConfig) -> None:
        self._address = config.workers.address
        self._mine = False

    def __enter__(self) -> None:
        import ray

        if ray.is_initialized():
            return
        self._auth = os.environ.get("RAY_AUTH_MODE")
        handler = signal.getsignal(signal.SIGTERM)
        options: dict[str, Any] = {} if self._address else {"include_dashboard": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(self._address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
        self._mine = True
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray puts its own there

    def __exit__(self, *_: object) -> None:
        if not self._mine:
            return
        import ray

        ray.shutdown()
        if self._auth is None:
            os.environ.pop("RAY_AUTH_MODE", None)  # Ray leaves it behind, and a next cluster would read it


def _reportable(error: Exception) -> DiffrayError:
    """An error that can travel to the driver, with the worker's traceback as a note for `--debug`."""
    known = error if isinstance(error, DiffrayError) else JobError(f"{type(error).__name__}: {error}")
    known.add_note("in a worker:\n" + "".join(traceback.format_exception(error)))
    return known
