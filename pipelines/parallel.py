"""Reading many objects of a storage, each of which takes its time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

READERS = 16
"""Objects that are read at once."""

_Item = TypeVar("_Item")
_Read = TypeVar("_Read")


def side_by_side(read: Callable[[_Item], _Read], items: Iterable[_Item]) -> Iterator[_Read]:
    """What `read` gives for each item, in order: many at once, but never far ahead."""
    items = iter(items)
    with ThreadPoolExecutor(READERS) as pool:
        while some := list(islice(items, 4 * READERS)):
            yield from pool.map(read, some)
