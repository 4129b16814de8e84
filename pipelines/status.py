"""How far a job is, read from its output alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from diffray.model.errors import JobError

from .commit import committed, read_commits, totals
from .lock import owner
from .plan import read_plan
from .report import is_finished
from .store import Store


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job as its output shows it. `damaged` names files that are gone or have other bytes than recorded."""

    planned: int
    ended: int
    rejected: int
    shards: int
    committed: int
    phase: str
    owner: str | None
    damaged: tuple[str, ...] = ()


def job_status(output: str, *, verify: bool = False) -> JobStatus:
    """The state of the job in `output`; `verify` reads every file that a commit record names.

    Raises:
        JobError: there is no planned job.
    """
    store = Store(output)
    plan = read_plan(store)
    if plan is None:
        raise JobError(f"{output} holds no planned diffray job")
    commits = read_commits(store, sorted(committed(store)))
    images, rejected = totals(plan, commits)
    done = is_finished(store, plan)
    who = owner(store)
    phase = "complete" if done else "running" if who else "stopped; run the same command to go on"
    damaged = [fault for c in commits for f in c.files if (fault := _fault(store, f))] if verify else []
    return JobStatus(
        planned=plan.images,
        ended=images + rejected,
        rejected=rejected,
        shards=plan.shards,
        committed=len(commits),
        phase=phase,
        owner=who,
        damaged=tuple(damaged),
    )


def _fault(store: Store, file: object) -> str | None:
    assert isinstance(file, dict)
    try:
        data = store.read(file["path"])
    except FileNotFoundError:
        return f"{file['path']}: missing"
    if hashlib.sha256(data).hexdigest() != file["sha256"]:
        return f"{file['path']}: {len(data)} bytes with another SHA-256 than recorded"
    return None
