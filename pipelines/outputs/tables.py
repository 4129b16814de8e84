"""The three Parquet tables of a job: plan shards, data parts, rejected parts.

Their bytes depend on their content only: no time, no host, no random name goes in.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffray.model.request import ImageRequest

from ..inputs.carried import FEATURE
from ..inputs.references import Reference, StructReference, is_blob
from ..terms.image import PlannedImage
from ..terms.schemas import ID, IMAGE, LATENTS, MADE, PLACE, PLAN, VERDICT
from ..terms.values import REQUEST_COLUMNS, as_text

ROW_GROUP = 100
"""Images per row group: readers that want one image load at most this many."""
_PLAN_TYPE = b"diffray"
"""In the plan, values that stay in the input are text; this key of the column's metadata holds their own type."""


@dataclass(frozen=True, slots=True)
class PlanShard:
    """Some images of the plan, and the schema of their user columns."""

    images: tuple[PlannedImage, ...]
    user: pa.Schema

    def to_parquet(self) -> bytes:
        """The shard as a Parquet file."""
        rows = [
            {
                **{name: getattr(image, name) for name in _PLANNED},
                **{name: _json(getattr(image, name)) for name in _MAPPINGS},
                **image.user,
            }
            for image in self.images
        ]
        return parquet(rows, pa.schema([*_fields(PLAN), *(_as_planned(field) for field in self.user)]))

    @classmethod
    def from_parquet(cls, data: bytes) -> PlanShard:
        """The shard that `to_parquet` wrote."""
        table = pq.read_table(io.BytesIO(data))
        user = pa.schema([_as_carried(field) for field in table.schema if field.name not in PLAN])
        left = {
            field.name: StructReference if pa.types.is_struct(field.type) else Reference
            for field in user
            if is_blob(field.type)
        }
        return cls(tuple(_planned(row, user.names, left) for row in table.to_pylist()), user)


_MAPPINGS = ("original", "source_stamps")
_PLANNED = [name for name in PLAN if name not in _MAPPINGS]


def _json(values: Mapping[str, str | None]) -> str | None:
    return json.dumps(values, ensure_ascii=False) if values else None


def _planned(row: dict[str, Any], user: list[str], left: Mapping[str, type[Reference]]) -> PlannedImage:
    for name, kind in left.items():
        row[name] = None if row[name] is None else kind(row[name])
    return PlannedImage(
        **{name: row[name] for name in _PLANNED},
        **{name: json.loads(row[name] or "{}") for name in _MAPPINGS},
        user={name: row[name] for name in user},
    )


def _as_planned(field: pa.Field) -> pa.Field:
    if not is_blob(field.type):
        return field
    own = base64.b64encode(pa.schema([pa.field("of", field.type)]).serialize().to_pybytes())
    return pa.field(field.name, pa.string(), metadata={**(field.metadata or {}), _PLAN_TYPE: own})


def _as_carried(field: pa.Field) -> pa.Field:
    metadata = field.metadata or {}
    kind, feature = metadata.get(_PLAN_TYPE), metadata.get(FEATURE)
    own = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(kind))).field(0).type if kind else field.type
    return pa.field(field.name, own, metadata={FEATURE: feature} if feature else None)


def source_stamps(shard: bytes, columns: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Of every image in a plan shard that has stamps: its id, and its source files with their stamps by path."""
    table = pq.read_table(io.BytesIO(shard))
    rows = table.select([n for n in ("id", "source_stamps", *columns) if n in table.column_names]).to_pylist()
    stamps = ((row, json.loads(row["source_stamps"])) for row in rows if row["source_stamps"])
    return [(row["id"], {row[column]: stamp for column, stamp in own.items()}) for row, own in stamps]


def data_row(image: PlannedImage, request: ImageRequest, made: Mapping[str, Any]) -> dict[str, Any]:
    """One row of a data part: identity, `made` (image, checksums, model), request, user columns."""
    return {**_identity(image), **made, **request.parameters(), **image.user}


def data_schema(
    user: pa.Schema, *, files: bool, latents: bool = False, more: Sequence[pa.Field] = ()
) -> pa.Schema:
    """The schema of data parts; with image files it names the file, or it holds latents, instead of the bytes.

    Args:
        user: the columns carried from the input.
        more: digests of sources, the frame of the source picture, and scores.
    """
    image = [pa.field("file_name", pa.string())] if files else [pa.field("image", IMAGE)]
    if latents:
        image = _fields(LATENTS)
    carried = [field.with_metadata(None) for field in user]
    fields = [*_fields(ID), *image, *_fields(REQUEST_COLUMNS), *_fields(MADE), *more, *carried]
    features = {f.name: f.metadata[FEATURE] for f in user if FEATURE in (f.metadata or {})}
    # Of pictures `imagefolder` expects names of files, and takes those with bytes for missing.
    known = {n: json.loads(own) for n, own in features.items() if not (files and b'"Image"' in own)}
    if not (files or latents):
        known["image"] = {"_type": "Image"}
    info = {FEATURE: json.dumps({"info": {"features": known}}).encode()}
    return pa.schema(fields, metadata=info if known else None)


def rejected_row(image: PlannedImage, verdict: Mapping[str, Any]) -> dict[str, Any]:
    """One row of a rejected part: identity, verdict, the row's own values as text, ready to be fed back."""
    own, request = image.original, image.request
    if request is not None:
        own = {name: as_text(name, value) for name, value in request.parameters().items()}
    place = {"file": image.file, "line": image.line}  # large values of the row are still there
    user = {name: None if isinstance(v, Reference) else v for name, v in image.user.items()}
    return {**_identity(image), **verdict, **place, "model": image.model or None, **own, **user}


def rejected_schema(user: pa.Schema) -> pa.Schema:
    """The schema of rejected parts."""
    texts = {"model": pa.string(), **dict.fromkeys(REQUEST_COLUMNS, pa.string())}
    return pa.schema([*_fields(ID), *_fields(VERDICT), *_fields(PLACE), *_fields(texts), *user])


def parquet(rows: Sequence[Mapping[str, Any]], schema: pa.Schema, *, group: int = ROW_GROUP) -> bytes:
    """Rows as a Parquet file of row groups of `group` rows, the same bytes for the same rows."""
    columns = [pa.array([row.get(field.name) for row in rows], type=field.type) for field in schema]
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_arrays(columns, schema=schema),
        sink,
        row_group_size=group,
        compression="zstd",
        use_dictionary=[field.name for field in schema if field.name != "image"],
        write_page_index=True,
    )
    return sink.getvalue()


def _identity(image: PlannedImage) -> dict[str, Any]:
    return {name: getattr(image, name) for name in ID}


def _fields(columns: Mapping[str, pa.DataType]) -> list[pa.Field]:
    return [pa.field(name, kind) for name, kind in columns.items()]
