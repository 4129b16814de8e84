"""Commands of the service: serve, keys."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .fields import Device, Dtype, pairs
from .outcome import reported

if TYPE_CHECKING:
    from diffray.serve.config import ServeConfig

keys = typer.Typer(
    help="API keys of a service. They are made here, shown once, and kept as hashes in a file that it reads.",
    no_args_is_help=True,
)
File = Annotated[Path, typer.Option("--file", "-f", help="The key file.")]
KEYS = Path("diffray-keys.json")


def serve(
    context: typer.Context,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help='"embedded", a path, a URL or a hub id; or NAME=SOURCE. May be repeated.'
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file with all of this; flags override it.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on [127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port [8000].")] = None,
    keys: Annotated[str | None, typer.Option(help="Key file, see `diffray keys`.")] = None,
    anonymous: Annotated[
        bool | None, typer.Option("--anonymous", help="Let in everybody who can reach it.")
    ] = None,
    replicas: Annotated[
        str | None, typer.Option(help="On Ray Serve: N engine replicas, or MIN-MAX for autoscaling.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to connect to.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="LoRA that requests may name, as NAME=SOURCE; may be repeated. Or a folder of them."
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Annotated[int | None, typer.Option(help="Images denoised together.")] = None,
) -> None:
    """Serve models over HTTP. There is a page at /, and the OpenAI, AUTOMATIC1111 and Stability APIs are there beside
    diffray's own.

    In one process; with --replicas, or `replicas` in the config, on Ray Serve.
    """
    with reported(context):
        from diffray.serve.config import ServeConfig

        base = ServeConfig() if config is None else ServeConfig.from_yaml(config)
        values = base.model_dump(exclude_unset=True)
        given = {"device": device, "dtype": dtype, "batch_size": batch_size}
        changed = {name: v for name, v in given.items() if v not in (None, "auto")}
        if model:
            values["models"] = dict(_named(text, changed) for text in model)
            values.pop("default", None)
        elif changed:
            values["models"] = {name: entry.model_dump() | changed for name, entry in base.models.items()}
        if adapter:
            values["models"] = _worn(values.get("models", {"embedded": {}}), adapter)
        for name, value in (("host", host), ("port", port)):
            if value is not None:
                values[name] = value
        access = {"keys": keys, "anonymous": anonymous}
        values["access"] = values.get("access", {}) | {k: v for k, v in access.items() if v is not None}
        if replicas is not None or address is not None:
            values["replicas"] = (values.get("replicas") or {}) | _scale(replicas)
        _run(ServeConfig.checked(values), address)


def _run(config: ServeConfig, address: str | None) -> None:
    if config.replicas is None:
        from diffray.serve.server import run

        run(config, typer.echo)
    else:
        from diffray.serve.deployment import run as run_on_ray

        run_on_ray(config, typer.echo, address)


def _named(text: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(name, entry) of NAME=SOURCE, or of a source whose name is its last part."""
    name, equals, source = text.partition("=")
    if not equals:
        path = text.partition("#")[0].rstrip("/")
        hub = path.count("/") == 1 and not path.endswith(".safetensors") and not Path(path).exists()
        name, source = path if hub else PurePosixPath(path).name.removesuffix(".safetensors"), text
    return name, {"source": source, **options}


def _worn(models: dict[str, Any], adapters: list[str]) -> dict[str, Any]:
    """The only model with adapters: NAME=SOURCE or a file's path each, or one folder."""
    if len(models) > 1:
        raise typer.BadParameter("--adapter: there are several models, say in --config which one has it")
    named = [
        f"{PurePosixPath(text).stem}={text}" if "=" not in text and text.endswith(".safetensors") else text
        for text in adapters
    ]
    found = named[0] if len(named) == 1 and "=" not in named[0] else pairs("--adapter", named)
    return {name: entry | {"adapters": found} for name, entry in models.items()}


def _scale(text: str | None) -> dict[str, int]:
    if text is None:
        return {}
    low, _, high = text.partition("-")
    try:
        return {"min": int(low), "max": max(int(high or low), 1)}
    except ValueError:
        raise typer.BadParameter(f"--replicas {text}: expected N or MIN-MAX") from None


@keys.command()
def add(
    context: typer.Context,
    id: Annotated[str, typer.Argument(help="Whose key it is; keys of one id share limits and jobs.")],
    file: File = KEYS,
    requests: Annotated[str | None, typer.Option(help='Such as "100/minute".')] = None,
    cost: Annotated[str | None, typer.Option(help='Megapixel-steps, such as "5000/hour".')] = None,
    images_at_once: Annotated[int | None, typer.Option(help="Images waiting or running together.")] = None,
    weight: Annotated[float, typer.Option(help="Share of the engines beside other clients'.")] = 1.0,
) -> None:
    """Make a key and print it; it is shown only once."""
    with reported(context):
        from diffray.serve.keys import add as add_key

        token = add_key(file, id, requests=requests, cost=cost, images_at_once=images_at_once, weight=weight)
        typer.echo(token)
        typer.echo(f"its hash is in {file}; the key itself is shown only here", err=True)


@keys.command("list")
def list_keys(context: typer.Context, file: File = KEYS) -> None:
    """List whose keys there are, with their limits."""
    with reported(context):
        from diffray.serve.keys import read

        for key in read(file).keys:
            facts = key.model_dump(exclude_defaults=True, exclude={"id", "sha256", "created"})
            limits = ", ".join(f"{name} {value}" for name, value in facts.items())
            typer.echo(f"{key.id:24} {key.created}  {key.sha256[:12]}  {limits}")


@keys.command()
def revoke(
    context: typer.Context,
    id: Annotated[str, typer.Argument(help="Whose keys.")],
    file: File = KEYS,
    old: Annotated[
        bool, typer.Option("--old", help="Keep the newest one, as the end of a rotation.")
    ] = False,
) -> None:
    """Take keys out of the file. Running services notice within a second."""
    with reported(context):
        from diffray.serve.keys import revoke as revoke_keys

        count = revoke_keys(file, id, but_newest=old)
        typer.echo(f"{count} revoked")
        if not count:
            raise typer.Exit(1)
