"""What the report needs of every image, beside the data: id, scores, and thumbnails of the sample.

One small table per shard, whatever the layout of the data is, so that a report of a million images reads
megabytes. It belongs to the shard's commit like every other file of it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from ..parallel import side_by_side
from .sample import Sample
from .store import Store
from .tables import parquet

INDEX = "_diffray/index"
THUMBNAIL = 256
"""Pixels of a thumbnail's longer side."""


@dataclass(frozen=True, slots=True)
class Shown:
    """One image of the sample.

    Attributes:
        thumbnail: a WebP file.
        facts: prompt, parameters, scores and the input's own columns, as far as there are any.
    """

    id: str
    thumbnail: bytes
    facts: Mapping[str, Any]


@dataclass(slots=True)
class Index:
    """What all indices of a job say together; images are numbered in dataset order.

    Attributes:
        images: how many there are.
        scores: number and boolean columns as float64, NaN where a value is missing.
        hashes: perceptual hashes, empty if there are none.
        ids: of all images that have such a hash; for millions of others they would be memory for nothing.
        shown: the sample.
    """

    images: int = 0
    scores: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    hashes: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    ids: pa.ChunkedArray = field(default_factory=lambda: pa.chunked_array([], pa.large_string()))
    shown: list[Shown] = field(default_factory=list)


def index_path(number: int) -> str:
    """Where the index of a shard is kept."""
    return f"{INDEX}/part-{number:05d}.parquet"


def index_part(rows: Sequence[Mapping[str, Any]], scores: Mapping[str, pa.DataType]) -> bytes:
    """The index of a shard; rows have `id`, the scores, and `thumbnail` and `shown` (JSON) if in the sample."""
    fixed = [("thumbnail", pa.binary()), ("shown", pa.string())]
    return parquet(rows, pa.schema([("id", pa.string()), *scores.items(), *fixed]))


def thumbnail(image: Image.Image) -> bytes:
    """A small WebP file of a picture."""
    scale = min(1.0, THUMBNAIL / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    sink = io.BytesIO()
    small.save(sink, "WEBP", quality=80)
    return sink.getvalue()


def read_index(store: Store, shards: Sequence[int], sample: Sample) -> Index:
    """Read the indices of the shards that have images, in order."""
    found = Index()
    scores: dict[str, list[NDArray[np.float64]]] = {}
    hashes: list[NDArray[np.uint64]] = []
    names: list[pa.Array] = []
    for table in side_by_side(lambda n: pq.read_table(io.BytesIO(store.read(index_path(n)))), shards):
        found.images += len(table)
        for name in table.column_names:
            column = table.column(name)
            if name == "phash":
                names += table.column("id").chunks
                hashes.append(_hashes(column.to_pylist()))
            elif pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
                scores.setdefault(name, []).append(_numbers(column))
            elif pa.types.is_boolean(column.type):
                scores.setdefault(name, []).append(_numbers(column.cast(pa.int8())))
        found.shown += _shown(table, sample)
    found.scores = {name: np.concatenate(parts) for name, parts in scores.items()}
    found.hashes = np.concatenate(hashes) if hashes else found.hashes
    found.ids = pa.chunked_array(names, pa.string()).cast(pa.large_string())  # all may be more than 2 GiB
    return found


def _shown(table: pa.Table, sample: Sample) -> list[Shown]:
    rows = table.filter(table.column("thumbnail").is_valid()).to_pylist()
    return [
        Shown(row["id"], row["thumbnail"], json.loads(row["shown"])) for row in rows if row["id"] in sample
    ]


def _numbers(column: pa.ChunkedArray) -> NDArray[np.float64]:
    return np.asarray(column.cast(pa.float64()).fill_null(float("nan")).to_numpy(), dtype=np.float64)


def _hashes(values: list[str]) -> NDArray[np.uint64]:
    return np.frombuffer(bytes.fromhex("".join(values)), dtype=">u8").astype(np.uint64)
