"""What the dialects share."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from diffray.serve.dialects.parts import grown


@pytest.mark.parametrize("size", [(1, 1), (7, 40), (61, 33)])
@pytest.mark.parametrize("pixels", [0, 1, 2, 5, 23])
def test_a_mask_grows_as_by_pillows_filter(size: tuple[int, int], pixels: int) -> None:
    levels = np.random.default_rng(pixels).integers(0, 256, size[::-1])
    mask = Image.fromarray((levels * (levels > 240)).astype(np.uint8))
    assert grown(mask, pixels).tobytes() == mask.filter(ImageFilter.MaxFilter(2 * pixels + 1)).tobytes()


def test_a_large_mask_grows_far() -> None:
    """By a filter whose time grows with the square of the distance this would take a quarter of an hour."""
    mask = Image.new("L", (4096, 4096))
    mask.putpixel((2000, 1000), 255)
    assert grown(mask, 100).getbbox() == (1900, 900, 2101, 1101)
