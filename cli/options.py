"""The options of job commands: one table of flags and of the keys of a job file that they set."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from .fields import Device, Dtype, Guidance, Height, Negative, Sampler, Schedule, Set, Steps, Width, pairs
from .storage import Anonymous, Endpoint, Profile, Storage, storage_from

SIDES = ("left", "top", "right", "bottom")
INPUT_HELP = "Tables, tars, a picture folder or a saved dataset: a file, folder, glob or URL."


def _option(kind: Any, help: str, *flags: str) -> Any:
    return Annotated[kind, typer.Option(*flags, help=help)]


@dataclass(frozen=True, slots=True)
class JobOption:
    """One flag.

    Attributes:
        name: of the flag, with underscores.
        kind: its annotated type.
        key: what it sets in the job, dots between.
        tasks: the commands that have it; none for all.
    """

    name: str
    kind: Any
    key: str
    tasks: tuple[str, ...] = ()


PAINTING = ("generate", "augment", "inpaint", "outpaint", "edit", "upscale")
PICTURED = (*PAINTING, "decode")
SOURCED = ("augment", "inpaint", "outpaint", "edit", "upscale", "encode")
OPTIONS = (
    JobOption(
        "model",
        _option(str | None, '"embedded", a path, a URL or a hub id.', "--model", "-m"),
        "model.source",
    ),
    JobOption(
        "models", _option(list[str] | None, "One of several models, as NAME=SOURCE; repeat it."), "models"
    ),
    JobOption(
        "adapter",
        _option(
            list[str] | None,
            "A LoRA or the like that rows, --set and --sweep may name as adapters, as NAME=SOURCE; repeat it.",
        ),
        "model.adapters",
        PAINTING,
    ),
    JobOption("device", Device | None, "model.device"),
    JobOption("dtype", Dtype | None, "model.dtype"),
    JobOption("batch_size", _option(int | None, "Images denoised together."), "model.batch_size"),
    JobOption(
        "prompt",
        _option(str | None, 'Prompt of all rows; may name columns: "a {label}".'),
        "templates.prompt",
        PAINTING,
    ),
    JobOption("negative_prompt", Negative, "defaults.negative_prompt", PAINTING),
    JobOption(
        "column",
        _option(list[str] | None, "Where a request field is, as FIELD=COLUMN; repeat it."),
        "columns",
    ),
    JobOption(
        "template",
        _option(list[str] | None, "Text of a request field, as FIELD=TEXT with {column} in it."),
        "templates",
        PAINTING,
    ),
    JobOption(
        "sweep",
        _option(list[str] | None, "Values to take in turn, as NAME=A,B,C or NAME=FROM:TO:STEP; repeat it."),
        "sweep",
        PAINTING,
    ),
    JobOption(
        "images_per_prompt",
        _option(int | None, "Images of every row and combination.", "--images-per-prompt", "-n"),
        "images_per_prompt",
        PAINTING,
    ),
    JobOption(
        "seed",
        _option(int | None, "Mixed with each image's id where its row gives no seed."),
        "seed",
        PAINTING,
    ),
    JobOption("limit", _option(int | None, "Only the first rows."), "limit"),
    JobOption("steps", Steps, "defaults.steps", PAINTING),
    JobOption(
        "strength",
        _option(float | None, "How much of the source is redone, above 0 and up to 1."),
        "defaults.strength",
        PAINTING,
    ),
    JobOption("width", Width, "defaults.width"),
    JobOption("height", Height, "defaults.height"),
    JobOption("guidance_scale", Guidance, "defaults.guidance_scale", PAINTING),
    JobOption("sampler", Sampler, "defaults.sampler", PAINTING),
    JobOption("schedule", Schedule, "defaults.schedule", PAINTING),
    JobOption("set", Set, "defaults"),
    JobOption(
        "mask_invert",
        _option(bool | None, "Keep the white part of the mask, repaint the rest.", "--mask-invert"),
        "defaults.mask_invert",
        ("inpaint",),
    ),
    JobOption(
        "mask_values",
        _option(str | None, "Values of a class map that are the mask: 1,7."),
        "defaults.mask_values",
        ("inpaint",),
    ),
    *(
        JobOption(side, _option(int | None, "Pixels to add."), f"defaults.{side}", ("outpaint",))
        for side in SIDES
    ),
    JobOption(
        "scale",
        _option(float | None, "Times the size, above 1 and up to 8; 2 when left out."),
        "defaults.scale",
        ("upscale",),
    ),
    JobOption(
        "pictures",
        _option(str | None, "Folder of pictures that rows name; their table's when left out."),
        "pictures.root",
        ("generate", *SOURCED),
    ),
    JobOption(
        "max_side",
        _option(int | None, "Source pictures are made smaller until no side is longer."),
        "pictures.max_side",
        ("generate", *SOURCED),
    ),
    JobOption(
        "fit",
        _option(str | None, "Sources of another shape than asked: stretch or crop."),
        "pictures.fit",
        ("generate", *SOURCED),
    ),
    JobOption(
        "latents",
        _option(str | None, "Numbers of the latents: float16 or float32."),
        "encoding.latents",
        ("encode",),
    ),
    JobOption("format", _option(str | None, "png, jpeg or webp."), "encoding.format", PICTURED),
    JobOption("quality", _option(int | None, "Of jpeg and webp, 1..100."), "encoding.quality", PICTURED),
    JobOption(
        "images",
        _option(str | None, "Where images go: parquet, files beside a table, or webdataset."),
        "encoding.layout",
        PICTURED,
    ),
    JobOption(
        "metadata",
        _option(str | None, "The table beside image files: parquet or jsonl."),
        "encoding.metadata",
        PICTURED,
    ),
    JobOption(
        "block",
        _option(str | None, "File of words and phrases, one per line, that no prompt may contain."),
        "checks.block",
        PICTURED,
    ),
    JobOption(
        "measures",
        _option(bool | None, "Columns brightness, contrast, sharpness, phash, blank.", "--measures"),
        "checks.measures",
        PICTURED,
    ),
    JobOption(
        "near_duplicates",
        _option(int | None, "Table of images whose phash differs by at most so many bits."),
        "checks.near_duplicates",
        PICTURED,
    ),
    JobOption("clip", _option(str | None, "CLIP model for a column clip_score."), "checks.clip", PICTURED),
    JobOption(
        "safety",
        _option(str | None, "Safety checker for columns nsfw, nsfw_score."),
        "checks.safety",
        PICTURED,
    ),
    JobOption("flagged", _option(str | None, "What it flags: keep or reject."), "checks.flagged", PICTURED),
    JobOption(
        "blank",
        _option(str | None, "Pictures of one colour: reject (default) or keep."),
        "checks.blank",
        PICTURED,
    ),
    JobOption(
        "gallery", _option(int | None, "Images in gallery.html, about; 0 for none."), "gallery", PICTURED
    ),
    JobOption("license", _option(str | None, "License of the dataset, for its card."), "license"),
    JobOption(
        "price_per_hour",
        _option(float | None, "Of one GPU, or of one engine's CPU cores, for report.json."),
        "workers.price_per_hour",
    ),
    JobOption("shard_images", _option(int | None, "Images per shard, at most."), "shards.images"),
    JobOption(
        "actors", _option(str | None, "At most this many engines, or a range such as 2-16."), "workers.actors"
    ),
    JobOption(
        "text_encoders",
        _option(int | None, "So many text encoders for all engines; 0 leaves each engine to itself."),
        "workers.text_encoders",
        PAINTING,
    ),
    JobOption("address", _option(str | None, "Ray cluster to connect to."), "workers.address"),
)
STORAGE = {"endpoint": Endpoint, "profile": Profile, "anonymous": Anonymous, "storage": Storage}


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
    options = [one for one in OPTIONS if not one.tasks or task in one.tasks]
    kinds: dict[str, Any] = {
        "context": typer.Context,
        "input": Annotated[str, typer.Argument(help=INPUT_HELP)],
        "output": Annotated[
            str, typer.Argument(help="Folder or URL of the dataset; a second run resumes it.")
        ],
        **{one.name: one.kind for one in options},
        **STORAGE,
        **extra,
    }
    required = ("context", "input", "output")

    def command(**given: Any) -> None:
        context = given.pop("context")
        own = {name: given.pop(name) for name in extra}
        values = {"task": task, "input": given.pop("input"), "output": given.pop("output")}
        body(context, values | job_values(given), own)

    command.__name__, command.__doc__ = task, help
    command.__annotations__ = kinds
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                annotation=kind,
                default=inspect.Parameter.empty if name in required else _is_flag(kind),
            )
            for name, kind in kinds.items()
        ]
    )
    return command


def job_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a job file from flags; what was not given is left out."""
    values: dict[str, Any] = {}
    for one in OPTIONS:
        value = given.get(one.name)
        if value is None or value == []:
            continue
        if one.name in _REPEATED:
            value = _REPEATED[one.name](pairs(f"--{one.name}", value))
        place, parts = values, one.key.split(".")
        for part in parts[: -1 if not isinstance(value, dict) else None]:
            place = place.setdefault(part, {})
        if not isinstance(value, dict):
            place[parts[-1]] = value
        elif double := sorted(place.keys() & value.keys()):
            raise typer.BadParameter(f"--{one.name} {double[0]}: given twice")
        else:
            place |= value
    if "models" in values:
        shared = values.pop("model", {})
        values["models"] = {name: {**shared, "source": source} for name, source in values["models"].items()}
    if storage := storage_from(**{name: given[name] for name in STORAGE}):
        values["storage"] = storage
    return values


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
    "column": dict,
    "template": dict,
    "set": dict,
    "sweep": _swept,
}
