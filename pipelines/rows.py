"""One input row becomes one `ImageRequest` per image, with an id and a seed that never change.

Ids. A row's id is its `id` column, else a hash of its content (with `.2`, `.3`, ... for repetitions), so
that a table that only grew keeps the ids of its rows. Image k of a row is `<row id>-<k>`, counted from 0.

Seeds. A given seed (row or job default) is that of image 0; image k gets seed + k, as in AUTOMATIC1111.
Without one it is a 63-bit hash of the job's seed and the image's id.

Rows that diffray wrote (`data/`, `rejected/`) can be fed back: with the columns `row_id` and `index` a row
asks for exactly that image, under the same id, and its `seed` is the image's own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from diffray.model.config import ModelConfig
from diffray.model.errors import InvalidRequest
from diffray.model.request import ImageRequest

from .source import SourceRow

MAX_IMAGES_PER_ROW = 100_000
MAX_ID = 500
COUNT_COLUMNS = ("n", "images_per_prompt")


def _plain_fields() -> dict[str, pa.DataType]:
    """The request's plain-valued fields in declaration order, with their Parquet types."""
    plain = {
        int: pa.int64(),
        float: pa.float64(),
        str: pa.string(),
        bool: pa.bool_(),
        tuple[float, ...]: pa.list_(pa.float64()),
        tuple[int, int]: pa.list_(pa.int64()),
    }
    columns = {}
    for name in ImageRequest().parameters():
        hint = typing.get_type_hints(ImageRequest)[name]
        union = typing.get_origin(hint) in (types.UnionType, typing.Union)
        options = typing.get_args(hint) if union else (hint,)
        columns[name] = next(plain[option] for option in options if option in plain)
    return columns


REQUEST_COLUMNS: dict[str, pa.DataType] = _plain_fields()
IMAGE_COLUMNS = tuple(f for f in ImageRequest.__dataclass_fields__ if f not in REQUEST_COLUMNS)


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """One image of the plan: what to make, or why it cannot be made (`request` is None, `reason` is set)."""

    id: str
    row_id: str
    index: int
    file: str
    line: int
    request: ImageRequest | None
    field: str | None = None
    reason: str | None = None
    original: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    """The row's own request values as text; kept only for rejected rows, whose values fit no column."""
    user: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The columns that diffray does not know, by their name in the output."""


@dataclass(frozen=True, slots=True)
class RowRules:
    """What the job says about every row."""

    model: ModelConfig
    defaults: Mapping[str, Any]
    images_per_prompt: int
    seed: int

    def images(self, row: SourceRow, row_id: str, user: Mapping[str, Any]) -> Iterator[PlannedImage]:
        """The images of one row; a value that is not allowed makes them rejected, never an exception."""
        given = {name: row.values[name] for name in REQUEST_COLUMNS if row.values.get(name) is not None}
        place = given_place(row)
        original = {name: as_text(value) for name, value in given.items()}
        try:
            if row.problem:
                raise InvalidRequest("row", row.problem)
            check_id(row)
            indices = [place[1]] if place else range(self._count(row))
            values = {**self.defaults, **{name: parsed(name, value) for name, value in given.items()}}
            if "prompt" not in values:
                raise InvalidRequest("prompt", "got nothing, every row needs one (it may be empty)")
        except InvalidRequest as error:
            index = place[1] if place else 0
            yield self._rejected(row, row_id, index, error, original, user)
            return
        for k in indices:
            image_id = f"{row_id}-{k}"
            base = values.get("seed")
            if base is None:
                seed: Any = derived_seed(self.seed, image_id)
            else:
                own = place is not None and "seed" in given
                seed = base if own or not isinstance(base, int) else base + k
            try:
                request = ImageRequest(**{**values, "seed": seed}).resolved(self.model)
                if request.output != "image":
                    raise InvalidRequest("output", f"got {request.output!r}, a batch job makes images")
            except InvalidRequest as error:
                shown = {**original, "seed": as_text(seed)} if base is not None else original
                yield self._rejected(row, row_id, k, error, shown, user)
                continue
            yield PlannedImage(image_id, row_id, k, row.file, row.line, request, user=user)

    def _count(self, row: SourceRow) -> int:
        name = next((c for c in COUNT_COLUMNS if row.values.get(c) not in (None, "")), None)
        if name is None:
            return self.images_per_prompt
        count = _integer(name, row.values[name])
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_IMAGES_PER_ROW:
            raise InvalidRequest(name, f"got {_shown(count)}, allowed is 1..{MAX_IMAGES_PER_ROW}")
        return count

    @staticmethod
    def _rejected(
        row: SourceRow,
        row_id: str,
        index: int,
        error: InvalidRequest,
        original: Mapping[str, str | None],
        user: Mapping[str, Any],
    ) -> PlannedImage:
        image_id, reason = f"{row_id}-{index}", error.reason[:2000]
        return PlannedImage(
            image_id, row_id, index, row.file, row.line, None, error.field, reason, original, user
        )


def given_place(row: SourceRow) -> tuple[str, int] | None:
    """(row id, index) of a row that diffray wrote itself, else None."""
    row_id, index = row.values.get("row_id"), row.values.get("index")
    if isinstance(index, str) and index.isdecimal():
        index = int(index)
    if isinstance(row_id, str) and row_id and type(index) is int and index >= 0:
        return row_id, index
    return None


def given_id(row: SourceRow) -> str | None:
    """The row's own id as text, or None when it has none or one that is not allowed."""
    if place := given_place(row):
        return place[0]
    value = row.values.get("id")
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    return str(value) if 0 < len(str(value)) <= MAX_ID else None


def check_id(row: SourceRow) -> None:
    """Refuse an `id` that is there but is no id."""
    value = row.values.get("id")
    if value not in (None, "") and given_id(row) is None:
        raise InvalidRequest(
            "id", f"got {_shown(value)}, allowed is text of 1..{MAX_ID} characters or an integer"
        )


def content_hash(row: SourceRow) -> int:
    """64 bits of the row's values, whatever their order; of its place when it could not be read."""
    content: object = {k: v for k, v in row.values.items() if v is not None} or [row.file, row.line]
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def derived_seed(job_seed: int, image_id: str) -> int:
    """63 bits that depend on the job's seed and the image's id only."""
    digest = hashlib.blake2b(f"{job_seed}\0{image_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def parsed(name: str, value: Any) -> Any:
    """A cell as the type of request field `name`: text is read as a number, a list becomes a tuple.

    What does not read as that type raises InvalidRequest; ranges are the request's own business.
    """
    kind = REQUEST_COLUMNS[name]
    if pa.types.is_string(kind):
        return value
    if pa.types.is_list(kind):
        parts = _list(name, value)
        return tuple(
            _integer(name, p) if pa.types.is_integer(kind.value_type) else _number(name, p) for p in parts
        )
    if pa.types.is_boolean(kind):
        return _boolean(name, value)
    return _integer(name, value) if pa.types.is_integer(kind) else _number(name, value)


def request_from(values: Mapping[str, Any]) -> ImageRequest:
    """A request from plain values, text included, as a table or a command line gives them.

    Raises:
        InvalidRequest: an unknown field, or a value that is not allowed.
    """
    if unknown := sorted(set(values) - set(REQUEST_COLUMNS)):
        raise InvalidRequest(unknown[0], f"no such request field, allowed are {', '.join(REQUEST_COLUMNS)}")
    return ImageRequest(**{name: parsed(name, value) for name, value in values.items() if value is not None})


def as_text(value: Any) -> str | None:
    """A request value as text that `parsed` reads back."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, default=str)


def _integer(name: str, value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)  # pandas turns integer columns with gaps into floats
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            raise InvalidRequest(name, f"got {_shown(value)}, allowed is an integer") from None
    return value


def _number(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        raise InvalidRequest(name, f"got {_shown(value)}, allowed is a number") from None


def _boolean(name: str, value: Any) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(value, bool):
        return value
    if (text := str(value).lower()) in known:
        return known[text]
    raise InvalidRequest(name, f"got {_shown(value)}, allowed is true or false")


def _list(name: str, value: Any) -> list[Any]:
    if isinstance(value, str):
        return [part.strip() for part in value.strip().removeprefix("[").removesuffix("]").split(",")]
    if isinstance(value, (list, tuple)):
        return list(value)
    raise InvalidRequest(name, f"got {_shown(value)}, allowed is a list of numbers")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."
