"""The options that say how storage is reached: endpoint, profile, anonymous access and whatever else a client takes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Endpoint = Annotated[str | None, typer.Option("--endpoint", help="URL of the S3 server, if not Amazon's.")]
Profile = Annotated[str | None, typer.Option("--profile", help="AWS profile to take credentials from.")]
Anonymous = Annotated[bool, typer.Option("--anonymous", help="Reach S3 without credentials.")]
Storage = Annotated[
    list[str] | None,
    typer.Option(
        "--storage",
        help="Any other storage option, as PROTOCOL.OPTION=VALUE or URL-PREFIX.OPTION=VALUE.",
    ),
]


def storage_from(
    storage: list[str] | None, endpoint: str | None, profile: str | None, anonymous: bool
) -> dict[str, dict[str, Any]]:
    """`storage` of the job config. Secrets do not belong on a command line: use a profile, a file or `AWS_*`."""
    import yaml

    options: dict[str, dict[str, Any]] = {}
    named = {"endpoint_url": endpoint, "profile": profile, "anon": anonymous or None}
    if s3 := {name: value for name, value in named.items() if value is not None}:
        options["s3"] = s3
    for text in storage or []:
        name, equals, value = text.partition("=")
        place, dot, option = name.rpartition(".")
        if not (equals and dot and place and option):
            raise typer.BadParameter(f"--storage {name}: expected PROTOCOL.OPTION=VALUE")
        options.setdefault(place, {})[option] = yaml.safe_load(value)
    return options
