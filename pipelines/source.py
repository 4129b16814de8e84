"""The input table as a stream of rows, in file order, with the place where each row stands.

Read by this file rather than by Ray Data: ids, seeds and shards depend on row order and on line numbers,
and one bad line must cost one row. Memory stays constant whatever the table's size.

    .csv .tsv          a header line, then one record per row; an empty cell says nothing
    .jsonl .ndjson     one JSON object per line
    .parquet           any Parquet file
    .txt               one prompt per line

A folder or a glob is all such files below it, in name order. `.gz`, `.bz2`, `.xz` and `.zst` are unpacked.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from posixpath import basename, splitext
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffray.model.storage import open_storage

from .config import InvalidJob

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row as it was read. `problem` says why it is no row at all; then `values` is empty."""

    file: str
    line: int
    """Line in a text file, row number in a Parquet file; both count from 1."""
    values: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


class Source:
    """The input files of one job.

    Raises:
        InvalidJob: there is no such file, or one has an unknown ending.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        try:
            self._fs, root = open_storage(url, options)
            paths = _expand(self._fs, str(root))
        except (ValueError, ImportError, OSError) as error:
            raise InvalidJob(f"input {url}: {error}") from None
        if not paths:
            raise InvalidJob(f"input {url}: no such file, or a folder without input files")
        self.files = tuple(paths)
        self._readers = [_reader(path) for path in paths]

    def rows(self) -> Iterator[SourceRow]:
        """All rows of all files.

        Raises:
            InvalidJob: a file cannot be read as what its ending says (no header, broken Parquet).
        """
        for path, reader in zip(self.files, self._readers, strict=True):
            try:
                with self._fs.open(path, "rb", compression="infer") as file:
                    yield from reader(file, basename(path))
            except (OSError, EOFError, pa.ArrowException) as error:
                raise InvalidJob(f"input {path}: {error}") from None

    def fingerprint(self) -> list[dict[str, Any]]:
        """Name, size and SHA-256 of every file."""
        return [self._digest(path) for path in self.files]

    def schema(self) -> pa.Schema | None:
        """The columns and their types where the files state them (Parquet), else None."""
        if any(reader is not _parquet for reader in self._readers):
            return None
        schemas = []
        for path in self.files:
            with self._fs.open(path, "rb") as file:
                try:
                    schemas.append(pq.read_schema(file))
                except pa.ArrowException as error:
                    raise InvalidJob(f"input {path}: {error}") from None
        try:
            return pa.unify_schemas(schemas, promote_options="permissive")
        except pa.ArrowException as error:
            raise InvalidJob(f"input files disagree about a column: {error}") from None

    def _digest(self, path: str) -> dict[str, Any]:
        digest, size = hashlib.sha256(), 0
        with self._fs.open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
        return {"name": basename(path), "bytes": size, "sha256": digest.hexdigest()}


def _expand(fs: Any, root: str) -> list[str]:
    if any(c in root for c in "*?["):
        found = fs.glob(root)
    elif fs.isdir(root):
        found = fs.find(root)
    else:
        return [root] if fs.exists(root) else []
    visible = (str(p) for p in found if "/_" not in str(p)[len(root) :] and "/." not in str(p)[len(root) :])
    return sorted(p for p in visible if _ending(p) in READERS)


def _ending(path: str) -> str:
    stem, ending = splitext(path.lower())
    return splitext(stem)[1] if ending in COMPRESSED else ending


def _reader(path: str) -> Callable[[IO[bytes], str], Iterator[SourceRow]]:
    try:
        return READERS[_ending(path)]
    except KeyError:
        raise InvalidJob(f"input {path}: allowed endings are {', '.join(READERS)}") from None


def _csv(file: IO[bytes], name: str, delimiter: str = ",") -> Iterator[SourceRow]:
    # surrogateescape keeps undecodable bytes inside their own cell, so that only their row is lost.
    lines = (line.decode("utf-8", "surrogateescape") for line in _without_bom(file))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise InvalidJob(f"input {name}: header: {error}") from None
    if not header or len(set(header)) < len(header) or any(not _is_text(c) or not c for c in header):
        raise InvalidJob(f"input {name}: the header needs distinct, non-empty UTF-8 names, got {header}")
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            until = f" to {reader.line_num}" if reader.line_num > line else ""
            yield SourceRow(name, line, problem=f"line {line}{until} is no CSV record: {error}")
            continue
        if not cells:
            continue
        if len(cells) != len(header):
            problem = f"line {line} has {len(cells)} cells, the header has {len(header)}"
            yield SourceRow(name, line, problem=problem)
            continue
        # An empty cell cannot tell "absent" from "empty"; only an empty prompt means something.
        values = {c: v for c, v in zip(header, cells, strict=True) if v or c == "prompt"}
        yield _checked(name, line, values)


def _tsv(file: IO[bytes], name: str) -> Iterator[SourceRow]:
    return _csv(file, name, delimiter="\t")


def _jsonl(file: IO[bytes], name: str) -> Iterator[SourceRow]:
    for line, data in enumerate(_without_bom(file), start=1):
        if not data.strip():
            continue
        try:
            values = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            yield SourceRow(name, line, problem=f"line {line} is no JSON: {error}")
            continue
        if not isinstance(values, dict):
            problem = f"line {line} is a JSON {type(values).__name__}, expected an object"
            yield SourceRow(name, line, problem=problem)
            continue
        yield _checked(name, line, values)


def _text(file: IO[bytes], name: str) -> Iterator[SourceRow]:
    for line, data in enumerate(_without_bom(file), start=1):
        if data.strip():
            prompt = data.decode("utf-8", "surrogateescape").rstrip("\r\n")
            yield _checked(name, line, {"prompt": prompt})


def _parquet(file: IO[bytes], name: str) -> Iterator[SourceRow]:
    line = 0
    for batch in pq.ParquetFile(file).iter_batches(batch_size=1000):
        for values in batch.to_pylist():
            line += 1
            yield _checked(name, line, values)


def _checked(name: str, line: int, values: dict[str, Any]) -> SourceRow:
    """The row, unless some text in it is no Unicode (undecodable bytes, lone surrogates)."""
    for column, value in values.items():
        if not (_is_text(column) and _is_text(value)):
            return SourceRow(name, line, problem=f"line {line}, column {column!r}: not valid UTF-8")
    return SourceRow(name, line, values)


def _is_text(value: object) -> bool:
    """Whether every string in a plain value can be written as UTF-8."""
    if isinstance(value, (dict, list)):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return all(_is_text(part) for part in parts)
    if not isinstance(value, str) or value.isascii():
        return True
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _without_bom(file: IO[bytes]) -> Iterator[bytes]:
    for number, line in enumerate(file):
        yield line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line


READERS: dict[str, Callable[[IO[bytes], str], Iterator[SourceRow]]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".parquet": _parquet,
    ".txt": _text,
}
