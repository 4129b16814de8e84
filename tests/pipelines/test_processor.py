"""The bare stage: what a row brings, what comes back, and what becomes of a bad one."""

from __future__ import annotations

import asyncio
import hashlib
import io
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from diffray.model.errors import GenerationError
from diffray.model.judges.checks import measure
from diffray.model.request import ImageRequest
from diffray.pipelines import Checks, ProcessorConfig, build_processor
from diffray.pipelines.making.scores import Examiner
from diffray.pipelines.processor import ERROR, Generator

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


BAD = [{"prompt": "p", "steps": 2}, {"prompt": "POISON", "steps": 2}, {"prompt": "q", "steps": -1}]


def test_errors_are_a_column_when_asked() -> None:
    good, poison, wrong = rows(ProcessorConfig(should_continue_on_error=True), BAD)
    assert (good[ERROR], good["image"] is None) == ("", False)
    for row, said, prompt in ((poison, "non-finite", "POISON"), (wrong, "steps", "q")):
        assert said in row[ERROR]
        assert (row["image"], row["prompt"]) == (None, prompt)


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
        preprocess=lambda row: {"prompt": row["text"], "number": row["number"]},
        postprocess=lambda row: {"number": row["number"], "bytes": row["image"]["bytes"], ERROR: ""},
        models=FakeModels(),
    )
    texts = ["p", "q", "POISON", "r"]
    dataset = ray.data.from_items([{"text": text, "number": i} for i, text in enumerate(texts)])
    made = {row["number"]: row for row in processor(dataset).take_all()}
    assert sorted(made) == [0, 1, 2, 3]
    assert [bool(made[i].get("bytes")) for i in range(4)] == [True, True, False, True]
    assert "non-finite" in made[2][ERROR]
