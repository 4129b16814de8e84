"""Commands that are made of job options, and the values of a job file that their flags stand for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from .fields import pairs
from .options import OPTIONS, JobOption
from .storage import Anonymous, Endpoint, Profile, Storage, storage_from

INPUT_HELP = "Tables, tars, picture folders or saved datasets: files, folders, globs or URLs."
STORAGE = {"endpoint": Endpoint, "profile": Profile, "anonymous": Anonymous, "storage": Storage}
Job = Annotated[
    list[str] | None,
    typer.Option(
        "--job", help="Any other key of a job file, as KEY.PATH=YAML: workers.crashes=5; repeat it."
    ),
]


def job_command(
    task: str,
    help: str,
    body: Callable[[typer.Context, dict[str, Any], Mapping[str, Any]], None],
    extra: Mapping[str, Any],
) -> Callable[..., None]:
    """A command of `task`: takes INPUT and OUTPUT and every option that the task has.

    Args:
        body: called with the job's values, and with those of `extra`.
        extra: further parameters by name, as annotated types; their default is None or False.
    """
    places = {
        "input": Annotated[list[str], typer.Argument(help=INPUT_HELP)],
        "output": Annotated[
            str, typer.Argument(help="Folder or URL of the dataset; a second run resumes it.")
        ],
    }

    def command(**given: Any) -> None:
        context = given.pop("context")
        own = {name: given.pop(name) for name in extra}
        inputs, output = given.pop("input"), given.pop("output")
        values = {"task": task, "input": inputs[0] if len(inputs) == 1 else inputs, "output": output}
        body(context, job_values(given, values), own)

    options = [one for one in OPTIONS if not one.tasks or task in one.tasks]
    return with_options(command, task, help, places, options, extra)


def with_options(
    command: Callable[..., None],
    name: str,
    help: str,
    places: Mapping[str, Any],
    options: list[JobOption],
    extra: Mapping[str, Any],
) -> Callable[..., None]:
    """`command(context, ...)`, with a signature from which typer makes arguments and options."""
    kinds: dict[str, Any] = {
        "context": typer.Context,
        **places,
        **{one.name: one.kind for one in options},
        "job": Job,
        **STORAGE,
        **extra,
    }
    command.__name__, command.__doc__, command.__annotations__ = name, help, kinds
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                one,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                annotation=kind,
                default=inspect.Parameter.empty if one == "context" or one in places else _is_flag(kind),
            )
            for one, kind in kinds.items()
        ]
    )
    return command


def job_values(given: Mapping[str, Any], values: dict[str, Any] | None = None) -> dict[str, Any]:
    """The values of a job file from flags, beside those that are known; what was not given is left out."""
    values = dict(values or {})
    for one in OPTIONS:
        value = given.get(one.name)
        if value is None or value == []:
            continue
        if one.name in _REPEATED:
            value = _REPEATED[one.name](pairs(f"--{one.name}", value))
        _put(values, one.key.split("."), value, f"--{one.name.replace('_', '-')}")
    if "models" in values:
        shared = values.pop("model", {})
        values["models"] = {name: {**shared, "source": source} for name, source in values["models"].items()}
    for key, value in keys(given.get("job")).items():
        _put(values, key.split("."), value, "--job")
    if storage := storage_from(**{name: given[name] for name in STORAGE}):
        _put(values, ["storage"], storage, "--storage")
    return values


def _put(values: dict[str, Any], path: Sequence[str], value: Any, flag: str) -> None:
    """Set a key of nested mappings; a mapping is added to what is there."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            _put(values, [*path, name], inner, flag)
        return
    place = values
    for depth, name in enumerate(path[:-1], start=1):
        place = place.setdefault(name, {})
        if not isinstance(place, dict):
            raise typer.BadParameter(f"{flag}: {'.'.join(path[:depth])} is given already")
    if path[-1] in place:
        raise typer.BadParameter(f"{flag}: {'.'.join(path)} is given twice")
    place[path[-1]] = value


def keys(texts: list[str] | None) -> dict[str, Any]:
    """Values by dotted key, from `--job KEY.PATH=YAML`."""
    return {key: _yaml(key, text) for key, text in pairs("--job", texts).items()}


def _yaml(key: str, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"--job {key}: no YAML: {' '.join(str(error).split())}") from None


def _swept(texts: Mapping[str, str]) -> dict[str, Any]:
    """A,B,C or FROM:TO:STEP; what reads as a number is one."""
    found: dict[str, Any] = {}
    for name, text in texts.items():
        parts = text.split(":")
        numbers = [_number(part) for part in parts]
        if len(parts) == 3 and not any(isinstance(n, str) for n in numbers):
            found[name] = dict(zip(("from", "to", "step"), numbers, strict=True))
        else:
            found[name] = [_number(part.strip()) for part in text.split(",")]
    return found


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _is_flag(kind: Any) -> bool | None:
    """The default of an option: False for a plain flag, None for anything else."""
    return False if getattr(kind, "__origin__", None) is bool else None


_REPEATED: dict[str, Callable[[dict[str, str]], dict[str, Any]]] = {
    "models": dict,
    "adapter": dict,
    "column": lambda texts: {field: column or None for field, column in texts.items()},
    "template": dict,
    "set": dict,
    "label": dict,
    "sweep": _swept,
}
