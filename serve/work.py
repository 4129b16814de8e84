"""What passes between the HTTP side and the engines: work goes in, events come out.

The HTTP side knows a `Backend` only. `engines.Engines` is one in this process; behind Ray Serve a handle to
replicas that hold the same class is another.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from diffray.model import ImageRequest, ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One image that a client asked for.

    Attributes:
        request: as the client gave it; what it leaves open the model's defaults fill.
        model: a name of the service's models.
        client, weight: whom it counts for when engine time is shared fairly, and that client's share.
        format, quality: of the finished picture's file; quality 1..100 is for jpeg and webp.
        preview_every: steps between two previews; 0 asks for none.
        seconds: time from now after which nobody wants it any more; None is the service's limit.
    """

    request: ImageRequest
    model: str
    client: str = ""
    weight: float = 1.0
    format: Literal["png", "jpeg", "webp"] = "png"
    quality: int = 92
    preview_every: int = 0
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """A step was done. `preview` is a small JPEG of the picture so far, where one was due."""

    step: int
    steps: int
    preview: bytes | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The picture: file bytes with provenance inside, and the request with every open field filled.

    The request is without its source pictures; they would travel back for nothing. `adapter_checksums` has the
    SHA-256 of each of its adapters' files, by name.
    """

    data: bytes
    request: ImageRequest
    model: str
    model_checksum: str
    timings: dict[str, float]
    adapter_checksums: dict[str, str] = field(default_factory=dict)


Event = Progress | Finished


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What clients may know of one model.

    Attributes:
        family, task: as in `ModelConfig`: "sdxl", "text" ("inpaint", "edit", ...).
        loaded: whether some engine holds it now.
        factor: width and height must be multiples of this.
        adapters: names of the adapters that its requests may have.
        config: what requests are checked against before they wait; None leaves that to the engine.
    """

    name: str
    family: str
    task: str
    checksum: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    schedule: str
    factor: int
    loaded: bool
    adapters: tuple[str, ...] = ()
    config: ModelConfig | None = field(default=None, repr=False)


class Backend(Protocol):
    """Whatever makes the images."""

    async def cards(self) -> list[ModelCard]:
        """All models that can be read, the default one first."""

    async def model(self, name: str) -> ModelCard:
        """One model.

        Raises:
            Refusal: there is none of that name (404), or it cannot be read (503).
        """

    async def check(self) -> None:
        """Raises whatever stops it from making images; returns when it can."""

    def sample(self) -> None:
        """Bring this process's gauges up to date, before somebody reads them."""

    def run(self, work: Work) -> AsyncGenerator[Event, None]:
        """Progress events, then one `Finished`. Closing the generator cancels the work at its next step.

        Raises:
            InvalidRequest: a value does not fit the model.
            GenerationError: this image failed; others did not.
            Refusal: no room (503 with `retry_after`), no such model (404), out of time (504).
        """
