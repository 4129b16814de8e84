"""Finding the row that kills its worker, and nobody else.

A process that dies cannot say which row it died of. So each attempt at a shard leaves a record before it
starts. Two deaths may be bad luck; after that the shard's rows run one at a time, alone in the worker, each
announced by a record of its own. A row that was alone at `limit` deaths is rejected, and the rest of the
shard runs together again.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffray.model.errors import JobError

from ..outputs.store import Store

PATIENCE = 2
"""Deaths of a shard as a whole, per killing row, before its rows are run alone."""


@dataclass(slots=True)
class Attempts:
    """The attempts at one shard, by all workers of all runs of the job so far.

    Attributes:
        deaths: image id to the number of workers that died while it was alone.
        reasons: image id to the last error recorded for it, where the process could still say one.
        verdicts: rejections of an earlier commit of this shard that stand, although it is made again.
    """

    store: Store
    shard: int
    run: int
    """Number of this run of the job; giving up looks at one run, so that kills of whole runs never add up."""
    limit: int
    deaths: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)
    verdicts: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    _together: int = 0
    _unexplained: int = 0
    _next: int = 0

    @classmethod
    def read(cls, store: Store, shard: int, run: int, limit: int, *, patient: bool = False) -> Attempts:
        """What is known so far.

        Raises:
            JobError: the shard keeps killing workers although no single row of it does, unless `patient`.
        """
        attempts = cls(store, shard, run, limit)
        for name in store.list(attempts._folder):
            attempts._count(json.loads(store.read(f"{attempts._folder}/{name}")))
            attempts._next = int(name.removesuffix(".json")) + 1
        if not patient and attempts._unexplained > PATIENCE * (len(attempts.killers) + 1) + limit:
            error = next(reversed(attempts.reasons.values()), "no error was recorded")
            raise JobError(f"shard {shard} keeps killing its worker, but no single row of it does: {error}")
        return attempts

    @property
    def killers(self) -> set[str]:
        """Images that are to be rejected."""
        return {image for image, deaths in self.deaths.items() if deaths >= self.limit}

    @property
    def alone(self) -> bool:
        """Whether the rows must run one at a time now."""
        return self._together >= PATIENCE * (len(self.killers) + 1)

    def begin(self) -> str:
        """Record that an attempt at the whole shard starts; returns the record's name."""
        return self._record({"mode": "alone" if self.alone else "together"})

    def begin_row(self, image: str) -> str:
        """Record that one image is about to run alone; returns the record's name."""
        return self._record({"row": image})

    def end_row(self, record: str) -> None:
        """Record that the image which ran alone did not kill its worker."""
        self.store.write(record, json.dumps({"done": True}).encode())

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

    def _count(self, record: dict[str, Any]) -> None:
        self.verdicts |= record.get("verdicts", {})
        row, here = record.get("row"), record.get("run") == self.run
        if isinstance(row, str):
            self.deaths[row] += 1
            self._unexplained -= here
        elif "mode" in record:
            self._together += record["mode"] == "together"
            self._unexplained += here
        if error := record.get("error"):
            self.reasons[str(row)] = str(error)
