"""Plain values, as tables and command lines give them, to request fields and back."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pyarrow as pa

from diffray.model.adapters.choices import AdapterChoice, adapter_choices, shown_weight
from diffray.model.errors import InvalidRequest
from diffray.model.request import ImageRequest


def _plain_fields() -> dict[str, pa.DataType]:
    """The request's plain-valued fields in declaration order, with their Parquet types."""
    plain = {
        int: pa.int64(),
        float: pa.float64(),
        str: pa.string(),
        bool: pa.bool_(),
        tuple[float, ...]: pa.list_(pa.float64()),
        tuple[int, int]: pa.list_(pa.int64()),
        tuple[AdapterChoice, ...]: pa.list_(pa.struct({"name": pa.string(), "weight": pa.float64()})),
    }
    columns = {}
    for name in ImageRequest().parameters():
        hint = typing.get_type_hints(ImageRequest)[name]
        union = typing.get_origin(hint) in (types.UnionType, typing.Union)
        options = typing.get_args(hint) if union else (hint,)
        columns[name] = next(plain[option] for option in options if option in plain)
    return columns


REQUEST_COLUMNS: dict[str, pa.DataType] = _plain_fields()


def parsed(name: str, value: Any, kind: pa.DataType | None = None) -> Any:
    """A cell as the type of request field `name` (or of `kind`): text is read as a number, a list becomes a tuple.

    What does not read as that type raises InvalidRequest; ranges are the request's own business.
    """
    if name == "adapters":
        return adapter_choices(value)
    kind = REQUEST_COLUMNS[name] if kind is None else kind
    if pa.types.is_string(kind):
        return value
    if pa.types.is_list(kind):
        parts = _list(name, value)
        return tuple(
            integer(name, p) if pa.types.is_integer(kind.value_type) else _number(name, p) for p in parts
        )
    if pa.types.is_boolean(kind):
        return _boolean(name, value)
    return integer(name, value) if pa.types.is_integer(kind) else _number(name, value)


def request_from(values: Mapping[str, Any]) -> ImageRequest:
    """A request from plain values, text included, as a table or a command line gives them.

    Raises:
        InvalidRequest: an unknown field, or a value that is not allowed.
    """
    if unknown := sorted(set(values) - set(REQUEST_COLUMNS)):
        raise InvalidRequest(unknown[0], f"no such request field, allowed are {', '.join(REQUEST_COLUMNS)}")
    return ImageRequest(**{name: parsed(name, value) for name, value in values.items() if value is not None})


def as_text(name: str, value: Any) -> str | None:
    """The value of request field `name` as text that `parsed` reads back."""
    if value is None or isinstance(value, str):
        return value
    if name == "adapters":
        with suppress(InvalidRequest):  # else it reads back as something that is not allowed either
            return ", ".join(f"{own.name}:{shown_weight(own.weight)}" for own in adapter_choices(value))
    return json.dumps(value, default=str)


def shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


def integer(name: str, value: Any) -> Any:
    """`value` as an integer if it is one that was written in another way; anything else as it is."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)  # pandas turns integer columns with gaps into floats
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            raise InvalidRequest(name, f"got {shown(value)}, allowed is an integer") from None
    return value


def _number(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        raise InvalidRequest(name, f"got {shown(value)}, allowed is a number") from None


def _boolean(name: str, value: Any) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(value, bool):
        return value
    if (text := str(value).lower()) in known:
        return known[text]
    raise InvalidRequest(name, f"got {shown(value)}, allowed is true or false")


def _list(name: str, value: Any) -> list[Any]:
    if isinstance(value, str):
        return [part.strip() for part in value.strip().removeprefix("[").removesuffix("]").split(",")]
    if isinstance(value, (list, tuple)):
        return list(value)
    raise InvalidRequest(name, f"got {shown(value)}, allowed is a list of numbers")
