"""References: what they may lead to, and what is said of those that lead nowhere."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffray.pipelines.inputs.blobs import Blobs
from diffray.pipelines.inputs.references import BlobError, below

from ..conftest import Place
from ..pictures import data


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


def test_below_accepts_what_lies_below() -> None:
    assert below("s3://bucket/root", "s3://bucket/root/a/b.png") == "a/b.png"
    assert below("/data", "a/./b.png") == "a/b.png"
