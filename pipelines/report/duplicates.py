"""Near duplicates over a whole dataset, by the bits in which perceptual hashes differ.

They are a column in a file of its own: a row for every image, in the dataset's order. Whether an image is one depends
on all others, and a shard's bytes must depend on no other shard, so that it can be committed, repaired and continued
by itself.

Two hashes within d bits of each other agree in all but d of any d + m bands, so in at least m whole ones
(Manku et al. 2007). For every choice of m bands the hashes are sorted by these bits alone, and only those
that agree there are compared. m is what costs least for the number of images at hand.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from math import comb
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..outputs.index import Index, Shown
from ..outputs.store import Store

BITS = 64
LOT = 4096
"""Hashes that are compared with each other at least."""
NAME = "duplicates.parquet"


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Images that look like an earlier one.

    Attributes:
        images: their numbers, ascending.
        originals: number of the first image that each looks like, which is no duplicate itself.
        distances: differing bits.
    """

    images: NDArray[np.int64]
    originals: NDArray[np.int64]
    distances: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.images)


def near_duplicates(hashes: NDArray[np.uint64], distance: int) -> Duplicates:
    """The images to drop so that no two of those left are within `distance` bits of each other.

    Images are taken in order: one that is near an image that was kept is a duplicate of the first such; any other
    is kept. So every duplicate is itself near its original, however long a chain of similar pictures is.
    """
    distinct, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)  # distinct hashes in order of their first image
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    distinct, first, which = distinct[order], first[order], rank[which]
    original = _originals(distinct, distance)
    kept = first[original[which]]
    numbers = np.arange(len(hashes))
    found = np.flatnonzero(kept != numbers)
    apart = np.bitwise_count(hashes[found] ^ hashes[kept[found]])
    return Duplicates(found, kept[found], apart.astype(np.int64))


def write_marks(store: Store, index: Index, distance: int) -> pa.Table:
    """Write `duplicates.parquet`: a row for every image, in the dataset's order, with its `id`, and where it is a
    near duplicate `duplicate_of` and `distance`; returns the table."""
    found = near_duplicates(index.hashes, distance)
    originals, distances = (np.full(index.images, -1, dtype=np.int64) for _ in range(2))
    originals[found.images], distances[found.images] = found.originals, found.distances
    alone = originals < 0
    named = index.ids.take(pa.array(originals, mask=alone))
    table = pa.table({"id": index.ids, "duplicate_of": named, "distance": pa.array(distances, mask=alone)})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    store.write(NAME, sink.getvalue())
    return table


def marked(shown: Sequence[Shown], marks: pa.Table) -> list[Shown]:
    """The sample, each image with its mark among its facts."""
    ours = marks.filter(pc.is_in(marks["id"], pa.array([one.id for one in shown], pa.large_string())))
    known = dict(zip(ours["id"].to_pylist(), ours["duplicate_of"].to_pylist(), strict=True))
    return [replace(one, facts={**one.facts, **_facts(known[one.id])}) for one in shown]


def _facts(original: str | None) -> dict[str, Any]:
    return (
        {"near_duplicate": False} if original is None else {"near_duplicate": True, "duplicate_of": original}
    )


def _originals(distinct: NDArray[np.uint64], distance: int) -> NDArray[np.int64]:
    """For each of the distinct hashes the place of the first kept one within `distance`, possibly its own.

    They are taken in lots, as large as what was kept before: of many that are alike only a few are ever compared
    with each other, which would be pairs without end.
    """
    original = np.arange(len(distinct))
    kept, start = original[:0], 0
    while start < len(distinct):
        stop = min(len(distinct), start + max(LOT, len(kept)))
        places = np.concatenate([kept, original[start:stop]])
        alone = np.ones(len(places), dtype=bool)
        for early, late in _pairs(distinct[places], distance).tolist():
            if alone[late] and alone[early]:
                alone[late] = False
                original[places[late]] = places[early]
        kept, start = places[alone], stop
    return original


def _pairs(distinct: NDArray[np.uint64], distance: int) -> NDArray[np.int64]:
    """All pairs (early, late) of places within `distance`, by late and then early."""
    found = np.zeros(0, dtype=np.int64)
    count = len(distinct)
    for mask in _masks(distance, count):
        keys = distinct & np.uint64(mask)
        order = np.argsort(keys, kind="stable")
        sorted_keys = keys[order]
        codes = [found]
        for step in range(1, count):
            same = np.flatnonzero(sorted_keys[step:] == sorted_keys[:-step])
            if not len(same):
                break
            a, b = order[same], order[same + step]
            near = np.bitwise_count(distinct[a] ^ distinct[b]) <= distance
            early, late = np.minimum(a[near], b[near]), np.maximum(a[near], b[near])
            codes.append(late * count + early)
        found = np.unique(np.concatenate(codes))  # most pairs are found by several masks
    return np.stack([found % max(count, 1), found // max(count, 1)], axis=1)


def _masks(distance: int, count: int) -> list[int]:
    """The bits to agree on, one mask for each choice of bands; none when equal hashes alone count."""
    if distance == 0 or count < 2:
        return []
    m = min(range(1, BITS - distance), key=lambda m: _cost(distance, m, count))
    edges = np.linspace(0, BITS, distance + m + 1).round().astype(int).tolist()
    bands = [((1 << high) - 1) ^ ((1 << low) - 1) for low, high in pairwise(edges)]
    return [sum(chosen) for chosen in combinations(bands, m)]


def _cost(distance: int, m: int, count: int) -> float:
    """Sorts, and comparisons per sort and image if the hashes' bits were independent."""
    return comb(distance + m, m) * (1 + count / 2.0 ** (BITS * m / (distance + m)))
