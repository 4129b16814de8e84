"""Pictures to start from, and the pixels of those that were made."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from .conftest import Place


def flat(colour: str = "red", size: tuple[int, int] = (32, 24)) -> Image.Image:
    return Image.new("RGB", size, colour)


def data(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """A picture as a file."""
    sink = io.BytesIO()
    image.save(sink, format, **options)
    return sink.getvalue()


def png(colour: str) -> bytes:
    return data(flat(colour, (16, 16)))


def halves(left: Any, right: Any, mode: str = "L", size: tuple[int, int] = (32, 24)) -> Image.Image:
    """Two colours side by side."""
    image = Image.new(mode, size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


def save(place: Place, image: Image.Image, name: str) -> None:
    """A file below the place's folder `in`."""
    path = place.path / "in" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def pixels(row: dict[str, Any]) -> Any:
    """Those of the image in a row of a dataset."""
    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))


def colours(place: Place, output: str = "out") -> dict[str, str]:
    """Prompt to the main channel of its picture: the fake engine mixes the source with noise."""
    found = {}
    for row in place.rows(output):
        mean = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))).mean(axis=(0, 1))
        found[row["prompt"]] = "rgb"[mean.argmax()]
    return found
