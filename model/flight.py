"""The images in flight: admitted, denoised bucket by bucket, decoded.

Every tick takes the images of one bucket, runs the network once on all their branches, moves each image by
one row of its own sampler table, lets finished images leave and waiting ones join. Images with any mix of
samplers, step counts, guidance and tasks share a call; nobody waits for a stranger's steps. Size, text length
and adapters make the bucket: its adapters are merged into the weights before its call (`adapters/merging.py`).
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, TypeVar

import torch
from PIL import Image
from torch import Tensor

from .adapters.choices import AdapterChoice
from .errors import Cancelled, CheckpointError, DiffrayError, GenerationError, OutOfMemory
from .images import pasted, to_image
from .latents import decode, ordinary
from .preparation import Prepared, prepare, second_pass
from .queue import Queue
from .request import ImageRequest
from .rows import Rows, is_out_of_memory
from .slots import Bucket, Slot, advance
from .tickets import Result, Ticket

if TYPE_CHECKING:
    from .weights.load import Model

T = TypeVar("T")

STARVATION = 8
"""A bucket that was passed over this many ticks goes next, however full another is."""


class Flight:
    """What an engine works on, from a ticket's leaving the queue until it is settled. One thread at a time.

    Args:
        batch_size: images of one bucket that are denoised together.
        observer: called after each denoising step with the number of images in it and the seconds it took.

    Attributes:
        ticks: how many were begun.
    """

    def __init__(
        self,
        model: Model,
        network: Rows,
        queue: Queue,
        batch_size: int,
        observer: Callable[[int, float], None] | None,
    ) -> None:
        self.ticks = 0
        self._model = model
        self._network = network
        self._queue = queue
        self._batch_size = batch_size
        self._observer = observer
        self._ready: deque[tuple[Ticket, Prepared]] = deque()
        """Second passes whose bucket is full."""
        self._buckets: dict[Hashable, Bucket] = {}
        self._finished: deque[tuple[Ticket, Prepared, Tensor]] = deque()
        self._switched = 0
        """When the network was given other adapters."""

    def __bool__(self) -> bool:
        return bool(self._ready or self._buckets or self._finished)

    def clear(self) -> None:
        """Forget all images; nobody settles them here."""
        self._ready.clear()
        self._buckets.clear()
        self._finished.clear()

    @torch.inference_mode()
    def tick(self) -> None:
        """Admit, denoise one bucket by one step, decode finished images for about as long.

        Raises:
            Exception: what is no image's own fault; then none in flight can go on.
        """
        self.ticks += 1
        self._drop_withdrawn()
        self._admit()
        bucket, seconds = self._next_bucket(), 0.0
        if bucket is not None:
            images, begun = len(bucket.slots), time.perf_counter()
            self._denoise(bucket)
            seconds = time.perf_counter() - begun
            if self._observer is not None:
                self._observer(images, seconds)
        self._decode_finished(seconds)

    def _drop_withdrawn(self) -> None:
        """Cancelled images leave, wherever they are."""
        gone = self._queue.leavers()
        if not gone:
            return
        self._ready = deque(entry for entry in self._ready if entry[0] not in gone)
        self._finished = deque(entry for entry in self._finished if entry[0] not in gone)
        for bucket in self._buckets.values():
            for slot in [slot for slot in bucket.slots if slot.ticket in gone]:
                bucket.remove(slot)
        self._forget_empty()
        for ticket in gone:
            self._queue.settle(ticket, Cancelled(f"cancelled after {ticket.step} of {ticket.steps} steps"))

    def _admit(self) -> None:
        """Prepare waiting images that can be placed at once; who is prepared earlier would keep others out.

        With nothing to denoise, what is finished is decoded first: otherwise images of few steps would start
        one by one, as the one decoded in each tick makes room, and never share a call.
        """
        if not self._buckets and len(self._finished) > 1:
            return
        for _ in range(len(self._ready)):
            self._place(*self._ready.popleft())
        while self._has_room() and (ticket := self._queue.take(self._fits)):
            ticket._lap("queue")
            prepared = self._attempt(ticket, "prepare", lambda own=ticket: prepare(self._model, own.request))  # type: ignore[misc]
            ticket._lap("prepare")
            if prepared is not None:
                self._place(ticket, prepared)

    def _fits(self, key: Hashable) -> bool:
        return key not in self._buckets or not self._buckets[key].full

    def _has_room(self) -> bool:
        """All images that hold memory on the device count, finished ones until they are decoded."""
        running = sum(len(bucket.slots) for bucket in self._buckets.values())
        return running + len(self._ready) + len(self._finished) < 2 * self._batch_size

    def _place(self, ticket: Ticket, prepared: Prepared) -> None:
        key = prepared.bucket
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = Bucket(prepared, self._batch_size)
            bucket.served = self.ticks
        if bucket.full:
            self._ready.append((ticket, prepared))
        else:
            ticket._lap("queue")
            bucket.add(ticket, prepared)

    def _next_bucket(self) -> Bucket | None:
        """The fullest bucket, unless some have starved: then the one that waits longest.

        Among equally full ones, that whose adapters the network has already.
        """
        if not self._buckets:
            return None
        merged = self._model.adapters.in_unet_now

        def urgency(bucket: Bucket) -> tuple[int, int, bool, int]:
            waited, has_adapters = self.ticks - bucket.served, bucket.adapters == merged
            return (waited if waited > STARVATION else 0, len(bucket.slots), has_adapters, waited)

        bucket = max(self._in_turn(), key=urgency)
        bucket.served = self.ticks
        if bucket.adapters != merged:
            self._switched = self.ticks
        return bucket

    def _in_turn(self) -> list[Bucket]:
        """The buckets whose adapters the network has, while these keep their turn; else all.

        They keep it for STARVATION ticks, for fewer if others have more images. Many sets of few images starve
        all the time: they would take turns at every tick, and each turn costs a merge.
        """
        images: Counter[tuple[AdapterChoice, ...]] = Counter()
        for bucket in self._buckets.values():
            images[bucket.adapters] += len(bucket.slots)
        merged = self._model.adapters.in_unet_now
        if (self.ticks - self._switched) * max(images.values()) >= STARVATION * images[merged]:
            return list(self._buckets.values())
        return [bucket for bucket in self._buckets.values() if bucket.adapters == merged]

    def _denoise(self, bucket: Bucket) -> None:
        try:
            with self._model.adapters.in_unet(bucket.adapters):
                advance(bucket, self._network, self._model.config.noise.prediction_type)
        except (RuntimeError, CheckpointError) as error:
            if not isinstance(error, CheckpointError) and not is_out_of_memory(error):
                raise
            for slot in list(bucket.slots):
                bucket.remove(slot)
                self._queue.settle(slot.ticket, own_error(error, "denoise", slot.prepared.request))
        for slot in list(bucket.slots):
            slot.ticket._advance(slot.ticket._first_pass + slot.steps_done, slot.denoised)
            if slot.done:
                self._finish(slot, bucket.remove(slot))
        self._forget_empty()

    def _forget_empty(self) -> None:
        self._buckets = {key: bucket for key, bucket in self._buckets.items() if bucket.slots}

    # ---- finished images ----------------------------------------------------------------------------------

    def _finish(self, slot: Slot, latents: Tensor) -> None:
        ticket, prepared = slot.ticket, slot.prepared
        finite = bool(latents.isfinite().all())  # waits for the device
        ticket._lap("denoise")
        if not finite:
            self._queue.settle(ticket, GenerationError("denoised latents: got non-finite values"))
        elif prepared.request.hires_scale is not None:
            ticket._first_pass = prepared.table.steps
            again = self._attempt(ticket, "second pass", lambda: self._second(prepared, latents))
            ticket._lap("prepare")
            if again is not None:
                self._ready.append((ticket, again))
        else:
            self._finished.append((ticket, prepared, latents))

    def _second(self, prepared: Prepared, latents: Tensor) -> Prepared:
        second = second_pass(self._model, prepared.request, latents)
        return prepare(self._model, second, prepared.generator)

    def _decode_finished(self, seconds: float) -> None:
        """One image, and more while that takes no longer than a step took: those that began together end together,
        and with little left to do they should not wait for each other, nor those that run much for them."""
        until = time.perf_counter() + seconds
        while self._finished:
            self._decode(*self._finished.popleft())
            if time.perf_counter() >= until:
                return

    def _decode(self, ticket: Ticket, prepared: Prepared, latents: Tensor) -> None:
        request, image, kept = ticket.request, None, None
        if request.output == "image":
            image = self._attempt(ticket, "decode", lambda: self._picture(request, latents))
            if image is None:
                return
        else:
            kept = ordinary(latents)
        ticket._lap("decode")
        self._queue.settle(
            ticket, Result(image, kept, request, dict(ticket.timings), self._network.rows_of(latents))
        )

    def _picture(self, request: ImageRequest, latents: Tensor) -> Image.Image:
        image = to_image(decode(self._model, latents))
        if request.paste_back and request.mask is not None and request.init_image is not None:
            return pasted(image, request.init_image, request.mask)
        return image

    def _attempt(self, ticket: Ticket, what: str, work: Callable[[], T]) -> T | None:
        """`work()`; None and a failed ticket if it raises for a reason that is this image's own."""
        try:
            return work()
        except Exception as error:
            self._queue.settle(ticket, own_error(error, what, ticket.request))
        return None


def own_error(error: Exception, what: str, request: ImageRequest | None = None) -> Exception:
    """The error of one image alone that `error`, raised by its own work, stands for.

    Raises:
        Exception: `error` itself where the device is to blame.
    """
    if isinstance(error, DiffrayError):
        return error
    if is_out_of_memory(error):
        torch.cuda.empty_cache()
        size = "" if request is None else f"{request.width}x{request.height} "
        return OutOfMemory(f"{what}: {size}does not fit the device's memory: {error}")
    if "CUDA" in str(error):
        raise error
    # A source image that cannot be decoded, say.
    return GenerationError(f"{what}: {type(error).__name__}: {error}")
