# ruff: noqa: RUF012 (pydantic copies default values)
"""What one batch job is: a validated value, the same from a YAML file and from command line flags."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from PIL import ImageColor
from pydantic import Field, ValidationError, field_validator, model_validator

from diffray.model.errors import TooManyRejected

from .checks import Checks
from .strict import InvalidJob as InvalidJob
from .strict import Strict as Strict
from .strict import complaints

Task = Literal["generate", "augment", "inpaint", "outpaint", "edit", "upscale", "encode", "decode"]


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


class JobConfig(Strict):
    """One batch job. Paths are relative to the current directory, or fsspec URLs."""

    task: Task = "generate"
    """What is made of every row."""
    input: str | list[str]
    """Tables, tars, image folders, datasets of `save_to_disk`: files, folders, globs or URLs. Tables
    may be behind `http(s)`, the pictures that they name may not."""
    output: str
    """Folder or URL of the dataset; the same job run again goes on there."""
    model: ModelOptions = ModelOptions()
    """The model of all rows."""
    models: dict[str, ModelOptions] = {}
    """Several models by name, instead of `model`: a row's column `model`, or the sweep, picks one; else the first.

    Their images are made one model after the other, so some engines of each stand idle while its last ones end.
    """
    columns: dict[str, str | None] = {}
    """Request field to the input column that holds it, where the names differ; null where none does: a column of that
    name, such as the `width` of a source picture, is then carried like any other."""
    templates: dict[str, str] = {}
    """Request field to a text with {column} in it, such as "a photo of {label}, {weather}"."""
    sweep: dict[str, list[Any] | Range] = {}
    """Request field, template variable or `model` to the values it takes in turn; every combination is made."""
    defaults: dict[str, Any] = {}
    """Request fields for rows that do not say."""
    images_per_prompt: int = Field(default=1, ge=1, le=100_000)
    """Images of every row and combination, each with a seed of its own; a row's own `n` goes before it."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Mixed with each image's id where its row gives no seed."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first rows of the input; a job goes on when it is raised."""
    max_rejected: float | None = Field(default=None, ge=0, le=1)
    """The share of rejected images above which the job ends as failed, although all is committed and reported; if the
    plan alone rejects more, no engine starts. With None a job fails only if every image is rejected, with 1 never."""
    pictures: Pictures = Pictures()
    encoding: Encoding = Encoding()
    shards: ShardLimits = ShardLimits()
    workers: Workers = Workers()
    storage: dict[str, dict[str, Any]] = Field(default={}, exclude=True, repr=False)
    """fsspec options by protocol ("s3") or URL prefix ("s3://public/"), for input, output and model alike.
    Several inputs need the same ones.

    May hold secrets, so no dump, record or message shows it.
    """
    checks: Checks = Checks()
    """Guards, measures and scorers."""
    contact_sheet: int = Field(default=24, ge=0, le=400)
    """Images on `contact_sheet.png`; 0 leaves it out."""
    gallery: int = Field(default=400, ge=0, le=5000)
    """About this many images, evenly drawn, are shown in `gallery.html`; 0 leaves it out. When it is raised later, only
    what is made from then on shows more."""
    license: str = Field(default="unknown", pattern=r"^[A-Za-z0-9.+_-]+$")
    """License of the dataset by its Hugging Face name, for the dataset card."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.task == "encode" and self.encoding.layout != "parquet":
            raise ValueError("task encode writes latents into Parquet: leave encoding.layout out")
        if self.task == "encode" and (keys := self.checks.of_pictures):
            raise ValueError(f"task encode makes no pictures to look at: leave checks.{keys[0]} out")
        if self.task in ("encode", "decode") and self.workers.text_encoders:
            raise ValueError(f"task {self.task} has no text to encode: leave workers.text_encoders out")
        if self.models and self.model != ModelOptions():
            raise ValueError("give model or models, not both")
        names: dict[str, str] = {}
        for name, options in self.models.items():
            if (other := names.setdefault(repr(options), name)) != name:
                raise ValueError(f"models: {other} and {name} have the same options")
        return self

    def check_rejected(self, rejected: int, planned: int, where: str) -> None:
        """Refuse a job of whose images too many are rejected; `where` says what was done, and where the reasons are.

        Raises:
            TooManyRejected: more than `max_rejected` allows.
        """
        share, limit = rejected / max(1, planned), self.max_rejected
        if share == 1 if limit is None else share > limit:
            allowed = "not all may be" if limit is None else f"max_rejected allows {limit:g}"
            raise TooManyRejected(
                f"{rejected} of {planned} images are rejected ({share:.4g}), {allowed}; {where}"
            )

    def placed(self) -> JobConfig:
        """The same job with absolute local paths: a relative one means something else where a worker runs."""
        pictures = self.pictures
        if pictures.root is not None:
            pictures = pictures.model_copy(update={"root": _absolute(pictures.root)})
        return self.model_copy(
            update={"input": [_absolute(url) for url in self.inputs], "pictures": pictures}
        )

    @property
    def every_model(self) -> dict[str, ModelOptions]:
        """Options by name; the single model's name is empty."""
        return self.models or {"": self.model}

    def name_of(self, model: ModelOptions) -> str:
        """The name of one of `models`; empty for the single model."""
        return next((name for name, options in self.models.items() if options == model), "")

    @property
    def inputs(self) -> list[str]:
        """The input as a list."""
        return [self.input] if isinstance(self.input, str) else self.input

    def storage_options(self, url: str) -> dict[str, Any]:
        """The options for `url`: those of its longest listed prefix, else of its protocol."""
        return storage_options(self.storage, url)

    @classmethod
    def checked(cls, values: dict[str, Any]) -> JobConfig:
        """The config of plain values.

        Raises:
            InvalidJob: listing every key that is unknown or has a value that is not allowed.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [f"  {line}" for line in complaints(error, cls, values)]
            raise InvalidJob("\n".join(["the job config is not valid:", *lines])) from None

    @classmethod
    def from_yaml(cls, path: str | Path, changes: Mapping[str, Any] | None = None) -> JobConfig:
        """The config in a YAML file.

        Args:
            path: of the file.
            changes: values by dotted key ("workers.actors"), in place of the file's.

        Raises:
            InvalidJob: the file cannot be read, is no YAML mapping, or `checked` refuses it.
        """
        try:
            values = yaml.load(Path(path).read_text(encoding="utf-8"), _OnceEach)
        except yaml.MarkedYAMLError as error:
            # The error's own text would quote the line, which may hold a secret.
            where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
            raise InvalidJob(f"{path}: no YAML{where}: {error.problem}") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InvalidJob(f"{path}: {error}") from None
        if not isinstance(values, dict):
            raise InvalidJob(f"{path}: got {type(values).__name__}, expected a mapping of job keys")
        for key, value in (changes or {}).items():
            place, *names = values, *key.split(".")
            for name in names[:-1]:
                if not isinstance(place, dict):
                    break
                place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise InvalidJob(f"{path}: {key}: {key.rpartition('.')[0]} is no mapping in this file")
            place[names[-1]] = value
        return cls.checked(values)


class _OnceEach(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return dict(super().construct_mapping(node, deep))


def _absolute(url: str) -> str:
    return url if "://" in url or "::" in url else os.path.abspath(os.path.expanduser(url))


def storage_options(storage: Mapping[str, Mapping[str, Any]], url: str) -> dict[str, Any]:
    """The options of `url` in a mapping by protocol or URL prefix; the longest prefix wins alone.

    A prefix that ends with a slash is also that of the folder itself.
    """
    protocol = url.partition("://")[0] if "://" in url else "file"
    matching = [key for key in storage if key == protocol or ("://" in key and f"{url}/".startswith(key))]
    return dict(storage[max(matching, key=len)]) if matching else {}
