"""Block-list and image figures, against independent definitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter
from scipy import fft, ndimage

from diffray.model.judges.checks import PromptFilter, is_blank, measure, phash_distance
from tests.model.oracle import source_image


@pytest.fixture
def photo() -> Image.Image:
    grain = np.random.default_rng(0).integers(-20, 21, (160, 192, 3))
    pixels = np.asarray(source_image(192, 160).convert("RGB")) + grain
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def test_brightness_contrast_and_sharpness(photo: Image.Image) -> None:
    found = measure(photo)
    luma = np.asarray(photo.convert("L"), dtype=np.float64)
    kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    inner = ndimage.convolve(luma, kernel)[1:-1, 1:-1]
    assert found.brightness == pytest.approx(luma.mean() / 255, abs=1e-6)
    assert found.contrast == pytest.approx(luma.std() / 255, abs=1e-6)
    assert found.sharpness == pytest.approx(inner.var(), rel=1e-6)
    assert not found.blank


def test_figures_move_the_way_they_should(photo: Image.Image) -> None:
    blurred, dark = photo.filter(ImageFilter.GaussianBlur(2)), ImageEnhance.Brightness(photo).enhance(0.5)
    assert measure(blurred).sharpness < measure(photo).sharpness / 2
    assert measure(dark).brightness < measure(photo).brightness
    assert measure(Image.new("RGB", (8, 8), "white")).brightness == 1.0


def test_phash_is_the_one_that_everybody_computes(photo: Image.Image) -> None:
    """The algorithm of the package imagehash (`phash`), with scipy's DCT."""
    for image in (photo, photo.rotate(90), Image.effect_noise((50, 70), 60).convert("RGB")):
        small = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
        low = fft.dct(fft.dct(small, axis=0), axis=1)[:8, :8]
        bits = "".join("1" if bit else "0" for bit in (low > np.median(low)).ravel())
        assert measure(image).phash == f"{int(bits, 2):016x}"


def test_phash_says_what_looks_alike(photo: Image.Image) -> None:
    mine = measure(photo).phash
    smaller = measure(photo.resize((96, 80), Image.Resampling.LANCZOS)).phash
    brighter = measure(ImageEnhance.Brightness(photo).enhance(1.1)).phash
    other = measure(photo.rotate(180)).phash
    assert phash_distance(mine, smaller) <= 4
    assert phash_distance(mine, brighter) <= 6
    assert phash_distance(mine, other) > 16
    assert phash_distance("ffffffffffffffff", "0000000000000000") == 64


def test_blank_pictures() -> None:
    picture = Image.new("RGB", (16, 16), (10, 20, 30))
    assert is_blank(picture)
    assert measure(picture).blank
    picture.putpixel((3, 4), (10, 20, 33))
    assert not measure(picture).blank
    assert not is_blank(picture, tolerance=2)
    assert is_blank(picture, tolerance=3)
    assert is_blank(Image.new("L", (4, 4), 7))


@pytest.mark.parametrize("size", [(1, 1), (2, 50), (3, 3)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_any_size_and_mode(size: tuple[int, int], mode: str) -> None:
    found = measure(Image.new(mode, size))
    assert (found.brightness, found.contrast, found.sharpness, len(found.phash)) == (0.0, 0.0, 0.0, 16)


@pytest.mark.parametrize(
    ("text", "blocked"),
    [
        ("a RED fox", True),
        ("(red_fox:1.3)", True),
        ("red, fox", True),
        ("Ｒｅｄ ﬀ fox", False),
        ("Ｒｅｄ ｆｏｘ", True),
        ("r\u200bed fo\u00adx", True),
        ("red foxes", False),
        ("reds fox", False),
        ("scarred fox", False),
        ("fox red", False),
        ("STRASSE", True),
        ("一张裸体照片", True),
        ("一张裸照体片", False),
        ("", False),
    ],
)
def test_terms_are_matched_as_whole_words(text: str, blocked: bool) -> None:
    terms = PromptFilter(["red fox", "straße", "裸体"])
    assert (terms.match(text) is not None) == blocked


def test_the_term_is_named_as_the_list_spells_it(tmp_path: Path) -> None:
    path = tmp_path / "terms.txt"
    path.write_text("\ufeff# comment\n\n  Red Fox \r\nblue\n", encoding="utf-8")
    assert PromptFilter.from_file(path).match("two red foxes and a red fox") == "Red Fox"
    assert PromptFilter.from_file(path).match("# comment") is None


@pytest.mark.parametrize("term", ["", "...", " _ "])
def test_a_term_without_a_word_is_refused(term: str) -> None:
    with pytest.raises(ValueError, match="block-list"):
        PromptFilter([term])


def test_an_empty_list_blocks_nothing() -> None:
    assert PromptFilter([]).match("anything") is None
