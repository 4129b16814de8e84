"""A source file that is replaced under its name is noticed, whenever it happens; what may change is let be."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffray.model.errors import JobConflict, JobError
from diffray.pipelines import Store, repair, retry_rejected
from diffray.pipelines.outputs.plan import read_plan

from .. import fake
from ..conftest import Place, in_process


def draw(path: Path, colour: str, size: int = 16) -> Path:
    """A picture; all of one size have as many bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path, "BMP")
    os.utime(path, (1e9, 1e9))
    return path


def replaced(path: Path) -> None:
    """Another picture under the same name."""
    draw(path, "blue")
    os.utime(path, (1e9 + 1, 1e9 + 1))


@pytest.fixture
def table(place: Place) -> str:
    for name, colour in {"a": "red", "b": "green", "c": "black"}.items():
        draw(place.path / f"cats/{name}.bmp", colour)
    rows = "".join(f"{name},cats/{name}.bmp,m\n" for name in "abc")
    return place.write("prompt,image,label\n" + rows)


def stopped(config: Any, number: int, store: Store, models: Any, shares: Any) -> Any:
    """Makes one shard and breaks off."""
    [share] = shares
    yield from in_process(config, number, store, models, [type(share)(share.model, share.shards[:1])])
    raise KeyboardInterrupt


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("name", ["a", "c"], ids=["committed", "last"])
def test_one_that_is_replaced_between_two_runs(place: Place, table: str, finished: bool, name: str) -> None:
    config, path = place.config(table, task="augment", shards={"images": 1}), place.path / f"cats/{name}.bmp"
    if finished:
        place.run(config)
    else:
        with pytest.raises(KeyboardInterrupt):
            place.run(config, generate=stopped)
    began = len(place.begun())
    replaced(path)
    with pytest.raises(JobConflict, match=re.escape("1 source files are not those")) as caught:
        place.run(config)
    difference = (
        f"cats/{name}.bmp: 822 bytes, of 2001-09-09T01:46:40+00:00 -> 822 bytes, of 2001-09-09T01:46:41"
    )
    assert difference in str(caught.value)
    assert len(place.begun()) == began, "refused before any engine worked"
    path.unlink()
    with pytest.raises(JobConflict, match="-> missing"):
        place.run(config)
    draw(path, {"a": "red", "c": "black"}[name])
    assert place.run(config).images == 3


def test_one_that_is_replaced_while_the_job_runs(place: Place, table: str) -> None:
    path = place.path / "cats/c.bmp"

    def later(*arguments: Any) -> Any:
        replaced(path)
        return in_process(*arguments)

    config = place.config(table, task="augment", shards={"images": 1})
    with pytest.raises(JobError, match=re.escape("changed since the job was planned: cats/c.bmp: 822 bytes")):
        place.run(config, generate=later)
    draw(path, "black")
    assert place.run(config).images == 3


def test_a_folder_of_pictures(place: Place, table: str) -> None:
    config = place.config(str(place.path / "cats"), task="augment", defaults={"prompt": "x"})
    assert place.run(config).images == 3
    assert place.run(config).made == 0
    replaced(place.path / "cats/b.bmp")
    with pytest.raises(JobConflict, match=r"b\.bmp"):
        place.run(config)


def test_prompts_beside_pictures_count_as_rows(place: Place) -> None:
    draw(place.path / "cats/a.bmp", "red")
    place.write("one", "cats/a.txt")
    config = place.config(str(place.path / "cats"), task="augment")
    place.run(config)
    place.write("two", "cats/a.txt")  # as long as the other
    with pytest.raises(JobConflict, match=r"'one' -> 'two'|lacks 1 images"):
        place.run(config)


def test_a_rejected_rows_source_may_be_put_right(place: Place, table: str) -> None:
    path = place.path / "cats/b.bmp"
    path.write_bytes(b"no picture")
    config = place.config(table, task="augment", shards={"images": 1})
    assert place.run(config).rejected == 1
    draw(path, "green")
    assert place.run(config).made == 0, "the rejection stands, and nothing was made of the old file"
    out = str(place.path / "out")
    again = retry_rejected(out, models=fake.FakeModels(), generate=in_process)
    assert (again.images, again.rejected) == (3, 0)
    assert place.run(config).made == 0
    replaced(path)
    with pytest.raises(JobConflict, match=r"cats/b\.bmp"):
        place.run(config)


def test_a_rejected_rows_source_may_be_put_right_in_the_middle_of_a_retry(place: Place, table: str) -> None:
    path = place.path / "cats/b.bmp"
    path.write_bytes(b"no picture")
    config = place.config(table, task="augment", shards={"images": 1})
    place.run(config)
    out = str(place.path / "out")

    def never(*_: Any) -> Any:
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        retry_rejected(out, models=fake.FakeModels(), generate=never)
    draw(path, "green")
    with pytest.raises(JobConflict, match="interrupted goes on with `diffray retry-rejected`"):
        place.run(config)
    assert retry_rejected(out, models=fake.FakeModels(), generate=in_process).images == 3
    assert place.run(config).made == 0


def test_a_repaired_shard_does_not_ask_for_the_file_that_was_put_right(place: Place, table: str) -> None:
    path = place.path / "cats/b.bmp"
    path.write_bytes(b"no picture")
    config = place.config(table, task="augment")
    place.run(config)
    draw(path, "green")
    out = str(place.path / "out")
    retry_rejected(out, models=fake.FakeModels(), generate=in_process)
    before = place.bytes()
    (place.path / "out/data/part-00000.parquet").unlink()
    assert repair(Store(out)).damaged == [0]
    assert place.run(config).images == 3
    assert place.bytes() == before


def test_many_images_of_one_file_are_one_file(place: Place, table: str) -> None:
    config = place.config(table, task="augment", images_per_prompt=5, shards={"images": 2})
    place.run(config)
    for name in "ab":
        replaced(place.path / f"cats/{name}.bmp")
    with pytest.raises(JobConflict, match="2 source files"):
        place.run(config)


def test_of_many_images_a_sample_is_looked_at(
    place: Place, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffray.pipelines.planning.replaced.SAMPLE", 2)
    config = place.config(table, task="augment", shards={"images": 1})
    place.run(config)
    replaced(place.path / "cats/b.bmp")
    assert place.run(config).made == 0, "of three shards every second one"
    replaced(place.path / "cats/c.bmp")
    with pytest.raises(JobConflict, match=r"1 source files[^/]*cats/c\.bmp"):
        place.run(config)


def test_copies_elsewhere_are_compared_by_size(place: Place, table: str) -> None:
    config = place.config(table, task="augment", shards={"images": 1})
    with pytest.raises(KeyboardInterrupt):
        place.run(config, generate=stopped)
    (place.path / "new").mkdir()
    shutil.copy(table, place.path / "new/prompts.csv")
    shutil.copytree(place.path / "cats", place.path / "new/cats", copy_function=shutil.copyfile)
    moved = place.config(str(place.path / "new/prompts.csv"), task="augment", shards={"images": 1})
    assert place.run(moved).images == 3
    draw(place.path / "new/cats/a.bmp", "red", 24)
    with pytest.raises(JobConflict, match=r"cats/a\.bmp: 822 bytes.* -> 1782 bytes"):
        place.run(moved)


def test_input_that_grew_is_made_from_what_is_there_now(place: Place, table: str) -> None:
    config = place.config(table, task="augment", shards={"images": 1})
    place.run(config)
    draw(place.path / "cats/d.bmp", "white")
    with open(table, "a") as file:
        file.write("d,cats/d.bmp,m\n")
    replaced(place.path / "cats/a.bmp")
    with pytest.raises(JobConflict, match=r"cats/a\.bmp"):
        place.run(config)
    draw(place.path / "cats/a.bmp", "red")
    assert place.run(config).images == 4
    replaced(place.path / "cats/d.bmp")
    with pytest.raises(JobConflict, match=r"cats/d\.bmp"):
        place.run(config)


@pytest.mark.parametrize("layout", ["parquet", "files"])
def test_every_row_says_what_it_was_made_from(place: Place, table: str, layout: str) -> None:
    draw(place.path / "mask.bmp", "white")
    rows = Path(table).read_text().replace(",m\n", ",mask.bmp\n").replace("label", "mask")
    place.job(place.write(rows), task="inpaint", encoding={"layout": layout})
    found = place.rows(folder="data" if layout == "parquet" else "data/images/part-00000")

    def digest(name: str) -> str:
        return hashlib.sha256((place.path / name).read_bytes()).hexdigest()

    assert [row["init_image_sha256"] for row in found] == [digest(f"cats/{name}.bmp") for name in "abc"]
    assert {row["mask_sha256"] for row in found} == {digest("mask.bmp")}


def test_a_label_that_looks_like_a_path_is_no_source(place: Place) -> None:
    draw(place.path / "a.bmp", "red")
    draw(place.path / "b.bmp", "red")
    config = place.config(place.write("image,mask,prompt\na.bmp,b.bmp,x\n"), task="augment")
    place.run(config)
    replaced(place.path / "b.bmp")
    assert place.run(config).made == 0
    assert "mask_sha256" not in place.rows()[0]


def test_the_reason_of_a_broken_picture_is_the_same_each_time(place: Place, table: str) -> None:
    (place.path / "cats/b.bmp").write_bytes(b"no picture")
    reasons = []
    for name in ("one", "two"):
        place.job(table, name, task="augment")
        reasons += [row["reason"] for row in place.rows(name, "rejected")]
    assert len(reasons) == 2
    assert reasons[0] == reasons[1]
    assert reasons[0].endswith("UnidentifiedImageError: cannot identify image file")


def test_a_job_without_files_asks_for_none(place: Place) -> None:
    place.job(place.write("prompt\nx\n"))
    plan = read_plan(Store(str(place.path / "out")))
    assert plan is not None
    assert plan.stamped == 0
    assert "init_image_sha256" not in place.rows()[0]


def test_a_path_that_no_disk_can_have_costs_its_own_row(place: Place, table: str) -> None:
    with open(table, "a") as file:
        file.write(f"d,{'x' * 300}.bmp,m\n")
    result = place.job(table, task="augment")
    assert (result.images, result.rejected) == (3, 1)
    [row] = place.rows(folder="rejected")
    assert row["reason"].endswith("no such file")


def test_times_are_of_the_file_and_not_of_the_look(place: Place, table: str) -> None:
    config = place.config(table, task="augment")
    place.run(config)
    os.chmod(place.path / "cats/a.bmp", 0o600)
    time.sleep(0.01)
    assert place.run(config).made == 0


def packed(place: Place, name: str, *colours: str) -> None:
    """A table, or a tar, of pictures that all have as many bytes."""
    pictures = [draw(place.path / f"of/{colour}.bmp", colour).read_bytes() for colour in colours]
    if name.endswith(".parquet"):
        rows = {"prompt": [f"p{i}" for i in range(len(colours))], "image": pictures}
        pq.write_table(pa.table(rows), place.path / name)
        return
    with tarfile.open(place.path / name, "w") as tar:
        for i, picture in enumerate(pictures):
            for ending, data in {"txt": b"p", "bmp": picture}.items():
                member = tarfile.TarInfo(f"{i}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("name", ["t.parquet", "t.tar"])
@pytest.mark.parametrize("finished", [False, True])
def test_pictures_in_a_table_or_a_tar(place: Place, name: str, finished: bool) -> None:
    (place.path / "in").mkdir()
    packed(place, f"in/{name}", "red", "green", "black")
    config = place.config(str(place.path / "in"), task="augment", shards={"images": 1})
    if finished:
        place.run(config)
    else:
        with pytest.raises(KeyboardInterrupt):
            place.run(config, generate=stopped)
    packed(place, f"in/{name}", "blue", "blue", "blue")
    with pytest.raises(JobConflict, match=rf"{name} changed, and image \w+-0 \({name}:1\) is made from"):
        place.run(config)
    packed(place, f"in/{name}", "red", "green", "black")
    packed(place, f"in/new-{name}", "white")
    assert place.run(config).images == 4, "what is new stands in a file of its own"
