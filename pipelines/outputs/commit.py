"""Making a shard final: data first, then one commit record that appears whole or not at all.

    data/part-00000.parquet          images (or data/images/part-00000/ with metadata.parquet)
    rejected/part-00000.parquet      rows that did not become images; absent when there are none
    _diffray/commits/00000.json      the record: written last, put-if-absent
    _diffray/SUCCESS.json            the totals of a job whose shards are all final and proven; written at its end

Names derive from the shard number alone, so a redone shard overwrites its own leftovers with the same
bytes. A file without a record does not count.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from posixpath import dirname
from typing import Any

from diffray.model.errors import AccountingError, JobConflict

from ..parallel import side_by_side
from .parts import OWN, PART, Made, Outcome, Output, Part, Rejected, leftovers, part_files
from .plan import Plan
from .store import Store
from .tables import PlanShard

COMMITS = "_diffray/commits"
SUCCESS = "_diffray/SUCCESS.json"
HISTORY = "_diffray/history"
IMAGES = "data/images"
WRITERS = 8


@dataclass(frozen=True, slots=True)
class Origin:
    """Which worker made a shard, and when; for reports, never for decisions.

    Attributes:
        worker: a random name.
        run: number of the run of the job.
        born: when the worker began, in seconds since 1970, before it loaded the model.
        start: seconds of the phases before its first shard.
        began, ended: when it worked on the shard.
    """

    worker: str = ""
    run: int = 0
    born: float = 0.0
    start: Mapping[str, float] = field(default_factory=dict)
    began: float = 0.0
    ended: float = 0.0

    def during(self, began: float, ended: float) -> Origin:
        """The same worker, on one shard."""
        return replace(self, began=round(began, 3), ended=round(ended, 3))


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
    origin: Origin = Origin()


def commit_path(shard: int) -> str:
    """Where the record of a shard is kept."""
    return f"{COMMITS}/{shard:05d}.json"


def committed(store: Store) -> set[int]:
    """The shards that are final: one listing, no reads."""
    return set(store.numbered(COMMITS))


def read_commit(store: Store, shard: int) -> Commit:
    """The record of a committed shard.

    Raises:
        JobConflict: the record is damaged; it is never taken for absent.
    """
    try:
        values = json.loads(store.read(commit_path(shard)))
        origin = Origin(**values.get("origin", {}))
        return Commit(**{**values, "files": tuple(values["files"]), "origin": origin})
    except (ValueError, TypeError, KeyError) as error:
        raise JobConflict(f"{store.path(commit_path(shard))} is damaged: {error}") from None


def read_commits(store: Store, shards: Iterable[int]) -> list[Commit]:
    """Several records in brief, read side by side."""
    return list(side_by_side(lambda shard: brief(read_commit(store, shard)), shards))


def brief(commit: Commit) -> Commit:
    """A record without what it says about single images, of which a job may have many.

    Of the files it keeps the tables, and what is in `data` besides as one, with the bytes of all.
    """
    tables = tuple(file for file in commit.files if file["rows"])
    images = sum(
        file["bytes"] for file in commit.files if file["path"].startswith(IMAGES) and not file["rows"]
    )
    rest = ({"path": f"{IMAGES}/", "bytes": images, "rows": 0},) if images else ()
    return replace(commit, files=(*tables, *rest), image_sha256={}, reasons={})


def write_commit(
    store: Store,
    number: int,
    shard: PlanShard,
    outcomes: Sequence[Outcome],
    output: Output,
    timings: Mapping[str, float],
    origin: Origin = Origin(),
) -> Commit:
    """Write a shard's files, then its record.

    Raises:
        AccountingError: the outcomes are not exactly the shard's images, once each.
        JobConflict: another worker committed it meanwhile, and not the same.
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
    files = part_files(number, shard.user, made, rejected, output)
    for name in _leftovers(store, number, output) - files.keys():
        store.remove(name)  # an earlier, crashed attempt may have ended differently
    _write(store, files)
    commit = Commit(
        shard=number,
        planned=len(ordered),
        images=len(made),
        rejected=len(rejected),
        files=tuple(part.facts(name) for name, part in sorted(files.items())),
        image_sha256={outcome.image.id: outcome.sha256 for outcome in made},
        reasons={outcome.image.id: outcome.reason for outcome in rejected},
        timings=timings,
        origin=origin,
    )
    if store.put_if_absent(commit_path(number), (json.dumps(asdict(commit), indent=1) + "\n").encode()):
        return commit
    first = read_commit(store, number)  # of a worker that was thought dead
    if first.files != commit.files:
        raise JobConflict(
            f"{store.path(commit_path(number))}: another worker committed this shard with other files; "
            f"`diffray verify --repair` takes it back"
        )
    return first


def proven_totals(store: Store, plan: Plan) -> tuple[dict[str, int], list[Commit]]:
    """Totals and records of a finished job, after checking that every planned image ended exactly once.

    Raises:
        AccountingError: a shard is missing or strange, the sums differ from the plan, a file that a record
            names is gone, or one that no record names stands in the dataset.
    """
    shards = committed(store)
    if shards != set(range(plan.shards)):
        odd = sorted(shards ^ set(range(plan.shards)))
        raise AccountingError(f"{plan.shards} shards planned, {len(shards)} committed; differing: {odd[:10]}")
    commits = read_commits(store, range(plan.shards))
    images, rejected = totals(plan, commits)
    if images + rejected != plan.images or any(c.images + c.rejected != c.planned for c in commits):
        raise AccountingError(f"{plan.images} images planned, but {images} made and {rejected} rejected")
    missing, surplus = differences(store, recorded(plan, commits))
    if missing or surplus:
        raise AccountingError(
            f"files and commit records differ: {sorted(missing)[:5]} are missing, and "
            f"{sorted(surplus)[:5]} are in no record; `diffray verify` says more"
        )
    proven = {"planned": plan.images, "images": images, "rejected": rejected, "shards": plan.shards}
    return proven, commits


def is_finished(store: Store, plan: Plan) -> bool:
    """Whether the success mark is there, and speaks of this plan rather than of one that grew since."""
    try:
        totals = json.loads(store.read(SUCCESS))
    except (FileNotFoundError, ValueError):
        return False  # proving the totals again costs little
    return bool(totals.get("planned") == plan.images and totals.get("shards") == plan.shards)


def recorded(plan: Plan, commits: Iterable[Commit]) -> set[str]:
    """Paths of all that a finished job's dataset is made of; a folder of image files stands for what is in it."""
    paths = {current_path(plan, c, file) for c in commits for file in c.files if file["rows"]}
    return {dirname(p) if p.startswith(IMAGES) else p for p in paths if not p.startswith(HISTORY)}


def differences(store: Store, named: set[str]) -> tuple[set[str], set[str]]:
    """What of `named`, as `recorded` says, is missing, and what else readers take for a part of the dataset."""
    tables = {f"{folder}/{name}" for folder in ("data", "rejected") for name in visible(store, folder)}
    found = {path for path in tables if path.endswith((".parquet", ".tar"))}
    found |= {f"{IMAGES}/{name}" for name in visible(store, IMAGES)}
    # On a disk, a folder stays when the files of a crashed attempt are taken away.
    return named - found, {path for path in found - named if visible(store, path) or store.exists(path)}


def visible(store: Store, folder: str) -> list[str]:
    """Names in a folder of the dataset, without those that readers pass over."""
    return [name for name in store.list(folder) if not name.startswith(".")]


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


def _leftovers(store: Store, number: int, output: Output) -> set[str]:
    """Files of an earlier, crashed attempt at a shard that this one may not overwrite."""
    found = leftovers(number, output)
    if output.layout == "files":
        folder = dirname(output.table(number))
        found |= {path for name in store.list(folder) if OWN.fullmatch(path := f"{folder}/{name}")}
    return found


def _write(store: Store, files: Mapping[str, Part]) -> None:
    """Image files side by side, then the tables."""
    images = [name for name, part in files.items() if not PART.search(name)]
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(lambda name: store.write(name, files[name].data), images))
    for name, part in files.items():
        if PART.search(name):
            store.write(name, part.data)
