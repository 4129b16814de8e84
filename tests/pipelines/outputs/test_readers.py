"""What comes out opens elsewhere: `datasets`, pandas, image viewers."""

from __future__ import annotations

import io
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ..conftest import Place
from ..fake import CONFIG

TABLE = 'prompt,n,label\n"a (red:1.2) circle, ☃",3,x\nPOISON,1,y\nq,2,z\n'


def test_datasets_opens_the_output_in_both_ways(place: Place, offline: str) -> None:
    datasets = pytest.importorskip("datasets")
    place.job(place.write(TABLE))
    out = str(place.path / "out")
    for data in (
        datasets.load_dataset(out, split="train", cache_dir=offline),
        datasets.load_dataset("parquet", data_dir=f"{out}/data", split="train", cache_dir=offline),
    ):
        assert len(data) == 5
        assert isinstance(data.features["image"], datasets.Image)
        assert data[0]["image"].size == (16, 16)
        assert data[0]["prompt"] == "a (red:1.2) circle, ☃"
    rejected = datasets.load_dataset(out, "rejected", split="train", cache_dir=offline)
    assert rejected["prompt"] == ["POISON"]


def test_pandas_opens_the_output(place: Place) -> None:
    place.job(place.write(TABLE))
    frame = pd.read_parquet(place.path / "out" / "data")
    assert len(frame) == 5
    assert list(frame["index"]) == [0, 1, 2, 0, 1]
    image = Image.open(io.BytesIO(frame["image"][0]["bytes"]))
    assert (image.format, image.size) == ("PNG", (16, 16))
    assert {"steps", "sampler", "seed", "guidance_scale", "model_checksum", "label"} <= set(frame.columns)


def test_carried_pictures_open_beside_image_files(place: Place, offline: str) -> None:
    """The reader of image folders takes a column of pictures for names of files, and one with bytes for empty."""
    datasets = pytest.importorskip("datasets")
    masks = [Image.new("L", (16, 16), level) for level in (10, 20)]
    features = datasets.Features({"prompt": datasets.Value("string"), "seg": datasets.Image()})
    features["views"] = datasets.Sequence(datasets.Image())
    rows = [{"prompt": "x", "seg": mask, "views": [mask, mask]} for mask in masks]
    datasets.Dataset.from_list(rows, features=features).to_parquet(place.path / "t.parquet")
    place.job(str(place.path / "t.parquet"), encoding={"layout": "files"})
    made = datasets.load_dataset(str(place.path / "out"), split="train", cache_dir=offline)
    made = made.cast_column("seg", datasets.Image()).cast_column("views", features["views"])
    assert [row["seg"].getpixel((0, 0)) for row in made] == [10, 20]
    assert [[view.getpixel((0, 0)) for view in row["views"]] for row in made] == [[10, 10], [20, 20]]


def test_tars_open_whatever_their_first_rows_leave_out(place: Place, offline: str) -> None:
    """`datasets` guesses the types of tars by the first five samples, and fails at what is not among them."""
    datasets = pytest.importorskip("datasets")
    early: list[dict[str, object]] = [{"prompt": f"p{i}", "score": 1} for i in range(8)]
    late = {
        "prompt": "late",
        "negative_prompt": "blur",
        "score": 2.5,
        "label": "x",
        "boxes": [[1, 2]],
        "of": {"a": 1},
    }
    table = place.write("\n".join(map(json.dumps, [*early, late])), "t.jsonl")
    encoding = {"layout": "webdataset", "format": "jpeg"}
    place.job(table, encoding=encoding, checks={"measures": True})
    made = datasets.load_dataset(str(place.path / "out"), split="train", cache_dir=offline)
    assert [row["jpg"].size for row in made] == [(16, 16)] * 9
    first, last = made[0]["json"], made[8]["json"]
    assert (first["score"], first["label"], first["of"]) == (1.0, None, None)
    assert {name: last[name] for name in late} == late
    assert 0 < last["brightness"] < 1


def test_near_duplicates_are_a_column_beside_the_images(place: Place, offline: str) -> None:
    datasets = pytest.importorskip("datasets")
    rows = "".join(f"x,{number % 3}\n" if number != 5 else "POISON,0\n" for number in range(10))
    place.job(
        place.write("prompt,seed\n" + rows),
        shards={"images": 4},
        checks={"near_duplicates": 0},
    )
    out = str(place.path / "out")
    images = datasets.load_dataset(out, split="train", cache_dir=offline)
    marks = datasets.load_dataset(out, "duplicates", split="train", cache_dir=offline)
    assert marks["id"] == images["id"]
    both = datasets.concatenate_datasets([images, marks.remove_columns("id")], axis=1)
    kept = both.filter(lambda row: row["duplicate_of"] is None)
    assert kept["seed"] == [0, 1, 2]
    first = dict(zip(kept["seed"], kept["id"], strict=True))
    assert [row["duplicate_of"] for row in both] == [None] * 3 + [first[s] for s in both["seed"][3:]]


@pytest.mark.parametrize(("name", "quality"), [("jpeg", 90), ("webp", 90), ("webp", 100)])
def test_other_formats(place: Place, name: str, quality: int) -> None:
    place.job(place.write("prompt\nx\n"), "png")
    place.job(place.write("prompt\nx\n"), encoding={"format": name, "quality": quality})
    [row] = place.rows()
    image = Image.open(io.BytesIO(row["image"]["bytes"]))
    assert image.format == name.upper()
    [original] = place.rows("png")
    same = np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(original["image"]["bytes"]))))
    assert same == (quality == 100)


def test_a_png_carries_its_request(place: Place) -> None:
    place.job(place.write(TABLE))
    row = place.rows()[1]
    request = json.loads(Image.open(io.BytesIO(row["image"]["bytes"])).text["diffray"])
    assert (request["prompt"], request["seed"]) == ("a (red:1.2) circle, ☃", row["seed"])
    assert request["steps"] == CONFIG.defaults.steps


def test_no_time_and_no_place_is_in_what_users_see(place: Place) -> None:
    place.job(place.write(TABLE))
    for name in place.bytes():
        assert str(place.path).encode() not in (place.path / "out" / name).read_bytes()
