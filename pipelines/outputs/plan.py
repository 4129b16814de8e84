"""The plan of a dataset: every image of the job, in numbered shards whose images never change once written.

A numbered record comes last and makes a plan final; until then a crashed plan is simply written again, with the same
bytes. A plan only ever gets more shards: for new rows of an input that grew (`planning/growth.py`), or to run rejected
rows again (`upkeep/care.py`). Each time a record with the next number says what the plan is from then on. Only the
stamps of rows that run again are renewed, until they are made: their source files may have been put right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import pyarrow as pa

from diffray.model.errors import JobConflict

from .store import Store
from .tables import PlanShard, source_stamps

T = TypeVar("T")

PLANS = "_diffray/plans"


@dataclass(frozen=True, slots=True)
class Written:
    """How much was planned and written at once."""

    images: int
    rejected: int
    shards: int
    models: Mapping[str, Sequence[int]]
    """The shards of each named model."""
    stamped: int


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
