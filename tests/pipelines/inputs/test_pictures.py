"""Pictures of every odd kind: converted by the documented rule, or their row rejected and nothing else."""

from __future__ import annotations

import resource
import struct
import zlib
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffray.model.errors import InvalidRequest
from diffray.pipelines.inputs.pictures import fitted, picture
from diffray.pipelines.options import Pictures

from ..conftest import Place
from ..pictures import data

RULES = Pictures()


def header(width: int, height: int) -> bytes:
    """A PNG that says it is large and holds next to nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def frames(format: str) -> bytes:
    first, second = Image.new("P", (8, 8), 0), Image.new("P", (8, 8), 1)
    for image in (first, second):
        image.putpalette([255, 0, 0, 0, 0, 255])
    return data(first, format, save_all=True, append_images=[second] * 50)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (16, 8), "red")
    image.paste("blue", (0, 0, 8, 8))  # left half blue; turned right it is the upper half
    return data(image, exif=exif)


def sixteen(value: int) -> bytes:
    return data(Image.fromarray(np.full((8, 8), value, np.uint16)))


def palette_with_alpha() -> bytes:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30])
    return data(image, transparency=0)


@pytest.mark.parametrize(
    ("blob", "size", "corner"),
    [
        (data(Image.new("L", (8, 4), 99)), (8, 4), (99, 99, 99)),
        (data(Image.new("1", (8, 4), 1)), (8, 4), (255, 255, 255)),
        (data(Image.new("RGBA", (8, 4), (255, 0, 0, 0))), (8, 4), (255, 255, 255)),
        (data(Image.new("LA", (8, 4), (0, 128))), (8, 4), (127, 127, 127)),
        (palette_with_alpha(), (8, 8), (255, 255, 255)),
        (data(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), (8, 8), (254, 0, 0)),
        (data(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), (8, 8), (255, 0, 0)),
        (data(Image.new("YCbCr", (8, 8), (76, 85, 255)), "JPEG"), (8, 8), (254, 0, 0)),
        (sixteen(257 * 200), (8, 8), (200, 200, 200)),
        (turned(), (8, 16), (0, 0, 255)),
        (frames("GIF"), (8, 8), (255, 0, 0)),
        (frames("TIFF"), (8, 8), (255, 0, 0)),
        (data(Image.new("RGB", (8, 8), "lime"), "BMP"), (8, 8), (0, 255, 0)),
        (data(Image.new("RGB", (8, 8), "lime"), "WEBP", lossless=True), (8, 8), (0, 255, 0)),
    ],
)
def test_source_pictures_become_upright_rgb(
    blob: bytes, size: tuple[int, int], corner: tuple[int, int, int]
) -> None:
    image = picture(blob, "init_image", RULES)
    assert (image.mode, image.size) == ("RGB", size)
    assert np.allclose(image.getpixel((0, 0)), corner, atol=2)


def test_the_background_is_the_jobs() -> None:
    clear = data(Image.new("RGBA", (8, 8), (0, 0, 0, 0)))
    image = picture(clear, "init_image", Pictures(background="#00ff00"))
    assert image.getpixel((0, 0)) == (0, 255, 0)


def test_depth_maps_keep_their_depth() -> None:
    assert picture(sixteen(40_000), "depth", RULES).getpixel((0, 0)) == 40_000
    floats = data(Image.new("F", (8, 8), 0.25), "TIFF")
    assert picture(floats, "depth", RULES).getpixel((0, 0)) == 0.25


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "cannot be read"),
        (b"no picture", "cannot be read"),
        (b"<svg/>", "cannot be read"),
        (data(Image.effect_noise((64, 64), 50))[:-900], "cannot be read"),
        (data(Image.effect_noise((64, 64), 50), "JPEG")[:-900], "cannot be read"),
        (header(50_000, 50_000), "pixel"),
        (header(9000, 9000), "9000x9000, allowed are 64000000 pixels"),
        (header(100, 100), "cannot be read"),
        (data(Image.new("F", (8, 8)), "TIFF"), "float pixels"),
        (data(Image.new("RGB", (8, 8)), "PPM"), "cannot be read"),
    ],
)
def test_what_is_no_usable_picture_is_refused(blob: bytes, message: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidRequest, match=message):
        picture(blob, "init_image", RULES)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "nothing large was decoded"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_damage_never_does_more_than_reject() -> None:
    rng = np.random.default_rng(0)
    for format in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"):
        good = data(Image.effect_noise((32, 32), 80).convert("RGB"), format)
        for _ in range(40):
            bad = bytearray(good)
            for at in rng.integers(0, len(bad), 8):
                bad[at] = rng.integers(256)
            with suppress(InvalidRequest):
                assert picture(bytes(bad), "init_image", RULES).mode == "RGB"


def test_pictures_of_a_row_are_cut_and_shrunk_alike() -> None:
    source, mask = Image.new("RGB", (400, 200)), Image.new("L", (200, 100))
    mask.paste(255, (75, 0, 125, 100))  # the middle
    rules = Pictures(fit="crop", max_side=100)
    made = fitted({"init_image": source, "mask": mask}, rules, 64, 64)
    assert (made["init_image"].size, made["mask"].size) == ((100, 100), (100, 100))
    assert np.asarray(made["mask"]).mean(axis=0).astype(int).tolist() == [0] * 25 + [255] * 50 + [0] * 25


def test_a_bad_picture_costs_its_row_and_no_neighbour(place: Place) -> None:
    good = data(Image.new("RGB", (16, 16), "red"))
    bad = {
        "bomb": header(50_000, 50_000),
        "empty": b"",
        "cut": data(Image.effect_noise((64, 64), 50))[:-2000],
        "text": b"hello",
        "none": None,
    }
    blobs = [good, *bad.values(), good]
    names = ["first", *bad, "last"]
    for output, keep in (("all", names), ("good", ["first", "last"])):
        rows = [(n, b) for n, b in zip(names, blobs, strict=True) if n in keep]
        table = pa.table({"id": [n for n, _ in rows], "prompt": keep, "image": [b for _, b in rows]})
        pq.write_table(table, place.path / f"{output}.parquet")
        place.job(str(place.path / f"{output}.parquet"), output, task="augment")
    made = {row["row_id"]: row["sha256"] for row in place.rows("all")}
    assert made == {row["row_id"]: row["sha256"] for row in place.rows("good")}
    refused = {r["row_id"]: (r["stage"], r["field"]) for r in place.rows("all", "rejected")}
    assert refused == dict.fromkeys(bad, ("source", "init_image"))
