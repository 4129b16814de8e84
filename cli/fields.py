"""The options that commands for one picture share: the model, and the fields of a request."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Option("--model", "-m", help='"embedded", a path, a URL or a hub id.')]
DEVICE = typer.Option(help="auto, cpu or cuda.")
DTYPE = typer.Option(help="auto, float32, float16 or bfloat16.")
Device = Annotated[str, DEVICE]
Dtype = Annotated[str, DTYPE]
Steps = Annotated[int | None, typer.Option(help="Sampler steps.")]
Width = Annotated[int | None, typer.Option(help="Pixels.")]
Height = Annotated[int | None, typer.Option(help="Pixels.")]
Guidance = Annotated[float | None, typer.Option("--guidance-scale", help="Classifier-free guidance.")]
Sampler = Annotated[str | None, typer.Option(help="Sampler name.")]
Schedule = Annotated[str | None, typer.Option(help="Noise schedule name.")]
Negative = Annotated[str | None, typer.Option("--negative-prompt", help="What to keep out.")]
Adapter = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="LoRA or the like, as [NAME=]SOURCE[:WEIGHT]; repeat it."),
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any other request field, as FIELD=VALUE.")]


def request_fields(*, set: list[str] | None, **named: Any) -> dict[str, Any]:
    """Request fields from named options and from `--set`, without those that were not given."""
    fields = {name: value for name, value in named.items() if value is not None}
    for name, value in pairs("--set", set).items():
        if name in fields:
            raise typer.BadParameter(f"--set {name}: given twice")
        fields[name] = value
    return fields


def adapter_sources(texts: list[str] | None) -> tuple[dict[str, str], dict[str, float]]:
    """Sources and weights by name, from `--adapter [NAME=]SOURCE[:WEIGHT]`.

    Without a name it is that of the file, without its ending; without a weight that is 1.
    """
    sources: dict[str, str] = {}
    weights: dict[str, float] = {}
    for text in texts or []:
        given, equals, source = text.partition("=")
        name = given if equals and not set(given) & set("/:.") else None
        source, weight = source if name is not None else text, 1.0
        head, colon, tail = source.rpartition(":")
        if colon and (number := _number(tail)) is not None:
            source, weight = head, number
        if name is None:
            name = PurePath(source.partition("#")[0].partition("@")[0]).name.removesuffix(".safetensors")
        if name in sources:
            raise typer.BadParameter(f"--adapter {text}: {name} is given twice")
        sources[name], weights[name] = source, weight
    return sources, weights


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def pairs(option: str, texts: list[str] | None) -> dict[str, str]:
    """The values of an option that is repeated as NAME=VALUE."""
    found: dict[str, str] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name or name in found:
            raise typer.BadParameter(f"{option} {text}: expected NAME=VALUE, each name once")
        found[name] = value
    return found
