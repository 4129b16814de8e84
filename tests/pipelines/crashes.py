"""A store that dies or fails at its n-th call, and a way to run jobs that makes the n-th call always the same one."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffray.model.errors import StorageError
from diffray.pipelines import JobConfig, Store
from diffray.pipelines.making.worker import Share
from diffray.pipelines.models import Models

from .conftest import in_process


class Crash(BaseException):
    """The process dies here."""


class CrashingStore(Store):
    """At call number `at`, before or after it took effect: dies, or just fails once (`error`)."""

    def __init__(
        self,
        url: str,
        at: int,
        after: bool,
        *,
        error: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(url, options)
        self.at, self.after, self.error, self.calls = at, after, error, 0
        self.hit: object = None
        self._counting = threading.RLock()
        self._depth = threading.local()

    def begin(self) -> bool:
        """Count a call; True for the one at which it happens. The dead call nothing."""
        with self._counting:
            self.calls += 1
            if not self.error and 0 < self.at < self.calls:
                raise Crash
            return self.calls == self.at

    def happen(self) -> None:
        """Die, or fail."""
        raise StorageError("EIO: injected") if self.error else Crash


def _crashing(name: str) -> None:
    original = getattr(Store, name)

    def call(self: CrashingStore, *arguments: object) -> object:
        if getattr(self._depth, "inside", False):  # a verb that uses another one is one call
            return original(self, *arguments)
        now = self.begin()
        if now:
            self.hit = arguments[0] if arguments else ""
        if now and not self.after:
            self.happen()
        self._depth.inside = True
        try:
            result = original(self, *arguments)
        finally:
            self._depth.inside = False
        if now:
            self.happen()
        return result

    setattr(CrashingStore, name, call)


for _name in ("read", "exists", "list", "ages", "write", "put_if_absent", "remove"):
    _crashing(_name)


def in_turn(
    config: JobConfig, number: int, store: Store, models: Models, shares: Sequence[Share]
) -> Iterator[tuple[int, int]]:
    """One shard after the other, so that the n-th store call is always the same one."""
    for share in shares:
        for shard in share.shards:
            yield from in_process(config, number, store, models, [Share(share.model, [shard])])
