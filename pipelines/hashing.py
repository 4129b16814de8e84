"""The one hash of texts, by which rows and images are compared and drawn, seeds derived and prompts spread."""

from __future__ import annotations

import hashlib


def text_hash(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
