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
import pytest
from botocore.exceptions import EndpointConnectionError
from fsspec.implementations.memory import MemoryFileSystem

from diffray.model.errors import JobError
from diffray.pipelines.inputs import blobs as blobs_module
from diffray.pipelines.inputs.blobs import ATTEMPTS
from diffray.pipelines.inputs.lance import open_lance

from ..conftest import Place, in_process
from .test_source import png

RED = png("red")
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
