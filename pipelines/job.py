"""A batch job: plan -> generate -> commit -> report. The file to read first.

    plan      the input becomes numbered shards of image requests, written once    inputs/, planning/
    generate  engine actors make the shards that are not committed yet             making/
    commit    each shard's files, then its record, which makes it final            outputs/
    report    totals proven, gallery, dataset card, success mark                   report/

A job may be killed at any point and run again: what is committed stays, the rest is made with the same bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .config import JobConfig
from .inputs.source import Source
from .making.actors import generate_on_ray
from .making.pools import Pulse
from .making.worker import Share
from .metrics import JobMeter
from .models import Models
from .outputs.commit import SUCCESS, committed, is_finished, read_commits, totals
from .outputs.fingerprint import (
    check,
    fingerprint,
    is_shown,
    record,
    record_pages,
    refuse_entangled,
    refuse_foreign,
)
from .outputs.lock import Lock, check_owner
from .outputs.plan import Plan, read_plan
from .outputs.store import Store
from .planning.growth import grow
from .planning.planner import stamps_of, write_plan
from .planning.replaced import check_sources
from .progress import Progress, Silent
from .report import finish
from .runs import RunRecord
from .standing import Standing

Generate = Callable[[JobConfig, int, Store, Models, Sequence[Share]], Iterator[tuple[int, int] | Pulse]]
"""Makes the shards of each model and yields (images, rejected) of each one, as `generate_on_ray` does."""


@dataclass(frozen=True, slots=True)
class JobResult:
    """How a job ended; every planned image is in `images` or in `rejected`."""

    output: str
    images: int
    rejected: int
    shards: int
    made: int
    """Shards that this run made; 0 when there was nothing to do."""
    seconds: float


def run(
    config: JobConfig,
    *,
    take_over: bool = False,
    progress: Progress | None = None,
    models: Models | None = None,
    store: Store | None = None,
    generate: Generate = generate_on_ray,
) -> JobResult:
    """Run a job to its end, or resume it.

    Args:
        config: the job.
        take_over: go on although the output's last owner may still be alive.
        progress: told about every committed shard.
        models: opens the model; another one lets a job run on an engine of one's own.
        store: the output, if not `Store(config.output)`.
        generate: makes the shards, on Ray unless told otherwise.

    Raises:
        InvalidJob: config or input are wrong as a whole.
        JobConflict: the output belongs to another job or driver, or something changed since the job began.
        AccountingError: images and rejected rows do not add up to the plan.
        TooManyRejected: more than `max_rejected` of the images are rejected; the output is complete nevertheless,
            unless the plan alone rejects too many: then no engine was started.
    """
    started = time.monotonic()
    options = config.storage_options(config.output)
    store, progress = store or Store(config.output, options), progress or Silent()
    models = models or Models(config.storage)
    config = config.placed()
    source = Source(config.inputs, config.storage_options, config.limit)
    refuse_entangled(store, source)
    model_configs = {name: models.config(options) for name, options in config.every_model.items()}
    mine, files = fingerprint(config, model_configs, models), source.fingerprint()
    refuse_foreign(store)
    if plan := read_plan(store):
        check(store, mine)
        check_sources(store, config, plan, stamps_of(config, source))
        if plan.input == files and is_finished(store, plan) and is_shown(store, mine):
            return result(store, config, plan, 0, started)
    with Lock.acquire(store, take_over=take_over) as lock:
        plan = read_plan(store)
        if plan is None:
            record(store, mine)
            plan = write_plan(store, config, model_configs, source, files, lock.run)
        else:
            check(store, mine)  # another driver may have planned it while this one waited
            if plan.input != files:
                plan = grow(store, config, model_configs, source, files, plan, lock.run)
        if not is_shown(store, mine):
            store.remove(SUCCESS)  # half-made pages are made again, whatever config comes next
            record_pages(store, mine)
        made = complete(config, lock, store, models, plan, progress, generate)
    return result(store, config, plan, made, started)


def complete(
    config: JobConfig,
    lock: Lock,
    store: Store,
    models: Models,
    plan: Plan,
    progress: Progress,
    generate: Generate,
) -> int:
    """Make the shards of a plan that are not committed yet, and finish the job; returns how many were made."""
    done = committed(store)
    pending = [shard for shard in range(plan.shards) if shard not in done]
    _generate(config, lock, store, models, plan, pending, progress, generate)
    check_owner(store, lock.run)
    finish(store, config, plan)
    return len(pending)


def _generate(
    config: JobConfig,
    lock: Lock,
    store: Store,
    models: Models,
    plan: Plan,
    pending: Sequence[int],
    progress: Progress,
    generate: Generate,
) -> None:
    if not pending:
        return
    before = read_commits(store, sorted(set(range(plan.shards)) - set(pending)))
    images, rejected = totals(plan, before)
    progress.start(plan.images, images + rejected, rejected)
    meter = JobMeter(Standing(plan.images, images + rejected, rejected))
    try:
        with RunRecord(store, lock.run, lock.acquired, config.workers).written() as record:
            for event in generate(config, lock.run, store, models, _shares(config, plan, pending)):
                for listener in (record, meter, progress):
                    if isinstance(event, Pulse):
                        listener.pulse(event)
                    else:
                        listener.advance(*event)
    finally:
        progress.stop()


def _shares(config: JobConfig, plan: Plan, pending: Sequence[int]) -> list[Share]:
    """The pending shards of each model."""
    if not config.models:
        return [Share(config.model, pending)]
    left = set(pending)
    shares = {name: [n for n in shards if n in left] for name, shards in plan.models.items()}
    rest = sorted(left - {n for shards in shares.values() for n in shards})
    if rest:  # a shard of rejected rows alone has no model: one that is there anyhow will do
        name = next((name for name, shards in shares.items() if shards), next(iter(config.models)))
        shares[name] = [*shares.get(name, ()), *rest]
    return [Share(config.models[name], shards) for name, shards in shares.items() if shards]


def result(store: Store, config: JobConfig, plan: Plan, made: int, started: float) -> JobResult:
    """How a finished job ended, as its success mark says.

    Raises:
        TooManyRejected: it has more rejected rows than its config allows.
    """
    totals = json.loads(store.read(SUCCESS))
    where = f"all is committed, the reasons are in {store.path('rejected')}"
    config.check_rejected(totals["rejected"], plan.images, where)
    seconds = time.monotonic() - started
    return JobResult(store.url, totals["images"], totals["rejected"], plan.shards, made, seconds)
