"""Commands for a dataset that is there: status, verify, retry-rejected, gc."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .batch import TakeOver
from .command import job_values, with_options
from .options import MAX_REJECTED, OPTIONS
from .outcome import FAILED, reported
from .storage import Anonymous, Endpoint, Profile, Storage, storage_from

if TYPE_CHECKING:
    from diffray.pipelines import Store

Output = Annotated[str, typer.Argument(help="Folder or URL of a dataset.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable.")]


def status(
    context: typer.Context,
    output: Output,
    as_json: Json = False,
    endpoint: Endpoint = None,
    profile: Profile = None,
    anonymous: Anonymous = False,
    storage: Storage = None,
) -> None:
    """Say how far the job in OUTPUT is."""
    with reported(context):
        from diffray.pipelines import job_status

        state = job_status(_store(output, storage, endpoint, profile, anonymous))
        if as_json:
            typer.echo(json.dumps({**asdict(state), "ended": state.ended}, indent=2))
            return
        typer.echo(f"{state.ended} of {state.planned} images ended, {state.rejected} of them rejected")
        typer.echo(f"{state.committed} of {state.shards} shards committed; {state.phase}")
        if state.owner:
            typer.echo(f"owner: {state.owner}")
        if state.phase == "stopped":
            typer.echo("run its command again to go on")


def verify(
    context: typer.Context,
    output: Output,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Take back damaged shards, so that the job's command makes them again."
        ),
    ] = False,
    as_json: Json = False,
    take_over: TakeOver = False,
    endpoint: Endpoint = None,
    profile: Profile = None,
    anonymous: Anonymous = False,
    storage: Storage = None,
) -> None:
    """Prove that the dataset in OUTPUT is whole. Every file and image is read and compared with its checksum, and each
    planned image must have ended exactly once.

    Exit code 1 when something is wrong, or when planned images are not made yet.
    """
    with reported(context):
        from diffray.pipelines import repair as repair_dataset
        from diffray.pipelines import verify as verify_dataset

        store = _store(output, storage, endpoint, profile, anonymous)
        found = repair_dataset(store, take_over=take_over) if repair else verify_dataset(store)
        if as_json:
            typer.echo(json.dumps({**asdict(found), "damaged": found.damaged}, indent=2))
        else:
            for fault in found.faults:
                typer.echo(f"damaged: {fault}")
            typer.echo(
                f"{found.images} images and {found.rejected} rejected rows in {found.shards} shards; "
                f"{found.files} files, {found.bytes / 1e6:.1f} MB read: "
                + (f"{len(found.faults)} faults" if found.faults else "all as recorded")
            )
            if repair and found.damaged:
                typer.echo(f"{len(found.damaged)} shards taken back; run the job's command again")
            if found.missing:
                typer.echo(
                    f"{found.missing} of {found.planned} planned images are not made yet; run the job's command again"
                )
        if found.faults or found.missing:
            raise typer.Exit(FAILED)


def _retry_rejected(context: typer.Context, output: str, take_over: bool = False, **given: Any) -> None:
    with reported(context):
        from diffray.pipelines import for_this_terminal
        from diffray.pipelines import retry_rejected as retry

        values = job_values(given)
        if odd := sorted(values.keys() - {"workers", "max_rejected", "storage"}):
            raise typer.BadParameter(f"--job {odd[0]}: only workers and max_rejected may differ from the job")
        result = retry(output, **values, take_over=take_over, progress=for_this_terminal())
        if not result.made:
            typer.echo(f"nothing to do: no row of {output} is rejected")
            return
        typer.echo(f"{result.images} images, {result.rejected} still rejected, {result.seconds:.1f} s")


retry_rejected = with_options(
    _retry_rejected,
    "retry_rejected",
    "Run the rejected rows of a finished job again. Config and seeds are the job's own; workers are as in its last "
    "run, unless flags say otherwise.",
    {"output": Output},
    [MAX_REJECTED, *(one for one in OPTIONS if one.key.startswith("workers."))],
    {"take_over": TakeOver},
)


def gc(
    context: typer.Context,
    output: Output,
    hours: Annotated[
        float, typer.Option("--age", min=0, help="Only what is older than this many hours.")
    ] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    take_over: TakeOver = False,
    endpoint: Endpoint = None,
    profile: Profile = None,
    anonymous: Anonymous = False,
    storage: Storage = None,
) -> None:
    """Delete what crashed runs left in OUTPUT. That is: orphaned parts, temporary files, unfinished uploads."""
    with reported(context):
        from diffray.pipelines import collect

        store = _store(output, storage, endpoint, profile, anonymous)
        found = collect(store, hours * 3600, dry_run=dry_run, take_over=take_over)
        for path in found.files:
            typer.echo(path)
        uploads = f", {found.uploads} unfinished uploads aborted" if found.uploads else ""
        typer.echo(f"{len(found.files)} orphans {'found' if dry_run else 'deleted'}{uploads}")


def _store(output: str, *given: Any) -> Store:
    from diffray.pipelines import Store
    from diffray.pipelines.config import storage_options

    return Store(output, storage_options(storage_from(*given), output))
