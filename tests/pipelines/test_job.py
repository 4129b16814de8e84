"""The promises of a job: nothing lost, nothing twice, crashes anywhere, no silent change."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffray.model.errors import AccountingError, JobConflict, JobError, TooManyRejected
from diffray.pipelines import InvalidJob, JobConfig, ModelOptions, Store, repair
from diffray.pipelines.making.worker import Share
from diffray.pipelines.models import Models, OpenModel
from diffray.pipelines.outputs import fingerprint
from diffray.pipelines.outputs.commit import Output, Rejected, write_commit
from diffray.pipelines.outputs.lock import Lock
from diffray.pipelines.outputs.plan import read_shard

from . import fake
from .conftest import Place, in_process, restarting
from .crashes import Crash

TABLE = "prompt,n,width,label\n" + "p,2,,a\n" + "POISON,1,,b\n" + "bad,1,x,c\n" + "q,3,,d\n"


def _one_then_crash(
    config: JobConfig, number: int, store: Store, models: Models, shares: Sequence[Share]
) -> Iterator[tuple[int, int]]:
    [share] = shares
    yield from in_process(config, number, store, models, [replace(share, shards=share.shards[:1])])
    raise Crash


def test_a_finished_job_has_nothing_to_do(place: Place) -> None:
    table = place.write(TABLE)
    first = place.job(table)
    assert (first.images, first.rejected, first.shards, first.made) == (5, 2, 3, 3)
    before, begun = place.bytes(), place.begun()
    second = place.job(table)
    assert (second.images, second.rejected, second.made) == (5, 2, 0)
    assert (place.bytes(), place.begun()) == (before, begun)


def test_bytes_do_not_depend_on_the_output_or_on_workers(place: Place) -> None:
    table = place.write(TABLE)
    place.job(table, "one")
    place.job(table, "two", workers={"shards_in_flight": 1, "crashes": 5})
    assert place.bytes("one") == place.bytes("two")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"defaults": {"steps": 9}}, "config.defaults.steps: nothing -> 9"),
        ({"seed": 3}, "config.seed: 0 -> 3"),
        ({"model": {"options": {"weights": "w1"}}}, 'model.checksum: "w0" -> "w1"'),
    ],
)
def test_a_changed_job_is_refused_and_the_change_is_shown(
    place: Place, change: dict[str, object], line: str
) -> None:
    table = place.write(TABLE)
    place.job(table)
    before = place.bytes()
    with pytest.raises(JobConflict) as conflict:
        place.job(table, **change)
    assert line in str(conflict.value)
    assert place.bytes() == before


def test_a_row_that_changed_is_refused_and_shown(place: Place) -> None:
    place.job(place.write(TABLE))
    before = place.bytes()
    for table, shown in (
        (TABLE.replace("p,2,,a", "p,2,,other"), "lacks 2 images that were planned"),
        ("id,prompt,n\nx,one,1\n", "columns changed: label: string -> None"),
    ):
        with pytest.raises(JobConflict, match=shown):
            place.job(place.write(table))
    assert place.bytes() == before
    place.job(place.write("id,prompt,steps\nx,one,4\ny,two,4\n", "ids.csv"), "ids")
    with pytest.raises(JobConflict) as conflict:
        place.job(place.write("id,prompt,steps\nx,one,9\ny,two,4\n", "ids.csv"), "ids")
    assert "image x-0 (ids.csv:2) changed" in str(conflict.value)
    assert conflict.value.args[0].splitlines()[1:] == ["  steps: 4 -> 9"]


@pytest.mark.parametrize("finished", [True, False])
def test_an_input_that_grew_continues(place: Place, finished: bool) -> None:
    """More rows, a new file before the old one, a repeated row: the images are those of one large job."""
    (place.path / "in").mkdir()
    place.write(TABLE, "in/m.csv")
    config = place.config(str(place.path / "in"))
    if finished:
        place.run(config)
    else:
        with pytest.raises(Crash):
            place.run(config, generate=_one_then_crash)
    first = {row["id"]: row["sha256"] for row in place.rows()}
    begun = Counter(place.begun())
    place.write(TABLE + "r,3,,e\nbad too,1,y,f\np,2,,a\n", "in/m.csv")
    place.write("prompt,n,width,label\nz,1,,g\n", "in/a.csv")
    grown = place.run(config, take_over=not finished)
    assert (grown.images, grown.rejected) == (5 + 3 + 2 + 1, 3)
    if finished:
        again = Counter(place.begun()) - begun
        assert not again & begun, "no image is made twice"
    place.run(place.config(str(place.path / "in"), "whole"))
    rows, whole = ({r["id"]: r["sha256"] for r in place.rows(name)} for name in ("out", "whole"))
    assert rows == whole
    assert first.items() <= rows.items()
    totals = json.loads((place.path / "out/_diffray/SUCCESS.json").read_text())
    assert (totals["planned"], totals["images"], totals["rejected"]) == (14, 11, 3)
    assert place.run(config).made == 0


def test_a_limit_may_be_raised(place: Place) -> None:
    table = place.write("prompt\na\nb\nc\n")
    assert place.job(table, limit=1).images == 1
    assert place.job(table, limit=1).made == 0
    grown = place.job(table, limit=2)
    assert (grown.images, grown.made) == (2, 1)
    assert place.job(table).images == 3
    with pytest.raises(JobConflict, match=r"lacks 1 images .* as they were \(the limit is 2 rows now\)"):
        place.job(table, limit=2)


def test_pages_are_made_again_when_only_they_are_to_change(place: Place) -> None:
    table = place.write(TABLE)
    place.job(table, contact_sheet=0)
    data, begun = {k: v for k, v in place.bytes().items() if k.startswith("data/")}, place.begun()
    readme = place.path / "out/README.md"
    assert "license: mit" not in readme.read_text()
    priced: dict[str, Any] = {"license": "mit", "gallery": 0, "workers": {"price_per_hour": 2.0}}
    assert place.job(table, contact_sheet=4, **priced).made == 0
    assert "license: mit" in readme.read_text()
    assert (place.path / "out/contact_sheet.png").exists()
    assert json.loads((place.path / "out/report.json").read_text())["cost"]
    assert {k: v for k, v in place.bytes().items() if k.startswith("data/")} == data
    assert place.begun() == begun
    before = (place.path / "out/report.json").stat().st_mtime_ns
    assert place.job(table, contact_sheet=4, **priced).made == 0
    assert (place.path / "out/report.json").stat().st_mtime_ns == before, "the second time nothing is to do"
    place.write("prompt,n,width,label\n" + TABLE.partition("\n")[2] + "r,1,,e\n")
    assert place.job(table, contact_sheet=4, **priced).images == 6


def test_a_shuffled_input_is_the_same_input(place: Place) -> None:
    table = place.write("id,prompt\na,x\nb,y\n")
    place.job(table)
    begun = place.begun()
    assert place.job(place.write("id,prompt\nb,y\na,x\n")).made == 0
    assert place.begun() == begun


def test_workers_may_change_between_resumptions(place: Place) -> None:
    table = place.write(TABLE)
    place.job(table)
    assert place.job(table, workers={"actors": 3}).made == 0


def test_foreign_files_are_never_touched(place: Place) -> None:
    table = place.write(TABLE)
    (place.path / "out").mkdir()
    (place.path / "out" / "thesis.doc").write_text("mine")
    with pytest.raises(JobConflict, match=r"thesis\.doc"):
        place.job(table)
    assert (place.path / "out" / "thesis.doc").read_text() == "mine"


@pytest.mark.parametrize(
    ("limit", "poisoned", "said"),
    [
        (None, 4, r"4 of 4 images are rejected \(1\), not all may be"),
        (None, 3, None),
        (1.0, 4, None),
        (0.5, 2, None),
        (0.5, 3, r"3 of 4 images are rejected \(0.75\), max_rejected allows 0.5"),
        (
            0.0,
            1,
            r"1 of 4 images are rejected \(0.25\), max_rejected allows 0; all is committed, .*out/rejected",
        ),
    ],
)
def test_too_many_rejected_rows_fail_a_job_that_is_whole(
    place: Place, limit: float | None, poisoned: int, said: str | None
) -> None:
    rows = ["POISON"] * poisoned + ["p"] * (4 - poisoned)
    table = place.write("\n".join(["prompt", *rows]))
    for begun in (4, 4):  # run again, a finished job fails again, and makes nothing
        if said:
            with pytest.raises(TooManyRejected, match=said):
                place.job(table, max_rejected=limit)
        else:
            place.job(table, max_rejected=limit)
        assert len(place.begun()) == begun
    report = json.loads((place.path / "out/report.json").read_text())
    assert (report["images"], report["rejected"]) == (4 - poisoned, poisoned)
    assert len(place.rows(folder="rejected")) == poisoned
    assert place.job(table, max_rejected=1).rejected == poisoned, "the limit may change"


def test_a_plan_that_rejects_too_many_starts_no_engine_and_a_corrected_table_may_follow(place: Place) -> None:
    bad, good = "id,prompt,width\na,x,\nb,x,wide\nc,x,wide\n", "id,prompt,width\na,x,\nb,x,16\nc,x,wide\n"
    with pytest.raises(TooManyRejected, match=r"2 of 3 .* nothing was started; `diffray plan`"):
        place.job(place.write(bad), max_rejected=0.5)
    assert (place.begun(), (place.path / "out/_diffray/plans").exists()) == ([], False)
    assert place.job(place.write(good), max_rejected=0.5).images == 2
    grown = good + "".join(f"{name},x,wide\n" for name in "defg")
    with pytest.raises(TooManyRejected, match="5 of 7"):
        place.job(place.write(grown), max_rejected=0.5)
    assert place.job(place.write(good), max_rejected=0.5).made == 0, "the smaller plan still holds"


@pytest.mark.parametrize(
    ("input", "output", "refused"),
    [
        ("in", "in/out", True),
        ("in", "in/deep/er", True),
        ("in/**/*.csv", "in/out", True),
        ("in/*/*.csv", "in/out", True),
        ("in", "in/_out", False),
        ("in", "in.out", False),
        ("in/*.csv", "in/out", False),
        ("in/a/p.csv", "in/a/out", False),
    ],
)
def test_an_output_that_would_become_input_is_refused_at_the_start(
    place: Place, input: str, output: str, refused: bool
) -> None:
    place.write("prompt\nx\n", "in/p.csv")
    place.write("prompt\nx\n", "in/a/p.csv")
    config = place.config(str(place.path / input), output, checks={"near_duplicates": 0})
    if refused:
        with pytest.raises(InvalidJob, match=r"is inside the input .*would be read as input by the next run"):
            place.run(config)
        assert not (place.path / output).exists()
    else:
        made = place.run(config).made
        assert (made, place.run(config).made) == (1, 0)


@pytest.mark.parametrize("output", ["", "/", "///", "s3://bucket", "s3://bucket/"])
def test_an_output_that_is_no_folder_of_its_own_is_refused(
    place: Place, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.path)
    table = place.write(TABLE)
    with pytest.raises(InvalidJob, match=f"output '{output}': give a folder of its own"):
        place.run(JobConfig(input=table, output=output))
    assert [path.name for path in place.path.iterdir()] == ["prompts.csv"]


def test_a_row_that_breaks_its_worker_is_rejected_and_its_neighbours_are_not(place: Place) -> None:
    good = "prompt\n" + "".join(f"p{i}\n" for i in range(6))
    place.job(place.write(good, "good.csv"), "good")
    result = place.run(
        place.config(place.write(good + "BREAK\n", "bad.csv"), shards={"images": 4}), generate=restarting
    )
    assert (result.images, result.rejected) == (6, 1)
    [row] = place.rows(folder="rejected")
    assert (row["prompt"], row["attempts"], row["stage"]) == ("BREAK", 3, "generate")
    assert row["reason"].startswith("crashed its worker 3 times, last with engine stopped: CUDA error")
    assert {r["id"]: r["sha256"] for r in place.rows()} == {r["id"]: r["sha256"] for r in place.rows("good")}


def test_two_killers_in_one_shard_are_both_found(place: Place) -> None:
    table = place.write("prompt\np\nBREAK\nq\nBREAK now\nr\n")
    result = place.run(place.config(table, shards={"images": 10}), generate=restarting)
    assert (result.images, result.rejected) == (3, 2)


def test_a_shard_that_breaks_workers_without_a_guilty_row_stops_the_job(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffray.pipelines.making import worker

    def broken(*_: object) -> None:
        raise worker.WorkerBroken("disk controller on fire")

    monkeypatch.setattr(worker, "write_commit", broken)
    with pytest.raises(JobError, match="no single row"):
        place.run(place.config(place.write("prompt\np\n")), generate=restarting)


def test_outcomes_that_are_not_the_shard_are_refused(place: Place) -> None:
    place.job(place.write(TABLE))
    store = Store(str(place.path / "out"))
    shard = read_shard(store, 0)
    verdicts = [Rejected(image, "generate", None, "why", 1) for image in shard.images]
    output = Output("png", "parquet", "m", "c")
    for wrong in (verdicts[:-1], [*verdicts, verdicts[0]]):
        with pytest.raises(AccountingError, match="shard 0"):
            write_commit(store, 0, shard, wrong, output, {})


def test_a_shard_that_two_workers_commit_is_the_first_ones(place: Place) -> None:
    place.job(place.write(TABLE))
    store, output = Store(str(place.path / "out")), Output("png", "parquet", "m", "c")
    (place.path / "out/_diffray/commits/00000.json").unlink()
    shard = read_shard(store, 0)
    verdicts = [Rejected(image, "generate", None, "why", 1) for image in shard.images]
    first = write_commit(store, 0, shard, verdicts, output, {"seconds": 1})
    assert write_commit(store, 0, shard, verdicts, output, {"seconds": 2}) == first
    verdicts[0] = Rejected(shard.images[0], "generate", None, "another reason", 1)
    with pytest.raises(JobConflict, match="another worker committed this shard with other files"):
        write_commit(store, 0, shard, verdicts, output, {"seconds": 3})
    assert repair(store).damaged == [0]


@pytest.mark.parametrize("damage", ["commit", "data", "part-00007.parquet", "copy.parquet"])
def test_a_job_that_does_not_add_up_fails(place: Place, damage: str) -> None:
    table = place.write(TABLE)
    place.job(table)
    out = place.path / "out"
    (out / "_diffray/SUCCESS.json").unlink()
    if damage == "commit":
        path = out / "_diffray/commits/00000.json"
        values = json.loads(path.read_text())
        path.write_text(json.dumps({**values, "images": values["images"] - 1}))
    elif damage == "data":
        (out / "data/part-00000.parquet").unlink()
    else:
        shutil.copy(out / "data/part-00000.parquet", out / "data" / damage)
    with pytest.raises(AccountingError, match=damage if damage != "commit" else None):
        place.job(table)


def test_the_empty_folder_of_a_crashed_attempt_is_no_part(place: Place) -> None:
    table, encoding = place.write(TABLE), {"layout": "files"}
    place.job(table, encoding=encoding)
    (place.path / "out/_diffray/SUCCESS.json").unlink()
    (place.path / "out/data/images/part-00007").mkdir()
    assert place.job(table, encoding=encoding).made == 0


def test_a_damaged_record_is_never_taken_for_absent(place: Place) -> None:
    table = place.write(TABLE)
    place.job(table)
    out = place.path / "out"
    (out / "_diffray/SUCCESS.json").unlink()
    for name in ("commits/00001.json", "plans/00001.json", "job.json"):
        path: Path = out / "_diffray" / name
        whole = path.read_text()
        path.write_text(whole[: len(whole) // 2])
        with pytest.raises(JobConflict, match="damaged"):
            place.job(table)
        path.write_text(whole)


def test_a_worker_with_other_software_refuses(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's environment and a node's may differ; pictures of two versions must not mix."""

    def elsewhere(
        config: JobConfig, number: int, store: Store, models: Models, shares: Sequence[Share]
    ) -> Iterator[tuple[int, int]]:
        actual = fingerprint.version
        monkeypatch.setattr(fingerprint, "version", lambda name: "0.0" if name == "torch" else actual(name))
        yield from in_process(config, number, store, models, shares)

    with pytest.raises(JobConflict, match=r"other software than the job: torch 0\.0 here, \d"):
        place.run(place.config(place.write(TABLE)), generate=elsewhere)


def test_a_shard_of_rejected_rows_loads_no_model_again(place: Place) -> None:
    opened = []

    class Watched(fake.FakeModels):
        def open(self, options: ModelOptions) -> OpenModel:
            opened.append(options.options["name"])
            return super().open(options)

    log = str(place.path / "log")
    models = {name: {"options": {"log": log, "name": name}} for name in "ab"}
    table = place.write("prompt,model,width\nx,a,\ny,b,\nz,a,bad\n")
    result = place.run(place.config(table, model={}, models=models), models=Watched())
    assert (result.images, result.rejected) == (2, 1)
    assert opened == ["a", "b"]


def test_models_may_be_listed_in_another_order(place: Place) -> None:
    models = {name: {"options": {"weights": name, "log": str(place.log)}} for name in "ab"}
    table = place.write("prompt,model\nx,a\ny,b\n")
    config = place.config(table, model={}, models=models)

    def first_only(
        config: JobConfig, number: int, store: Store, models: Models, shares: Sequence[Share]
    ) -> Iterator[tuple[int, int]]:
        yield from in_process(config, number, store, models, shares[:1])
        raise JobError("stopped")

    with pytest.raises(JobError, match="stopped"):
        place.run(config, generate=first_only)
    turned = place.config(table, model={}, models={name: models[name] for name in "ba"})
    assert place.run(turned).images == 2


def test_a_job_that_another_driver_planned_meanwhile_is_checked(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that waits for the lock has seen no plan before."""
    table, acquire = place.write(TABLE), Lock.acquire

    def stopped(*_: object) -> Iterator[tuple[int, int]]:
        raise JobError("stopped")

    def waited(store: Store, *, take_over: bool) -> Lock:
        monkeypatch.undo()
        with pytest.raises(JobError, match="stopped"):
            place.run(place.config(table, encoding={"format": "jpeg"}), generate=stopped)
        return acquire(store, take_over=take_over)

    monkeypatch.setattr(Lock, "acquire", waited)
    with pytest.raises(JobConflict, match=r'config\.encoding\.format: "jpeg" -> "png"'):
        place.job(table)
    assert place.begun() == []
