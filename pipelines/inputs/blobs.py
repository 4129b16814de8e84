"""Reading what references (`references.py`) lead to: files, members of tars, cells of tables."""

from __future__ import annotations

import bisect
import io
import itertools
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from posixpath import dirname, join
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from diffray.model.errors import JobError
from diffray.model.storage import open_storage

from .lance import ENDING as LANCE
from .lance import LanceRows, lance_url
from .references import INPUT, BlobError, Cell, Member, below, parsed_reference
from .stamps import is_absent, same, stamp

T = TypeVar("T")

ATTEMPTS = 4
"""Reads of one object before the storage, not the row, is taken to be broken."""
OPEN_TABLES = 8
"""Tables that one reader keeps open."""
CURSORS = 8
"""Places of one table that are read in turn: shards in flight, times columns."""
WINDOW = 32
"""Rows that are read at a time."""


class Blobs:
    """Reads what references lead to. Thread safe.

    Args:
        root: folder of the job's input.
        files: folder of files that are named by path; None is `root`.
        storage: fsspec options by URL, as `JobConfig.storage_options` gives them.
        limit: bytes of one value, at most.
        planned: fingerprint of the input that was planned; None where there is no plan.
    """

    def __init__(
        self,
        root: str,
        files: str | None,
        storage: Callable[[str], Mapping[str, Any]],
        limit: int,
        planned: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self._roots = {True: open_storage(root, storage(root))}
        self._roots[False] = open_storage(files, storage(files)) if files else self._roots[True]
        self._files = files or root
        self._limit, self._storage, self._planned = limit, storage, planned
        self._tables: OrderedDict[tuple[bool, str], _Rows | _LanceTable] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, text: str, planned: str | None = None, *, exact: bool = True) -> bytes | None:
        """The bytes that a reference leads to; None when it is a cell that holds nothing.

        Args:
            text: the reference.
            planned: the stamp of the file that it names, when the job was planned.
            exact: whether more than the size in the stamp counts.

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
        return self._file(reference, inside, planned, exact)

    def _member(self, reference: Member, inside: bool) -> bytes:
        start, size = reference.offset, reference.bytes
        if size > self._limit:
            raise BlobError(f"{reference}: got {size} bytes, allowed are {self._limit}")
        data = self._patiently(
            reference.file, inside, lambda fs, path: fs.cat_file(path, start=start, end=start + size)
        )
        if len(data) != size:
            raise _changed(inside, f"{reference}: the file ends after {len(data)} of {size} bytes")
        return bytes(data)

    def _file(self, path: str, inside: bool, planned: str | None = None, exact: bool = True) -> bytes:
        def read(fs: Any, full: str) -> bytes:
            info = fs.info(full)
            if planned and not same(planned, now := stamp(info), exact=exact):
                raise _changed(True, f"{path}: {planned} -> {now}")
            if (info.get("size") or 0) > self._limit:
                raise BlobError(f"{path}: got {info['size']} bytes, allowed are {self._limit}")
            return bytes(fs.cat_file(full))

        return self._patiently(path, inside, read)

    def _cell(self, reference: Cell, inside: bool) -> bytes | None:
        table = self._table(reference.file, inside)
        if reference.row >= table.rows:
            raise _changed(inside, f"{reference}: the table has {table.rows} rows")
        value = table.value(reference)
        if isinstance(value, dict):
            data, path = value.get("bytes"), value.get("path")
            if data is None and path:
                return self._file(join(dirname(reference.file), path), inside)
            value = data
        if value is not None and not isinstance(value, bytes):
            raise BlobError(f"{reference}: got {type(value).__name__}, expected bytes")
        if value is not None and len(value) > self._limit:
            raise BlobError(f"{reference}: got {len(value)} bytes, allowed are {self._limit}")
        return value

    def _table(self, file: str, inside: bool) -> _Rows | _LanceTable:
        key = (inside, file)
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
            table = self._tables[key] = self._patiently(file, inside, partial(self._opened, inside))
            if len(self._tables) > OPEN_TABLES:
                self._tables.popitem(last=False)
            return table

    def _opened(self, inside: bool, fs: Any, path: str) -> _Rows | _LanceTable:
        if not path.endswith(LANCE):
            return _Rows(fs, path)
        url = lance_url(fs, path)
        return _LanceTable(LanceRows(url, self._storage(url), self._planned if inside else None))

    def _patiently(self, path: str, inside: bool, read: Callable[[Any, str], T]) -> T:
        """`read(filesystem, full path)`; what is missing is the row's fault, all else is tried again."""
        fs, root = self._roots[inside]
        full = join(root, below(root if inside else self._files, path))
        for attempt in range(ATTEMPTS):
            try:
                return read(fs, full)
            except (BlobError, JobError):
                raise
            except pa.ArrowException as error:
                raise BlobError(f"{path}: {error}") from None
            except Exception as error:  # of any type: each storage's library has its own
                if isinstance(error, OSError) and is_absent(error):
                    raise _changed(inside, f"{path}: no such file") from None
                if attempt == ATTEMPTS - 1:
                    raise JobError(f"{path} cannot be read: {str(error) or type(error).__name__}") from error
                time.sleep(0.1 * 4**attempt)
        raise AssertionError


class _Rows:
    """Random access to the rows of one table that is mostly read in order, by several readers at different places."""

    def __init__(self, fs: Any, path: str) -> None:
        self._lock = threading.Lock()
        self._cursors: list[_Cursor] = []
        self._parquet: pq.ParquetFile | None = None
        if path.endswith(".parquet"):
            # Buffered, because a row group may hold all of a large file's pictures.
            self._parquet = pq.ParquetFile(fs.open(path, "rb"), buffer_size=1 << 20, pre_buffer=False)
            groups = self._parquet.metadata
            sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
        else:
            local = getattr(fs, "local_file", False)
            self._batches = arrow_batches(pa.memory_map(path) if local else io.BytesIO(fs.cat_file(path)))
            sizes = [batch.num_rows for batch in self._batches]
        self._starts = list(itertools.accumulate(sizes, initial=0))

    @property
    def rows(self) -> int:
        """How many rows the table has."""
        return self._starts[-1]

    def value(self, reference: Cell) -> Any:
        """The value of a cell as a Python object."""
        part = bisect.bisect_right(self._starts, reference.row) - 1
        offset = reference.row - self._starts[part]
        try:
            if self._parquet is None:
                return self._batches[part].column(reference.column)[offset].as_py()
            with self._lock:
                return self._sought(self._parquet, part, reference.column, offset).as_py()
        except (KeyError, IndexError, StopIteration, pa.ArrowException) as error:
            raise BlobError(f"{reference}: {error or 'no such column'}") from None

    def _sought(self, table: pq.ParquetFile, part: int, column: str, offset: int) -> Any:
        """The value at a place of a row group, by the cursor that has it or is the last before it."""
        here = [cursor for cursor in self._cursors if cursor.place == (part, column)]
        for cursor in here:
            if (found := cursor.found(offset)) is not None:
                return found
        before = [cursor for cursor in here if cursor.next <= offset]
        if not before:
            batches = table.iter_batches(batch_size=WINDOW, row_groups=[part], columns=[column])
            cursor = _Cursor((part, column), batches)
        else:
            cursor = max(before, key=lambda own: own.next)
            self._cursors.remove(cursor)
        self._cursors = [*self._cursors[-CURSORS + 1 :], cursor]
        while cursor.next <= offset:
            cursor.advance()
        return cursor.found(offset)


class _LanceTable:
    """The same of a Lance dataset, which has its own ways to a row."""

    def __init__(self, dataset: LanceRows) -> None:
        self._dataset, self.rows = dataset, dataset.rows

    def value(self, reference: Cell) -> Any:
        """The value of a cell as a Python object."""
        try:
            return self._dataset.value(reference.row, reference.column)
        except (KeyError, pa.ArrowException) as error:
            raise BlobError(f"{reference}: {error or 'no such column'}") from None


class _Cursor:
    """A reader of one column that goes forward through a row group, and remembers the last two windows."""

    def __init__(self, place: tuple[int, str], batches: Iterator[pa.RecordBatch]) -> None:
        self.place = place
        self.next = 0
        self._batches = batches
        self._windows: deque[tuple[int, pa.Array]] = deque(maxlen=2)

    def advance(self) -> None:
        """Read the next window."""
        values = next(self._batches).column(0)
        self._windows.append((self.next, values))
        self.next += len(values)

    def found(self, offset: int) -> Any:
        """The value at `offset`, if it is in a remembered window."""
        for start, values in self._windows:
            if start <= offset < start + len(values):
                return values[offset - start]
        return None


def _changed(inside: bool, what: str) -> Exception:
    """What is not there as the plan found it is the job's trouble; what a row names by itself is the row's."""
    if inside:
        return JobError(f"the input changed since the job was planned: {what}")
    return BlobError(what)


def arrow_batches(source: Any) -> list[pa.RecordBatch]:
    """All batches of an Arrow stream (as `datasets` writes it) or file; memory mapped ones cost no memory."""
    try:
        return list(pa.ipc.open_stream(source))
    except pa.ArrowInvalid:
        source.seek(0)
        file = pa.ipc.open_file(source)
        return [file.get_batch(i) for i in range(file.num_record_batches)]
