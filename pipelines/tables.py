"""The three Parquet tables of a job: plan shards, data parts, rejected parts.

Their bytes depend on their content only: no time, no host, no random name goes in. User columns keep their
names, with `input_` before those that diffray itself uses.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffray.model.request import ImageRequest

from .rows import COUNT_COLUMNS, REQUEST_COLUMNS, PlannedImage, as_text, given_place
from .source import SourceRow

ROW_GROUP = 100
"""Images per row group: readers that want one image load at most this many."""

_ID = [("id", pa.string()), ("row_id", pa.string()), ("index", pa.int64())]
_PLACE = [("file", pa.string()), ("line", pa.int64())]
_PLAN = [
    *_ID,
    *_PLACE,
    *REQUEST_COLUMNS.items(),
    ("field", pa.string()),
    ("reason", pa.string()),
    ("original", pa.string()),
]
_MADE = [("sha256", pa.string()), ("model", pa.string()), ("model_checksum", pa.string())]
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_VERDICT = [("stage", pa.string()), ("field", pa.string()), ("reason", pa.string()), ("attempts", pa.int64())]
_TEXTS = [(name, pa.string()) for name in REQUEST_COLUMNS]
OWN_COLUMNS = {name for name, _ in [*_PLAN, *_MADE, *_VERDICT]} | {"image", "file_name"}
_HUGGINGFACE = {b"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}}).encode()}


class UserColumns:
    """The input columns that diffray does not know: their names and types in the output.

    Types are those that Parquet input states (`stated`), else what fits all values that `observe` saw; a
    column whose values fit no common type becomes JSON text.
    """

    def __init__(self, stated: pa.Schema | None) -> None:
        self._stated = {field.name: field.type for field in stated} if stated else {}
        self._types: dict[str, pa.DataType | None] = {}
        self._pending: dict[str, list[Any]] = {}
        self._names: dict[str, str] = {}
        self.schema = pa.schema([])

    def observe(self, row: SourceRow) -> None:
        """Take a row's columns and values into account."""
        for name, value in _unknown(row).items():
            if name in self._stated:
                self._types[name] = self._stated[name]
                continue
            self._types.setdefault(name, pa.null())
            pending = self._pending.setdefault(name, [])
            pending.append(value)
            if len(pending) >= 1000:
                self._settle(name)

    def finish(self) -> None:
        """Fix names and types; `schema` and `pick` are valid from here on."""
        for name in self._pending:
            self._settle(name)
        fields = []
        for name, kind in self._types.items():
            output = name
            while (
                output in OWN_COLUMNS
                or output in self._names.values()
                or (output != name and output in self._types)
            ):
                output = f"input_{output}"
            self._names[name] = output
            fields.append(pa.field(output, pa.string() if kind is None or pa.types.is_null(kind) else kind))
        self.schema = pa.schema(fields)

    def pick(self, row: SourceRow) -> dict[str, Any]:
        """A row's user values by output name."""
        values = _unknown(row)
        return {
            self._names[name]: _json(value) if self._types[name] is None else value
            for name, value in values.items()
        }

    def _settle(self, name: str) -> None:
        """Widen the type of a column to what its pending values need; None stands for JSON text."""
        kind, values = self._types[name], self._pending[name]
        self._pending[name] = []
        if kind is None:
            return
        try:
            schemas = [pa.schema([(name, kind)]), pa.schema([(name, pa.array(values).type)])]
            merged = pa.unify_schemas(schemas, promote_options="permissive").field(name).type
            self._types[name] = None if "struct<>" in str(merged) else merged
        except (pa.ArrowException, OverflowError):
            self._types[name] = None


def _unknown(row: SourceRow) -> dict[str, Any]:
    known = {*REQUEST_COLUMNS, *COUNT_COLUMNS, "id"}
    if given_place(row):
        known |= OWN_COLUMNS
    return {name: value for name, value in row.values.items() if name not in known}


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, default=str)


@dataclass(frozen=True, slots=True)
class PlanShard:
    """Some images of the plan, and the schema of their user columns."""

    images: tuple[PlannedImage, ...]
    user: pa.Schema

    def to_parquet(self) -> bytes:
        """The shard as a Parquet file."""
        rows = [
            {
                **_identity(image),
                "file": image.file,
                "line": image.line,
                **(_parameters(image.request) if image.request else {}),
                "field": image.field,
                "reason": image.reason,
                "original": json.dumps(image.original, ensure_ascii=False) if image.original else None,
                **image.user,
            }
            for image in self.images
        ]
        return parquet(rows, pa.schema([*_fields(_PLAN), *self.user]))

    @classmethod
    def from_parquet(cls, data: bytes) -> PlanShard:
        """The shard that `to_parquet` wrote."""
        table = pq.read_table(io.BytesIO(data))
        own = {name for name, _ in _PLAN}
        user = pa.schema([field for field in table.schema if field.name not in own])
        return cls(tuple(_planned(row, user.names) for row in table.to_pylist()), user)


def _planned(row: dict[str, Any], user: list[str]) -> PlannedImage:
    request = None
    if row["reason"] is None:
        values: dict[str, Any] = {
            name: tuple(v) if isinstance(v := row[name], list) else v for name in REQUEST_COLUMNS
        }
        request = ImageRequest(**values)
    return PlannedImage(
        id=row["id"],
        row_id=row["row_id"],
        index=row["index"],
        file=row["file"],
        line=row["line"],
        request=request,
        field=row["field"],
        reason=row["reason"],
        original=json.loads(row["original"] or "{}"),
        user={name: row[name] for name in user},
    )


def data_row(image: PlannedImage, request: ImageRequest, made: Mapping[str, Any]) -> dict[str, Any]:
    """One row of a data part: identity, `made` (image, checksums, model), request, user columns."""
    return {**_identity(image), **made, **_parameters(request), **image.user}


def data_schema(user: pa.Schema, *, files: bool) -> pa.Schema:
    """The schema of data parts; with image files it names the file instead of holding the bytes."""
    image = [pa.field("file_name", pa.string())] if files else [pa.field("image", _IMAGE)]
    fields = [*_fields(_ID), *image, *_fields(REQUEST_COLUMNS.items()), *_fields(_MADE), *user]
    return pa.schema(fields, metadata=None if files else _HUGGINGFACE)


def rejected_row(image: PlannedImage, verdict: Mapping[str, Any]) -> dict[str, Any]:
    """One row of a rejected part: identity, verdict, the row's own values as text, ready to be fed back."""
    own = image.original
    if image.request is not None:
        own = {name: as_text(value) for name, value in _parameters(image.request).items()}
    return {**_identity(image), **verdict, "file": image.file, "line": image.line, **own, **image.user}


def rejected_schema(user: pa.Schema) -> pa.Schema:
    """The schema of rejected parts."""
    return pa.schema([*_fields(_ID), *_fields(_VERDICT), *_fields(_PLACE), *_fields(_TEXTS), *user])


def parquet(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> bytes:
    """Rows as a Parquet file, the same bytes for the same rows."""
    columns = [pa.array([row.get(field.name) for row in rows], type=field.type) for field in schema]
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_arrays(columns, schema=schema), sink, row_group_size=ROW_GROUP, compression="zstd"
    )
    return sink.getvalue()


def _identity(image: PlannedImage) -> dict[str, Any]:
    return {"id": image.id, "row_id": image.row_id, "index": image.index}


def _parameters(request: ImageRequest) -> dict[str, Any]:
    return {name: getattr(request, name) for name in REQUEST_COLUMNS}


def _fields(columns: Iterable[tuple[str, pa.DataType]]) -> list[pa.Field]:
    return [pa.field(name, kind) for name, kind in columns]
