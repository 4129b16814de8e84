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
ENTRY = re.compile(r"(\w+)\[(\d{0,3})\]\[(\w+)\]")
"""`text_prompts[0][weight]`, or `lora[][name]` counted up: a field of a list's entry."""
MEMBER = re.compile(r"(\w+)\[(\w+)\]")
"""`lora[name]`: a field of an object."""


async def read_form(
    http: Request, model: type[Body], files: Collection[str]
) -> tuple[Body, dict[str, list[bytes]]]:
    """The text fields as a `model`, and the uploaded files by the name of their field.

    Files may be named `name` or `name[]`, the values of a list `name[]`; objects and lists of them come in parts,
    see ENTRY and MEMBER. Empty fields count as left out.

    Raises:
        Refusal: 415, the body is no form.
        RequestValidationError: the fields do not fit the model.
        InvalidRequest: a field is there twice, or a file where none is known.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in TYPES:
        raise Refusal(415, "unsupported_media_type", f"the body must be {TYPES[0]}, got {kind or 'no type'}")
    texts: dict[str, list[str]] = {}
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
            else:
                texts.setdefault(key, []).append(value)
    return _validated(model, _joined(texts)), found


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
    """A field's schema without null, which a form cannot send, and with lists of objects as JSON text."""
    kinds = [
        {"type": "string", "contentMediaType": "application/json"}
        if "$ref" in kind.get("items", {})
        else kind
        for kind in schema.get("anyOf", [])
        if kind != {"type": "null"}
    ]
    rest = {key: value for key, value in schema.items() if key not in ("anyOf", "default", "title")}
    if "anyOf" not in schema:
        return rest | ({"default": schema["default"]} if schema.get("default") is not None else {})
    return rest | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds})


def _joined(fields: Mapping[str, list[str]]) -> dict[str, Any]:
    """The fields' values by name, those of objects and of lists' entries put together.

    Raises:
        InvalidRequest: a field is there twice, or entries that are only counted have not the same fields.
    """
    values: dict[str, Any] = {}
    entries: dict[str, dict[int, dict[str, str]]] = {}
    for key, texts in fields.items():
        if "[]" not in key and len(texts) > 1:
            raise InvalidRequest(key, f"got it {len(texts)} times, allowed is once")
        if key.endswith("[]"):
            _put(values, key.removesuffix("[]"), texts)
        elif entry := ENTRY.fullmatch(key):
            for index, text in enumerate(texts, int(entry[2] or 0)):
                _put(entries.setdefault(entry[1], {}).setdefault(index, {}), entry[3], text)
            if not entry[2] and len(set(map(frozenset, entries[entry[1]].values()))) > 1:
                raise InvalidRequest(entry[1], "give all its entries the same fields, or number them: [0]")
        elif member := MEMBER.fullmatch(key):
            _put(values.setdefault(member[1], {}), member[2], texts[0])
        else:
            _put(values, key, texts[0])
    for name, found in entries.items():
        _put(values, name, [found[index] for index in sorted(found)])
    return values


def _put(values: Any, name: str, value: object) -> None:
    if not isinstance(values, dict) or name in values:
        raise InvalidRequest(name, "got it twice, allowed is once")
    values[name] = value


def _validated(model: type[Body], values: dict[str, Any]) -> Body:
    try:
        return model.model_validate(values, strict=False)
    except ValidationError as error:
        raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in error.errors()]) from error
