"""Measurements that users run on their own machine and model: bench serve."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from .fields import Device, Dtype, Model
from .outcome import reported

app = typer.Typer(help="Measure on this machine.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def bench() -> None:
    """Measure on this machine."""


@app.command()
def serve(
    context: typer.Context,
    model: Model = "embedded",
    url: Annotated[
        str | None,
        typer.Option(help="A running service, measured as it is; without it three ways are compared."),
    ] = None,
    key: Annotated[
        str | None, typer.Option(envvar="DIFFRAY_API_KEY", help="With --url: its API key.", show_envvar=True)
    ] = None,
    name: Annotated[str | None, typer.Option(help="With --url: the model to ask for.")] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Mix of sizes, such as 512x512,512x768; the model's own if not given.")
    ] = None,
    steps: Annotated[str, typer.Option(help="Mix of sampler steps.")] = "10,20,40",
    shares: Annotated[str, typer.Option(help="Offered loads, as shares of the capacity.")] = "0.5,0.8,0.95",
    seconds: Annotated[float, typer.Option(min=1, help="How long each load lasts.")] = 30.0,
    deadline: Annotated[
        float | None,
        typer.Option(help="Seconds within which an answer is good; 5 idle latencies if not given."),
    ] = None,
    capacity: Annotated[float | None, typer.Option(help="Images per second; measured if not given.")] = None,
    outstanding: Annotated[
        int, typer.Option(min=1, help="Unanswered requests at once, while the capacity is measured.")
    ] = 32,
    turns: Annotated[
        int, typer.Option(min=1, help="How often everything is measured, each time in reversed order.")
    ] = 2,
    seed: Annotated[int, typer.Option(help="The same seed sends the same requests at the same times.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images denoised together.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="File for every figure and request.")] = None,
) -> None:
    """Load a service with random arrivals. Latencies, goodput and how full the batch is are reported.

    Without --url it serves MODEL in three ways, one after the other, under the same load: one request at a time,
    request-level batching (a batch runs to its end before the next begins) and step-level batching.
    """
    with reported(context):
        import asyncio

        from diffray.serve.bench import HEAD, compare, measure_service, table
        from diffray.serve.config import ModelEntry
        from diffray.serve.load import Plan

        plan = Plan(
            sizes=tuple(_size(text) for text in sizes.split(",")) if sizes else (),
            steps=tuple(_number("--steps", text, int) for text in steps.split(",")),
            shares=tuple(_number("--shares", text, float) for text in shares.split(",")),
            seconds=seconds,
            deadline=deadline,
            capacity=capacity,
            outstanding=outstanding,
            model=name,
            seed=seed,
        )
        if url is not None:
            outcome = asyncio.run(measure_service(url, plan, key, _note))
        else:
            entry = ModelEntry(source=model, device=device, dtype=dtype, batch_size=batch_size)
            outcome = asyncio.run(compare(entry, plan, turns=turns, say=_note))
        if output is not None:
            output.write_text(json.dumps(outcome.raw(), indent=1) + "\n")
        typer.echo(
            f"capacity {outcome.capacity:.3f} images/s, idle latency {outcome.alone:.3f} s, "
            f"goodput within {outcome.deadline:.3f} s"
        )
        _print([HEAD, *table(outcome.rows())])


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"\s*(\d+)x(\d+)\s*", text)
    if found is None:
        raise typer.BadParameter(f"--sizes {text}: expected WIDTHxHEIGHT")
    return int(found[1]), int(found[2])


def _number(option: str, text: str, kind: type[Any]) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < 1e6:
        raise typer.BadParameter(f"{option} {text}: expected numbers above 0, separated by commas")
    return value


def _note(text: str) -> None:
    typer.echo(text, err=True)


def _print(lines: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
