# ruff: noqa: RUF012 (pydantic copies default values)
"""The parts of a job's config: the model, the pictures that come in and go out, shards, workers."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, Self

from PIL import ImageColor
from pydantic import Field, field_validator, model_validator

from .strict import Strict


class ModelOptions(Strict):
    """Which model makes the images, and how it runs. All of it belongs to the job's fingerprint."""

    source: str = "embedded"
    """"embedded", a local path, an fsspec URL or a hub repo id."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto, float32, float16 or bfloat16."""
    batch_size: int | None = Field(default=None, ge=1)
    """Images denoised together; None lets the engine pick."""
    adapters: dict[str, str] = {}
    """LoRAs and their relatives by name: a local path, an fsspec URL, or a file of a hub repo. Rows, defaults and the
    sweep choose among them in the field `adapters`, as "name:0.8, other" or a list of names and weights."""
    options: dict[str, Any] = {}
    """Further keyword arguments of `load_model`."""


class Encoding(Strict):
    """How an image becomes bytes, and where the bytes go."""

    format: Literal["png", "jpeg", "webp"] = "png"
    """Of the image files."""
    quality: int = Field(default=92, ge=1, le=100)
    """Of jpeg and webp; webp at 100 is lossless."""
    layout: Literal["parquet", "files", "webdataset"] = "parquet"
    """Bytes inside the Parquet column `image`, one file per image beside a metadata table, or WebDataset tars."""
    metadata: Literal["parquet", "jsonl"] = "parquet"
    """The table beside image files. Parquet states the columns' types, JSON lines leave them to the reader."""
    latents: Literal["float16", "float32"] = "float16"
    """Of task `encode`: the type of the numbers."""

    @property
    def extension(self) -> str:
        """The ending of an image file's name, without the dot."""
        return {"jpeg": "jpg"}.get(self.format, self.format)


class Range(Strict):
    """Evenly spaced numbers of a sweep, both ends included."""

    start: int | float = Field(alias="from")
    """The first value."""
    to: int | float
    """The last value, if a whole number of steps leads there."""
    step: int | float = Field(gt=0)
    """The distance between two values."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.start > self.to:
            raise ValueError(f"from {self.start} is above to {self.to}")
        return self

    def __len__(self) -> int:
        return math.floor((self.to - self.start) / self.step + 1e-9) + 1

    def values(self) -> list[int | float]:
        """The numbers, rounded to ten digits so that they are those one would write down."""
        return [round(self.start + i * self.step, 10) for i in range(len(self))]


class Pictures(Strict):
    """Where source pictures are, and what is done to them before the task's own work.

    PNG, JPEG, WebP, BMP, TIFF and GIF are read; of an animation the first frame. They are turned upright by
    their EXIF orientation; 16 bits become 8, palettes, CMYK and gray become RGB, colour profiles are ignored.
    """

    root: str | None = None
    """Folder of pictures that are named by path; a path is relative to its table when left out."""
    background: str = "white"
    """What shows through transparent pixels: a colour name or #rrggbb."""
    max_side: int | None = Field(default=None, ge=8)
    """Larger pictures are made smaller, so that the longer side has this many pixels."""
    fit: Literal["stretch", "crop"] = "stretch"
    """When the request's width and height have another shape: stretch, or cut off what is too much, evenly."""
    max_pixels: int = Field(default=64_000_000, ge=64, le=178_000_000)
    """Larger pictures are rejected by their header, before anything is decoded."""
    max_bytes: int = Field(default=256 * 2**20, ge=1)
    """Larger files are rejected before they are read."""

    @field_validator("background")
    @classmethod
    def _is_colour(cls, name: str) -> str:
        ImageColor.getrgb(name)
        return name


class ShardLimits(Strict):
    """When a shard is full: whichever limit is reached first. A shard is what a crash can cost."""

    images: int = Field(default=100, ge=1, le=100_000)
    """Images at most."""
    work: float = Field(default=2e9, gt=0)
    """Sum of width x height x steps. The default is about 60 SDXL images at 30 steps."""


class Between(Strict):
    """A least and a most number of engines; text such as "2-16" is understood too."""

    min: int = Field(default=1, ge=1)
    """Engines without which the job is given up, after `start_timeout`."""
    max: int = Field(ge=1)
    """Engines at most."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", value) if isinstance(value, str) else None
        return {"min": int(match[1]), "max": int(match[2])} if match else value

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class Workers(Strict):
    """How the work is spread. Changes nothing in the output, so it may differ between resumptions."""

    actors: Annotated[int, Field(ge=1)] | Between | None = None
    """At most this many engines, or a range such as 2-16; None takes one per GPU, or one per eight CPU cores, of the
    cluster as it is at the start. More than fit at first wait for the cluster to grow."""
    cpus: float | None = Field(default=None, gt=0)
    """CPU cores of an actor without a GPU; None divides the cluster's evenly. It computes with as many torch threads
    as an actor of the job's first run had cores, since the bytes depend on it."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs per actor, a fraction for several on one; None takes 1 where the cluster has any and the device
    allows it."""
    accelerator: str | None = None
    """Only nodes with this accelerator, by Ray's name for it (`H100`, `L4`, ...)."""
    labels: dict[str, str] = {}
    """Only nodes with these Ray labels; a value may be a condition, such as `in(H100,H200)` or `!L4`."""
    start_timeout: float = Field(default=1800.0, gt=0)
    """The job is given up after so many seconds with fewer engines than the least of `actors` (one, unless it is a
    range), or without an answer from any of `text_encoders`."""
    shards_in_flight: int = Field(default=4, ge=1, le=64)
    """Shards that one actor works on at once, so that its engine never runs dry between two."""
    crashes: int = Field(default=3, ge=1, le=20)
    """A row that was alone in its worker at this many worker deaths is rejected."""
    patience: float = Field(default=600.0, gt=0)
    """Seconds without any finished step, read or image after which a worker counts as hanging and is replaced."""
    text_encoders: int | None = Field(default=None, ge=0, le=256)
    """How many text encoders all engines of a model share: equal prompts are encoded once, and engines load no text
    encoders of their own. With None or 0 every engine has its own."""
    text_share: float = Field(default=1.0, gt=0)
    """What each of `text_encoders` takes: a share of a GPU, or CPU cores where engines have no GPU."""
    price_per_hour: float | None = Field(default=None, ge=0)
    """Of one GPU, or on CPU of what one engine runs on, in any currency: the report then says what images cost."""
    address: str | None = None
    """Ray cluster to connect to; None starts Ray on this machine unless it is already up."""

    @field_validator("actors", mode="before")
    @classmethod
    def _is_count(cls, value: Any) -> Any:
        if isinstance(value, str) and not re.fullmatch(r"\s*\d+\s*(-\s*\d+\s*)?", value):
            raise ValueError("allowed is a number of engines, or a range such as 2-16")
        return value

    @property
    def most(self) -> int | None:
        """Engines at most; None for as many as fit."""
        return self.actors.max if isinstance(self.actors, Between) else self.actors

    @property
    def least(self) -> int:
        """Engines without which the job is given up."""
        return self.actors.min if isinstance(self.actors, Between) else 1
