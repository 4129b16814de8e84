"""The plan: every image of the job, in numbered shards whose images never change once written.

Two passes over the input: the survey (`survey.py`), then one that writes shard after shard. A numbered record
comes last and makes the plan final; until then a crashed plan is simply written again, with the same bytes.

A plan only ever gets more shards: for new rows of an input that grew (`growth.py`), or to run rejected rows
again (`upkeep/care.py`). Each time a record with the next number says what the plan is from then on. Only the stamps of
rows that run again are renewed, until they are made: their source files may have been put right.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import pyarrow as pa

from diffray.model.config import ModelConfig
from diffray.model.errors import JobConflict

from ..config import InvalidJob, JobConfig
from ..inputs.source import Source
from ..inputs.stamps import Stamps
from ..options import ShardLimits
from ..outputs.lock import check_owner
from ..outputs.store import Store
from ..outputs.tables import PlanShard, source_stamps
from .image import PlannedImage
from .rows import RowRules
from .stamping import stamped
from .survey import Survey

T = TypeVar("T")

PLANS = "_diffray/plans"
WRITERS = 8
"""Plan shards that are written at once: an object store takes longer for one than planning it does."""

UNSTARTED = "nothing was started; `diffray plan` and --dry-run show the first reasons"


@dataclass(frozen=True, slots=True)
class Plan:
    """What was planned, as the newest record says."""

    rows: int
    images: int
    """All planned images, each counted once."""
    rejected: int
    """Those that the plan itself refused."""
    shards: int
    input: Sequence[Mapping[str, Any]]
    """Fingerprint of the input that the plan covers."""
    retried: int = 0
    """Rejected rows of shards below this number count no more: later shards run them again."""
    number: int = 1
    """Number of the record."""
    models: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """The shards of each model, where the job has several."""
    folders: Mapping[str, str | None] = field(default_factory=dict)
    """Where references lead: below `input`, or below `pictures` if the job names such a folder."""
    stamped: int = 0
    """Images made from files that have stamps."""

    @property
    def pictures(self) -> str:
        """The folder of files that rows name by path."""
        return self.folders.get("pictures") or self.folders.get("input") or ""

    def extended(self, wrote: Written) -> Plan:
        """The next plan, with further shards."""
        names = {**self.models, **wrote.models}
        return replace(
            self,
            shards=self.shards + wrote.shards,
            models={name: [*self.models.get(name, ()), *wrote.models.get(name, ())] for name in names},
            number=self.number + 1,
            stamped=self.stamped + wrote.stamped,
        )


def shard_path(shard: int) -> str:
    """Where shard number `shard` of the plan is kept."""
    return f"_diffray/plan/shard-{shard:05d}.parquet"


def read_plan(store: Store) -> Plan | None:
    """The newest plan of a job, or None when there is none yet."""
    numbers = store.numbered(PLANS)
    return _read(store, numbers[-1]) if numbers else None


def read_plans(store: Store) -> list[Plan]:
    """Every plan that a job ever had, the first one first."""
    return [_read(store, number) for number in store.numbered(PLANS)]


def picture_folders(store: Store) -> set[str]:
    """Where the files that rows name by path were, each time that the job was planned."""
    return {plan.pictures for plan in read_plans(store)}


def _read(store: Store, number: int) -> Plan:
    name = f"{PLANS}/{number:05d}.json"
    try:
        return Plan(**json.loads(store.read(name)))
    except (ValueError, TypeError) as error:
        raise JobConflict(f"{store.path(name)} is damaged: {error}") from None


def record_plan(store: Store, plan: Plan) -> None:
    """Make a plan final.

    Raises:
        JobConflict: another driver recorded a different one under that number.
    """
    name = f"{PLANS}/{plan.number:05d}.json"
    if not store.put_if_absent(name, (json.dumps(asdict(plan), indent=2) + "\n").encode()):
        raise JobConflict(f"{store.path(name)}: another driver planned at the same time")


def read_shard(store: Store, shard: int) -> PlanShard:
    """One shard of a finished plan.

    Raises:
        JobConflict: it is gone or damaged.
    """
    return _parsed(store, shard, PlanShard.from_parquet)


def read_source_stamps(store: Store, shard: int, columns: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Of every image of a shard that has stamps: its id, and its source files with their stamps by path.

    Raises:
        JobConflict: the shard is gone or damaged.
    """
    return _parsed(store, shard, lambda data: source_stamps(data, columns))


def _parsed(store: Store, shard: int, parse: Callable[[bytes], T]) -> T:
    path = shard_path(shard)
    try:
        return parse(store.read(path))
    except (FileNotFoundError, pa.ArrowException, ValueError, KeyError) as error:
        what = "is gone" if isinstance(error, FileNotFoundError) else f"is damaged: {error}"
        raise JobConflict(f"{store.path(path)} {what}; without its plan the job cannot go on") from None


def write_plan(
    store: Store,
    config: JobConfig,
    models: Mapping[str, ModelConfig],
    source: Source,
    files: Sequence[Mapping[str, Any]],
    run: int,
) -> Plan:
    """Survey the input, whose fingerprint was `files`, and write the whole plan in run number `run` of the job.

    Raises:
        JobConflict: a newer driver owns the output.
        InvalidJob: the input as a whole is unusable (no prompt column, duplicate ids, ...), or it changed
            while it was read.
        TooManyRejected: the plan alone rejects more than the job allows; nothing is recorded.
    """
    survey, images = planned(config, models, source)
    images = stamped(images, config, stamps_of(config, source))
    wrote = write_shards(store, images, survey.user.schema, config.shards, run)
    if source.fingerprint() != files:
        raise InvalidJob("the input changed while it was read; run again when it is complete")
    config.check_rejected(wrote.rejected, wrote.images, UNSTARTED)
    plan = Plan(
        survey.rows,
        wrote.images,
        wrote.rejected,
        wrote.shards,
        files,
        models=wrote.models,
        folders=folders(config, source),
        stamped=wrote.stamped,
    )
    record_plan(store, plan)
    return plan


def planned(
    config: JobConfig, models: Mapping[str, ModelConfig], source: Source
) -> tuple[Survey, Iterator[PlannedImage]]:
    """The survey of an input, and every image of the job in input order."""
    rules = RowRules(config, models, source.root)
    survey = Survey(source, rules)
    return survey, survey.images()


def folders(config: JobConfig, source: Source) -> dict[str, str | None]:
    """`Plan.folders` of a job."""
    return {"input": source.root, "pictures": config.pictures.root}


def stamps_of(config: JobConfig, source: Source) -> Stamps:
    """The stamps of the files that rows name by path."""
    root = config.pictures.root
    return Stamps(root or source.root, config.storage_options, {} if root else source.stamps)


@dataclass(frozen=True, slots=True)
class Written:
    """How much `write_shards` wrote."""

    images: int
    rejected: int
    shards: int
    models: Mapping[str, Sequence[int]]
    """The shards of each named model."""
    stamped: int


def write_shards(
    store: Store,
    images: Iterator[PlannedImage],
    user: pa.Schema,
    limits: ShardLimits,
    run: int,
    first: int = 0,
) -> Written:
    """Cut images into shards and write them, numbered from `first`.

    Raises:
        JobConflict: a newer driver than that of run number `run` owns the output.
    """
    count = rejected = shards = stamps = 0
    models: dict[str, list[int]] = {}
    with ThreadPoolExecutor(WRITERS, thread_name_prefix="plan") as pool:
        waiting: deque[Future[None]] = deque()
        for members in cut(images, limits):
            shard = PlanShard(tuple(members), user)
            waiting.append(pool.submit(_write_shard, store, first + shards, shard, run))
            if len(waiting) > WRITERS:
                waiting.popleft().result()
            count += len(members)
            rejected += sum(image.reason is not None for image in members)
            stamps += sum(bool(image.source_stamps) for image in members)
            if members[0].model:
                models.setdefault(members[0].model, []).append(first + shards)
            shards += 1
        for one in waiting:
            one.result()
    return Written(count, rejected, shards, models, stamps)


def _write_shard(store: Store, number: int, shard: PlanShard, run: int) -> None:
    data = shard.to_parquet()
    check_owner(
        store, run
    )  # a driver that was taken over while it planned must not replace the plan of the next
    store.write(shard_path(number), data)


def cut(images: Iterator[PlannedImage], limits: ShardLimits) -> Iterator[list[PlannedImage]]:
    """The images in lots that each make a shard: of one model, within the limits, in the order given."""
    lots: dict[str, list[PlannedImage]] = {}
    work: dict[str, float] = {}
    for image in images:
        members, total = lots.setdefault(image.model, []), work.get(image.model, 0.0)
        if members and (len(members) >= limits.images or total + image.work > limits.work):
            yield members
            members, total = [], 0.0
            lots[image.model] = members
        members.append(image)
        work[image.model] = total + image.work
    yield from (members for members in lots.values() if members)
