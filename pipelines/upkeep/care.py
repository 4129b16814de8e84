"""What one does with a dataset after its job: repair it, run its rejected rows again, clean up after crashes.

All of it takes the job's lock, so that it never meets a driver at work, and each may be interrupted anywhere.
"""

from __future__ import annotations

import hashlib
import io
import re
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from posixpath import dirname
from typing import Any

import pyarrow.parquet as pq

from diffray.model.errors import JobConflict, JobError

from ..config import JobConfig, storage_options
from ..inputs.stamps import Stamps
from ..job import Generate, JobResult, complete, result
from ..making.actors import generate_on_ray
from ..models import Models
from ..outputs.attempts import Attempts
from ..outputs.commit import SUCCESS, Commit, commit_path, committed, current_path, read_commit
from ..outputs.fingerprint import check, fingerprint, recorded_config
from ..outputs.lock import Lock
from ..outputs.parts import OWN
from ..outputs.plan import Plan, read_plan, read_plans, read_shard, record_plan, shard_path
from ..outputs.store import SCRATCH, Store
from ..outputs.tables import PlanShard
from ..parallel import side_by_side
from ..planning.planner import write_shards
from ..planning.stamping import stamped
from ..progress import Progress, Silent
from ..runs import last_workers, read_runs
from ..terms.image import PlannedImage
from .verification import Verification, verify

HISTORY_COMMITS = "_diffray/history/commits"


def planned_job(store: Store) -> Plan:
    """The plan of the job in `store`.

    Raises:
        JobError: there is none.
    """
    plan = read_plan(store)
    if plan is None:
        raise JobError(f"{store.url} holds no planned diffray job")
    return plan


# Repair ----------------------------------------------------------------------------------------------------


def repair(store: Store, *, take_over: bool = False) -> Verification:
    """Verify, and take back the commits of damaged shards, so that the job's own command makes them again.

    Rows that were rejected stay rejected, and the new files have the bytes of the lost ones. The records that
    are taken back are kept under `_diffray/history`. Files that no record names are told and not touched.
    """
    planned_job(store)
    with Lock.acquire(store, take_over=take_over) as lock:
        found = verify(store)
        if found.damaged:
            store.remove(SUCCESS)
        for number in found.damaged:
            _take_back(store, planned_job(store), number, lock.run)
    return found


def _take_back(store: Store, plan: Plan, number: int, run: int) -> None:
    if verdicts := _verdicts(store, plan, number):
        Attempts.read(store, number, run, 1, patient=True).uphold(verdicts)
    record = store.read(commit_path(number))
    store.write(f"{HISTORY_COMMITS}/{number:05d}-{run:05d}.json", record)
    store.remove(commit_path(number))


def _verdicts(store: Store, plan: Plan, number: int) -> dict[str, Mapping[str, Any]]:
    """The rejections of a shard that stand when it is made again.

    They are read from its rejected part. Where that is lost, making the rows again finds them out, unless
    they ran again in a later shard: those must not become images here too.
    """
    try:
        commit = read_commit(store, number)
    except JobConflict:
        reasons = dict.fromkeys(_retried_ids(store, plan, number), "rejected; the record of why was damaged")
    else:
        if (found := _recorded_verdicts(store, plan, commit)) is not None:
            return found
        reasons = dict(commit.reasons) if number < plan.retried else {}
    unknown = {"stage": "generate", "field": None, "attempts": 0}
    return {image: {**unknown, "reason": reason} for image, reason in reasons.items()}


def _recorded_verdicts(store: Store, plan: Plan, commit: Commit) -> dict[str, Mapping[str, Any]] | None:
    """The verdicts in a shard's rejected part; None when it is damaged."""
    found: dict[str, Mapping[str, Any]] = {}
    for file in commit.files:
        if not str(file["path"]).startswith("rejected/"):
            continue
        for path in (current_path(plan, commit, file), str(file["path"])):
            try:
                data = store.read(path)
            except FileNotFoundError:
                continue
            if hashlib.sha256(data).hexdigest() == file["sha256"]:
                rows = pq.read_table(io.BytesIO(data)).to_pylist()
                found = {r["id"]: {k: r[k] for k in ("stage", "field", "reason", "attempts")} for r in rows}
                break
    return found if found.keys() == commit.reasons.keys() else None


def _retried_ids(store: Store, plan: Plan, number: int) -> set[str]:
    if number >= plan.retried:
        return set()
    mine = {image.id for image in read_shard(store, number).images}
    later = side_by_side(
        lambda shard: mine & {image.id for image in read_shard(store, shard).images},
        range(number + 1, plan.shards),
    )
    return set().union(*later)


# Rejected rows again ---------------------------------------------------------------------------------------


def retry_rejected(
    output: str,
    *,
    workers: Mapping[str, Any] | None = None,
    max_rejected: float | None = None,
    storage: Mapping[str, Mapping[str, Any]] | None = None,
    take_over: bool = False,
    progress: Progress | None = None,
    models: Models | None = None,
    store: Store | None = None,
    generate: Generate = generate_on_ray,
) -> JobResult:
    """Run all rejected rows of a finished job again, as further shards with the same config, model and seeds.

    What succeeds is an image from then on. What fails again is rejected with the new reason; the old one is
    kept under `_diffray/history`. Interrupted, it goes on when called again.

    Args:
        output: the dataset.
        workers: `workers` of the job config, for this run; what they do not say is as in the job's last run, but
            for the cluster's address.
        max_rejected, storage: of the job config.
        take_over, progress, models, store, generate: as for `run`.

    Raises:
        JobError: the job itself is not finished yet.
        JobConflict: model or software differ from the job's.
        TooManyRejected: more than `max_rejected` of the job's images still are.
    """
    started = time.monotonic()
    store = store or Store(output, storage_options(storage or {}, output))
    values: dict[str, Any] = {
        "output": output,
        "workers": {**last_workers(read_runs(store)), **(workers or {})},
        "max_rejected": max_rejected,
        "storage": dict(storage or {}),
    }
    progress = progress or Silent()
    plan = planned_job(store)
    recorded = recorded_config(store)
    values["input"] = plan.folders.get("input") or ""
    values["pictures"] = {**recorded.get("pictures", {}), "root": plan.folders.get("pictures")}
    config = JobConfig.checked({**recorded, **values})
    models = models or Models(config.storage)
    model_configs = {name: models.config(model) for name, model in config.every_model.items()}
    check(store, fingerprint(config, model_configs, models))
    with Lock.acquire(store, take_over=take_over) as lock:
        plan = planned_job(store)
        missing = set(range(plan.shards)) - committed(store)
        if any(number < plan.retried or not plan.retried for number in missing):
            raise JobError(f"{store.url}: {len(missing)} shards are missing; run the job's own command first")
        if missing:
            _stamp_again(store, config, plan, missing)
        else:
            plan = _plan_again(store, config, plan, lock.run)
        made = complete(config, lock, store, models, plan, progress, generate)
    return result(store, config, plan, made, started)


def _plan_again(store: Store, config: JobConfig, plan: Plan, run: int) -> Plan:
    """The plan with all rejected rows once more at its end."""
    images = _rejected(store, plan)
    first = next(images, None)
    if first is None:
        return plan
    user = read_shard(store, 0).user
    stamps = Stamps(plan.pictures, config.storage_options)
    images = stamped(chain([first], images), config, stamps)  # a source may have been put right since
    wrote = write_shards(store, images, user, config.shards, run, plan.shards)
    again = replace(plan.extended(wrote), retried=plan.shards)
    store.remove(SUCCESS)
    record_plan(store, again)
    return again


def _stamp_again(store: Store, config: JobConfig, plan: Plan, missing: Collection[int]) -> None:
    """The missing shards of an interrupted retry are made from their source files as these are now."""
    stamps = Stamps(plan.pictures, config.storage_options)
    retry = next(one for one in read_plans(store) if one.retried == plan.retried)
    for number in sorted(set(range(plan.retried, retry.shards)) & set(missing)):
        shard = read_shard(store, number)
        images = tuple(stamped(iter(shard.images), config, stamps))
        store.write(shard_path(number), PlanShard(images, shard.user).to_parquet())


def _rejected(store: Store, plan: Plan) -> Iterator[PlannedImage]:
    def of(number: int) -> list[PlannedImage]:
        reasons = read_commit(store, number).reasons
        images = read_shard(store, number).images if reasons else ()
        return [image for image in images if image.id in reasons]

    return chain.from_iterable(side_by_side(of, range(plan.retried, plan.shards)))


# Leftovers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What `collect` found: paths of orphaned files, and how many unfinished uploads were aborted."""

    files: tuple[str, ...]
    uploads: int


_PLANNED = re.compile(r"shard-(\d{5,})\.parquet")
"""Names of plan shards. Compare their numbers: from 100000 on, names are not in that order."""


def collect(store: Store, age: float, *, dry_run: bool = False, take_over: bool = False) -> Leftovers:
    """Delete what crashed attempts left behind `age` seconds ago or earlier.

    That is: files of shards that no commit record names, temporary files, and plan shards beyond the plan. A
    file that is named otherwise than this job names its own is never touched.
    """
    planned_job(store)
    with Lock.acquire(store, take_over=take_over):
        plan, done = planned_job(store), committed(store)
        files = chain.from_iterable(side_by_side(lambda n: read_commit(store, n).files, done))
        named = {str(file["path"]) for file in files}
        orphans = [path for path in _old(store, age) if path not in named and OWN.fullmatch(path)]
        orphans += [f"{SCRATCH}/{name}" for name in _old_in(store, SCRATCH, age)]
        folder = dirname(shard_path(0))
        planned = ((_PLANNED.fullmatch(name), name) for name in _old_in(store, folder, age))
        orphans += [f"{folder}/{name}" for own, name in planned if own and int(own[1]) >= plan.shards]
        if dry_run:
            return Leftovers(tuple(orphans), 0)
        for path in orphans:
            store.remove(path)
        return Leftovers(tuple(orphans), store.abort_uploads(age))


def _old(store: Store, age: float) -> Iterator[str]:
    folders = ["data", "rejected", "_diffray/index"]
    folders += [f"data/images/{name}" for name in store.list("data/images")]
    for folder in folders:
        yield from (f"{folder}/{name}" for name in _old_in(store, folder, age))


def _old_in(store: Store, folder: str, age: float) -> list[str]:
    """Names of objects, not folders, that are that old."""
    return [n for n, seconds in store.ages(folder).items() if seconds is not None and seconds >= age]
