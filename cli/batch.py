"""Commands for batch jobs: generate, run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .fields import (
    Device,
    Dtype,
    Guidance,
    Height,
    Model,
    Negative,
    Sampler,
    Schedule,
    Set,
    Steps,
    Width,
    request_fields,
)
from .outcome import reported
from .storage import Anonymous, Endpoint, Profile, Storage, storage_from

if TYPE_CHECKING:
    from diffray.pipelines import JobConfig

TakeOver = Annotated[
    bool, typer.Option("--take-over", help="Go on although the last owner may still be alive.")
]


def generate(
    context: typer.Context,
    input: Annotated[
        str, typer.Argument(help="CSV, TSV, JSONL, Parquet or text; a file, folder, glob or URL.")
    ],
    output: Annotated[str, typer.Argument(help="Folder or URL of the dataset; a second run resumes it.")],
    model: Model = "embedded",
    images_per_prompt: Annotated[int, typer.Option("--images-per-prompt", "-n")] = 1,
    seed: Annotated[int, typer.Option(help="Mixed with each image's id where its row gives no seed.")] = 0,
    steps: Steps = None,
    width: Width = None,
    height: Height = None,
    guidance_scale: Guidance = None,
    sampler: Sampler = None,
    schedule: Schedule = None,
    negative_prompt: Negative = None,
    set: Set = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Annotated[int | None, typer.Option(help="Images denoised together.")] = None,
    actors: Annotated[int | None, typer.Option(help="At most this many engines.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to connect to.")] = None,
    shard_images: Annotated[int, typer.Option(help="Images per shard, at most.")] = 100,
    format: Annotated[str, typer.Option(help="png, jpeg or webp.")] = "png",
    quality: Annotated[int, typer.Option(help="Of jpeg and webp, 1..100.")] = 92,
    images: Annotated[
        str, typer.Option(help="Where images go: parquet, or files beside a table.")
    ] = "parquet",
    take_over: TakeOver = False,
    endpoint: Endpoint = None,
    profile: Profile = None,
    anonymous: Anonymous = False,
    storage: Storage = None,
) -> None:
    """Make one image per row of INPUT (or several) and write the dataset to OUTPUT."""
    with reported(context):
        from diffray.pipelines import JobConfig

        fields = request_fields(
            steps=steps,
            width=width,
            height=height,
            guidance_scale=guidance_scale,
            sampler=sampler,
            schedule=schedule,
            negative_prompt=negative_prompt,
            set=set,
        )
        values: dict[str, Any] = {
            "input": input,
            "output": output,
            "model": {"source": model, "device": device, "dtype": dtype, "batch_size": batch_size},
            "defaults": fields,
            "images_per_prompt": images_per_prompt,
            "seed": seed,
            "encoding": {"format": format, "quality": quality, "layout": images},
            "shards": {"images": shard_images},
            "workers": {"actors": actors, "address": address},
            "storage": storage_from(storage, endpoint, profile, anonymous),
        }
        _run(JobConfig.checked(values), take_over)


def run(
    context: typer.Context,
    job: Annotated[str, typer.Argument(help="YAML file with the keys of a job.")],
    take_over: TakeOver = False,
) -> None:
    """Run the job that a YAML file describes."""
    with reported(context):
        from diffray.pipelines import JobConfig

        _run(JobConfig.from_yaml(job), take_over)


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
