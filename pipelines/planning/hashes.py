"""What planning remembers of every row: 64-bit hashes in a temporary SQLite database.

SQLite keeps them in a file that nobody else sees and that is gone with the process, and in memory no more than
its page cache: a table of any length costs the driver the same.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from diffray.model.errors import StorageError

CACHE_KIB = 16 * 1024
BATCH = 10_000
SHOWN = 100
"""As many hashes are given back for a message, however many there are."""
_OFFSET = 1 << 63
"""SQLite's integers are signed."""


class _Database:
    """A private database with the given tables; rows of a table are written in batches.

    Raises:
        StorageError: from any call, where the disk with the temporary files is full, say.
    """

    def __init__(self, *tables: str) -> None:
        # "": a temporary file. One transaction that never ends, and nothing to roll back to.
        self._connection = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for statement in (
            f"PRAGMA cache_size = -{CACHE_KIB}",
            "PRAGMA temp_store = FILE",
            "PRAGMA journal_mode = OFF",
            *(f"CREATE TABLE {table}" for table in tables),
            "BEGIN",
        ):
            self._run(statement)
        self._pending: dict[str, list[tuple[int, ...]]] = {}

    def __del__(self) -> None:
        with suppress(AttributeError):  # it could not be opened
            self._connection.close()

    def _run(self, statement: str, values: Sequence[int] = ()) -> list[Any]:
        with _readable():
            return self._connection.execute(statement, values).fetchall()

    def _add(self, table: str, *values: int) -> None:
        waiting = self._pending.setdefault(table, [])
        waiting.append(tuple(value - _OFFSET for value in values))
        if len(waiting) >= BATCH:
            self._flush()

    def _flush(self) -> None:
        for table, rows in self._pending.items():
            if rows:
                marks = ", ".join("?" * len(rows[0]))
                with _readable():
                    self._connection.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)
        self._pending.clear()

    def _count(self, query: str) -> int:
        self._flush()
        return int(self._run(f"SELECT count(*) FROM ({query})")[0][0])

    def _found(self, query: str) -> tuple[int, set[int]]:
        """How many hashes a query finds, and the first of them."""
        self._flush()
        first = {row[0] + _OFFSET for row in self._run(f"{query} LIMIT {SHOWN}")}
        return (len(first) if len(first) < SHOWN else self._count(query)), first


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StorageError(
            f"the plan's temporary database: {error}; it lies where SQLITE_TMPDIR or TMPDIR says"
        ) from error


class RowHashes(_Database):
    """Of each row of an input the hash of its id: given, or derived from its content.

    Args:
        id_hash: from the hash of a content to that of the id derived from it.
    """

    _REPEATED = "SELECT hash FROM {} GROUP BY hash HAVING count(*) > 1"

    def __init__(self, id_hash: Callable[[int], int]) -> None:
        super().__init__(
            "given (hash INTEGER)",
            "derived (hash INTEGER)",
            "repeated (hash INTEGER PRIMARY KEY, times INTEGER)",
        )
        self._repeats = False
        self._connection.create_function(
            "id_hash", 1, lambda content: id_hash(content + _OFFSET) - _OFFSET, deterministic=True
        )

    def add_given(self, id_hash: int) -> None:
        """A row that has an id."""
        self._add("given", id_hash)

    def add_derived(self, content: int) -> None:
        """A row whose id is its content's hash."""
        self._add("derived", content)

    def __len__(self) -> int:
        return self._count("SELECT hash FROM given UNION ALL SELECT hash FROM derived")

    def suspects(self) -> tuple[int, set[int]]:
        """How many hashes of ids more than one row has that may not share it, and the first of them."""
        query = self._REPEATED.format("given")
        if all(self._count(f"SELECT hash FROM {table} LIMIT 1") for table in ("given", "derived")):
            query += " UNION SELECT id_hash(hash) FROM derived INTERSECT SELECT hash FROM given"
        return self._found(query)

    def count_again(self) -> None:
        """Before `occurrence` is asked for every row with a derived id in turn."""
        self._flush()
        self._run("DELETE FROM repeated")
        self._run(f"INSERT INTO repeated SELECT hash, 0 FROM ({self._REPEATED.format('derived')})")
        self._repeats = self._count("SELECT hash FROM repeated LIMIT 1") > 0

    def occurrence(self, content: int) -> int:
        """How often this content was asked for since `count_again`, this time included; 1 if no other row has it."""
        if not self._repeats:  # the usual table is asked nothing, row by row
            return 1
        key = (content - _OFFSET,)
        times = self._run("SELECT times FROM repeated WHERE hash = ?", key)
        if not times:
            return 1
        self._run("UPDATE repeated SET times = times + 1 WHERE hash = ?", key)
        return int(times[0][0]) + 1


class ImageHashes(_Database):
    """Id and content of each planned image, both as hashes, and which of them were met again.

    An id that comes twice has the same content.
    """

    def __init__(self, images: Iterable[tuple[int, int]]) -> None:
        super().__init__(
            "listed (id INTEGER, content INTEGER)",
            "planned (id INTEGER PRIMARY KEY, content INTEGER)",
            "met (id INTEGER)",
        )
        for id_hash, content in images:
            self._add("listed", id_hash, content)
        self._flush()
        # In their order: a tree that grows at random places is read and written over and over.
        self._run("INSERT OR IGNORE INTO planned SELECT id, content FROM listed ORDER BY id")
        self._run("DROP TABLE listed")

    def content(self, id_hash: int) -> int | None:
        """The content of a planned image; None if none has this id."""
        found = self._run("SELECT content FROM planned WHERE id = ?", (id_hash - _OFFSET,))
        return int(found[0][0]) + _OFFSET if found else None

    def meet(self, id_hash: int) -> None:
        """A planned image is still there."""
        self._add("met", id_hash)

    def missing(self) -> tuple[int, set[int]]:
        """How many planned images were not met, and the first of their ids' hashes."""
        query = "SELECT id FROM planned EXCEPT SELECT id FROM met"
        return self._found(query)
