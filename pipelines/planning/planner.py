"""Writing a plan: two passes over the input, the survey (`survey.py`), then one that writes shard after shard."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from diffray.model.config import ModelConfig

from ..config import InvalidJob, JobConfig
from ..inputs.source import Source
from ..inputs.stamps import Stamps
from ..options import ShardLimits
from ..outputs.lock import check_owner
from ..outputs.plan import Plan, Written, record_plan, shard_path
from ..outputs.store import Store
from ..outputs.tables import PlanShard
from ..terms.image import PlannedImage
from .rows import RowRules
from .stamping import stamped
from .survey import Survey

WRITERS = 8
"""Plan shards that are written at once: an object store takes longer for one than planning it does."""

UNSTARTED = "nothing was started; `diffray plan` and --dry-run show the first reasons"


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
    # A driver that was taken over while it planned must not replace the plan of the next.
    check_owner(store, run)
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
