"""One record of each run of a job: how it was spread, how long it took, which engines it had, and what these did.

    _diffray/runs/00001.json         numbered like the run's lock; written once a minute, and at the run's end

Facts for reports: no image depends on them. A run whose driver was killed leaves its last minute's record, or none
if it was killed within its first.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from diffray.model.errors import StorageError

from .making.pools import EngineFacts, Pulse
from .options import Workers
from .outputs.store import Store

RUNS = "_diffray/runs"
WRITE_EVERY = 60.0


class RunRecord:
    """The record of the present run.

    The record's keys:
        run, started (UTC), outcome ("running", "finished" or "stopped"), error
        workers: as its config said, without the cluster's address
        images, rejected, shards: committed by this run
        seconds: of the run so far, and of its phases: "plan" (until the first engine was asked for, without
            "ray"), "ray" (starting it or connecting), "first_engine" and "first_image" (from then until one was
            ready, until the first image was made), "generate" (all of making images)
        machine_seconds: sum over engines of the time that each held its device, times its share of a GPU, and the
            same of the pool of text encoders; engines that died and those that waited for the last shard included
        engines: for each its model, node, accelerator and share, its state, the seconds of its start by phase
            (place, imports, fetch, load, first_image), its seconds in all and those busy, how full its slots
            were while busy, the images and rejected rows that it ended, and the prompts that were encoded for it
            or shared with others
    """

    def __init__(self, store: Store, run: int, began: float, workers: Workers) -> None:
        self._store, self._name = store, f"{RUNS}/{run:05d}.json"
        self._began, self._generating = began, time.monotonic()
        self._written = self._generating
        self._pulse: Pulse | None = None
        started = datetime.now(UTC).timestamp() - (self._generating - began)
        self._values: dict[str, Any] = {
            "run": run,
            "started": datetime.fromtimestamp(started, UTC).isoformat("T", "seconds"),
            "outcome": "running",
            "error": None,
            "workers": workers.model_dump(mode="json", exclude={"address"}),
            "images": 0,
            "rejected": 0,
            "shards": 0,
        }

    @contextmanager
    def written(self) -> Iterator[RunRecord]:
        """The block makes images; the record is complete when it ends, however it ends."""
        try:
            yield self
            self._values["outcome"] = "finished"
        except BaseException as error:
            said = str(error).split("\n")[0][:300]
            self._values |= {"outcome": "stopped", "error": f"{type(error).__name__}: {said}".rstrip(": ")}
            raise
        finally:
            self._write()

    def advance(self, images: int, rejected: int) -> None:
        """A shard was committed."""
        self._values["images"] += images
        self._values["rejected"] += rejected
        self._values["shards"] += 1

    def pulse(self, pulse: Pulse) -> None:
        """The engines were looked at."""
        self._pulse = pulse
        if time.monotonic() - self._written >= WRITE_EVERY:
            self._write()

    def _write(self) -> None:
        """The record may lag behind, but never stands in the way of the job."""
        self._written = time.monotonic()
        with suppress(StorageError):
            self._store.write(self._name, (json.dumps(self._record(), indent=1) + "\n").encode())

    def _record(self) -> dict[str, Any]:
        now, pulse = time.monotonic(), self._pulse or Pulse((), 0, 0)
        engines = [_engine(facts) for facts in pulse.engines]
        ready = [sum(e.start.values()) for e in pulse.engines if e.start]
        first = [
            sum(e.start.values()) + e.reading.first_image
            for e in pulse.engines
            if e.reading.first_image is not None
        ]
        generating = now - self._generating
        seconds = {
            "all": now - self._began,
            "plan": self._generating - self._began,
            "ray": pulse.ray,
            "first_engine": min(ready, default=None),
            "first_image": min(first, default=None),
            "generate": generating,
        }
        engine_seconds = sum(e.seconds * e.share for e in pulse.engines)
        text_seconds = pulse.texts * max(0.0, generating - pulse.ray)
        return {
            **self._values,
            "seconds": {name: None if spent is None else round(spent, 3) for name, spent in seconds.items()},
            "machine_seconds": round(engine_seconds + text_seconds, 3),
            "engines": engines,
        }


def prompts(runs: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many prompts were "encoded" and "shared" in these runs, as far as their engines lived to say."""
    engines = [engine for run in runs for engine in run.get("engines", ())]
    return dict(sum((Counter(engine.get("prompts", {})) for engine in engines), Counter()))


def last_workers(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`workers` of the job config as the last of these runs had them, where it says."""
    return next((dict(run["workers"]) for run in reversed(runs) if "workers" in run), {})


def read_runs(store: Store) -> list[dict[str, Any]]:
    """The records of all runs, the first one first; damaged ones are left out."""
    found = []
    for number in store.numbered(RUNS):
        with suppress(ValueError):
            found.append(json.loads(store.read(f"{RUNS}/{number:05d}.json")))
    return found


def _engine(facts: EngineFacts) -> dict[str, Any]:
    reading = facts.reading
    start = dict(facts.start)
    if reading.first_image is not None:
        start["first_image"] = round(reading.first_image, 3)
    return {
        "name": facts.name,
        "model": facts.model,
        "node": facts.node,
        "accelerator": facts.accelerator,
        "state": facts.state,
        "share": facts.share,
        "start": start,
        "seconds": round(facts.seconds, 3),
        "busy_seconds": round(reading.busy, 3),
        "occupancy": round(reading.occupancy, 4),
        "images": reading.images,
        "rejected": sum(reading.rejected.values()),
        "prompts": dict(reading.prompts),
    }
