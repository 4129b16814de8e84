"""Making a shard final: data first, then one commit record that appears whole or not at all.

    data/part-00000.parquet          images (or data/images/part-00000/ with metadata.parquet)
    rejected/part-00000.parquet      rows that did not become images; absent when there are none
    _diffray/commits/00000.json      the record: written last, put-if-absent

Names derive from the shard number alone, so a redone shard overwrites its own leftovers with the same
bytes. A file without a record does not count.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from diffray.model.errors import AccountingError, JobConflict
from diffray.model.request import ImageRequest

from .plan import Plan
from .rows import PlannedImage
from .store import Store
from .tables import PlanShard, data_row, data_schema, parquet, rejected_row, rejected_schema

COMMITS = "_diffray/commits"
HISTORY = "_diffray/history"
READERS = 16


@dataclass(frozen=True, slots=True)
class Made:
    """A planned image that became a picture."""

    image: PlannedImage
    request: ImageRequest
    """As the engine resolved it."""
    data: bytes
    sha256: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """A planned image that did not. `stage` is "plan", "generate" or "encode"."""

    image: PlannedImage
    stage: str
    field: str | None
    reason: str
    attempts: int


Outcome = Made | Rejected


@dataclass(frozen=True, slots=True)
class Commit:
    """What the record of one shard says."""

    shard: int
    planned: int
    images: int
    rejected: int
    files: tuple[Mapping[str, Any], ...]
    """Path, bytes, rows (0 for image files) and SHA-256 of each file, in name order."""
    image_sha256: Mapping[str, str]
    reasons: Mapping[str, str]
    """Image id to reason, for the rejected ones."""
    timings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Output:
    """What all parts of one job share."""

    extension: str
    files: bool
    """One file per image instead of bytes inside Parquet."""
    model: str
    model_checksum: str


def commit_path(shard: int) -> str:
    """Where the record of a shard is kept."""
    return f"{COMMITS}/{shard:05d}.json"


def committed(store: Store) -> set[int]:
    """The shards that are final: one listing, no reads."""
    return {int(name.removesuffix(".json")) for name in store.list(COMMITS) if name.endswith(".json")}


def read_commit(store: Store, shard: int) -> Commit:
    """The record of a committed shard.

    Raises:
        JobConflict: the record is damaged; it is never taken for absent.
    """
    try:
        values = json.loads(store.read(commit_path(shard)))
        return Commit(**{**values, "files": tuple(values["files"])})
    except (ValueError, TypeError, KeyError) as error:
        raise JobConflict(f"{store.path(commit_path(shard))} is damaged: {error}") from None


def read_commits(store: Store, shards: Iterable[int]) -> list[Commit]:
    """Several records, read side by side."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda shard: read_commit(store, shard), shards))


def write_commit(
    store: Store,
    number: int,
    shard: PlanShard,
    outcomes: Sequence[Outcome],
    output: Output,
    timings: Mapping[str, float],
) -> Commit:
    """Write a shard's files, then its record.

    Raises:
        AccountingError: the outcomes are not exactly the shard's images, once each.
    """
    by_id = {outcome.image.id: outcome for outcome in outcomes}
    if len(by_id) != len(outcomes) or by_id.keys() != {image.id for image in shard.images}:
        odd = sorted({image.id for image in shard.images} ^ by_id.keys())[:5]
        raise AccountingError(
            f"shard {number}: {len(shard.images)} planned, {len(outcomes)} ended; e.g. {odd}"
        )
    ordered = [by_id[image.id] for image in shard.images]
    made = [outcome for outcome in ordered if isinstance(outcome, Made)]
    rejected = [outcome for outcome in ordered if isinstance(outcome, Rejected)]
    files = _part_files(number, shard.user, made, rejected, output)
    for name in _possible_tables(number) - files.keys():
        store.remove(name)  # an earlier, crashed attempt may have ended differently
    for name, (data, _) in files.items():
        store.write(name, data)
    commit = Commit(
        shard=number,
        planned=len(ordered),
        images=len(made),
        rejected=len(rejected),
        files=tuple(
            {"path": name, "bytes": len(data), "rows": rows, "sha256": hashlib.sha256(data).hexdigest()}
            for name, (data, rows) in sorted(files.items())
        ),
        image_sha256={outcome.image.id: outcome.sha256 for outcome in made},
        reasons={outcome.image.id: outcome.reason for outcome in rejected},
        timings=timings,
    )
    store.put_if_absent(commit_path(number), (json.dumps(asdict(commit), indent=1) + "\n").encode())
    return commit


def proven_totals(store: Store, plan: Plan) -> dict[str, int]:
    """Totals of a finished job, after checking that every planned image ended exactly once.

    Raises:
        AccountingError: a shard is missing or strange, the sums differ from the plan, a file that a record
            names is gone, or a part file stands there that no record names.
    """
    shards = committed(store)
    if shards != set(range(plan.shards)):
        odd = sorted(shards ^ set(range(plan.shards)))
        raise AccountingError(f"{plan.shards} shards planned, {len(shards)} committed; differing: {odd[:10]}")
    commits = read_commits(store, range(plan.shards))
    images, rejected = totals(plan, commits)
    if images + rejected != plan.images or any(c.images + c.rejected != c.planned for c in commits):
        raise AccountingError(f"{plan.images} images planned, but {images} made and {rejected} rejected")
    named = {current_path(plan, c, file) for c in commits for file in c.files if file["rows"]}
    named = {name for name in named if not name.startswith(HISTORY)}
    found = {f"{folder}/{name}" for folder in ("data", "rejected") for name in store.list(folder)}
    found |= {f"data/images/{name}/metadata.parquet" for name in store.list("data/images")}
    found = {name for name in found if _PART.search(name)}
    if named != found:
        raise AccountingError(f"files and commit records differ: {sorted(named ^ found)[:10]}")
    return {"planned": plan.images, "images": images, "rejected": rejected, "shards": plan.shards}


def totals(plan: Plan, commits: Iterable[Commit]) -> tuple[int, int]:
    """Images and rejected rows so far; a rejection that later shards run again counts no more."""
    commits = list(commits)
    return sum(c.images for c in commits), sum(c.rejected for c in commits if c.shard >= plan.retried)


def current_path(plan: Plan, commit: Commit, file: Mapping[str, Any]) -> str:
    """Where a committed file is in a finished job: rejections that were run again are kept as history."""
    path = str(file["path"])
    history = commit.shard < plan.retried and path.startswith("rejected/")
    return f"{HISTORY}/{path}" if history else path


def archive_retried(store: Store, plan: Plan, commits: Iterable[Commit]) -> None:
    """Move the rejected parts that count no more out of the dataset."""
    for commit in commits:
        for file in commit.files:
            path, place = str(file["path"]), current_path(plan, commit, file)
            if path != place and store.exists(path):
                store.write(place, store.read(path))
                store.remove(path)


_PART = re.compile(r"part-\d{5,}(\.parquet|/metadata\.parquet)$")


def _possible_tables(number: int) -> set[str]:
    part = f"part-{number:05d}"
    return {f"data/{part}.parquet", f"data/images/{part}/metadata.parquet", f"rejected/{part}.parquet"}


def _part_files(
    number: int, user: pa.Schema, made: Sequence[Made], rejected: Sequence[Rejected], output: Output
) -> dict[str, tuple[bytes, int]]:
    """Path to (bytes, rows of a table) of everything this shard writes; image files before their table."""
    part, files = f"part-{number:05d}", dict[str, tuple[bytes, int]]()
    rows = []
    for position, outcome in enumerate(made):
        name = f"{position:05d}-{_safe(outcome.image.id)}.{output.extension}"
        if output.files:
            files[f"data/images/{part}/{name}"] = (outcome.data, 0)
            image: dict[str, Any] = {"file_name": name}
        else:
            image = {"image": {"bytes": outcome.data, "path": name}}
        facts = {"sha256": outcome.sha256, "model": output.model, "model_checksum": output.model_checksum}
        rows.append(data_row(outcome.image, outcome.request, {**image, **facts}))
    if rows:
        table = f"data/images/{part}/metadata.parquet" if output.files else f"data/{part}.parquet"
        files[table] = (parquet(rows, data_schema(user, files=output.files)), len(rows))
    if rejected:
        verdicts = [
            rejected_row(
                r.image, {"stage": r.stage, "field": r.field, "reason": r.reason, "attempts": r.attempts}
            )
            for r in rejected
        ]
        files[f"rejected/{part}.parquet"] = (parquet(verdicts, rejected_schema(user)), len(rejected))
    return files


def _safe(text: str) -> str:
    """An id as part of a file name; the position before it keeps names apart."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text)[:60]
