"""What tells one file from another one of its name."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from typing import Any

import pytest

from diffray.pipelines.inputs.stamps import Stamps, listed_stamp, stamp

from ..conftest import Place

MOMENT = datetime(2026, 3, 4, tzinfo=UTC)


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"size": 7, "ETag": '"abc"', "LastModified": MOMENT}, "7 bytes, ETag abc"),
        ({"size": 7, "mtime": 1.5, "created": 9.0}, "7 bytes, of 1970-01-01T00:00:01.500000+00:00"),
        ({"size": 7, "mtime": 0, "created": 9.0}, "7 bytes, of 1970-01-01T00:00:00+00:00"),
        ({"size": 7, "Last-Modified": "Wed, 04 Mar 2026"}, "7 bytes, of Wed, 04 Mar 2026"),
        ({"size": 0, "LastModified": MOMENT}, "0 bytes, of 2026-03-04T00:00:00+00:00"),
        ({"size": 7}, "7 bytes"),
    ],
)
def test_a_stamp_says_the_size_and_the_best_mark(info: dict[str, Any], expected: str) -> None:
    assert stamp(info) == expected
    assert listed_stamp(info) == (expected if len(info) > 1 else None), (
        "a size alone is too little of a listing"
    )
    assert listed_stamp({**info, "size": None}) is None


def test_a_file_of_the_year_1970_is_the_same_after_a_change_of_its_mode(place: Place) -> None:
    path = place.write("x")
    os.utime(path, (0, 0))
    before = Stamps(str(place.path), lambda url: {}).of(["prompts.csv"])
    time.sleep(0.01)
    os.chmod(path, 0o600)
    assert Stamps(str(place.path), lambda url: {}).of(["prompts.csv"]) == before
