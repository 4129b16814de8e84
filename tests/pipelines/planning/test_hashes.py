"""Hashes in the database against plain counting in memory."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from diffray.model.errors import StorageError
from diffray.pipelines import InvalidJob
from diffray.pipelines.planning import hashes
from diffray.pipelines.planning.hashes import ImageHashes, RowHashes

from ..conftest import Place

EDGES = [0, 1, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "BATCH", 7)


def some(rng: random.Random, count: int) -> list[int]:
    return [rng.choice([*EDGES, rng.randrange(40), rng.getrandbits(64)]) for _ in range(count)]


@pytest.mark.parametrize("counts", [(0, 0), (0, 50), (50, 0), (3, 3), (60, 60)])
def test_suspects_and_occurrences(counts: tuple[int, int]) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        given, contents = some(rng, counts[0]), some(rng, counts[1])
        rows = RowHashes(lambda content: content ^ 1)
        for id_hash in given:
            rows.add_given(id_hash)
        for content in contents:
            rows.add_derived(content)
        assert len(rows) == sum(counts)
        twice = {value for value, times in Counter(given).items() if times > 1}
        expected = twice | (set(given) & {content ^ 1 for content in contents})
        assert rows.suspects() == (len(expected), expected)
        for _ in range(2):
            rows.count_again()
            seen: Counter[int] = Counter()
            for content in contents:
                seen[content] += 1
                assert rows.occurrence(content) == seen[content]


def test_few_of_many_suspects_are_named() -> None:
    rows = RowHashes(lambda content: content)
    for value in range(300):
        rows.add_given(value)
        rows.add_given(value)
    count, named = rows.suspects()
    assert (count, len(named)) == (300, hashes.SHOWN)
    assert named <= set(range(300))


def test_images_that_are_missing() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        planned = {value: rng.choice([*EDGES, rng.getrandbits(64)]) for value in some(rng, 60)}
        images = ImageHashes([*planned.items(), *list(planned.items())[:5]])
        met = set(rng.sample(sorted(planned), rng.randrange(len(planned) + 1)))
        for value in [*met, *met]:
            images.meet(value)
        assert images.missing() == (len(planned) - len(met), set(planned) - met)
        assert all(images.content(value) == content for value, content in planned.items())
        assert images.content(12345678901) is None


def test_a_full_disk_says_what_lies_where() -> None:
    rows = RowHashes(lambda content: content)
    rows._connection.execute("PRAGMA max_page_count = 8")  # SQLite's own way to run out of space
    for value in range(3000):
        rows._pending.setdefault("given", []).append((value,))
    with pytest.raises(StorageError, match=r"temporary database: database or disk is full; .* TMPDIR"):
        rows.suspects()


def test_a_given_id_that_is_another_row_s_derived_one(place: Place) -> None:
    place.job(place.write("id,prompt\n,x\nmine,y\n"))
    derived = next(row["row_id"] for row in place.rows() if row["prompt"] == "x")
    table = place.write(f"id,prompt\n,x\n{derived},y\nmine,z\n", "clash.csv")
    with pytest.raises(InvalidJob, match=rf"\(1 in all\): '{derived}' at clash.csv:2, clash.csv:3"):
        place.job(table, "clash")
