"""What decides a job's output, recorded once; a resumed job that differs is refused."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from posixpath import commonpath
from typing import Any

from diffray.model.config import ModelConfig
from diffray.model.errors import JobConflict

from ..config import InvalidJob, JobConfig
from ..inputs.source import Source
from ..models import Models
from ..scores import facts as facts_of
from .store import Store

JOB = "_diffray/job.json"
DEVICE = "_diffray/device.json"
_ELSEWHERE: Any = {
    "input": True,
    "limit": True,
    "output": True,
    "workers": True,
    "max_rejected": True,
    "pictures": {"root"},
}
"""Where and how much the job reads, where it writes and runs, and what it calls a failure: that may change."""
_PAGES = ("license", "contact_sheet", "gallery")
"""What is only shown: that may change too, and then the pages are made again."""
VERSIONS = ("diffray", "torch", "pillow", "pyarrow")
"""The software that decides the bytes of images, image files and Parquet files."""


def fingerprint(
    config: JobConfig, model_configs: Mapping[str, ModelConfig], models: Models
) -> dict[str, Any]:
    """Config (but for where it runs, reads and writes), model and software, as plain JSON values.

    What the input holds is the plan's business: it may grow.

    Args:
        config: the job.
        model_configs: every model of it by name.
        models: knows the checksums of their files.
    """
    facts = {
        name: {**asdict(model_configs[name]), **models.identity(options)}
        for name, options in config.every_model.items()
    }
    pages = {name: getattr(config, name) for name in _PAGES}
    values: dict[str, Any] = {
        "config": config.model_dump(
            mode="json", by_alias=True, exclude=_ELSEWHERE | dict.fromkeys(_PAGES, True)
        ),
        "model": facts if config.models else facts[""],
        "versions": {name: version(name) for name in VERSIONS},
        "pages": {**pages, "price_per_hour": config.workers.price_per_hour},
    }
    if judges := facts_of(config.checks):
        values["checks"] = judges
    return dict(json.loads(json.dumps(values)))


def record(store: Store, mine: dict[str, Any]) -> None:
    """Record the fingerprint of a job that has no plan yet, so nothing could have come of an earlier one."""
    store.write(JOB, (json.dumps(mine, indent=2) + "\n").encode())


def recorded_config(store: Store) -> dict[str, Any]:
    """The config that the job in `store` was started with, but for where it reads, writes and runs.

    Raises:
        JobConflict: the record is damaged.
    """
    job = _recorded(store)
    return {**job["config"], **{name: job["pages"][name] for name in _PAGES}}


def is_shown(store: Store, mine: Mapping[str, Any]) -> bool:
    """Whether the pages of the job, once it is finished, are as its config wants them."""
    return bool(_recorded(store)["pages"] == mine["pages"])


def record_pages(store: Store, mine: Mapping[str, Any]) -> None:
    """Record how the config wants the pages, which are made when the job ends."""
    record(store, {**_recorded(store), "pages": mine["pages"]})


def check_versions(store: Store) -> None:
    """Refuse to work, in this process, for a job that was started with other software than is installed here.

    Raises:
        JobConflict: naming what differs.
    """
    job: dict[str, str] = _recorded(store)["versions"]
    if odd := [
        f"{n} {version(n)} here, {job.get(n)} in the job" for n in VERSIONS if version(n) != job.get(n)
    ]:
        raise JobConflict(f"{socket.gethostname()} has other software than the job: {'; '.join(odd)}")


def refuse_foreign(store: Store) -> None:
    """Refuse an output that holds files which no diffray job wrote.

    Raises:
        JobConflict: naming some of them.
    """
    foreign = [] if store.exists(JOB) else [name for name in store.list() if name != "_diffray"]
    if foreign:
        raise JobConflict(f"{store.url} is not empty ({', '.join(foreign[:5])}) and holds no diffray job")


def refuse_entangled(store: Store, source: Source) -> None:
    """Refuse outputs that could never be right: a root, or a folder that holds the input or would become part of it.

    Raises:
        InvalidJob: naming both.
    """
    root = store.path("").rstrip("/")
    if not store.url or root.count("/") < 1:
        raise InvalidJob(f"output {store.url!r}: give a folder of its own")
    for path in source.files:
        if path == root or (path.startswith(f"{root}/") and commonpath([path, root]) == root):
            raise InvalidJob(f"output {store.url} holds the input {path}: choose another folder")
    if source.looks_into(root):
        raise InvalidJob(
            f"output {store.url} is inside the input {source.root} and would be read as input by the next run: "
            "choose a folder elsewhere, or one whose name begins with _"
        )


def check(store: Store, mine: dict[str, Any]) -> None:
    """Refuse to go on with a planned job whose recorded fingerprint is another one.

    Raises:
        JobConflict: showing every difference on a line of its own.
    """
    before, after = (_flat({**job, "pages": None}) for job in (_recorded(store), mine))
    if before == after:
        return
    lines = [
        f"  {key}: {before.get(key, 'nothing')} -> {after.get(key, 'nothing')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, "nothing") != after.get(key, "nothing")
    ]
    raise JobConflict(
        "\n".join([f"{store.url} holds another job; choose a new output, or undo these changes:", *lines])
    )


def settled_threads(store: Store, kind: str, threads: int | None) -> int | None:
    """Torch threads of every engine of the job: as many as its first run had, since the last bits of what a CPU
    computes depend on their number.

    Args:
        kind: what this run's engines compute on, "CPU" or "GPU".
        threads: as many as this run would have; None on a GPU.

    Raises:
        JobConflict: the first run's engines computed on the other kind.
    """
    store.put_if_absent(DEVICE, (json.dumps({"kind": kind, "threads": threads}) + "\n").encode())
    first = _recorded(store, DEVICE)
    if first["kind"] != kind:
        raise JobConflict(
            f"{store.url}: the job began on a {first['kind']}, here the rest would be made on a {kind}, as other "
            f"images; bring back a {first['kind']}, or choose a new output"
        )
    settled: int | None = first["threads"]
    return settled


def _recorded(store: Store, name: str = JOB) -> dict[str, Any]:
    try:
        return dict(json.loads(store.read(name)))
    except ValueError as error:
        raise JobConflict(f"{store.path(name)} is damaged: {error}") from None


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys."""
    if isinstance(value, dict) and value:
        flat: dict[str, str] = {}
        for key, inner in value.items():
            flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: json.dumps(value)}
