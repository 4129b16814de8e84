"""What one service is: a validated value, the same from a YAML file, from Serve's `args` and from flags."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from diffray.model import DiffrayError
from diffray.model.adapters.choices import NAME, NAMES
from diffray.model.storage import open_storage

LOOPBACK = ("127.0.0.1", "::1", "localhost")
SAFETENSORS = ".safetensors"


class InvalidConfig(DiffrayError, ValueError):
    """A service config is wrong; nothing was started."""


class Strict(BaseModel):
    """Values that never change and have no unknown names."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelEntry(Strict):
    """Which weights a name stands for, and how they run."""

    source: str = "embedded"
    """"embedded", a local path, an fsspec URL or a hub repo id."""
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = Field(default=None, ge=1)
    """Images denoised together; None lets the engine pick."""
    adapters: dict[str, str] | Annotated[str, Field(min_length=1)] = {}
    """LoRA files and their kin by the names that clients use, each a source like the model's; or one folder (or
    URL) whose *.safetensors files all are, under their names without the ending."""
    options: dict[str, Any] = {}
    """Further keyword arguments of `load_model`."""

    @field_validator("adapters")
    @classmethod
    def _named(cls, adapters: dict[str, str] | str) -> dict[str, str] | str:
        if isinstance(adapters, dict):
            _check_names(adapters)
        return adapters

    @property
    def adapter_sources(self) -> dict[str, str]:
        """Its adapters, those of a folder as it is now.

        Raises:
            OSError, ValueError, ImportError: the folder cannot be read, has none, or has one whose name is no name.
        """
        return self.adapters if isinstance(self.adapters, dict) else _adapters_in(self.adapters)


class Memory(Strict):
    """How many models one replica holds at once; the one used least recently goes first."""

    models: int = Field(default=4, ge=1)
    gigabytes: float | None = Field(default=None, gt=0)
    """Of weights, together; None is 80 % of the device's memory."""


class Limits(Strict):
    """What one request, one client and the whole service may ask for.

    Cost is counted in megapixel-steps: width x height x steps of every image, over a million. An SDXL image
    of 1024 x 1024 in 30 steps costs 31.5.
    """

    cost: float = Field(default=1000.0, gt=0)
    """Of one request."""
    images: int = Field(default=16, ge=1)
    """In one request."""
    image_pixels: int = Field(default=4096 * 4096, ge=64)
    """Of one image, after its second pass if it has one: a large one keeps others waiting, however few its steps."""
    queue_cost: float = Field(default=10_000.0, gt=0)
    """Of all requests that are waiting or running; more are refused at once."""
    queue_images: int = Field(default=512, ge=1)
    seconds: float = Field(default=300.0, gt=0)
    """From admission to the answer; also how long a replica drains before it stops."""
    body_bytes: int = Field(default=32 * 2**20, ge=1024)
    body_seconds: float = Field(default=30.0, gt=0)
    """For a body to arrive."""
    source_pixels: int = Field(default=4096 * 4096, ge=1)
    """Of one picture that a client sends, and of all that AUTOMATIC1111's clients send or have resized in a request."""
    requests_per_key: str | None = None
    """Such as "100/minute"; keys may have their own."""
    cost_per_key: str | None = None
    """Megapixel-steps, such as "5000/hour"."""
    idempotency_bytes: int = Field(default=256 * 2**20, ge=0)
    """Answers kept for repeated requests with the same Idempotency-Key."""
    idempotency_seconds: float = Field(default=600.0, ge=0)
    images_at_once: int = Field(default=64, ge=1)
    """Of one client, waiting or running."""
    storage: str = Field(default="memory://", pattern=r"^(memory://$|rediss?://|redis\+unix://)")
    """Where rates are counted; a redis:// URL shares them between several services. While it cannot be reached each
    service counts for itself."""


class Access(Strict):
    """Who may ask.

    Keys come from the file and from the variable DIFFRAY_API_KEYS (comma-separated; set without a key in it, it is
    refused). Without any, the service is anonymous, which it refuses to be on a public address unless `anonymous` is
    true, and everywhere if it is false.
    """

    keys: str | None = None
    """File that `diffray keys` writes; changes count within a second, without a restart."""
    anonymous: bool | None = None
    """Whether anybody may ask without a key; None: only on a loopback address and without keys."""
    origins: tuple[str, ...] = ()
    """Web origins that browsers may call from; none by default."""
    log_prompts: bool = False
    """Whether the access log has prompts."""
    metrics: bool = True
    """Whether /metrics is served."""
    docs: bool = True
    """Whether /docs and /openapi.json are served."""


class Guardrails(Strict):
    """What is refused for what it says or shows. Hooks are import paths, "package.module:function"."""

    blocklist: str | None = None
    """File with a word or phrase per line; a prompt that has one is refused."""
    prompt: tuple[str, ...] = ()
    """Called with an `ImageRequest`, once for all images of one prompt, in a thread; a returned text is the reason to
    refuse."""
    image: tuple[str, ...] = ()
    """Called with the finished PIL image and its `ImageRequest`, in a thread of the replica. Where there is any, nobody
    is shown an unfinished picture: there are no previews, and an interruption answers with what was finished."""


class Store(Strict):
    """Where results of asynchronous jobs are kept."""

    url: str | None = None
    """A folder or fsspec URL such as s3://bucket/prefix; None is a folder that ends with the service."""
    options: dict[str, Any] = {}
    """fsspec storage options, such as `endpoint_url` or `profile` of S3."""
    seconds: float = Field(default=3600.0, gt=0)
    """A result's lifetime."""


class Replicas(Strict):
    """Engine replicas on Ray: how many, and what each takes."""

    min: int = Field(default=1, ge=0)
    max: int = Field(default=1, ge=1)
    target: float = Field(default=16.0, gt=0)
    """Images waiting or running per replica that autoscaling aims at."""
    gpus: float | None = Field(default=None, ge=0)
    """Per replica; None takes 1 where the cluster has any and the default model's device allows it."""
    cpus: float = Field(default=1.0, ge=0)
    """Also the torch threads of a replica without an accelerator."""
    ingress_cpus: float = Field(default=0.5, ge=0)
    upscale_seconds: float = Field(default=10.0, ge=0)
    downscale_seconds: float = Field(default=300.0, ge=0)
    surge_percent: int = Field(default=100, ge=0, le=100)
    """Share of the replicas that a new version starts beside the old ones, which stop only when these are ready, so
    that a version which cannot start changes nothing. 0 for a cluster without spare accelerators: old ones stop
    first."""
    resources: dict[str, float] = {}
    """Further Ray resources, such as {"accelerator_type:L4": 0.001}."""

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, above max {self.max}")
        return self


class ServeConfig(Strict):
    """One service. With `replicas` it runs on Ray Serve, without in one process."""

    models: dict[str, ModelEntry] = Field(default={"embedded": ModelEntry()}, min_length=1)
    default: str | None = None
    """The model of requests that name none; None is the first."""
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    memory: Memory = Memory()
    limits: Limits = Limits()
    access: Access = Access()
    guardrails: Guardrails = Guardrails()
    store: Store = Store()
    replicas: Replicas | None = None
    page: bool = True
    """Whether the page at / is served."""
    log: Literal["json", "off"] = "json"
    """Access log: one JSON object per request on standard output."""

    @model_validator(mode="after")
    def _known_default(self) -> ServeConfig:
        if self.default is not None and self.default not in self.models:
            raise ValueError(f"default: got {self.default!r}, allowed is one of {', '.join(self.models)}")
        return self

    @property
    def private(self) -> bool:
        """Whether only this machine can reach the service. On Ray, Serve's own address is what counts: `located`."""
        return self.host in LOOPBACK

    @property
    def default_model(self) -> str:
        """The name that requests without one get."""
        return self.default or next(iter(self.models))

    @property
    def names(self) -> list[str]:
        """All models, the default one first."""
        return [self.default_model, *(name for name in self.models if name != self.default_model)]

    def listed(self) -> ServeConfig:
        """The config with every folder of adapters replaced by what is in it now.

        Raises:
            InvalidConfig: one cannot be read or is not usable, which is named with its model.
        """
        models = {}
        for name, entry in self.models.items():
            try:
                models[name] = entry.model_copy(update={"adapters": entry.adapter_sources})
            except (OSError, ValueError, ImportError) as error:
                raise InvalidConfig(f"models.{name}.adapters: {error}") from None
        return self.model_copy(update={"models": models})

    @classmethod
    def checked(cls, values: dict[str, Any]) -> ServeConfig:
        """The config of plain values.

        Raises:
            InvalidConfig: listing every key that is unknown or has a value that is not allowed.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [
                f"  {'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors()
            ]
            raise InvalidConfig("\n".join(["the service config is not valid:", *lines])) from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> ServeConfig:
        """The config in a YAML file: its keys, or a Serve config whose application has them as `args`.

        Raises:
            InvalidConfig: the file cannot be read, is no YAML mapping, or `checked` refuses it.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InvalidConfig(f"{path}: {error}") from None
        if not isinstance(values, dict):
            raise InvalidConfig(f"{path}: got {type(values).__name__}, expected a mapping of config keys")
        if isinstance(values.get("applications"), list):
            values = _serve_arguments(values, path)
        return cls.checked(values)


def _serve_arguments(values: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Our keys out of a Serve config, with the address of its `http_options`."""
    ours = [a for a in values["applications"] if str(a.get("import_path", "")).startswith("diffray.serve")]
    if len(ours) != 1:
        raise InvalidConfig(f"{path}: got {len(ours)} applications of diffray.serve, expected one")
    http = values.get("http_options") or {}
    address = {name: http[name] for name in ("host", "port") if name in http}
    return {"replicas": {}, **address, **(ours[0].get("args") or {})}


def _check_names(names: Iterable[str]) -> None:
    """Raises ValueError if a name is none that requests can have."""
    for name in names:
        if not NAME.fullmatch(name):
            raise ValueError(f"got {name!r:.200}, a name is {NAMES}")


def _adapters_in(folder: str) -> dict[str, str]:
    fs, root = open_storage(folder)
    if not fs.isdir(root):
        raise ValueError(f"{folder}: no such folder")
    files = sorted(path for path in fs.ls(root, detail=False) if path.endswith(SAFETENSORS))
    if not files:
        raise ValueError(f"{folder}: no *{SAFETENSORS} files in it")
    local = isinstance(fs, LocalFileSystem)
    found = {
        PurePosixPath(path).name.removesuffix(SAFETENSORS): path if local else fs.unstrip_protocol(path)
        for path in files
    }
    _check_names(found)
    return found
