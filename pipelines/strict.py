"""The base of every config value, and what is said of values that are not allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from diffray.model.errors import DiffrayError


class InvalidJob(DiffrayError, ValueError):
    """A job config or an input table is wrong as a whole; nothing was started."""


class Strict(BaseModel):
    """Values that never change and have no unknown names."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def complaints(error: ValidationError, model: type[Strict]) -> list[str]:
    """A line for every key that is unknown, with those that are allowed, or has a value that is not."""
    return [
        f"{'.'.join(map(str, e['loc']))}: {e['msg']}{_allowed(model, e) if _is_unknown(e) else _got(e)}"
        for e in error.errors()
    ]


def _is_unknown(error: Mapping[str, Any]) -> bool:
    return bool(error["type"] == "extra_forbidden")


def _allowed(model: type[Strict], error: Mapping[str, Any]) -> str:
    """The names beside which an unknown one stands."""
    place: Any = model
    for name in error["loc"][:-1]:
        fields = place.model_fields if _is_strict(place) else {}
        inner = fields[name].annotation if name in fields else place
        place = next((kind for kind in (inner, *_inside(inner)) if _is_strict(kind)), place)
    names = [field.alias or name for name, field in place.model_fields.items()]
    return f"; allowed are {', '.join(names)}"


def _inside(annotation: Any) -> list[Any]:
    """All types that an annotation is made of."""
    parts = [part for part in get_args(annotation) if part is not annotation]
    return [one for part in parts for one in (part, *_inside(part))]


def _is_strict(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Strict)


def _got(error: Mapping[str, Any]) -> str:
    """The value that was refused, unless it could hold or be a secret."""
    value, place = error["input"], error["loc"]
    plain = value is None or isinstance(value, (str, int, float))
    return f", got {value!r}" if plain and place[:1] != ("storage",) else ""
