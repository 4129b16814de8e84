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

    A field may be named `name` or `name[]`. Empty fields count as left out.

    Raises:
        Refusal: 415, the body is no form.
        RequestValidationError: the fields do not fit the model.
        InvalidRequest: a field is there twice, or a file where none is known.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in TYPES:
        raise Refusal(415, "unsupported_media_type", f"the body must be {TYPES[0]}, got {kind or 'no type'}")
    texts: dict[str, str] = {}
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
            elif name in texts:
                raise InvalidRequest(name, "got it twice, allowed is once")
            else:
                texts[name] = value
    return _validated(model, _nested(texts)), found


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
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    required = [*schema.get("required", ()), *(name for name, text in files.items() if text.endswith("*"))]
    pictures = {
        name: {"type": "string", "format": "binary", "description": text.removesuffix("*").strip()}
        for name, text in files.items()
    }
    properties = {**pictures, **schema["properties"]}
    body = {**schema, "properties": properties, "required": required}
    return {"requestBody": {"required": True, "content": {TYPES[0]: {"schema": body}}}}


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
