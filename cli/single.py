"""Commands for one model or one picture, without Ray: sample, inspect, convert."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any

import typer

from .fields import (
    Adapter,
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
    adapter_sources,
    request_fields,
)
from .outcome import FAILED, reported


class Layout(StrEnum):
    """The two layouts of a checkpoint."""

    single = "single"
    folder = "folder"


def sample(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    output: Annotated[str, typer.Option("--output", "-o", help="PNG, JPEG or WebP file.")] = "sample.png",
    model: Model = "embedded",
    seed: Annotated[int, typer.Option(help="All noise comes from it.")] = 0,
    steps: Steps = None,
    width: Width = None,
    height: Height = None,
    guidance_scale: Guidance = None,
    sampler: Sampler = None,
    schedule: Schedule = None,
    negative_prompt: Negative = None,
    adapter: Adapter = None,
    set: Set = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Make one picture."""
    with reported(context):
        from diffray.model import Engine, ImageRequest, load_model
        from diffray.model.encoding import format_of
        from diffray.pipelines import request_from
        from diffray.pipelines.models import shown_name

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
        sources, weights = adapter_sources(adapter)
        request: ImageRequest = request_from(
            {"prompt": prompt, "seed": seed, "adapters": list(weights.items()), **fields}
        )
        format_of(output)  # before anything is loaded
        own = load_model(model, device=device, dtype=dtype, adapters=sources)
        Engine(own).generate([request])[0].save(
            output,
            model=shown_name(model),
            model_checksum=own.checksum,
            adapter_checksums=own.adapters.checksums(),
        )
        typer.echo(output)


def inspect(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Checkpoint: path, URL or hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Say what a checkpoint is, from its headers. The exit code is 1 if it would not load."""
    with reported(context):
        from diffray.model import inspect_source

        found = inspect_source(source)
        if as_json:
            typer.echo(json.dumps(found.to_dict(), indent=2))
        else:
            for name, value in _flat(found.to_dict()):
                typer.echo(f"{name:36} {value}")
        if found.problems:
            raise typer.Exit(FAILED)


def convert(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Checkpoint in either layout, or a pickle.")],
    target: Annotated[str, typer.Argument(help="File or folder to write; must not exist.")],
    layout: Annotated[Layout | None, typer.Option(help="The target's; by its name when left out.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take the moving average of the weights.")] = False,
) -> None:
    """Rewrite a checkpoint as safetensors. It may get the other layout, or another type."""
    with reported(context):
        from diffray.model import convert as convert_model

        chosen: Any = layout.value if layout else None
        typer.echo(convert_model(source, target, layout=chosen, dtype=dtype, ema=ema))


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    lines: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += _flat(value, f"{prefix}{name}.")
        else:
            lines.append((f"{prefix}{name}", value))
    return lines
