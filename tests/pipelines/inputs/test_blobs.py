"""What the storage does while sources are read: its failures are nobody's row, and are survived where they end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import fsspec
import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import EndpointConnectionError
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from diffray.model.errors import JobError
from diffray.pipelines.inputs import blobs as blobs_module
from diffray.pipelines.inputs.blobs import ATTEMPTS, Blobs
from diffray.pipelines.inputs.lance import open_lance
from diffray.pipelines.inputs.stamps import Stamps

from ..conftest import Place, in_process
from ..pictures import data, png

RED, BLUE = png("red"), png("blue")
DEAD = "http://127.0.0.1:9"


@pytest.fixture
def memory() -> Any:
    storage = fsspec.filesystem("memory")
    storage.store.clear()
    return storage


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause between two attempts."""
    monkeypatch.setattr(blobs_module, "time", SimpleNamespace(sleep=lambda seconds: None))


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception, times: int) -> Callable[[], None]:
    """Have so many reads of whole files fail once the returned function was called."""
    left = 0
    read = MemoryFileSystem.cat_file

    def cat_file(self: Any, path: str, *arguments: Any, **more: Any) -> Any:
        nonlocal left
        if left:
            left -= 1
            raise error
        return read(self, path, *arguments, **more)

    def arm() -> None:
        nonlocal left
        left = times

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    return arm


ERRORS = pytest.mark.parametrize(
    "error",
    [
        EndpointConnectionError(endpoint_url=DEAD),
        aiohttp.ClientResponseError(SimpleNamespace(real_url=DEAD), (), status=503, message="Unavailable"),
        ConnectionResetError("by peer"),
    ],
    ids=lambda error: type(error).__name__,
)
"""Whatever type the storage's library has for it."""


@ERRORS
@pytest.mark.parametrize("times", [ATTEMPTS - 1, 10**6], ids=["short", "long"])
def test_an_outage_of_the_storage_costs_no_row(
    place: Place, memory: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, times: int
) -> None:
    memory.pipe_file("/pics/a.png", RED)
    table = place.write("prompt,image\nx,a.png\n")
    config = place.config(table, task="augment", pictures={"root": "memory://pics"})
    arm = failing(monkeypatch, error, times)

    def later(*arguments: Any) -> Any:
        arm()
        return in_process(*arguments)

    if times < ATTEMPTS:
        assert place.run(config, generate=later).images == 1
        return
    with pytest.raises(JobError, match=r"a\.png cannot be read: .*(endpoint|Unavailable|peer)"):
        place.run(config, generate=later)
    assert place.rows(folder="rejected") == []


def test_a_planned_file_that_vanishes_stops_the_job_and_one_that_never_was_costs_its_row(
    place: Place, memory: Any
) -> None:
    memory.pipe_file("/pics/a.png", RED)
    table = place.write("prompt,image\nx,a.png\ny,never.png\n")
    config = place.config(table, task="augment", pictures={"root": "memory://pics"})

    def later(*arguments: Any) -> Any:
        memory.rm("/pics/a.png")
        return in_process(*arguments)

    with pytest.raises(JobError, match=r"the input changed since the job was planned: a\.png: no such file"):
        place.run(config, generate=later)
    assert place.rows(folder="rejected") == []
    memory.pipe_file("/pics/b.png", RED)
    result = place.job(
        place.write("prompt,image\nx,b.png\ny,never.png\n"),
        "other",
        task="augment",
        pictures={"root": "memory://pics"},
    )
    assert (result.images, result.rejected) == (1, 1)
    [row] = place.rows("other", "rejected")
    assert row["reason"] == "never.png: no such file"


def test_a_file_that_the_path_of_a_struct_names_in_vain_costs_its_row(place: Place) -> None:
    pictures = [{"bytes": None, "path": "never.png"}, {"bytes": RED, "path": None}]
    pq.write_table(pa.table({"prompt": ["x", "y"], "image": pictures}), place.path / "t.parquet")
    result = place.job(str(place.path / "t.parquet"), task="augment")
    assert (result.images, result.rejected) == (1, 1)
    [row] = place.rows(folder="rejected")
    assert row["reason"] == "never.png: no such file"


def test_a_file_that_is_replaced_between_the_look_at_it_and_the_read_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(RED)
    planned = Stamps(str(tmp_path), lambda url: {}).of(["a.png"])["a.png"]
    blobs = Blobs(str(tmp_path), None, lambda url: {}, 10**6)
    assert blobs.read("a.png", planned) == RED
    read = LocalFileSystem.cat_file

    def cat_file(self: Any, name: str, *arguments: Any, **more: Any) -> Any:
        path.write_bytes(BLUE)
        return read(self, name, *arguments, **more)

    monkeypatch.setattr(LocalFileSystem, "cat_file", cat_file)
    with pytest.raises(JobError, match=r"the input changed since the job was planned: a\.png: "):
        blobs.read("a.png", planned)
    assert blobs.read("a.png") == BLUE  # which nobody has planned


class Flaky:
    """An open file of which one read fails, and those behind it as many as `times` says."""

    def __init__(self, file: Any, error: Exception, at: int, times: int) -> None:
        self._file, self._error, self._failing = file, error, range(at, at + times)
        self.reads = 0

    def read(self, *arguments: Any) -> Any:
        self.reads += 1
        if self.reads in self._failing:
            raise self._error
        return self._file.read(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.fixture
def flaky_table(memory: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Blobs, Flaky]]:
    """Blobs that read a table of one row group, the first read of whose rows fails, and the file that does it."""
    count, data = 256, pa.BufferOutputStream()
    values = [b"%d " % i * 5000 for i in range(count)]
    plain = {"compression": "none", "use_dictionary": False, "data_page_size": 50_000}
    pq.write_table(pa.table({"image": values}), data, row_group_size=count, **plain)
    memory.pipe_file("/in/t.parquet", data.getvalue().to_pybytes())

    def opened(error: Exception, times: int) -> tuple[Blobs, Flaky]:
        with monkeypatch.context() as patched:
            files: list[Flaky] = []
            plain_open = MemoryFileSystem._open

            def flaky(self: Any, path: str, *arguments: Any, **more: Any) -> Flaky:
                files.append(Flaky(plain_open(self, path, *arguments, **more), error, 2, times))
                return files[-1]

            patched.setattr(MemoryFileSystem, "_open", flaky)
            blobs = Blobs("memory://in", None, lambda url: {}, 10**6)
            blobs._table("t.parquet", True)
        assert files[0].reads < 2, "only the footer was read"
        return blobs, files[0]

    return opened


@ERRORS
def test_a_read_of_a_table_that_fails_is_made_again(flaky_table: Any, error: Exception) -> None:
    blobs, file = flaky_table(error, 1)
    for row in range(256):
        data = blobs.read(f"input:t.parquet#row={row}&column=image")
        assert data == b"%d " % row * 5000
    assert file.reads > 2


@ERRORS
def test_a_table_that_cannot_be_read_stops_the_job_and_rows_get_none_of_it(
    flaky_table: Any, error: Exception
) -> None:
    blobs, _ = flaky_table(error, ATTEMPTS + 1)
    with pytest.raises(JobError, match=r"t\.parquet cannot be read: .*(endpoint|Unavailable|peer)"):
        blobs.read("input:t.parquet#row=0&column=image")
    for row in range(256):  # of which the first ones need the read that failed
        assert blobs.read(f"input:t.parquet#row={row}&column=image") == b"%d " % row * 5000


@pytest.mark.slow
def test_lance_tells_an_outage_from_a_dataset_that_is_gone(tmp_path: Path) -> None:
    options = {"endpoint_url": DEAD, "key": "k", "secret": "s", "region_name": "us-east-1"}
    with pytest.raises(OSError, match="error sending request") as caught:
        open_lance("s3://bucket/in.lance", options)
    assert not isinstance(caught.value, FileNotFoundError)
    lance.write_dataset(pa.table({"a": [1]}), tmp_path / "in.lance")
    for name, version in (("none", None), ("in", 7)):
        with pytest.raises(FileNotFoundError):
            open_lance(str(tmp_path / f"{name}.lance"), {}, version)


@pytest.mark.parametrize("change", ["gone", "shorter", "others"])
def test_an_input_that_changes_under_a_job_stops_it(place: Place, change: str) -> None:
    blob = data(Image.new("RGB", (16, 16), "red"))
    path = place.path / "t.parquet"
    pq.write_table(pa.table({"prompt": ["x"] * 6, "image": [blob] * 6}), path)

    def later(*arguments: Any) -> Any:
        path.unlink()
        if change == "shorter":
            pq.write_table(pa.table({"prompt": ["x"], "image": [blob]}), path)
        if change == "others":
            other = data(Image.new("RGB", (16, 16), "darkorchid"), "BMP")
            pq.write_table(pa.table({"prompt": ["x"] * 6, "image": [other] * 6}), path)
        return in_process(*arguments)

    config = place.config(str(path), task="augment")
    with pytest.raises(JobError, match="the input changed since the job was planned"):
        place.run(config, generate=later)
    pq.write_table(pa.table({"prompt": ["x"] * 6, "image": [blob] * 6}), path)
    assert place.run(config).images == 6


def test_pictures_are_read_from_any_storage(place: Place) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/photos/in/a/1.png", data(Image.new("RGB", (16, 16), "red")))
    memory.pipe_file("/photos/in/t.csv", b"image,prompt\na/1.png,x\nmemory:///photos/in/a/1.png,y\nb.png,z\n")
    result = place.job("memory://photos/in/t.csv", task="augment")
    assert (result.images, result.rejected) == (2, 1)
    assert [row["init_image"] for row in place.rows()] == ["a/1.png"] * 2
