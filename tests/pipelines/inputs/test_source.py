"""Inputs of every kind, written by the tools that people write them with."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import tarfile
import threading
import tracemalloc
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import datasets
import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from diffray.model.errors import JobConflict
from diffray.pipelines import InvalidJob
from diffray.pipelines.inputs.source import Source, input_root

from ..conftest import Place
from ..pictures import colours, png
from ..s3 import S3


def image(colour: str, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, colour)


def tar(path: Path, members: dict[str, bytes | str]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def test_pandas_parquet_with_pictures_as_bytes_and_a_carried_mask(place: Place) -> None:
    frame = pd.DataFrame(
        {
            "caption": ["r", "g", "b"],
            "jpg": [png("red"), png("lime"), png("blue")],
            "seg": [b"one", None, b"three"],
            "score": [0.5, None, 2],
            "label": pd.Categorical(["x", "y", "x"]),
        }
    )
    frame.to_parquet(place.path / "t.parquet", row_group_size=2)
    options = {"task": "augment", "columns": {"prompt": "caption"}}
    assert place.job(str(place.path / "t.parquet"), **options).images == 3
    assert colours(place) == {"r": "r", "g": "g", "b": "b"}
    rows = {row["prompt"]: row for row in place.rows()}
    assert [rows[p]["seg"] for p in "rgb"] == [b"one", None, b"three"]
    assert [rows[p]["label"] for p in "rgb"] == ["x", "y", "x"]
    assert rows["b"]["init_image"] == "input:t.parquet#row=2&column=jpg"
    plan = pq.read_schema(next((place.path / "out/_diffray/plan").glob("*.parquet")))
    assert plan.field("seg").type == pa.string(), "the plan holds a reference, not the bytes"


@pytest.fixture
def dataset() -> datasets.Dataset:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "mask": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "boxes": datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
        }
    )
    rows = {
        "image": [image("red"), image("blue"), None],
        "mask": [image("white"), None, None],
        "label": [0, 1, 1],
        "boxes": [[[0.5, 1, 2, 3]], [], []],
    }
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("how", ["disk", "parquet"])
def test_hugging_face_datasets_on_disk(place: Place, dataset: datasets.Dataset, how: str) -> None:
    if how == "disk":
        dataset.save_to_disk(place.path / "ds", num_shards=2)
        place_in = str(place.path / "ds")
    else:
        place_in = str(place.path / "data.parquet")
        dataset.to_parquet(place_in)
    result = place.job(place_in, task="augment", templates={"prompt": "a photo of a {label}"})
    assert (result.images, result.rejected) == (2, 1)
    assert colours(place) == {"a photo of a cat": "r", "a photo of a dog": "b"}
    cat, dog = sorted(place.rows(), key=lambda row: row["label"])
    assert (cat["label"], cat["boxes"], dog["boxes"], dog["mask"]) == (0, [[0.5, 1, 2, 3]], [], None)
    assert Image.open(io.BytesIO(cat["mask"]["bytes"])).getpixel((0, 0)) == (255, 255, 255)
    [row] = place.rows(folder="rejected")
    assert (row["stage"], row["field"]) == ("source", "init_image")
    again = datasets.load_dataset("parquet", data_files=str(place.path / "out/data/*.parquet"), split="train")
    assert again[0]["image"].size == (16, 16)
    assert again.features["label"].names == ["cat", "dog"]
    assert {row["label"]: row["mask"] and row["mask"].size for row in again} == {0: (16, 16), 1: None}


def test_a_dataset_of_several_splits_and_a_selection_are_refused(
    place: Place, dataset: datasets.Dataset
) -> None:
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(place.path / "dd")
    with pytest.raises(InvalidJob, match=r"choose one: .*/dd/train, .*/dd/test"):
        Source(str(place.path / "dd"))
    assert len(list(Source(str(place.path / "dd/train")).rows())) == 3


def test_picture_folders_with_and_without_metadata(place: Place) -> None:
    for name, colour in (("cats/1.png", "red"), ("dogs/2.jpg", "blue"), (".hidden/3.png", "lime")):
        path = place.path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image(colour).save(path)
    folder = str(place.path / "folder")
    place.job(folder, "plain", task="augment", templates={"prompt": "a {label}"})
    assert colours(place, "plain") == {"a cats": "r", "a dogs": "b"}
    assert [row["label"] for row in place.rows("plain")] == ["cats", "dogs"]
    (place.path / "folder/cats/1.txt").write_text("a red cat\n")
    (place.path / "folder/dogs/2.txt").write_text("a blue dog")
    place.job(folder, "texts", task="augment")
    assert colours(place, "texts") == {"a red cat": "r", "a blue dog": "b"}
    for file in (place.path / "folder").rglob("*.txt"):
        file.unlink()
    (place.path / "folder/metadata.csv").write_text("file_name,prompt,kind\ncats/1.png,one,7\n")
    place.job(folder, "metadata", task="augment")
    assert [(row["prompt"], row["kind"]) for row in place.rows("metadata")] == [("one", "7")]
    place.job(f"{folder}/*/*.png", "glob", task="augment", templates={"prompt": "x"})
    assert len(place.rows("glob")) == 1


@pytest.mark.parametrize("name", ["in [1]", "what?", "a*b"])
def test_a_name_with_wildcards_in_it_may_be_a_name(place: Place, name: str) -> None:
    (place.path / name).mkdir()
    image("red").save(place.path / name / "a.png")
    place.write("prompt,image\nx,a.png\n", f"{name}/t[1].csv")
    for own, values in ((name, {"templates": {"prompt": "x"}}), (f"{name}/t[1].csv", {})):
        output = f"out{own.count('/')}"
        result = place.job(str(place.path / own), output, task="augment", columns={}, **values)
        assert (result.images, result.rejected) == (1, 0)
        assert place.job(str(place.path / own), output, task="augment", **values).made == 0


def test_names_that_are_no_utf8(place: Place) -> None:
    """A table's is in the plan of every row; a picture's costs its own."""
    table, folder = os.fsdecode(b"t-\xe9.csv"), place.path / "in"
    folder.mkdir()
    for name in ("a.png", os.fsdecode(b"b-\xe9.png")):
        (folder / name).write_bytes(png("red"))
    result = place.job(str(folder), task="augment", templates={"prompt": "x"})
    assert (result.images, result.rejected) == (1, 1)
    with pytest.raises(InvalidJob, match=r"t-\\udce9\.csv': its name is not valid UTF-8"):
        Source(place.write("prompt\na\n", table))


def test_links_lead_to_pictures_and_one_that_leads_nowhere_costs_its_row(place: Place) -> None:
    for name, colour in (("real/a.png", "red"), ("in/b.png", "blue")):
        (place.path / name).parent.mkdir()
        image(colour).save(place.path / name)
    os.utime(place.path / "real/a.png", (1, 1))  # long before the link to it
    (place.path / "in/a.png").symlink_to(place.path / "real/a.png")
    (place.path / "in/c.png").symlink_to(place.path / "real/c.png")
    values = {"task": "augment", "templates": {"prompt": "x"}}
    result = place.job(str(place.path / "in"), **values)
    assert (result.images, result.rejected) == (2, 1)
    assert [row["init_image"] for row in place.rows()] == ["a.png", "b.png"]
    [row] = place.rows(folder="rejected")
    assert (row["init_image"], row["reason"]) == ("c.png", "c.png: no such file")
    os.utime(place.path / "real/a.png", (2, 2))
    with pytest.raises(JobConflict, match=r"a\.png: .*1970-01-01T00:00:01.* -> .*1970-01-01T00:00:02"):
        place.job(str(place.path / "in"), **values)
    (place.path / "in/more").symlink_to(place.path / "real")
    with pytest.raises(InvalidJob, match=r"in/more is a link, which is not followed"):
        Source(str(place.path / "in"))
    assert len(Source(str(place.path / "in/more")).files) == 1


def test_texts_of_pictures_are_read_many_at_once_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, cat_file = fsspec.filesystem("memory"), MemoryFileSystem.cat_file
    names = [f"{i:03d}" for i in range(40)]
    for name in names:
        memory.pipe_file(f"/texts/{name}.png", png("red"))
        if name != "007":
            memory.pipe_file(f"/texts/{name}.txt", f"text {name}\n".encode())
    together = threading.Barrier(4, timeout=10)  # breaks if they come one after the other

    def slow(self: Any, path: str, *arguments: Any, **options: Any) -> bytes:
        if path[-7:-4] in names[:4]:
            together.wait()
        return cat_file(self, path, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", slow)
    source = Source("memory://texts")
    assert [(row.line, row.values["file_name"], row.values.get("prompt")) for row in source.rows()] == [
        (i + 1, f"{name}.png", None if name == "007" else f"text {name}") for i, name in enumerate(names)
    ]
    memory.rm_file("/texts/030.txt")
    with pytest.raises(InvalidJob, match=r"/texts/030\.txt"):
        list(source.rows())


def test_webdataset_tars(place: Place) -> None:
    tar(
        place.path / "0.tar",
        {
            "a/1.png": png("red"),
            "a/1.json": json.dumps({"steps": 3, "boxes": [1]}),
            "a/1.txt": "one\n",
            "a/1.seg.npy": b"anything",
            "a/2.txt": "two",
            "a/2.cls": "5",
            "a/2.jpg": png("blue"),
            "b.png": png("lime"),
            "b.json": "[",
        },
    )
    tar(place.path / "1.tar", {"c.png": png("lime"), "c.txt": "three"})
    result = place.job(str(place.path / "*.tar"), task="augment")
    assert (result.images, result.rejected) == (3, 1)
    assert colours(place) == {"one": "r", "two": "b", "three": "g"}
    one = next(row for row in place.rows() if row["prompt"] == "one")
    assert (one["steps"], one["boxes"], one["seg.npy"], one["__key__"]) == (3, [1], b"anything", "a/1")
    assert one["init_image"].startswith("input:0.tar#offset=")
    [bad] = place.rows(folder="rejected")
    assert (bad["field"], bad["file"]) == ("row", "0.tar")
    assert "b.json" in bad["reason"]


def test_a_cell_without_an_end_is_refused_and_one_that_is_too_long_costs_its_row(place: Place) -> None:
    """After the first nobody knows which lines are rows; a line of the second's is the whole row."""
    long = place.write(f"prompt,label\na,{'x' * 200_000}\nb,y\n", "long.csv")
    assert [bool(row.problem) for row in Source(long).rows()] == [True, False]
    endless = place.write('prompt,label\na,x\nb,"' + "so it, goes on\n" * 20_000, "endless.csv")
    with pytest.raises(
        InvalidJob, match=r"endless.csv: line 3 to \d+: a cell in quotes has more than 131,072"
    ):
        list(Source(endless).rows())


@pytest.mark.parametrize("codec", ["gz", "bz2", "xz", "zst"])
def test_packed_tables(place: Place, codec: str) -> None:
    lines = "".join(f'{{"prompt": "p{i}", "code": "{i * 2654435761 % 2**32}"}}\n' for i in range(20_000))
    if codec == "zst":
        data = bytearray(pa.Codec("zstd").compress(lines.encode(), asbytes=True))
    else:
        data = bytearray({"gz": gzip, "bz2": bz2, "xz": lzma}[codec].compress(lines.encode()))
    path = place.write(bytes(data), f"t.jsonl.{codec}")
    assert [row.values["prompt"] for row in Source(path).rows()] == [f"p{i}" for i in range(20_000)]
    place.write(bytes(data[:-9]), f"t.jsonl.{codec}")
    with pytest.raises(InvalidJob, match=re.escape(path)):
        list(Source(path).rows())
    data[len(data) // 2 :] = bytes(range(256)) * 40
    place.write(bytes(data), f"t.jsonl.{codec}")
    with pytest.raises(InvalidJob, match=re.escape(path)):
        list(Source(path).rows())


@pytest.mark.parametrize("name", ["t.txt", "t.csv", "t.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_text_in_utf16_is_refused(place: Place, name: str, encoding: str) -> None:
    """Half of its bytes are NUL, so that it would pass for UTF-8."""
    path = place.write("\ufeffprompt\r\na\r\n".encode(encoding), name)
    with pytest.raises(InvalidJob, match=f"input {name}: got UTF-16, allowed is UTF-8"):
        list(Source(path).rows())


def test_of_a_whole_dataset_of_diffray_its_data_is_asked_for(place: Place) -> None:
    place.job(place.write("prompt\na\nPOISON\n"))
    out = str(place.path / "out")
    with pytest.raises(InvalidJob, match=f"input {out} is a dataset of diffray: give its {out}/data"):
        Source(out)
    assert place.job(f"{out}/data", "next", task="augment").images == 1


def test_hidden_members_of_tars_are_passed_by(place: Place) -> None:
    """As tar on macOS writes them, between the files that they belong to."""
    members = {"./._1.png": "x", "./1.png": png("red"), "./._1.txt": "x", "./1.txt": "one"}
    result = place.job(tar(place.path / "t.tar", dict(members)), task="augment")
    assert (result.images, result.rejected) == (1, 0)
    assert colours(place) == {"one": "r"}


def test_pictures_that_cannot_be_read_are_rejected_and_not_passed_by(place: Place) -> None:
    (place.path / "in").mkdir()
    image("red").save(place.path / "in/a.jfif", "JPEG")
    (place.path / "in/IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    result = place.job(str(place.path / "in"), task="augment", templates={"prompt": "x"})
    assert (result.images, result.rejected) == (1, 1)
    [row] = place.rows(folder="rejected")
    assert (row["init_image"], row["field"]) == ("IMG_1.HEIC", "init_image")
    assert row["reason"].startswith("cannot be read as PNG, JPEG")


def test_a_cut_off_tar_costs_the_sample_that_is_cut_off(place: Place) -> None:
    path = tar(place.path / "t.tar", {"a.png": png("red"), "a.txt": "a", "b.txt": "b", "b.png": bytes(5000)})
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: whole.index(b"b.png") + 1024])
    rows = list(Source(path).rows())
    assert [row.problem is None for row in rows] == [True, False]
    assert "cut off" in str(rows[1].problem)


def test_reading_a_tar_takes_no_more_memory_when_it_is_longer(place: Place) -> None:
    def peak(samples: int) -> int:
        path = tar(place.path / f"{samples}.tar", {f"{i}.txt": f"text {i}" for i in range(samples)})
        tracemalloc.start()
        try:
            assert sum(row.values["txt"] == f"text {row.line - 1}" for row in Source(path).rows()) == samples
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # what is loaded once
    assert peak(3000) < peak(300) + 100_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tar.gz", b"", "unpack it first"),
        ("a.tar", b"no tar at all" * 100, "a.tar"),
        ("a.arrow", b"nothing", "a.arrow"),
        ("a.webp2", b"", "allowed endings"),
    ],
)
def test_inputs_that_are_none_are_refused(place: Place, name: str, content: bytes, message: str) -> None:
    path = place.write(content, name)
    with pytest.raises(InvalidJob, match=message):
        list(Source(path).rows())


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The URL of a server of the files in `tmp_path`."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    handler = partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_table_over_http_is_read_and_the_pictures_it_names_are_refused(place: Place, web: str) -> None:
    place.write("prompt,label\nx,1\ny,2\n", "in/t.csv")
    assert place.job(f"{web}/in/t.csv").images == 2
    assert place.job(f"{web}/in/t.csv").made == 0
    assert [row["label"] for row in place.rows()] == ["1", "2"]
    place.write("prompt,image\nx,a.bmp\n", "in/p.csv")
    with pytest.raises(InvalidJob, match=f"{re.escape(web)}/in: not read over http, download them first"):
        place.job(f"{web}/in/p.csv", "other", task="augment")
    place.write("prompt,image\nx,a.bmp\n", "local.csv")
    with pytest.raises(InvalidJob, match=r"pictures below http.*: not read over http"):
        place.job(str(place.path / "local.csv"), "third", task="augment", pictures={"root": f"{web}/in"})


def test_arrow_files_with_text_that_is_no_utf8_lose_that_row_only(place: Place) -> None:
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"ok\xff\xfe")]
    )
    with pa.OSFile(str(place.path / "t.arrow"), "wb") as sink:
        batch = pa.record_batch({"prompt": broken})
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
    result = place.job(str(place.path / "t.arrow"))
    assert (result.images, result.rejected) == (1, 1)


def test_many_inputs_are_one_and_the_root_is_found_without_listing(place: Place) -> None:
    for name in ("x/a.csv", "x/b.csv", "y/c.csv"):
        place.write(f"prompt\n{name}\n", name)
    inputs = [str(place.path / "x/*.csv"), str(place.path / "y")]
    source = Source(inputs)
    assert [(row.file, row.values["prompt"]) for row in source.rows()] == [
        (name, name) for name in ("x/a.csv", "x/b.csv", "y/c.csv")
    ]
    assert source.root == str(place.path) == input_root(inputs, lambda url: {})
    for one in (str(place.path / "x"), str(place.path / "x/a.csv"), str(place.path / "x/*.csv")):
        assert Source(one).root == input_root([one], lambda url: {}), one


class Shelves(MemoryFileSystem):
    """A storage whose contents depend on its options."""

    protocol = "shelves"
    cachable = False
    shelves: ClassVar[dict[str, dict[str, Any]]] = {}

    def __init__(self, shelf: str, **options: Any) -> None:
        super().__init__(**options)
        self.store = self.shelves.setdefault(shelf, {})

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("shelves://").rstrip("/")


def test_inputs_are_read_with_their_own_storage_options(place: Place) -> None:
    fsspec.register_implementation("shelves", Shelves, clobber=True)
    files = {"x/t.csv": b"image,prompt\na.png,one\n", "x/a.png": png("red"), "y/t.csv": b"prompt\nof B\n"}
    for name, content in files.items():
        Shelves("A").pipe_file(name, content)
        Shelves("B").pipe_file(name, b"prompt\nof the other shelf\n")
    config = place.config(
        "shelves://x/t.csv",
        task="augment",
        storage={"shelves://x/": {"shelf": "A"}, "shelves": {"shelf": "B"}},
    )
    for urls in (["shelves://x/t.csv", "shelves://y/t.csv"], ["shelves://y/t.csv", "shelves://x/t.csv"]):
        with pytest.raises(InvalidJob, match="its storage options are not those of"):
            Source(urls, config.storage_options)
    assert place.run(config).images == 1, "the folder of the input has the options too"
    assert colours(place) == {"one": "r"}


def test_the_fingerprint_sees_every_change(place: Place) -> None:
    for name in ("p/1.png", "p/2.png"):
        (place.path / name).parent.mkdir(exist_ok=True)
        (place.path / name).write_bytes(png("red"))
    path = tar(place.path / "t.tar", {"a.png": png("red")})

    def prints() -> Any:
        return [Source(str(place.path / "p")).fingerprint(), Source(path).fingerprint()]

    seen = [prints()]
    (place.path / "p/2.png").write_bytes(png("red") + b"\0")
    seen.append(prints())
    with open(path, "ab") as file:
        file.write(b"x")
    seen.append(prints())
    assert seen[0][0] != seen[1][0] == seen[2][0]
    assert seen[0][1] == seen[1][1] != seen[2][1]


@pytest.mark.parametrize("name", ["1.png", "*.png", "[12].png"])
def test_fingerprints_of_pictures_list_no_more_than_the_input(
    place: Place, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    listed, ls = [], LocalFileSystem.ls

    def recorded(self: Any, path: str, *arguments: Any, **options: Any) -> Any:
        listed.append(str(path))
        return ls(self, path, *arguments, **options)

    monkeypatch.setattr(LocalFileSystem, "ls", recorded)
    for file in ("1.png", "2.png", "runs/3.png"):
        place.write(png("red"), file)
    source = Source(str(place.path / name))
    seen = [source.fingerprint()]
    place.write(png("lime"), "4.png")
    seen.append(source.fingerprint())
    place.write(png("blue") + b"more", "1.png")
    seen.append(source.fingerprint())
    assert [path for path in listed if "runs" in path] == []
    assert seen[0] == seen[1], "the files are those of the start"
    assert seen[1] != seen[2], "but they are looked at again"
    assert source.stamps.keys() == ({"1.png"} if name == "1.png" else {"1.png", "2.png"})


@pytest.mark.parametrize("what", ["", "/*.png", "/a.png", "/a.csv"])
def test_an_input_that_is_gone_again_is_named(place: Place, what: str) -> None:
    path = place.path / ("in/a.csv" if what == "/a.csv" else "in/a.png")
    for other in (path, place.path / "in/b.png"):
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(png("red"))
    source = Source(f"{path.parent}{what}" if what else [str(path.parent), str(place.path / "in/b.png")])
    source.fingerprint()
    path.unlink()
    with pytest.raises(InvalidJob, match=f"input {path} is gone: the input changed while it was read"):
        source.fingerprint()


@pytest.mark.slow
def test_every_kind_of_input_is_read_from_object_storage(
    place: Place, s3: S3, dataset: datasets.Dataset
) -> None:
    folder, files = place.path / "in", s3.filesystem()
    (folder / "pics/cats").mkdir(parents=True)
    (folder / "pics/cats/1.png").write_bytes(png("red"))
    (folder / "t.csv").write_text("image,prompt\npics/cats/1.png,one\npics/none.png,two\n")
    pq.write_table(pa.table({"image": [png("red")], "prompt": ["one"]}), folder / "p.parquet")
    tar(folder / "w.tar", {"a.png": png("red"), "a.txt": "one"})
    dataset.select([0]).flatten_indices().save_to_disk(folder / "ds")
    url = s3.folder()
    files.put(str(folder), url.removeprefix("s3://"), recursive=True)
    expected = {"t.csv": (1, 1), "p.parquet": (1, 0), "w.tar": (1, 0), "ds": (1, 0), "pics": (1, 0)}
    for number, name in enumerate([*expected, "pics/*/*.png"]):
        options = {"templates": {"prompt": "one"}} if name not in ("t.csv", "w.tar") else {}
        output = f"out{number}"
        result = place.job(f"{url}/{name}", output, task="augment", storage={"s3": s3.options()}, **options)
        assert (result.images, result.rejected) == expected.get(name, (1, 0)), name
        assert colours(place, output) == {"one": "r"}, name


@pytest.mark.parametrize("place_of_change", [0, 5_000, -1])
def test_of_a_large_file_chunks_are_digested_and_little_more_is_fetched(
    monkeypatch: pytest.MonkeyPatch, place_of_change: int
) -> None:
    monkeypatch.setattr("diffray.pipelines.inputs.source.WHOLE_BELOW", 10_000)
    monkeypatch.setattr("diffray.pipelines.inputs.source.CHUNK", 100)
    monkeypatch.setattr("diffray.pipelines.inputs.source.SAMPLES", 3)
    fetched: list[int] = []
    cat = MemoryFileSystem.cat_file

    def counted(self: Any, path: str, start: Any = None, end: Any = None, **more: Any) -> bytes:
        data = cat(self, path, start, end, **more)
        fetched.append(len(data))
        return data

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    fs, data = fsspec.filesystem("memory"), bytearray(10_100)
    fs.pipe_file("/large/a.tar", bytes(data))
    before = Source("memory://large/a.tar").fingerprint()
    assert fetched == [100, 100, 100]
    data[place_of_change] ^= 1
    fs.pipe_file("/large/a.tar", bytes(data))
    assert Source("memory://large/a.tar").fingerprint() != before
