"""Parquet, Arrow and Lance tables as rows. Cells of bytes are not read; the row holds a reference to them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from .readers import SourceRow
from .references import Cell, Reference, is_blob

BATCH = 1000


def read_parquet(file: IO[bytes], name: str) -> Iterator[SourceRow]:
    """Rows of a Parquet file."""
    table = pq.ParquetFile(file)
    blobs = [field.name for field in table.schema_arrow if is_blob(field.type)]
    plain = [field.name for field in table.schema_arrow if not is_blob(field.type)]
    start = 0
    for group in range(table.num_row_groups):  # one iteration over all of them would keep what it has read
        for batch in table.iter_batches(batch_size=BATCH, row_groups=[group], columns=plain):
            yield from _rows(batch, name, start, blobs)
            start += batch.num_rows


def read_arrow(file: IO[bytes], name: str) -> Iterator[SourceRow]:
    """Rows of an Arrow stream, as `datasets` saves it, or an Arrow file."""
    start = 0
    for batch in arrow_batches(file):
        blobs = [field.name for field in batch.schema if is_blob(field.type)]
        rest = batch.drop_columns(blobs) if blobs else batch
        yield from _rows(rest, name, start, blobs)
        start += batch.num_rows


def read_lance(dataset: Any, name: str) -> Iterator[SourceRow]:
    """Rows of a version of a Lance dataset."""
    blobs = [field.name for field in dataset.schema if is_blob(field.type)]
    plain = [field.name for field in dataset.schema if not is_blob(field.type)]
    start = 0
    for batch in dataset.to_batches(columns=plain, batch_size=BATCH, scan_in_order=True):
        yield from _rows(batch, name, start, blobs)
        start += batch.num_rows


def stated_schema(file: IO[bytes], name: str) -> pa.Schema:
    """The columns and types that a table states."""
    if name.endswith(".parquet"):
        return pq.read_schema(file)
    try:
        return pa.ipc.open_stream(file).schema
    except pa.ArrowInvalid:
        file.seek(0)
        return pa.ipc.open_file(file).schema


def features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Column to what a Hugging Face dataset says about it: that it is a picture, the names of its classes."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in found.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _rows(batch: pa.RecordBatch, name: str, start: int, blobs: list[str]) -> Iterator[SourceRow]:
    try:
        rows: list[dict[str, Any] | None] = batch.to_pylist()
    except UnicodeDecodeError:  # some text in it is not valid UTF-8; Arrow does not check
        rows = [_row(batch, i) for i in range(batch.num_rows)]
    for i in range(batch.num_rows):
        values, number = rows[i] if rows else {}, start + i
        if values is None:
            yield SourceRow(name, number + 1, problem=f"row {number + 1}: not valid UTF-8")
            continue
        for column in blobs:
            values[column] = Reference.to(Cell(name, number, column))
        yield SourceRow(name, number + 1, values)


def _row(batch: pa.RecordBatch, index: int) -> dict[str, Any] | None:
    try:
        return dict(batch.slice(index, 1).to_pylist()[0])
    except UnicodeDecodeError:
        return None


def arrow_batches(file: IO[bytes] | pa.NativeFile) -> Iterator[pa.RecordBatch]:
    """The batches of an Arrow stream or file, whichever it is."""
    try:
        stream = pa.ipc.open_stream(file)
    except pa.ArrowInvalid:
        file.seek(0)
        found = pa.ipc.open_file(file)
        for i in range(found.num_record_batches):
            yield found.get_batch(i)
        return
    yield from stream
