"""Generating on Ray Data: a dataset of turns through a pool of engine actors, which make whole shards.

Images never travel: an actor writes its shard itself. A dead process is restarted by Ray and its turns are
replayed; what it had not committed is made again, which is safe because a shard's commit is idempotent.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, replace
from typing import Any

from diffray.model.allocator import keep_freed_memory
from diffray.model.errors import DiffrayError, JobError

from ..arrival import ARRIVED
from ..config import JobConfig
from ..metrics import ImageMeter
from ..models import Models, shown_name
from ..outputs.fingerprint import settled_threads
from ..outputs.store import Store
from . import backlog, board
from .pools import Ended, Pool, Pulse, turns
from .size import Size
from .texts import Texts, text_pool
from .worker import Share, Task, Worker, WorkerBroken

INIT_DEATHS = 3
"""Actors in a row that may die while they start."""
DATA_THREADS = ("Prefetcher", "StreamingExecutor-", "ray-data-metadata-prefetch", "iter_threaded")
"""How the names of Ray Data's threads in the driver begin."""
SETTLE = 10.0
"""Seconds that each of them may take to end."""


class ShardActor:
    """The class that Ray Data runs: `Worker` in an actor. Errors travel as pickled data, since an exception would
    reach the driver as the text of a traceback only."""

    def __init__(
        self,
        task: Task,
        store: Store,
        models: Models,
        board: Any,
        threads: int | None,
        encoders: Sequence[Any] = (),
    ) -> None:
        imported = time.monotonic() - ARRIVED
        self._name, self._board, self._failure = uuid.uuid4().hex[:8], board, None
        self._facts = _place()
        board.join.remote(self._name, {**self._facts, "seconds": imported})
        self._reporting: asyncio.Task[None] | None = None
        try:
            if threads:
                import torch

                torch.set_num_threads(threads)
                keep_freed_memory()
            texts = Texts(encoders, task.config.workers.start_timeout) if encoders else None
            self._worker = Worker(task, store, models, ImageMeter(shown_name(task.model.source)), texts)
            self._worker.watchdog.last_resort = True
            self._facts["start"] = {"imports": imported, **self._worker.start}
            if self._worker.device == "cuda":
                import torch

                self._facts["accelerator"] = torch.cuda.get_device_name()
        except Exception as error:
            self._failure = error

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, list[Any]]]:
        for turn, shards in zip(batch["turn"], batch["shards"], strict=True):
            failure = self._failure
            try:
                if failure is None:
                    self._reporting = self._reporting or asyncio.create_task(self._keep_reporting())
                    await self._turn(int(turn), int(shards))
            except WorkerBroken as error:
                # Ray would send the retry to this same broken process, so it has to go.
                print(f"worker gives up: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            except Exception as error:
                failure = error
            yield {"failure": [failure and _pickled(failure)]}

    async def _turn(self, turn: int, shards: int) -> None:
        """Make so many shards, or as many as there are."""
        while shards and (shard := await self._board.take.remote(turn, self._name)) is not None:
            commit = await self._worker.make(shard)
            if commit is None:
                await self._board.give_back.remote(turn, self._name, shard)
                continue
            await self._board.done.remote(turn, self._name, shard, commit.images, commit.rejected)
            await self._report()
            shards -= 1

    async def _keep_reporting(self) -> None:
        while True:
            with suppress(Exception):  # a report that does not arrive is no reason to stop
                await self._report()
            await asyncio.sleep(board.TICK)

    async def _report(self) -> None:
        """Tell the board what was done, and give back what it asks for."""
        reading = asdict(self._worker.tally.reading())
        for shard in await self._board.report.remote(self._name, self._facts, reading):
            self._worker.give_back(shard)


def generate_on_ray(
    config: JobConfig, run: int, store: Store, models: Models, shares: Sequence[Share]
) -> Iterator[Ended | Pulse]:
    """Make every share's shards on the cluster, one model after the other; yields each shard as it is committed,
    and how the pools are.

    Raises:
        DiffrayError: whatever stopped a worker, as it was raised there.
        JobError: no worker starts, or anything else that stopped the job.
    """
    from ray.exceptions import RayError

    began = time.monotonic()
    with _Cluster(config.workers.address):
        connected = time.monotonic() - began
        # By the first model of the job, whichever are left to be made: what it began on must not change.
        device, past = next(iter(config.every_model.values())).device, tuple[Any, ...]()
        size = Size(config.workers, device)
        size.threads = settled_threads(store, size.kind, size.threads)
        try:
            for share in shares:
                pulse = None
                task = Task(config, run, share.model)
                with _texts(task, store, models, size) as encoders:
                    for event in _pool(task, store, models, share, size, encoders).run():
                        if isinstance(event, Pulse):
                            event = pulse = replace(
                                event, engines=(*past, *event.engines), ray=connected, texts=size.texts
                            )
                        yield event
                past = pulse.engines if pulse else past
        except RayError as error:
            first = next((line for line in str(error).splitlines() if line.strip()), "")
            raise JobError(f"Ray stopped the job: {type(error).__name__}: {first}") from error


def _texts(task: Task, store: Store, models: Models, size: Size) -> AbstractContextManager[Sequence[Any]]:
    """The text encoders of one model, if the job has a pool of them."""
    workers = task.config.workers
    if not workers.text_encoders:
        return nullcontext(())
    return text_pool(
        workers.text_encoders, size.text_options, models, task.model, store, size.threads, workers.patience
    )


def _pool(
    task: Task, store: Store, models: Models, share: Share, size: Size, encoders: Sequence[Any]
) -> Pool:
    """The pool of one model, ready to run."""
    import ray
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    for module in (backlog, board):
        ray.cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
    in_flight = task.config.workers.shards_in_flight
    remote: Any = ray.remote(board.Board)
    posted = remote.options(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=100_000).remote(
        list(share.shards), in_flight
    )
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a shard may honestly take hours on a CPU
    context.max_consecutive_actor_init_deaths = INIT_DEATHS
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    least, now, most = size.engines(len(share.shards))
    rows = turns(share.shards, most, in_flight)
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        ShardActor,
        fn_constructor_args=(task, store, models, posted, size.threads, encoders),
        batch_size=1,
        batch_format="numpy",
        compute=ActorPoolStrategy(
            min_size=least,
            max_size=most,
            initial_size=now,
            max_tasks_in_flight_per_actor=2 * in_flight,
            max_concurrent_calls_per_actor=in_flight,
        ),
        udf_modifying_row_count=False,
        **size.options,
    )
    workers = task.config.workers
    return Pool(
        dataset,
        posted,
        model=shown_name(share.model.source),
        share=size.options["num_gpus"] or 1.0,
        least=workers.least,
        patience=workers.start_timeout,
    )


def _place() -> dict[str, Any]:
    """Which actor this process is, and where."""
    import ray

    context: Any = ray.get_runtime_context()
    labels: Mapping[str, str] = context.get_node_labels()
    gpu = context.get_accelerator_ids().get("GPU")
    accelerator = labels.get("ray.io/accelerator-type", "") if gpu else ""
    return {"actor": context.get_actor_id(), "node": context.get_node_id(), "accelerator": accelerator}


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

        # Ray Data does not wait for all of them, and one that calls a Ray that is gone ends the process at once.
        for thread in threading.enumerate():
            if thread.name.startswith(DATA_THREADS):
                thread.join(SETTLE)
        ray.shutdown()
        if self._auth is None:
            os.environ.pop("RAY_AUTH_MODE", None)  # Ray leaves it behind, and a next cluster would read it


def _pickled(error: Exception) -> bytes:
    """An error that can travel to the driver, with the worker's traceback as a note for `--debug`."""
    known = error if isinstance(error, DiffrayError) else JobError(f"{type(error).__name__}: {error}")
    known.add_note("in a worker:\n" + "".join(traceback.format_exception(error)))
    return pickle.dumps(known)
