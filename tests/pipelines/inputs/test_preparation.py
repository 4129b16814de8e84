"""Every task from rows to data on the fake engine, which repaints where the mask is white."""

from __future__ import annotations

import json
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from diffray.pipelines import retry_rejected
from diffray.pipelines.planning.rows import derived_seed

from ..conftest import Place, in_process
from ..fake import FakeModels
from ..pictures import flat, halves, pixels, save


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


def test_lists_of_class_numbers_are_named_in_templates(place: Place) -> None:
    kinds = datasets.ClassLabel(names=["cat", "dog", "fox"])
    features = datasets.Features(
        {"kinds": datasets.Sequence(kinds), "sizes": datasets.Sequence(datasets.Value("int64"))}
    )
    rows = {"kinds": [[2, 0], [1], []], "sizes": [[1], [2], [3]]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(place.path / "t.parquet")
    table = str(place.path / "t.parquet")
    place.job(table, templates={"prompt": "a {kinds}"})
    assert [row["prompt"] for row in place.rows()] == ["a fox, cat", "a dog"]
    assert place.job(table, "sizes", templates={"prompt": "a {sizes}"}).rejected == 3


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
