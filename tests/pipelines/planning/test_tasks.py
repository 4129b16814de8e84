"""Every task from rows to data on the fake engine, which repaints where the mask is white."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.lib.format as npy
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffray.pipelines import InvalidJob, ModelOptions, preview, retry_rejected
from diffray.pipelines.planning.rows import RowRules, derived_seed

from ..conftest import Place, in_process
from ..fake import CONFIG, FakeModels


def flat(colour: str = "red", size: tuple[int, int] = (32, 24)) -> Image.Image:
    return Image.new("RGB", size, colour)


def data(image: Image.Image, format: str = "PNG") -> bytes:
    sink = io.BytesIO()
    image.save(sink, format)
    return sink.getvalue()


def halves(left: Any, right: Any, mode: str = "L", size: tuple[int, int] = (32, 24)) -> Image.Image:
    image = Image.new(mode, size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


def save(place: Place, image: Image.Image, name: str) -> None:
    path = place.path / "in" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def pixels(row: dict[str, Any]) -> Any:
    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))


def test_augment_makes_variants_and_carries_the_labels(place: Place) -> None:
    save(place, flat("red"), "a.png")
    save(place, flat("blue"), "b/b.png")
    rows = [
        {"id": "a", "init_image": "a.png", "label": "car", "boxes": [[1, 2, 3, 4]], "strength": 0.4},
        {"id": "b", "init_image": "b/b.png", "label": "bus", "boxes": []},
    ]
    table = place.write("\n".join(map(json.dumps, rows)), "in/rows.jsonl")
    result = place.job(
        table,
        task="augment",
        images_per_prompt=2,
        templates={"prompt": "a photo of a {label}, {{sunny}} {weather}"},
        sweep={"weather": ["rain", "snow"]},
        defaults={"strength": 0.7},
    )
    assert (result.images, result.rejected) == (8, 0)
    made = place.rows()
    assert {(r["row_id"], r["weather"], r["index"]) for r in made} == {
        (i, w, k) for i in "ab" for w in ("rain", "snow") for k in (0, 1)
    }
    for row in made:
        assert row["prompt"] == f"a photo of a {row['label']}, {{sunny}} {row['weather']}"
        assert row["boxes"] == ([[1, 2, 3, 4]] if row["row_id"] == "a" else [])
        assert row["strength"] == (0.4 if row["row_id"] == "a" else 0.7)
        assert row["id"] == f"{row['row_id']}-{row['variant']}-{row['index']}"
        assert row["seed"] == derived_seed(0, row["id"])
        assert (row["width"], row["height"]) == (32, 24)
        assert pixels(row)[..., 0 if row["row_id"] == "a" else 2].min() >= 127
    assert {r["init_image"] for r in made} == {"a.png", "b/b.png"}


def test_variants_keep_ids_and_seeds_when_rows_and_values_are_added(place: Place) -> None:
    rows = [{"prompt": "x"}, {"prompt": "y"}]
    sweep = {"steps": {"from": 2, "to": 6, "step": 2}, "sampler": ["euler", "heun"]}
    place.job(place.write("\n".join(map(json.dumps, rows)), "a.jsonl"), "one", sweep=sweep)
    grown = place.write("\n".join(map(json.dumps, [{"prompt": "w"}, *rows[::-1]])), "b.jsonl")
    place.job(grown, "two", sweep={"sampler": ["heun", "ddim", "euler"], "steps": [8, 6, 4, 2]})
    one, two = ({r["id"]: (r["seed"], r["sha256"]) for r in place.rows(name)} for name in ("one", "two"))
    assert len(one) == 12
    assert len(two) == 36
    assert {name: two[name] for name in one} == one
    steps = {r["steps"] for r in place.rows("one")}
    assert steps == {2, 4, 6}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"columns": {"promt": "x"}}, "columns.promt: no such field of task generate"),
        ({"templates": {"steps": "{a}"}}, "templates.steps: no such field"),
        ({"templates": {"prompt": "{a.b}"}}, "allowed is the name of a column"),
        ({"templates": {"prompt": "{a"}}, "templates.prompt"),
        ({"templates": {"prompt": "{none}"}}, "no column 'none'"),
        ({"sweep": {"weather": ["a"]}}, "sweep.weather: neither a field"),
        ({"sweep": {"steps": []}}, "at least one value"),
        ({"sweep": {"steps": [1, 1]}}, "each once"),
        ({"sweep": {"steps": {"from": 1, "to": 20_000, "step": 1}}}, "20000 combinations"),
        ({"sweep": {"model": ["a"]}}, "sweep.model"),
        (
            {"sweep": {"sampler": ["euler", "eulr"]}},
            r"sweep\.sampler: got 'eulr', did you mean euler or .* allowed is one of euler,",
        ),
        (
            {"sweep": {"steps": [3, 4], "width": [32, 20]}},
            r"sweep\.width: got 20, allowed is a multiple of 8",
        ),
        ({"sweep": {"prompt": ["x", 5]}}, r"sweep\.prompt: got int, allowed is text"),
        ({"sweep": {"seed": [1, -1]}}, r"sweep\.seed: got -1, allowed is 0\.\."),
        ({"sweep": {"adapters": ["ink"]}}, r"sweep\.adapters: got 'ink', allowed is none"),
        ({"defaults": {"left": 8}}, "defaults.left: no such field of task generate"),
        ({"defaults": {"steps": 0}}, "defaults: steps"),
        ({"task": "edit"}, "sd1 text, needed is edit"),
        ({"task": "augment"}, "no column 'init_image' or 'image' or 'file_name'; it has prompt"),
        ({"task": "encode", "encoding": {"layout": "files"}}, "encode writes latents into Parquet"),
    ],
)
def test_a_job_that_contradicts_itself_starts_nothing(
    place: Place, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidJob, match=message):
        place.job(place.write("prompt\nx\n"), **values)
    assert not place.begun()


def test_a_sweep_may_hold_what_only_some_rows_models_and_combinations_allow(place: Place) -> None:
    table = place.write("prompt,guidance_stop\nx,1\ny,\n")
    swept = {"guidance_start": [0.1, 0.8], "weather": ["rain"]}
    options = {
        "sweep": swept,
        "defaults": {"guidance_stop": 0.5},
        "templates": {"prompt": "{prompt} {weather}"},
    }
    result = place.job(table, "rows", **options)
    assert (result.images, result.rejected) == (3, 1)
    models = {"plain": {"device": "cpu"}, "inked": {"adapters": {"ink": "ink.safetensors"}}}
    several = place.config(table, model={}, models=models, sweep={"adapters": ["ink:0.5"]})
    RowRules(several, dict.fromkeys(models, CONFIG), "")
    save(place, flat(), "a.png")
    pictures = place.write("prompt,init_image\nx,a.png\ny,\n", "in/t.csv")
    result = place.job(pictures, "strength", sweep={"strength": [0.5, 0.8]})
    assert (result.images, result.rejected) == (2, 2)


def test_strength_that_leaves_no_step_is_rejected_by_the_plan(place: Place) -> None:
    save(place, flat(), "a.png")
    table = place.write(
        "prompt,init_image,strength,steps\nx,a.png,0.3,2\ny,a.png,,\nz,a.png,0.3,4\n", "in/t.csv"
    )
    place.job(table, "rows", task="augment")
    [row] = place.rows("rows", "rejected")
    assert (row["prompt"], row["stage"], row["field"], row["attempts"]) == ("x", "plan", "strength", 0)
    assert row["reason"] == "0.3 of 2 steps leaves none to run, allowed is more"
    place.job(table, "defaults", task="augment", defaults={"strength": 0.2})
    assert [(r["prompt"], r["stage"]) for r in place.rows("defaults", "rejected")] == [
        ("x", "plan"),
        ("y", "plan"),
    ]
    place.job(table, "upscale", task="upscale", columns={"strength": None}, defaults={"steps": 2})
    assert [r["reason"] for r in place.rows("upscale", "rejected")] == [
        f"0.35 of {steps} steps leaves none to run, allowed is more" for steps in (2, 2)
    ]
    place.job(table, "hires", columns={"init_image": None, "strength": None}, defaults={"hires_scale": 2})
    assert place.job(table, "one", defaults={"hires_scale": 2, "hires_strength": 0.3}).rejected == 1
    assert {(r["stage"], r["field"]) for r in place.rows("one", "rejected")} == {("plan", "strength")}
    place.job(table, "two", defaults={"hires_scale": 2, "hires_strength": 0.1, "strength": 0.8})
    assert {(r["stage"], r["field"]) for r in place.rows("two", "rejected")} == {
        ("plan", "strength"),
        ("plan", "hires_strength"),
    }


def test_strength_of_a_picture_that_may_be_missing_is_not_judged_by_the_plan(place: Place) -> None:
    columns = {"prompt": ["x"], "init_image": pa.array([None], pa.binary())}
    pq.write_table(pa.table(columns), place.path / "t.parquet")
    result = place.job(str(place.path / "t.parquet"), defaults={"strength": 0.2, "steps": 2})
    assert (result.images, result.rejected) == (1, 0)
    assert place.rows()[0]["strength"] is None


def test_a_template_without_its_value_rejects_that_row_only(place: Place) -> None:
    rows = [{"label": "car"}, {"label": None}, {"label": {"a": 1}}, {"label": 3.0}]
    table = place.write("\n".join(map(json.dumps, rows)), "r.jsonl")
    place.job(table, templates={"prompt": "a {label}"})
    assert [row["prompt"] for row in place.rows()] == ["a car", "a 3"]
    assert [(r["field"], r["line"]) for r in place.rows(folder="rejected")] == [("prompt", 2), ("prompt", 3)]


@pytest.mark.parametrize(
    ("mask", "options", "kept"),
    [
        (halves(255, 0), {}, "right"),
        (halves(255, 0), {"mask_invert": True}, "left"),
        (halves(7, 3), {"mask_values": [7]}, "right"),
        (halves(7, 3), {"mask_values": [7], "mask_invert": True}, "left"),
        (halves(600, 40000, "I;16"), {}, "left"),
        (halves(600, 2, "I;16"), {"mask_values": [2]}, "left"),
        (halves((255, 255, 255, 255), (255, 255, 255, 0), "RGBA"), {}, "right"),
        (halves(255, 0, size=(64, 48)), {}, "right"),
    ],
)
def test_inpaint_repaints_one_side_and_keeps_the_other(
    place: Place, mask: Image.Image, options: dict[str, Any], kept: str
) -> None:
    save(place, flat("red"), "a.png")
    save(place, mask, "a.mask.png")
    table = place.write("init_image,mask,prompt,label\na.png,a.mask.png,x,7\n", "in/t.csv")
    assert place.job(table, task="inpaint", defaults=options).images == 1
    [row] = place.rows()
    left, right = np.hsplit(pixels(row), 2)
    same, other = (left, right) if kept == "left" else (right, left)
    assert (same == (255, 0, 0)).all()
    assert not (other == (255, 0, 0)).all()
    assert (row["paste_back"], row["label"], row["mask_invert"]) == (True, "7", options.get("mask_invert"))


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
        assert json.loads(pq.read_schema(path).metadata[b"huggingface"])["info"]["features"]["input_mask"]
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


def test_a_palette_mask_is_read_by_class_or_by_brightness(place: Place) -> None:
    mask = halves(1, 2, "P")
    mask.putpalette([0, 0, 0, 255, 255, 255, 10, 10, 10])
    save(place, flat(), "a.png")
    save(place, mask, "m.png")
    table = place.write("init_image,mask,prompt\na.png,m.png,x\n", "in/t.csv")
    place.job(table, "bright", task="inpaint")
    place.job(table, "class", task="inpaint", defaults={"mask_values": "2"})
    for output, side in (("bright", 1), ("class", 0)):
        assert (np.hsplit(pixels(place.rows(output)[0]), 2)[side] == (255, 0, 0)).all(), output


def test_a_mask_of_another_shape_is_rejected(place: Place) -> None:
    save(place, flat(), "a.png")
    save(place, halves(255, 0, size=(32, 32)), "m.png")
    place.job(place.write("init_image,mask,prompt\na.png,m.png,x\n", "in/t.csv"), task="inpaint")
    [row] = place.rows(folder="rejected")
    assert (row["stage"], row["field"]) == ("source", "mask")
    assert "another shape" in row["reason"]


@pytest.mark.parametrize(
    ("values", "at", "size"),
    [
        ({"left": 8, "top": 16}, (8, 16), (40, 40)),
        ({"right": 3}, (0, 0), (40, 24)),
        ({"width": 64, "height": 48}, (16, 12), (64, 48)),
    ],
)
def test_outpaint_keeps_the_picture_where_it_is_put(
    place: Place, values: dict[str, int], at: tuple[int, int], size: tuple[int, int]
) -> None:
    save(place, flat("red"), "a.png")
    table = place.write("image\na.png\n", "in/t.csv")
    assert place.job(table, task="outpaint", defaults=values).images == 1
    [row] = place.rows()
    image = pixels(row)
    assert image.shape == (size[1], size[0], 3)
    inside = np.zeros(image.shape[:2], bool)
    inside[at[1] : at[1] + 24, at[0] : at[0] + 32] = True
    assert (image[inside] == (255, 0, 0)).all()
    assert not (image[~inside] == (255, 0, 0)).all(-1).any()
    assert (row["width"], row["height"]) == size


def test_outpaint_that_adds_nothing_and_bad_sides_are_rejected(place: Place) -> None:
    save(place, flat(), "a.png")
    table = place.write("image,left,width\na.png,,\na.png,-1,\na.png,x,\na.png,,8\na.png,8,\n", "in/t.csv")
    result = place.job(table, task="outpaint")
    assert (result.images, result.rejected) == (1, 4)
    assert [r["field"] for r in place.rows(folder="rejected")] == ["left", "left", "left", "width"]


def test_upscale_doubles_unless_told_otherwise(place: Place) -> None:
    save(place, flat(), "a.png")
    table = place.write("image,scale\na.png,\na.png,3\na.png,9\n", "in/t.csv")
    result = place.job(table, task="upscale")
    assert (result.images, result.rejected) == (2, 1)
    assert [(r["width"], r["height"], r["strength"]) for r in place.rows()] == [
        (64, 48, 0.35),
        (96, 72, 0.35),
    ]


def test_encode_and_decode_are_each_others_inverse(place: Place) -> None:
    save(place, halves("red", "blue", "RGB"), "a.png")
    table = place.write("image,label\na.png,7\n", "in/t.csv")
    place.job(table, "latents", task="encode", encoding={"latents": "float32"})
    [row] = place.rows("latents")
    array = np.frombuffer(row["latents"], row["latents_dtype"]).reshape(row["latents_shape"])
    assert array.shape == (4, 3, 4)
    assert array[:, 0, 0].tolist() == [1, 0, 0, 0]
    assert (row["label"], row["latents_scale"], "image" in row) == ("7", 1.0, False)
    place.job(str(place.path / "latents/data"), "back", task="decode")
    [back] = place.rows("back")
    assert (pixels(back) == np.asarray(halves("red", "blue", "RGB"))).all()
    assert (back["row_id"], back["label"]) == (row["id"], "7")


def test_latents_that_are_none_are_rejected(place: Place) -> None:
    good = (np.arange(16) / 16).astype(np.float16).reshape(4, 2, 2)
    sink = io.BytesIO()
    np.save(sink, good)
    table = pa.table(
        {
            "latents": [good.tobytes(), good.tobytes(), good.tobytes()[:-1], sink.getvalue(), None, b""],
            "latents_shape": [[4, 2, 2], None, [4, 2, 2], None, [4, 2, 2], [4, 2, 2]],
            "latents_dtype": ["float16", "float16", "float16", None, "float16", "object"],
        }
    )
    pq.write_table(table, place.path / "l.parquet")
    result = place.job(str(place.path / "l.parquet"), task="decode")
    assert (result.images, result.rejected) == (2, 4)
    assert {(r["stage"], r["field"]) for r in place.rows(folder="rejected")} == {("source", "latents")}


def npy_file(values: Any, version: tuple[int, int] = (1, 0), **header: Any) -> bytes:
    """A .npy file of float16 whose header says what it likes."""
    sink = io.BytesIO()
    claimed = {"descr": "<f2", "fortran_order": False, "shape": values.shape, **header}
    write = npy.write_array_header_1_0 if version == (1, 0) else npy.write_array_header_2_0
    write(sink, claimed)
    return sink.getvalue() + values.tobytes()


def test_a_file_of_latents_is_read_by_what_is_in_it_not_by_what_it_claims(place: Place) -> None:
    good = (np.arange(16) / 16).astype(np.float16).reshape(4, 2, 2)
    whole = npy_file(good)
    files = {
        "one": whole,
        "two": npy_file(good, (2, 0)),
        "columns": npy_file(good.transpose(), fortran_order=True, shape=(4, 2, 2)),
        "huge": npy_file(good, shape=(4, 10**6, 10**6)),
        "beyond": npy_file(good, shape=(4, 10**30, 1)),
        "short": whole[:-1],
        "empty": npy_file(good[:0]),
        "objects": npy_file(good, descr="|O"),
        "version": whole[:6] + b"\x09" + whole[7:],
        "header": whole[:20],
        "text": whole.replace(b"'descr'", b"'descr("),
    }
    pq.write_table(pa.table({"id": list(files), "latents": list(files.values())}), place.path / "l.parquet")
    place.job(str(place.path / "l.parquet"), task="decode")
    opened = {row["row_id"]: Image.open(io.BytesIO(row["image"]["bytes"])) for row in place.rows()}
    made = {name: picture.tobytes() for name, picture in opened.items()}
    assert sorted(made) == ["columns", "one", "two"]
    assert len(set(made.values())) == 1
    assert {(r["stage"], r["field"]) for r in place.rows(folder="rejected")} == {("source", "latents")}


def test_several_models_each_make_their_own_rows(place: Place) -> None:
    models = {name: {"options": {"log": str(place.log), "weights": name}} for name in ("one", "two")}
    rows = [{"id": f"r{i}", "prompt": "x", "model": "two" if i % 3 == 0 else None} for i in range(8)]
    rows.append({"id": "bad", "prompt": "x", "model": "three"})
    table = place.write("\n".join(map(json.dumps, rows)), "r.jsonl")
    result = place.job(table, model={}, models=models)
    assert (result.images, result.rejected) == (8, 1)
    found = {r["row_id"]: (r["model"], r["model_checksum"]) for r in place.rows()}
    assert found == {f"r{i}": (("two", "two") if i % 3 == 0 else ("one", "one")) for i in range(8)}
    for part in (place.path / "out/data").glob("*.parquet"):
        assert len(set(pq.read_table(part)["model"].to_pylist())) == 1
    [row] = place.rows(folder="rejected")
    assert (row["field"], "one, two" in row["reason"]) == ("model", True)


def test_a_sweep_over_models_repeats_every_row(place: Place) -> None:
    models = {name: {"options": {"weights": name}} for name in ("one", "two")}
    table = place.write("prompt\nx\ny\n")
    assert place.job(table, model={}, models=models, sweep={"model": ["one", "two"]}).images == 4
    assert sorted((r["model"], r["prompt"]) for r in place.rows()) == [
        ("one", "x"),
        ("one", "y"),
        ("two", "x"),
        ("two", "y"),
    ]


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


def test_limit_takes_the_first_rows(place: Place) -> None:
    table = place.write("prompt\na\nb\nc\n")
    assert place.job(table, limit=2).images == 2
    assert [row["prompt"] for row in place.rows()] == ["a", "b"]


def test_rejected_rows_are_run_again_with_their_pictures(place: Place) -> None:
    """The job command alone knows its input; running rejected rows again knows it from the plan."""
    table = place.write("image,prompt\na.png,x\nb.png,y\n", "in/t.csv")
    save(place, flat(), "b.png")
    config = place.config(table, task="augment", sweep={"strength": {"from": 0.5, "to": 1, "step": 0.5}})
    assert place.run(config).rejected == 2
    save(place, flat("blue"), "a.png")
    result = retry_rejected(config.output, models=FakeModels(), generate=in_process)
    assert (result.images, result.rejected) == (4, 0)
    assert sum(row["init_image"] == "a.png" for row in place.rows()) == 2


@pytest.mark.parametrize(
    ("task", "kind", "pictures"),
    [
        ("generate", "inpaint", ("init_image", "mask")),
        ("generate", "edit", ("init_image",)),
        ("generate", "depth", ("init_image", "depth")),
        ("augment", "depth", ("init_image", "depth")),
    ],
)
def test_rows_may_bring_the_pictures_that_a_model_needs(
    place: Place, task: str, kind: str, pictures: tuple[str, ...]
) -> None:
    class Models(FakeModels):
        def config(self, options: ModelOptions) -> Any:
            return replace(CONFIG, task=kind)

    for name in pictures:
        save(place, halves(0, 255) if name == "mask" else flat(), f"{name}.png")
    header, row = ",".join(pictures), ",".join(f"{name}.png" for name in pictures)
    table = place.write(f"prompt,{header}\nx,{row}\ny{',' * len(pictures)}\n", "in/t.csv")
    columns = {name: name for name in pictures}
    found = preview(place.config(table, task=task, columns=columns), models=Models())
    assert (found.images, found.rejected) == (2, 1), "a row without them is rejected by itself"
    assert "got nothing" in found.reasons[0]
