"""Text tables as rows, each with its place; one bad line costs one row.

CSV and TSV begin with a header line; an empty cell says nothing. JSONL has one object per line, text one prompt.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from ..config import InvalidJob


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row as it was read. `problem` says why it is no row at all; then `values` is empty.

    A value that stays where it is (bytes in a table or tar) is a `Reference`.
    """

    file: str
    """Path below the input's folder."""
    line: int
    """Line in a text file, row number elsewhere; both count from 1."""
    values: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    header: tuple[str, ...] = ()
    """The columns of a table whose rows leave out their empty cells."""


def read_csv(file: IO[bytes], name: str, delimiter: str = ",") -> Iterator[SourceRow]:
    """Rows of a CSV file.

    Raises:
        InvalidJob: the header is not usable, or a cell has no end that can be found.
    """
    # surrogateescape keeps undecodable bytes inside their own cell, so that only their row is lost.
    lines = (line.decode("utf-8", "surrogateescape") for line in _lines(file, name))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise InvalidJob(f"input {name}: header: {error}") from None
    if not header or len(set(header)) < len(header) or any(not is_text(c) or not c for c in header):
        raise InvalidJob(f"input {name}: the header needs distinct, non-empty UTF-8 names, got {header}")
    columns = tuple(header)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            until = f" to {reader.line_num}" if reader.line_num > line else ""
            if until and "field larger" in str(error):
                # What follows may be the rest of the cell as well as rows.
                most = f"{csv.field_size_limit():,} characters"
                raise InvalidJob(
                    f"input {name}: line {line}{until}: a cell in quotes has more than {most}"
                ) from None
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
        yield checked(name, line, values, columns)


def read_tsv(file: IO[bytes], name: str) -> Iterator[SourceRow]:
    """Rows of a table with tabs."""
    return read_csv(file, name, delimiter="\t")


def read_jsonl(file: IO[bytes], name: str) -> Iterator[SourceRow]:
    """Rows of a file with one JSON object per line."""
    for line, data in enumerate(_lines(file, name), start=1):
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
        yield checked(name, line, values)


def read_text(file: IO[bytes], name: str) -> Iterator[SourceRow]:
    """Rows of a file with one prompt per line."""
    for line, data in enumerate(_lines(file, name), start=1):
        if data.strip():
            prompt = data.decode("utf-8", "surrogateescape").rstrip("\r\n")
            yield checked(name, line, {"prompt": prompt})


def checked(name: str, line: int, values: dict[str, Any], header: tuple[str, ...] = ()) -> SourceRow:
    """The row, unless some text in it is no Unicode (undecodable bytes, lone surrogates)."""
    for column, value in values.items():
        if not (is_text(column) and is_text(value)):
            return SourceRow(name, line, problem=f"line {line}, column {column!r}: not valid UTF-8")
    return SourceRow(name, line, values, header=header)


def is_text(value: object) -> bool:
    """Whether every string in a plain value can be written as UTF-8."""
    if isinstance(value, str):
        if value.isascii():
            return True
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return False
    elif isinstance(value, (dict, list)):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return all(is_text(part) for part in parts)
    return True


def _lines(file: IO[bytes], name: str) -> Iterator[bytes]:
    for number, line in enumerate(file):
        if number == 0 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise InvalidJob(f"input {name}: got UTF-16, allowed is UTF-8")
        yield line.removeprefix(codecs.BOM_UTF8) if number == 0 else line
