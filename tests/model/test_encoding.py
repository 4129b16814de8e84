"""Image files: their bytes, and what other programs find in them."""

from __future__ import annotations

import io
import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from diffray.model import ImageRequest, InvalidRequest
from diffray.model.encoding import (
    COMPOSITE,
    FORMATS,
    MEDIA_TYPES,
    SYNTHETIC,
    Format,
    encode_image,
    read_provenance,
    save_image,
)
from diffray.model.infotext import infotext, parse_infotext

ALL: list[Format] = ["png", "jpeg", "webp"]
PROMPTS = {
    "plain": "a red fox",
    "markup": "<script>alert('x')</script> &amp; ]]> \"quotes\" \\ %s {x}",
    "unicode": "☃ 漢字 🦊 e\u0301 \u202eright to left",
    "controls": "nul \0 bell \a escape \x1b tab\ttwo\r\nlines\n",
    "surrogate": "lone \ud800 surrogate",
    "infotext": "x\nNegative prompt: y\nSteps: 1, Sampler: z, CFG scale: 2",
    "long": "🦊" * 20_000,
}


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def request(prompt: str = "a red fox", **fields: Any) -> ImageRequest:
    values: dict[str, Any] = {"width": 32, "height": 24, "steps": 4, "guidance_scale": 5.0, "seed": 2**63 - 1}
    return ImageRequest(prompt=prompt, sampler="euler", schedule="karras", **values | fields)


@pytest.mark.parametrize("format", ALL)
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_every_prompt_comes_back_exactly(picture: Image.Image, format: Format, prompt: str) -> None:
    data = encode_image(picture, request(prompt, negative_prompt=prompt[::-1]), format=format, model="m")
    found = read_provenance(data)
    assert found.parameters is not None
    assert found.parameters["prompt"] == prompt
    assert found.parameters["negative_prompt"] == prompt[::-1]
    assert found.parameters["seed"] == 2**63 - 1
    assert ImageRequest(**{k: found.parameters[k] for k in ("prompt", "steps", "sampler")}).prompt == prompt
    assert found.infotext is not None
    assert parse_infotext(found.infotext)["Steps"] == "4"
    assert len(data) < 700_000
    assert Image.open(io.BytesIO(data)).convert("RGB").size == (32, 24)


@pytest.mark.parametrize("format", ALL)
def test_the_same_bytes_every_time_and_the_same_pixels(picture: Image.Image, format: Format) -> None:
    first = encode_image(picture, request(), format=format, quality=100)
    assert first == encode_image(picture, request(), format=format, quality=100)
    image = Image.open(io.BytesIO(first))
    assert image.format == format.upper()
    if format != "jpeg":
        assert np.array_equal(np.asarray(image), np.asarray(picture))


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_quality_decides_the_size(picture: Image.Image, format: Format) -> None:
    low, high = (len(encode_image(picture, request(), format=format, quality=q)) for q in (20, 95))
    assert low < high


def test_png_text_is_where_automatic1111_looks(picture: Image.Image) -> None:
    wanted = infotext(request(), model="m", model_hash="ab" * 32)
    image = Image.open(io.BytesIO(encode_image(picture, request(), model="m", model_checksum="ab" * 32)))
    assert image.info["parameters"] == wanted
    kept = json.loads(image.info["diffray"])
    assert (kept["prompt"], kept["model"], kept["model_checksum"]) == ("a red fox", "m", "ab" * 32)


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_the_exif_comment_is_as_piexif_writes_it(picture: Image.Image, format: Format) -> None:
    """Big-endian TIFF; "UNICODE" and UTF-16 in the same byte order, which piexif and exiftool agree on."""
    data = encode_image(picture, request("☃ fox"), format=format)
    exif = Image.open(io.BytesIO(data)).info["exif"]
    tiff = exif.removeprefix(b"Exif\0\0")
    assert tiff[:4] == b"MM\0*"
    at = struct.unpack(">I", tiff[4:8])[0]
    entries = {
        tag: (kind, count, value)
        for tag, kind, count, value in struct.iter_unpack(">HHII", tiff[at + 2 : at + 14])
    }
    inner = entries[0x8769][2]
    tag, kind, count, place = struct.unpack(">HHII", tiff[inner + 2 : inner + 14])
    assert (tag, kind) == (0x9286, 7)
    comment = tiff[place : place + count]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be") == infotext(request("☃ fox"))


def test_a_jpeg_cuts_prompts_that_do_not_fit_but_never_the_settings(picture: Image.Image) -> None:
    long = request("🦊" * 20_000, negative_prompt="漢" * 20_000)
    found = read_provenance(encode_image(picture, long, format="jpeg"))
    assert found.infotext is not None
    prompts, _, settings = found.infotext.rpartition("\n")
    assert settings == infotext(long).rpartition("\n")[2]
    assert prompts.endswith("🦊…")
    assert found.parameters is not None
    assert found.parameters["negative_prompt"] == "漢" * 20_000


@pytest.mark.parametrize("format", ALL)
@pytest.mark.parametrize("composite", [False, True])
def test_the_digital_source_type_is_in_the_xmp_packet(
    picture: Image.Image, format: Format, composite: bool
) -> None:
    made = request(init_image=picture, strength=0.5) if composite else request()
    data = encode_image(picture, made, format=format)
    image = Image.open(io.BytesIO(data))
    packet = image.info.get("xmp") or image.info["XML:com.adobe.xmp"].encode()
    tree = ElementTree.fromstring(packet.strip(b"\0"))
    found = tree.find(".//{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType")
    assert found is not None
    assert found.text == (COMPOSITE if composite else SYNTHETIC)
    assert read_provenance(data).source_type == found.text


def test_files_of_others(picture: Image.Image) -> None:
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    found = read_provenance(sink.getvalue())
    assert (found.infotext, found.parameters, found.source_type) == (None, None, None)


@pytest.mark.parametrize("format", ALL)
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.3, 0.9])
def test_broken_files_raise_only_what_is_said(picture: Image.Image, format: Format, keep: float) -> None:
    data = encode_image(picture, request(), format=format)
    with suppress(ValueError):
        read_provenance(data[: int(keep * len(data))])


def test_strange_json_is_no_parameters(picture: Image.Image) -> None:
    from PIL.PngImagePlugin import PngInfo

    for text in ("[1]", "{", "null", '"x"'):
        chunks, sink = PngInfo(), io.BytesIO()
        chunks.add_text("diffray", text)
        picture.save(sink, "PNG", pnginfo=chunks)
        assert read_provenance(sink.getvalue()).parameters is None


def test_saving_goes_by_the_ending(picture: Image.Image, tmp_path: Path) -> None:
    for ending, format in FORMATS.items():
        path = tmp_path / f"x{ending.upper()}"
        save_image(picture, request(), path, model="m")
        assert path.read_bytes() == encode_image(picture, request(), format=format, model="m")
    with pytest.raises(InvalidRequest, match="allowed endings"):
        save_image(picture, request(), tmp_path / "x.gif")


def test_unknown_formats_are_refused(picture: Image.Image) -> None:
    with pytest.raises(ValueError, match="png, jpeg, webp"):
        encode_image(picture, request(), format="gif")  # type: ignore[arg-type]
    assert set(MEDIA_TYPES) == set(ALL)
