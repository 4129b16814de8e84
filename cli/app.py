"""The command line: one thin layer over `diffray.pipelines`, `diffray.serve` and `diffray.model`.

They are imported inside the commands, so that `diffray --help` does not wait for torch and Ray.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from . import batch, bench, serve, single, upkeep

app = typer.Typer(
    name="diffray",
    help="Stable Diffusion as a batch pipeline and a service on Ray: a table of prompts becomes a dataset, and "
    "the same models answer online.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in batch.task_commands():
    app.command()(command)
app.command()(batch.run)
app.command()(batch.plan)
app.command()(batch.schema)
app.command()(upkeep.status)
app.command()(upkeep.verify)
app.command()(upkeep.retry_rejected)
app.command()(upkeep.gc)
app.command()(single.sample)
app.command()(single.inspect)
app.command()(single.convert)
app.command()(serve.serve)
app.add_typer(serve.keys, name="keys")
app.add_typer(bench.app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"diffray {version('diffray')}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool | None,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit."),
    ] = None,
) -> None:
    """Options before the command."""
    context.obj = debug


def main() -> None:
    """Entry point of the console script."""
    sys.exit(app())
