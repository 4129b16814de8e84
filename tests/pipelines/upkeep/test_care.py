"""Verify, repair, retry, collect: a dataset is proven, mended and cleaned without losing or doubling an image."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from diffray.model.errors import JobConflict, JobError
from diffray.pipelines import Store, collect, job_status, repair, retry_rejected, verify
from diffray.pipelines.outputs.plan import read_plan, record_plan, shard_path
from diffray.pipelines.upkeep import care as upkeep

from .. import fake
from ..conftest import Place, in_process, restarting
from ..crashes import Crash, CrashingStore, in_turn

TABLE = "prompt,n,width,label\n" + "p,2,,a\n" + "POISON,1,,b\n" + "bad,1,x,c\n" + "q,3,,d\n"
LAYOUTS = ["parquet", "files", "webdataset"]


def made(place: Place, name: str = "out", layout: str = "parquet", table: str = TABLE) -> Store:
    place.write(table)
    resume(place, name, layout)
    return Store(str(place.path / name))


def resume(place: Place, name: str = "out", layout: str = "parquet") -> None:
    pages = {"contact_sheet": 0, "gallery": 0}  # they take longer than all the rest
    place.job(str(place.path / "prompts.csv"), name, encoding={"layout": layout}, **pages)


def again(place: Place, name: str = "out", **arguments: object) -> tuple[int, int, int]:
    """Rejected rows once more, on an engine that is not poisoned any more."""
    arguments = {"models": fake.FakeModels(), "generate": in_process, **arguments}
    result = retry_rejected(str(place.path / name), **arguments)  # type: ignore[arg-type]
    return result.images, result.rejected, result.made


@pytest.fixture
def cure(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Take away what is wrong with POISON."""
    return lambda: monkeypatch.setattr(fake.FakeEngine, "poisonous", False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_whole_dataset_is_proven(place: Place, layout: str) -> None:
    found = verify(made(place, layout=layout))
    assert (found.images, found.rejected, found.shards, found.faults) == (5, 2, 3, ())
    assert found.files >= 5


def test_latents_are_proven(place: Place) -> None:
    from PIL import Image

    Image.new("RGB", (64, 48), "red").save(place.path / "a.png")
    place.job(place.write("image\na.png\n"), task="encode")
    found = verify(Store(str(place.path / "out")))
    assert (found.images, found.faults) == (1, ())


@pytest.mark.parametrize("damage", [None, b"PAR1 no more"])
def test_a_lost_shard_of_the_plan_costs_no_image(place: Place, damage: bytes | None) -> None:
    store = made(place)
    path = place.path / "out" / shard_path(1)
    path.unlink() if damage is None else path.write_bytes(damage)
    before = place.bytes()
    found = repair(store)
    what = "is gone" if damage is None else "is damaged"
    assert [(fault.shard, fault.path) for fault in found.faults] == [(None, shard_path(1))]
    assert found.faults[0].what.startswith(what)
    assert collect(store, 0).files == ()
    assert place.bytes() == before
    for record in ("commits/00001.json", "SUCCESS.json"):
        (place.path / "out/_diffray" / record).unlink()
    with pytest.raises(JobConflict, match=rf"shard-00001\.parquet {what}.*; without its plan"):
        resume(place)


def damages(out: Path) -> list[Path]:
    """Every file that a commit record names."""
    records = sorted((out / "_diffray/commits").glob("*.json"))
    return [out / file["path"] for r in records for file in json.loads(r.read_text())["files"]]


@pytest.mark.parametrize(
    ("layout", "how"),
    [
        *((layout, "flip") for layout in LAYOUTS),
        ("parquet", "cut"),
        ("files", "remove"),
        *(
            pytest.param(layout, how, marks=pytest.mark.slow)
            for layout, how in [
                ("files", "cut"),
                ("webdataset", "cut"),
                ("parquet", "remove"),
                ("webdataset", "remove"),
            ]
        ),
    ],
)
def test_each_damaged_file_is_found_and_repaired_to_the_byte(place: Place, layout: str, how: str) -> None:
    store = made(place, layout=layout)
    out, clean = place.path / "out", place.bytes()
    for victim in damages(out)[:: 3 if layout == "files" else 1]:
        whole = victim.read_bytes()
        if how == "remove":
            victim.unlink()
        elif how == "cut":
            victim.write_bytes(whole[:-7])
        else:
            victim.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
        found = verify(store)
        assert [str(out / f.path) for f in found.faults] == [str(victim)]
        assert repair(store).damaged == found.damaged
        assert job_status(Store(str(out))).phase == "stopped"
        resume(place, layout=layout)
        assert place.bytes() == clean
        assert verify(store).faults == ()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_no_record_names_is_found_and_left_alone(place: Place, layout: str) -> None:
    store = made(place, layout=layout)
    out = place.path / "out"
    surplus = ["data/part-00000-copy.parquet", "data/part-00077.tar", "rejected/part-00002.parquet"]
    surplus += ["data/images/part-00088", "data/images/mine.png"]
    if layout == "files":
        surplus += ["data/images/part-00000/00077-x.png"]
    unread = ["data/notes.txt", "data/.part-00000.parquet", "rejected/.DS_Store", "data/images/.thumbs/x.png"]
    (out / "data/images/part-00099").mkdir(parents=True)
    for path in [*surplus, *unread]:
        path = f"{path}/00000-x.png" if path.endswith("part-00088") else path
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(b"x")
    before = place.bytes()
    found = repair(store)
    assert sorted(fault.path for fault in found.faults) == sorted(surplus)
    assert found.damaged == []
    assert place.bytes() == before
    assert job_status(Store(str(out))).phase == "complete"


def test_foreign_files_among_the_images_of_a_shard_that_is_made_again_stay(place: Place) -> None:
    store = made(place, layout="files")
    folder = place.path / "out/data/images/part-00000"
    foreign, own = [folder / "notes.txt", folder / ".thumbs/x.png"], folder / "00077-x.png"
    (folder / ".thumbs").mkdir()
    for path in (*foreign, own):
        path.write_bytes(b"x")
    (place.path / "out/_diffray/commits/00000.json").write_bytes(b"ruin")
    repair(store)
    resume(place, layout="files")
    assert [path.read_bytes() for path in foreign] == [b"x", b"x"]
    assert not own.exists(), "an earlier attempt may have written it"


def test_files_of_shards_that_are_not_committed_are_no_faults(place: Place) -> None:
    store = made(place)
    for name in ("commits/00001.json", "SUCCESS.json"):
        store.remove(f"_diffray/{name}")
    store.write("rejected/part-00001.parquet", b"half of it")
    assert verify(store).faults == ()
    store.write("rejected/part-00003.parquet", b"of no shard")
    assert [fault.path for fault in verify(store).faults] == ["rejected/part-00003.parquet"]


def test_a_changed_record_is_found(place: Place) -> None:
    store = made(place)
    path = place.path / "out/_diffray/commits/00000.json"
    record = json.loads(path.read_text())
    ids = list(record["image_sha256"])
    for change in (
        {"images": record["images"] + 1},
        {"image_sha256": {**record["image_sha256"], ids[0]: "0" * 64}},
        {"image_sha256": {**record["image_sha256"], "other-0": "0" * 64}},
        {"reasons": {**record["reasons"], ids[0]: "both"}},
        {"files": []},
    ):
        path.write_text(json.dumps({**record, **change}))
        assert verify(store).damaged == [0], change
    path.write_text(json.dumps(record)[:100])
    assert str(verify(store).faults[0]).startswith("_diffray/commits/00000.json: damaged: ")
    clean = place.bytes()
    repair(store)
    resume(place)
    assert place.bytes() == clean
    assert verify(store).faults == ()


def test_an_image_that_ended_twice_is_found(place: Place) -> None:
    store = made(place)
    plan = place.path / "out/_diffray/plan"
    shutil.copy(plan / "shard-00000.parquet", plan / "shard-00002.parquet")
    record = json.loads((place.path / "out/_diffray/commits/00000.json").read_text())
    (place.path / "out/_diffray/commits/00002.json").write_text(json.dumps({**record, "shard": 2}))
    assert any("ended in another one as well" in fault.what for fault in verify(store).faults)


def test_an_unfinished_job_is_proven_as_far_as_it_is(place: Place) -> None:
    config = place.config(place.write(TABLE), shards={"images": 2})
    with pytest.raises(Crash):
        place.run(config, store=CrashingStore(config.output, 40, False), generate=in_turn)
    found = verify(Store(config.output))
    assert found.faults == ()
    assert 0 < found.shards < 4
    assert (found.planned, found.missing) == (7, 7 - found.images - found.rejected)
    assert found.missing > 0
    repaired = repair(Store(config.output), take_over=True)
    assert repaired == found, "what is not made yet is no damage"
    place.run(config, generate=in_turn)
    assert verify(Store(config.output)).missing == 0


def test_what_a_repair_took_back_is_not_made_yet(place: Place) -> None:
    store = made(place)
    (place.path / "out/_diffray/commits/00001.json").write_bytes(b"ruin")
    found = repair(store)
    assert (found.missing, found.damaged) == (0, [1]), "damaged is another matter"
    again = verify(store)
    assert (again.missing, again.faults) == (3, ())
    resume(place)
    assert verify(store).missing == 0


def test_rejected_rows_that_are_to_run_again_are_not_made_yet(place: Place) -> None:
    store = made(place)

    def stopped(*_: object) -> Iterator[tuple[int, int]]:
        raise JobError("stopped")

    with pytest.raises(JobError, match="stopped"):
        again(place, generate=stopped)
    found = verify(store)
    assert (found.planned, found.images, found.rejected, found.missing) == (7, 5, 0, 2)
    again(place)
    assert verify(store).missing == 0


# Rejected rows again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rejected_rows_that_succeed_become_images(
    place: Place, layout: str, cure: Callable[[], None]
) -> None:
    store = made(place, layout=layout)
    cure()
    begun = Counter(place.begun())
    assert again(place) == (6, 1, 1)
    assert verify(store).faults == ()
    moved = "rejected/part-00000.parquet"
    store.write(moved, store.read(f"_diffray/history/{moved}"))
    assert [fault.path for fault in verify(store).faults] == [moved], "its rows would count twice"
    mark = store.read("_diffray/SUCCESS.json")
    store.remove("_diffray/SUCCESS.json")
    assert verify(store).faults == (), "the job was stopped before it was moved"
    store.write("_diffray/SUCCESS.json", mark)
    store.remove(moved)
    assert not list((place.path / "out/rejected").glob("part-00000*"))
    [row] = place.rows(folder="rejected")
    assert (row["prompt"], row["field"]) == ("bad", "width")
    old = place.rows(folder="_diffray/history/rejected")
    assert {r["prompt"] for r in old} == {"POISON", "bad"}
    assert sum((Counter(place.begun()) - begun).values()) == 1, "only the rejected row was made"
    totals = json.loads((place.path / "out/_diffray/SUCCESS.json").read_text())
    assert (totals["planned"], totals["images"], totals["rejected"]) == (7, 6, 1)
    assert (job_status(store).phase, job_status(store).plans) == ("complete", 2)
    resume(place, layout=layout)  # the job's own command has nothing to do
    assert again(place) == (6, 1, 1)
    assert verify(store).faults == ()


def test_rows_that_fail_again_are_counted_once(place: Place) -> None:
    store = made(place)
    for _ in range(2):
        assert again(place) == (5, 2, 1)
        assert len(place.rows(folder="rejected")) == 2
        assert verify(store).faults == ()
    place.write(TABLE + "POISON too,1,,e\nr,1,,f\n")
    resume(place)
    assert (job_status(store).images, job_status(store).rejected) == (6, 3)
    assert again(place) == (6, 3, 1)
    assert verify(store).faults == ()


def test_nothing_rejected_is_nothing_to_do(place: Place) -> None:
    store = made(place, table="prompt\np\n")
    before = place.bytes()
    assert again(place) == (1, 0, 0)
    assert place.bytes() == before
    assert job_status(store).plans == 1


def test_an_unfinished_job_is_finished_first(place: Place) -> None:
    config = place.config(place.write(TABLE), shards={"images": 2})
    with pytest.raises(Crash):
        place.run(config, store=CrashingStore(config.output, 40, False), generate=in_turn)
    with pytest.raises(JobError, match="run the job's own command first"):
        again(place, take_over=True)


def test_another_model_is_refused(place: Place) -> None:
    made(place)

    class Other(fake.FakeModels):
        def checksum(self, options: object) -> str:
            return "w1"

    with pytest.raises(JobConflict, match="checksum"):
        again(place, models=Other())


def test_a_damaged_shard_whose_rejected_rows_ran_again_is_repaired_without_doubling(
    place: Place, cure: Callable[[], None]
) -> None:
    store = made(place)
    cure()
    assert again(place)[:2] == (6, 1)
    clean = place.bytes()
    for victim in ("data/part-00000.parquet", "_diffray/commits/00000.json"):
        (place.path / "out" / victim).write_bytes(b"ruin")
        assert repair(store).damaged == [0]
        resume(place)
        assert place.bytes() == clean
        assert verify(store).faults == ()


def test_a_worker_that_broke_on_a_row_gets_another_chance(place: Place) -> None:
    table = place.write("prompt\np\nBREAK\n")
    place.run(place.config(table), generate=restarting)
    store = Store(str(place.path / "out"))
    assert job_status(store).rejected == 1
    assert again(place, generate=restarting) == (1, 1, 1)
    [row] = place.rows(folder="rejected")
    assert row["attempts"] == 3


# Leftovers -------------------------------------------------------------------------------------------------


def test_leftovers_of_crashes_go_and_nothing_else(place: Place) -> None:
    store = made(place, layout="files")
    out = place.path / "out"
    orphans = [
        "data/part-00009.parquet",
        "data/images/part-00000/00077-x.png",
        "rejected/part-00007.parquet",
        "_diffray/tmp/0123",
        "_diffray/plan/shard-00003.parquet",
    ]
    foreign = [
        "data/notes.txt",
        "data/images/part-00000/holiday.png",
        "rejected/part-1.parquet",
        "thesis.doc",
    ]
    for name in [*orphans, *foreign]:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"x")
    before = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file() and "locks" not in p.parts}
    assert collect(store, 3600).files == ()
    for name in [*orphans, *foreign]:
        os.utime(out / name, (time.time() - 7200,) * 2)
    assert sorted(collect(store, 3600, dry_run=True).files) == sorted(orphans)
    assert sorted(collect(store, 3600).files) == sorted(orphans)
    after = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file() and "locks" not in p.parts}
    assert before - after == set(orphans)
    assert {fault.path for fault in verify(store).faults} == {foreign[1], foreign[2]}


def test_the_plan_of_a_job_of_more_than_a_hundred_thousand_shards_stays(place: Place) -> None:
    store = made(place)
    plan = read_plan(store)
    assert plan is not None
    record_plan(store, replace(plan, number=99_999))
    record_plan(store, replace(plan, shards=100_002, number=100_000))
    planned, beyond = (3, 10_000, 99_999, 100_000, 100_001), (100_002, 123_456, 1_000_000)
    for number in (*planned, *beyond):
        store.write(shard_path(number), b"x")
    (place.path / "out/_diffray/plan/zoo.parquet").write_bytes(b"x")
    assert set(collect(store, 0).files) == {shard_path(number) for number in beyond}
    assert all(store.exists(shard_path(number)) for number in planned)


@pytest.mark.slow
def test_an_output_at_work_is_left_alone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffray.pipelines.outputs import lock

    monkeypatch.setattr(lock, "BEAT", 0.05)
    store = made(place)
    with lock.Lock.acquire(store):
        for call in (lambda: collect(store, 0), lambda: repair(store), lambda: again(place)):
            with pytest.raises(JobConflict, match="being worked on"):
                call()


def test_an_output_without_a_job_is_told(tmp_path: Path) -> None:
    for call in (verify, repair, lambda store: collect(store, 0), upkeep.planned_job):
        with pytest.raises(JobError, match="no planned diffray job"):
            call(Store(str(tmp_path)))
