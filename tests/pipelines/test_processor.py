"""The bare stage: what a row brings, what comes back, and what becomes of a bad one."""

from __future__ import annotations

import asyncio
import hashlib
import io
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from diffray.model.errors import GenerationError, InvalidRequest
from diffray.model.judges.checks import measure
from diffray.model.request import ImageRequest
from diffray.pipelines import Checks, InvalidJob, ProcessorConfig, build_processor
from diffray.pipelines.options import ModelOptions
from diffray.pipelines.processor import ERROR, Generator
from diffray.pipelines.scores import Examiner

from .fake import FakeModels


def rows(config: ProcessorConfig, given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    async def all_of_it() -> list[dict[str, Any]]:
        stage = Generator(config, FakeModels())
        return [row async for table in stage(pa.Table.from_pylist(given)) for row in table.to_pylist()]

    return asyncio.run(all_of_it())


def test_rows_come_back_in_order_with_their_own_columns() -> None:
    config = ProcessorConfig(defaults={"steps": 3, "width": 64, "height": 64})
    made = rows(
        config, [{"prompt": "p", "label": 4, "steps": "5"}, {"prompt": "q", "label": 5, "steps": None}]
    )
    assert [(r["prompt"], r["label"], r["steps"], r[ERROR]) for r in made] == [
        ("p", 4, 5, ""),
        ("q", 5, 3, ""),
    ]
    for row in made:
        data = row["image"]["bytes"]
        assert Image.open(io.BytesIO(data)).size == (64, 64)
        assert row["sha256"] == hashlib.sha256(data).hexdigest()


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    one, two, three = ({"prompt": p} for p in "abc")
    together = rows(ProcessorConfig(), [one, two, three])
    alone = [rows(ProcessorConfig(), [row])[0] for row in (three, one, two)]
    assert {r["prompt"]: r["sha256"] for r in together} == {r["prompt"]: r["sha256"] for r in alone}


def test_ids_and_job_seeds_decide_where_a_row_gives_no_seed() -> None:
    same = [{"prompt": "p", "id": "1"}, {"prompt": "p", "id": "2"}]
    first = [r["seed"] for r in rows(ProcessorConfig(), same)]
    assert len(set(first)) == 2
    assert [r["seed"] for r in rows(ProcessorConfig(), same)] == first
    assert [r["seed"] for r in rows(ProcessorConfig(seed=1), same)] != first
    assert [r["seed"] for r in rows(ProcessorConfig(defaults={"seed": 9}), same)] == [9, 9]


def seeds(*given: dict[str, Any]) -> list[int]:
    """Each row in a stage of its own, so that no neighbour's columns are there."""
    return [rows(ProcessorConfig(), [{"prompt": "p", **row}])[0]["seed"] for row in given]


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(file, "PNG")
    return file.getvalue()


def test_rows_of_the_same_prompt_differ_by_any_other_column() -> None:
    given: list[dict[str, Any]] = [
        {},
        {"id": ""},
        {"id": "", "image_id": 1},
        {"image_id": 1},
        {"image_id": 2},
        {"image_id": 2.5},
        {"image_id": "2"},
        {"image_id": True},
        {"boxes": [[0, 1], [2, 3]]},
        {"boxes": [[0, 1, 2, 3]]},
        {"boxes": [[0, None], [2, 3]]},
        {"cell": b"ab"},
        {"cell": b"ba"},
        {"cell": {"a": 1, "b": 2}},
        {"cell": {"a": 2, "b": 1}},
        {"at": datetime(2024, 5, 1, 12)},
        {"at": datetime(2024, 5, 1, 13)},
        {"init_image": picture("red"), "strength": 0.5},
        {"init_image": picture("blue"), "strength": 0.5},
        {"init_image": {"bytes": picture("green"), "path": None}, "strength": 0.5},
    ]
    assert len(set(seeds(*given))) == len(given)
    one, two = rows(ProcessorConfig(), [{"prompt": "p", "image_id": i} for i in (1, 2)])
    assert one["sha256"] != two["sha256"]


def test_a_seed_does_not_depend_on_order_neighbours_or_the_kind_of_number() -> None:
    row = {"prompt": "p", "image_id": 7, "boxes": [1, 2], "cell": {"a": 1, "b": b"x"}}
    other = dict(reversed(row.items()), label=None, cell={"b": b"x", "a": 1.0, "c": None}, image_id=7.0)
    neighbour = {"prompt": "q", "image_id": 0.5, "label": "fox"}
    together = rows(ProcessorConfig(), [row, neighbour])[0]
    assert len({*seeds(row, row, other), together["seed"]}) == 1


@pytest.mark.parametrize("dtype", ["float32", "int64", "uint8"])
def test_tensors_are_columns_like_others(dtype: str) -> None:
    from ray.data.extensions import ArrowTensorArray

    def stage(value: float) -> int:
        tensor = ArrowTensorArray.from_numpy(np.full((1, 40, 40), value, dtype))
        table = pa.table({"prompt": ["p"], "embedding": tensor})

        async def made() -> list[pa.Table]:
            return [part async for part in Generator(ProcessorConfig(), FakeModels())(table)]

        return asyncio.run(made())[0]["seed"][0].as_py()

    assert stage(1) == stage(1) != stage(2)


BAD = [{"prompt": "p", "steps": 2}, {"prompt": "POISON", "steps": 2}, {"prompt": "q", "steps": -1}]


def test_errors_are_a_column_when_asked() -> None:
    good, poison, wrong = rows(ProcessorConfig(should_continue_on_error=True), BAD)
    assert (good[ERROR], good["image"] is None) == ("", False)
    for row, said, prompt in ((poison, "non-finite", "POISON"), (wrong, "steps", "q")):
        assert said in row[ERROR]
        assert (row["image"], row["prompt"]) == (None, prompt)


def test_a_row_that_failed_before_keeps_its_error_and_is_not_made() -> None:
    """Such a stage of Ray's leaves its other columns empty: an empty prompt would be a picture of nothing."""
    given = [{"prompt": "", ERROR: "timeout", "label": 1}, {"prompt": "p", ERROR: "", "label": 2}]
    for config in (ProcessorConfig(), ProcessorConfig(should_continue_on_error=True)):
        failed, good = rows(config, given)
        assert (failed[ERROR], failed["image"], failed["label"]) == ("timeout", None, 1)
        assert (good[ERROR], good["image"] is None) == ("", False)


def test_a_row_without_a_prompt_is_refused_as_in_a_job() -> None:
    given = [{"prompt": None, "label": 1}, {"prompt": "", "label": 2}]
    without, empty = rows(ProcessorConfig(should_continue_on_error=True), given)
    assert without[ERROR] == "InvalidRequest: prompt: got nothing, every row needs one (it may be empty)"
    assert (without["image"], without["prompt"], without["label"]) == (None, None, 1)
    assert (empty[ERROR], empty["prompt"]) == ("", "")
    with pytest.raises(InvalidRequest, match="prompt: got nothing"):
        rows(ProcessorConfig(), [{"label": 1}])
    assert rows(ProcessorConfig(defaults={"prompt": "p"}), [{"label": 1}])[0]["prompt"] == "p"


@pytest.mark.parametrize(
    ("defaults", "said"),
    [
        ({"stepss": 4}, r"defaults\.stepss: no such request field, allowed are prompt, .*steps"),
        ({"steps": 0}, r"defaults\.steps: got 0, allowed is 1\.\.1000"),
        ({"steps": "many"}, r"defaults\.steps: got 'many', allowed is an integer"),
        ({"adapters": "ink"}, r"defaults\.adapters: got 'ink', allowed is none"),
        ({"output": "latents"}, r"defaults\.output: got 'latents', allowed is 'image'"),
    ],
)
def test_defaults_are_checked_before_any_actor_starts(defaults: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidJob, match=said):
        build_processor(ProcessorConfig(defaults=defaults), models=FakeModels())


def test_defaults_that_are_allowed_build_a_processor() -> None:
    model = ModelOptions(adapters={"ink": "ink.safetensors"})
    defaults = {"steps": "5", "strength": 0.5, "adapters": "ink:0.5", "seed": None}
    build_processor(ProcessorConfig(defaults=defaults, model=model), models=FakeModels())


def test_checks_are_those_of_a_job() -> None:
    checks = Checks(block=("fox",), measures=True)
    config = ProcessorConfig(should_continue_on_error=True, checks=checks)
    good, blocked, blank = rows(config, [{"prompt": p} for p in ("p", "a fox", "BLANK")])
    assert good["brightness"] == measure(Image.open(io.BytesIO(good["image"]["bytes"]))).brightness
    for row, said in ((blocked, "'fox'"), (blank, "blank: all pixels are #010203")):
        assert said in row[ERROR]
        assert (row["image"], row["brightness"]) == (None, None)


def test_whatever_a_judge_raises_is_the_rows_own_unless_the_device_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def examined(_: object, image: Image.Image, request: ImageRequest) -> dict[str, Any]:
        if request.prompt != "p":
            raise RuntimeError(request.prompt)
        return {}

    monkeypatch.setattr(Examiner, "examine", examined)
    config = ProcessorConfig(should_continue_on_error=True)
    good, odd = rows(config, [{"prompt": "p"}, {"prompt": "no idea"}])
    assert (good[ERROR], odd[ERROR], odd["image"]) == ("", "RuntimeError: no idea", None)
    for stage, prompt in ((config, "CUDA error: unspecified launch failure"), (ProcessorConfig(), "no idea")):
        with pytest.raises(RuntimeError, match=prompt):
            rows(stage, [{"prompt": "p"}, {"prompt": prompt}])


def test_errors_stop_the_stage_when_not_asked() -> None:
    with pytest.raises(GenerationError, match="non-finite"):
        rows(ProcessorConfig(), BAD[:2])


def test_source_pictures_are_columns() -> None:
    files = [io.BytesIO() for _ in range(2)]
    Image.new("RGB", (64, 64), "red").save(files[0], "PNG")
    Image.new("L", (64, 64), 255).save(files[1], "PNG")
    data, white = (file.getvalue() for file in files)
    given = [
        {"prompt": "p", "seed": 1, "init_image": data, "mask": None},
        {"prompt": "p", "seed": 1, "init_image": data, "mask": white},
        {"prompt": "p", "seed": 1, "init_image": None, "mask": None},
        {"prompt": "p", "seed": 1, "init_image": b"no picture", "mask": None},
    ]
    defaults = {"width": 64, "height": 64, "strength": 0.5}
    config = ProcessorConfig(defaults=defaults, should_continue_on_error=True)
    varied, masked, wrong, broken = rows(config, given)
    assert varied["init_image"] == data, "carried along"
    assert (varied[ERROR], masked[ERROR]) == ("", "")
    assert varied["sha256"] != masked["sha256"]
    assert "init_image" in broken[ERROR] and "cannot be read" in broken[ERROR]  # noqa: PT018
    assert "strength" in wrong[ERROR]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_as_a_stage_of_a_ray_dataset() -> None:
    import ray.data

    processor = build_processor(
        ProcessorConfig(should_continue_on_error=True, batch_size=2),
        preprocess=lambda row: {"prompt": row["text"]},
        postprocess=lambda row: {"number": row["number"], "bytes": row["image"]["bytes"]},
        models=FakeModels(),
    )
    texts = ["p", "q", "POISON", "r", "s"]
    errors = ["", "", "", "", "an earlier stage failed"]
    items = [{"text": text, "number": i, ERROR: errors[i]} for i, text in enumerate(texts)]
    made = {row["number"]: row for row in processor(ray.data.from_items(items)).take_all()}
    assert sorted(made) == [0, 1, 2, 3, 4], "columns that the first function does not name are still there"
    assert [bool(made[i].get("bytes")) for i in range(5)] == [True, True, False, True, False]
    assert [made[i][ERROR] for i in (0, 1, 3, 4)] == ["", "", "", "an earlier stage failed"]
    assert "non-finite" in made[2][ERROR]
