"""One driver per output directory.

Owners are numbered files, `_diffray/locks/00001.json` and on; the highest number owns the output. Taking
over a dead owner's lock is putting the next number, which only one of several can do. The number is also
the number of this run of the job.
"""

from __future__ import annotations

import json
import os
import socket
from datetime import UTC, datetime

from diffray.model.errors import JobConflict

from .store import Store

LOCKS = "_diffray/locks"


class Lock:
    """The right to work on an output, from `acquire` to `release`. Also a context manager.

    Attributes:
        run: the number of this run.
    """

    def __init__(self, store: Store, run: int) -> None:
        self._store = store
        self.run = run

    @classmethod
    def acquire(cls, store: Store, *, take_over: bool = False) -> Lock:
        """Become the owner.

        Raises:
            JobConflict: another driver owns the output and is alive, or cannot be seen from this host;
                `take_over` is the user's word that it is dead.
        """
        names = store.list(LOCKS)
        last = int(names[-1].removesuffix(".json")) if names else 0
        if (who := owner(store)) and not take_over:
            raise JobConflict(_owned(store, who))
        lock = cls(store, last + 1)
        mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat("T", "seconds"),
        }
        if not store.put_if_absent(lock._name, json.dumps(mine).encode()):
            raise JobConflict(_owned(store, owner(store) or "another driver, just now"))
        return lock

    def release(self) -> None:
        """Let the next driver in."""
        self._store.write(self._name, json.dumps({"released": True}).encode())

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def _name(self) -> str:
        return f"{LOCKS}/{self.run:05d}.json"


def owner(store: Store) -> str | None:
    """Who owns the output now, or None when nobody does or the owner is dead."""
    names = store.list(LOCKS)
    if not names:
        return None
    last = _read(store, names[-1])
    if last.get("released") or not _may_live(last):
        return None
    return f"process {last.get('pid')} on {last.get('host')} since {last.get('since')}"


def _read(store: Store, name: str) -> dict[str, object]:
    try:
        return dict(json.loads(store.read(f"{LOCKS}/{name}")))
    except ValueError as error:
        raise JobConflict(f"{store.path(f'{LOCKS}/{name}')} is damaged: {error}") from None


def _may_live(process: dict[str, object]) -> bool:
    """False only where this host can prove that the process is gone."""
    pid = process.get("pid")
    if process.get("host") != socket.gethostname() or not isinstance(pid, int):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _owned(store: Store, who: str) -> str:
    return f"{store.url} is being worked on by {who}; if that process is gone, take over with --take-over"
