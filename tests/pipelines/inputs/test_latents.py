"""Latents: from pictures and back, and files that are none."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.lib.format as npy
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ..conftest import Place
from ..pictures import halves, pixels, save


def test_encode_and_decode_are_each_others_inverse(place: Place) -> None:
    save(place, halves("red", "blue", "RGB"), "a.png")
    table = place.write("image,label\na.png,7\n", "in/t.csv")
    place.job(table, "latents", task="encode", encoding={"latents": "float32"})
    [row] = place.rows("latents")
    array = np.frombuffer(row["latents"], row["latents_dtype"]).reshape(row["latents_shape"])
    assert array.shape == (4, 3, 4)
    assert array[:, 0, 0].tolist() == [1, 0, 0, 0]
    assert (row["label"], row["latents_scale"], "image" in row) == ("7", 1.0, False)
    place.job(str(place.path / "latents/data"), "back", task="decode")
    [back] = place.rows("back")
    assert (pixels(back) == np.asarray(halves("red", "blue", "RGB"))).all()
    assert (back["row_id"], back["label"]) == (row["id"], "7")


def test_latents_that_are_none_are_rejected(place: Place) -> None:
    good = (np.arange(16) / 16).astype(np.float16).reshape(4, 2, 2)
    sink = io.BytesIO()
    np.save(sink, good)
    table = pa.table(
        {
            "latents": [good.tobytes(), good.tobytes(), good.tobytes()[:-1], sink.getvalue(), None, b""],
            "latents_shape": [[4, 2, 2], None, [4, 2, 2], None, [4, 2, 2], [4, 2, 2]],
            "latents_dtype": ["float16", "float16", "float16", None, "float16", "object"],
        }
    )
    pq.write_table(table, place.path / "l.parquet")
    result = place.job(str(place.path / "l.parquet"), task="decode")
    assert (result.images, result.rejected) == (2, 4)
    assert {(r["stage"], r["field"]) for r in place.rows(folder="rejected")} == {("source", "latents")}


def npy_file(values: Any, version: tuple[int, int] = (1, 0), **header: Any) -> bytes:
    """A .npy file of float16 whose header says what it likes."""
    sink = io.BytesIO()
    claimed = {"descr": "<f2", "fortran_order": False, "shape": values.shape, **header}
    write = npy.write_array_header_1_0 if version == (1, 0) else npy.write_array_header_2_0
    write(sink, claimed)
    return sink.getvalue() + values.tobytes()


def test_a_file_of_latents_is_read_by_what_is_in_it_not_by_what_it_claims(place: Place) -> None:
    good = (np.arange(16) / 16).astype(np.float16).reshape(4, 2, 2)
    whole = npy_file(good)
    files = {
        "one": whole,
        "two": npy_file(good, (2, 0)),
        "columns": npy_file(good.transpose(), fortran_order=True, shape=(4, 2, 2)),
        "huge": npy_file(good, shape=(4, 10**6, 10**6)),
        "beyond": npy_file(good, shape=(4, 10**30, 1)),
        "short": whole[:-1],
        "empty": npy_file(good[:0]),
        "objects": npy_file(good, descr="|O"),
        "version": whole[:6] + b"\x09" + whole[7:],
        "header": whole[:20],
        "text": whole.replace(b"'descr'", b"'descr("),
    }
    pq.write_table(pa.table({"id": list(files), "latents": list(files.values())}), place.path / "l.parquet")
    place.job(str(place.path / "l.parquet"), task="decode")
    opened = {row["row_id"]: Image.open(io.BytesIO(row["image"]["bytes"])) for row in place.rows()}
    made = {name: picture.tobytes() for name, picture in opened.items()}
    assert sorted(made) == ["columns", "one", "two"]
    assert len(set(made.values())) == 1
    assert {(r["stage"], r["field"]) for r in place.rows(folder="rejected")} == {("source", "latents")}
