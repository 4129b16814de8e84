"""Engines in this process: work in, events out."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from diffray.model import Cancelled, CheckpointError, GenerationError, Result, Ticket, model_config
from diffray.model.config import ModelConfig
from diffray.model.encoding import encode_image

from . import metrics
from .config import ServeConfig
from .guardrails import Guards
from .refusal import Refusal
from .residents import Loader, Resident, Residents, unavailable
from .work import Event, Finished, ModelCard, Progress, Work

T = TypeVar("T")
log = logging.getLogger("diffray.serve")
PREVIEW_SIDE = 512
PREVIEW_QUALITY = 80
ENGINE_DOWN = "engine_down"
"""It was broken before the image came to it."""
PATIENCE = 0.5
"""Of the time that one image may take: an engine that makes no step for so long hangs, and its images still have
time to be made elsewhere."""


class EngineHangs(GenerationError):
    """No step for so long that there will be none: the images in it never end."""


class Engines:
    """A `Backend` in this process. Belongs to one event loop.

    Args:
        renew: load a model again whose engine broke. Without, `check` raises from then on, for whoever replaces the
            whole process.

    Raises:
        InvalidConfig: a guardrail or a folder of adapters cannot be read.
    """

    def __init__(self, config: ServeConfig, load: Loader | None = None, *, renew: bool = True) -> None:
        self.config = config = config.listed()
        self.residents = Residents(config.models, config.memory, load)
        self._renew = renew
        self._guards = Guards(config.guardrails)
        self._configs: dict[str, ModelConfig] = {}
        self._started = False
        self._threads = ThreadPoolExecutor(max(4, os.cpu_count() or 1), "diffray-serve")
        self._previewing = asyncio.Semaphore(1)
        self._preview_failed = False

    async def start(self) -> None:
        """Check the adapters of all models, load the default model and warm it up.

        Raises:
            CheckpointError, GenerationError: it cannot be loaded, or makes no image, or an adapter does not fit.
        """
        for name in [name for name, entry in self.config.models.items() if entry.adapters]:
            try:
                await self._described(name)
            except CheckpointError as error:
                raise CheckpointError(f"model {name}: {error}") from None
        try:
            resident = await self.residents.enter(self.config.default_model)
        except Refusal as error:
            raise error.__cause__ or error from None
        await self.residents.leave(resident)
        self._started = True

    async def cards(self) -> list[ModelCard]:
        """All models that can be read, the default one first."""
        found = []
        for name in self.config.names:
            with suppress(Refusal):
                found.append(await self.model(name))
        return found

    async def model(self, name: str) -> ModelCard:
        """One model; see `Backend.model`."""
        if name not in self.config.models:
            raise no_such_model(name, self.config)
        try:
            config = await self._described(name)
        except CheckpointError as error:
            log.error("model %s cannot be read: %s", name, error)
            raise unavailable(name) from error
        resident = self.residents.get(name)
        return ModelCard(
            name=name,
            family=config.family,
            task=config.task,
            checksum=resident.checksum if resident else "",
            width=config.defaults.width,
            height=config.defaults.height,
            steps=config.defaults.steps,
            guidance_scale=config.defaults.guidance_scale,
            sampler=config.defaults.sampler,
            schedule=config.defaults.schedule,
            factor=config.vae.factor,
            loaded=resident is not None,
            adapters=tuple(sorted(self.config.models[name].adapter_sources)),
            config=config,
        )

    async def _described(self, name: str) -> ModelConfig:
        """What a model is, from its files' headers, and those of its adapters, which must fit.

        Raises:
            CheckpointError.
        """
        if name not in self._configs:
            entry = self.config.models[name]
            read = partial(model_config, entry.source, adapters=entry.adapter_sources, **entry.options)
            self._configs[name] = await asyncio.to_thread(read)
        return self._configs[name]

    async def run(self, work: Work) -> AsyncGenerator[Event, None]:
        """See `Backend.run`."""
        if work.model not in self.config.models:
            raise no_such_model(work.model, self.config)
        most = self.config.limits.seconds
        seconds = most if work.seconds is None else min(work.seconds, most)
        deadline = asyncio.get_running_loop().time() + seconds
        late = Refusal(504, "timeout", f"not finished within {seconds:g} s")
        try:
            async with asyncio.timeout_at(deadline):
                if self.residents.get(work.model):
                    metrics.MODEL_HITS.add(model=work.model)
                resident = await self.residents.enter(work.model)
        except TimeoutError:
            raise late from None
        try:
            advanced = asyncio.Event()
            ticket = await self._submit(resident, work, advanced)
            try:
                shown = -1
                while not ticket.future.done():
                    if ticket.step != shown:
                        due = not self._guards.images and _preview_due(work, shown, ticket.step)
                        shown = ticket.step
                        preview = await self._preview(ticket) if due else None
                        yield Progress(shown, ticket.steps, preview)
                    try:
                        async with asyncio.timeout_at(deadline):
                            await advanced.wait()
                    except TimeoutError:
                        raise late from None
                    advanced.clear()
                result = self._result(resident, ticket)
            finally:
                if not ticket.future.done():
                    ticket.cancel()
                    metrics.CANCELLED.add(model=work.model)
        finally:
            await self.residents.leave(resident)
            if self._renew and resident.engine.failure is not None:
                await self.residents.discard(resident)
        yield await self._thread(partial(self._finished, result, work, resident))

    async def _submit(self, resident: Resident, work: Work, advanced: asyncio.Event) -> Ticket:
        """The ticket of the work; whoever is cancelled meanwhile leaves none behind."""
        loop = asyncio.get_running_loop()

        def tell() -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(advanced.set)

        call = partial(
            resident.engine.submit, work.request, client=work.client, weight=work.weight, listener=tell
        )
        submitted = self._threads.submit(call)
        try:
            ticket = await asyncio.wrap_future(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(_take_back)
            raise
        except GenerationError as error:
            raise self._broken(resident, error, ENGINE_DOWN) from error
        ticket.future.add_done_callback(lambda _: tell())
        return ticket

    def _result(self, resident: Resident, ticket: Ticket) -> Result:
        try:
            return ticket.future.result()
        except Cancelled:
            raise Refusal(503, "cancelled", "the engine gave the image back", retry_after=1) from None
        except CheckpointError as error:  # adapters are read when they are first asked for
            log.error("an adapter of %s cannot be read: %s", resident.name, error)
            raise Refusal(
                503, "adapter_unavailable", "an adapter of this image cannot be read now", field="adapters"
            ) from error
        except GenerationError as error:
            metrics.FAILURES.add(model=resident.name)
            raise self._broken(resident, error) from error

    def _broken(self, resident: Resident, error: GenerationError, code: str = "engine_broken") -> Exception:
        """The error of one image, or of all: then another replica or a later time may do."""
        if resident.engine.failure is None:
            return error
        log.error("the engine of %s is broken: %s", resident.name, error)
        return Refusal(503, code, "the engine stopped and is being replaced", retry_after=10)

    def _finished(self, result: Result, work: Work, resident: Resident) -> Finished:
        assert result.image is not None, "the service refuses requests for latents"
        begun = time.perf_counter()
        self._guards.check_image(result.image, result.request)
        checksums = resident.adapters.checksums(adapter.name for adapter in result.request.adapters)
        data = encode_image(
            result.image,
            result.request,
            format=work.format,
            quality=work.quality,
            model=work.model,
            model_checksum=resident.checksum,
            adapter_checksums=checksums,
        )
        timings = result.timings | {"encode": time.perf_counter() - begun}
        for phase, seconds in timings.items():
            metrics.PHASE_SECONDS.observe(seconds, phase=phase)
        metrics.IMAGES.add(model=work.model)
        metrics.PIXELS.add(result.image.width * result.image.height, model=work.model)
        request = replace(result.request, init_image=None, mask=None, depth=None, init_latents=None)
        return Finished(data, request, work.model, resident.checksum, timings, checksums)

    async def _preview(self, ticket: Ticket) -> bytes | None:
        """One at a time, each in a thread that ends: its OpenMP team would slow the engine (`load_model`).

        None where there is none yet, or none could be made: that is no fault of the image.
        """
        async with self._previewing:
            apart = ThreadPoolExecutor(1, "diffray-preview")
            try:
                return await asyncio.get_running_loop().run_in_executor(apart, partial(_small_jpeg, ticket))
            except Exception as error:
                if not self._preview_failed:
                    log.error("a preview failed; later failures are not logged", exc_info=error)
                self._preview_failed = True
                return None
            finally:
                apart.shutdown(wait=False)

    async def _thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def check(self) -> None:
        """Whether images can be made: no engine is broken or hangs, and the accelerator answers.

        Waits at most for the steps that run now.

        Raises:
            GenerationError: the default model is not loaded yet, or an engine is broken.
            EngineHangs: one hangs.
            RuntimeError: the accelerator is (torch).
        """
        self.sample()
        if not self._started:
            raise GenerationError("the default model is not loaded yet")
        for resident in self.residents:
            if resident.engine.failure is not None:
                raise GenerationError(f"the engine of {resident.name} stopped: {resident.engine.failure}")
            if (seconds := resident.standstill()) > PATIENCE * self.config.limits.seconds:
                raise EngineHangs(f"the engine of {resident.name} hangs: no step for {seconds:.0f} s")
        if torch.cuda.is_available():
            await asyncio.to_thread(_touch_accelerator)

    def sample(self) -> None:
        """See `Backend.sample`."""
        for resident in self.residents:
            metrics.QUEUED_IMAGES.set(resident.engine.waiting, model=resident.name)
            metrics.RUNNING_IMAGES.set(resident.engine.running, model=resident.name)
            resident.measure()
        if torch.cuda.is_available():
            metrics.DEVICE_BYTES.set(torch.cuda.memory_reserved())

    async def close(self) -> None:
        """Finish what runs, free all models."""
        await self.residents.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def no_such_model(name: str, config: ServeConfig) -> Refusal:
    """The refusal of a model name."""
    known = ", ".join(config.names)
    return Refusal(
        404, "model_not_found", f"there is no model {name[:100]!r}, allowed is one of {known}", field="model"
    )


def _take_back(submitted: Future[Ticket]) -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()


def _preview_due(work: Work, before: int, now: int) -> bool:
    every = work.preview_every
    return bool(every) and now > 0 and now // every > max(before, 0) // every


def _small_jpeg(ticket: Ticket) -> bytes | None:
    image = ticket.preview()
    if image is None:
        return None
    image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=PREVIEW_QUALITY)
    return sink.getvalue()


def _touch_accelerator() -> None:
    torch.ones(1, device="cuda").sum().item()
