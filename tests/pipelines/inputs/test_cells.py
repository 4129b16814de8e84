"""Cells of tables: at several places in turn, and in tables that are elsewhere."""

from __future__ import annotations

import tempfile
import tracemalloc
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffray.pipelines.inputs import cells
from diffray.pipelines.inputs.blobs import Blobs

from ..conftest import Place


def test_cells_are_found_in_any_order(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row group with all of the file in it, as pandas writes it, read at several places and columns in turn."""
    count = 600
    table = pa.table({"a": [b"a%d" % i for i in range(count)], "b": [b"b%d" % i for i in range(count)]})
    pq.write_table(table, place.path / "t.parquet", row_group_size=count)
    windows = []
    advance = cells._Cursor.advance
    monkeypatch.setattr(cells._Cursor, "advance", lambda self: (windows.append(1), advance(self)))
    blobs = Blobs(str(place.path), None, lambda url: {}, 10**9)
    for row in (start + step for step in range(150) for start in (0, 450, 150, 300)):
        assert blobs.read(f"t.parquet#row={row}&column=a") == b"a%d" % row
        assert blobs.read(f"t.parquet#row={row}&column=b") == b"b%d" % row
    once = -(-count // cells.WINDOW) * 2
    assert len(windows) < 4 * once, "four readers in turn must not make each other start again"
    for row in (3, 2, 599, 64, 63, 31, 32, 0):
        assert blobs.read(f"t.parquet#row={row}&column=a") == b"a%d" % row


@pytest.mark.parametrize(("places", "columns"), [(4, 3), (16, 2)])
def test_no_place_loses_its_cursor_to_another(
    place: Place, monkeypatch: pytest.MonkeyPatch, places: int, columns: int
) -> None:
    """As many shards in flight, of rows with so many pictures, whose places are all in one row group."""
    count, names = 2048, "abc"[:columns]
    cells_of = {name: [f"{name}{i}".encode() for i in range(count)] for name in names}
    pq.write_table(pa.table(cells_of), place.path / "t.parquet", row_group_size=count)
    windows = []
    advance = cells._Cursor.advance
    monkeypatch.setattr(cells._Cursor, "advance", lambda self: (windows.append(1), advance(self)))
    blobs = Blobs(str(place.path), None, lambda url: {}, 10**9, places=places)
    size = count // places
    for step in range(size):
        for row in range(step, count, size):
            for name in names:
                assert blobs.read(f"t.parquet#row={row}&column={name}") == cells_of[name][row]
    # Each place is reached from the beginning of the row group, and once it is, no row is read again.
    assert len(windows) == columns * sum(size * (shard + 1) // cells.WINDOW for shard in range(places))


@pytest.mark.parametrize("kind", [pa.ipc.new_stream, pa.ipc.new_file], ids=["stream", "file"])
def test_an_arrow_table_elsewhere_is_not_held_in_memory_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    values = [b"%d" % i * 2**20 for i in range(50)]
    table, data = pa.table({"image": pa.array(values, pa.binary())}), pa.BufferOutputStream()
    with kind(data, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    fsspec.filesystem("memory").pipe_file("/in/t.arrow", data.getvalue().to_pybytes())
    blobs = Blobs("memory://in", None, lambda url: {}, 2**30)
    tracemalloc.start()
    arrow = pa.total_allocated_bytes()
    try:
        assert blobs.read("input:t.arrow#row=49&column=image") == values[49]
        assert tracemalloc.get_traced_memory()[1] < 25 * 2**20
    finally:
        tracemalloc.stop()
    assert pa.total_allocated_bytes() - arrow < 2**20
    assert list(tmp_path.iterdir()) == []
    assert [blobs.read(f"input:t.arrow#row={row}&column=image") for row in (0, 9, 10)] == [
        values[row] for row in (0, 9, 10)
    ]
