"""The options of job commands: one table of flags and of the keys of a job file that they set.

Keys without a flag of their own are set by `--job KEY.PATH=YAML`; `command.py` makes commands of all this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from .fields import DEVICE, DTYPE, Guidance, Height, Negative, Sampler, Schedule, Set, Steps, Width

SIDES = ("left", "top", "right", "bottom")


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
MAX_REJECTED = JobOption(
    "max_rejected",
    _option(
        float | None,
        "Share of rejected images above which to end with exit code 4; by default only if all are rejected.",
    ),
    "max_rejected",
)
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
    JobOption("device", Annotated[str | None, DEVICE], "model.device"),
    JobOption("dtype", Annotated[str | None, DTYPE], "model.dtype"),
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
        _option(
            list[str] | None,
            "Where a request field is, as FIELD=COLUMN; repeat it. FIELD= reads it from no column.",
        ),
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
    JobOption("limit", _option(int | None, "Only so many rows, from the first on."), "limit"),
    MAX_REJECTED,
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
        _option(str | None, "Folder of the pictures that rows name; that of their table when left out."),
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
        _option(str | None, "What to do with sources of another shape than the image: stretch or crop."),
        "pictures.fit",
        ("generate", *SOURCED),
    ),
    JobOption(
        "latents",
        _option(str | None, "Type of the latents' numbers: float16 or float32."),
        "encoding.latents",
        ("encode",),
    ),
    JobOption(
        "format", _option(str | None, "Of the images: png, jpeg or webp."), "encoding.format", PICTURED
    ),
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
        _option(int | None, "Mark images whose phash differs from an earlier one's by at most so many bits."),
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
    JobOption(
        "flagged",
        _option(str | None, "Pictures that the safety checker flags: keep (default) or reject."),
        "checks.flagged",
        PICTURED,
    ),
    JobOption(
        "blank",
        _option(str | None, "Pictures of one colour: reject (default) or keep."),
        "checks.blank",
        PICTURED,
    ),
    JobOption(
        "gallery",
        _option(int | None, "About so many images in gallery.html; 0 for none."),
        "gallery",
        PICTURED,
    ),
    JobOption("license", _option(str | None, "License of the dataset, for its card."), "license"),
    JobOption(
        "price_per_hour",
        _option(float | None, "What one GPU, or one engine's CPU cores, cost in an hour, for report.json."),
        "workers.price_per_hour",
    ),
    JobOption("shard_images", _option(int | None, "Images per shard, at most."), "shards.images"),
    JobOption(
        "actors", _option(str | None, "At most this many engines, or a range such as 2-16."), "workers.actors"
    ),
    JobOption(
        "gpus", _option(float | None, "GPUs of each engine; a fraction for several on one."), "workers.gpus"
    ),
    JobOption("cpus", _option(float | None, "CPU cores of each engine."), "workers.cpus"),
    JobOption(
        "accelerator",
        _option(str | None, "Only nodes with this accelerator, by Ray's name for it: H100, L4, ..."),
        "workers.accelerator",
    ),
    JobOption(
        "label",
        _option(list[str] | None, "Only nodes with this Ray label, as NAME=VALUE; repeat it."),
        "workers.labels",
    ),
    JobOption(
        "text_encoders",
        _option(int | None, "Text encoders that all engines share; with 0 each engine has its own."),
        "workers.text_encoders",
        PAINTING,
    ),
    JobOption("address", _option(str | None, "Ray cluster to connect to."), "workers.address"),
)
