"""Templates and sweeps: how one row becomes requests that differ.

    templates: {prompt: "a photo of {label}, {weather}"}
    sweep:     {weather: [rain, snow], strength: {from: 0.3, to: 0.7, step: 0.2}}

A template's names are columns of the row or names of the sweep; doubled braces stand for single ones. A sweep
names request fields, `model`, or template variables; every combination of its values is a variant of each row,
with an id that is a hash of that combination alone. So variants keep their ids, and with them their seeds, when
values are added, taken away or put in another order.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffray.model.errors import InvalidRequest

from ..config import InvalidJob
from ..inputs.references import Reference
from ..options import Range

MAX_VARIANTS = 10_000


@dataclass(frozen=True, slots=True)
class Variant:
    """One combination of swept values; `id` is None when nothing is swept."""

    id: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)


def variants(sweep: Mapping[str, Sequence[Any] | Range]) -> tuple[Variant, ...]:
    """Every combination, the last name changing fastest.

    Raises:
        InvalidJob: too many, a value twice, or an empty list.
    """
    if not sweep:
        return (Variant(),)
    total = math.prod(map(len, sweep.values()))
    if total > MAX_VARIANTS:
        raise InvalidJob(f"sweep: got {total} combinations, allowed are {MAX_VARIANTS}")
    lists = [
        (name, values.values() if isinstance(values, Range) else list(values))
        for name, values in sweep.items()
    ]
    for name, values in lists:
        if len({json.dumps(v) for v in values}) < len(values) or not values:
            raise InvalidJob(f"sweep.{name}: got {values}, expected at least one value, each once")
    names = [name for name, _ in lists]
    found = [
        Variant(_hash(combination), combination)
        for chosen in itertools.product(*(values for _, values in lists))
        for combination in [dict(zip(names, chosen, strict=True))]
    ]
    if len({variant.id for variant in found}) < len(found):
        raise InvalidJob("sweep: two combinations have the same id; change any value a little")
    return tuple(found)


def _hash(combination: Mapping[str, Any]) -> str:
    text = json.dumps(combination, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()


class Template:
    """Text with `{names}` in it.

    Raises:
        InvalidJob: it does not parse, or asks for more than names.
    """

    def __init__(self, name: str, text: str) -> None:
        self.field = name
        try:
            self._parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise InvalidJob(f"templates.{name}: {error} in {text!r}; write {{{{ for a brace") from None
        for _, key, spec, conversion in self._parts:
            if key is not None and (not key or spec or conversion or set(key) & set(".[]")):
                raise InvalidJob(f"templates.{name}: {{{key}}} in {text!r}: allowed is the name of a column")
        self.names = {key for _, key, _, _ in self._parts if key is not None}

    def expanded(self, values: Mapping[str, Any], classes: Mapping[str, Sequence[str]]) -> str:
        """The text with its names replaced; class numbers by the names that the input gives them.

        Raises:
            InvalidRequest: a name has no value here, or one that is no text.
        """
        return "".join(
            literal + ("" if key is None else self._text(key, values.get(key), classes.get(key)))
            for literal, key, _, _ in self._parts
        )

    def _text(self, key: str, value: Any, classes: Sequence[str] | None) -> str:
        if isinstance(value, str) and not isinstance(value, Reference):
            return value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if classes is not None and isinstance(value, int) and 0 <= value < len(classes):
            return classes[value]
        if isinstance(value, (int, float)):
            return str(value)
        each = str if classes is None else int
        if isinstance(value, list) and value and all(isinstance(part, each) for part in value):
            return ", ".join(self._text(key, part, classes) for part in value)
        got = "nothing" if value is None else "bytes" if isinstance(value, str) else type(value).__name__
        raise InvalidRequest(self.field, f"its template needs {key!r}, this row has {got} there")
