"""Reading what references (`references.py`) lead to: files, members of tars, cells of tables."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from posixpath import basename, dirname, join
from typing import Any, TypeVar

import pyarrow as pa

from diffray.model.errors import JobError
from diffray.model.storage import open_storage

from .cells import ArrowTable, ParquetTable, Table
from .lance import ENDING as LANCE
from .lance import LanceTable, lance_url
from .references import INPUT, BlobError, Cell, Member, below, is_blob, parsed_reference
from .stamps import is_absent, same, stamp

T = TypeVar("T")

ATTEMPTS = 4
"""Reads of one object before the storage, not the row, is taken to be broken."""
SPARE = 4
"""Places that are kept beyond those that are read in turn: readers run a little ahead of each other."""


class Blobs:
    """Reads what references lead to. Thread safe.

    Args:
        root: folder of the job's input.
        files: folder of files that are named by path; None is `root`.
        storage: fsspec options by URL, as `JobConfig.storage_options` gives them.
        limit: bytes of one value, at most.
        planned: fingerprint of the input that was planned; None where there is no plan.
        exact: whether more than the size in a file's stamp counts.
        places: how many places of a table are read in turn: one for each shard in flight, say.

    Attributes:
        moves: grows with each read that begins, goes on or ends: a sign of life.
    """

    def __init__(
        self,
        root: str,
        files: str | None,
        storage: Callable[[str], Mapping[str, Any]],
        limit: int,
        planned: Sequence[Mapping[str, Any]] | None = None,
        *,
        exact: bool = True,
        places: int = 4,
    ) -> None:
        self._roots = {True: open_storage(root, storage(root))}
        self._roots[False] = open_storage(files, storage(files)) if files else self._roots[True]
        self._files = files or root
        self._limit, self._storage, self._planned, self._exact = limit, storage, planned, exact
        self._places = places + SPARE
        self.moves = 0
        self._seen = set[str]()
        """Tars of the input that have the planned size."""
        self._tables: OrderedDict[tuple[bool, str], Table] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, text: str, planned: str | None = None) -> bytes | None:
        """The bytes that a reference leads to; None when it is a cell that holds nothing.

        Args:
            text: the reference.
            planned: the stamp of the file that it names, when the job was planned.

        Raises:
            BlobError: there is no such thing, it is outside the folder, or it is too large.
            JobError: the storage does not answer, or the input is not what it was when the job was planned.
        """
        inside = text.startswith(INPUT)
        reference = parsed_reference(text.removeprefix(INPUT))
        if isinstance(reference, Cell):
            return self._cell(reference, inside)
        if isinstance(reference, Member):
            return self._member(reference, inside)
        return self._file(reference, inside, planned)

    def _member(self, reference: Member, inside: bool) -> bytes:
        start, size = reference.offset, reference.bytes
        if size > self._limit:
            raise BlobError(f"{reference}: got {size} bytes, allowed are {self._limit}")

        def read(fs: Any, path: str) -> bytes:
            if inside and path not in self._seen:
                self._check_size(fs, path)
                self._seen.add(path)
            return bytes(fs.cat_file(path, start=start, end=start + size))

        data = self._patiently(reference.file, inside, read, planned=inside)
        if len(data) != size:
            raise _changed(inside, f"{reference}: the file ends after {len(data)} of {size} bytes")
        return data

    def _file(self, path: str, inside: bool, planned: str | None = None) -> bytes:
        def look(fs: Any, full: str) -> Mapping[str, Any]:
            info: Mapping[str, Any] = fs.info(full)
            if planned and not same(planned, now := stamp(info), exact=self._exact):
                raise _changed(True, f"{path}: {planned} -> {now}")
            return info

        def read(fs: Any, full: str) -> bytes:
            if (size := look(fs, full).get("size") or 0) > self._limit:
                raise BlobError(f"{path}: got {size} bytes, allowed are {self._limit}")
            data = bytes(fs.cat_file(full))
            if planned:
                look(fs, full)  # it may have been written since the first look
            return data

        return self._patiently(path, inside, read, planned=planned is not None)

    def _cell(self, reference: Cell, inside: bool) -> bytes | None:
        table = self._table(reference.file, inside)
        if reference.row >= table.rows:
            raise _changed(inside, f"{reference}: the table has {table.rows} rows")
        # Names that stand there twice have no index either.
        if (index := table.schema.get_field_index(reference.column)) < 0:
            raise BlobError(f"{reference}: no such column")
        if not is_blob(kind := table.schema.field(index).type):
            raise BlobError(f"{reference}: got {kind}, expected bytes")
        row, column = reference.row, reference.column
        value = self._patiently(reference.file, inside, lambda *_: table.value(row, column), planned=inside)
        if isinstance(value, dict):
            data, path = value.get("bytes"), value.get("path")
            if data is None and path:
                return self._file(join(dirname(reference.file), path), inside)
            value = data
        if value is not None and len(value) > self._limit:
            raise BlobError(f"{reference}: got {len(value)} bytes, allowed are {self._limit}")
        return value

    def _table(self, file: str, inside: bool) -> Table:
        key = (inside, file)
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
            table = self._tables[key] = self._patiently(
                file, inside, partial(self._opened, inside), planned=inside
            )
            if len(self._tables) > self._places:
                self._tables.popitem(last=False)
            return table

    def _opened(self, inside: bool, fs: Any, path: str) -> Table:
        if path.endswith(LANCE):
            url = lance_url(fs, path)
            return LanceTable(url, self._storage(url), self._planned if inside else None)
        if inside:
            self._check_size(fs, path)
        if path.endswith(".parquet"):
            return ParquetTable(fs, path, self._places, self._moved)
        return ArrowTable(fs, path)

    def _check_size(self, fs: Any, path: str) -> None:
        """Refuse a file of the input that is not as large as the one that was planned."""
        name, planned = basename(path), self._planned or ()
        sizes = {entry["bytes"] for entry in planned if entry["name"] == name and "bytes" in entry}
        if sizes and (now := fs.size(path)) not in sizes:
            raise _changed(True, f"{name} has {now} bytes, planned were {min(sizes)}")

    def _patiently(self, path: str, inside: bool, read: Callable[[Any, str], T], *, planned: bool) -> T:
        """`read(filesystem, full path)`; what is missing is the row's fault unless the plan has seen it, all else is
        tried again."""
        fs, root = self._roots[inside]
        full = join(root, below(root if inside else self._files, path))
        for attempt in range(ATTEMPTS):
            self._moved()
            try:
                return read(fs, full)
            except (BlobError, JobError):
                raise
            except pa.ArrowException as error:
                raise BlobError(f"{path}: {error}") from None
            except Exception as error:  # of any type: each storage's library has its own
                if isinstance(error, OSError) and is_absent(error):
                    raise _changed(planned, f"{path}: no such file") from None
                if attempt == ATTEMPTS - 1:
                    raise JobError(f"{path} cannot be read: {str(error) or type(error).__name__}") from error
                time.sleep(0.1 * 4**attempt)
            finally:
                self._moved()
        raise AssertionError

    def _moved(self) -> None:
        self.moves += 1


def _changed(planned: bool, what: str) -> Exception:
    """What is not there as the plan found it is the job's trouble; what a row names by itself is the row's."""
    if planned:
        return JobError(f"the input changed since the job was planned: {what}")
    return BlobError(what)
