"""Hashes: the same for what is equal, whoever made the values."""

from __future__ import annotations

import numpy as np
from PIL import Image

from diffray.pipelines.hashing import content_checksum


def test_whole_numbers_of_numpy_are_those_of_python() -> None:
    plain = {"a": 3, "b": 0.25, "c": [1, 2], "d": True, "e": "x"}
    odd = {
        "a": np.int32(3),
        "b": np.float64(0.25),
        "c": np.array([1, 2], object),
        "d": np.True_,
        "e": np.str_("x"),
    }
    assert content_checksum(plain) == content_checksum(odd)
    assert (
        content_checksum({"a": float("nan")})
        == content_checksum({"a": np.float32("nan")})
        != content_checksum({})
    )
    assert content_checksum({"a": Image.new("L", (2, 2), 3)}) == content_checksum(
        {"a": Image.new("L", (2, 2), 3)}
    )
    assert content_checksum({"a": Image.new("L", (2, 2), 3)}) != content_checksum(
        {"a": Image.new("L", (2, 2), 4)}
    )
