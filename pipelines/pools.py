"""Pools of engine actors, one for each model, seen from the driver.

The driver hands out shards one call at a time (`backlog.py`) and replaces engines that die. A pool grows while
shards wait and the cluster has room: engines that do not fit yet stay asked for, which is what Ray's cluster
autoscaler looks at. When a model has nothing left for an engine, its room goes to the next model at once. An
engine's death costs its shards' images that are not committed, and nothing else.
"""

from __future__ import annotations

import itertools
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from diffray.model.errors import JobError

from .backlog import Backlog
from .config import ModelOptions
from .tally import Reading
from .worker import Share

TICK = 1.0
"""Seconds between two looks at every engine's tally."""
STARTS = 3
"""Engines in a row, per engine of the pool, that may die before they are ready."""


class Ended(NamedTuple):
    """A shard was committed with so many images and rejected rows."""

    images: int
    rejected: int


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """One engine, from being asked for to its end.

    Attributes:
        state: "starting", "running", "finished", or what it died of.
        seconds: since its process began, or in all if it ended; 0 while it waits for room.
        start: seconds of each phase of its start: "place" (until its process was there), "imports", "fetch",
            "load".
    """

    name: str
    model: str
    state: str
    seconds: float
    node: str = ""
    accelerator: str = ""
    start: dict[str, float] = field(default_factory=dict)
    reading: Reading = field(default_factory=Reading)


@dataclass(frozen=True, slots=True)
class Pulse:
    """How the pools are, about once a second.

    Attributes:
        engines: all that this run ever had.
        waiting: shards that no engine holds.
    """

    engines: tuple[EngineFacts, ...]
    waiting: int


@dataclass(frozen=True, slots=True)
class Arrived:
    """What an actor says when its constructor has ended: `failure` is a pickled error, or None."""

    node: str = ""
    accelerator: str = ""
    imports: float = 0.0
    start: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    """Since its process began to import diffray."""
    failure: bytes | None = None


class Engine:
    """The driver's side of one actor."""

    def __init__(self, name: str, model: ModelOptions, handle: Any) -> None:
        self.name, self.model, self.handle = name, model, handle
        self.asked = time.monotonic()
        self.arriving: Any = handle.arrived.remote()
        self.arrived: Arrived | None = None
        self.began: float | None = None
        self.calls: dict[Any, int] = {}
        self.asking: Any = None
        self.reading = Reading()
        self._looked = 0.0
        self._ended: tuple[float, str] | None = None

    def make(self, shard: int) -> None:
        """Have it make a shard."""
        self.calls[self.handle.make.remote(shard)] = shard

    def look(self) -> None:
        """Ask for its tally, at most once a tick and once at a time."""
        now = time.monotonic()
        if self.arrived and self.asking is None and now - self._looked >= TICK:
            self._looked, self.asking = now, self.handle.reading.remote()

    def welcome(self, arrived: Arrived) -> None:
        """It is ready."""
        self.arrived, self.began = arrived, time.monotonic() - arrived.seconds

    def end(self, state: str) -> None:
        """Stop it, and remember why."""
        import ray

        self._ended = (time.monotonic(), state)
        ray.kill(self.handle)

    @property
    def facts(self) -> EngineFacts:
        """Everything about it that others may know."""
        until, state = self._ended or (time.monotonic(), "running" if self.arrived else "starting")
        facts = EngineFacts(self.name, self.model.source, state, until - self.began if self.began else 0.0)
        if (arrived := self.arrived) is None or self.began is None:
            return facts
        start = {"place": max(0.0, self.began - self.asked), "imports": arrived.imports, **arrived.start}
        return EngineFacts(
            facts.name,
            facts.model,
            state,
            facts.seconds,
            arrived.node,
            arrived.accelerator,
            {phase: round(seconds, 3) for phase, seconds in start.items()},
            self.reading,
        )


class Pools:
    """Makes every share's shards; iterate over `run` once.

    Args:
        shares: what is to be made, in the order in which models get engines.
        launch: starts an actor for a model and returns its handle.
        most: how many engines there may be at this moment, all pools together.
        least: with fewer than this many up, `patience` seconds long, the job is given up.
        in_flight: shards that one engine holds at most.
    """

    def __init__(
        self,
        shares: Sequence[Share],
        launch: Callable[[ModelOptions], Any],
        *,
        most: Callable[[], int],
        least: int = 1,
        patience: float = 1800.0,
        in_flight: int = 4,
    ) -> None:
        self._backlogs = [(share.model, Backlog(share.shards, in_flight)) for share in shares]
        self._launch, self._most = launch, most
        self._least, self._patience = least, patience
        self._engines: dict[str, tuple[Engine, Backlog]] = {}
        self._past: list[EngineFacts] = []
        self._names = itertools.count(1)
        self._failed_starts = 0
        self._enough = time.monotonic()

    def run(self) -> Iterator[Ended | Pulse]:
        """Yields every shard as it is committed, and a pulse about once a second.

        Raises:
            DiffrayError: whatever stopped an engine, as it was raised there.
            JobError: no engines, or none that starts.
        """
        pulsed = 0.0
        try:
            while any(backlog.left for _, backlog in self._backlogs):
                self._assign()
                self._retire()
                self._hire()
                yield from self._wait()
                self._insist()
                if time.monotonic() - pulsed >= TICK:
                    yield self.pulse()
                    pulsed = time.monotonic()
            self._last_look()
        finally:
            for name in list(self._engines):
                self._dismiss(name, "finished")
        yield self.pulse()

    def pulse(self) -> Pulse:
        """The state at this moment."""
        now = (engine.facts for engine, _ in self._engines.values())
        return Pulse((*self._past, *now), sum(backlog.waiting for _, backlog in self._backlogs))

    # ---- giving work --------------------------------------------------------------------------------------

    def _assign(self) -> None:
        """Fill the engines, the fastest first, and move shards to those that have nothing to do."""
        now = time.monotonic()
        ready = [(engine, backlog) for engine, backlog in self._engines.values() if engine.arrived]
        ready.sort(key=lambda pair: pair[1].pace(pair[0].name))
        hungry = ready
        while hungry:  # in rounds, so that no engine gets its second before another its first
            taken = [(pair, pair[1].take(pair[0].name, now)) for pair in hungry]
            hungry = [pair for pair, shard in taken if shard is not None]
            for (engine, _), shard in taken:
                if shard is not None:
                    engine.make(shard)
        for engine, backlog in ready:
            if (found := backlog.recall(engine.name, now)) is not None:
                holder, shard = found
                self._engines[holder][0].handle.give_back.remote(shard)

    def _retire(self) -> None:
        """Engines whose model has nothing for them make room."""
        others_wait = any(backlog.waiting for _, backlog in self._backlogs)
        for name, (engine, backlog) in list(self._engines.items()):
            idle = not engine.calls and not backlog.waiting
            if idle and (others_wait or not engine.arrived or not backlog.left):
                self._dismiss(name, "finished")

    def _hire(self) -> None:
        """Ask for engines while shards wait for one and there is room."""
        room = self._most() - len(self._engines)
        for model, backlog in self._backlogs:
            coming = sum(own is backlog and not e.arrived for e, own in self._engines.values())
            for _ in range(min(room, backlog.waiting - coming)):
                room -= 1
                engine = Engine(str(next(self._names)), model, self._launch(model))
                self._engines[engine.name] = engine, backlog

    # ---- hearing from engines -----------------------------------------------------------------------------

    def _wait(self) -> Iterator[Ended]:
        """Everything that happened within a tick."""
        import ray

        owners: dict[Any, Engine] = {}
        for engine, _ in self._engines.values():
            engine.look()
            for reference in (engine.asking, *engine.calls, *([] if engine.arrived else [engine.arriving])):
                if reference is not None:
                    owners[reference] = engine
        if not owners:
            time.sleep(TICK / 10)
            return
        references = list(owners)
        happened, _ = ray.wait(references, num_returns=1, timeout=TICK)
        if happened:
            happened, _ = ray.wait(references, num_returns=len(references), timeout=0)
        for reference in happened:
            engine = owners[reference]
            if engine.name not in self._engines:
                continue  # lost, as an earlier one of these said
            try:
                answer: Any = ray.get(reference)
            except ray.exceptions.RayError as error:
                self._lost(engine, error)
                continue
            if reference is engine.asking:
                engine.asking, engine.reading = None, answer
            elif reference is engine.arriving:
                self._arrive(engine, answer)
            else:
                yield from self._end(engine, reference, answer)

    def _arrive(self, engine: Engine, arrived: Arrived) -> None:
        if arrived.failure is not None:
            raise pickle.loads(arrived.failure)
        self._failed_starts = 0
        engine.welcome(arrived)
        self._engines[engine.name][1].join(engine.name)

    def _end(self, engine: Engine, call: Any, answer: Any) -> Iterator[Ended]:
        shard, backlog = engine.calls.pop(call), self._engines[engine.name][1]
        ended, failure = answer
        if failure is not None:
            raise pickle.loads(failure)
        if ended is None:
            backlog.give_back(engine.name, shard)
        else:
            backlog.done(engine.name, shard, time.monotonic())
            yield Ended(*ended)

    def _lost(self, engine: Engine, error: Exception) -> None:
        """An engine is dead, or as good as dead; its shards go to others."""
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        if not engine.arrived:
            self._failed_starts += 1
        self._dismiss(engine.name, f"died: {reason[:300]}")
        if self._failed_starts >= STARTS * (len(self._engines) + 1):
            raise JobError(f"{self._failed_starts} engines in a row died while they started: {error}")

    def _dismiss(self, name: str, state: str) -> None:
        engine, backlog = self._engines.pop(name)
        backlog.leave(name)
        engine.end(state)
        self._past.append(engine.facts)

    def _insist(self) -> None:
        """Give up when there have been too few engines for too long."""
        now = time.monotonic()
        up = sum(engine.arrived is not None for engine, _ in self._engines.values())
        left = sum(backlog.left for _, backlog in self._backlogs)
        if up >= min(self._least, left):
            self._enough = now
        elif now - self._enough > self._patience:
            raise JobError(
                f"{up} engines are up, at least {self._least} asked for, after {self._patience:g} s; "
                f"`ray status` says what the cluster lacks"
            )

    def _last_look(self) -> None:
        """The final tallies, as far as they come at once."""
        import ray

        asked = {
            engine.handle.reading.remote(): engine for engine, _ in self._engines.values() if engine.arrived
        }
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=2 * TICK) if asked else ([], [])
        for reference in ready:
            try:
                asked[reference].reading = ray.get(reference)
            except ray.exceptions.RayError:
                continue
