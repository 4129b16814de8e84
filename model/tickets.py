"""What the engine gives back: a ticket for every submitted request, and a result for every finished one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from .encoding import save_image
from .errors import GenerationError
from .preview import preview_image
from .request import ImageRequest


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """One finished image.

    Attributes:
        image: the picture; None when the request asked for latents.
        latents: [C, h, w] float32 on the CPU, in the UNet's scale, when the request asked for them.
        request: what was made, every open field filled.
        timings: seconds spent in "queue", "prepare", "denoise", "decode"; together the time since `submit`.
            Waiting counts too: "denoise" includes the steps of other images in between.
        rows: rows of the network calls it was finished with, the one fact besides request, model and software
            that its last bits depend on: `Engine.rows`, or half or less once memory ran out.
    """

    image: Image.Image | None
    latents: Tensor | None
    request: ImageRequest
    timings: dict[str, float]
    rows: int = 0

    def save(self, path: Any, **options: Any) -> None:
        """Write the picture to `path` as PNG, JPEG or WebP, with how it was made inside.

        `options` are those of `encode_image`: `quality`, name and checksum of the model, checksums of adapters.
        """
        if self.image is None:
            raise GenerationError("save: this result holds latents, not an image")
        save_image(self.image, self.request, path, **options)


@dataclass(slots=True, eq=False)
class Ticket:
    """A submitted request: its future result, its progress, and the way to take it back.

    Attributes:
        steps, step: sampler steps in all, over both passes of a hires fix, and those done.
        client, weight: whose it is, and that client's share of the engine beside the others'.
        listener: called after each step, from the engine's thread; must be quick and not raise.
    """

    request: ImageRequest
    future: Future[Result] = field(default_factory=Future)
    steps: int = 0
    step: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    client: str = ""
    weight: float = 1.0
    listener: Callable[[], None] | None = None
    _model: Any = None
    _bucket: Hashable = ()
    _place: int = 0
    _withdrawn: deque[Ticket] = field(default_factory=deque)
    _since: float = 0.0
    _first_pass: int = 0
    _denoised: Tensor | None = None

    def cancel(self) -> None:
        """Take the request back; it leaves at the next step boundary and its future raises `Cancelled`.

        Cancelling the future itself has the same effect, only that it raises `CancelledError`.
        """
        self._withdrawn.append(self)

    @property
    def progress(self) -> float:
        """Share of the steps done, 0 to 1."""
        return self.step / self.steps if self.steps else 0.0

    def preview(self) -> Image.Image | None:
        """A picture of the current estimate of the result; None before the first step and after the last."""
        denoised = self._denoised
        return None if denoised is None else preview_image(self._model, denoised)

    def _settled(self, future: Future[Result]) -> None:
        """Called when the future is done, by whoever ended it."""
        if future.cancelled():
            self.cancel()

    def _advance(self, step: int, denoised: Tensor | None) -> None:
        self.step, self._denoised = step, denoised
        if self.listener is not None:
            self.listener()

    def _lap(self, phase: str) -> None:
        """Book the time since the last call."""
        now = time.perf_counter()
        self.timings[phase] = self.timings.get(phase, 0.0) + now - self._since
        self._since = now
