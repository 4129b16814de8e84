"""The JSON schema of job files agrees with what jobs accept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from diffray.pipelines import InvalidJob, JobConfig, job_schema

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "serve.yaml")  # no job


@pytest.fixture(scope="module")
def checker() -> Any:
    schema = job_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_valid_for_the_schema_and_for_jobs(checker: Any, path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    assert [error.message for error in checker.iter_errors(values)] == []
    JobConfig.checked(values)


@pytest.mark.parametrize(
    "wrong",
    [
        {"inputs": "a"},
        {"task": "paint"},
        {"defaults": {"stepps": 3}},
        {"columns": {"promt": "caption"}},
        {"templates": {"steps": "x"}},
        {"sweep": {"steps": {"from": 1, "to": 3}}},
        {"pictures": {"fit": "squeeze"}},
        {"images_per_prompt": 0},
        {"workers": {"actors": "many"}},
        {"models": {"a": {"sauce": "embedded"}}},
    ],
)
def test_the_schema_sees_mistakes(checker: Any, wrong: dict[str, Any]) -> None:
    assert not checker.is_valid({"input": "a", "output": "b", **wrong})


def test_everything_is_described() -> None:
    schema = job_schema()
    for place, part in [("job", schema), *schema["$defs"].items()]:
        for name, field in part.get("properties", {}).items():
            assert "description" in field or "$ref" in field, f"{place}.{name}"


def test_what_the_schema_accepts_jobs_accept(checker: Any) -> None:
    values = {
        "task": "augment",
        "input": ["a", "b"],
        "output": "c",
        "sweep": {"strength": {"from": 0.1, "to": 0.5, "step": 0.2}, "weather": ["rain"]},
        "workers": {"actors": "2-16"},
        "columns": {"prompt": "caption", "width": None},
        "models": {"a": {"source": "x"}, "b": {"source": "y"}},
    }
    assert checker.is_valid(values)
    assert JobConfig.checked(values).sweep["strength"].values() == [0.1, 0.3, 0.5]  # type: ignore[union-attr]
    with pytest.raises(InvalidJob, match="model or models"):
        JobConfig.checked({**values, "model": {"source": "z"}})


@pytest.mark.parametrize("checks", [{"measures": True}, {"near_duplicates": 0}, {"clip": "x"}])
def test_latents_are_no_pictures_to_look_at(checks: dict[str, Any]) -> None:
    values = {"task": "encode", "input": "a", "output": "b", "checks": {"block": ["x"], **checks}}
    with pytest.raises(
        InvalidJob, match=f"task encode makes no pictures .*leave checks.{next(iter(checks))} out"
    ):
        JobConfig.checked(values)
    assert JobConfig.checked({**values, "task": "augment"}).checks.block == ("x",)
    assert JobConfig.checked({**values, "checks": {"block": ["x"]}}).task == "encode"
