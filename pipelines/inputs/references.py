"""Large values stay where they are: the plan holds a reference to them, the worker reads what it needs.

A reference is text, so that tables hold it and a row that diffray wrote can be fed back:

    cats/1.jpg                                      a file
    input:train.parquet#row=12&column=image         a cell of a Parquet, Arrow or Lance table, rows counted from 0
    input:shards/0.tar#offset=1536&bytes=20480      a member of a tar

What begins with `input:` is found below the folder of the job's input, anything else below `pictures.root`, which
is that folder unless the job says otherwise. Nothing outside is ever opened, whatever a table says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from posixpath import normpath
from typing import Self

import pyarrow as pa

INPUT = "input:"
_CELL = re.compile(r"(?P<file>.+)#row=(?P<row>\d{1,15})&column=(?P<column>.+)", re.DOTALL)
_MEMBER = re.compile(r"(?P<file>.+)#offset=(?P<offset>\d{1,18})&bytes=(?P<bytes>\d{1,18})", re.DOTALL)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class BlobError(ValueError):
    """A reference that leads to nothing usable; the message says why. It is its row's own fault."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One value of a Parquet, Arrow or Lance table; its row counts from 0."""

    file: str
    row: int
    column: str

    def __str__(self) -> str:
        return f"{self.file}#row={self.row}&column={self.column}"


@dataclass(frozen=True, slots=True)
class Member:
    """One file inside an uncompressed tar."""

    file: str
    offset: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.file}#offset={self.offset}&bytes={self.bytes}"


class Reference(str):
    """The text of a reference as a value of a row, where the value itself was not read."""

    @classmethod
    def to(cls, place: Cell | Member) -> Self:
        """The reference to a place in the job's input."""
        return cls(f"{INPUT}{place}")


class StructReference(Reference):
    """One to the struct of bytes and path that Hugging Face keeps pictures in."""


def parsed_reference(text: str) -> Cell | Member | str:
    """What a reference says; a `str` is the path of a file."""
    if match := _CELL.fullmatch(text):
        return Cell(match["file"], int(match["row"]), match["column"])
    if match := _MEMBER.fullmatch(text):
        return Member(match["file"], int(match["offset"]), int(match["bytes"]))
    return text


def is_blob(kind: pa.DataType) -> bool:
    """Whether cells of this type stay where they are: bytes, and the struct of bytes and path of Hugging Face."""
    if pa.types.is_struct(kind):
        return {kind.field(i).name for i in range(kind.num_fields)} == {"bytes", "path"}
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    )


def below(root: str, path: str) -> str:
    """`path` relative to `root`: itself, or an absolute path or URL that lies below it.

    Raises:
        BlobError: it leads elsewhere, or names another kind of storage.
    """
    if not path or "\0" in path or "\\" in path or "::" in path:
        raise BlobError(f"got {path!r:.200}, allowed is a path with forward slashes")
    start = root.rstrip("/") + "/"
    if path.startswith(start):
        path = path[len(start) :]
    elif match := _SCHEME.match(path):
        raise BlobError(
            f"scheme {match[0]!r} is not allowed, nor anything else outside the folder of the pictures"
        )
    elif path.startswith("/"):
        raise BlobError(
            f"got the absolute path {path!r:.200}, allowed are paths below the folder of the pictures"
        )
    clean = normpath(path)
    if clean == ".." or clean.startswith("../") or clean == ".":
        raise BlobError(f"got {path!r:.200}, which leaves the folder of the pictures")
    return clean
