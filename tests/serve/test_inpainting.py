"""What goes around inpainting: filling, enlarging a part, and laying it back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from diffray.model import InvalidRequest
from diffray.serve.dialects.inpainting import filled, inpainting
from diffray.serve.dialects.parts import contained, covering


def gradient(width: int, height: int) -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 255 - across], axis=-1).astype(np.uint8))


def rectangle(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


def array(image: Image.Image) -> Any:
    return np.asarray(image, dtype=int)


def test_filling_continues_a_gradient_and_touches_nothing_else() -> None:
    image, mask = gradient(203, 150), rectangle((203, 150), (60, 40, 140, 100))
    holed = Image.composite(Image.new("RGB", image.size, "magenta"), image, mask)
    result, hidden = array(filled(holed, mask)), array(mask) > 0
    assert np.array_equal(result[~hidden], array(image)[~hidden])
    assert np.abs(result - array(image))[hidden].max() <= 16
    assert np.abs(result - array(image))[hidden].mean() < 4


def test_filling_reaches_the_edge_and_survives_a_picture_without_any_known_part() -> None:
    image = Image.new("RGB", (33, 7), (10, 200, 90))
    half = rectangle(image.size, (16, 0, 32, 6))
    assert array(filled(image, half)).tolist() == array(image).tolist()
    assert filled(image, Image.new("L", image.size, 255)).size == image.size


@settings(max_examples=60, deadline=None)
@given(
    st.integers(20, 200),
    st.integers(20, 200),
    st.integers(0, 19),
    st.integers(0, 19),
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(0, 40),
    st.sampled_from([(64, 64), (96, 64), (64, 128)]),
)
def test_the_enlarged_part_has_the_mask_and_lies_in_the_picture(
    width: int, height: int, left: int, top: int, across: int, down: int, padding: int, size: tuple[int, int]
) -> None:
    box = (left, top, min(left + across, width) - 1, min(top + down, height) - 1)
    if box[2] < box[0] or box[3] < box[1]:
        return
    prepared = inpainting(
        gradient(width, height), rectangle((width, height), box), size, blur=(0, 0), padding=padding
    )
    x0, y0, x1, y1 = prepared.box
    assert 0 <= x0 <= box[0]
    assert box[2] < x1 <= width
    assert 0 <= y0 <= box[1]
    assert box[3] < y1 <= height
    assert prepared.image.size == prepared.mask.size == size
    if x1 - x0 < width and y1 - y0 < height:
        assert (x1 - x0) / (y1 - y0) == pytest.approx(
            size[0] / size[1], rel=0.6 / min(x1 - x0, y1 - y0) + 0.02
        )
    whole = prepared.finished(Image.new("RGB", size, "magenta"))
    outside = array(rectangle((width, height), box)) == 0
    assert np.array_equal(array(whole)[outside], array(gradient(width, height))[outside])
    assert (array(whole)[~outside] == (255, 0, 255)).all()


def test_an_unchanged_part_comes_back_where_it_was() -> None:
    image = gradient(120, 90)
    prepared = inpainting(image, rectangle(image.size, (40, 30, 79, 69)), (64, 64), padding=12, blur=(0, 0))
    assert np.abs(array(prepared.finished(prepared.image)) - array(image)).max() <= 4


def test_a_mask_with_transparency_is_white_where_it_is_opaque() -> None:
    image = gradient(64, 64)
    mask = Image.new("RGBA", (64, 64))
    mask.paste((0, 0, 0, 255), (0, 0, 32, 64))
    prepared = inpainting(image, mask, (64, 64), blur=(0, 0))
    assert (array(prepared.mask)[:, :32] == 255).all()
    assert (array(prepared.mask)[:, 32:] == 0).all()


def test_the_edge_of_a_blurred_mask_does_not_show_old_content() -> None:
    """Where the engine repaints, nothing of the source is left in the result."""
    black = Image.new("RGB", (64, 64))
    prepared = inpainting(black, rectangle((64, 64), (32, 0, 63, 63)), (64, 64), blur=(6, 6))
    result = array(prepared.finished(Image.new("RGB", (64, 64), "white")))
    assert (result[array(prepared.mask) >= 128] >= 250).all()


@pytest.mark.parametrize("mask", [Image.new("L", (64, 64)), Image.new("L", (32, 32), 255)])
def test_masks_that_mean_nothing(mask: Image.Image) -> None:
    with pytest.raises(InvalidRequest, match="mask"):
        inpainting(gradient(64, 64), mask, (64, 64))


def test_covering_and_containing_keep_proportions() -> None:
    """A circle stays one."""
    picture = Image.new("RGB", (200, 100), "white")
    ImageDraw.Draw(picture).ellipse((80, 30, 119, 69), fill="black")
    for made, diameter in ((covering(picture, 100, 100), 40), (contained(picture, 100, 100), 20)):
        assert made.size == (100, 100)
        dark = array(made.convert("L")) < 128
        assert dark.any(axis=0).sum() == pytest.approx(diameter, abs=1)
        assert dark.any(axis=1).sum() == pytest.approx(diameter, abs=1)


def test_what_containing_leaves_free_has_the_colours_of_the_edge() -> None:
    picture = Image.new("RGB", (200, 100), "blue")
    picture.paste("red", (0, 0, 200, 4))
    made = contained(picture, 100, 100)
    assert made.getpixel((50, 5)) == (255, 0, 0)
    assert made.getpixel((50, 95)) == (0, 0, 255)
