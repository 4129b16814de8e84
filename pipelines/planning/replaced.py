"""Proof that the files which images are made from are still those that the job was planned with."""

from __future__ import annotations

from collections.abc import Collection

from diffray.model.errors import JobConflict

from ..config import JobConfig
from ..inputs.sources import source_columns
from ..inputs.stamps import Stamps, same
from ..outputs.attempts import Attempts
from ..outputs.commit import commit_path, read_commit
from ..outputs.plan import Plan, picture_folders, read_source_stamps
from ..outputs.store import Store
from ..parallel import side_by_side

SAMPLE = 20_000
"""Images whose source files are looked at: an object store answers for about a thousand in a second."""
SHOWN = 5
"""Files that a message names."""


def check_sources(store: Store, config: JobConfig, plan: Plan, stamps: Stamps) -> None:
    """Refuse to go on when a source file is gone, or another one stands in its place.

    Of more than `SAMPLE` images only so many are looked at, evenly drawn. The worker that makes an image looks at its
    files in any case, so what may pass is a change to what images that are committed were made from.

    Files of rows that were rejected may change: nothing was made from them. Where the pictures were copied to
    another folder since they were planned, only sizes are compared.

    Raises:
        JobConflict: naming some of the files, and how they differ.
        JobError: the storage does not answer.
    """
    if not plan.stamped:
        return
    columns = [*source_columns(config).values()]
    exact = picture_folders(store) <= {stamps.folder}

    def changed(number: int) -> dict[str, str]:
        planned = read_source_stamps(store, number, columns)
        now = stamps.of(path for _, files in planned for path in files)
        differs = {
            (image, path): f"  {path}: {before} -> {now[path] or 'missing'}"
            for image, files in planned
            for path, before in files.items()
            if not same(before, now[path] or "", exact=exact)
        }
        rejected = _rejected(store, number) if differs else ()
        return {path: text for (image, path), text in differs.items() if image not in rejected}

    paths, shown = set[str](), dict[str, str]()
    for found in side_by_side(changed, range(0, plan.shards, -(-plan.stamped // SAMPLE))):
        paths |= found.keys()
        shown |= dict(list(found.items())[: max(0, SHOWN - len(shown))])
    if paths:
        what = f"{len(paths)} source files are not those that the job was planned with"
        remedy = "choose a new output, or bring them back, with their dates where these are all that differs"
        if plan.retried:
            remedy += "; a retry that was interrupted goes on with `diffray retry-rejected`"
        raise JobConflict("\n".join([f"{store.url}: {what}; {remedy}:", *shown.values()]))


def _rejected(store: Store, number: int) -> Collection[str]:
    """Images of a shard that are rejected, or will be when a repaired one is made again."""
    if store.exists(commit_path(number)):
        return read_commit(store, number).reasons
    return Attempts.read(store, number, 0, 1, patient=True).verdicts
