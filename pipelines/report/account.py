"""What a job cost and made, from its commit and run records: `report.json` and `throughput.svg`.

These two files hold times. They are the only ones outside `_diffray/` that differ between a job that was
interrupted and one that was not.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ..config import JobConfig
from ..outputs.commit import Commit, current_path
from ..outputs.index import Index
from ..outputs.plan import Plan
from ..outputs.store import Store
from .charts import bars, number

REPORT, THROUGHPUT = "report.json", "throughput.svg"
TIMED_FILES = (REPORT, THROUGHPUT)
WAITING = "shard_seconds"
PERCENTILES = {"p5": 5, "median": 50, "p95": 95}


@dataclass(frozen=True, slots=True)
class Refusals:
    """Rejected rows of one stage and field.

    Attributes:
        example: the reason of the first of them.
    """

    stage: str
    field: str | None
    rows: int
    example: str


@dataclass(frozen=True, slots=True)
class Times:
    """What is known of the time that a job took.

    Attributes:
        seconds: from each run's first shard to its last commit; pauses between two runs do not count.
        machine_seconds: sum over all runs of the time that engines and text encoders held their devices, times their
            share of a GPU. A run whose driver was killed counts as its last record says, a minute old at most, or
            as its commits say if that is more: from the start of each worker to its last commit. One that was killed
            before its first record is known by its commits alone, and its workers' shares are taken for 1.
        workers: how many engines there were, those that died included.
        start: mean seconds of each phase of a worker's start.
        stages: seconds that images spent in each stage, added up; waiting for others included.
        spans: (began, ended, images) of every shard, in seconds since 1970.
        runs: (began, ended) of every run, joined where they overlap.
    """

    seconds: float = 0.0
    machine_seconds: float = 0.0
    workers: int = 0
    start: Mapping[str, float] = field(default_factory=dict)
    stages: Mapping[str, float] = field(default_factory=dict)
    spans: Sequence[tuple[float, float, int]] = ()
    runs: Sequence[tuple[float, float]] = ()

    @classmethod
    def of(cls, commits: Sequence[Commit], recorded: Sequence[Mapping[str, Any]] = ()) -> Times:
        """The times in a job's commit records and in those of its runs."""
        timed = [commit for commit in commits if commit.origin.ended]
        bounds: dict[int, tuple[float, float]] = {}
        for origin in (commit.origin for commit in timed):
            began, ended = bounds.get(origin.run, (origin.began, origin.ended))
            bounds[origin.run] = min(began, origin.began), max(ended, origin.ended)
        runs = _united(bounds.values())
        born: dict[str, float] = {}
        last: dict[str, float] = {}
        starts: dict[str, Mapping[str, float]] = {}
        of_run: dict[str, int] = {}
        stages: dict[str, float] = {}
        for commit in commits:
            origin = commit.origin
            if origin.worker:
                born[origin.worker], starts[origin.worker] = origin.born, origin.start
                of_run[origin.worker] = origin.run
                last[origin.worker] = max(last.get(origin.worker, 0.0), origin.ended)
            for stage, seconds in commit.timings.items():
                if stage != WAITING:
                    stages[stage] = stages.get(stage, 0.0) + seconds
        held, engines = _machines(
            recorded, of_run, {name: max(0.0, last[name] - born[name]) for name in born}
        )
        phases = sorted({phase for start in starts.values() for phase in start})
        return cls(
            seconds=sum(end - begin for begin, end in runs),
            machine_seconds=held,
            workers=engines,
            start={p: sum(s.get(p, 0.0) for s in starts.values()) / len(starts) for p in phases},
            stages=stages,
            spans=sorted((c.origin.began, c.origin.ended, c.images) for c in timed),
            runs=runs,
        )


def refusals(store: Store, plan: Plan, commits: Iterable[Commit]) -> list[Refusals]:
    """The rejected rows of a finished job by stage and field, most first."""
    rows: dict[tuple[str, str | None], int] = {}
    examples: dict[tuple[str, str | None], str] = {}
    for commit in commits:
        for file in commit.files if commit.rejected and commit.shard >= plan.retried else ():
            path = current_path(plan, commit, file)
            if not path.startswith("rejected/"):
                continue
            table = pq.read_table(io.BytesIO(store.read(path)), columns=["stage", "field", "reason"])
            for row in table.to_pylist():
                key = row["stage"], row["field"]
                rows[key] = rows.get(key, 0) + 1
                examples.setdefault(key, row["reason"])
    found = [Refusals(stage, name, rows[stage, name], examples[stage, name]) for stage, name in rows]
    return sorted(found, key=lambda one: (-one.rows, one.stage, one.field or ""))


def account(
    config: JobConfig,
    totals: Mapping[str, int],
    refused: Sequence[Refusals],
    index: Index,
    duplicates: int | None,
    size: int,
    times: Times,
    prompts: Mapping[str, int] | None = None,
) -> bytes:
    """`report.json`: totals, rejected rows by reason, scores, times and, given a price, costs.

    Args:
        prompts: how many were encoded, and how many engines took over from each other.
    """
    images, seconds = totals["images"], times.seconds
    report: dict[str, Any] = {
        **totals,
        "bytes": size,
        "rejected_by": [asdict(one) for one in refused],
        "scores": {name: _spread(values) for name, values in index.scores.items()},
        "near_duplicates": duplicates,
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 4) if seconds else None,
        "machine_seconds": round(times.machine_seconds, 3),
        "workers": times.workers,
        "prompts": dict(prompts or {}),
        "start_seconds": {phase: round(value, 3) for phase, value in times.start.items()},
        "stage_seconds": {stage: round(value, 3) for stage, value in sorted(times.stages.items())},
    }
    price = config.workers.price_per_hour
    if price is not None:
        cost = price * times.machine_seconds / 3600
        per_thousand = round(1000 * cost / images, 6) if images else None
        report["cost"] = {"price_per_hour": price, "total": round(cost, 6), "per_1000_images": per_thousand}
    return (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode()


def throughput(times: Times, bins: int = 60) -> bytes:
    """`throughput.svg`: images per second over the time in which shards were made."""
    runs, length = times.runs, times.seconds
    if not length:
        return bars("Images per second", [], "no shard was timed", "", "").encode()
    starts = np.array([begin for begin, _ in runs])
    before = np.cumsum([0.0, *(end - begin for begin, end in runs)])[:-1]
    edges, done = np.linspace(0, length, bins + 1), np.zeros(bins)
    for began, ended, images in times.spans:
        place = int(np.searchsorted(starts, began, side="right")) - 1
        low = before[place] + began - starts[place]
        high = max(low + (ended - began), low + 1e-6)
        inside = np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None)
        done += images * inside / (high - low)
    rates = done / (length / bins)
    mean = sum(images for _, _, images in times.spans) / length
    paused = f", {len(runs)} runs" if len(runs) > 1 else ""
    caption = f"mean {number(float(f'{mean:.3g}'))}/s, peak {number(float(f'{rates.max():.3g}'))}/s{paused}"
    return bars("Images per second", rates.tolist(), "0", caption, _duration(length)).encode()


def _machines(
    recorded: Sequence[Mapping[str, Any]], of_run: Mapping[str, int], seconds: Mapping[str, float]
) -> tuple[float, int]:
    """Machine-seconds and number of engines of all runs, each as its record or its commits say, whichever is more.

    Args:
        recorded: the records of the runs.
        of_run: the run of each worker that committed.
        seconds: from the start of each of these to its last commit.
    """
    records = {int(record["run"]): record for record in recorded}
    held, engines = 0.0, 0
    for run in {*records, *of_run.values()}:
        record = records.get(run, {})
        known = record.get("engines", ())
        workers = [name for name in of_run if of_run[name] == run]
        share = max((engine.get("share", 1.0) for engine in known), default=1.0)
        held += max(record.get("machine_seconds", 0.0), share * sum(seconds[name] for name in workers))
        engines += max(len(known), len(workers))
    return held, engines


def _united(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Overlapping spans joined, in order."""
    joined: list[tuple[float, float]] = []
    for began, ended in sorted(spans):
        if joined and began <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], ended)
        else:
            joined.append((began, ended))
    return joined


def _spread(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, Any]:
    known = values[np.isfinite(values)]
    facts: dict[str, Any] = {"values": len(known), "missing": len(values) - len(known)}
    if len(known):
        facts |= {"least": known.min(), "mean": known.mean(), "most": known.max()}
        facts |= {name: np.percentile(known, at) for name, at in PERCENTILES.items()}
    return {
        name: value if isinstance(value, int) else round(float(value), 6) for name, value in facts.items()
    }


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"
    )
