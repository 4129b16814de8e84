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


def complaints(error: ValidationError, model: type[Strict], values: Mapping[str, Any]) -> list[str]:
    """A line for every key that is unknown, with those that are allowed, or has a value that is not.

    Of a value that may be of several kinds the complaints of the kind that it is are shown, if it is any of them.
    """
    found = [(*_key(e, values), e) for e in error.errors()]
    kinds = {chosen for path, chosen, e in found if path != chosen or not _is_other_kind(e)}
    lines: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for path, chosen, e in found:
        if path != chosen or chosen not in kinds or not _is_other_kind(e):
            lines.setdefault(path, []).append(e)
    return [_line(path, errors, model) for path, errors in lines.items()]


def _key(error: Mapping[str, Any], values: Any) -> tuple[tuple[Any, ...], tuple[Any, ...] | None]:
    """The keys that lead to what is wrong, and those to the value around it that may be of several kinds.

    Pydantic puts the name of the kind that it tried among the keys, which is nowhere in the values.
    """
    path: list[Any] = []
    chosen = None
    for part in error["loc"]:
        try:
            values = values[part]
        except (LookupError, TypeError):
            if error["type"] != "missing" or part is not error["loc"][-1]:
                chosen = tuple(path) if chosen is None else chosen
                continue
        path.append(part)
    return tuple(path), chosen


def _is_other_kind(error: Mapping[str, Any]) -> bool:
    return str(error["type"]).endswith(("_type", "_parsing"))


def _line(path: tuple[Any, ...], errors: list[Mapping[str, Any]], model: type[Strict]) -> str:
    messages = dict.fromkeys(_message(e) for e in errors)
    start = "Input should be "
    if all(message.startswith(start) for message in messages):
        text = start + " or ".join(message.removeprefix(start) for message in messages)
    else:
        text = "; ".join(messages)
    text += _allowed(model, errors[0]) if _is_unknown(errors[0]) else _got(errors[0])
    return f"{'.'.join(map(str, path))}: {text}" if path else text


def _message(error: Mapping[str, Any]) -> str:
    """Pydantic's, without the names of classes and of what happened inside."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    text = str(error["msg"])
    return text.partition(", unable to parse")[0].partition(" or instance of ")[0]


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
