"""Finding the row that kills its worker, and nobody else.

A process that dies cannot say which row it died of. So each attempt at a shard leaves a record before it
starts. Two deaths may be bad luck; after that the shard's rows run one at a time, alone in the worker, each
announced by a record of its own. A row that was alone at `limit` deaths is rejected, and the rest of the
shard runs together again.

A death counts, in whatever run of the job it was, if it was the worker's own: it named its error, or its run
lived on, which the shard's next attempt in the same run shows. Where nothing follows, the whole run was killed,
by a time limit or a preemption, and whichever row was being made then is not to blame.

A row that takes the whole run down with it, driver and all, looks just the same and never leads to a verdict:
rows that other engines made at that moment would look as guilty. But runs that all die before an engine has
made even its first shard get nowhere, whatever kills them, so after `FUTILE` times `limit` of them the job
stops and says so. A higher `limit` lets it try on.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffray.model.errors import JobError

from .store import Store

PATIENCE = 2
"""Deaths of a shard as a whole, per killing row, before its rows are run alone."""
FUTILE = 3
"""Runs, per death allowed to a row, that may be killed while the shard is the first one of an engine."""


@dataclass(slots=True)
class Attempts:
    """The attempts at one shard, by all workers of all runs of the job so far.

    Attributes:
        deaths: image id to the number of workers that died of their own while it was alone.
        reasons: image id to the last error recorded for it, where the process could still say one.
        verdicts: rejections of an earlier commit of this shard that stand, although it is made again.
    """

    store: Store
    shard: int
    run: int
    """Number of this run of the job."""
    limit: int
    deaths: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)
    verdicts: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    _together: int = 0
    _unexplained: int = 0
    _first: set[object] = field(default_factory=set)
    """Runs in which the shard was the first one of an engine."""
    _killed: set[object] = field(default_factory=set)
    """Runs that were killed as a whole while it was made."""
    _next: int = 0

    @classmethod
    def read(cls, store: Store, shard: int, run: int, limit: int, *, patient: bool = False) -> Attempts:
        """What is known so far.

        Raises:
            JobError: the shard keeps killing workers in this run although no single row of it does, or runs
                get nowhere with it, unless `patient`.
        """
        attempts = cls(store, shard, run, limit)
        names = store.list(attempts._folder)
        attempts._next = int(names[-1].removesuffix(".json")) + 1 if names else 0
        records = [json.loads(store.read(f"{attempts._folder}/{name}")) for name in names]
        last = {record.get("run"): place for place, record in enumerate(records)}
        for place, record in enumerate(records):
            attempts._count(record, last=place == last[record.get("run")])
        if patient:
            return attempts
        if attempts._unexplained > PATIENCE * (len(attempts.killers) + 1) + limit:
            error = next(reversed(attempts.reasons.values()), "no error was recorded")
            raise JobError(f"shard {shard} keeps killing its worker, but no single row of it does: {error}")
        if (futile := len(attempts._first & attempts._killed)) >= FUTILE * limit:
            raise JobError(
                f"{futile} runs were killed while shard {shard} was the first that an engine made: either they "
                "end before one shard can be made, or a row of it takes the whole run down, by the memory that "
                f"it needs, say; workers.crashes above {futile // FUTILE} lets the job try on"
            )
        return attempts

    @property
    def killers(self) -> set[str]:
        """Images that are to be rejected."""
        return {image for image, deaths in self.deaths.items() if deaths >= self.limit}

    @property
    def alone(self) -> bool:
        """Whether the rows must run one at a time now."""
        return self._together >= PATIENCE * (len(self.killers) + 1)

    def begin(self, *, first: bool = False) -> str:
        """Record that an attempt at the whole shard starts, `first` if its worker holds no older one; returns the
        record's name."""
        return self._record({"mode": "alone" if self.alone else "together", "first": first})

    def begin_row(self, image: str) -> str:
        """Record that one image is about to run alone; returns the record's name."""
        return self._record({"row": image})

    def end_row(self, record: str) -> None:
        """Record that an attempt, at one image or at all, did not kill its worker."""
        self.store.write(record, json.dumps({"done": True, "run": self.run}).encode())

    def blame(self, record: str, error: str) -> None:
        """Record the error that the worker is about to die of."""
        values = json.loads(self.store.read(record))
        self.store.write(record, json.dumps({**values, "error": error[:500]}).encode())

    def uphold(self, verdicts: Mapping[str, Mapping[str, Any]]) -> None:
        """Record rejections that the next attempt takes over: image id to stage, field, reason and attempts."""
        self._record({"verdicts": verdicts})

    @property
    def _folder(self) -> str:
        return f"_diffray/attempts/{self.shard:05d}"

    def _record(self, values: dict[str, Any]) -> str:
        # The token tells the records of two workers apart that write the same one at once.
        data = json.dumps({**values, "run": self.run, "token": uuid.uuid4().hex}).encode()
        while True:
            name = f"{self._folder}/{self._next:05d}.json"
            self._next += 1
            if self.store.put_if_absent(name, data):
                return name

    def _count(self, record: dict[str, Any], *, last: bool) -> None:
        """Take in a record; `last` of its run's, so that only what it says itself tells how it ended."""
        self.verdicts |= record.get("verdicts", {})
        row, run, error = record.get("row"), record.get("run"), record.get("error")
        here = run == self.run
        killed = last and not here and not error
        if isinstance(row, str):
            self.deaths[row] += not killed
            self._unexplained -= here
        elif "mode" in record:
            self._together += record["mode"] == "together" and not killed
            self._unexplained += here
            self._first |= {run} if record.get("first") else set()
        if killed and not record.get("done"):
            self._killed.add(run)
        if error:
            self.reasons[str(row)] = str(error)
