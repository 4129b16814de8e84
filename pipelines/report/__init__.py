"""What a finished job leaves for people, and the proof of its totals.

    contact_sheet.png                  sheet.py       some images at a glance
    gallery.html                       gallery.py     more of them, to search and filter
    scores.svg                         charts.py      how the scores are spread
    duplicates.parquet                 duplicates.py  which images look like an earlier one
    README.md                          card.py        the dataset card
    report.json, throughput.svg        account.py     totals, times and costs: the files that are not the same twice

All of it is written again when the end of a job is interrupted; the success mark comes last.
"""

from __future__ import annotations

import json

import pyarrow as pa

from ..config import JobConfig
from ..models import shown_name
from ..outputs.commit import SUCCESS, archive_retried, proven_totals, read_commits
from ..outputs.index import Index, read_index
from ..outputs.parts import Output, score_names, tar_schema
from ..outputs.plan import Plan, read_shard
from ..outputs.sample import Sample
from ..outputs.store import SCRATCH, Store
from ..runs import prompts, read_runs
from . import account, card, charts, duplicates, gallery, sheet
from .account import TIMED_FILES as TIMED_FILES


def finish(store: Store, config: JobConfig, plan: Plan) -> dict[str, int]:
    """Prove the totals and write what depends on the whole job; the success mark comes last.

    Raises:
        AccountingError: the job is not whole.
    """
    if plan.retried:
        archive_retried(store, plan, read_commits(store, range(plan.retried)))
    totals, commits = proven_totals(store, plan)
    shards = [commit.shard for commit in commits if commit.images]
    found = read_index(store, shards, Sample.of(config, plan))
    alike = None
    if config.checks.near_duplicates is not None:
        marks = duplicates.write_marks(store, found, config.checks.near_duplicates)
        found.shown = duplicates.marked(found.shown, marks)
        alike = len(marks) - marks["duplicate_of"].null_count
    refused = account.refusals(store, plan, commits)
    user = read_shard(store, 0).user if plan.shards else pa.schema([])
    _write_pages(store, config, user, totals, found, refused, alike)
    size = sum(file["bytes"] for commit in commits for file in commit.files if _is_data(file["path"]))
    runs = read_runs(store)
    times, encoded = account.Times.of(commits, runs), prompts(runs)
    store.write(account.REPORT, account.account(config, totals, refused, found, alike, size, times, encoded))
    store.write(account.THROUGHPUT, account.throughput(times))
    for leftover in store.list(SCRATCH):
        store.remove(f"{SCRATCH}/{leftover}")
    store.write(SUCCESS, (json.dumps(totals, indent=2) + "\n").encode())
    return totals


def _write_pages(
    store: Store,
    config: JobConfig,
    user: pa.Schema,
    totals: dict[str, int],
    found: Index,
    refused: list[account.Refusals],
    alike: int | None,
) -> None:
    """What people look at: the same bytes for the same dataset."""
    models = [name or shown_name(options.source) for name, options in config.every_model.items()]
    if config.contact_sheet and found.shown:
        store.write(sheet.NAME, sheet.contact_sheet(found.shown, config.contact_sheet))
    if config.gallery and found.shown:
        store.write(gallery.NAME, gallery.gallery(found, totals, refused, alike, models))
    if plots := charts.histograms(found.scores):
        store.write(charts.NAME, charts.stacked(plots).encode())
    columns = score_names([*found.scores, *(["phash"] if len(found.hashes) else [])], user)
    said = card.card(config, models, totals, refused, columns, alike, bool(plots), _members(config, user))
    store.write(card.NAME, said.encode())


def _members(config: JobConfig, user: pa.Schema) -> pa.Schema | None:
    """What a tar's JSON holds, if the data are tars."""
    return tar_schema(user, Output.of(config)) if config.encoding.layout == "webdataset" else None


def _is_data(path: str) -> bool:
    return path.startswith("data/")
