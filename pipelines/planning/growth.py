"""A job whose input grew: the new rows become further shards, after proof that the old rows are what they were.

The proof compares what was planned with what would be planned now, image by image and by id. The order of rows and
the names of files do not matter, except where pictures or other large values stand in tables or tars: an image refers
to these by file and place, and is another one when they move. Such a file must be what it was; new rows come in new
files, or are appended to a Lance dataset.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import islice
from posixpath import basename
from typing import Any

from diffray.model.config import ModelConfig
from diffray.model.errors import JobConflict

from ..config import InvalidJob, JobConfig
from ..hashing import text_hash
from ..inputs.references import INPUT, Reference, parsed_reference
from ..inputs.source import Source
from ..inputs.sources import source_columns
from ..outputs.commit import SUCCESS
from ..outputs.plan import Plan, read_shard, record_plan
from ..outputs.store import Store
from ..outputs.tables import PlanShard
from ..terms.image import PlannedImage
from .hashes import ImageHashes
from .planner import UNSTARTED, folders, planned, stamps_of, write_shards
from .stamping import stamped

BATCH = 1000
"""Images that are compared at a time."""


def grow(
    store: Store,
    config: JobConfig,
    models: Mapping[str, ModelConfig],
    source: Source,
    files: Sequence[Mapping[str, Any]],
    plan: Plan,
    run: int,
) -> Plan:
    """Plan what is new in the input, whose fingerprint was `files`, in run number `run` of the job; returns the plan
    that covers all of it.

    Raises:
        JobConflict: a planned image is gone from the input or would be another one now; names it. Or a newer driver
            owns the output.
        InvalidJob: the input as a whole is unusable, or it changed while it was read.
        TooManyRejected: the larger plan alone rejects more than the job allows; nothing is recorded.
    """
    survey, images = planned(config, models, source)
    user = read_shard(store, 0).user if plan.shards else survey.user.schema
    if survey.user.schema != user:
        before, after = ({f.name: str(f.type) for f in schema} for schema in (user, survey.user.schema))
        odd = sorted(dict.fromkeys([*before, *after]))
        changes = [f"{n}: {before.get(n)} -> {after.get(n)}" for n in odd if before.get(n) != after.get(n)]
        raise JobConflict(f"{store.url}: the input's columns changed: {'; '.join(changes) or 'their order'}")
    known = _Known(store, plan, config, _changed_files(plan.input, files))
    new = stamped(known.unseen(_stored(images, user)), config, stamps_of(config, source))
    wrote = write_shards(store, new, user, config.shards, run, plan.shards)
    known.check()
    if source.fingerprint() != files:
        raise InvalidJob("the input changed while it was read; run again when it is complete")
    config.check_rejected(plan.rejected + wrote.rejected, plan.images + wrote.images, UNSTARTED)
    larger = replace(
        plan.extended(wrote),
        rows=survey.rows,
        images=plan.images + wrote.images,
        rejected=plan.rejected + wrote.rejected,
        input=files,
        folders=folders(config, source),
    )
    if wrote.shards:
        store.remove(SUCCESS)  # whoever waits for it must not take the half for the whole
    record_plan(store, larger)
    return larger


def _stored(images: Iterator[PlannedImage], user: object) -> Iterator[PlannedImage]:
    """The images as a plan shard gives them back, so that they compare equal to those that were planned."""
    batch: list[PlannedImage] = []

    def through() -> Iterator[PlannedImage]:
        yield from PlanShard.from_parquet(PlanShard(tuple(batch), user).to_parquet()).images
        batch.clear()

    for image in images:
        batch.append(image)
        if len(batch) == BATCH:
            yield from through()
    if batch:
        yield from through()


class _Known:
    """The images of a plan."""

    def __init__(self, store: Store, plan: Plan, config: JobConfig, changed: set[str]) -> None:
        self._store, self._plan, self._limit = store, plan, config.limit
        self._changed, self._columns = changed, source_columns(config).values()
        self._hashes = ImageHashes((text_hash(image.id), _content(image)) for image in self._images())

    def unseen(self, images: Iterator[PlannedImage]) -> Iterator[PlannedImage]:
        """Those that are not planned yet; an image that is must be the same as then."""
        for image in images:
            own = text_hash(image.id)
            content = self._hashes.content(own)
            if content is None:
                yield image
            elif content == _content(image):
                self._hashes.meet(own)
            else:
                raise JobConflict(self._difference(image))

    def check(self) -> None:
        """Refuse an input that lacks a planned image, or in which something else stands where it is made from."""
        gone, missing = self._hashes.missing()
        if gone:
            lost = {image.id: image for image in self._images() if text_hash(image.id) in missing}
            lines = [
                f"  {image.id}, row {image.file}:{image.line}: {(image.prompt or '')[:100]!r}"
                for image in islice(lost.values(), 3)
            ]
            what = f"the input lacks {gone} images that were planned"
            limit = "" if self._limit is None else f" (the limit is {self._limit} rows now)"
            remedy = f"choose a new output, or bring these rows back as they were{limit}"
            raise JobConflict("\n".join([f"{self._store.url}: {what}; {remedy}:", *lines]))
        for image in self._images() if self._changed else ():
            if odd := sorted({basename(file) for file in self._files(image)} & self._changed):
                raise JobConflict(
                    f"{self._store.url} holds another job: {odd[0]} changed, and image {image.id} "
                    f"({image.file}:{image.line}) is made from what stood in it; choose a new output, or bring it "
                    f"back and add new pictures in files of their own"
                )

    def _files(self, image: PlannedImage) -> Iterator[str]:
        """The tables and tars that hold values of an image."""
        for column, value in image.user.items():
            if isinstance(value, Reference) or (column in self._columns and isinstance(value, str)):
                place = parsed_reference(value.removeprefix(INPUT))
                if not isinstance(place, str):
                    yield place.file

    def _images(self) -> Iterator[PlannedImage]:
        for shard in range(self._plan.shards):
            yield from read_shard(self._store, shard).images

    def _difference(self, now: PlannedImage) -> str:
        before = next(image for image in self._images() if image.id == now.id)
        old, new = _shown(before), _shown(now)
        lines = [f"  {k}: {old.get(k)!r} -> {new.get(k)!r}" for k in old | new if old.get(k) != new.get(k)]
        where = f"{now.file}:{now.line}"
        return "\n".join(
            [
                f"{self._store.url} holds another job: image {now.id} ({where}) changed; "
                f"choose a new output, or undo this:",
                *lines,
            ]
        )


def _changed_files(before: Iterable[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of the files of an input that are gone or hold something else; a Lance dataset may have more parts."""

    def still(entry: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
        parts = entry.get("parts")
        if parts is None:
            return entry == now
        return bool(entry["name"] == now["name"] and parts == now.get("parts", ())[: len(parts)])

    return {entry["name"] for entry in before if not any(still(entry, now) for now in after)}


def _content(image: PlannedImage) -> int:
    """All of an image but the place of its row, and its source files, whose stamps `replaced.py` compares."""
    return text_hash(repr(replace(image, file="", line=0, source_stamps={})))


def _shown(image: PlannedImage) -> dict[str, object]:
    """An image's values by name, for showing a difference."""
    request = image.request
    values = {f.name: getattr(request, f.name) for f in fields(request)} if request else {}
    own: dict[str, object] = {"field": image.field, "reason": image.reason}
    return {**values, **own, **image.original, **image.user}
