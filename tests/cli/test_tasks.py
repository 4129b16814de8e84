"""Task commands: flags set the keys of a job file; a dry run writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from diffray.cli import batch
from diffray.cli.app import app
from diffray.cli.options import OPTIONS, job_values
from diffray.pipelines import JobConfig


def diffray(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "t.csv"
    path.parent.mkdir()
    path.write_text("caption,image,n\na,1.png,\nb,,\nc,3.png,x\n")
    return path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[JobConfig]:
    configs: list[JobConfig] = []
    monkeypatch.setattr(batch, "_run", lambda config, take_over: configs.append(config))
    return configs


def test_flags_say_the_same_as_a_job_file(table: Path, tmp_path: Path, started: list[JobConfig]) -> None:
    flags = ["--column", "prompt=caption", "--template", "negative_prompt=no {caption}", "-n", 2]
    flags += ["--sweep", "strength=0.2:0.6:0.2", "--sweep", "sampler=euler, heun", "--steps", 5]
    flags += ["--set", "eta=0.5", "--pictures", "pics", "--fit", "crop", "--format", "webp", "--quality", 80]
    flags += ["--limit", 9, "--actors", "2-4", "--models", "a=embedded", "--models", "b=x", "--device", "cpu"]
    assert diffray("augment", table, "out", *flags)[0] == 0
    job = tmp_path / "job.yaml"
    job.write_text(
        f"""
task: augment
input: {table}
output: out
columns: {{prompt: caption}}
templates: {{negative_prompt: "no {{caption}}"}}
images_per_prompt: 2
sweep: {{strength: {{from: 0.2, to: 0.6, step: 0.2}}, sampler: [euler, heun]}}
defaults: {{steps: 5, eta: "0.5"}}
pictures: {{root: pics, fit: crop}}
encoding: {{format: webp, quality: 80}}
limit: 9
workers: {{actors: 2-4}}
models: {{a: {{source: embedded, device: cpu}}, b: {{source: x, device: cpu}}}}
"""
    )
    assert diffray("run", job)[0] == 0
    assert started[0] == started[1]


@pytest.mark.parametrize("task", batch.TASKS)
def test_every_task_has_its_command_and_its_own_flags(task: str, started: list[JobConfig]) -> None:
    _, text, _ = diffray(task, "--help")
    own = {"inpaint": "--mask-values", "outpaint": "--left", "upscale": "--scale", "encode": "--latents"}
    for other, flag in own.items():
        assert (flag in text) == (task == other)
    assert diffray(task, "in", "out")[0] == 0
    assert (started[0].task, started[0].input) == (task, "in")


def test_no_flag_means_the_default_of_a_job(started: list[JobConfig]) -> None:
    diffray("generate", "in", "out")
    assert started == [JobConfig(input="in", output="out")]


def test_a_dry_run_and_a_plan_tell_and_write_nothing(table: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"{{task: augment, input: {table}, output: {tmp_path}/out, columns: {{prompt: caption}}}}")
    flags = ["--column", "prompt=caption", "--dry-run", "--rate", 0.5]
    for command in (["augment", table, tmp_path / "out", *flags], ["plan", job, "--rate", 0.5]):
        code, text, error = diffray(*command)
        assert (code, error) == (0, "")
        lines = text.splitlines()
        assert lines[:4] == ["task      augment", "rows      3", "images    1, and 2 rejected", "shards    1"]
        assert "about 2 seconds, at the stated 0.5 images per second" in text
        assert "t.csv:3): init_image: got nothing in column init_image or image or file_name" in text
        assert "t.csv:4): n: got 'x', allowed is an integer" in text
    assert diffray("plan", job, "--limit", 1)[1].splitlines()[1] == "rows      1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "job.yaml"]


def test_a_measured_plan_makes_a_few_images(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,steps\n" + "a red circle,1\n" * 100)
    job = tmp_path / "job.yaml"
    job.write_text(f"{{input: {tmp_path}/p.csv, output: {tmp_path}/out}}")
    code, text, error = diffray("plan", job, "--measure")
    assert (code, error) == (0, "")
    assert "on one engine such as the one here, which made 8 images in" in text
    assert not (tmp_path / "out").exists()


def test_schema_prints_json() -> None:
    code, text, _ = diffray("schema")
    assert (code, json.loads(text)["title"]) == (0, "diffray job")


@pytest.mark.parametrize(
    "wrong",
    [
        ["--column", "prompt"],
        ["--sweep", "=1"],
        ["--set", "steps=3", "--set", "steps=4"],
        ["--set", "steps=3", "--steps", 4],
        ["--sweep", "steps=5:1:1"],
        ["--sweep", "nothing=1,2"],
        ["--column", "nothing=x"],
        ["--fit", "squeeze"],
        ["--limit", 0],
    ],
)
def test_wrong_flags_exit_2(table: Path, tmp_path: Path, wrong: list[Any]) -> None:
    code, _, error = diffray("augment", table, tmp_path / "out", "--column", "prompt=caption", *wrong)
    assert code == 2, error
    assert "Traceback" not in error


def test_every_option_leads_to_a_key_of_the_job() -> None:
    schema = JobConfig.model_json_schema()
    for one in OPTIONS:
        assert one.key.split(".")[0] in schema["properties"], one.name
    with pytest.raises(typer.BadParameter):
        job_values({"set": ["steps=1"], "steps": 2})
