"""The plan: every image of the job, in numbered shards that never change once written.

Two passes over the input. The survey proves that ids are unique and finds the types of the user's columns;
it keeps eight bytes per row. The second pass writes shard after shard. A numbered record comes last and makes
the plan final; until then a crashed plan is simply written again, with the same bytes.

A plan only ever gets more shards: for new rows of an input that grew (`growth.py`), or to run rejected rows
again (`upkeep.py`). Each time a record with the next number says what the plan is from then on.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from diffray.model.config import ModelConfig
from diffray.model.errors import InvalidRequest, JobConflict

from .config import InvalidJob, JobConfig, ShardLimits
from .rows import (
    COUNT_COLUMNS,
    IMAGE_COLUMNS,
    PlannedImage,
    RowRules,
    content_hash,
    given_id,
    given_place,
    parsed,
    request_from,
)
from .source import Source, SourceRow
from .store import Store
from .tables import PlanShard, UserColumns

PLANS = "_diffray/plans"


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


def shard_path(shard: int) -> str:
    """Where shard number `shard` of the plan is kept."""
    return f"_diffray/plan/shard-{shard:05d}.parquet"


def read_plan(store: Store) -> Plan | None:
    """The newest plan of a job, or None when there is none yet."""
    names = store.list(PLANS)
    if not names:
        return None
    name = f"{PLANS}/{names[-1]}"
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
    """One shard of a finished plan."""
    return PlanShard.from_parquet(store.read(shard_path(shard)))


def write_plan(store: Store, config: JobConfig, model: ModelConfig, source: Source) -> Plan:
    """Survey the input and write the whole plan.

    Raises:
        InvalidJob: the input as a whole is unusable (no prompt column, duplicate ids, ...), or it changed
            while it was read.
    """
    files = source.fingerprint()
    survey, images = planned(config, model, source)
    wrote = write_shards(store, images, survey.user.schema, config.shards)
    if source.fingerprint() != files:
        raise InvalidJob("the input changed while it was read; run again when it is complete")
    plan = Plan(survey.rows, wrote.images, wrote.rejected, wrote.shards, files)
    record_plan(store, plan)
    return plan


def planned(config: JobConfig, model: ModelConfig, source: Source) -> tuple[Survey, Iterator[PlannedImage]]:
    """The survey of an input, and every image of the job in input order."""
    rules = RowRules(model, _defaults(config, model), config.images_per_prompt, config.seed)
    survey = Survey(source, has_default_prompt="prompt" in rules.defaults)
    return survey, survey.images(rules)


@dataclass(frozen=True, slots=True)
class Written:
    """How much `write_shards` wrote."""

    images: int
    rejected: int
    shards: int


def write_shards(
    store: Store, images: Iterator[PlannedImage], user: pa.Schema, limits: ShardLimits, first: int = 0
) -> Written:
    """Cut images into shards and write them, numbered from `first`."""
    count = rejected = shards = 0
    for members in _shards(images, limits):
        store.write(shard_path(first + shards), PlanShard(tuple(members), user).to_parquet())
        count += len(members)
        rejected += sum(image.request is None for image in members)
        shards += 1
    return Written(count, rejected, shards)


def _defaults(config: JobConfig, model: ModelConfig) -> dict[str, object]:
    """The job's request defaults, checked as if they were a row."""
    try:
        request_from(config.defaults).resolved(model)
    except InvalidRequest as error:
        raise InvalidJob(f"defaults: {error}") from None
    return {name: parsed(name, value) for name, value in config.defaults.items() if value is not None}


def _shards(images: Iterator[PlannedImage], limits: ShardLimits) -> Iterator[list[PlannedImage]]:
    members: list[PlannedImage] = []
    total = 0.0
    for image in images:
        work = _work(image)
        if members and (len(members) >= limits.images or total + work > limits.work):
            yield members
            members, total = [], 0.0
        members.append(image)
        total += work
    if members:
        yield members


def _work(image: PlannedImage) -> float:
    request = image.request
    if request is None:
        return 0.0
    return float((request.width or 0) * (request.height or 0) * (request.steps or 0))


class Survey:
    """What the first pass over the input learned.

    Attributes:
        rows: how many rows there are, unreadable ones included.
        user: the columns that diffray does not know, with their types.

    Raises:
        InvalidJob: no `prompt` column, two columns that mean the same, image columns, or duplicate ids.
    """

    def __init__(self, source: Source, *, has_default_prompt: bool) -> None:
        self._source = source
        self.rows = 0
        columns: dict[str, None] = {}
        user = UserColumns(source.schema())
        given, derived, placed = array("Q"), array("Q"), 0
        for row in source.rows():
            self.rows += 1
            columns.update(dict.fromkeys(row.values))
            user.observe(row)
            if row.problem is None:
                key = _key(row)
                placed += given_place(row) is not None
                (derived if key is None else given).append(content_hash(row) if key is None else _hash(key))
        self._check_columns(columns, has_default_prompt)
        if 0 < placed < len(given) + len(derived):
            raise InvalidJob(
                f"{placed} rows name their image by row_id and index, the others do not: use one way"
            )
        self._check_unique(given, derived)
        values, counts = np.unique(np.frombuffer(derived, dtype=np.uint64), return_counts=True)
        self._repeated = set(values[counts > 1].tolist())
        user.finish()
        self.user = user

    def images(self, rules: RowRules) -> Iterator[PlannedImage]:
        """The second pass: every image of the job, in input order."""
        seen: dict[int, int] = {}
        for row in self._source.rows():
            row_id = given_id(row)
            if row_id is None:
                content = content_hash(row)
                row_id = f"{content:016x}"
                if content in self._repeated:
                    seen[content] = occurrence = seen.get(content, 0) + 1
                    row_id += f".{occurrence}" if occurrence > 1 else ""
            yield from rules.images(row, row_id, self.user.pick(row))

    def _check_columns(self, columns: dict[str, None], has_default_prompt: bool) -> None:
        if self.rows and "prompt" not in columns and not has_default_prompt:
            raise InvalidJob(
                f"the input has no column 'prompt'; it has {', '.join(columns) or 'no readable row'}"
            )
        if all(name in columns for name in COUNT_COLUMNS):
            raise InvalidJob(f"the input has both columns {' and '.join(COUNT_COLUMNS)}; they mean the same")
        if wrong := [name for name in IMAGE_COLUMNS if name in columns]:
            raise InvalidJob(f"input columns {', '.join(wrong)}: source images are not read from tables yet")

    def _check_unique(self, given: array[int], derived: array[int]) -> None:
        values, counts = np.unique(np.frombuffer(given, dtype=np.uint64), return_counts=True)
        hashes = np.unique(np.frombuffer(derived, dtype=np.uint64)).tolist()
        taken = {_hash(f"{content:016x}") for content in hashes} if len(given) else set()
        suspects = set(values[counts > 1].tolist()) | (taken & set(values.tolist()) if taken else set())
        if not suspects:
            return
        places: dict[str, list[str]] = {}
        for row in self._source.rows():
            key = _key(row) if row.problem is None else None
            key = f"{content_hash(row):016x}" if key is None and row.problem is None else key
            if key is not None and _hash(key) in suspects:
                places.setdefault(key, []).append(f"{row.file}:{row.line}")
        double = {key: where for key, where in places.items() if len(where) > 1}
        if double:
            shown = "; ".join(f"{key!r} at {', '.join(where[:5])}" for key, where in list(double.items())[:5])
            raise InvalidJob(f"duplicate ids, each would overwrite the other ({len(double)} in all): {shown}")


def _key(row: SourceRow) -> str | None:
    """What must be unique among rows that bring their own id."""
    place = given_place(row)
    return f"{place[0]}\0{place[1]}" if place else given_id(row)


def _hash(text: str) -> int:
    return content_hash(SourceRow("", 0, {"": text}))
