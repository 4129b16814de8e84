"""Checks of prompts and pictures that need no network: a block-list, and figures of what a picture looks like."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True, slots=True)
class ImageMeasures:
    """Figures of one picture, over its luma L = (299 R + 587 G + 114 B) / 1000, rounded to whole levels 0..255.

    Attributes:
        blank: all pixels are the same colour.
        brightness: mean of L / 255, in 0..1.
        contrast: standard deviation of L / 255, in 0..0.5.
        sharpness: variance of the Laplacian (4 L minus its four neighbours) over all inner pixels; 0 for a
            picture with a side below 3. Below about 100 a photograph at 512 pixels looks blurred.
        phash: perceptual hash, 64 bits as 16 hex digits: L resized to 32x32 (Lanczos), its two-dimensional
            DCT-II, the 8x8 lowest frequencies row by row, a bit set where one is above the median of the 64.
            The same as `phash` of the package imagehash. Pictures within about 6 bits look alike.
    """

    blank: bool
    brightness: float
    contrast: float
    sharpness: float
    phash: str


def measure(image: Image.Image) -> ImageMeasures:
    """The figures of a picture, in some milliseconds at 512 pixels. Alpha is ignored."""
    picture = image if image.mode in ("RGB", "L") else image.convert("RGB")
    gray = picture.convert("L")
    luma = np.asarray(gray, dtype=np.int16)
    mean, variance = _moments(luma)
    return ImageMeasures(
        blank=is_blank(picture),
        brightness=round(mean / 255, 6),
        contrast=round(variance**0.5 / 255, 6),
        sharpness=round(_moments(_laplacian(luma))[1], 3) if min(luma.shape) > 2 else 0.0,
        phash=_phash(gray),
    )


def is_blank(image: Image.Image, tolerance: int = 0) -> bool:
    """Whether no channel of the picture spans more than `tolerance` of its 256 levels."""
    extrema = np.atleast_2d(np.array(image.getextrema()))
    return bool((extrema[:, 1] - extrema[:, 0] <= tolerance).all())


def phash_distance(a: str, b: str) -> int:
    """Number of differing bits of two perceptual hashes."""
    return (int(a, 16) ^ int(b, 16)).bit_count()


def _laplacian(luma: NDArray[np.int16]) -> NDArray[np.int16]:
    centre, sides = luma[1:-1, 1:-1], (luma[:-2, 1:-1], luma[2:, 1:-1], luma[1:-1, :-2], luma[1:-1, 2:])
    return 4 * centre - sides[0] - sides[1] - sides[2] - sides[3]


def _moments(levels: NDArray[np.int16]) -> tuple[float, float]:
    """Mean and variance from exact integer sums, so that they are the same on every processor."""
    total = int(levels.sum(dtype=np.int64))
    squares = int(np.square(levels, dtype=np.int32).sum(dtype=np.int64))
    count = levels.size
    return total / count, (squares * count - total * total) / count**2


_HASH_SIDE, _HASH_LOW = 32, 8
_COSINES = np.cos(np.pi * np.outer(np.arange(_HASH_LOW), 2 * np.arange(_HASH_SIDE) + 1) / (2 * _HASH_SIDE))
"""The first rows of the unnormalised DCT-II."""


def _phash(gray: Image.Image) -> str:
    small = np.asarray(gray.resize((_HASH_SIDE, _HASH_SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    low = (_COSINES @ small @ _COSINES.T).round(6)  # rounded, so that no bit hangs on the order of a sum
    bits = "".join("1" if value > np.median(low) else "0" for value in low.ravel())
    return f"{int(bits, 2):016x}"


_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Kana and Han, which are written without spaces: every character is a word."""
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


class PromptFilter:
    """A block-list of words and phrases.

    Matching is by whole words, whatever the case, the Unicode form (full-width letters, ligatures), invisible
    characters in between, and the punctuation between the words of a phrase: "red fox" is found in
    "(Red_Fox:1.2)", not in "red foxes". Accents count. In Chinese and Japanese, which have no spaces, every
    character is a word.
    """

    def __init__(self, terms: Iterable[str]) -> None:
        self._phrases: dict[str, list[tuple[tuple[str, ...], str]]] = {}
        for term in terms:
            words = _words(term)
            if not words:
                raise ValueError(f"block-list: got {term!r}, allowed is a term with a letter or digit in it")
            self._phrases.setdefault(words[0], []).append((words, term))

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> PromptFilter:
        """The list in a file, see `terms`."""
        return cls(cls.terms(path))

    @staticmethod
    def terms(path: str | PathLike[str]) -> tuple[str, ...]:
        """The terms in a file: one per line in UTF-8; empty lines and those that start with # are skipped."""
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        return tuple(term for line in lines if (term := line.strip()) and not term.startswith("#"))

    def match(self, text: str) -> str | None:
        """The first blocked term that the text contains, as the list spells it; None when it is clean."""
        words = _words(text)
        for at, word in enumerate(words):
            for phrase, term in self._phrases.get(word, ()):
                if words[at : at + len(phrase)] == phrase:
                    return term
        return None


def _words(text: str) -> tuple[str, ...]:
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    visible = "".join(c for c in plain if unicodedata.category(c) != "Cf")
    return tuple(_WORD.findall(visible))
