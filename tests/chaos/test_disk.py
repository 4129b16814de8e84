"""A disk that is really full stops a job cleanly; with room again it goes on as if nothing had happened."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffray.model.errors import StorageError
from diffray.pipelines import Store, job_status, verify
from tests.pipelines.conftest import Place
from tests.pipelines.crashes import in_turn

TABLE = "prompt,n\np,10\nq,10\n"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("layout", ["parquet", "files"])
def test_a_full_disk(place: Place, small_disk: Path, layout: str) -> None:
    values = {"defaults": {"width": 64, "height": 64}, "encoding": {"layout": layout}, "gallery": 0}
    table = place.write(TABLE)
    place.job(table, "clean", **values)
    out = small_disk / "out"
    with pytest.raises(StorageError, match=r"disk/out/.*: ENOSPC: No space left on device"):
        place.run(place.config(table, "disk/out", **values), generate=in_turn)
    assert list((out / "_diffray/tmp").glob("*")) == []
    status = job_status(Store(str(out)))
    assert 0 < status.committed < status.shards
    assert verify(Store(str(out))).faults == ()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    # This process is still alive, and a full disk may have kept it from releasing its lock.
    place.run(place.config(table, "disk/out", **values), take_over=True)
    assert place.bytes("disk/out") == place.bytes("clean")
