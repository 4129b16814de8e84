"""The input columns that diffray does not know: their names and types in the output."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from ..terms.schemas import OWN_COLUMNS
from .references import Reference

FEATURE = b"huggingface"
EXACT = 1 << 53
"""Integers up to here are what they are as float64."""


class UserColumns:
    """Names and types of the user's columns.

    Types are those that the input states (`stated`), else what fits all values that `observe` saw; a column whose
    values fit no common type becomes JSON text. Names that diffray uses itself get `input_` in front. What a
    Hugging Face dataset says about a column (`features`) goes with it, as metadata of its field.
    """

    def __init__(self, stated: pa.Schema | None, features: Mapping[str, Any]) -> None:
        self._features = features
        self._stated = {field.name: field.type for field in stated} if stated else {}
        self._types: dict[str, pa.DataType | None] = {}
        self._pending: dict[str, list[Any]] = {}
        self._names: dict[str, str] = {}
        self._wide: set[str] = set()
        """Where an integer stood that float64 does not hold exactly."""
        self.schema = pa.schema([])

    def observe(self, values: Mapping[str, Any]) -> None:
        """Take a row's own columns into account."""
        for name, value in values.items():
            if name in self._stated:
                self._types[name] = self._stated[name]
                continue
            self._types.setdefault(name, pa.null())
            pending = self._pending.setdefault(name, [])
            pending.append(b"" if isinstance(value, Reference) else value)
            if len(pending) >= 1000:
                self._settle(name)

    def finish(self, own: pa.Schema) -> None:
        """Fix names and types, after those of `own`; `schema` and `pick` are valid from here on."""
        for name in self._pending:
            self._settle(name)
        fields = list(own)
        for name, kind in self._types.items():
            output = name
            while (
                output in OWN_COLUMNS
                or output in own.names
                or output in self._names.values()
                or (output != name and output in self._types)
            ):
                output = f"input_{output}"
            self._names[name] = output
            known = {FEATURE: json.dumps(self._features[name])} if name in self._features else None
            shown = pa.string() if kind is None or pa.types.is_null(kind) else kind
            fields.append(pa.field(output, shown, metadata=known))
        self.schema = pa.schema(fields)

    def pick(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A row's own values by output name."""
        return {
            self._names[name]: _json(value) if self._types[name] is None else value
            for name, value in values.items()
        }

    def _settle(self, name: str) -> None:
        """Widen the type of a column to what its pending values need; None stands for JSON text."""
        kind, values = self._types[name], self._pending[name]
        self._pending[name] = []
        if kind is None:
            return
        try:
            schemas = [pa.schema([(name, kind)]), pa.schema([(name, pa.array(values).type)])]
            merged = pa.unify_schemas(schemas, promote_options="permissive").field(name).type
            for value in values:
                self._wide.update(_wide(value, name))
            odd = "struct<>" in str(merged) or not self._wide.isdisjoint(_floats(merged, name))
            self._types[name] = None if odd else merged
        except (pa.ArrowException, OverflowError):
            self._types[name] = None


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _wide(value: Any, path: str) -> Iterator[str]:
    """The places below `path` where a value has an integer above `EXACT`."""
    if type(value) is int:
        if abs(value) > EXACT:
            yield path
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _wide(part, f"{path}.{name}")
    elif isinstance(value, list):
        for part in value:
            yield from _wide(part, f"{path}[]")


def _floats(kind: pa.DataType, path: str) -> Iterator[str]:
    """The places below `path` where a type has floating-point numbers."""
    if pa.types.is_floating(kind):
        yield path
    elif pa.types.is_struct(kind):
        for field in kind:
            yield from _floats(field.type, f"{path}.{field.name}")
    elif pa.types.is_list(kind):
        yield from _floats(kind.value_type, f"{path}[]")
