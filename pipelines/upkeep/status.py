"""How far a job is, read from its output alone."""

from __future__ import annotations

from dataclasses import dataclass

from ..outputs.commit import committed, is_finished, read_commits, totals
from ..outputs.lock import owner
from ..outputs.store import Store
from .care import planned_job


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job as its output shows it.

    Attributes:
        images, rejected: those that ended so far; together at most `planned`.
        phase: "complete", "running" or "stopped".
        owner: the driver that works on it, as far as can be told here.
        plans: 1, and one more for each time that the input grew or rejected rows ran again.
    """

    planned: int
    images: int
    rejected: int
    shards: int
    committed: int
    phase: str
    owner: str | None
    plans: int = 1

    @property
    def ended(self) -> int:
        """Planned images that became a picture or a rejected row."""
        return self.images + self.rejected


def job_status(store: Store) -> JobStatus:
    """The state of the job whose output `store` is.

    Raises:
        JobError: there is no planned job.
    """
    plan = planned_job(store)
    commits = read_commits(store, sorted(committed(store)))
    images, rejected = totals(plan, commits)
    who = owner(store)
    return JobStatus(
        planned=plan.images,
        images=images,
        rejected=rejected,
        shards=plan.shards,
        committed=len(commits),
        phase="complete" if is_finished(store, plan) else "running" if who else "stopped",
        owner=who,
        plans=plan.number,
    )
