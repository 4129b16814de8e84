"""What columns mean: read as fields, carried along, left alone, or written by diffray itself."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffray.pipelines import InvalidJob
from diffray.pipelines.planning.rows import derived_seed

from ..conftest import Place
from ..pictures import data, flat, halves, pixels, save


@pytest.fixture
def masked(place: Place) -> str:
    """A Hugging Face table of two rows whose left half is the mask; the second row has no label."""
    mask = {"bytes": data(halves(255, 0)), "path": None}
    rows = [
        {"image": {"bytes": data(flat(c)), "path": None}, "mask": mask, "prompt": c, "label": label}
        for c, label in (("red", "x"), ("blue", None))
    ]
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kinds = {"image": picture, "mask": picture, "prompt": pa.string(), "label": pa.string()}
    features = {"info": {"features": {"image": {"_type": "Image"}, "mask": {"_type": "Image"}}}}
    schema = pa.schema(kinds.items(), metadata={"huggingface": json.dumps(features)})
    pq.write_table(pa.Table.from_pylist(rows, schema), place.path / "t.parquet")
    return str(place.path / "t.parquet")


@pytest.mark.parametrize(
    ("encoding", "table"),
    [
        ({"layout": "parquet"}, "data/*.parquet"),
        ({"layout": "files"}, "data/images/*/metadata.parquet"),
        ({"layout": "files", "metadata": "jsonl"}, "data/images/*/metadata.jsonl"),
        ({"layout": "webdataset"}, "data/*.tar"),
    ],
)
def test_a_mask_that_a_job_reads_is_carried_with_its_bytes(
    place: Place, masked: str, encoding: dict[str, Any], table: str
) -> None:
    assert place.job(masked, task="inpaint", encoding=encoding).images == 2
    [path] = (place.path / "out").glob(table)
    if path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
        features = json.loads((pq.read_schema(path).metadata or {}).get(b"huggingface", b"{}"))
        named = "input_mask" in features.get("info", {}).get("features", {})
        assert named == (encoding["layout"] == "parquet")  # a reader of image folders would take it for paths
    elif path.suffix == ".tar":
        with tarfile.open(path) as tar:
            rows = [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]  # type: ignore[arg-type]
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    expected: Any = data(halves(255, 0))
    if path.suffix != ".parquet":
        expected = base64.b64encode(expected).decode()
    assert [row["input_mask"] for row in rows] == [{"bytes": expected, "path": None}] * 2
    assert [row["mask"] for row in rows] == [f"input:t.parquet#row={i}&column=mask" for i in range(2)]
    assert "input_init_image" not in rows[0], "the source picture itself is not carried"
    assert "input_image" not in rows[0], "the source picture itself is not carried"


def test_what_inpaint_made_is_the_source_of_the_next_with_the_mask_that_it_carries(
    place: Place, masked: str
) -> None:
    place.job(masked, "one", task="inpaint")
    again = str(place.path / "one/data")
    result = place.job(again, "two", task="inpaint", columns={"mask": "input_mask"})
    assert (result.images, result.rejected) == (2, 0)
    one, two = place.rows("one"), place.rows("two")
    assert [row["row_id"] for row in two] == [row["id"] for row in one]
    assert [row["input_mask"] for row in two] == [row["input_mask"] for row in one]
    for row, before in zip(two, one, strict=True):
        assert (np.hsplit(pixels(row), 2)[1] == np.hsplit(pixels(before), 2)[1]).all()


def test_masks_of_plain_bytes_keep_their_names_and_those_named_by_path_are_no_bytes(place: Place) -> None:
    mask = data(halves(255, 0))
    with tarfile.open(place.path / "t.tar", "w") as archive:
        for name, content in (("a.png", data(flat())), ("a.mask.png", mask), ("a.txt", b"x")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    place.job(str(place.path / "t.tar"), "tar", task="inpaint", columns={"mask": "mask.png"})
    [row] = place.rows("tar")
    assert row["mask.png"] == mask
    assert row["mask"].startswith("input:t.tar#offset=")
    save(place, flat(), "a.png")
    save(place, halves(255, 0), "m.png")
    place.job(place.write("init_image,mask,prompt\na.png,m.png,x\n", "in/t.csv"), "path", task="inpaint")
    [row] = place.rows("path")
    assert row["mask"] == "m.png"
    assert not [name for name in row if name.startswith("input_")]


def test_rejected_rows_with_masks_can_be_fed_back(place: Place, masked: str) -> None:
    pq.write_table(pq.read_table(masked).set_column(2, "prompt", pa.array(["POISON", "blue"])), masked)
    assert place.job(masked, task="inpaint").rejected == 1
    root = {"pictures": {"root": str(place.path)}}
    place.job(str(place.path / "out/rejected"), "two", task="inpaint", **root)
    [one], [two] = place.rows(folder="rejected"), place.rows("two", "rejected")
    keys = ("id", "seed", "stage", "reason", "input_mask")
    assert [two[k] for k in keys] == [one[k] for k in keys]
    assert two["mask"] == "t.parquet#row=0&column=mask"


def test_the_pictures_of_a_dataset_are_the_next_ones_source(place: Place) -> None:
    place.job(place.write("prompt,seed,label\na red thing,5,L\nPOISON,1,M\n"), "first")
    place.job(str(place.path / "first/data"), "second", task="augment", images_per_prompt=2)
    [first], second = place.rows("first"), place.rows("second")
    assert [r["row_id"] for r in second] == [first["id"]] * 2
    assert [r["prompt"] for r in second] == ["a red thing"] * 2
    assert [r["seed"] for r in second] == [derived_seed(0, r["id"]) for r in second]
    assert second[0]["input_seed"] == 5
    assert second[0]["input_sha256"] == first["sha256"]
    assert second[0]["label"] == "L"
    place.job(str(place.path / "second/data"), "third", task="upscale")
    assert [r["row_id"] for r in place.rows("third")] == [r["id"] for r in second]


def test_tars_that_diffray_made_of_tars_are_a_source_like_its_tables(place: Place) -> None:
    """Their JSON holds the first sample's key and text too, and what made the picture is no request of the next."""
    with tarfile.open(place.path / "in.tar", "w") as tar:
        for name, member in {
            "a.png": data(flat("red")),
            "a.txt": b"a cat",
            "a.json": b'{"seed": 5, "k": 1}',
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(member)
            tar.addfile(info, io.BytesIO(member))
    values: dict[str, Any] = {"task": "augment", "encoding": {"layout": "webdataset"}}
    place.job(str(place.path / "in.tar"), "first", defaults={"steps": 3}, **values)
    place.job(str(place.path / "first/data"), "second", images_per_prompt=2, defaults={"steps": 5}, **values)
    place.job(str(place.path / "second/data"), "third", task="augment")
    rows = place.rows("third")
    assert len(rows) == 2
    assert len({row["seed"] for row in rows}) == 2
    for row in rows:
        assert (row["prompt"], row["k"], row["steps"], row["input_seed"]) == ("a cat", 1, 4, 5)
        assert (row["input_steps"], row["input_input_steps"]) == (3, 5)
        assert row["row_id"] == f"{row['input_input_row_id']}-{row['input_input_index']}"
        assert [row[name] for name in ("__key__", "input___key__", "input_input___key__")][1:] == [
            "0000000000",
            "a",
        ]


def test_rejected_rows_with_pictures_can_be_fed_back(place: Place) -> None:
    save(place, flat(), "a.png")
    table = place.write("image,prompt,label\na.png,POISON,x\n", "in/t.csv")
    options = {"task": "augment", "sweep": {"strength": [0.3, 0.6]}}
    place.job(table, "one", **options)
    again = {**options, "pictures": {"root": str(place.path / "in")}}
    place.job(str(place.path / "one/rejected"), "two", **again)
    one, two = place.rows("one", "rejected"), place.rows("two", "rejected")
    keys = ("id", "variant", "seed", "strength", "init_image", "reason", "label")
    assert len(one) == 2
    assert [[r[k] for k in keys] for r in two] == [[r[k] for k in keys] for r in one]


def test_a_column_that_is_not_meant_is_left_alone_and_carried(place: Place) -> None:
    save(place, flat(), "a.png")
    table = place.write("file_name,caption,width,height\na.png,x,101,75\n", "in/t.csv")
    named = {"prompt": "caption"}
    place.job(table, "read", task="augment", columns=named)
    [bad] = place.rows("read", "rejected")
    assert (bad["stage"], bad["field"], bad["width"]) == ("plan", "width", "101")
    assert "say columns: {width: null} (--column width=)" in bad["reason"]
    sizes = {"defaults": {"width": 64, "height": 48}}
    place.job(table, "not", task="augment", columns={**named, "width": None, "height": None}, **sizes)
    [row] = place.rows("not")
    assert (row["width"], row["height"], row["input_width"], row["input_height"]) == (64, 48, "101", "75")
    assert pixels(row).shape == (48, 64, 3)


def test_pictures_and_needed_fields_may_be_read_from_no_column(place: Place, masked: str) -> None:
    not_meant = {"init_image": None, "mask": None}
    result = place.job(masked, "generate", columns=not_meant)
    assert (result.images, result.rejected) == (2, 0)
    row = place.rows("generate")[0]
    assert (row["mask"], row["input_mask"]["bytes"]) == (None, data(halves(255, 0)))
    assert row["input_image"]["bytes"] == data(flat("red"))
    with pytest.raises(InvalidJob, match=r"columns\.mask: got null, task inpaint needs one"):
        place.job(masked, "inpaint", task="inpaint", columns={"mask": None})
    with pytest.raises(InvalidJob, match=r"columns\.prompt: got null"):
        place.job(masked, "prompt", columns={"prompt": None})
    place.job(masked, "constant", columns={"prompt": None}, defaults={"prompt": "all the same"})
    assert [(r["prompt"], r["input_prompt"]) for r in place.rows("constant")] == [
        ("all the same", "red"),
        ("all the same", "blue"),
    ]


def test_a_row_that_diffray_wrote_keeps_its_size_where_columns_are_left_alone(place: Place) -> None:
    table = place.write("prompt,width\nPOISON,101\n")
    options = {"columns": {"width": None}, "defaults": {"width": 64}}
    place.job(table, "one", **options)
    place.job(str(place.path / "one/rejected"), "two", columns={"width": None})
    [one], [two] = place.rows("one", "rejected"), place.rows("two", "rejected")
    assert (one["width"], one["input_width"]) == ("64", "101") == (two["width"], two["input_width"])
