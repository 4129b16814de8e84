"""The survey: the first pass over an input proves that ids are unique and finds the types of the user's columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from ..config import InvalidJob
from ..hashing import text_hash
from ..inputs.carried import UserColumns
from ..inputs.columns import COUNT_COLUMNS, Reading, content_hash
from ..inputs.source import Source
from ..terms.image import PlannedImage
from ..terms.schemas import SOURCE_COLUMN
from .hashes import RowHashes
from .rows import RowRules

SHOWN = 5
"""Duplicate ids that a message names, and places of each."""


class Survey:
    """What the first pass over the input learned.

    Attributes:
        rows: how many rows there are, unreadable ones included.
        user: the columns that the job carries beside the request's own, with their types.
        used: field to the columns that it is read from, but for fields that a template or the sweep makes.

    Raises:
        InvalidJob: no `prompt` column, two columns that mean the same, or duplicate ids.
    """

    def __init__(self, source: Source, rules: RowRules) -> None:
        self._source, self._rules = source, rules
        self.rows = 0
        columns: dict[str, None] = {}
        header: dict[str, None] = {}
        self._problem = ""
        stated = [field for field in source.schema() or () if field.name not in rules.variables]
        features = {name: own for name, own in source.features.items() if name not in rules.variables}
        user = UserColumns(pa.schema(stated), features)
        found = {name: _class_names(feature) for name, feature in features.items()}
        rules.classes = {name: names for name, names in found.items() if names is not None}
        for variant in rules.variants:
            user.observe({name: variant.values[name] for name in rules.variables})
        self._ids, placed = RowHashes(_derived_id_hash), 0
        for row in source.rows():
            self.rows += 1
            columns.update(dict.fromkeys(row.values))
            header.update(dict.fromkeys(row.header))
            if row.problem is not None and not self._problem:
                self._problem = f"{row.file}:{row.line}: {row.problem}"
            reading = rules.columns.read(row)
            user.observe(self._carried(reading))
            if row.problem is None:
                placed += reading.place is not None
                if reading.key is None:
                    self._ids.add_derived(content_hash(row))
                else:
                    self._ids.add_given(text_hash(reading.key))
        if all(name in columns for name in COUNT_COLUMNS):
            raise InvalidJob(f"the input has both columns {' and '.join(COUNT_COLUMNS)}; they mean the same")
        self._check_columns({**columns, **header}, placed=placed > 0)
        if 0 < placed < len(self._ids):
            raise InvalidJob(
                f"{placed} rows name their image by row_id and index, the others do not: use one way"
            )
        self._check_unique()
        user.finish(self._own_schema(columns))
        self.user = user
        rules.swept = {
            variant.id: user.pick({name: variant.values[name] for name in rules.variables})
            for variant in rules.variants
        }
        made = {*rules.templates, *(name for variant in rules.variants for name in variant.values)}
        order = [*rules.columns.fields, "id", *COUNT_COLUMNS]
        self.used = {
            name: tuple(rules.columns.used[name])
            for name in order
            if name in rules.columns.used and name not in made
        }

    def images(self) -> Iterator[PlannedImage]:
        """The second pass: every image of the job, in input order."""
        self._ids.count_again()
        for row in self._source.rows():
            reading = self._rules.columns.read(row)
            row_id = reading.id
            if row_id is None:
                content = content_hash(row)
                occurrence = self._ids.occurrence(content)
                row_id = _derived_id(content) + (f".{occurrence}" if occurrence > 1 else "")
            yield from self._rules.images(reading, row_id, self.user.pick(self._carried(reading)))

    def _carried(self, reading: Reading) -> dict[str, Any]:
        """The user's own columns; a swept variable takes the place of a column of its name."""
        if not self._rules.variables or reading.place:
            return reading.unknown
        return {n: v for n, v in reading.unknown.items() if n not in self._rules.variables}

    def _own_schema(self, columns: Mapping[str, None]) -> pa.Schema:
        """The task's own fields, and references to the sources that rows have or templates make."""
        rules = self._rules
        sources = [
            name
            for name in rules.columns.sources
            if name in rules.templates
            or SOURCE_COLUMN.get(name, name) in columns
            or any(column in columns for column in rules.columns.looked_for(name))
        ]
        fields = [(SOURCE_COLUMN.get(name, name), pa.string()) for name in sources]
        return pa.schema([*fields, *rules.kind.fields.items()])

    def _check_columns(self, columns: Mapping[str, None], *, placed: bool) -> None:
        rules, has = self._rules, ", ".join(columns) or "none"
        if self._problem and not columns:
            has = f"no readable row, the first is {self._problem}"
        if not self.rows:
            return
        for name, column in rules.columns.names.items():
            if column is not None and column not in columns and not placed:
                raise InvalidJob(f"columns.{name}: the input has no column {column!r}; it has {has}")
        made = {*rules.defaults, *rules.templates, *(name for v in rules.variants for name in v.values)}
        for name in ("prompt", *rules.kind.needs):
            looked = rules.columns.looked_for(name)
            if placed:  # diffray wrote them under its own names
                looked = (*looked, SOURCE_COLUMN.get(name, name))
            if name not in made and not any(column in columns for column in looked):
                if not looked:
                    raise InvalidJob(f"columns.{name}: got null, task {rules.kind.task} needs one")
                names = looked[:1] if name == "prompt" else looked[:3]
                raise InvalidJob(f"the input has no column {' or '.join(map(repr, names))}; it has {has}")
        for template in rules.templates.values():
            known = {*columns, *rules.columns.fields, *made, *rules.variables}
            if odd := sorted(template.names - known):
                where = f"templates.{template.field}"
                raise InvalidJob(f"{where}: the input has no column {odd[0]!r}; it has {has}")

    def _check_unique(self) -> None:
        count, suspects = self._ids.suspects()
        if not count:
            return
        places: dict[str, list[str]] = {}
        for row in self._source.rows():
            if row.problem is None:
                reading = self._rules.columns.read(row)
                key = _derived_id(content_hash(row)) if reading.key is None else reading.key
                if text_hash(key) in suspects:
                    where = places.setdefault(str(reading.place or repr(key)), [])
                    where += [f"{row.file}:{row.line}"] if len(where) < SHOWN else []
        double = {key: where for key, where in places.items() if len(where) > 1}
        if double:
            shown = "; ".join(f"{key} at {', '.join(where)}" for key, where in list(double.items())[:SHOWN])
            raise InvalidJob(f"duplicate ids, each would overwrite the other ({count} in all): {shown}")


def _class_names(feature: Mapping[str, Any]) -> list[str] | None:
    """The names of the classes that a column holds numbers of, or lists of numbers."""
    each = feature.get("feature", feature)
    names = each.get("names") if isinstance(each, dict) and each.get("_type") == "ClassLabel" else None
    return names if isinstance(names, list) else None


def _derived_id(content: int) -> str:
    return f"{content:016x}"


def _derived_id_hash(content: int) -> int:
    return text_hash(_derived_id(content))
