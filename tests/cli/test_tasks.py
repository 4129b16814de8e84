"""Task commands: flags set the keys of a job file; a dry run writes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel, TypeAdapter

from diffray.cli import batch
from diffray.cli.command import STORAGE, job_values
from diffray.cli.options import OPTIONS
from diffray.pipelines import JobConfig, ModelOptions, Workers

from .conftest import diffray


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
    change = ["--job", "task=generate", "--job", "shards.images=2", "--job", "columns={prompt: caption}"]
    assert diffray("run", job, *change, "--dry-run")[1].splitlines()[:2] == [
        "task      generate",
        "rows      3",
    ]
    assert diffray("plan", job, *change)[1].splitlines()[3] == "shards    2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "job.yaml"]


def test_a_plan_says_which_columns_are_read_for_which_fields(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("id,caption,width,height,n,steps\na,x,64,64,,3\nb,y,64,48,2,3\n")
    plan = ["generate", table, tmp_path / "out", "--column", "prompt=caption", "--dry-run"]
    plan += ["--sweep", "steps=3,4"]
    lines = diffray(*plan)[1].splitlines()
    assert "read      prompt (caption), width, height, id, n" in lines
    assert not [line for line in lines if line.startswith("carried")]
    code, text, _ = diffray(*plan, "--column", "width=", "--column", "height=")
    assert code == 0
    assert "read      prompt (caption), id, n" in text.splitlines()
    assert "carried   input_width, input_height" in text.splitlines()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("workers.actor=2", "workers.actor"),
        ("task.name=x", "task.name: task is no mapping in this file"),
        ("workers=[", "no YAML"),
    ],
)
def test_a_key_in_place_of_the_files_is_checked_like_it(tmp_path: Path, change: str, message: str) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("{task: generate, input: in.csv, output: out}")
    code, _, error = diffray("run", job, "--job", change)
    assert code == 2
    assert message in error


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
        ["--dry-run", "--rate", 0],
        ["--dry-run", "--rate", -3],
    ],
)
def test_wrong_flags_exit_2(table: Path, tmp_path: Path, wrong: list[Any]) -> None:
    code, _, error = diffray("augment", table, tmp_path / "out", "--column", "prompt=caption", *wrong)
    assert code == 2, error
    assert "Traceback" not in error


def leaves(model: type[BaseModel] = JobConfig, prefix: str = "") -> Iterator[str]:
    """Every key of a job file that has no keys of its own with names that diffray gives."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


ELSEWHERE = {"task": "the command", "input": "INPUT", "output": "OUTPUT"}
OTHER = {
    "model.source": "m",
    "model.device": "cpu",
    "model.dtype": "float16",
    "model.batch_size": 3,
    "model.adapters": {"ink": "a.safetensors"},
    "model.options": {"variant": "lightning", "steps": 4},
    "models": {"a": {"source": "x", "batch_size": 2}},
    "columns": {"prompt": "caption"},
    "templates": {"prompt": "a {label}"},
    "sweep": {"steps": [3, 4]},
    "defaults": {"steps": 3},
    "images_per_prompt": 2,
    "seed": 9,
    "limit": 5,
    "max_rejected": 0.25,
    "pictures.root": "pics",
    "pictures.background": "#aabbcc",
    "pictures.max_side": 64,
    "pictures.fit": "crop",
    "pictures.max_pixels": 5000,
    "pictures.max_bytes": 6000,
    "encoding.format": "webp",
    "encoding.quality": 7,
    "encoding.layout": "files",
    "encoding.metadata": "jsonl",
    "encoding.latents": "float32",
    "shards.images": 8,
    "shards.work": 1e5,
    "workers.actors": {"min": 2, "max": 4},
    "workers.cpus": 2.0,
    "workers.gpus": 0.25,
    "workers.accelerator": "L4",
    "workers.labels": {"ray.io/zone": "in(a,b)"},
    "workers.start_timeout": 5.0,
    "workers.shards_in_flight": 2,
    "workers.crashes": 5,
    "workers.patience": 6.0,
    "workers.text_encoders": 1,
    "workers.text_share": 0.5,
    "workers.price_per_hour": 1.5,
    "workers.address": "auto",
    "storage": {"s3": {"anon": True}},
    "checks.block": ("fox",),
    "checks.blank": "keep",
    "checks.blank_tolerance": 3,
    "checks.measures": True,
    "checks.near_duplicates": 4,
    "checks.clip": "c",
    "checks.safety": "s",
    "checks.flagged": "reject",
    "checks.scorers": ({"call": "a.b:c", "columns": {"x": "float"}, "options": {}, "on_error": "null"},),
    "checks.limits": {"contrast": (0.1, None)},
    "contact_sheet": 5,
    "gallery": 6,
    "license": "mit",
}
"""Every leaf of a job with a value that is not its default."""
BESIDE = {"checks.limits": ["--measures"], "checks.flagged": ["--safety", "s"]}
"""What a value needs to be allowed."""


def test_the_leaves_are_all_of_a_jobs_keys() -> None:
    assert [leaf for leaf in leaves() if leaf not in ELSEWHERE] == list(OTHER)


@pytest.mark.parametrize("leaf", OTHER)
def test_every_key_of_a_job_can_be_set_on_the_command_line(leaf: str, started: list[JobConfig]) -> None:
    flags = ["--job", f"{leaf}={json.dumps(OTHER[leaf])}", *BESIDE.get(leaf, [])]
    code, _, error = diffray("generate", "in", "out", *flags)
    assert code == 0, error
    value: Any = started[0]
    for name in leaf.split("."):
        value = getattr(value, name)
    plain = TypeAdapter(Any).dump_python(value)
    known = plain["a"] if leaf == "models" else plain
    wanted = OTHER[leaf]["a"] if leaf == "models" else OTHER[leaf]
    assert (wanted.items() <= known.items()) if leaf == "models" else known == wanted


def test_flags_of_workers_and_several_inputs(started: list[JobConfig]) -> None:
    flags = ["--gpus", 0.25, "--cpus", 2, "--accelerator", "H100", "--label", "ray.io/zone=in(a,b)"]
    flags += ["--job", "workers={crashes: 5, labels: {disk: ssd}}", "--models", "a=x", "--models", "b=y"]
    assert diffray("generate", "one", "two", "out", *flags, "--job", "models.b.batch_size=2")[0] == 0
    workers = {"gpus": 0.25, "cpus": 2, "accelerator": "H100", "crashes": 5}
    assert started == [
        JobConfig(
            input=["one", "two"],
            output="out",
            workers=Workers(**workers, labels={"ray.io/zone": "in(a,b)", "disk": "ssd"}),
            models={"a": ModelOptions(source="x"), "b": ModelOptions(source="y", batch_size=2)},
        )
    ]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--job", "workers.crash=5"], "workers.crash: Extra inputs are not permitted; allowed are actors, cpus,"),
        (["--job", "worker.crashes=5"], "worker: Extra inputs are not permitted; allowed are task, input, output,"),
        (["--job", "models.a.sauce=x"], "models.a.sauce: Extra inputs are not permitted; allowed are source, device,"),
        (["--job", "workers.actors={max: 3, mix: 1}"], "allowed are min, max"),
        (["--job", "sweep.steps={from: 1, to: 3, step: 1, by: 2}"], "allowed are from, to, step"),
        (["--job", "checks.scorers=[{cal: x}]"], "scorers.0.cal: Extra inputs are not permitted; allowed are call,"),
        (["--job", "workers.crashes=99"], "workers.crashes: Input should be less than or equal to 20, got 99"),
        (
            ["--actors", "x"],
            "valid: workers.actors: allowed is a number of engines, or a range such as 2-16, got 'x'",
        ),
        (["--actors", "5-2"], "valid: workers.actors: min 5 is above max 2, got '5-2'"),
        (["--actors", 0], "valid: workers.actors: Input should be greater than or equal to 1, got '0'"),
        (["--job", "workers.actors={max: 3, mix: 1}"], "valid: workers.actors.mix: Extra inputs are not permitted;"),
        (["--job", "sweep.steps={from: 1, to: 3}"], "valid: sweep.steps.step: Field required"),
        (["--job", "sweep.steps=5"], "valid: sweep.steps: Input should be a valid list or a valid dictionary, got 5"),
        (["--models", "a=x", "--models", "b=x"], "valid: models: a and b have the same options"),
        (
            ["--job", "checks.limits.brightness=[0.5,null]"],
            "valid: checks: limits: brightness needs measures: true",
        ),
        (["--job", "workers.crashes=5", "--job", "workers.crashes=6"], "each name once"),
        (["--job", "workers.gpus=1", "--gpus", 1], "--job: workers.gpus is given twice"),
        (["--job", "seed.x=1", "--seed", 1], "--job: seed is given already"),
        (["--job", "workers.crashes=["], "--job workers.crashes: no YAML"),
        (["--job", "input=x"], "--job: input is given twice"),
    ],
)  # fmt: skip
def test_a_wrong_key_is_refused_with_what_is_allowed(
    started: list[JobConfig], wrong: list[Any], said: str
) -> None:
    code, _, error = diffray("generate", "in", "out", *wrong)
    assert (code, started) == (2, [])
    assert said in " ".join(error.replace("│", " ").split())


def test_every_option_leads_to_a_key_of_the_job() -> None:
    for one in OPTIONS:
        assert any(f"{one.key}.".startswith(f"{leaf}.") for leaf in leaves()), one.name
    with pytest.raises(typer.BadParameter):
        job_values({**dict.fromkeys(STORAGE), "set": ["steps=1"], "steps": 2})
