"""Many objects are read at once, in order, and never far ahead."""

from __future__ import annotations

import threading
from itertools import count

import pytest

from diffray.model.errors import StorageError
from diffray.pipelines.parallel import READERS, side_by_side


def test_reading_side_by_side_keeps_the_order_and_runs_never_far_ahead() -> None:
    begun, meet = [], threading.Barrier(READERS)

    def read(number: int) -> int:
        begun.append(number)
        if number < READERS:
            meet.wait(10)  # raises if they come one after the other
        return -number

    found = side_by_side(read, count())
    assert [next(found) for _ in range(100)] == [-number for number in range(100)]
    assert len(begun) <= 100 + 4 * READERS


def test_reading_side_by_side_ends_with_the_first_error() -> None:
    def read(number: int) -> int:
        if number == 3:
            raise StorageError("gone")
        return number

    found = side_by_side(read, range(9))
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(StorageError, match="gone"):
        next(found)
