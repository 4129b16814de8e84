"""Guards, measures and scorers, from the job's config to columns and rejected rows."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffray.model.errors import JobConflict
from diffray.model.judges.checks import measure
from diffray.model.request import ImageRequest
from diffray.pipelines import InvalidJob, JobConfig
from diffray.pipelines.checks import MEASURES, NETWORKS
from diffray.pipelines.scores import Examiner, columns

from .conftest import Place, restarting

SCORERS = """
import threading
import numpy as np

def red(image, request, scale=1.0):
    return {"redness": np.float32(np.asarray(image)[..., 0].mean() * scale), "long": len(request.prompt) > 5}

def odd(image, request):
    if "fail" in request.prompt:
        raise RuntimeError("no idea")
    if "dead" in request.prompt:
        raise RuntimeError("CUDA error: device-side assert triggered")
    if "wrong" in request.prompt:
        return {"oddness": "text"}
    if "nan" in request.prompt:
        return {"oddness": float("nan")}
    if "vandal" in request.prompt:
        image.paste((0, 0, 0), (0, 0, *image.size))
    return {"oddness": 1.5}

class Counter:
    def __init__(self, start):
        self.start, self.lock = start, threading.Lock()
    def __call__(self, image, request):
        assert self.lock.acquire(blocking=False)  # never asked twice at once
        self.lock.release()
        return {"size": self.start + image.width, "name": request.sampler}
"""


@pytest.fixture(autouse=True)
def scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own_scorers.py").write_text(SCORERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("own_scorers", None)


def scorer(name: str, columns: dict[str, str], **more: Any) -> dict[str, Any]:
    return {"call": f"own_scorers:{name}", "columns": columns, **more}


def test_blocked_prompts_never_reach_the_engine(place: Place) -> None:
    table = place.write(
        "id,prompt,negative_prompt,seed\na,a Red  Fox,,1\nb,red foxes,,2\nc,cat,a red fox,3\n"
    )
    result = place.job(table, checks={"block": ["red fox"]})
    assert (result.images, result.rejected) == (2, 1)
    [row] = place.rows(folder="rejected")
    assert (row["id"], row["stage"], row["field"], row["attempts"]) == ("a-0", "guard", "prompt", 0)
    assert "'red fox'" in row["reason"]
    assert sorted(place.begun()) == [2, 3]


def test_a_block_list_may_be_a_file_whose_terms_are_part_of_the_job(place: Place) -> None:
    table, terms = place.write("prompt\nx\n"), place.path / "terms.txt"
    terms.write_text("# mine\nfox\n")
    place.job(table, checks={"block": str(terms)})
    place.job(table, checks={"block": ["fox"]})  # the same terms, whatever the file
    terms.write_text("fox\ncat\n")
    with pytest.raises(JobConflict, match=r"checks\.block"):
        place.job(table, checks={"block": str(terms)})


def test_a_blank_picture_is_rejected_unless_it_is_asked_for(place: Place) -> None:
    table = place.write("prompt\nBLANK\nx\n")
    assert place.job(table).rejected == 1
    [row] = place.rows(folder="rejected")
    assert (row["stage"], row["field"]) == ("check", "blank")
    assert "#010203" in row["reason"]
    kept = place.job(table, "kept", checks={"blank": "keep", "measures": True})
    assert kept.rejected == 0
    assert [row["blank"] for row in place.rows("kept")] == [True, False]


def test_a_picture_that_is_not_finite_is_rejected_with_the_reason(place: Place) -> None:
    place.job(place.write("prompt\nPOISON\nx\n"))
    [row] = place.rows(folder="rejected")
    assert (row["stage"], row["reason"]) == ("generate", "denoised latents: got non-finite values")


def test_measures_are_columns(place: Place) -> None:
    place.job(place.write("prompt,contrast\nx,user\ny,own\n"), checks={"measures": True})
    for row in place.rows():
        figures = measure(Image.open(io.BytesIO(row["image"]["bytes"])))
        assert (row["blank"], row["brightness"], row["score_contrast"], row["sharpness"], row["phash"]) == (
            figures.blank,
            figures.brightness,
            figures.contrast,
            figures.sharpness,
            figures.phash,
        )
    assert [row["contrast"] for row in place.rows()] == ["user", "own"]


def test_without_checks_there_are_no_score_columns(place: Place) -> None:
    place.job(place.write("prompt\nx\n"))
    [row] = place.rows()
    assert not {*MEASURES, *NETWORKS} & row.keys()


def test_limits_reject_what_is_outside(place: Place) -> None:
    table = place.write("prompt,n\nx,8\n")
    place.job(table, "all", checks={"measures": True})
    values = sorted(row["brightness"] for row in place.rows("all"))
    result = place.job(table, checks={"measures": True, "limits": {"brightness": [values[2], values[5]]}})
    assert (result.images, result.rejected) == (4, 4)
    assert [row["brightness"] for row in place.rows()] == [
        row["brightness"] for row in place.rows("all") if values[2] <= row["brightness"] <= values[5]
    ]
    assert {(row["stage"], row["field"]) for row in place.rows(folder="rejected")} == {
        ("check", "brightness")
    }


def test_scorers_of_ones_own(place: Place) -> None:
    checks = {
        "scorers": [
            scorer("red", {"redness": "float", "long": "bool"}, options={"scale": 2}),
            scorer("Counter", {"size": "int", "name": "text"}, options={"start": 100}),
        ]
    }
    place.job(place.write("prompt\nshort\nquite long\n"), checks=checks)
    for row in place.rows():
        pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
        assert row["redness"] == pytest.approx(2 * pixels[..., 0].mean(), rel=1e-5)
        assert (row["size"], row["name"]) == (116, "euler")
    assert [row["long"] for row in place.rows()] == [False, True]
    types = pq.read_schema(place.path / "out/data/part-00000.parquet")
    assert [str(types.field(n).type) for n in ("redness", "long", "size", "name")] == [
        "double",
        "bool",
        "int64",
        "string",
    ]


@pytest.mark.parametrize("on_error", ["null", "reject"])
def test_a_scorer_that_fails_costs_at_most_its_row(place: Place, on_error: str) -> None:
    table = place.write("id,prompt\na,fine\nb,fail\nc,wrong\nd,nan\ne,vandal\n")
    checks = {"scorers": [scorer("odd", {"oddness": "float"}, on_error=on_error)]}
    place.job(table, checks=checks)
    place.job(table, "plain")
    found = {row["row_id"]: row["oddness"] for row in place.rows()}
    if on_error == "null":
        assert found == {"a": 1.5, "b": None, "c": None, "d": None, "e": 1.5}
    else:
        assert found == {"a": 1.5, "d": None, "e": 1.5}
        reasons = {row["row_id"]: row["reason"] for row in place.rows(folder="rejected")}
        assert "RuntimeError: no idea" in reasons["b"]
        assert "oddness: got str, declared is float" in reasons["c"]
    same = {row["row_id"]: row["sha256"] for row in place.rows("plain")}
    assert all(row["sha256"] == same[row["row_id"]] for row in place.rows())  # not even the vandal's


def test_a_changed_scorer_is_another_job(place: Place) -> None:
    table, checks = place.write("prompt\nx\n"), {"scorers": [scorer("odd", {"oddness": "float"})]}
    place.job(table, checks=checks)
    place.job(table, checks=checks)
    path = place.path / "own_scorers.py"
    path.write_text(SCORERS.replace("1.5", "2.5") + "\n# longer\n")
    sys.modules.pop("own_scorers")
    with pytest.raises(JobConflict, match="own_scorers:odd"):
        place.job(table, checks=checks)


@pytest.mark.parametrize(
    ("call", "message"),
    [("no_such_module:f", "ModuleNotFoundError"), ("own_scorers:missing", "missing")],
)
def test_a_scorer_that_cannot_be_imported_stops_the_job_before_it_begins(
    place: Place, call: str, message: str
) -> None:
    checks = {"scorers": [{"call": call, "columns": {"x": "int"}}]}
    with pytest.raises(InvalidJob, match=message):
        place.job(place.write("prompt\nx\n"), checks=checks)
    assert place.begun() == []


@pytest.mark.parametrize(
    ("checks", "message"),
    [
        ({"limits": {"sharpness": [1, 2]}}, "limits: sharpness needs measures: true"),
        ({"limits": {"clip_score": [1, 2]}, "measures": True}, "limits: clip_score needs clip"),
        ({"limits": {"phash": [1, 2]}, "measures": True}, "no number columns phash"),
        ({"flagged": "reject"}, "needs safety"),
        ({"block": ["..."]}, "letter or digit"),
        ({"block": "/no/such/file"}, "cannot be read"),
        ({"scorers": [{"call": "a:b", "columns": {"seed": "int"}}]}, "seed are there already"),
        ({"scorers": [{"call": "a:b", "columns": {"phash": "int"}}]}, "phash are there already"),
        ({"scorers": [{"call": "a:b", "columns": {"x": "int"}}] * 2}, "x are there already"),
        ({"scorers": [{"call": "a.b", "columns": {"x": "int"}}]}, "pattern"),
        ({"scorers": [{"call": "a:b", "columns": {"x": "image"}}]}, "float"),
    ],
)
def test_what_makes_no_sense_is_refused(checks: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidJob, match=message):
        JobConfig.checked({"input": "a", "output": "b", "checks": checks})


def test_safety_checker_and_clip_score(place: Place, tmp_path_factory: pytest.TempPathFactory) -> None:
    from tests.model.clip_models import save_clip, save_safety_checker

    clip, strict, lax = (tmp_path_factory.mktemp(name) for name in ("clip", "strict", "lax"))
    save_clip(clip)
    save_safety_checker(strict, threshold=-1.0)
    save_safety_checker(lax, threshold=1.0)
    table = place.write("prompt\na red circle\n")
    place.job(table, checks={"clip": str(clip), "safety": str(strict)})
    [row] = place.rows()
    assert row["nsfw"] is True
    assert row["nsfw_score"] > 0
    assert 0 <= row["clip_score"] <= 100
    assert Image.open(io.BytesIO(row["image"]["bytes"])).getextrema() != ((0, 0),) * 3  # nothing is blackened
    assert place.job(table, "no", checks={"safety": str(strict), "flagged": "reject"}).rejected == 1
    assert place.job(table, "yes", checks={"safety": str(lax), "flagged": "reject"}).images == 1
    save_safety_checker(lax, threshold=0.9)
    with pytest.raises(JobConflict, match=str(lax)):
        place.job(table, "yes", checks={"safety": str(lax), "flagged": "reject"})


@pytest.fixture
def judge(place: Place, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Checks by a CLIP model that fails as the prompt says, and as often."""
    from diffray.model.judges.alignment import ClipScore
    from tests.model.clip_models import save_clip

    failures: Counter[str] = Counter()

    def scored(self: object, image: Image.Image, prompt: str) -> float:
        failures[prompt] += 1
        if prompt == "odd":
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        if prompt == "full" or (prompt == "crowded" and failures[prompt] == 1):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if prompt == "dead":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return 25.0

    save_clip(place.path / "clip")
    monkeypatch.setattr(ClipScore, "forward", scored)
    return {"clip": str(place.path / "clip")}


def test_a_judge_that_fails_costs_its_row(place: Place, judge: dict[str, Any]) -> None:
    result = place.job(place.write("id,prompt\na,odd\nb,full\nc,crowded\nd,fine\n"), checks=judge)
    assert (result.images, result.rejected) == (2, 2)
    assert {row["row_id"]: row["clip_score"] for row in place.rows()} == {"c": 25.0, "d": 25.0}
    found = {row["row_id"]: (row["stage"], row["reason"]) for row in place.rows(folder="rejected")}
    start = "diffray.model.judges.alignment:ClipScore failed: "
    assert found["a"] == ("check", f"{start}RuntimeError: mat1 and mat2 shapes cannot be multiplied")
    assert found["b"][1].startswith(f"{start}OutOfMemoryError: CUDA out of memory")


def test_a_judge_that_loses_the_device_costs_the_worker_then_its_row(
    place: Place, judge: dict[str, Any]
) -> None:
    config = place.config(place.write("id,prompt\na,fine\nb,dead\nc,fine\n"), checks=judge)
    result = place.run(config, generate=restarting)
    assert (result.images, result.rejected) == (2, 1)
    [row] = place.rows(folder="rejected")
    assert (row["row_id"], row["attempts"]) == ("b", 3)
    assert "CUDA error: an illegal memory access" in row["reason"]


@pytest.mark.parametrize("on_error", ["null", "reject"])
def test_a_lost_device_is_no_answer_of_ones_own_scorer_either(on_error: str) -> None:
    """An empty column, or a rejection, would blame a picture for what came before it."""
    checks = {"scorers": [scorer("odd", {"oddness": "float"}, on_error=on_error)]}
    examiner = Examiner(JobConfig.checked({"input": "a", "output": "b", "checks": checks}).checks)
    picture = Image.effect_noise((8, 8), 9).convert("RGB")
    with pytest.raises(RuntimeError, match="CUDA error"):
        examiner.examine(picture, ImageRequest(prompt="dead"))


def test_near_duplicates_of_the_whole_dataset(place: Place) -> None:
    table = place.write("id,prompt,seed\na,x,1\nb,x,2\nc,x,1\nd,x,3\ne,x,1\n")
    place.job(table, checks={"near_duplicates": 2})
    found = pq.read_table(place.path / "out/duplicates.parquet").to_pylist()
    originals = {"c-0": "a-0", "e-0": "a-0"}
    assert found == [
        {"id": id, "duplicate_of": originals.get(id), "distance": 0 if id in originals else None}
        for id in (row["id"] for row in place.rows())
    ]
    assert json.loads((place.path / "out/report.json").read_text())["near_duplicates"] == 2
    assert all("phash" in row and "brightness" not in row for row in place.rows())


def test_column_types_are_known_before_any_picture() -> None:
    config = JobConfig.checked(
        {
            "input": "a",
            "output": "b",
            "checks": {"measures": True, "scorers": [scorer("odd", {"o": "float"})]},
        }
    )
    assert list(columns(config.checks)) == ["blank", "brightness", "contrast", "sharpness", "phash", "o"]
