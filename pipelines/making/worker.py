"""One worker: an engine, and the shards that share it. No Ray in here.

Several shards are in flight at once, so that the engine always has images to batch.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from diffray.model.errors import JobConflict, JobError

from ..config import JobConfig
from ..inputs.sources import Sources
from ..models import Models
from ..options import ModelOptions
from ..outputs.attempts import Attempts
from ..outputs.commit import Commit, Origin, commit_path, read_commit, write_commit
from ..outputs.fingerprint import check_versions
from ..outputs.lock import check_owner
from ..outputs.parts import Made, Outcome, Output, Rejected
from ..outputs.plan import picture_folders, read_plan, read_shard
from ..outputs.sample import Sample
from ..outputs.store import Store
from ..outputs.tables import PlanShard
from ..scores import Examiner
from ..terms.image import PlannedImage
from .images import Maker
from .images import WorkerBroken as WorkerBroken
from .shared_lock import SharedLock
from .tally import STORE, Meter, Tally
from .texts import Texts
from .watchdog import Hanging, Watchdog

T = TypeVar("T")

MODEL = "_diffray/model.json"


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker needs to know about its job."""

    config: JobConfig
    run: int
    """Number of this run of the job, from its lock."""
    model: ModelOptions
    """The model of this worker's pool."""


@dataclass(frozen=True, slots=True)
class Share:
    """Shards that need the same model: the work of one pool."""

    model: ModelOptions
    shards: Sequence[int]


class Worker:
    """Makes shards with one engine.

    Args:
        meter: told about every image as it ends.
        texts: encodes the prompts, if not the engine itself.

    Attributes:
        device: the kind of device it computes on, "cpu" or "cuda".
        start: seconds that fetching and loading the model took.
        tally: what was done so far.
        watchdog: notices when the engine hangs.

    Raises:
        JobConflict: software or model are not those of the job's other workers.
    """

    def __init__(
        self,
        task: Task,
        store: Store,
        models: Models,
        meter: Meter | None = None,
        texts: Texts | None = None,
    ) -> None:
        self._config, self._run, self._store = task.config, task.run, store
        check_versions(store)
        began = time.monotonic()
        models.fetch(task.model)
        fetched = time.monotonic()
        self._model = models.open(task.model) if texts is None else models.open(task.model, texts)
        self.device = self._model.device
        if texts is not None:
            texts.expected = self._model.texts
        self.start = {"fetch": fetched - began, "load": time.monotonic() - fetched}
        self.tally = Tally(
            self._model.engine.batch_size,
            meter,
            self._model.prompts if texts is None else lambda: texts.counts,
        )
        self.watchdog = Watchdog(
            task.config.workers.patience,
            lambda: (self._model.ticks, self._ended, sources.moves, texts and texts.waits),
        )
        self._ended = 0
        self._making: dict[int, asyncio.Future[Any]] = {}
        self._returned: set[int] = set()
        self._calls: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()
        self._lock = SharedLock()
        model_config = models.config(task.model)
        plan = read_plan(store)
        sources = Sources(task.config, model_config, plan.input if plan else None, picture_folders(store))
        name = task.config.name_of(task.model)
        self._record = f"_diffray/model-{sorted(task.config.models).index(name)}.json" if name else MODEL
        self._examiner = Examiner(task.config.checks)
        self._output = Output.of(task.config, name or self._model.name, self._model.checksum)
        self._maker = Maker(
            task.config,
            self._model,
            sources,
            self._examiner,
            Sample.of(task.config, plan),
            self.tally,
            name=self._output.model,
            vae=model_config.vae,
            texts=texts,
        )
        self._origin = Origin(
            uuid.uuid4().hex[:12], task.run, time.time() - (time.monotonic() - began), self.start
        )
        self._check_model()

    def close(self) -> None:
        """Stop the engine and the threads around it."""
        self._model.engine.close()
        self._maker.close()

    async def make(self, number: int) -> Commit | None:
        """Make one shard final; one that already is costs a look. None when `give_back` came first.

        Raises:
            WorkerBroken: the process is not to be trusted any more.
        """
        # Ray repeats a call whose engine it could not reach for a moment, although the first one may still run.
        async with self._calls.setdefault(number, asyncio.Lock()):
            return await self._make(number)

    async def _make(self, number: int) -> Commit | None:
        if await asyncio.to_thread(self._store.exists, commit_path(number)):
            return await asyncio.to_thread(read_commit, self._store, number)
        began, worked = time.time(), time.monotonic()
        self.tally.begin(number)
        self._making[number] = asyncio.ensure_future(self._made(number))
        try:
            shard, outcomes, timings = await self._making[number]
            await asyncio.to_thread(check_owner, self._store, self._run)
            with self.tally.inside(STORE, len(outcomes)):
                return await asyncio.to_thread(
                    write_commit,
                    self._store,
                    number,
                    shard,
                    outcomes,
                    self._output,
                    timings,
                    self._origin.during(began, began + time.monotonic() - worked),  # clocks are set
                )
        except asyncio.CancelledError:
            if number not in self._returned:
                raise
            return None
        finally:
            self._returned.discard(number)
            del self._making[number]
            self.tally.end(number)

    def give_back(self, number: int) -> None:
        """Stop making a shard, so that another worker can, unless its images are all made."""
        if number in self._making and number not in self._returned and self._making[number].cancel():
            self._returned.add(number)

    async def _made(self, number: int) -> tuple[PlanShard, list[Outcome], dict[str, float]]:
        """How every image of a shard ended, and the seconds spent by phase."""
        started = time.monotonic()
        shard = await asyncio.to_thread(read_shard, self._store, number)
        limit = self._config.workers.crashes
        attempts = await asyncio.to_thread(Attempts.read, self._store, number, self._run, limit)
        decided, ready = _decided(shard.images, attempts, self._examiner)
        for outcome in decided:
            self.tally.rejected(number, outcome.stage)
        timings: dict[str, float] = defaultdict(float)
        made = await self._attempted(ready, attempts, timings) if ready else []
        timings["shard_seconds"] = time.monotonic() - started
        return shard, [*decided, *made], {name: round(spent, 4) for name, spent in sorted(timings.items())}

    async def _attempted(
        self, images: list[PlannedImage], attempts: Attempts, timings: dict[str, float]
    ) -> list[Outcome]:
        """The images of a shard together, or one by one where they have to be alone."""
        shard = attempts.shard
        async with self._lock.exclusive() if attempts.alone else self._lock.shared():
            first = shard == next(iter(self._making))
            async with _recorded(attempts, partial(attempts.begin, first=first)):
                if not attempts.alone:
                    ended = (self._one(shard, image, timings) for image in images)
                    return list(await self._watched(asyncio.gather(*ended)))
                outcomes = []
                for image in sorted(images, key=lambda image: -attempts.deaths[image.id]):
                    async with _recorded(attempts, partial(attempts.begin_row, image.id)) as record:
                        outcomes.append(await self._watched(self._one(shard, image, timings)))
                        await asyncio.to_thread(attempts.end_row, record)
                return outcomes

    async def _watched(self, work: Awaitable[T]) -> T:
        try:
            return await self.watchdog.watch(work)
        except Hanging as error:
            raise WorkerBroken(str(error)) from None

    async def _one(self, number: int, image: PlannedImage, timings: dict[str, float]) -> Outcome:
        spent: dict[str, float] = {}
        outcome = await self._maker.make(image, spent)
        self._ended += 1
        for phase, seconds in spent.items():
            timings[phase] += seconds
        if isinstance(outcome, Made):
            self.tally.made(number, spent)
        else:
            self.tally.rejected(number, outcome.stage)
        return outcome

    def _check_model(self) -> None:
        """A model's first worker records what it loaded; every other must have loaded the same."""
        mine, path = self._model.facts(), self._record
        if self._store.put_if_absent(path, (json.dumps(mine, indent=2) + "\n").encode()):
            return
        recorded = json.loads(self._store.read(path))
        if recorded != mine:
            odd = [k for k in {**recorded, **mine} if recorded.get(k) != mine.get(k)]
            lines = [f"  model.{k}: {recorded.get(k)} -> {mine.get(k)}" for k in odd]
            self.close()
            raise JobConflict("\n".join(["this worker's model is not the one the job began with:", *lines]))


@asynccontextmanager
async def _recorded(attempts: Attempts, begin: Callable[[], str]) -> AsyncIterator[str]:
    """An attempt, between its record and what is added to it where the attempt ends without a death.

    A thread that writes cannot be stopped: an attempt that is recalled meanwhile still waits for the record.
    """
    record = asyncio.ensure_future(asyncio.to_thread(begin))
    try:
        yield await asyncio.shield(record)
    except WorkerBroken as error:
        await asyncio.to_thread(attempts.blame, await record, str(error))
        raise
    except (asyncio.CancelledError, JobError):
        await asyncio.to_thread(attempts.end_row, await record)
        raise


def _decided(
    images: tuple[PlannedImage, ...], attempts: Attempts, examiner: Examiner
) -> tuple[list[Rejected], list[PlannedImage]]:
    """What needs no engine any more (refused by the plan or the guard, or killers), and what does."""
    outcomes: list[Rejected] = []
    ready = []
    for image in images:
        if image.request is None:
            outcomes.append(Rejected(image, "plan", image.field, image.reason or "", 0))
        elif verdict := attempts.verdicts.get(image.id):
            outcomes.append(Rejected(image, **verdict))
        elif image.id in attempts.killers:
            deaths = attempts.deaths[image.id]
            error = attempts.reasons.get(image.id)
            reason = f"crashed its worker {deaths} times" + (f", last with {error}" if error else "")
            outcomes.append(Rejected(image, "generate", None, reason, deaths))
        elif refusal := examiner.guard(image.request):
            outcomes.append(Rejected(image, "guard", "prompt", refusal, 0))
        else:
            ready.append(image)
    return outcomes, ready
