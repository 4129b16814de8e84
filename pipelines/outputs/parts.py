"""The files of one shard: images in one of three layouts, rejected rows, and an index for the report.

    parquet      data/part-00000.parquet            bytes in the column `image`
    files        data/images/part-00000/*.png       and metadata.parquet or metadata.jsonl (imagefolder)
    webdataset   data/part-00000.tar                0000000000.png, .json, .txt of each image
    all          rejected/part-00000.parquet        rows that did not become images; absent when there are none
                 _diffray/index/part-00000.parquet  id, scores, and thumbnails of a sample

Names derive from the shard number and the position in it; bytes depend on what was made and on nothing else.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import io
import json
import math
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pyarrow as pa

from diffray.model.request import ImageRequest

from ..config import JobConfig
from ..inputs.sources import source_columns
from ..scores import columns
from ..terms.image import PlannedImage
from ..terms.schemas import FRAME, digest_of
from ..terms.values import as_text
from .index import index_part, index_path
from .tables import data_row, data_schema, parquet, rejected_row, rejected_schema

MAX_REASON = 2000
"""Characters of a reason; an error of other people's code may say a lot more."""
MAX_SHOWN = 2000
"""Characters of a list or struct that the gallery shows; embeddings would make it large."""
GROUP_BYTES = 64 * 2**20
"""Row groups of a data part hold about this much at most: a reader of one image loads one group."""
PART = re.compile(r"part-\d{5,}(\.parquet|\.tar|/metadata\.(parquet|jsonl))$")
"""The end of a path that holds rows of a dataset."""
OWN = re.compile(
    r"(data|rejected|_diffray/index)/part-\d{5,}\.(parquet|tar)"
    r"|data/images/part-\d{5,}/(\d{5}-[\w-]*\.(png|jpg|webp)|metadata\.(parquet|jsonl))"
)
"""Paths that the shards of a job write, and nobody else."""


@dataclass(frozen=True, slots=True)
class Made:
    """A planned image that became a picture."""

    image: PlannedImage
    request: ImageRequest
    """As the engine resolved it."""
    data: bytes
    sha256: str
    scores: Mapping[str, Any] = field(default_factory=dict)
    """Values of the score columns, by name."""
    thumbnail: bytes | None = None
    latents: Mapping[str, Any] | None = None
    """Columns that hold latents in place of a picture."""
    sources: Mapping[str, Any] = field(default_factory=dict)
    """Columns about what it was made from."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A planned image that did not. `stage` is "plan", "guard", "source", "generate", "check" or "encode"."""

    image: PlannedImage
    stage: str
    field: str | None
    reason: str
    attempts: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", self.reason[:MAX_REASON])


Outcome = Made | Rejected


@dataclass(frozen=True, slots=True)
class Output:
    """What all parts of one job share."""

    extension: str
    layout: str
    """"parquet", "files" or "webdataset"."""
    model: str
    model_checksum: str
    metadata: str = "parquet"
    """The table beside image files: "parquet" or "jsonl"."""
    scores: Mapping[str, pa.DataType] = field(default_factory=dict)
    sources: Sequence[str] = ()
    """Columns that refer to sources, where the input has them."""

    @classmethod
    def of(cls, config: JobConfig, model: str = "", model_checksum: str = "") -> Output:
        """That of a job; without a model only the columns can be told by it."""
        own = config.encoding
        scores, sources = columns(config.checks), tuple(source_columns(config).values())
        return cls(own.extension, own.layout, model, model_checksum, own.metadata, scores, sources)

    def table(self, number: int) -> str:
        """The path that holds the rows of a shard's images."""
        part = f"data/part-{number:05d}"
        if self.layout == "files":
            return f"data/images/part-{number:05d}/metadata.{self.metadata}"
        return f"{part}.tar" if self.layout == "webdataset" else f"{part}.parquet"


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a shard; `rows` is 0 for what is no table of the dataset."""

    data: bytes
    rows: int = 0

    def facts(self, path: str) -> dict[str, Any]:
        """What the commit record says about it."""
        digest = hashlib.sha256(self.data).hexdigest()
        return {"path": path, "bytes": len(self.data), "rows": self.rows, "sha256": digest}


def part_files(
    number: int, user: pa.Schema, made: Sequence[Made], rejected: Sequence[Rejected], output: Output
) -> dict[str, Part]:
    """Path to content of everything that a shard writes; image files before their table."""
    files: dict[str, Part] = {}
    if made:
        write = {"files": _image_files, "webdataset": _webdataset, "parquet": _parquet}[output.layout]
        files |= write(number, user, made, output)
        files[index_path(number)] = Part(_index(user, made, output))
    if rejected:
        verdicts = [
            rejected_row(
                r.image, {"stage": r.stage, "field": r.field, "reason": r.reason, "attempts": r.attempts}
            )
            for r in rejected
        ]
        data = parquet(verdicts, rejected_schema(user))
        files[f"rejected/part-{number:05d}.parquet"] = Part(data, len(rejected))
    return files


def leftovers(number: int, output: Output) -> set[str]:
    """Paths of tables that an earlier, crashed attempt at a shard may have written."""
    return {output.table(number), index_path(number), f"rejected/part-{number:05d}.parquet"}


def _parquet(number: int, user: pa.Schema, made: Sequence[Made], output: Output) -> dict[str, Part]:
    rows = [
        _row(one, output, user, one.latents or _picture(one, _name(position, one, output)))
        for position, one in enumerate(made)
    ]
    group = max(1, GROUP_BYTES * len(made) // max(1, sum(len(one.data) for one in made)))
    schema = _schema(user, output, files=False, latents=made[0].latents is not None)
    data = parquet(rows, schema, group=min(group, 100))
    return {output.table(number): Part(data, len(rows))}


def _picture(one: Made, name: str) -> dict[str, Any]:
    return {"image": {"bytes": one.data, "path": name}}


def _image_files(number: int, user: pa.Schema, made: Sequence[Made], output: Output) -> dict[str, Part]:
    folder, names = f"data/images/part-{number:05d}", [_name(i, one, output) for i, one in enumerate(made)]
    files = {f"{folder}/{name}": Part(one.data) for name, one in zip(names, made, strict=True)}
    rows = [_row(one, output, user, {"file_name": name}) for name, one in zip(names, made, strict=True)]
    schema = _schema(user, output, files=True)
    if output.metadata == "jsonl":
        data = "".join(_json({name: row.get(name) for name in schema.names}) + "\n" for row in rows).encode()
    else:
        data = parquet(rows, schema)
    return files | {output.table(number): Part(data, len(rows))}


def _webdataset(number: int, user: pa.Schema, made: Sequence[Made], output: Output) -> dict[str, Part]:
    names = tar_schema(user, output).names
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for position, one in enumerate(made):
            row = _row(one, output, user, {})
            members = {
                output.extension: one.data,
                "json": _json({name: row.get(name) for name in names}).encode(),
                "txt": one.request.prompt.encode("utf-8", "replace"),
            }
            for extension, data in members.items():
                entry = tarfile.TarInfo(f"{number:05d}{position:05d}.{extension}")  # no time, no owner
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return {output.table(number): Part(sink.getvalue(), len(made))}


def tar_schema(user: pa.Schema, output: Output) -> pa.Schema:
    """What the JSON beside a picture in a tar holds."""
    return pa.schema([field for field in _schema(user, output, files=True) if field.name != "file_name"])


def _index(user: pa.Schema, made: Sequence[Made], output: Output) -> bytes:
    names = score_names(output.scores, user)
    rows = []
    for one in made:
        shown = _json(_shown(one, output, names)) if one.thumbnail else None
        rows.append({"id": one.image.id, "thumbnail": one.thumbnail, "shown": shown, **one.scores})
    return index_part(rows, output.scores)


def _shown(one: Made, output: Output, names: Mapping[str, str]) -> dict[str, Any]:
    """What the gallery says of an image: what is not as usual, and no more of a value than one can look at."""
    usual = {k: v for k, v in ImageRequest().parameters().items() if k not in ("prompt", "seed")}
    facts = {k: v for k, v in one.request.parameters().items() if k not in usual or v != usual[k]}
    if one.request.adapters:
        facts["adapters"] = as_text("adapters", one.request.adapters)
    facts |= {"model": output.model, **one.image.user}
    facts |= {names[name]: value for name, value in one.scores.items()}
    return {name: value for name, value in facts.items() if value is not None and not _is_large(value)}


def _is_large(value: object) -> bool:
    """Whether it is nothing to look at: bytes, or a list or struct of many numbers."""
    return _has_bytes(value) or (isinstance(value, (dict, list)) and len(str(value)) > MAX_SHOWN)


def _has_bytes(value: object) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, bytes) or any(map(_has_bytes, parts))


def _row(one: Made, output: Output, user: pa.Schema, image: Mapping[str, Any]) -> dict[str, Any]:
    facts = {"sha256": one.sha256, "model": output.model, "model_checksum": output.model_checksum}
    names = score_names(output.scores, user)
    scores = {names[name]: value for name, value in one.scores.items()}
    return data_row(one.image, one.request, {**image, **facts, **one.sources, **scores})


def _schema(user: pa.Schema, output: Output, *, files: bool, latents: bool = False) -> pa.Schema:
    names = score_names(output.scores, user)
    scores = [pa.field(names[name], kind) for name, kind in output.scores.items()]
    given = [column for column in output.sources if column in user.names]
    sources = [pa.field(digest_of(column), pa.string()) for column in given]
    if "init_image" in given:
        sources += [pa.field(name, kind) for name, kind in FRAME.items()]
    return data_schema(user, files=files, latents=latents, more=[*sources, *scores])


def score_names(scores: Iterable[str], user: pa.Schema) -> dict[str, str]:
    """Score to its column in the dataset: `score_` comes before one that the input has a column for."""
    taken, names = set(user.names), {}
    for name in scores:
        column = name
        while column in taken:
            column = f"score_{column}"
        names[name] = column
        taken.add(column)
    return names


def _name(position: int, one: Made, output: Output) -> str:
    """A file name; the position keeps apart what is alike in safe characters."""
    safe = re.sub(r"[^A-Za-z0-9_-]+", "_", one.image.id)[:60]
    return f"{position:05d}-{safe}.{output.extension}"


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(_plain(values), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace").decode()


def _plain(value: Any) -> Any:
    """A value of a table as JSON holds it: bytes as base64, times in ISO form, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (Decimal, datetime.timedelta)):
        return str(value)
    return value
