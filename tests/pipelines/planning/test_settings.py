"""What the plan can judge of a row: its model, the pictures that it needs, whether any step is left."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffray.pipelines import ModelOptions, preview

from ..conftest import Place
from ..fake import CONFIG, FakeModels
from ..pictures import flat, halves, save


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
