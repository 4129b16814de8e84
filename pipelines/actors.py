"""Generating on Ray: pools of engine actors, which make whole shards.

Images never travel: an actor writes its shard itself and hands back two counts. Ray restarts and retries
nothing here; a dead actor's shards go back to the driver's backlog (`pools.py`), which is safe because a
shard's commit is idempotent.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from diffray.model.errors import DiffrayError, JobError

from .arrival import ARRIVED
from .config import JobConfig, ModelOptions, Workers
from .metrics import ImageMeter
from .models import Models, shown_name
from .pools import Arrived, Ended, Pools, Pulse
from .store import Store
from .tally import Reading
from .worker import Share, Task, Worker, WorkerBroken

CORES_PER_ENGINE = 8
"""On CPU one engine gains little from more cores than this."""
SURVEY_EVERY = 5.0
"""Seconds between two looks at what the cluster has."""


class ShardActor:
    """`Worker` in an actor. Errors travel as pickled data: Ray would hand on the text of a traceback only."""

    def __init__(self, task: Task, store: Store, models: Models, threads: int | None) -> None:
        imported = time.monotonic()
        self._failure: bytes | None = None
        try:
            if threads:
                import torch

                torch.set_num_threads(threads)
            self._worker = Worker(task, store, models, ImageMeter(shown_name(task.model.source)))
            self._worker.watchdog.last_resort = True
        except Exception as error:
            self._failure = _reportable(error)
        self._imports = imported - ARRIVED

    async def arrived(self) -> Arrived:
        """Where it is and how long its start took."""
        import ray

        if self._failure is not None:
            return Arrived(failure=self._failure)
        context: Any = ray.get_runtime_context()
        labels: Mapping[str, str] = context.get_node_labels()
        accelerator = (
            labels.get("ray.io/accelerator-type", "") if context.get_accelerator_ids().get("GPU") else ""
        )
        seconds = time.monotonic() - ARRIVED
        return Arrived(context.get_node_id(), accelerator, self._imports, self._worker.start, seconds)

    async def make(self, shard: int) -> tuple[tuple[int, int] | None, bytes | None]:
        """(images, rejected) of a shard that is now final, or None if it was given back; and an error."""
        try:
            commit = await self._worker.make(shard)
        except WorkerBroken as error:
            print(f"worker gives up: {error}", file=sys.stderr, flush=True)
            os._exit(1)  # whatever else this process holds is not to be trusted
        except Exception as error:
            return None, _reportable(error)
        return (commit.images, commit.rejected) if commit else None, None

    async def give_back(self, shard: int) -> None:
        """Stop making a shard if it is not nearly final; `make` says which."""
        self._worker.give_back(shard)

    async def reading(self) -> Reading:
        """What was done so far."""
        return self._worker.tally.reading()


def generate_on_ray(
    config: JobConfig, run: int, store: Store, models: Models, shares: Sequence[Share]
) -> Iterator[Ended | Pulse]:
    """Make every share's shards on the cluster; yields each as it is committed, and how the pools are.

    Raises:
        DiffrayError: whatever stopped a worker, as it was raised there.
        JobError: no worker starts, or anything else that stopped the job.
    """
    import ray
    from ray.exceptions import RayError

    with _Cluster(config.workers.address):
        size = Size(config.workers, shares[0].model.device)

        def launch(model: ModelOptions) -> Any:
            actor = ray.remote(ShardActor).options(**size.options)
            return actor.remote(Task(config, run, model), store, models, size.threads)

        pools = Pools(
            shares,
            launch,
            most=size.most,
            least=config.workers.least,
            patience=config.workers.start_timeout,
            in_flight=config.workers.shards_in_flight,
        )
        try:
            yield from pools.run()
        except RayError as error:
            first = next((line for line in str(error).splitlines() if line.strip()), "")
            raise JobError(f"Ray stopped the job: {type(error).__name__}: {first}") from error


class Size:
    """What each engine takes of the cluster, and how many there may be.

    Attributes:
        options: Ray's options of an actor.
        threads: torch threads of an engine on CPU, or None.

    Raises:
        JobError: the cluster has nothing of what each engine is to take, and none was asked to come.
    """

    def __init__(self, workers: Workers, device: str) -> None:
        self._workers = workers
        self._seen: tuple[float, int] | None = None
        resources = _resources()
        gpus, cpus = resources.get("GPU", 0.0), max(1.0, resources.get("CPU", 1.0))
        wants_gpu = gpus > 0 and device != "cpu" if workers.gpus is None else workers.gpus > 0
        if device.startswith("cuda") and not wants_gpu:
            raise JobError(f"device {device} asked for, but the cluster has no GPU")
        if wants_gpu:
            self._kind, self._each, self.threads = "GPU", workers.gpus or 1.0, None
            taken: dict[str, float] = {"num_gpus": self._each, "num_cpus": workers.cpus or 0}
        else:
            most = workers.most or max(1, int(cpus / (workers.cpus or CORES_PER_ENGINE)))
            self._kind, self._each = "CPU", workers.cpus or max(1.0, cpus // most)
            self.threads = max(1, int(self._each))
            taken = {"num_cpus": self._each}
        if self._each > resources.get(self._kind, 0.0) and not workers.most:
            raise JobError(
                f"each engine asks for {self._each:g} {self._kind}, the cluster has "
                f"{resources.get(self._kind, 0.0):g}; name how many engines to wait for with workers.actors"
            )
        where: dict[str, Any] = {
            "accelerator_type": workers.accelerator,
            "label_selector": workers.labels or None,
        }
        self.options: dict[str, Any] = {
            **taken,
            **{name: value for name, value in where.items() if value},
            "max_restarts": 0,
            "max_task_retries": 0,
        }

    def most(self) -> int:
        """As many as the job says, else as fit the cluster as it is now."""
        if self._workers.most:
            return self._workers.most
        now = time.monotonic()
        if self._seen is None or now - self._seen[0] > SURVEY_EVERY:
            self._seen = now, max(1, int(_resources().get(self._kind, 0.0) / self._each))
        return self._seen[1]


def _resources() -> dict[str, float]:
    import ray

    resources: Callable[[], dict[str, float]] = ray.cluster_resources
    return resources()


class _Cluster:
    """Ray, connected for the time of a job; what was up before stays up."""

    def __init__(self, address: str | None) -> None:
        self._address = address
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


def _reportable(error: Exception) -> bytes:
    """An error that can travel to the driver, with the worker's traceback as a note for `--debug`."""
    known = error if isinstance(error, DiffrayError) else JobError(f"{type(error).__name__}: {error}")
    known.add_note("in a worker:\n" + "".join(traceback.format_exception(error)))
    return pickle.dumps(known)
