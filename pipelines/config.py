# ruff: noqa: RUF012 (pydantic copies default values)
"""What one batch job is: a validated value, the same from a YAML file and from command line flags."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from diffray.model.errors import TooManyRejected

from .checks import Checks
from .options import Encoding, ModelOptions, Pictures, Range, ShardLimits, Workers
from .strict import InvalidJob as InvalidJob
from .strict import Strict as Strict
from .strict import complaints

Task = Literal["generate", "augment", "inpaint", "outpaint", "edit", "upscale", "encode", "decode"]


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
