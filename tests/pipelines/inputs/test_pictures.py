"""Pictures of every odd kind: converted by the documented rule, or their row rejected and nothing else."""

from __future__ import annotations

import resource
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffray.model.errors import InvalidRequest, JobError
from diffray.pipelines.config import Pictures
from diffray.pipelines.inputs import cells
from diffray.pipelines.inputs.blobs import Blobs
from diffray.pipelines.inputs.pictures import fitted, picture
from diffray.pipelines.inputs.references import BlobError, below

from ..conftest import Place, in_process
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


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("file:///etc/passwd", "scheme 'file:' is not allowed"),
        ("http://169.254.169.254/latest", "scheme 'http:' is not allowed"),
        ("https://localhost/x.png", "scheme 'https:' is not allowed"),
        ("s3://other/x.png", "scheme 's3:' is not allowed"),
        ("simplecache::http://x/y", "forward slashes"),
        ("C:/x.png", "scheme 'C:' is not allowed"),
        ("\\\\host\\x.png", "forward slashes"),
        ("/etc/passwd", "absolute path"),
        ("../x.png", "leaves the folder"),
        ("a/../../x.png", "leaves the folder"),
        ("a\0.png", "forward slashes"),
        (".", "leaves the folder"),
        ("missing.png", "no such file"),
        ("sub", "no such file"),
    ],
)
def test_paths_never_leave_the_folder(
    place: Place, path: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connects(*_: object) -> None:
        raise AssertionError("a connection was opened")

    (place.path / "in/sub").mkdir(parents=True)
    (place.path / "x.png").write_bytes(data(Image.new("RGB", (16, 16))))
    monkeypatch.setattr("socket.socket.connect", connects)
    rows = pa.table({"prompt": ["x"], "init_image": [path]})
    pq.write_table(rows, place.path / "in/t.parquet")
    result = place.job(str(place.path / "in/t.parquet"))
    assert (result.images, result.rejected) == (0, 1)
    [row] = place.rows(folder="rejected")
    assert row["field"] == "init_image"
    assert message in row["reason"]


def test_a_root_may_be_elsewhere_and_absolute_paths_below_it_are_fine(place: Place) -> None:
    (place.path / "pics/a").mkdir(parents=True)
    (place.path / "pics/a/1.png").write_bytes(data(Image.new("RGB", (16, 16), "red")))
    lines = f"prompt,init_image\nx,a/1.png\ny,{place.path}/pics/a/1.png\nz,../pics/a/1.png\n"
    result = place.job(place.write(lines, "in/t.csv"), pictures={"root": str(place.path / "pics")})
    assert (result.images, result.rejected) == (2, 1)
    assert [row["init_image"] for row in place.rows()] == ["a/1.png"] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("t.parquet#row=9&column=image", "has 1 rows"),
        ("input:t.parquet#row=0&column=other", "t.parquet#row=0&column=other: no such column"),
        ("input:t.parquet#row=0&column=prompt", "got string, expected bytes"),
        ("x.bin#offset=0&bytes=5000", "ends after 4"),
        ("input:x.bin#row=0&column=a", "x.bin"),
        ("input:../x.bin#offset=0&bytes=1", "leaves"),
        ("x.bin", "got 4 bytes, allowed are 3"),
    ],
)
def test_references_to_nothing_say_so(place: Place, text: str, message: str) -> None:
    pq.write_table(pa.table({"prompt": ["x"], "image": [b"i"]}), place.path / "t.parquet")
    (place.path / "x.bin").write_bytes(b"four")
    limit = 3 if text == "x.bin" else 10_000
    blobs = Blobs(str(place.path), None, lambda url: {}, limit)
    with pytest.raises(BlobError, match=message):
        blobs.read(text)
    assert blobs.read("input:t.parquet#row=0&column=image") == b"i"


@pytest.mark.parametrize("change", ["gone", "shorter", "others"])
def test_an_input_that_changes_under_a_job_stops_it(place: Place, change: str) -> None:
    blob = data(Image.new("RGB", (16, 16), "red"))
    path = place.path / "t.parquet"
    pq.write_table(pa.table({"prompt": ["x"] * 6, "image": [blob] * 6}), path)

    def later(*arguments: Any) -> Any:
        path.unlink()
        if change == "shorter":
            pq.write_table(pa.table({"prompt": ["x"], "image": [blob]}), path)
        if change == "others":
            other = data(Image.new("RGB", (16, 16), "darkorchid"), "BMP")
            pq.write_table(pa.table({"prompt": ["x"] * 6, "image": [other] * 6}), path)
        return in_process(*arguments)

    config = place.config(str(path), task="augment")
    with pytest.raises(JobError, match="the input changed since the job was planned"):
        place.run(config, generate=later)
    pq.write_table(pa.table({"prompt": ["x"] * 6, "image": [blob] * 6}), path)
    assert place.run(config).images == 6


def test_pictures_are_read_from_any_storage(place: Place) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/photos/in/a/1.png", data(Image.new("RGB", (16, 16), "red")))
    memory.pipe_file("/photos/in/t.csv", b"image,prompt\na/1.png,x\nmemory:///photos/in/a/1.png,y\nb.png,z\n")
    result = place.job("memory://photos/in/t.csv", task="augment")
    assert (result.images, result.rejected) == (2, 1)
    assert [row["init_image"] for row in place.rows()] == ["a/1.png"] * 2


def test_cells_are_found_in_any_order(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row group with all of the file in it, as pandas writes it, read at several places and columns in turn."""
    count = 600
    table = pa.table({"a": [b"a%d" % i for i in range(count)], "b": [b"b%d" % i for i in range(count)]})
    pq.write_table(table, place.path / "t.parquet", row_group_size=count)
    windows = []
    advance = cells._Cursor.advance
    monkeypatch.setattr(cells._Cursor, "advance", lambda self: (windows.append(1), advance(self)))
    blobs = Blobs(str(place.path), None, lambda url: {}, 10**9)
    for row in (start + step for step in range(150) for start in (0, 450, 150, 300)):
        assert blobs.read(f"t.parquet#row={row}&column=a") == b"a%d" % row
        assert blobs.read(f"t.parquet#row={row}&column=b") == b"b%d" % row
    once = -(-count // cells.WINDOW) * 2
    assert len(windows) < 4 * once, "four readers in turn must not make each other start again"
    for row in (3, 2, 599, 64, 63, 31, 32, 0):
        assert blobs.read(f"t.parquet#row={row}&column=a") == b"a%d" % row


@pytest.mark.parametrize(("places", "columns"), [(4, 3), (16, 2)])
def test_no_place_loses_its_cursor_to_another(
    place: Place, monkeypatch: pytest.MonkeyPatch, places: int, columns: int
) -> None:
    """As many shards in flight, of rows with so many pictures, whose places are all in one row group."""
    count, names = 2048, "abc"[:columns]
    cells_of = {name: [f"{name}{i}".encode() for i in range(count)] for name in names}
    pq.write_table(pa.table(cells_of), place.path / "t.parquet", row_group_size=count)
    windows = []
    advance = cells._Cursor.advance
    monkeypatch.setattr(cells._Cursor, "advance", lambda self: (windows.append(1), advance(self)))
    blobs = Blobs(str(place.path), None, lambda url: {}, 10**9, places=places)
    size = count // places
    for step in range(size):
        for row in range(step, count, size):
            for name in names:
                assert blobs.read(f"t.parquet#row={row}&column={name}") == cells_of[name][row]
    # Each place is reached from the beginning of the row group, and once it is, no row is read again.
    assert len(windows) == columns * sum(size * (shard + 1) // cells.WINDOW for shard in range(places))


def test_below_accepts_what_lies_below() -> None:
    assert below("s3://bucket/root", "s3://bucket/root/a/b.png") == "a/b.png"
    assert below("/data", "a/./b.png") == "a/b.png"


def test_pictures_are_read_ahead_but_never_all_at_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffray.pipelines.making import images

    held, most = 0, 0
    original: Callable[..., Any] = images.Maker._outcome

    async def counted(self: Any, ready: Any, spent: Any) -> Any:
        nonlocal held, most
        held += 1
        most = max(most, held)
        try:
            return await original(self, ready, spent)
        finally:
            held -= 1

    monkeypatch.setattr(images.Maker, "_outcome", counted)
    (place.path / "in").mkdir()
    (place.path / "in/a.png").write_bytes(data(Image.new("RGB", (16, 16), "red")))
    table = place.write("image,prompt\n" + "a.png,x\n" * 60, "in/t.csv")
    assert place.job(table, task="augment", shards={"images": 60}).images == 60
    assert 2 < most <= 2 * 2 + images.READERS
