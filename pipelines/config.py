"""What one batch job is: a validated value, the same from a YAML file and from command line flags."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffray.model.errors import DiffrayError


class InvalidJob(DiffrayError, ValueError):
    """A job config or an input table is wrong as a whole; nothing was started."""


class Strict(BaseModel):
    """Values that never change and have no unknown names."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelOptions(Strict):
    """Which model makes the images, and how it runs. All of it belongs to the job's fingerprint."""

    source: str = "embedded"
    """"embedded", a local path, an fsspec URL or a hub repo id."""
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = Field(default=None, ge=1)
    """Images denoised together; None lets the engine pick."""
    options: dict[str, Any] = {}
    """Further keyword arguments of `load_model`."""


class Encoding(Strict):
    """How an image becomes bytes, and where the bytes go."""

    format: Literal["png", "jpeg", "webp"] = "png"
    quality: int = Field(default=92, ge=1, le=100)
    """Of jpeg and webp; webp at 100 is lossless."""
    layout: Literal["parquet", "files"] = "parquet"
    """Bytes inside the Parquet column `image`, or one file per image beside a metadata table."""


class ShardLimits(Strict):
    """When a shard is full: whichever limit is reached first. A shard is what a crash can cost."""

    images: int = Field(default=100, ge=1, le=100_000)
    work: float = Field(default=2e9, gt=0)
    """Sum of width x height x steps. The default is about 60 SDXL images at 30 steps."""


class Between(Strict):
    """A least and a most; text such as "2-16" is understood too."""

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
    """At most this many engines, or a range such as 2-16; None takes one per GPU, or one per eight CPU cores, as
    many as the cluster has at any moment. A number that does not fit yet waits for the cluster to grow."""
    cpus: float | None = Field(default=None, gt=0)
    """CPU cores, and torch threads, of an actor without a GPU; None divides the cluster's evenly."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs per actor, a fraction for several on one; None takes 1 where the cluster has any and the device
    allows it."""
    accelerator: str | None = None
    """Only nodes with this accelerator, by Ray's name for it (`H100`, `L4`, ...)."""
    labels: dict[str, str] = {}
    """Only nodes with these Ray labels; a value may be a condition, such as `in(H100,H200)` or `!L4`."""
    start_timeout: float = Field(default=1800.0, gt=0)
    """Seconds that the job goes on with fewer engines up than the least it wants (one, unless `actors` says)."""
    shards_in_flight: int = Field(default=4, ge=1, le=64)
    """Shards that one actor works on at once, so that its engine never runs dry between two."""
    crashes: int = Field(default=3, ge=1, le=20)
    """A row that was alone in its worker at this many worker deaths is rejected."""
    patience: float = Field(default=900.0, gt=0)
    """Seconds without any finished step or image after which a worker counts as hanging and is replaced."""
    address: str | None = None
    """Ray cluster to connect to; None starts Ray on this machine unless it is already up."""

    @property
    def most(self) -> int | None:
        """Engines at most; None for as many as fit."""
        return self.actors.max if isinstance(self.actors, Between) else self.actors

    @property
    def least(self) -> int:
        """Engines without which the job is given up."""
        return self.actors.min if isinstance(self.actors, Between) else 1


class JobConfig(Strict):
    """One batch job.

    `defaults` are request fields for rows that do not say; `seed` is mixed with each image's id where the
    row gives no seed. Paths are relative to the current directory, or fsspec URLs.
    """

    input: str
    output: str
    model: ModelOptions = ModelOptions()
    defaults: dict[str, Any] = {}
    images_per_prompt: int = Field(default=1, ge=1, le=100_000)
    seed: int = Field(default=0, ge=0, lt=2**63)
    encoding: Encoding = Encoding()
    shards: ShardLimits = ShardLimits()
    workers: Workers = Workers()
    storage: dict[str, dict[str, Any]] = Field(default={}, exclude=True, repr=False)
    contact_sheet: int = Field(default=24, ge=0, le=400)
    """Images on `contact_sheet.png`; 0 leaves it out."""

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
            lines = [
                f"  {'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors()
            ]
            raise InvalidJob("\n".join(["the job config is not valid:", *lines])) from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> JobConfig:
        """The config in a YAML file.

        Raises:
            InvalidJob: the file cannot be read, is no YAML mapping, or `checked` refuses it.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InvalidJob(f"{path}: {error}") from None
        if not isinstance(values, dict):
            raise InvalidJob(f"{path}: got {type(values).__name__}, expected a mapping of job keys")
        return cls.checked(values)


def storage_options(storage: Mapping[str, Mapping[str, Any]], url: str) -> dict[str, Any]:
    """The options of `url` in a mapping by protocol or URL prefix; the longest prefix wins alone."""
    protocol = url.partition("://")[0] if "://" in url else "file"
    matching = [key for key in storage if key == protocol or ("://" in key and url.startswith(key))]
    return dict(storage[max(matching, key=len)]) if matching else {}
