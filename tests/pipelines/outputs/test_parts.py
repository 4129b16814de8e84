"""The three layouts: what others read in them, and the same bytes for the same images."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffray.model.encoding import read_provenance
from diffray.model.request import ImageRequest
from diffray.pipelines import Store
from diffray.pipelines.outputs.commit import read_commit, read_commits, write_commit
from diffray.pipelines.outputs.parts import Made, Output, Rejected, part_files
from diffray.pipelines.outputs.plan import read_shard

from ..conftest import Place

TABLE = 'id,prompt,n,label\n../x,"a (red:1.2) circle, ☃",3,x\np,POISON,1,y\nA,"=cmd|\'/c\'!A0",1,z\na,"two\nlines",1,\n'


def pixels(image: Image.Image) -> list[int]:
    return np.asarray(image).ravel().tolist()


def packed(place: Place) -> dict[str, dict[str, Any]]:
    """The same job in the Parquet layout, by id."""
    place.job(str(place.path / "prompts.csv"), "packed", checks={"measures": True})
    return {row["id"]: row for row in place.rows("packed")}


@pytest.mark.parametrize("metadata", ["parquet", "jsonl"])
def test_imagefolder(place: Place, offline: str, metadata: str) -> None:
    datasets = pytest.importorskip("datasets")
    table = place.write(TABLE)
    place.job(table, encoding={"layout": "files", "metadata": metadata}, checks={"measures": True})
    assert sorted(path.name for path in (place.path / "out/data/images/part-00000").iterdir()) == [
        "00000-_x-0.png",
        "00001-_x-1.png",
        "00002-_x-2.png",
        f"metadata.{metadata}",
    ]
    wanted = packed(place)
    for source in (str(place.path / "out"), str(place.path / "out/data/images")):
        data = datasets.load_dataset(source, split="train", cache_dir=offline)
        assert len(data) == 5
        for row in data:
            same = wanted[row["id"]]
            assert pixels(row["image"]) == pixels(Image.open(io.BytesIO(same["image"]["bytes"])))
            for column in same.keys() - {"image"}:
                assert row[column] == same[column], column


@pytest.mark.parametrize(("format", "extension"), [("png", "png"), ("jpeg", "jpg"), ("webp", "webp")])
def test_webdataset(place: Place, offline: str, format: str, extension: str) -> None:
    datasets = pytest.importorskip("datasets")
    place.job(
        place.write(TABLE),
        encoding={"layout": "webdataset", "format": format},
        checks={"measures": True},
    )
    wanted = packed(place)
    samples: dict[str, dict[str, bytes]] = defaultdict(dict)
    keys = []
    for path in sorted((place.path / "out/data").iterdir()):
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (
                    0,
                    0,
                    0,
                    "",
                    0o644,
                )
                key, _, kind = member.name.partition(".")
                keys.append(key)
                stream = tar.extractfile(member)
                assert stream is not None
                samples[key][kind] = stream.read()
    assert keys == sorted(keys)  # files of one sample are neighbours
    assert list(samples) == ["0000000000", "0000000001", "0000000002", "0000100000", "0000100001"]
    for sample in samples.values():
        facts = json.loads(sample["json"])
        same = wanted[facts["id"]]
        assert sample["txt"].decode() == facts["prompt"] == same["prompt"]
        columns = same.keys() - {"image", "sha256"}
        assert {name: facts[name] for name in columns} == {name: same[name] for name in columns}
        found = read_provenance(sample[extension]).parameters
        assert found is not None
        assert found["seed"] == facts["seed"]
    data = datasets.load_dataset(str(place.path / "out"), split="train", cache_dir=offline)
    assert len(data) == 5
    assert data[0][extension].size == (16, 16)
    assert data[0]["txt"] == "a (red:1.2) circle, ☃"
    assert data[0]["json"]["brightness"] == wanted[data[0]["json"]["id"]]["brightness"]


@pytest.mark.parametrize("layout", ["parquet", "files", "webdataset"])
def test_the_same_bytes_every_time(place: Place, layout: str) -> None:
    table = place.write(TABLE)
    for name in ("one", "two"):
        place.job(table, name, encoding={"layout": layout}, checks={"measures": True, "near_duplicates": 4})
    assert place.bytes("one") == place.bytes("two")


def test_row_groups_fit_readers(place: Place) -> None:
    place.job(place.write("prompt\nx\n"))
    [image] = read_shard(Store(str(place.path / "out")), 0).images

    def groups(size: int) -> Any:
        made = [Made(image, ImageRequest(), bytes(size), "s")] * 250
        files = part_files(0, pa.schema([]), made, [], Output("png", "parquet", "m", "c"))
        return pq.ParquetFile(io.BytesIO(files["data/part-00000.parquet"].data)).metadata

    small, large = groups(1000), groups(2**20)
    assert [small.row_group(i).num_rows for i in range(small.num_row_groups)] == [100, 100, 50]
    assert [large.row_group(i).num_rows for i in range(large.num_row_groups)] == [64, 64, 64, 58]


def test_what_a_crashed_attempt_left_is_gone(place: Place) -> None:
    """An image that was made before the crash and rejected after it must not stay as a file."""
    place.job(place.write("prompt\nx\ny\n"), encoding={"layout": "files"})
    store = Store(str(place.path / "out"))
    shard, output = read_shard(store, 0), Output("png", "files", "m", "c")
    folder = place.path / "out/data/images/part-00000"
    (folder / "00002-old-0.png").write_bytes(b"old")
    (place.path / "out/rejected").mkdir()
    (place.path / "out/rejected/part-00000.parquet").write_bytes(b"old")
    (place.path / "out/_diffray/commits/00000.json").unlink()
    outcomes = [
        Made(shard.images[0], ImageRequest(), b"new", "s"),
        Rejected(shard.images[1], "check", "blank", "w", 1),
    ]
    write_commit(store, 0, shard, outcomes, output, {})
    assert len(list(folder.iterdir())) == 2
    assert {str(file["path"]) for file in read_commit(store, 0).files} == {
        str(path.relative_to(place.path / "out"))
        for pattern in ("data/images/part-00000/*", "rejected/*", "_diffray/index/*")
        for path in (place.path / "out").glob(pattern)
    }


@pytest.mark.parametrize("layout", ["parquet", "files", "webdataset"])
def test_records_in_brief_are_no_longer_for_more_images(place: Place, layout: str) -> None:
    sizes = set()
    for images in (2, 9):
        name = f"out{images}"
        place.job(
            place.write(f"prompt,n\nx,{images}\n"), name, encoding={"layout": layout}, shards={"images": 9}
        )
        [commit] = read_commits(Store(str(place.path / name)), [0])
        files = [path for path in (place.path / name / "data").rglob("*") if path.is_file()]
        assert sum(file["bytes"] for file in commit.files) == sum(path.stat().st_size for path in files)
        assert commit.images == images
        sizes.add((len(commit.files), len(commit.image_sha256)))
    assert sizes == {(2 if layout == "files" else 1, 0)}


def test_a_reason_is_never_endless(place: Place) -> None:
    place.job(place.write("prompt\nx\n"))
    [image] = read_shard(Store(str(place.path / "out")), 0).images
    assert len(Rejected(image, "generate", None, "x" * 10**6, 1).reason) == 2000


def test_json_holds_what_columns_can_hold(place: Place) -> None:
    """Dates, decimals, bytes, lists, NaN: a row of any table is valid JSON."""
    values = {
        "when": pa.array(["2024-02-03"]).cast(pa.date32()),
        "price": pa.array([1.5]).cast(pa.decimal128(5, 2)),
        "blob": pa.array([b"\xff\0"]),
        "list": pa.array([[1, 2]]),
        "box": pa.array([{"x": float("nan")}]),
    }
    pq.write_table(pa.table({"prompt": pa.array(["x"]), **values}), place.path / "in.parquet")
    place.job(str(place.path / "in.parquet"), encoding={"layout": "files", "metadata": "jsonl"})
    [line] = (place.path / "out/data/images/part-00000/metadata.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert (row["when"], row["price"], row["blob"]) == ("2024-02-03", "1.50", "/wA=")
    assert (row["list"], row["box"]) == ([1, 2], {"x": None})


def test_numbers_of_parts_may_have_more_than_five_digits() -> None:
    assert Output("png", "webdataset", "m", "c").table(123456) == "data/part-123456.tar"


def test_file_names_come_from_nothing_dangerous(place: Place) -> None:
    ids = ["../../etc/passwd", "a\\b", "CON", "x" * 400, "ä" * 50, "a:b", "%2e%2e", "A", "a"]
    rows = "".join(f"{name},p\n" for name in ids)
    place.job(place.write(f"id,prompt\n{rows}"), encoding={"layout": "files"}, shards={"images": 20})
    names = [path.name for path in (place.path / "out/data/images/part-00000").glob("*.png")]
    assert len(names) == len({name.lower() for name in names}) == len(ids)
    assert all(re.fullmatch(r"\d{5}-[A-Za-z0-9_-]{1,60}\.png", name) for name in names)
