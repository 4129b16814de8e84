"""safetensors files: headers checked before anything is allocated, tensors read through a memory map.

Nothing here unpickles. A file that is cut off, padded or malformed is a `CheckpointError` with its name and
sizes, in milliseconds and without reading the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError, UnsafeCheckpoint

HEADER_LIMIT = 100_000_000
"""Bytes of header that safetensors itself accepts."""
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = frozenset(("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"))
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")


@dataclass(frozen=True, slots=True)
class Entry:
    """What a header says about one tensor."""

    shape: tuple[int, ...]
    dtype: str


class WeightFile:
    """One safetensors file.

    Attributes:
        path: where it is.
        entries: tensor name to shape and dtype.
        metadata: the header's free text.

    Raises:
        CheckpointError: missing, cut off, or not safetensors.
        UnsafeCheckpoint: it is a pickle, whatever its name says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header = _header(path)
        metadata = header.pop("__metadata__", {})
        self.metadata: dict[str, str] = {str(k): str(v) for k, v in metadata.items()} if metadata else {}
        self.entries = {key: _entry(path, key, value) for key, value in header.items()}
        self.stat = _stamp(path)

    def read(self, key: str) -> Tensor:
        """The tensor, backed by the file's memory map until it is copied."""
        tensor: Tensor = self._open.get_tensor(key)
        return tensor

    @cached_property
    def _open(self) -> Any:
        try:
            return safe_open(self.path, framework="pt", device="cpu")
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: not a valid safetensors file: {error}") from error

    def verify(self) -> None:
        """Offsets, overlaps and sizes of every tensor, checked by safetensors; no data is read."""
        _ = self._open

    def close(self) -> None:
        """Drops the memory map; a later read opens it again."""
        self.__dict__.pop("_open", None)

    def check_unchanged(self) -> None:
        """Raises CheckpointError when the file was replaced since it was opened."""
        if _stamp(self.path) != self.stat:
            raise CheckpointError(f"{self.path}: the file changed on disk while it was in use")


class Weights:
    """The tensors of one part: one file, or several shards with distinct names."""

    def __init__(self, files: Iterable[WeightFile]) -> None:
        self.files = list(files)
        self._home: dict[str, WeightFile] = {}
        for file in self.files:
            for key in file.entries:
                if key in self._home:
                    raise CheckpointError(f"{file.path}: {key} is also in {self._home[key].path}")
                self._home[key] = file
        self.entries = {key: file.entries[key] for key, file in self._home.items()}

    @property
    def name(self) -> str:
        """For messages: the path of the first file."""
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{self.files[0].path}{more}"

    def read(self, key: str) -> Tensor:
        """One tensor, backed by its file's memory map until it is copied."""
        return self._home[key].read(key)

    def close(self) -> None:
        """Drops the memory maps."""
        for file in self.files:
            file.close()


def refuse_pickle(path: Path) -> None:
    """Raises UnsafeCheckpoint when the name or the first bytes are those of a pickle."""
    if path.suffix.lower() in PICKLES or looks_pickled(path):
        raise UnsafeCheckpoint(
            f"{path}: this is a pickle, and reading one can run code. Convert it once, offline: "
            f"diffray convert {path} {path.with_suffix('.safetensors')}"
        )


def looks_pickled(path: Path) -> bool:
    """Whether the first bytes are those of a pickle, a zip (torch's format) or a 7z archive."""
    with path.open("rb") as file:
        start = file.read(8)
    if len(start) == 8 and int.from_bytes(start, "little") <= HEADER_LIMIT:
        return False  # a header length may begin with the same bytes
    return start.startswith(
        (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"7z\xbc\xaf")
    )


def _header(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        refuse_pickle(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length + 8 > size:
                wanted = f"the header alone is {length} bytes" if size >= 8 else "a header needs 8 bytes"
                raise CheckpointError(
                    f"{path}: incomplete file or not safetensors: got {size} bytes, {wanted}"
                )
            if not 2 <= length <= HEADER_LIMIT:
                raise CheckpointError(f"{path}: header of {length} bytes, allowed are 2 to {HEADER_LIMIT}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is not an object")
    _check_length(path, header, size - 8 - length)
    return header


def _check_length(path: Path, header: dict[str, Any], data: int) -> None:
    ends = [_offsets(path, key, value)[1] for key, value in header.items() if key != "__metadata__"]
    wanted = max(ends, default=0)
    if wanted > data:
        raise CheckpointError(
            f"{path}: incomplete file: got {data} bytes of tensors, the header says {wanted}"
        )
    if wanted < data:
        raise CheckpointError(f"{path}: {data - wanted} bytes after the last tensor")


def _offsets(path: Path, key: str, value: Any) -> tuple[int, int]:
    offsets = value.get("data_offsets") if isinstance(value, dict) else None
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(isinstance(n, int) for n in offsets)
        or not 0 <= offsets[0] <= offsets[1]
    ):
        raise CheckpointError(f"{path}: tensor {key}: bad data_offsets {offsets!r}")
    return offsets[0], offsets[1]


def _entry(path: Path, key: str, value: dict[str, Any]) -> Entry:
    shape, dtype = value.get("shape"), value.get("dtype")
    if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise CheckpointError(f"{path}: tensor {key}: bad shape {shape!r}")
    return Entry(tuple(shape), str(dtype))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _stamp(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
