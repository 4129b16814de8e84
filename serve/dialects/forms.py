"""Multipart bodies: their text fields as one validated model, their files as bytes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.requests import Request

from diffray.model import InvalidRequest

from ..refusal import Refusal

Body = TypeVar("Body", bound=BaseModel)
FILES = 16
FIELDS = 200
TYPES = ("multipart/form-data", "application/x-www-form-urlencoded")
INDEXED = re.compile(r"(\w+)\[(\d{1,3})\]\[(\w+)\]")
"""`text_prompts[0][weight]`: a field of a list's entry."""


async def read_form(
    http: Request, model: type[Body], files: Collection[str]
) -> tuple[Body, dict[str, list[bytes]]]:
    """The text fields as a `model`, and the uploaded files by the name of their field.

    Files may be named `name` or `name[]`, the values of a list `name[]`. Empty fields count as left out.

    Raises:
        Refusal: 415, the body is no form.
        RequestValidationError: the fields do not fit the model.
        InvalidRequest: a field is there twice, or a file where none is known.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in TYPES:
        raise Refusal(415, "unsupported_media_type", f"the body must be {TYPES[0]}, got {kind or 'no type'}")
    texts: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    found: dict[str, list[bytes]] = {}
    async with http.form(max_files=FILES, max_fields=FIELDS) as form:
        for key, value in form.multi_items():
            name = key.removesuffix("[]")
            if not value or (isinstance(value, UploadFile) and not value.size):
                continue
            if isinstance(value, UploadFile):
                if name not in files:
                    raise InvalidRequest(name, "got a file, and none is known by this name")
                found.setdefault(name, []).append(await value.read())
            elif name in files:
                raise InvalidRequest(name, "got text, allowed is an uploaded file")
            elif key != name:
                lists.setdefault(name, []).append(value)
            elif name in texts:
                raise InvalidRequest(name, "got it twice, allowed is once")
            else:
                texts[name] = value
    return _validated(model, _nested(texts) | lists), found


def one_file(files: Mapping[str, list[bytes]], name: str) -> bytes:
    """The file of a field that takes exactly one.

    Raises:
        InvalidRequest: there is none, or there are several.
    """
    found = files.get(name, [])
    if len(found) != 1:
        raise InvalidRequest(name, f"got {len(found)} files, allowed is one picture")
    return found[0]


def form_schema(model: type[BaseModel], **files: str) -> dict[str, Any]:
    """The `openapi_extra` of a route whose body `read_form` reads; `files` are descriptions by name.

    A description that ends in "*" is that of a required file.
    """
    schema = model.model_json_schema()
    required = [name for name, text in files.items() if text.endswith("*")]
    properties: dict[str, Any] = {
        name: {"type": "string", "format": "binary", "description": text.removesuffix("*").strip()}
        for name, text in files.items()
    }
    for name, value in schema["properties"].items():
        reference = value.get("items", {}).get("$ref", "").rpartition("/")[2]
        entry = schema["$defs"][reference] if reference else {"properties": {"": value}}
        needed = entry.get("required", []) if reference else [""]
        for key, part in entry["properties"].items():
            field = f"{name}[0][{key}]" if reference else name
            properties[field] = _given(part)
            if name in schema.get("required", []) and key in needed:
                required.append(field)
    body = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    body |= {"examples": schema["examples"]} if "examples" in schema else {}
    return {"requestBody": {"required": True, "content": {TYPES[0]: {"schema": body}}}}


def _given(schema: dict[str, Any]) -> dict[str, Any]:
    """A field's schema without null, which a form cannot send."""
    kinds = [kind for kind in schema.get("anyOf", []) if kind != {"type": "null"}]
    rest = {key: value for key, value in schema.items() if key not in ("anyOf", "default", "title")}
    if "anyOf" not in schema:
        return rest | ({"default": schema["default"]} if schema.get("default") is not None else {})
    return rest | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds})


def _nested(texts: dict[str, str]) -> dict[str, Any]:
    """`name[0][key]` fields as lists of objects, in the order of their numbers."""
    values: dict[str, Any] = {}
    lists: dict[str, dict[int, dict[str, str]]] = {}
    for key, text in texts.items():
        match = INDEXED.fullmatch(key)
        if match is None:
            values[key] = text
        else:
            lists.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = text
    return values | {name: [entries[i] for i in sorted(entries)] for name, entries in lists.items()}


def _validated(model: type[Body], values: dict[str, Any]) -> Body:
    try:
        return model.model_validate(values, strict=False)
    except ValidationError as error:
        raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in error.errors()]) from error
