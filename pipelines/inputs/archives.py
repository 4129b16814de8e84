"""WebDataset tars as rows: the members that share a name up to its first dot are one row.

`.json` gives its keys as columns, `.txt` its text, `.cls` its number; every other member is a column of that name
and stays in the tar. `__key__` holds the shared name. A key of the JSON that is one of these columns too gets `input_`
in front, as in tars that diffray made of tars. Members whose names begin with a dot are passed by.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Collection, Iterator
from itertools import groupby
from posixpath import basename, split
from typing import IO, Any

from ..config import InvalidJob
from .readers import SourceRow, checked
from .references import Member, Reference

MAX_TEXT = 1 << 20
"""Bytes of a member that is read while planning."""


class _BadMember(ValueError):
    """A member that spoils its row."""


def read_tar(file: IO[bytes], name: str) -> Iterator[SourceRow]:
    """Rows of an uncompressed tar.

    Raises:
        InvalidJob: it is no tar.
    """
    size = file.seek(0, 2)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            groups = groupby(_members(archive), key=lambda pair: pair[0])
            for line, (key, group) in enumerate(groups, start=1):
                values: dict[str, Any] = {"__key__": key}
                try:
                    for _, member in group:
                        _add(values, archive, member, name, size)
                except _BadMember as error:
                    yield SourceRow(name, line, problem=f"sample {key!r}: {error}")
                    continue
                for key, value in values.pop("json", {}).items():
                    values[_free(key, values)] = value
                yield checked(name, line, values)
    except tarfile.TarError as error:
        raise InvalidJob(f"input {name}: {error}") from None


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo | None]]:
    """Every member with its sample's key; None where a tar that began well breaks off."""
    key = None
    try:
        while member := archive.next():
            archive.members.clear()  # type: ignore[attr-defined]  # or it would remember every one
            if not (member.isdir() or basename(member.name).startswith(".")):  # macOS adds such ones
                key = _key(member.name)
                yield key, member
    except tarfile.ReadError:
        if key is None:
            raise
        yield key, None


def _key(path: str) -> str:
    folder, name = split(path)
    stem = name.partition(".")[0]
    return f"{folder}/{stem}" if folder else stem


def _free(key: str, taken: Collection[str]) -> str:
    while key in taken:
        key = f"input_{key}"
    return key


def _add(
    values: dict[str, Any],
    archive: tarfile.TarFile,
    member: tarfile.TarInfo | None,
    name: str,
    size: int,
) -> None:
    if member is None:
        raise _BadMember("the tar is cut off here")
    column = split(member.name)[1].partition(".")[2].lower()
    if not column or column in values:
        raise _BadMember(f"member {member.name!r} has {'its ending twice' if column else 'no ending'}")
    if not member.isfile():
        raise _BadMember(f"member {member.name!r} is no file")
    if member.offset_data + member.size > size:
        raise _BadMember(f"member {member.name!r} is cut off: the tar ends before it")
    if column not in ("json", "txt", "cls"):
        values[column] = Reference.to(Member(name, member.offset_data, member.size))
        return
    if member.size > MAX_TEXT:
        raise _BadMember(f"member {member.name!r} has {member.size} bytes, allowed are {MAX_TEXT}")
    found = archive.extractfile(member)
    assert found is not None  # it is a file
    try:
        text = found.read().decode("utf-8")
        if column == "txt":
            values["txt"] = text.strip()
        elif column == "cls":
            values["cls"] = int(text)
        else:
            fields = json.loads(text)
            if not isinstance(fields, dict):
                raise _BadMember(f"member {member.name!r}: expected an object")
            values["json"] = fields
    except (ValueError, RecursionError) as error:
        if isinstance(error, _BadMember):
            raise
        raise _BadMember(f"member {member.name!r}: {error}") from None
