"""What the columns of a row mean to a job: request fields, the row's identity, and what is the user's own.

A field is read from the column that the job names, else from the one of its own name; from none where the job
says null, and then a column of that name is the user's own.

Rows that diffray wrote can be fed back in two ways. A row of `rejected/`, or of `data/` for another `generate`, asks
for exactly its image again: `row_id`, `variant` and `index` say which, and its `seed` is the image's own. Where a task
takes the *picture* of such a row as its source, the row counts as an ordinary one whose id is the image's: its prompts
are used, and everything else that made the picture is carried along as `input_...`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from diffray.model.errors import InvalidRequest

from ..hashing import text_hash
from ..terms.schemas import OWN_COLUMNS, SOURCE_COLUMN
from ..terms.tasks import ENDINGS, LATENTS, Kind
from ..terms.values import REQUEST_COLUMNS, shown
from .readers import SourceRow
from .references import Reference

MAX_ID = 500
COUNT_COLUMNS = ("n", "images_per_prompt")
MADE = ("image", "file_name", "latents", *ENDINGS)
"""Columns that hold what a job made."""
LABELS = ("mask", "depth")
"""Pictures that say something about the source picture: where they are values of a table, they are carried too."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which image a row that diffray wrote asks for."""

    row_id: str
    variant: str | None
    index: int

    def __str__(self) -> str:
        variant = f"variant {self.variant!r}, " if self.variant else ""
        return f"row_id {self.row_id!r}, {variant}index {self.index}"


@dataclass(frozen=True, slots=True)
class Reading:
    """One row as this job understands it.

    Attributes:
        given: the fields that hold something, as they stand there, references among them.
        unknown: the user's own columns.
        place: the image it asks for, None for an ordinary row.
    """

    row: SourceRow
    given: dict[str, Any]
    unknown: dict[str, Any]
    place: Place | None

    @property
    def id(self) -> str | None:
        """The row's own id as text, or None when it has none or one that is not allowed."""
        if self.place:
            return self.place.row_id
        value = self.row.values.get("id")
        if isinstance(value, (bool, Reference)) or not isinstance(value, (str, int)):
            return None
        return str(value) if 0 < len(str(value)) <= MAX_ID else None

    def check_id(self) -> None:
        """Refuse an `id` that is there but is no id."""
        value = self.row.values.get("id")
        if value not in (None, "") and self.id is None:
            raise InvalidRequest(
                "id", f"got {shown(value)}, allowed is text of 1..{MAX_ID} characters or an integer"
            )

    @property
    def key(self) -> str | None:
        """What must be unique among rows that bring their own id."""
        place = self.place
        return f"{place.row_id}\0{place.variant or ''}\0{place.index}" if place else self.id


@dataclass(frozen=True, slots=True)
class _Layout:
    """What to do with rows of one set of columns: (field, column) pairs, and the columns that are nobody's.

    `labels` are columns of masks and depth maps that the job reads: the user's own all the same.
    """

    plain: tuple[tuple[str, str], ...]
    searched: tuple[tuple[str, tuple[str, ...]], ...]
    unknown: tuple[str, ...]
    labels: tuple[str, ...]


class Columns:
    """Reads rows for one job.

    Args:
        kind: the task.
        names: request field to column; None for a field that no column holds.
        made: fields that a template makes.
        picks_model: whether a column `model` picks one of several models.

    Attributes:
        fields: every field that a column may hold.
        names: request field to the column that the job names.
        sources: the picture fields that this job reads.
        used: field to the columns where the rows that were read so far may hold it.
    """

    def __init__(
        self, kind: Kind, names: Mapping[str, str | None], made: Collection[str], *, picks_model: bool
    ) -> None:
        self._kind, self.names = kind, names
        self.used: dict[str, dict[str, None]] = {}
        self.sources = kind.sources([*names, *made])
        self.fields = (*REQUEST_COLUMNS, *kind.fields, *self.sources, *(("model",) if picks_model else ()))
        self._source = "latents" if kind.task == "decode" else "init_image"
        self._layout = lru_cache(maxsize=1024)(self._laid_out)

    def looked_for(self, field: str) -> tuple[str, ...]:
        """The columns where a field may be; the first that holds something counts."""
        if field not in self.names:
            return self._kind.columns(field)
        column = self.names[field]
        return () if column is None else (column,)

    def read(self, row: SourceRow) -> Reading:
        """What a row says to this job."""
        values = row.values
        place = _place(values) if "row_id" in values else None
        source = place is not None and self._is_source(values)
        layout = self._layout(tuple(values), place is not None, source)
        given = {name: v for name, column in layout.plain if (v := values[column]) is not None}
        used = set()
        for name, columns in layout.searched:
            column = next((c for c in columns if values.get(c) is not None), columns[0])
            used.add(column)
            if (value := values.get(column)) is not None:
                given[name] = value
        unknown = {name: values[name] for name in layout.unknown if name not in used}
        for name in layout.labels:  # one named by path or made by diffray is in the plan as it stands there
            if isinstance(values[name], Reference):
                unknown[name] = values[name]
        return Reading(row, given, unknown, None if source else place)

    def _laid_out(self, names: tuple[str, ...], placed: bool, source: bool) -> _Layout:
        plain, searched = [], []
        # Of what made the source only its prompts are used, and what says how to read it.
        kept = {"prompt", "negative_prompt", *(LATENTS if self._kind.task == "decode" else ())}
        for field in self.fields:
            columns = self.looked_for(field)
            if placed and not source:
                columns = (SOURCE_COLUMN.get(field, field), *columns)
            if source and field == self._source:
                columns = tuple(c for c in columns if c in MADE) or columns
            elif source and field not in self.names and field not in kept:
                continue
            found = tuple(c for c in dict.fromkeys(columns) if c in names)
            if len(found) > 1:
                searched.append((field, found))
            elif found:
                plain.append((field, found[0]))
        known = {"id", *COUNT_COLUMNS, *(column for _, column in plain)}
        if placed and not source:
            known |= OWN_COLUMNS.union(self.fields)
        read = [*plain, *((field, column) for field, found in searched for column in found)]
        named = [] if placed else [(name, name) for name in ("id", *COUNT_COLUMNS) if name in names]
        for field, column in (*read, *named):
            self.used.setdefault(field, {})[column] = None
        labels = dict.fromkeys(column for field, column in read if field in LABELS)
        return _Layout(
            tuple(plain), tuple(searched), tuple(n for n in names if n not in known), tuple(labels)
        )

    def _is_source(self, values: Mapping[str, Any]) -> bool:
        """Whether what diffray made in this row is what the job starts from."""
        looked = self.looked_for(self._source) if self._kind.needs else ()
        return any(column in MADE and values.get(column) is not None for column in looked)


_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str).encode


def content_hash(row: SourceRow) -> int:
    """64 bits of the row's values, whatever their order; of its place when it could not be read."""
    content: object = {k: v for k, v in row.values.items() if v is not None} or [row.file, row.line]
    return text_hash(_CANONICAL(content))


def _place(values: Mapping[str, Any]) -> Place | None:
    row_id, index, variant = values["row_id"], values.get("index"), values.get("variant")
    if isinstance(index, str) and index.isdecimal():
        index = int(index)
    if isinstance(row_id, str) and row_id and type(index) is int and index >= 0:
        return Place(row_id, variant if isinstance(variant, str) and variant else None, index)
    return None
