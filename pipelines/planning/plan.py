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
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from diffray.model.config import ModelConfig
from diffray.model.errors import JobConflict

from ..config import InvalidJob, JobConfig, ShardLimits
from ..inputs.carried import UserColumns
from ..inputs.columns import COUNT_COLUMNS, Reading, content_hash, text_hash
from ..inputs.source import Source
from ..outputs.schemas import SOURCE_COLUMN
from ..outputs.store import Store
from ..outputs.tables import PlanShard
from .rows import PlannedImage, RowRules

Hashes = NDArray[np.uint64]

PLANS = "_diffray/plans"
WRITERS = 8
"""Plan shards that are written at once: an object store takes longer for one than planning it does."""


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


def write_plan(store: Store, config: JobConfig, models: Mapping[str, ModelConfig], source: Source) -> Plan:
    """Survey the input and write the whole plan.

    Raises:
        InvalidJob: the input as a whole is unusable (no prompt column, duplicate ids, ...), or it changed
            while it was read.
    """
    files = source.fingerprint()
    survey, images = planned(config, models, source)
    wrote = write_shards(store, images, survey.user.schema, config.shards)
    if source.fingerprint() != files:
        raise InvalidJob("the input changed while it was read; run again when it is complete")
    plan = Plan(
        survey.rows,
        wrote.images,
        wrote.rejected,
        wrote.shards,
        files,
        models=wrote.models,
        folders=folders(config, source),
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


@dataclass(frozen=True, slots=True)
class Written:
    """How much `write_shards` wrote."""

    images: int
    rejected: int
    shards: int
    models: Mapping[str, Sequence[int]]
    """The shards of each named model."""


def write_shards(
    store: Store, images: Iterator[PlannedImage], user: pa.Schema, limits: ShardLimits, first: int = 0
) -> Written:
    """Cut images into shards and write them, numbered from `first`."""
    count = rejected = shards = 0
    models: dict[str, list[int]] = {}
    with ThreadPoolExecutor(WRITERS, thread_name_prefix="plan") as pool:
        waiting: deque[Future[None]] = deque()
        for members in cut(images, limits):
            waiting.append(pool.submit(_write_shard, store, first + shards, PlanShard(tuple(members), user)))
            if len(waiting) > WRITERS:
                waiting.popleft().result()
            count += len(members)
            rejected += sum(image.reason is not None for image in members)
            if members[0].model:
                models.setdefault(members[0].model, []).append(first + shards)
            shards += 1
        for one in waiting:
            one.result()
    return Written(count, rejected, shards, models)


def _write_shard(store: Store, number: int, shard: PlanShard) -> None:
    store.write(shard_path(number), shard.to_parquet())


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


class Survey:
    """What the first pass over the input learned.

    Attributes:
        rows: how many rows there are, unreadable ones included.
        user: the columns that the job carries beside the request's own, with their types.

    Raises:
        InvalidJob: no `prompt` column, two columns that mean the same, or duplicate ids.
    """

    def __init__(self, source: Source, rules: RowRules) -> None:
        self._source, self._rules = source, rules
        self.rows = 0
        columns: dict[str, None] = {}
        user = UserColumns(source.schema(), source.features)
        rules.classes = {
            name: feature["names"]
            for name, feature in source.features.items()
            if feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list)
        }
        for variant in rules.variants:
            user.observe({name: variant.values[name] for name in rules.variables})
        given, derived, placed = array("Q"), array("Q"), 0
        for row in source.rows():
            self.rows += 1
            columns.update(dict.fromkeys(row.values))
            reading = rules.columns.read(row)
            user.observe(self._carried(reading))
            if row.problem is None:
                key = reading.key
                placed += reading.place is not None
                (derived if key is None else given).append(
                    content_hash(row) if key is None else text_hash(key)
                )
        self._check_columns(columns, placed=placed > 0)
        if 0 < placed < len(given) + len(derived):
            raise InvalidJob(
                f"{placed} rows name their image by row_id and index, the others do not: use one way"
            )
        keys, contents = _sorted(given), _sorted(derived)
        self._check_unique(keys, contents)
        self._repeated = _repeated(contents)
        user.finish(self._own_schema(columns))
        self.user = user

    def images(self) -> Iterator[PlannedImage]:
        """The second pass: every image of the job, in input order."""
        seen: dict[int, int] = {}
        for row in self._source.rows():
            reading = self._rules.columns.read(row)
            row_id = reading.id
            if row_id is None:
                content = content_hash(row)
                row_id = f"{content:016x}"
                if content in self._repeated:
                    seen[content] = occurrence = seen.get(content, 0) + 1
                    row_id += f".{occurrence}" if occurrence > 1 else ""
            yield from self._rules.images(reading, row_id, self.user.pick(self._carried(reading)))

    def _carried(self, reading: Reading) -> dict[str, Any]:
        """The user's own columns; a swept variable takes the place of a column of its name."""
        if not self._rules.variables or reading.place:
            return reading.unknown
        return {n: v for n, v in reading.unknown.items() if n not in self._rules.variables}

    def _own_schema(self, columns: Mapping[str, None]) -> pa.Schema:
        """The task's own fields, and references to the sources that rows have or templates make."""
        rules = self._rules
        sources = [
            name
            for name in rules.columns.sources
            if name in rules.templates
            or SOURCE_COLUMN.get(name, name) in columns
            or any(column in columns for column in rules.columns.looked_for(name))
        ]
        fields = [(SOURCE_COLUMN.get(name, name), pa.string()) for name in sources]
        return pa.schema([*fields, *rules.kind.fields.items()])

    def _check_columns(self, columns: Mapping[str, None], *, placed: bool) -> None:
        rules, has = self._rules, ", ".join(columns) or "no readable row"
        if not self.rows:
            return
        made = {*rules.defaults, *rules.templates, *(name for v in rules.variants for name in v.values)}
        for name in ("prompt", *rules.kind.needs):
            looked = rules.columns.looked_for(name)
            if placed:  # diffray wrote them under its own names
                looked = (*looked, SOURCE_COLUMN.get(name, name))
            if name not in made and not any(column in columns for column in looked):
                names = looked[:1] if name == "prompt" else looked[:3]
                raise InvalidJob(f"the input has no column {' or '.join(map(repr, names))}; it has {has}")
        for template in rules.templates.values():
            known = {*columns, *rules.columns.fields, *made, *rules.variables}
            if odd := sorted(template.names - known):
                where = f"templates.{template.field}"
                raise InvalidJob(f"{where}: the input has no column {odd[0]!r}; it has {has}")
        if all(name in columns for name in COUNT_COLUMNS):
            raise InvalidJob(f"the input has both columns {' and '.join(COUNT_COLUMNS)}; they mean the same")

    def _check_unique(self, keys: Hashes, contents: Hashes) -> None:
        taken = {text_hash(f"{content:016x}") for content in contents.tolist()} if len(keys) else set()
        suspects = _repeated(keys) | (taken & set(keys.tolist()) if taken else set())
        if not suspects:
            return
        places: dict[str, list[str]] = {}
        for row in self._source.rows():
            key = self._rules.columns.read(row).key if row.problem is None else None
            key = f"{content_hash(row):016x}" if key is None and row.problem is None else key
            if key is not None and text_hash(key) in suspects:
                places.setdefault(key, []).append(f"{row.file}:{row.line}")
        double = {key: where for key, where in places.items() if len(where) > 1}
        if double:
            shown = "; ".join(f"{key!r} at {', '.join(where[:5])}" for key, where in list(double.items())[:5])
            raise InvalidJob(f"duplicate ids, each would overwrite the other ({len(double)} in all): {shown}")


def _sorted(hashes: array[int]) -> Hashes:
    """Sorted where they lie: a copy would be as large as all that the survey keeps."""
    values = np.frombuffer(hashes, dtype=np.uint64)
    values.sort()
    return values


def _repeated(values: Hashes) -> set[int]:
    """Those that stand more than once among sorted values."""
    return set(values[1:][values[1:] == values[:-1]].tolist())
