"""Near duplicates against the definition, tried on every pair."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from diffray.pipelines import Store
from diffray.pipelines.outputs.index import read_index
from diffray.pipelines.outputs.sample import Sample
from diffray.pipelines.report import duplicates
from diffray.pipelines.report.duplicates import near_duplicates


def by_definition(hashes: NDArray[np.uint64], distance: int) -> dict[int, int]:
    kept: list[int] = []
    found: dict[int, int] = {}
    for number, bits in enumerate(hashes.tolist()):
        near = next((k for k in kept if (bits ^ int(hashes[k])).bit_count() <= distance), None)
        if near is None:
            kept.append(number)
        else:
            found[number] = near
    return found


def crowd(count: int, centres: int, flips: int) -> NDArray[np.uint64]:
    """Hashes around some centres, with up to so many flipped bits."""
    rng = np.random.default_rng(count + flips)
    hashes = rng.integers(0, 2**64, centres, dtype=np.uint64)[rng.integers(0, centres, count)]
    for number in range(count):
        for bit in rng.integers(0, 64, rng.integers(0, flips + 1)):
            hashes[number] ^= np.uint64(1) << np.uint64(bit)
    return hashes


@pytest.mark.parametrize("distance", [0, 1, 2, 4, 6, 8, 10])
@pytest.mark.parametrize("centres", [1, 40, 400])
@pytest.mark.parametrize("lot", [duplicates.LOT, 3])
def test_what_is_found_is_what_is_defined(
    distance: int, centres: int, lot: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "LOT", lot)
    hashes = crowd(400, centres, 7)
    found = near_duplicates(hashes, distance)
    wanted = by_definition(hashes, distance)
    assert dict(zip(found.images.tolist(), found.originals.tolist(), strict=True)) == wanted
    for image, original, apart in zip(found.images, found.originals, found.distances, strict=True):
        assert int(hashes[image] ^ hashes[original]).bit_count() == apart <= distance


@pytest.mark.parametrize("count", [0, 1, 2])
def test_small_datasets(count: int) -> None:
    assert len(near_duplicates(np.zeros(count, np.uint64), 4)) == max(0, count - 1)
    assert len(near_duplicates(np.arange(count, dtype=np.uint64), 0)) == 0


def test_identical_pictures_in_any_number_are_not_compared_pair_by_pair() -> None:
    """With 45 billion pairs this would not end."""
    assert len(near_duplicates(np.full(300_000, 7, np.uint64), 4)) == 299_999


@pytest.mark.slow
def test_variants_of_pictures_cost_little_memory() -> None:
    """A hundred of each, all of which are alike: as many pairs as there are would be 150 MB."""
    rng = np.random.default_rng(0)
    hashes = np.repeat(rng.integers(0, 2**64, 200, dtype=np.uint64), 100)
    for _ in range(2):
        hashes ^= np.uint64(1) << rng.integers(0, 64, len(hashes)).astype(np.uint64)
    tracemalloc.start()
    assert len(near_duplicates(hashes, 4)) == 200 * 99
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100e6


def test_a_chain_of_small_steps_is_not_one_group() -> None:
    chain = np.array([(1 << k) - 1 for k in range(0, 30, 3)], dtype=np.uint64)  # 3 bits from one to the next
    found = near_duplicates(chain, 4)
    assert found.originals.tolist() == [0, 2, 4, 6, 8]
    assert found.images.tolist() == [1, 3, 5, 7, 9]


def test_ids_may_be_more_than_arrow_has_in_one_array(tmp_path: Path) -> None:
    """To take some of them Arrow joins all, and `string` ends at 2 GiB. (Tried with as many: 16 s.)"""
    assert read_index(Store(str(tmp_path)), [], Sample(1)).ids.type == pa.large_string()
