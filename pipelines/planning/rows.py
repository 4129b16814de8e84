"""One input row becomes one request per image, with an id and a seed that never change.

Ids. A row's id is its `id` column, else a hash of its content (with `.2`, `.3`, ... for repetitions), so
that a table that only grew keeps the ids of its rows; a picture counts by the place where it stands. Image k of
a row is `<row id>-<k>`, counted from 0; with a sweep `<row id>-<variant>-<k>`.

Values. A swept value goes before a template, that before the row's column, that before the job's default.

Seeds. A given seed (row or job default) is that of image 0; image k gets seed + k, as in AUTOMATIC1111.
Without one it is a 63-bit hash of the job's seed and the image's id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from posixpath import dirname, join
from typing import Any

from diffray.model.config import ModelConfig
from diffray.model.errors import InvalidRequest
from diffray.model.request import MAX_PROMPT, MAX_SEED, ImageRequest

from ..config import InvalidJob, JobConfig
from ..hashing import text_hash
from ..inputs.columns import COUNT_COLUMNS, Columns, Place, Reading
from ..inputs.references import INPUT, BlobError, Reference, below, parsed_reference
from ..terms.image import PlannedImage
from ..terms.schemas import SOURCE_COLUMN
from ..terms.tasks import KINDS
from ..terms.values import REQUEST_COLUMNS, as_text, integer, shown
from .settings import TEXTS, SettingsOf
from .sweeps import Template, Variant, variants

MAX_IMAGES_PER_ROW = 100_000


class RowRules:
    """What a job says about every row.

    Args:
        config: the job.
        models: every model of it by name.
        root: folder of the job's input.

    Attributes:
        kind: the task's rules.
        columns: how rows are read.
        variants: the combinations of the sweep.

    Raises:
        InvalidJob: the job contradicts itself or its models.
    """

    def __init__(self, config: JobConfig, models: Mapping[str, ModelConfig], root: str) -> None:
        self.kind = KINDS[config.task]
        self.columns = Columns(self.kind, config.columns, config.templates, picks_model=bool(config.models))
        self.classes: Mapping[str, Sequence[str]] = {}
        """Column to the names of its class numbers."""
        self.swept: Mapping[str | None, Mapping[str, Any]] = {}
        """Variant to its values of `variables`, as columns of the output."""
        self._config, self._models = config, models
        self._root = config.pictures.root or root
        self.templates = {name: Template(name, text) for name, text in config.templates.items()}
        self.variants = variants(config.sweep)
        self._check_names()
        fields = {*self.columns.fields, "model"}
        self.variables = tuple(name for name in config.sweep if name not in fields)
        """Swept names that are no fields: they become columns of the output."""
        self.defaults = {**self.kind.defaults, **config.defaults}
        adapters = {name: sorted(options.adapters) for name, options in config.every_model.items()}
        self._settings = SettingsOf(
            self.kind, models, self.defaults, adapters=adapters, several=bool(config.models)
        )
        self._settings.check_sweep(self.variants)

    def _check_names(self) -> None:
        config, task = self._config, self._config.task
        plain = {*REQUEST_COLUMNS, *self.kind.fields}
        allowed = {
            "columns": {*self.columns.fields, *self.kind.takes},
            "templates": {*TEXTS, *self.kind.takes} - {"latents"},
            "defaults": plain,
        }
        for key, names in allowed.items():
            if odd := sorted(set(getattr(config, key)) - names):
                known = ", ".join(sorted(names))
                raise InvalidJob(f"{key}.{odd[0]}: no such field of task {task}, allowed are {known}")
        variables = {name for template in self.templates.values() for name in template.names}
        for name in config.sweep:
            if name not in plain | variables and not (name == "model" and config.models):
                raise InvalidJob(f"sweep.{name}: neither a field of task {task} nor a name in a template")
            if name not in plain and any(isinstance(v.values[name], bool) for v in self.variants):
                raise InvalidJob(
                    f"sweep.{name}: got true or false, which YAML makes of on, off, yes, no: quote them"
                )
        for variant in self.variants:
            name = variant.values.get("model", None)
            if name is not None and name not in config.models:
                raise InvalidJob(f"sweep.model: got {name!r}, allowed are {', '.join(config.models)}")

    def images(self, reading: Reading, row_id: str, user: Mapping[str, Any]) -> Iterator[PlannedImage]:
        """The images of one row; a value that is not allowed makes them rejected, never an exception."""
        place = reading.place
        try:
            if reading.row.problem:
                raise InvalidRequest("row", reading.row.problem)
            reading.check_id()
            indices = (place.index,) if place else range(self._count(reading))
        except InvalidRequest as error:
            yield self._rejected(reading, row_id, place, error, user)
            return
        for variant in (Variant(place.variant),) if place else self.variants:
            yield from self._images(reading, row_id, variant, indices, user)

    def _images(
        self,
        reading: Reading,
        row_id: str,
        variant: Variant,
        indices: Sequence[int],
        user: Mapping[str, Any],
    ) -> Iterator[PlannedImage]:
        row, given = reading.row, reading.given
        own = {**user, **(self.swept[variant.id] if variant.values else {})}
        try:
            self._check_plain(given, variant)
            texts = self._texts(reading, variant)
            sources = self._sources(reading, texts)
            own |= sources
            certain = bool(self.kind.needs) or not isinstance(sources.get("init_image"), Reference)
            settings = self._settings.of(given, variant, tuple(sources), self.variables, certain=certain)
            own |= settings.own
            if "prompt" not in texts:
                raise InvalidRequest("prompt", "got nothing, every row needs one (it may be empty)")
        except InvalidRequest as error:
            told = _with_hint(error, reading, variant)
            for k in indices:
                where = Place(row_id, variant.id, k)
                yield self._rejected(reading, row_id, where, told, own)
            return
        seeds = {**self.defaults, **given, **variant.values}
        stem = f"{row_id}-{variant.id}" if variant.id else row_id
        prompt, negative = texts["prompt"], texts.get("negative_prompt")
        for k in indices:
            image_id = f"{stem}-{k}"
            try:
                seed = self._seed(seeds.get("seed"), image_id, 0 if reading.place and "seed" in given else k)
                if not _is_plain(prompt, negative, seed):
                    ImageRequest(prompt=prompt, negative_prompt=negative, seed=seed)
            except InvalidRequest as error:
                yield self._rejected(reading, row_id, Place(row_id, variant.id, k), error, own)
                continue
            yield PlannedImage(
                image_id,
                row_id,
                variant.id,
                k,
                row.file,
                row.line,
                settings.model,
                prompt,
                negative,
                seed,
                settings.parameters,
                settings.work,
                user=own,
            )

    def _check_plain(self, given: Mapping[str, Any], variant: Variant) -> None:
        """Refuse bytes that stay in the input where a value of the row is used as it is."""
        for name, value in given.items():
            if isinstance(value, Reference) and not any(
                name in other for other in (self.columns.sources, self.templates, variant.values)
            ):
                raise InvalidRequest(
                    name, f"got bytes ({value}), allowed is a plain value: make it a column of text"
                )

    def _texts(self, reading: Reading, variant: Variant) -> dict[str, Any]:
        """Prompts, and source paths that a template makes."""
        values = {**self.defaults, **reading.given, **variant.values}
        texts = {name: values[name] for name in TEXTS if values.get(name) is not None}
        for name, template in self.templates.items():
            if name in variant.values or (reading.place and name in reading.given):
                continue
            known = {**reading.given, **reading.row.values, **variant.values}
            texts[name] = template.expanded(known, self.classes)
        return texts

    def _sources(self, reading: Reading, texts: Mapping[str, Any]) -> dict[str, str]:
        """Field to reference of the source pictures that the row names."""
        sources = {}
        for name in self.columns.sources:
            value = texts.get(name, reading.given.get(name))
            if value is None:
                continue
            try:
                sources[SOURCE_COLUMN.get(name, name)] = self._reference(value, reading)
            except BlobError as error:
                raise InvalidRequest(name, str(error)) from None
        for name in self.kind.needs:
            if SOURCE_COLUMN.get(name, name) not in sources:
                looked = " or ".join(self.columns.looked_for(name)[:3] or (name,))
                raise InvalidRequest(name, f"got nothing in column {looked}, task {self.kind.task} needs one")
        return sources

    def _reference(self, value: Any, reading: Reading) -> str:
        if isinstance(value, Reference):
            return value
        if not isinstance(value, str):
            raise BlobError(f"got {type(value).__name__}, allowed is a picture or the path of one")
        text = value.removeprefix(INPUT)
        reference = parsed_reference(text)
        if not isinstance(reference, str):
            return str(replace(reference, file=below(self._root, reference.file)))
        beside = not (reading.place or self._config.pictures.root)
        if beside and not text.startswith("/") and ":" not in text:
            text = join(dirname(reading.row.file), text)
        return below(self._root, text)

    def _seed(self, base: Any, image_id: str, k: int) -> Any:
        if base is None:
            return derived_seed(self._config.seed, image_id)
        base = integer("seed", base)
        return base + k if type(base) is int else base

    def _count(self, reading: Reading) -> int:
        values = reading.row.values
        name = next((c for c in COUNT_COLUMNS if values.get(c) not in (None, "")), None)
        if name is None:
            return self._config.images_per_prompt
        count = integer(name, values[name])
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_IMAGES_PER_ROW:
            raise InvalidRequest(name, f"got {shown(count)}, allowed is 1..{MAX_IMAGES_PER_ROW}")
        return count

    def _rejected(
        self,
        reading: Reading,
        row_id: str,
        place: Place | None,
        error: InvalidRequest,
        user: Mapping[str, Any],
    ) -> PlannedImage:
        variant, index = (place.variant, place.index) if place else (None, 0)
        stem = f"{row_id}-{variant}" if variant else row_id
        original = {
            n: as_text(n, v)
            for n, v in reading.given.items()
            if n in REQUEST_COLUMNS and not isinstance(v, Reference)
        }
        return PlannedImage(
            f"{stem}-{index}",
            row_id,
            variant,
            index,
            reading.row.file,
            reading.row.line,
            field=error.field,
            reason=error.reason[:2000],
            original=original,
            user=user,
        )


def _with_hint(error: InvalidRequest, reading: Reading, variant: Variant) -> InvalidRequest:
    """The same; of a size from the row also how to leave it alone: in tables of pictures it is often the source's."""
    name = error.field
    number = str(reading.given.get(name)).isdecimal()
    if name not in ("width", "height") or not number or reading.place or name in variant.values:
        return error
    hint = f"if that column is not meant, say columns: {{{name}: null}} (--column {name}=)"
    return InvalidRequest(name, f"{error.reason}; {hint}")


def _is_plain(prompt: object, negative: object, seed: object) -> bool:
    """Whether texts and seed are certainly allowed; a request says what is wrong with them otherwise."""
    return (
        type(prompt) is str
        and len(prompt) <= MAX_PROMPT
        and (negative is None or (type(negative) is str and len(negative) <= MAX_PROMPT))
        and type(seed) is int
        and 0 <= seed <= MAX_SEED
    )


def derived_seed(job_seed: int, image_id: str) -> int:
    """63 bits that depend on the job's seed and the image's id only."""
    return text_hash(f"{job_seed}\0{image_id}") >> 1
