"""A pool of engine actors on Ray Data, seen from the driver.

The dataset's rows are turns. Ray Data owns the actors: it starts them, adds and removes them with the work and
the cluster, restarts those that die and replays their turns. Which shard a turn makes is decided when it
really begins, by the board (`board.py`).
"""

from __future__ import annotations

import math
import pickle
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from diffray.model.errors import JobError

from .tally import Reading

if TYPE_CHECKING:
    from ray.data import Dataset

TURNS = 1000
"""Turns of a long job; each then makes several shards."""
PATIENCE = 20.0
"""Seconds that a job which is stopped, or has nothing left to make, waits for its turns to end."""


class Ended(NamedTuple):
    """A shard was committed with so many images and rejected rows."""

    images: int
    rejected: int


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """One engine, from the birth of its process.

    Attributes:
        state: "starting", "running", "lost" (dead or silent), or "finished".
        seconds: since its process began to import diffray, or in all if it ended.
        share: of a GPU, or GPUs, that it holds; 1 on CPU.
        accelerator: the GPU's own name, or Ray's until its model is loaded; empty on CPU.
        start: seconds of each phase of its start: "place" (from asking for the pool until its process was
            there), "imports", "fetch", "load".
    """

    name: str
    model: str
    state: str
    seconds: float = 0.0
    share: float = 1.0
    node: str = ""
    accelerator: str = ""
    start: dict[str, float] = field(default_factory=dict)
    reading: Reading = field(default_factory=Reading)


@dataclass(frozen=True, slots=True)
class Pulse:
    """How a run's pools are, about once a second.

    Attributes:
        engines: all that this run ever had.
        waiting, running: shards that no engine holds, and those that one does.
        ray: seconds that it took to start Ray or to connect to it.
        texts: what the pool of text encoders holds, in the unit of an engine's share.
    """

    engines: tuple[EngineFacts, ...]
    waiting: int
    running: int
    ray: float = 0.0
    texts: float = 0.0


class Pool:
    """Makes the shards of one model.

    Args:
        dataset: of a number of turns; each row of it says how many shards a turn may make, and comes back with a
            pickled error or None as `failure`.
        board: handle of the `Board`.
        model: name for the facts.
        share: of a GPU that an engine holds.
        least: with fewer engines than this for `patience` seconds the job is given up.
    """

    def __init__(
        self, dataset: Dataset, board: Any, *, model: str, share: float, least: int, patience: float
    ) -> None:
        self._board, self._model, self._share = board, model, share
        self._least, self._patience = least, patience
        self._enough = self._left = time.monotonic()
        self._seen: set[int] = set()
        self._board_began, self._listed = 0.0, 0
        self._answered = 0.0
        self._rows: queue.Queue[Any] = queue.Queue()
        self._thread = threading.Thread(target=self._iterate, args=(dataset,), name="pool", daemon=True)

    def run(self) -> Iterator[Ended | Pulse]:
        """Yields every shard as it is committed, and about once a second how the pool is.

        A pool that is stopped lets its turns end, and tells what these still committed before it raises. One that has
        nothing left to make does not wait long for turns of an engine that starts again, or hangs as it does.

        Raises:
            DiffrayError: whatever stopped an engine, as it was raised there.
            RayError: what stopped Ray Data.
            JobError: too few engines for too long.
        """
        from ray.exceptions import RayError

        self._thread.start()
        try:
            row: Any = ()
            while row is not None and self._answered - self._left < PATIENCE:
                row = self._next_row()
                yield from self._look("running")
        except GeneratorExit:
            self._close()  # nobody listens any more
            raise
        except BaseException:
            if self._close():
                with suppress(RayError):
                    yield from self._look("finished", PATIENCE)
            raise
        self._close()
        yield from self._look("finished")

    def _close(self) -> bool:
        """Let the turns end; whether the board still answers."""
        import ray
        from ray.exceptions import RayError

        try:
            ray.get(self._board.close.remote(), timeout=PATIENCE)
        except RayError:
            return False
        finally:
            self._thread.join(PATIENCE)
        return True

    def _iterate(self, dataset: Dataset) -> None:
        """In a thread of its own, since iterating blocks."""
        try:
            for row in dataset.iter_rows():
                self._rows.put(row)
            self._rows.put(None)
        except BaseException as error:
            self._rows.put(error)

    def _next_row(self) -> Any:
        """An ended turn, None after the last one, or () when none ended within a second."""
        try:
            row = self._rows.get(timeout=1.0)
        except queue.Empty:
            return ()
        if isinstance(row, BaseException):
            raise row
        if row is not None and row["failure"] is not None and (failure := pickle.loads(row["failure"])):
            raise failure
        return row

    def _look(self, state: str, timeout: float | None = None) -> Iterator[Ended | Pulse]:
        """What the board says, at most about once a second while turns end faster."""
        import ray

        if state == "running" and time.monotonic() - self._answered < 0.5:
            return
        found: dict[str, Any] = ray.get(
            self._board.look.remote(self._board_began, self._listed), timeout=timeout
        )
        self._answered = time.monotonic()
        self._board_began, self._listed = found["began"], found["listed"]
        for shard, images, rejected in found["ended"]:
            if shard not in self._seen:
                self._seen.add(shard)
                yield Ended(images, rejected)
        engines = tuple(self._facts(name, known, state) for name, known in found["engines"].items())
        yield Pulse(engines, found["waiting"], found["running"])
        if left := found["waiting"] + found["running"]:
            self._left = self._answered
        if state == "running":
            self._check_enough(engines, left)

    def _check_enough(self, engines: Sequence[EngineFacts], shards: int) -> None:
        """Give up with too few engines for too long."""
        up = sum(engine.state == "running" for engine in engines)
        if up >= min(self._least, shards):
            self._enough = self._answered
        elif self._answered - self._enough > self._patience:
            raise JobError(
                f"{up} engines are up, at least {self._least} wanted, after {self._patience:g} s; "
                "`ray status` says what the cluster lacks"
            )

    def _facts(self, name: str, known: dict[str, Any], state: str) -> EngineFacts:
        reading = Reading(**known["reading"]) if "reading" in known else Reading()
        start = {"place": known["place"], **known.get("start", {})}
        seconds: float = (
            sum(known.get("start", {}).values()) + reading.up if "reading" in known else known["seconds"]
        )
        return EngineFacts(
            name=name,
            model=self._model,
            state=state if known["state"] == "running" else known["state"],
            seconds=seconds,
            share=self._share,
            node=known["node"],
            accelerator=known["accelerator"],
            start={phase: round(spent, 3) for phase, spent in start.items()},
            reading=reading,
        )


def turns(shards: Sequence[int], engines: int, in_flight: int) -> list[dict[str, int]]:
    """Rows for a pool: enough turns for all shards, and as many again as engines can have in hand.

    The latter wait while others work: a shard that becomes free late, because its engine died or gave it back,
    has a turn to go to on any engine.
    """
    each = math.ceil(len(shards) / TURNS)
    count = math.ceil(len(shards) / each) + 2 * in_flight * engines
    return [{"turn": turn, "shards": each} for turn in range(count)]
