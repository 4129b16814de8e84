"""What a job would make, told without writing anything and without Ray."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from diffray.model.config import ModelConfig

from ..config import JobConfig
from ..inputs.source import Source
from ..inputs.sources import Sources
from ..models import Models
from ..outputs.commit import committed
from ..outputs.fingerprint import check, fingerprint, refuse_entangled, refuse_foreign
from ..outputs.plan import read_plan
from ..outputs.store import Store
from ..terms.image import PlannedImage
from .planner import cut, planned, stamps_of
from .replaced import check_sources

REASONS = 5
"""Rejected rows that are shown."""


@dataclass(slots=True)
class Preview:
    """A plan in numbers.

    Attributes:
        rows, images, rejected, shards: as `Plan` would have them.
        output: what is there already.
        work: pixel-steps of all images, as far as it can be told without reading pictures.
        models: images of each model, where the job has several.
        reasons: the first rejected rows, each on a line.
        read: which fields are read from columns, with the columns where their names differ.
        columns: what the output carries beside the request's own columns.
        seconds: estimated time on one engine, or of the whole job when `basis` is "stated".
        basis: where the estimate comes from; empty without one.
    """

    task: str
    rows: int = 0
    images: int = 0
    rejected: int = 0
    shards: int = 0
    output: str = ""
    work: float = 0.0
    models: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    seconds: float | None = None
    basis: str = ""

    def add(self, image: PlannedImage) -> None:
        """Count one more image of the plan."""
        self.images += 1
        if image.reason is not None:
            self.rejected += 1
            if len(self.reasons) < REASONS:
                where = f"{image.file}:{image.line}"
                self.reasons.append(f"{image.id} ({where}): {image.field}: {image.reason}")
            return
        self.work += image.work
        if image.model:
            self.models[image.model] += 1

    def lines(self) -> Iterator[str]:
        """The preview as text."""
        made = self.images - self.rejected
        yield f"task      {self.task}"
        yield f"rows      {self.rows}"
        yield f"images    {made}" + (f", and {self.rejected} rejected" if self.rejected else "")
        for name, count in sorted(self.models.items()):
            yield f"          {count} with model {name}"
        yield f"shards    {self.shards}"
        yield f"output    {self.output}"
        yield f"work      {self.work / 1e6:.4g} megapixel-steps"
        if self.read:
            yield f"read      {', '.join(self.read)}"
        if self.columns:
            yield f"carried   {', '.join(self.columns)}"
        if self.seconds is None:
            yield "time      unknown; state a rate, or measure it (diffray plan --measure)"
        else:
            yield f"time      {_duration(self.seconds)}, {self.basis}"
        for reason in self.reasons:
            yield f"rejected  {reason}"
        if self.rejected > len(self.reasons):
            yield f"          and {self.rejected - len(self.reasons)} more"


def preview(
    config: JobConfig,
    *,
    rate: float | None = None,
    measure: bool = False,
    models: Models | None = None,
) -> Preview:
    """What `run` would plan.

    Args:
        rate: images per second of the whole job.
        measure: load the first model, and time some of the job's own images.
        models: opens the model, as for `run`.

    Raises:
        InvalidJob: config or input are wrong as a whole.
        JobConflict: the output holds something else, or this job with what changed since.
    """
    config, models = config.placed(), models or Models(config.storage)
    model_configs = {name: models.config(options) for name, options in config.every_model.items()}
    source = Source(config.inputs, config.storage_options, config.limit)
    output = _output(config, models, model_configs, source)
    survey, images = planned(config, model_configs, source)
    read = [
        name if [name] == list(columns) else f"{name} ({' or '.join(columns)})"
        for name, columns in survey.used.items()
    ]
    found = Preview(config.task, rows=survey.rows, output=output, read=read, columns=survey.user.schema.names)
    first: list[PlannedImage] = []
    name = next(iter(config.every_model))
    for shard in cut(images, config.shards):
        found.shards += 1
        for image in shard:
            found.add(image)
            if image.reason is None and image.model == name and len(first) < 8:
                first.append(image)
    made = found.images - found.rejected
    if rate:
        found.seconds, found.basis = made / rate, f"at the stated {rate:g} images per second"
    elif measure and first:
        count, work, seconds = _measured(config, models, first)
        found.seconds = found.work * seconds / work
        found.basis = f"on one engine such as the one here, which made {count} images in {seconds:.1f} s"
    return found


def _output(
    config: JobConfig, models: Models, model_configs: Mapping[str, ModelConfig], source: Source
) -> str:
    """What the output holds, as far as a run would go on with it."""
    store = Store(config.output, config.storage_options(config.output))
    refuse_entangled(store, source)
    refuse_foreign(store)
    plan = read_plan(store)
    if plan is None:
        return "new"
    check(store, fingerprint(config, model_configs, models))
    grew = "" if plan.input == source.fingerprint() else "; the input is not what was planned"
    check_sources(store, config, plan, stamps_of(config, source))
    return f"{len(committed(store))} of {plan.shards} shards are there{grew}"


def _measured(config: JobConfig, models: Models, images: list[PlannedImage]) -> tuple[int, float, float]:
    """Images, work and seconds of a trial with the job's first images, after one that warms up."""
    options = next(iter(config.every_model.values()))
    sources = Sources(config, models.config(options))
    model = models.open(options)
    try:
        ready = [sources.ready(image) for image in islice(images, max(2, model.engine.batch_size))]
        _ended(model.engine, ready[:1], config.task)
        began = time.monotonic()
        _ended(model.engine, ready, config.task)
        return len(ready), sum(one.image.work for one in ready), time.monotonic() - began
    finally:
        model.engine.close()


def _ended(engine: Any, ready: list[Any], task: str) -> None:
    if task == "encode":
        futures = [engine.encode(one.request.init_image) for one in ready]
    elif task == "decode":
        import torch

        futures = [engine.decode(torch.from_numpy(one.latents)) for one in ready]
    else:
        futures = [engine.submit(one.request).future for one in ready]
    for future in futures:
        future.result()


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 1:
        return f"about {hours:.1f} hours"
    return f"about {minutes:.0f} minutes" if minutes >= 2 else f"about {max(seconds, 1):.0f} seconds"
