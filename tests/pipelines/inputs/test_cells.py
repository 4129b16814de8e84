"""Cells of tables that are elsewhere."""

from __future__ import annotations

import tempfile
import tracemalloc
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from diffray.pipelines.inputs.blobs import Blobs


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
