"""A pool of text encoders for all engines of a job: equal prompts are encoded once, and engines need no towers.

Each prompt belongs to one encoder of the pool, by its hash, which works on one prompt at a time and remembers what it
encoded. An engine asks as soon as it has room for an image, before it submits it, and goes on denoising others
meanwhile. Ray starts a dead encoder again and repeats what it was asked; one that stays away is left for the
next after a minute. With no answer from any for `workers.start_timeout` the job stops, as it does without engines: it
can be resumed, and no row is blamed.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

from diffray.model.errors import DiffrayError, GenerationError, JobConflict, JobError

from ..hashing import text_hash
from ..metrics import PromptMeter
from ..models import Models, TextFacts, shown_name
from ..options import ModelOptions
from ..outputs.fingerprint import check_versions
from ..outputs.store import Store

if TYPE_CHECKING:
    import numpy as np

    from diffray.model.networks.text import Encoded

    Array = np.ndarray[Any, np.dtype[np.uint8]]

MEMORY = 2**30
"""Bytes of encoded prompts that one encoder remembers."""
PATIENCE = 60.0
"""Seconds after which an engine also asks the next encoder."""
LOOK = 1.0
"""Seconds between two looks at what is there while waiting."""

Key = tuple[str, int, tuple[Any, ...]]
"""Prompt, clip_skip, adapters."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What comes back for one prompt: an encoded one, or an error.

    Attributes:
        made_by: what the encoder is; it must be what the asking engine's own would be.
        known: it was encoded before, for somebody else.
        context, pooled: the tensors' bytes, a row of them for each row.
        fatal: the encoder did not start; the error is not the prompt's.
    """

    made_by: TextFacts | None = None
    known: bool = False
    dtype: str = ""
    context: Array | None = None
    pooled: Array | None = None
    chunks: int = 0
    error: DiffrayError | None = None
    fatal: bool = False

    def encoded(self) -> Encoded:
        """As the engine takes it."""
        import torch

        from diffray.model.networks.text import Encoded

        dtype = getattr(torch, self.dtype)
        assert self.context is not None, "an answer without an error has one"
        context, pooled = (
            # A copy, since the original is read-only memory that others share.
            None if array is None else torch.from_numpy(array.copy()).view(dtype)
            for array in (self.context, self.pooled)
        )
        assert context is not None
        return Encoded(context, pooled, self.chunks)


class TextActor:
    """The class that Ray runs: one text encoder of the pool. Used by one thread."""

    def __init__(
        self, models: Models, options: ModelOptions, store: Store, threads: int | None, patience: float
    ) -> None:
        self._failure: DiffrayError | None = None
        self._patience = patience
        try:
            if threads:
                import torch

                torch.set_num_threads(threads)
            check_versions(store)
            self._texts = models.open_texts(options, MEMORY)
            self._meter = PromptMeter(shown_name(options.source))
        except Exception as error:
            # Ray would not start it again, and the engines would not be told why.
            self._failure = _known(error)

    def encode(self, key: Key) -> Answer:
        """One prompt, encoded or remembered."""
        if self._failure is not None:
            return Answer(error=self._failure, fatal=True)
        faulthandler.dump_traceback_later(self._patience, exit=True)
        try:
            return self._answer(key)
        except Exception as error:
            if "CUDA" in str(error):
                # The device may be out of use for this process, so it has to go.
                print(f"text encoder gives up: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            return Answer(self._texts.facts, error=_known(error))
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _answer(self, key: Key) -> Answer:
        before = self._texts.runs
        encoded = self._texts.encode(*key)
        known = self._texts.runs == before
        self._meter.answered(known)
        dtype = str(encoded.context.dtype).removeprefix("torch.")
        context, pooled = (
            None if tensor is None else _bytes(tensor) for tensor in (encoded.context, encoded.pooled)
        )
        return Answer(self._texts.facts, known, dtype, context, pooled, encoded.chunks)


class Texts:
    """The pool as one engine asks it; called, it is what `load_model(text=...)` takes. Thread safe.

    Args:
        encoders: handles of the pool's actors.
        patience: seconds without any answer after which the job is given up.

    Attributes:
        expected: what an answer must be made by.
        waits: grows while somebody waits: a sign of life.
        counts: prompts that were "encoded" for this engine, and "shared": encoded before, for another.
    """

    def __init__(self, encoders: Sequence[Any], patience: float) -> None:
        self._encoders, self._patience = list(encoders), patience
        self.expected: TextFacts | None = None
        self.waits = 0
        self.counts: Counter[str] = Counter(encoded=0, shared=0)
        self._flights: dict[Key, Future[Encoded]] = {}
        self._lock = Lock()

    def __call__(self, prompt: str, clip_skip: int, adapters: tuple[Any, ...]) -> Encoded:
        """The encoded prompt; who asks for one that is being asked for waits for the same answer.

        Raises:
            DiffrayError: the encoder refused the prompt.
            JobConflict: the encoder is another than this engine's would be.
            JobError: there is no encoder.
        """
        key = prompt, clip_skip, adapters
        with self._lock:
            flight = self._flights.get(key)
            mine = flight is None
            if flight is None:
                flight = self._flights[key] = Future()
        if not mine:
            return flight.result()
        try:
            flight.set_result(self._read(self._ask(key)))
        except BaseException as error:
            flight.set_exception(error)
        finally:
            with self._lock:
                del self._flights[key]
        return flight.result()

    def _ask(self, key: Key) -> Answer:
        """The first answer, from the encoder whose prompt this is, or later from others too."""
        from ray.exceptions import ActorDiedError, RayError

        began, calls = time.monotonic(), dict[Future[Answer], int]()
        order = self._order(key)
        last = ""
        while order and (waited := time.monotonic() - began) < self._patience:
            for index in order[: 1 + int(waited / PATIENCE)]:
                if index not in calls.values():
                    calls[self._encoders[index].encode.remote(key).future()] = index
            done, _ = wait(calls, LOOK, FIRST_COMPLETED)
            for call in done:
                try:
                    return call.result()
                except RayError as error:  # the answer was lost on its way
                    index, last = calls.pop(call), f"{type(error).__name__}: {str(error).splitlines()[0]}"
                    if isinstance(error, ActorDiedError):  # for good; else Ray would have started it again
                        order.remove(index)
                    else:
                        time.sleep(LOOK)
            self.waits += 1
        raise JobError(
            f"text encoders: no answer after {time.monotonic() - began:.0f} s from {len(self._encoders)} of them"
            f"{f' ({last})' if last else ''}; `ray status` says what the cluster lacks"
        )

    def _order(self, key: Key) -> list[int]:
        """The encoders, the one that this prompt belongs to first."""
        home = text_hash(repr(key))  # repr escapes what cannot be encoded
        return [(home + index) % len(self._encoders) for index in range(len(self._encoders))]

    def _read(self, answer: Answer) -> Encoded:
        if answer.fatal:
            raise JobError(f"a text encoder does not start: {answer.error}")
        if self.expected is not None and answer.made_by != self.expected:
            theirs, ours = asdict(answer.made_by) if answer.made_by else {}, asdict(self.expected)
            lines = [f"  {k}: {theirs.get(k)} there, {v} here" for k, v in ours.items() if theirs.get(k) != v]
            raise JobConflict("\n".join(["a text encoder is not the one of this engine's model:", *lines]))
        if answer.error is not None:
            raise answer.error
        with self._lock:
            self.counts["shared" if answer.known else "encoded"] += 1
        return answer.encoded()


@contextmanager
def text_pool(
    count: int,
    options: Mapping[str, Any],
    models: Models,
    model: ModelOptions,
    store: Store,
    threads: int | None,
    patience: float,
) -> Iterator[Sequence[Any]]:
    """Handles of so many text encoders for a model, for the time of the block.

    Args:
        options: what each takes of the cluster.
        threads: torch threads on CPU: as many as the engines', since the last bits may depend on their number.
        patience: seconds after which one that still encodes the same prompt ends itself.
    """
    import ray

    kind: Any = ray.remote(TextActor)
    kind = kind.options(max_restarts=-1, max_task_retries=-1, **options)
    encoders = [kind.remote(models, model, store, threads, patience) for _ in range(count)]
    try:
        yield encoders
    finally:
        for encoder in encoders:
            ray.kill(encoder)


def _known(error: Exception) -> DiffrayError:
    return (
        error
        if isinstance(error, DiffrayError)
        else GenerationError(f"text: {type(error).__name__}: {error}")
    )


def _bytes(tensor: Any) -> Array:
    import torch

    array: Array = tensor.contiguous().view(torch.uint8).cpu().numpy()
    return array
