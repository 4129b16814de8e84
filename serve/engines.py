"""Engines in this process: one per loaded model, the least recently used making room for others."""

from __future__ import annotations

import asyncio
import io
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

from PIL import Image

from diffray.model import Engine, Result, Ticket, load_model, model_config
from diffray.model.config import ModelConfig

from .config import ServeConfig
from .refusal import Refusal
from .work import Event, Finished, ModelCard, Progress, Work

PREVIEW_SIDE = 512


@dataclass(eq=False)
class Loaded:
    """A running engine and how many images hold it."""

    engine: Engine
    checksum: str
    users: int = 0


class Engines:
    """A `Backend` in this process."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._loading = asyncio.Lock()
        self._configs: dict[str, ModelConfig] = {}
        self._checksums: dict[str, str] = {}

    async def cards(self) -> list[ModelCard]:
        """All models, the default one first."""
        return [await self._card(name) for name in self.config.names]

    async def _card(self, name: str) -> ModelCard:
        entry = self.config.models[name]
        if name not in self._configs:
            self._configs[name] = await asyncio.to_thread(model_config, entry.source, **entry.options)
        config = self._configs[name]
        return ModelCard(
            name=name,
            family=config.family,
            task=config.task,
            checksum=self._checksums.get(name, ""),
            width=config.defaults.width,
            height=config.defaults.height,
            steps=config.defaults.steps,
            guidance_scale=config.defaults.guidance_scale,
            sampler=config.defaults.sampler,
            schedule=config.defaults.schedule,
            factor=config.vae.factor,
            loaded=name in self._loaded,
        )

    async def run(self, work: Work) -> AsyncGenerator[Event, None]:
        """See `Backend.run`."""
        limit = self.config.limits.seconds if work.seconds is None else work.seconds
        deadline = time.monotonic() + limit
        async with self._held(work.model) as loaded:
            advanced = asyncio.Event()
            ticket = await asyncio.to_thread(loaded.engine.submit, work.request)
            future = asyncio.wrap_future(ticket.future)
            future.add_done_callback(lambda _: advanced.set())
            try:
                shown = -1
                while not future.done():
                    if time.monotonic() > deadline:
                        raise Refusal(504, "timeout", f"not finished within {limit:g} s")
                    if ticket.step != shown:
                        shown = ticket.step
                        yield Progress(shown, ticket.steps, await _preview(ticket, work))
                    advanced.clear()
                    with suppress(TimeoutError):
                        await asyncio.wait_for(advanced.wait(), 0.02)
                result = future.result()
            finally:
                if not future.done():
                    ticket.cancel()
                    future.cancel()
        data = await asyncio.to_thread(partial(_encoded, result, work))
        yield Finished(data, result.request, work.model, loaded.checksum, result.timings)

    @asynccontextmanager
    async def _held(self, name: str) -> AsyncIterator[Loaded]:
        if name not in self.config.models:
            raise Refusal(404, "model_not_found", f"there is no model {name!r}")
        async with self._loading:
            loaded = self._loaded.get(name)
            if loaded is None:
                loaded = self._loaded[name] = await asyncio.to_thread(self._load, name)
            self._loaded.move_to_end(name)
        loaded.users += 1
        try:
            yield loaded
        finally:
            loaded.users -= 1

    def _load(self, name: str) -> Loaded:
        entry = self.config.models[name]
        model = load_model(entry.source, device=entry.device, dtype=entry.dtype, **entry.options)
        self._checksums[name] = model.checksum
        return Loaded(Engine(model, batch_size=entry.batch_size).start(), model.checksum)

    async def close(self) -> None:
        """Finish what runs, free all models."""
        for loaded in self._loaded.values():
            await asyncio.to_thread(loaded.engine.close)
        self._loaded.clear()


async def _preview(ticket: Ticket, work: Work) -> bytes | None:
    if not work.preview_every or not ticket.step or ticket.step % work.preview_every:
        return None
    return await asyncio.to_thread(_small_jpeg, ticket)


def _small_jpeg(ticket: Ticket) -> bytes | None:
    image = ticket.preview()
    if image is None:
        return None
    image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=80)
    return sink.getvalue()


def _encoded(result: Result, work: Work) -> bytes:
    assert isinstance(result.image, Image.Image)
    sink = io.BytesIO()
    result.image.save(sink, work.format, **({} if work.format == "png" else {"quality": work.quality}))
    return sink.getvalue()
