"""The models that one process holds: loaded when asked for, the least recently used making room for others.

Loading happens in a thread and in one place: who asks for a model that is being loaded waits for it, who asks for
another is not disturbed. A model in use is never dropped; when all are in use, the least recently used one takes
no new images until it is free, so that nobody waits for ever.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from diffray.model import (
    CheckpointError,
    DiffrayError,
    Engine,
    ImageRequest,
    Model,
    inspect_source,
    load_model,
)
from diffray.model.adapters.merging import Adapters

from . import metrics
from .config import Memory, ModelEntry
from .refusal import Refusal

log = logging.getLogger("diffray.serve")
SHARE = 0.8
"""Of the device's memory that weights may take when the config does not say; the rest is for activations."""
WARM_SIDE = 256


@dataclass(eq=False)
class Resident:
    """A model in memory, with a running engine."""

    name: str
    engine: Engine
    checksum: str
    adapters: Adapters
    weights: int
    """Bytes of the networks."""
    users: int = 0
    leaving: bool = False
    _ticks: int = -1
    _since: float = 0.0

    def standstill(self) -> float:
        """Seconds without a step although images wait, as far as this was called meanwhile."""
        now, engine = time.monotonic(), self.engine
        if self._ticks != engine.ticks or not (engine.waiting or engine.running):
            self._ticks, self._since = engine.ticks, now
        return now - self._since

    @property
    def bytes(self) -> int:
        """All that it takes now: adapters are read when they are first asked for."""
        return self.weights + self.adapters.bytes

    def measure(self) -> None:
        """Bring its gauges up to date."""
        metrics.MODEL_BYTES.set(self.bytes, model=self.name)
        metrics.ADAPTER_BYTES.set(self.adapters.bytes, model=self.name)


Loader = Callable[[str, ModelEntry], Resident]


class Residents:
    """Models by name. Belongs to one event loop."""

    def __init__(self, models: dict[str, ModelEntry], memory: Memory, load: Loader | None = None) -> None:
        self._models = models
        self._most = memory.models
        self._bytes = int(memory.gigabytes * 1e9) if memory.gigabytes else int(SHARE * device_memory())
        self._load = load or load_resident
        self._held: OrderedDict[str, Resident] = OrderedDict()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._reserved: dict[str, int] = {}
        """Bytes of models that are being read; those that only wait for room have none."""
        self._arriving: Counter[str] = Counter()
        """How many waited while a model was read and have not entered yet: until then it is in use."""
        self._changed = asyncio.Condition()

    def get(self, name: str) -> Resident | None:
        """The model if it is in memory now."""
        return self._held.get(name)

    def __iter__(self) -> Iterator[Resident]:
        """Those in memory now, the least recently used first."""
        return iter(list(self._held.values()))

    async def enter(self, name: str) -> Resident:
        """The model, loaded if need be; it stays until `leave`.

        Raises:
            Refusal: 503, it cannot be loaded.
        """
        arriving = False
        try:
            while True:
                async with self._changed:
                    resident = self._held.get(name)
                    if resident is not None and (arriving or not resident.leaving):
                        self._held.move_to_end(name)
                        resident.users += 1
                        return resident
                    if resident is None and name not in self._loading:
                        self._begin(name)
                    task = self._loading.get(name)
                    if task is None:
                        await self._changed.wait()
                    elif not arriving:
                        arriving = True
                        self._arriving[name] += 1
                if task is not None:
                    await asyncio.shield(task)
        finally:
            if arriving:
                self._arriving[name] -= 1
                async with self._changed:
                    self._changed.notify_all()

    def _idle(self, resident: Resident) -> bool:
        return not resident.users and not self._arriving[resident.name]

    async def leave(self, resident: Resident) -> None:
        """The end of an `enter`. Models that adapters have made too large together give way."""
        resident.users -= 1
        resident.measure()
        async with self._changed:
            surplus = self._surplus()
            for leaver in surplus:
                del self._held[leaver.name]
            self._changed.notify_all()
        for leaver in surplus:
            await self._drop(leaver)

    async def discard(self, resident: Resident) -> None:
        """Let go of a model whose engine is broken; it is loaded again when it is next asked for."""
        async with self._changed:
            if self._held.get(resident.name) is not resident:
                return
            del self._held[resident.name]
            self._changed.notify_all()
        log.error(
            "model %s: its engine is broken and is made anew: %s", resident.name, resident.engine.failure
        )
        await self._drop(resident)

    def _surplus(self) -> list[Resident]:
        """Idle models that must go until the others fit, the least recently used first, never the last one used."""
        over = self._taken() - self._bytes
        found = []
        for resident in list(self._held.values())[:-1]:
            if over > 0 and self._idle(resident):
                found.append(resident)
                over -= resident.bytes
        return found

    def _begin(self, name: str) -> None:
        task = self._loading[name] = asyncio.create_task(self._bring(name))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever waits sees it

    async def _bring(self, name: str) -> None:
        try:
            await self._make_room(name, await self._needed(name))
            metrics.MODEL_LOADS.add(model=name)
            resident = await asyncio.to_thread(self._load, name, self._models[name])
            self._reserved.pop(name)
            self._held[name] = resident
            resident.measure()
        except Exception as error:
            known = isinstance(error, DiffrayError)
            log.error("model %s cannot be loaded: %s", name, error, exc_info=None if known else error)
            raise unavailable(name) from error
        finally:
            async with self._changed:
                del self._loading[name]
                self._reserved.pop(name, None)
                self._changed.notify_all()

    async def _needed(self, name: str) -> int:
        """Bytes that its weights will take, from its headers."""
        entry = self._models[name]
        try:
            inspection = await asyncio.to_thread(inspect_source, entry.source)
        except CheckpointError:
            return 0
        gpu = entry.device.startswith("cuda") or (entry.device == "auto" and torch.cuda.is_available())
        return inspection.parameters * (4 if entry.dtype == "float32" or not gpu else 2)

    async def _make_room(self, name: str, needed: int) -> None:
        """Reserve bytes for a model, dropping others until it fits; one too large for all of it comes alone."""
        while not self._fits(needed):
            async with self._changed:
                leaver = next((r for r in self._held.values() if self._idle(r)), None)
                if leaver is None:
                    if oldest := next(iter(self._held.values()), None):
                        oldest.leaving = True
                    await self._changed.wait()
                    continue
                del self._held[leaver.name]
                self._changed.notify_all()
            await self._drop(leaver)
        self._reserved[name] = needed
        for resident in self._held.values():
            resident.leaving = False  # whoever else needs room asks again
        async with self._changed:
            self._changed.notify_all()

    def _fits(self, needed: int) -> bool:
        count = len(self._held) + len(self._reserved)
        return not count or (count < self._most and self._taken() + needed <= self._bytes)

    def _taken(self) -> int:
        return sum(resident.bytes for resident in self._held.values()) + sum(self._reserved.values())

    async def _drop(self, resident: Resident) -> None:
        await asyncio.to_thread(resident.engine.close)
        for metric in (
            metrics.MODEL_BYTES,
            metrics.ADAPTER_BYTES,
            metrics.QUEUED_IMAGES,
            metrics.RUNNING_IMAGES,
        ):
            metric.set(0, model=resident.name)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    async def close(self) -> None:
        """Finish what runs, then let everything go."""
        while self._held:
            await self._drop(self._held.popitem()[1])


def load_resident(name: str, entry: ModelEntry) -> Resident:
    """Read the weights, start the engine, and make one small picture, which must come out finite.

    Raises:
        CheckpointError, GenerationError.
    """
    model = load_model(
        entry.source,
        device=entry.device,
        dtype=entry.dtype,
        adapters=entry.adapter_sources,
        **entry.options,
    )
    engine: Engine

    def observe(images: int, seconds: float) -> None:
        metrics.STEP_SECONDS.observe(seconds, model=name)
        metrics.OCCUPANCY.observe(images / engine.batch_size, model=name)

    engine = Engine(model, batch_size=entry.batch_size, observer=observe).start()
    try:
        engine.generate([warm_up(model)])
    except BaseException:
        engine.close()
        raise
    return Resident(name, engine, model.checksum, model.adapters, _weight_bytes(model))


def warm_up(model: Model) -> ImageRequest:
    """The smallest request that touches every network of a model."""
    config = model.config
    side = min(WARM_SIDE, config.defaults.width)
    source = Image.new("RGB", (side, side), "gray")
    if config.task == "upscale":
        return ImageRequest(prompt="warm-up", steps=2, init_image=source.resize((side // 4, side // 4)))
    return ImageRequest(
        prompt="warm-up",
        steps=2,
        width=side,
        height=side,
        init_image=None if config.task == "text" else source,
        mask=Image.new("L", (side, side), 255) if config.task == "inpaint" else None,
        depth=source.convert("L") if config.task == "depth" else None,
    )


def unavailable(name: str) -> Refusal:
    """The refusal of a model that exists and cannot be had; the log says why."""
    return Refusal(503, "model_unavailable", f"model {name} cannot be loaded now", retry_after=30)


def device_memory() -> int:
    """Bytes of the accelerator, or of what this process may use of the machine's memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return machine


def _weight_bytes(model: Model) -> int:
    networks = (model.unet, model.vae, model.text, model.preview)
    return sum(
        p.numel() * p.element_size()
        for network in networks
        if network is not None
        for p in network.parameters()
    )
