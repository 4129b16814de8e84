"""Hashes of texts, by which rows and images are compared and drawn, seeds derived and prompts spread, and of rows."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

import numpy as np


def text_hash(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def content_checksum(row: Mapping[str, Any]) -> str:
    """A checksum of all that is in a row, whatever the order of its columns; one without a value says nothing."""
    return hashlib.sha256(json.dumps(_canonical(row)).encode()).hexdigest()


def _canonical(value: Any) -> Any:
    """What stands for a value in JSON: the same for equal ones, whether Arrow, numpy or Python made
    them. 5 and 5.0 are equal, since a gap elsewhere in a column turns one into the other.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return dict(sorted((str(name), _canonical(own)) for name, own in value.items() if own is not None))
    if isinstance(value, (list, tuple)):
        return [_canonical(own) for own in value]
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        return _canonical(value.tolist())
    if isinstance(value, np.ndarray):
        return {
            "array": [str(value.dtype), *value.shape],
            "sha256": hashlib.sha256(value.tobytes()).hexdigest(),
        }
    if isinstance(value, (date, time, timedelta, Decimal)):
        return {"text": str(value)}
    data = value if isinstance(value, bytes) else pickle.dumps(value, protocol=5)
    return {"sha256": hashlib.sha256(data).hexdigest()}
