"""Templates and sweeps: what varies, what stays, and what is refused before anything starts."""

from __future__ import annotations

import json
from typing import Any

import datasets
import pytest

from diffray.pipelines import InvalidJob
from diffray.pipelines.planning.rows import RowRules

from ..conftest import Place
from ..fake import CONFIG
from ..pictures import flat, save


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
        ({"sweep": {"steps": {"from": 0, "to": 1, "step": 1e-12}}}, "1000000000001 combinations"),
        ({"sweep": {"steps": {"from": 4, "to": 2, "step": 1}}}, r"sweep\.steps: from 4 is above to 2"),
        (
            {"sweep": {"a": ["on", True]}, "templates": {"prompt": "{a}"}},
            r"sweep\.a: got true or false.* quote",
        ),
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


def test_swept_names_and_values_of_any_kind_are_columns(place: Place) -> None:
    """A name that diffray uses itself, and values that fit no common type."""
    table = place.write("prompt,file\na,f\nb,f\n")
    values: dict[str, Any] = {"templates": {"prompt": "{prompt} {id} {file} {when}"}}
    values["sweep"] = {"id": ["x", "y"], "file": ["g"], "when": [1980, "1990s"]}
    assert place.job(table, **values).images == 8
    rows = place.rows()
    assert len({row["id"] for row in rows}) == 8
    assert {
        row["prompt"].partition(" ")[2]: (row["input_id"], row["input_file"], row["when"]) for row in rows
    } == {
        "x g 1980": ("x", "g", "1980"),
        "x g 1990s": ("x", "g", '"1990s"'),
        "y g 1980": ("y", "g", "1980"),
        "y g 1990s": ("y", "g", '"1990s"'),
    }


def test_a_swept_name_takes_the_place_of_a_column_and_of_its_type(place: Place) -> None:
    features = datasets.Features({"label": datasets.ClassLabel(names=["cat", "dog"])})
    datasets.Dataset.from_dict({"label": [0, 1]}, features=features).to_parquet(place.path / "t.parquet")
    sweep = {"label": ["fox", "owl"]}
    place.job(str(place.path / "t.parquet"), templates={"prompt": "a {label}"}, sweep=sweep)
    assert [(row["prompt"], row["label"]) for row in place.rows()] == [("a fox", "fox"), ("a owl", "owl")] * 2


def test_a_template_without_its_value_rejects_that_row_only(place: Place) -> None:
    rows = [{"label": "car"}, {"label": None}, {"label": {"a": 1}}, {"label": 3.0}]
    table = place.write("\n".join(map(json.dumps, rows)), "r.jsonl")
    place.job(table, templates={"prompt": "a {label}"})
    assert [row["prompt"] for row in place.rows()] == ["a car", "a 3"]
    assert [(r["field"], r["line"]) for r in place.rows(folder="rejected")] == [("prompt", 2), ("prompt", 3)]


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
