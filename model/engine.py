"""The engine: step-level continuous batching of image requests.

Every tick takes the images of one bucket, runs the network once on all their branches, moves each image by
one row of its own sampler table, lets finished images leave and waiting ones join. Images with any mix of
samplers, step counts, guidance and tasks share a call; nobody waits for a stranger's steps. Size, text length
and adapters make the bucket: its adapters are merged into the weights before its call (`adapters/merging.py`).

The network is always called with the same number of rows (short calls are padded), text is encoded and
latents are decoded one image at a time: so an image's bytes do not depend on its batch mates, its slot or
when it joined.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from threading import Lock, RLock, Thread, current_thread
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

import torch
from PIL import Image
from torch import Tensor

from .adapters.choices import AdapterChoice
from .conditioning import encode_prompts
from .errors import Cancelled, CheckpointError, DiffrayError, GenerationError
from .images import pasted, to_image
from .latents import checked_latents, checked_size, decode, latents_of, ordinary, picture_of
from .precision import exact_float32
from .preparation import Prepared, checked, prepare, second_pass
from .queue import Queue
from .request import ImageRequest
from .rows import Rows, default_batch_size, default_rows
from .slots import Bucket, Slot, advance
from .tickets import Result, Ticket

if TYPE_CHECKING:
    from .weights.load import Model

T = TypeVar("T")

STARVATION = 8
"""A bucket that was passed over this many ticks goes next, however full another is."""


class Engine:
    """Generates images with one loaded model.

    Use `generate` for a list, or `submit` tickets and either call `step` yourself or let `start` run a
    background thread. Thread safe.

    Args:
        model: from `load_model`.
        batch_size: images denoised together; None picks by device and network size.
        rows: rows of one network call, fixed; None is where throughput levels off (`default_rows`). Another
            value may change the last bits of an image. Running out of memory halves it, which is logged and
            shows in `Result.rows`.
        compile: run the network through `torch.compile`.
        observer: called after each denoising step with the number of images in it and the seconds it took,
            from the engine's thread; must be quick and not raise.

    Raises:
        CheckpointError: the model needs conditioning that requests cannot carry (unCLIP).
    """

    def __init__(
        self,
        model: Model,
        *,
        batch_size: int | None = None,
        rows: int | None = None,
        compile: bool = False,
        observer: Callable[[int, float], None] | None = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("rows", rows)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, allowed is at least 1")
        if model.config.unet.added_kind == "projection":
            raise CheckpointError(
                f"{model.source}: unCLIP needs image embeddings, which are not supported yet"
            )
        self.model = model
        self.batch_size = batch_size or default_batch_size(model)
        unet = torch.compile(model.unet, dynamic=False) if compile else model.unet
        self.network = Rows(unet, rows or default_rows(model, self.batch_size), shorten=not compile)
        self._observer = observer
        self._queue = Queue()
        # One thread at a time, under _stepping.
        self._stepping = RLock()
        self._ready: deque[tuple[Ticket, Prepared]] = deque()
        """Second passes whose bucket is full."""
        self._buckets: dict[Hashable, Bucket] = {}
        self._finished: deque[tuple[Ticket, Prepared, Tensor]] = deque()
        self._ticks = 0
        self._switched = 0
        """When the network was given other adapters."""
        self._starting = Lock()
        self._thread: Thread | None = None

    # ---- asking -------------------------------------------------------------------------------------------

    def submit(
        self,
        request: ImageRequest,
        *,
        client: str = "",
        weight: float = 1.0,
        listener: Callable[[], None] | None = None,
    ) -> Ticket:
        """Queue one image.

        Args:
            client, weight: clients share the engine by cost, in proportion to their weights (above 0).
            listener: called after each step of this image, from the engine's thread.

        Raises:
            InvalidRequest: a value does not fit this model; nothing was queued.
            GenerationError: the engine is closed or broken.
        """
        ticket = self._checked(request)
        ticket.client, ticket.weight, ticket.listener = client, weight, listener
        self._queue.enter([ticket])
        return ticket

    def generate(self, requests: Iterable[ImageRequest]) -> list[Result]:
        """Generate all, in the order asked; every request is validated before the first step.

        Without a background thread the calling thread steps. When it is interrupted, what is not finished is
        cancelled.

        Raises:
            InvalidRequest: a request does not fit this model; nothing was generated.
            GenerationError: an image failed; raised after all others were finished.
        """
        tickets = [self._checked(request) for request in requests]
        # The longest first: all are waited for, and the last calls are fuller when short ones end the queue.
        self._queue.enter(sorted(tickets, key=lambda ticket: -ticket.request.cost))
        try:
            for ticket in tickets:
                while self._thread is None and not ticket.future.done():
                    self.step()
                with suppress(CancelledError):
                    ticket.future.exception()  # waits
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise
        return [ticket.future.result() for ticket in tickets]

    def prefetch(self, request: ImageRequest) -> None:
        """Have a request's prompts encoded now, in the calling thread, so that the engine does not wait for them.

        Only where they are encoded elsewhere (`load_model(text=...)`); else this does nothing.

        Raises:
            InvalidRequest: a value does not fit this model.
            Exception: what the encoder raises.
        """
        if self.model.text.elsewhere is not None:
            encode_prompts(self.model, checked(self.model, request)[0])

    def encode(
        self,
        image: Image.Image,
        *,
        width: int | None = None,
        height: int | None = None,
        seed: int | None = None,
    ) -> Future[Tensor]:
        """The autoencoder's latents of a picture, made between two steps of the denoising.

        Without a background thread they are made before this returns.

        Args:
            width, height: what the picture is resized to; None takes its own, floored to whole latents.
            seed: sample the posterior with the first noise of this seed, as image-to-image of that seed does;
                None takes its mode.

        Returns:
            [C, h, w] float32 on the CPU in the UNet's scale: what `ImageRequest.init_latents` takes.

        Raises:
            InvalidRequest: a size that the model does not have.
            GenerationError: the engine is closed or broken.
        """
        size = checked_size(self.model, image, width, height)
        return self._errand(lambda: latents_of(self.model, image, *size, seed))

    def decode(self, latents: Tensor) -> Future[Image.Image]:
        """The picture of latents [C, h, w] in the UNet's scale, made like `encode`'s.

        Raises:
            InvalidRequest: latents of another shape, or not finite.
            GenerationError: the engine is closed or broken.
        """
        checked = checked_latents(self.model, latents)
        return self._errand(lambda: picture_of(self.model, checked))

    def _errand(self, work: Callable[[], T]) -> Future[T]:
        future = self._queue.send(work)
        while self._thread is None and not future.done():
            with self._guarded():
                self._run_errand()
        return future

    def _checked(self, request: ImageRequest) -> Ticket:
        """The ticket of a request that fits the model, as far as can be told without running a network."""
        resolved, steps, bucket = checked(self.model, request)
        return Ticket(
            resolved, steps=steps, _model=self.model, _bucket=bucket, _withdrawn=self._queue.withdrawn
        )

    # ---- running ------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Step in a background thread until `close`."""
        with self._starting:
            if self._queue.closed:
                raise GenerationError("engine: closed (close was called)")
            if self._thread is None:
                self._thread = Thread(target=self._run, name="diffray-engine", daemon=True)
                self._thread.start()
        return self

    def close(self) -> None:
        """Finish what was submitted, then stop the background thread and take adapters out of the weights."""
        with self._starting:
            self._queue.close()
            thread = self._thread
        if thread is None:
            while self.step():
                pass
        elif thread is not current_thread():
            thread.join()
        with self._stepping, suppress(RuntimeError):  # of a device that failed for good
            self.model.adapters.restore()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._queue.withdraw_all()
        self.close()

    @property
    def rows(self) -> int:
        """Rows of one network call."""
        return self.network.size

    @property
    def waiting(self) -> int:
        """How many images wait to be begun."""
        return self._queue.waiting

    @property
    def running(self) -> int:
        """How many images were begun and are not finished."""
        return self._queue.unsettled - self._queue.waiting

    @property
    def ticks(self) -> int:
        """Steps begun so far, of any image; stands still when the engine has nothing to do, or hangs."""
        return self._ticks

    @property
    def failure(self) -> BaseException | None:
        """What stopped the engine for good: then no image's error is its own."""
        return self._queue.failure

    def step(self) -> bool:
        """One tick: admit, denoise one bucket by one step, decode finished images for about as long, run one errand.
        False when nothing is left.

        Raises:
            GenerationError: the network failed, and with it every image that was submitted.
        """
        with self._guarded():
            self._tick()
            return self._busy()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """One thread at a time; an error in here is the end of everything in flight."""
        with self._stepping, exact_float32(self.model.device):
            try:
                yield
            except BaseException as error:
                self._fail_all(error)
                if not isinstance(error, Exception):  # the caller was interrupted
                    raise
                raise GenerationError(f"engine stopped: {type(error).__name__}: {error}") from error

    @torch.inference_mode()
    def _tick(self) -> None:
        self._ticks += 1
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
        self._run_errand()

    def _busy(self) -> bool:
        images = self._queue.waiting or self._ready or self._buckets or self._finished
        return bool(images or self._queue.errands)

    def _run(self) -> None:
        while self._busy() or self._queue.wait():
            with suppress(GenerationError):  # every ticket was told
                self.step()

    def _fail_all(self, error: BaseException) -> None:
        """The process may be poisoned (sticky CUDA error) or a step half done: nothing in flight can go on."""
        self._ready.clear()
        self._buckets.clear()
        self._finished.clear()
        self._queue.fail(error)

    def _attempt(self, ticket: Ticket, what: str, work: Callable[[], T]) -> T | None:
        """`work()`; None and a failed ticket if it raises for a reason that is this image's own."""
        try:
            return work()
        except Exception as error:
            self._queue.settle(ticket, _own(error, what, ticket.request))
        return None

    def _run_errand(self) -> None:
        errand = self._queue.errand()
        if errand is None:
            return
        work, future = errand
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(_own(error, "autoencoder"))

    # ---- one tick -----------------------------------------------------------------------------------------

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
            prepared = self._attempt(ticket, "prepare", lambda own=ticket: prepare(self.model, own.request))  # type: ignore[misc]
            ticket._lap("prepare")
            if prepared is not None:
                self._place(ticket, prepared)

    def _fits(self, key: Hashable) -> bool:
        return key not in self._buckets or not self._buckets[key].full

    def _has_room(self) -> bool:
        """All images that hold memory on the device count, finished ones until they are decoded."""
        running = sum(len(bucket.slots) for bucket in self._buckets.values())
        return running + len(self._ready) + len(self._finished) < 2 * self.batch_size

    def _place(self, ticket: Ticket, prepared: Prepared) -> None:
        key = prepared.bucket
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = Bucket(prepared, self.batch_size)
            bucket.served = self._ticks
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
        merged = self.model.adapters.in_unet_now

        def urgency(bucket: Bucket) -> tuple[int, int, bool, int]:
            waited, has_adapters = self._ticks - bucket.served, bucket.adapters == merged
            return (waited if waited > STARVATION else 0, len(bucket.slots), has_adapters, waited)

        bucket = max(self._in_turn(), key=urgency)
        bucket.served = self._ticks
        if bucket.adapters != merged:
            self._switched = self._ticks
        return bucket

    def _in_turn(self) -> list[Bucket]:
        """The buckets whose adapters the network has, while these keep their turn; else all.

        They keep it for STARVATION ticks, for fewer if others have more images. Many sets of few images starve
        all the time: they would take turns at every tick, and each turn costs a merge.
        """
        images: Counter[tuple[AdapterChoice, ...]] = Counter()
        for bucket in self._buckets.values():
            images[bucket.adapters] += len(bucket.slots)
        merged = self.model.adapters.in_unet_now
        if (self._ticks - self._switched) * max(images.values()) >= STARVATION * images[merged]:
            return list(self._buckets.values())
        return [bucket for bucket in self._buckets.values() if bucket.adapters == merged]

    def _denoise(self, bucket: Bucket) -> None:
        try:
            with self.model.adapters.in_unet(bucket.adapters):
                advance(bucket, self.network, self.model.config.noise.prediction_type)
        except (torch.cuda.OutOfMemoryError, CheckpointError) as error:
            for slot in list(bucket.slots):
                bucket.remove(slot)
                self._queue.settle(slot.ticket, _own(error, "denoise", slot.prepared.request))
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
        second = second_pass(self.model, prepared.request, latents)
        return prepare(self.model, second, prepared.generator)

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
            image = self._attempt(ticket, "decode", lambda: to_image(decode(self.model, latents)))
            if image is None:
                return
            if request.paste_back and request.mask is not None and request.init_image is not None:
                image = pasted(image, request.init_image, request.mask)
        else:
            kept = ordinary(latents)
        ticket._lap("decode")
        self._queue.settle(ticket, Result(image, kept, request, dict(ticket.timings), self.rows))


def _own(error: Exception, what: str, request: ImageRequest | None = None) -> Exception:
    """The error of one image alone that `error`, raised by its own work, stands for.

    Raises:
        Exception: `error` itself where the device is to blame.
    """
    if isinstance(error, DiffrayError):
        return error
    if isinstance(error, torch.cuda.OutOfMemoryError):
        torch.cuda.empty_cache()
        size = "" if request is None else f"{request.width}x{request.height} "
        return GenerationError(f"{what}: {size}does not fit the device's memory: {error}")
    if "CUDA" in str(error):
        raise error
    # A source image that cannot be decoded, say.
    return GenerationError(f"{what}: {type(error).__name__}: {error}")
