"""The engine: step-level continuous batching of image requests.

Here is what its users and threads see: tickets go into the queue (`queue.py`) from any thread; one thread at a
time moves the images in flight (`flight.py`) by one step.

The network is always called with the same number of rows (short calls are padded), text is encoded and
latents are decoded one image at a time: so an image's bytes do not depend on its batch mates, its slot or
when it joined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from threading import Lock, RLock, Thread, current_thread
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

import torch
from PIL import Image
from torch import Tensor

from .conditioning import encode_prompts
from .errors import CheckpointError, GenerationError
from .flight import Flight, own_error
from .latents import checked_latents, checked_size, latents_of, picture_of
from .precision import exact_float32
from .preparation import checked
from .queue import Queue
from .request import ImageRequest
from .rows import Rows, default_batch_size, default_rows
from .tickets import Result, Ticket

if TYPE_CHECKING:
    from .weights.load import Model

T = TypeVar("T")


class Engine:
    """Generates images with one loaded model.

    Use `generate` for a list, or `submit` tickets and either call `step` yourself or let `start` run a
    background thread. Thread safe.

    Args:
        model: from `load_model`.
        batch_size: images denoised together; None picks by device and network size.
        rows: rows of one network call, fixed; None is where throughput levels off (`default_rows`). Another
            value may change the last bits of an image. Running out of memory halves them for latents of that
            shape, which is logged and shows in `Result.rows`.
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
        self._queue = Queue()
        self._flight = Flight(model, self.network, self._queue, self.batch_size, observer)
        self._stepping = RLock()
        """Held by the one thread that works on the flight and on errands."""
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
        """Rows of one network call, where memory never ran out."""
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
        return self._flight.ticks

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
            self._flight.tick()
            self._run_errand()
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

    def _busy(self) -> bool:
        return bool(self._flight or self._queue.waiting or self._queue.errands)

    def _run(self) -> None:
        while self._busy() or self._queue.wait():
            with suppress(GenerationError):  # every ticket was told
                self.step()

    def _fail_all(self, error: BaseException) -> None:
        """The process may be poisoned (sticky CUDA error) or a step half done: nothing in flight can go on."""
        self._flight.clear()
        self._queue.fail(error)

    def _run_errand(self) -> None:
        errand = self._queue.errand()
        if errand is None:
            return
        work, future = errand
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(own_error(error, "autoencoder"))
