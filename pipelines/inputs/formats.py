"""What is read as input, and how: the ending of a file's name decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from posixpath import splitext
from typing import IO

from ..config import InvalidJob
from .archives import read_tar
from .columnar import read_arrow, read_parquet
from .lance import ENDING as LANCE
from .readers import SourceRow, read_csv, read_jsonl, read_text, read_tsv

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
Reader = Callable[[IO[bytes], str], Iterator[SourceRow]]
READERS: dict[str, Reader] = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_text,
    ".tar": read_tar,
}
COLUMNAR = (".parquet", ".arrow", LANCE)
WHOLE = (*COLUMNAR, ".tar")
"""Read by position, so never through a decompressor."""
PICTURES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jfif",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".gif",
    ".avif",
    ".heic",
    ".heif",
)
"""Those of formats that are not read (AVIF, HEIC) count too: in a folder of pictures they are rows, rejected ones."""


def ending(path: str) -> str:
    """The ending that says what a file is, without that of a compression."""
    stem, last = splitext(path.lower())
    return splitext(stem)[1] if last in COMPRESSED else last


def is_picture(path: str) -> bool:
    """Whether it is named like a picture."""
    return splitext(path)[1].lower() in PICTURES


def check_ending(path: str) -> None:
    """Refuse a table that cannot be read.

    Raises:
        InvalidJob: its ending is unknown, or it is compressed and would have to be read by position.
    """
    kind = ending(path)
    if kind not in READERS:
        raise InvalidJob(f"input {path}: allowed endings are {', '.join((*READERS, LANCE))}")
    if kind in WHOLE and not path.lower().endswith(kind):
        raise InvalidJob(f"input {path}: unpack it first; {kind} files are read by position")
