"""Cells of tables, read one at a time and mostly in order, at several places in turn.

Parquet and Arrow tables are here, Lance has a module of its own. A read that fails leaves nothing behind: it can be
made again.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from tempfile import NamedTemporaryFile
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from .columnar import arrow_batches

WINDOW = 32
"""Rows that are read at a time."""


class Table(Protocol):
    """Random access to the cells of one table."""

    rows: int
    """How many there are."""
    schema: pa.Schema

    def value(self, row: int, column: str) -> Any:
        """The value of a cell as a Python object."""


class ParquetTable:
    """A table that is read by a cursor for each place; what a cursor passes by is read too.

    Args:
        places: how many places of a column are read in turn.
        moved: called after every window that is read: a place may be far into a row group.
    """

    def __init__(self, fs: Any, path: str, places: int, moved: Callable[[], None]) -> None:
        # Buffered, because a row group may hold all of a large file's pictures.
        self._file = pq.ParquetFile(fs.open(path, "rb"), buffer_size=1 << 20, pre_buffer=False)
        self.schema = self._file.schema_arrow
        groups = self._file.metadata
        self._starts = _starts(groups.row_group(i).num_rows for i in range(groups.num_row_groups))
        self.rows = self._starts[-1]
        self._places, self._moved = places, moved
        self._cursors: defaultdict[str, list[_Cursor]] = defaultdict(list)
        self._lock = threading.Lock()

    def value(self, row: int, column: str) -> Any:
        """The value of a cell as a Python object."""
        group = bisect.bisect_right(self._starts, row) - 1
        with self._lock:
            return self._sought(group, column, row - self._starts[group]).as_py()

    def _sought(self, group: int, column: str, offset: int) -> Any:
        """The value at a place of a row group, by the cursor that has it or is the last before it."""
        cursors = self._cursors[column]
        here = [cursor for cursor in cursors if cursor.group == group]
        for cursor in here:
            if (found := cursor.found(offset)) is not None:
                return found
        before = [cursor for cursor in here if cursor.next <= offset]
        if before:
            cursor = max(before, key=lambda own: own.next)
            cursors.remove(cursor)
        else:
            batches = self._file.iter_batches(batch_size=WINDOW, row_groups=[group], columns=[column])
            cursor = _Cursor(group, batches)
        while cursor.next <= offset:
            cursor.advance()
            self._moved()
        # Only now, since one that failed cannot go on.
        cursors.append(cursor)
        del cursors[: -self._places]
        return cursor.found(offset)


class ArrowTable:
    """A table that is mapped to memory. No place in it can be found without the whole, so a table that is not local is
    fetched first: into a temporary file without a name, which is gone with the table."""

    def __init__(self, fs: Any, path: str) -> None:
        if getattr(fs, "local_file", False):
            mapped = pa.memory_map(path)
        else:
            with NamedTemporaryFile(prefix="diffray-") as file:
                fs.get_file(path, file.name)
                mapped = pa.memory_map(file.name)
        self._batches = list(arrow_batches(mapped))  # views of the mapped bytes, which cost no memory
        self.schema = self._batches[0].schema if self._batches else pa.schema([])
        self._starts = _starts(batch.num_rows for batch in self._batches)
        self.rows = self._starts[-1]

    def value(self, row: int, column: str) -> Any:
        """The value of a cell as a Python object."""
        part = bisect.bisect_right(self._starts, row) - 1
        return self._batches[part].column(column)[row - self._starts[part]].as_py()


class _Cursor:
    """A reader of one column that goes forward through a row group, and remembers the last two windows."""

    def __init__(self, group: int, batches: Iterator[pa.RecordBatch]) -> None:
        self.group = group
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


def _starts(sizes: Iterable[int]) -> list[int]:
    """The row that each part begins with, and how many they are in all."""
    return list(itertools.accumulate(sizes, initial=0))
