"""Proof that a dataset is what its records say: every file, every image, every planned id.

Nothing is trusted but the plan and the commit records, and those are checked against each other.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from posixpath import dirname
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from diffray.model.errors import JobConflict, JobError

from ..hashing import text_hash
from ..outputs.commit import (
    HISTORY,
    IMAGES,
    SUCCESS,
    Commit,
    brief,
    commit_path,
    committed,
    current_path,
    differences,
    is_finished,
    read_commit,
    recorded,
    visible,
)
from ..outputs.parts import PART
from ..outputs.plan import Plan, read_plan, read_shard, shard_path
from ..outputs.store import Store

READERS = 4
"""Shards that are read at once; each is held in memory."""
UNNAMED = (
    "readers take it for a part of the dataset, but no commit record names it; delete it, or see `diffray gc`"
)
_OF_SHARD = re.compile(r"/part-(\d{5,})(\.parquet|\.tar)?$")


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is not as recorded. `shard` is None where no single shard is to blame."""

    shard: int | None
    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


@dataclass(frozen=True, slots=True)
class Verification:
    """What was read, and what was wrong with it.

    Attributes:
        planned: images of the plan, each counted once.
        missing: those of them that are not made yet, and not rejected: no fault, the job's own command makes them.
    """

    shards: int
    files: int
    bytes: int
    planned: int
    images: int
    rejected: int
    missing: int
    faults: tuple[Fault, ...]

    @property
    def damaged(self) -> list[int]:
        """The shards that have to be made again."""
        return sorted({fault.shard for fault in self.faults if fault.shard is not None})


def verify(store: Store) -> Verification:
    """Read everything that is committed and compare it with its record, and the records with the plan.

    What stands in the dataset and in no record is a fault as well, unless its shard is not committed yet.

    Raises:
        JobError: there is no planned job.
    """
    plan = read_plan(store)
    if plan is None:
        raise JobError(f"{store.url} holds no planned diffray job")
    done = sorted(committed(store))
    faults = [
        Fault(None, commit_path(n), f"the plan has {plan.shards} shards") for n in done if n >= plan.shards
    ]
    with ThreadPoolExecutor(READERS) as pool:
        seen = list(pool.map(lambda n: _Shard(store, plan, n), [n for n in done if n < plan.shards]))
    faults += [fault for shard in seen for fault in shard.faults]
    images = sum(len(shard.made) for shard in seen)
    rejected = sum(len(shard.rejected) for shard in seen if shard.number >= plan.retried)
    ended = [shard.made for shard in seen]
    ended += [shard.rejected for shard in seen if shard.number >= plan.retried]
    ids, counts = np.unique(np.concatenate([*ended, np.empty(0, np.uint64)]), return_counts=True)
    faults += _accounting(store, plan, seen, ids, counts)
    faults += _surplus(store, plan, seen)
    return Verification(
        len(seen),
        sum(shard.files for shard in seen),
        sum(shard.bytes for shard in seen),
        plan.images,
        images,
        rejected,
        max(0, plan.images - len(ids)) if len(seen) < plan.shards else 0,
        tuple(faults),
    )


def _accounting(
    store: Store,
    plan: Plan,
    seen: Sequence[_Shard],
    ids: npt.NDArray[np.uint64],
    counts: npt.NDArray[np.int64],
) -> Iterator[Fault]:
    """Faults of the job as a whole; `counts` says how often each of the `ids` ended."""
    for number in _shards_with(seen, set(ids[counts > 1].tolist())):
        yield Fault(None, commit_path(number), "an image of this shard ended in another one as well")
    broken = any(fault.shard is not None for shard in seen for fault in shard.faults)
    if len(seen) == plan.shards and len(ids) != plan.images and not broken:
        yield Fault(None, "the plan", f"{plan.images} images planned, {len(ids)} ended")
    if store.exists(SUCCESS) and not is_finished(store, plan):
        yield Fault(None, SUCCESS, "is not about the job's newest plan")
    if store.exists(SUCCESS) and len(seen) < plan.shards:
        yield Fault(None, SUCCESS, f"stands although only {len(seen)} of {plan.shards} shards are committed")


def _surplus(store: Store, plan: Plan, seen: Sequence[_Shard]) -> Iterator[Fault]:
    """Tables and folders of image files that no record names."""
    commits = {shard.number: shard.commit for shard in seen if shard.commit is not None}
    named = recorded(plan, commits.values())
    if not is_finished(store, plan):
        named |= recorded(replace(plan, retried=0), commits.values())  # not moved yet
    for path in sorted(differences(store, named)[1]):
        of = _OF_SHARD.search(path)
        if of is None or int(of[1]) in commits or int(of[1]) >= plan.shards:
            yield Fault(None, path, UNNAMED)


def _shards_with(seen: Sequence[_Shard], ids: set[int]) -> list[int]:
    return [s.number for s in seen if ids and ids & {*s.made.tolist(), *s.rejected.tolist()}][:10]


class _Shard:
    """One committed shard, read whole.

    Attributes:
        commit: its record, in brief; None where that is damaged.
        made, rejected: hashes of the ids that ended as images and as rejected rows.
    """

    commit: Commit | None = None

    def __init__(self, store: Store, plan: Plan, number: int) -> None:
        self.number, self.faults = number, list[Fault]()
        self.files = self.bytes = 0
        self.made = self.rejected = np.empty(0, np.uint64)
        self._store, self._plan = store, plan
        try:
            commit = read_commit(store, number)
        except JobConflict as error:
            self._fault(commit_path(number), str(error).partition(" is ")[2] or str(error))
            return
        self.commit = brief(commit)
        self._check_ids(commit)
        self._check_folders({str(file["path"]) for file in commit.files})
        contents = {str(file["path"]): self._content(commit, file) for file in commit.files}
        if None not in contents.values():
            self._check_rows(commit, {path: data for path, data in contents.items() if data is not None})

    def _fault(self, path: str, what: str) -> None:
        self.faults.append(Fault(self.number, path, what))

    def _check_ids(self, commit: Commit) -> None:
        """The record's ids are the plan's, each once."""
        made, rejected = set(commit.image_sha256), set(commit.reasons)
        self.made, self.rejected = _hashes(made), _hashes(rejected)
        path = commit_path(self.number)
        try:
            planned = {image.id for image in read_shard(self._store, self.number).images}
        except JobConflict as error:  # what is committed is whole, and could not be made again
            self.faults.append(Fault(None, shard_path(self.number), str(error).partition(" ")[2]))
            return
        if made & rejected or made | rejected != planned:
            odd = sorted((made & rejected) or (made | rejected) ^ planned)[:5]
            self._fault(path, f"its ids are not the plan's, once each; e.g. {odd}")
        counts = (commit.planned, commit.images, commit.rejected)
        if counts != (len(planned), len(made), len(rejected)):
            self._fault(path, f"its totals {counts} are not those of its ids")

    def _check_folders(self, named: set[str]) -> None:
        """Image files have no others among them."""
        for folder in {dirname(path) for path in named if path.startswith(f"{IMAGES}/")}:
            others = {f"{folder}/{name}" for name in visible(self._store, folder)} - named
            self.faults += [Fault(None, path, UNNAMED) for path in sorted(others)]

    def _content(self, commit: Commit, file: Mapping[str, Any]) -> bytes | None:
        """The bytes of a file, if they are those recorded."""
        path = current_path(self._plan, commit, file)
        if path.startswith(HISTORY) and not self._store.exists(path):
            path = str(file["path"])  # the job was stopped before it was moved
        try:
            data = self._store.read(path)
        except FileNotFoundError:
            self._fault(path, "missing")
            return None
        self.files, self.bytes = self.files + 1, self.bytes + len(data)
        if hashlib.sha256(data).hexdigest() != file["sha256"]:
            size = f"{len(data)} bytes, {file['bytes']} recorded" if len(data) != file["bytes"] else ""
            self._fault(path, size or "other bytes than recorded")
            return None
        return data

    def _check_rows(self, commit: Commit, contents: Mapping[str, bytes]) -> None:
        """The rows in the files are those of the record, and the pictures in them have its checksums."""
        images: dict[str, str] = {}
        rejected: list[str] = []
        for path, data in contents.items():
            if path.startswith("rejected/"):
                rejected += pq.read_table(io.BytesIO(data), columns=["id"])["id"].to_pylist()
            elif PART.search(path) and path.startswith("data/"):
                images |= dict(_images(path, data, contents))
        if images != commit.image_sha256:
            odd = sorted(dict(images.items() ^ commit.image_sha256.items()))[:5]
            self._fault(commit_path(self.number), f"images and their checksums differ from it; e.g. {odd}")
        if sorted(rejected) != sorted(commit.reasons):
            odd = sorted(set(rejected) ^ set(commit.reasons))[:5]
            self._fault(commit_path(self.number), f"rejected rows differ from it; e.g. {odd}")


def _images(path: str, data: bytes, contents: Mapping[str, bytes]) -> Iterator[tuple[str, str]]:
    """Id and SHA-256 of every picture, or of its latents, in a data part of any layout."""
    if path.endswith(".tar"):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = {m.name: tar.extractfile(m) for m in tar.getmembers()}
            read = {name: file.read() for name, file in members.items() if file is not None}
        for name, own in read.items():
            if name.endswith(".json"):
                stem = name.removesuffix(".json")
                [picture] = [
                    n for n in read if n.startswith(f"{stem}.") and not n.endswith((".json", ".txt"))
                ]
                yield json.loads(own)["id"], hashlib.sha256(read[picture]).hexdigest()
        return
    if path.endswith(".jsonl"):
        rows: Iterator[dict[str, Any]] = (json.loads(line) for line in data.splitlines())
    else:
        rows = _parquet_rows(data)
    for row in rows:
        if "file_name" in row:
            own = contents[f"{dirname(path)}/{row['file_name']}"]
        else:
            own = row["latents"] if "latents" in row else row["image"]["bytes"]
        yield row["id"], hashlib.sha256(own).hexdigest()


def _parquet_rows(data: bytes) -> Iterator[dict[str, Any]]:
    file = pq.ParquetFile(io.BytesIO(data))
    wanted = [name for name in ("id", "image", "latents", "file_name") if name in file.schema_arrow.names]
    for batch in file.iter_batches(batch_size=16, columns=wanted):
        yield from batch.to_pylist()


def _hashes(ids: set[str]) -> npt.NDArray[np.uint64]:
    return np.array([text_hash(i) for i in ids], np.uint64)
