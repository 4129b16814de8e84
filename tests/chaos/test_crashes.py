"""A crash, or a failure, at every single storage call in turn; then the same command again.

Every time the dataset has to be byte for byte the one of an uninterrupted run, its files have to be those of
its records, and no shard that was committed may be made again.
"""

from __future__ import annotations

import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from diffray.model.errors import StorageError
from diffray.pipelines import JobConfig, Store, collect, repair, retry_rejected, verify
from diffray.pipelines.outputs import lock
from diffray.pipelines.outputs.plan import read_shard
from diffray.pipelines.runs import RUNS
from tests.pipelines.conftest import Place
from tests.pipelines.crashes import Crash, CrashingStore, in_turn
from tests.pipelines.fake import FakeModels
from tests.pipelines.s3 import S3


@pytest.fixture(autouse=True)
def without_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life are calls too, and come by the clock."""
    monkeypatch.setattr(lock, "BEAT", 1e6)


TABLE = "prompt,width\np,\nPOISON,\nbad,x\nq,\n"


def job(place: Place, name: str, **values: object) -> JobConfig:
    """A job of two shards that makes two images and rejects two rows, one in the plan and one in the engine."""
    return place.config(place.write(TABLE), name, shards={"images": 2}, contact_sheet=1, gallery=1, **values)


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("layout", ["parquet", "files", "webdataset"])
@pytest.mark.slow
def test_at_every_storage_call(place: Place, layout: str, after: bool, error: bool) -> None:
    at_calls(place, layout, after, error, every=1)


def test_at_every_fourth_storage_call(place: Place) -> None:
    at_calls(place, "parquet", False, False, every=4)


def at_calls(place: Place, layout: str, after: bool, error: bool, every: int) -> None:
    """Crash or fail at each of these calls of a job, and resume it."""
    encoding = {"layout": layout}
    config = job(place, "clean", encoding=encoding)
    counting = CrashingStore(config.output, -1, after)
    place.run(config, store=counting, generate=in_turn)
    clean = place.bytes("clean")
    assert counting.calls > 40
    for at in range(1, counting.calls + 1, every):
        name = f"crashed{at}"
        config = job(place, name, encoding=encoding)
        out = Path(config.output)
        store = CrashingStore(config.output, at, after, error=error)
        ended = False
        with suppress(StorageError if error else Crash):
            place.run(config, store=store, generate=in_turn)
            ended = True
        if ended:  # the record of a run is no part of the dataset: a job does not fail for it
            assert error
            assert str(store.hit).startswith(RUNS), f"call {at} failed unnoticed: {store.hit}"
        done = {path.name for path in (out / "_diffray/commits").glob("*")}
        made = Counter(place.begun())
        # The same process is still alive, so its own lock has to be taken over.
        place.run(config, generate=in_turn, take_over=True)
        assert place.bytes(name) == clean, f"call {at}"
        again = Counter(place.begun()) - made
        assert not seeds(Store(config.output), done) & again.keys(), (
            f"call {at}: a committed shard was made again"
        )
        assert verify(Store(config.output)).faults == (), f"call {at}"
        shutil.rmtree(out)


def seeds(store: Store, records: set[str]) -> set[int]:
    """The seeds of all images in committed shards."""
    images = [image for name in records for image in read_shard(store, int(name[:5])).images]
    return {image.request.seed for image in images if image.request and image.request.seed is not None}


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_at_every_storage_call_on_s3(place: Place, s3: S3, after: bool) -> None:
    files, table = s3.filesystem(), place.write("prompt,width\np,\nPOISON,\n")

    def config(url: str) -> JobConfig:
        values = {"input": table, "output": url, "storage": {"s3": s3.options()}}
        return JobConfig.checked({**values, "contact_sheet": 0, "gallery": 0})

    def contents(url: str) -> dict[str, str]:
        root = url.removeprefix("s3://")
        found = files.find(f"{root}/data") + files.find(f"{root}/rejected")
        return {name.removeprefix(root): files.info(name)["ETag"] for name in found}

    clean = s3.folder()
    counting = CrashingStore(clean, -1, after, options=s3.options())
    place.run(config(clean), store=counting, generate=in_turn)
    for at in range(1, counting.calls + 1):
        url = s3.folder()
        with pytest.raises(Crash):
            place.run(
                config(url), store=CrashingStore(url, at, after, options=s3.options()), generate=in_turn
            )
        place.run(config(url), generate=in_turn, take_over=True)
        assert contents(url) == contents(clean), f"call {at}"
    assert verify(Store(url, s3.options())).faults == ()


@pytest.mark.slow
def test_at_every_storage_call_of_a_growing_job(place: Place) -> None:
    small, large = "prompt\np\nq\n", "prompt\np\nq\nr\ns\nt\n"

    def run(name: str, table: str, store: Store | None = None, **more: bool) -> None:
        input = place.write(table, f"{name}.csv")
        config = place.config(input, name, shards={"images": 2}, contact_sheet=1, gallery=1)
        place.run(config, store=store, generate=in_turn, **more)

    run("clean", small)
    counting = CrashingStore(str(place.path / "clean"), -1, False)
    run("clean", large, counting)
    for at in range(1, counting.calls + 1):
        name = f"crashed{at}"
        run(name, small)
        with pytest.raises(Crash):
            run(name, large, CrashingStore(str(place.path / name), at, at % 2 == 0))
        run(name, large, take_over=True)
        assert place.bytes(name) == place.bytes("clean"), f"call {at}"
        shutil.rmtree(place.path / name)


@pytest.mark.slow
def test_at_every_storage_call_of_a_retry(place: Place) -> None:
    def run(name: str, store: Store | None = None, **more: bool) -> None:
        output = str(place.path / name)
        retry_rejected(output, models=FakeModels(), store=store, generate=in_turn, **more)

    place.run(job(place, "clean"), generate=in_turn)
    counting = CrashingStore(str(place.path / "clean"), -1, False)
    run("clean", counting)
    for at in range(1, counting.calls + 1):
        name = f"crashed{at}"
        place.run(job(place, name), generate=in_turn)
        with pytest.raises(Crash):
            run(name, CrashingStore(str(place.path / name), at, at % 2 == 0))
        run(name, take_over=True)
        found = verify(Store(str(place.path / name)))
        assert (found.images, found.rejected, found.faults) == (2, 2, ()), f"call {at}"
        shutil.rmtree(place.path / name)


@pytest.mark.slow
def test_at_every_storage_call_of_making_pages_again(place: Place) -> None:
    """What a crash left half made is not taken for whole when the config is changed back."""
    before, after = ({"license": name, "checks": {"near_duplicates": 0}} for name in ("mit", "apache-2.0"))
    place.run(job(place, "clean", **before), generate=in_turn)
    shutil.copytree(place.path / "clean", place.path / "counted")
    config = job(place, "counted", **after)
    counting = CrashingStore(config.output, -1, False)
    place.run(config, store=counting, generate=in_turn)
    assert place.bytes("counted") != place.bytes("clean")
    for at in range(1, counting.calls + 1):
        name = f"crashed{at}"
        shutil.copytree(place.path / "clean", place.path / name)
        config = job(place, name, **after)
        with pytest.raises(Crash):
            place.run(config, store=CrashingStore(config.output, at, at % 2 == 0), generate=in_turn)
        place.run(job(place, name, **before), generate=in_turn, take_over=True)
        assert place.bytes(name) == place.bytes("clean"), f"call {at}"
        shutil.rmtree(place.path / name)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["data/part-00000.parquet", "_diffray/commits/00000.json"])
def test_at_every_storage_call_of_a_repair_and_of_cleaning(place: Place, victim: str) -> None:
    """Of a dataset whose rejected rows ran again already; what is orphaned meanwhile is collected."""
    place.run(job(place, "clean"), generate=in_turn)
    retry_rejected(str(place.path / "clean"), models=FakeModels(), generate=in_turn)
    clean = place.bytes("clean")

    def damaged(name: str) -> str:
        shutil.copytree(place.path / "clean", place.path / name)
        (place.path / name / victim).write_bytes(b"ruin")
        return str(place.path / name)

    def care(store: Store) -> None:
        repair(store, take_over=True)
        collect(store, 0, take_over=True)

    counting = CrashingStore(damaged("counted"), -1, False)
    care(counting)
    for at in range(1, counting.calls + 1):
        output = damaged(name := f"crashed{at}")
        with pytest.raises(Crash):
            care(CrashingStore(output, at, at % 2 == 0))
        care(Store(output))
        place.run(job(place, name), generate=in_turn, take_over=True)
        assert place.bytes(name) == clean, f"call {at}"
        assert verify(Store(output)).faults == (), f"call {at}"
        shutil.rmtree(output)
