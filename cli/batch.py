"""Commands for batch jobs: one per task, and run, plan and schema for job files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .command import job_command, keys
from .outcome import reported

if TYPE_CHECKING:
    from diffray.pipelines import JobConfig

TakeOver = Annotated[
    bool, typer.Option("--take-over", help="Go on although the last owner may still be alive.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be made; write nothing.")]
Limit = Annotated[int | None, typer.Option(help="Only so many rows, from the first on.")]
Rate = Annotated[
    float | None, typer.Option(min=1e-9, help="Images per second of the whole job, to estimate its time.")
]
Measure = Annotated[
    bool, typer.Option("--measure", help="Load the model and make a few images, to estimate the job's time.")
]

Change = Annotated[
    list[str] | None,
    typer.Option(
        "--job", help="A key to use in place of the file's, as KEY.PATH=YAML: workers.actors=4; repeat it."
    ),
]

TASKS = {
    "generate": "Make images of prompts: one per row of INPUT, or several.",
    "augment": "Make variants of the pictures in INPUT. Their labels are carried along.",
    "inpaint": "Repaint one side of a mask in every picture of INPUT. The other side is kept.",
    "outpaint": "Continue every picture of INPUT beyond its sides.",
    "edit": "Change every picture of INPUT as its prompt says. This takes an instruct-pix2pix model.",
    "upscale": "Make every picture of INPUT larger. A x4 upscaler does it, or any other model by image-to-image.",
    "encode": "Turn every picture of INPUT into latents. They are those of the model's autoencoder, for training sets.",
    "decode": "Turn latents back into pictures.",
}


def task_commands() -> list[Callable[..., None]]:
    """The commands that make datasets from INPUT, OUTPUT and flags."""
    extra = {"dry_run": DryRun, "rate": Rate, "take_over": TakeOver}
    return [job_command(task, help, _start, extra) for task, help in TASKS.items()]


def run(
    context: typer.Context,
    job: Annotated[str, typer.Argument(help="YAML file with the keys of a job.")],
    change: Change = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    rate: Rate = None,
    take_over: TakeOver = False,
) -> None:
    """Run the job that a YAML file describes."""
    with reported(context):
        config = _read(job, change, limit)
        if dry_run:
            _show(config, rate=rate)
        else:
            _run(config, take_over)


def plan(
    context: typer.Context,
    job: Annotated[str, typer.Argument(help="YAML file with the keys of a job.")],
    change: Change = None,
    limit: Limit = None,
    rate: Rate = None,
    measure: Measure = False,
) -> None:
    """Say what a job would make, and how long it would take. Nothing is written, and Ray is not started."""
    with reported(context):
        _show(_read(job, change, limit), rate=rate, measure=measure)


def schema() -> None:
    """Print the JSON schema of job files, for editors."""
    from diffray.pipelines import job_schema

    typer.echo(json.dumps(job_schema(), indent=2))


def _read(job: str, change: list[str] | None, limit: int | None) -> JobConfig:
    from diffray.pipelines import JobConfig

    return JobConfig.from_yaml(job, keys(change) | ({} if limit is None else {"limit": limit}))


def _start(context: typer.Context, values: dict[str, Any], own: Mapping[str, Any]) -> None:
    with reported(context):
        from diffray.pipelines import JobConfig

        config = JobConfig.checked(values)
        if own["dry_run"]:
            _show(config, rate=own["rate"])
        else:
            _run(config, own["take_over"])


def _show(config: JobConfig, *, rate: float | None = None, measure: bool = False) -> None:
    from diffray.pipelines import preview

    found = preview(config, rate=rate, measure=measure)
    for line in found.lines():
        typer.echo(line)
    config.check_rejected(found.rejected, found.images, "a run would stop at this plan")


def _run(config: JobConfig, take_over: bool) -> None:
    from diffray.pipelines import for_this_terminal
    from diffray.pipelines import run as run_job

    result = run_job(config, take_over=take_over, progress=for_this_terminal())
    if not result.made:
        typer.echo(
            f"nothing to do: {result.output} is complete ({result.images} images, {result.rejected} rejected)"
        )
        return
    rejected = f", {result.rejected} rejected (see rejected/)" if result.rejected else ""
    typer.echo(f"{result.images} images{rejected} in {result.output}, {result.seconds:.1f} s")
