"""One driver per output directory.

Owners are numbered files, `_diffray/locks/00001.json` and on; the highest number owns the output. Taking over
is putting the next number, which only one of several can do. The number is also the number of this run of the
job, and workers commit nothing once a higher one is there.

A living owner rewrites its file every few seconds. Whoever wants the output watches that file by its own
clock: when it changes, the owner lives; when it does not for `LEASE` seconds, the owner is dead, on whatever
host it was. No two clocks are ever compared.

Where the owner was a process among those that this one sees, it is known at once whether it is gone. A hostname
is no proof of that, because containers may share one and have processes of their own: only Linux says which
processes a process sees, so elsewhere the owner is always watched.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path

from diffray.model.errors import JobConflict, StorageError

from .store import Store

LOCKS = "_diffray/locks"
BEAT = 10.0
"""Seconds between two signs of life."""
LEASE = 60.0
"""Seconds without one after which an owner is dead."""

_LOG = logging.getLogger(__name__)


class Lock:
    """The right to work on an output, from `acquire` to `release`. Also a context manager.

    Attributes:
        run: the number of this run.
        acquired: when it was acquired, by `time.monotonic`.
    """

    def __init__(self, store: Store, run: int) -> None:
        self._store = store
        self.run, self.acquired = run, time.monotonic()
        self._name = f"{LOCKS}/{run:05d}.json"
        self._mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "among": _among(),
            "since": datetime.now(UTC).isoformat("T", "seconds"),
            "token": uuid.uuid4().hex,
        }
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="lock", daemon=True)

    @classmethod
    def acquire(cls, store: Store, *, take_over: bool = False) -> Lock:
        """Become the owner. Waits up to `LEASE` seconds where only that can tell whether the last owner is dead.

        Raises:
            JobConflict: another driver owns the output and lives. `take_over` is the user's word that it does
                not, and saves the waiting.
            StorageError: the storage cannot create an object only if it is absent.
        """
        last = newest(store)
        if not take_over and (who := owner(store)) and _lives(store, last):
            raise JobConflict(f"{store.url} is being worked on by {who}; it shows signs of life")
        lock = cls(store, last + 1)
        if not store.put_if_absent(lock._name, json.dumps(lock._mine).encode()):
            who = owner(store) or "another driver"
            raise JobConflict(f"{store.url} was just now taken by {who}")
        if store.put_if_absent(lock._name, b"{}"):
            raise StorageError(
                f"{store.url}: this storage ignores If-None-Match and would let two drivers work at once"
            )
        lock._beating.start()
        return lock

    def release(self) -> None:
        """Let the next driver in."""
        self._ended.set()
        self._beating.join()
        self._store.write(self._name, json.dumps({"released": True}).encode())

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.release()
        except StorageError:
            if kind is None:  # else it would hide why the job ends; the lock goes stale by itself
                raise

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(BEAT):
            count += 1
            try:
                if newest(self._store) != self.run:
                    return  # taken over: workers see the higher number and stop
                self._store.write(self._name, json.dumps({**self._mine, "beat": count}).encode())
            except StorageError:
                continue  # perhaps the next one lands


def newest(store: Store) -> int:
    """The number of the newest owner, dead or alive; 0 when there was none."""
    return max(store.numbered(LOCKS), default=0)


def check_owner(store: Store, run: int) -> None:
    """Refuse to go on for a driver that was taken over.

    Raises:
        JobConflict: a newer driver owns the output.
    """
    if (last := newest(store)) != run:
        raise JobConflict(f"{store.url}: run {run} of the job was taken over by run {last}")


def owner(store: Store) -> str | None:
    """Who owns the output, or None when nobody does or the owner is dead as far as can be told here."""
    last = newest(store)
    if not last:
        return None
    record = _read(store, last)
    if record.get("released") or _dead_here(record):
        return None
    if not record:
        return "another driver"
    return f"process {record.get('pid')} on {record.get('host')} since {record.get('since')}"


def _lives(store: Store, last: int) -> bool:
    """Whether owner number `last` gives a sign of life, or ends or is replaced, within its lease."""
    before, until = _read(store, last), time.monotonic() + LEASE
    _LOG.warning(
        "%s may be at work for %s; watching for signs of life, %g s at most", owner(store), store.url, LEASE
    )
    while time.monotonic() < until:
        time.sleep(min(1.0, LEASE / 10))
        now = _read(store, last)
        if now.get("released") or newest(store) != last:
            return bool(owner(store))
        if now != before:
            return True
    return False


def _read(store: Store, number: int) -> dict[str, object]:
    name = f"{LOCKS}/{number:05d}.json"
    try:
        return dict(json.loads(store.read(name)))
    except FileNotFoundError:
        return {}  # rewritten at this moment, on a storage where that is not atomic: a sign of life
    except ValueError as error:
        raise JobConflict(f"{store.path(name)} is damaged: {error}") from None


def _among() -> str | None:
    """Which processes this one sees: the boot of the machine and the namespace of process ids; None if unknown."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _dead_here(record: dict[str, object]) -> bool:
    """Whether this process can prove that the owner is gone."""
    pid, among = record.get("pid"), _among()
    if among is None or record.get("among") != among or record.get("host") != socket.gethostname():
        return False
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
