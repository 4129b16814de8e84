"""A model that draws noise from the seed: the engine's API without its weight.

Words in a prompt make it misbehave: POISON fails that image, KILL ends the process, BREAK stops the engine,
SLOW takes its time, BLANK draws one colour.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffray.model.config import Defaults, ModelConfig, NoiseConfig, UNetConfig, VAEConfig
from diffray.model.errors import GenerationError
from diffray.model.request import ImageRequest
from diffray.pipelines.models import Models, OpenModel
from diffray.pipelines.options import ModelOptions

CONFIG = ModelConfig(
    family="sd1",
    task="text",
    unet=UNetConfig(
        in_channels=4,
        out_channels=4,
        channels=(32,),
        down=((1,),),
        mid_resnets=2,
        mid_depth=1,
        up=((1, 1),),
        heads=(1,),
        context_dim=32,
        linear_projection=False,
        cross_attention_only=(False,),
        added_dim=None,
        added_kind=None,
        class_count=None,
        guidance_dim=None,
        norm_groups=32,
    ),
    vae=VAEConfig(
        image_channels=3,
        latent_channels=4,
        channels=(32, 32, 32, 32),
        resnets=1,
        quant_conv=True,
        scale=1.0,
        shift=0.0,
        latents_mean=None,
        latents_std=None,
        force_upcast=False,
        norm_groups=32,
    ),
    text=(),
    noise=NoiseConfig(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        train_steps=1000,
        zero_terminal_snr=False,
        prediction_type="epsilon",
    ),
    defaults=Defaults(
        width=16,
        height=16,
        steps=4,
        guidance_scale=5.0,
        sampler="euler",
        schedule="linspace",
        schedule_for_all=False,
    ),
    zero_empty_negative=False,
    aesthetic_score=False,
    prediction_decided_by="default",
)


@dataclass
class FakeResult:
    image: Image.Image
    request: ImageRequest
    timings: dict[str, float]


@dataclass
class FakeTicket:
    request: ImageRequest
    future: Future[FakeResult] = field(default_factory=Future)


class FakeEngine:
    rows = 2
    batch_size = 2
    poisonous = True

    def __init__(self, log: str | None) -> None:
        self._log = log
        self.failure: BaseException | None = None
        self.ticks = 0
        self._closing = threading.Event()
        self._queue: queue.Queue[FakeTicket | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: ImageRequest) -> FakeTicket:
        ticket = FakeTicket(request.resolved(CONFIG))
        self._queue.put(ticket)
        return ticket

    def close(self) -> None:
        self._closing.set()
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (ticket := self._queue.get()) is not None:
            if not ticket.future.set_running_or_notify_cancel():
                continue
            try:
                ticket.future.set_result(self._make(ticket.request))
            except Exception as error:
                ticket.future.set_exception(error)

    def _make(self, request: ImageRequest) -> FakeResult:
        if self.failure is not None:
            raise GenerationError("engine stopped")
        self.ticks += 1
        if self._log:
            with open(self._log, "a") as file:
                file.write(f"{request.seed} {os.getpid()}\n")
        if "SLOW" in request.prompt:
            time.sleep(0.15)
        if "HANG" in request.prompt:
            self._closing.wait()
            raise GenerationError("engine closed")
        if "POISON" in request.prompt and self.poisonous:
            raise GenerationError("denoised latents: got non-finite values")
        if "KILL" in request.prompt:
            os._exit(9)
        if "BREAK" in request.prompt:
            self.failure = RuntimeError("CUDA error: device-side assert")
            raise GenerationError("engine stopped: CUDA error: device-side assert")
        rng = np.random.default_rng(request.seed)
        pixels = rng.integers(0, 255, (request.height, request.width, 3), dtype=np.uint8)
        if "BLANK" in request.prompt:
            pixels[:] = (1, 2, 3)
        if request.init_image is not None:
            pixels = _repainted(pixels, request)
        return FakeResult(Image.fromarray(pixels), request, {"denoise": 0.001})

    def encode(self, image: Image.Image, *, width: int | None, height: int | None) -> Future[Any]:
        """Each channel's mean over 8 x 8 pixels, and a fourth of zeros: exact for flat pictures."""
        small = image.resize(
            ((width or image.width) // 8, (height or image.height) // 8), Image.Resampling.BOX
        )
        planes = np.asarray(small, dtype=np.float32).transpose(2, 0, 1) / 255
        return _done(torch.from_numpy(np.concatenate([planes, 0 * planes[:1]])))

    def decode(self, latents: Any) -> Future[Any]:
        planes = (latents[:3].numpy() * 255).round().astype(np.uint8).transpose(1, 2, 0)
        return _done(Image.fromarray(planes.repeat(8, axis=0).repeat(8, axis=1)))


def _repainted(noise: Any, request: ImageRequest) -> Any:
    """The source, with noise where the mask is white, or half and half without one."""
    assert request.init_image is not None
    source = np.asarray(request.init_image.convert("RGB").resize((request.width, request.height), 0))
    if request.mask is None:
        return source // 2 + noise // 2
    white = np.asarray(request.mask.convert("L").resize((request.width, request.height), 0)) >= 128
    return np.where(white[..., None], noise, source)


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class FakeModels(Models):
    """Options: `log` (a file that gets a line per image begun), `weights` (stands for the checksum)."""

    def config(self, options: ModelOptions) -> Any:
        return CONFIG

    def checksum(self, options: ModelOptions) -> str:
        return str(options.options.get("weights", "w0"))

    def open(self, options: ModelOptions) -> OpenModel:
        engine: Any = FakeEngine(options.options.get("log"))
        adapters = self.identity(options).get("adapters", {})
        return OpenModel(engine, "fake", self.checksum(options), "cpu", "float32", adapters)
