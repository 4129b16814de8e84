"""Lance datasets as input: written by its own library, read at the version that was planned."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest

from diffray.model.errors import JobConflict, JobError
from diffray.pipelines import InvalidJob
from diffray.pipelines.inputs.source import Source

from ..conftest import Place, in_process
from ..pictures import colours, png
from ..s3 import S3

RED, GREEN, BLUE = png("red"), png("lime"), png("blue")


def table(prompts: str, pictures: list[bytes]) -> pa.Table:
    return pa.table(
        {"prompt": list(prompts), "image": pa.array(pictures, pa.binary()), "label": range(len(prompts))}
    )


def write(place: Place, values: pa.Table, mode: str = "create", name: str = "in.lance", **more: Any) -> str:
    """A dataset of two rows a file."""
    lance.write_dataset(values, place.path / name, mode=mode, max_rows_per_file=2, **more)
    return str(place.path / name)


@pytest.mark.parametrize("kind", ["bytes", "struct", "blob"])
def test_pictures_stay_in_the_dataset_and_labels_are_carried(place: Place, kind: str) -> None:
    values, version = table("abc", [RED, GREEN, BLUE]), {}
    if kind == "struct":
        pictures = pa.array([{"bytes": data, "path": None} for data in (RED, GREEN, BLUE)])
        values = values.set_column(1, "image", pictures)
    elif kind == "blob":
        field = pa.field("image", pa.large_binary(), metadata={"lance-encoding:blob": "true"})
        values = values.set_column(1, field, values["image"].cast(pa.large_binary()))
        version = {"data_storage_version": "2.0"}
    path = write(place, values, **version)
    [row, *_] = Source(path).rows()
    assert (row.file, row.line, row.values["image"]) == ("in.lance", 1, "input:in.lance#row=0&column=image")
    result = place.job(path, task="augment")
    assert (result.images, result.rejected) == (3, 0)
    assert colours(place) == {"a": "r", "b": "g", "c": "b"}
    assert [row["label"] for row in place.rows()] == [0, 1, 2]


def test_folders_and_globs_of_datasets(place: Place) -> None:
    for name, prompts in (("one", "ab"), ("two", "c")):
        (place.path / "all").mkdir(exist_ok=True)
        write(place, table(prompts, [RED] * len(prompts)), name=f"all/{name}.lance")
    for input in ("all", "all/*.lance", "all/one.lance/"):
        rows = [(row.file, row.values["prompt"]) for row in Source(str(place.path / input)).rows()]
        prefix = "" if input.endswith("/") or "*" in input or input == "all" else "all/"
        expected = [("one.lance", "a"), ("one.lance", "b"), ("two.lance", "c")]
        assert rows == [(prefix + file, prompt) for file, prompt in expected[: 2 if input[-1] == "/" else 3]]


def test_workers_read_the_version_that_was_planned(place: Place) -> None:
    path = write(place, table("abc", [RED, GREEN, BLUE]))

    def overwritten(*arguments: Any) -> Any:
        write(place, table("xyz", [BLUE, BLUE, RED]), "overwrite")
        yield from in_process(*arguments)

    place.run(place.config(path, task="augment"), generate=overwritten)
    assert colours(place) == {"a": "r", "b": "g", "c": "b"}
    with pytest.raises(JobConflict, match="lacks 3 images that were planned"):
        place.job(path, task="augment")


def test_a_version_that_is_gone_stops_the_job(place: Place) -> None:
    path = write(place, table("abc", [RED, GREEN, BLUE]))

    def replaced(*arguments: Any) -> Any:
        import shutil

        shutil.rmtree(path)
        write(place, table("abc", [BLUE, BLUE, RED]))
        yield from in_process(*arguments)

    with pytest.raises(JobError, match=r"the input changed since the job was planned: in\.lance"):
        place.run(place.config(path, task="augment"), generate=replaced)


def test_deleted_rows_are_noticed(place: Place) -> None:
    """The row, and the one behind it, whose picture stands elsewhere now."""
    path = write(place, table("abc", [RED, GREEN, BLUE]))
    place.job(path, task="augment")
    lance.dataset(path).delete("label = 1")
    with pytest.raises(JobConflict, match="lacks 2 images that were planned"):
        place.job(path, task="augment")
    assert place.job(path, "later", task="augment").images == 2
    assert colours(place, "later") == {"a": "r", "c": "b"}


def test_a_dataset_that_grew_continues(place: Place) -> None:
    path = write(place, table("abc", [RED, GREEN, BLUE]))
    place.job(path, task="augment")
    before = {row["id"]: row["sha256"] for row in place.rows()}
    write(place, table("de", [GREEN, RED]), "append")
    result = place.job(path, task="augment")
    assert (result.images, result.made) == (5, 1)
    assert colours(place) == {"a": "r", "b": "g", "c": "b", "d": "g", "e": "r"}
    assert before.items() <= {row["id"]: row["sha256"] for row in place.rows()}.items()


def test_on_object_storage(place: Place, s3: S3) -> None:
    url, path = s3.folder(), write(place, table("ab", [RED, GREEN]))
    s3.filesystem().put(path, f"{url.removeprefix('s3://')}/in.lance", recursive=True)
    result = place.job(f"{url}/in.lance", task="augment", storage={"s3": s3.options()})
    assert (result.images, result.rejected) == (2, 0)
    assert colours(place) == {"a": "r", "b": "g"}
    with pytest.raises(
        InvalidJob, match="Lance has no storage option requester_pays, allowed are key, secret"
    ):
        Source(f"{url}/in.lance", lambda _: s3.options(requester_pays=True)).fingerprint()


def test_what_is_no_dataset_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidJob, match="no such file"):
        Source(str(place.path / "none.lance"))
    (place.path / "empty.lance").mkdir()
    with pytest.raises(InvalidJob, match="was not found"):
        list(Source(str(place.path / "empty.lance")).rows())
    path = write(place, table("a", [RED]))
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(InvalidJob, match=r"pip install 'diffray\[lance\]'"):
        list(Source(str(Path(path))).rows())
