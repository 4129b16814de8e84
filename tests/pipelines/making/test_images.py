"""An image that cannot be read or encoded costs its row; a storage that fails costs none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from diffray.model.errors import JobError
from diffray.pipelines.inputs.sources import Sources
from diffray.pipelines.making import images

from ..conftest import Place
from ..pictures import data


@pytest.fixture
def failing(place: Place, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A job on three rows with pictures; reading the second one raises this."""
    Image.new("RGB", (16, 16), "red").save(place.path / "red.png")
    table = place.write("id,prompt,init_image\na,p,red.png\nb,p,red.png\nc,p,red.png\n")
    read = Sources.ready

    def job(error: Exception) -> Any:
        def ready(self: Sources, image: Any) -> Any:
            if image.id == "b-0":
                raise error
            return read(self, image)

        monkeypatch.setattr(Sources, "ready", ready)
        return place.job(table)

    return job


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate 3.64 TiB"), RuntimeError("odd")])
def test_whatever_a_source_raises_costs_its_row(place: Place, failing: Any, error: Exception) -> None:
    result = failing(error)
    assert (result.images, result.rejected) == (2, 1)
    [row] = place.rows(folder="rejected")
    assert (row["row_id"], row["stage"], row["reason"]) == ("b", "source", f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("error", [JobError("bucket is gone"), OSError("bucket is gone")])
def test_a_storage_that_fails_stops_the_job_instead(place: Place, failing: Any, error: Exception) -> None:
    with pytest.raises(type(error), match="bucket is gone"):
        failing(error)
    assert place.rows(folder="rejected") == []


def test_whatever_encoding_raises_costs_its_row(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = images.encode_image

    def odd(image: Any, request: Any, **facts: Any) -> bytes:
        if request.prompt == "odd":
            raise MemoryError
        return encode(image, request, **facts)

    monkeypatch.setattr(images, "encode_image", odd)
    result = place.job(place.write("prompt\np\nodd\n"))
    assert (result.images, result.rejected) == (1, 1)
    [row] = place.rows(folder="rejected")
    assert (row["prompt"], row["stage"], row["reason"]) == ("odd", "encode", "MemoryError")


def test_pictures_are_read_ahead_but_never_all_at_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    held, most = 0, 0
    original: Callable[..., Any] = images.Maker._outcome

    async def counted(self: Any, ready: Any, spent: Any) -> Any:
        nonlocal held, most
        held += 1
        most = max(most, held)
        try:
            return await original(self, ready, spent)
        finally:
            held -= 1

    monkeypatch.setattr(images.Maker, "_outcome", counted)
    (place.path / "in").mkdir()
    (place.path / "in/a.png").write_bytes(data(Image.new("RGB", (16, 16), "red")))
    table = place.write("image,prompt\n" + "a.png,x\n" * 60, "in/t.csv")
    assert place.job(table, task="augment", shards={"images": 60}).images == 60
    assert 2 < most <= 2 * 2 + images.READERS
