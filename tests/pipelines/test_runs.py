"""The record of a run."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from diffray.pipelines import Between, JobConfig, Workers, retry_rejected
from diffray.pipelines.making.pools import EngineFacts, Pulse
from diffray.pipelines.making.tally import Reading
from diffray.pipelines.outputs.store import Store
from diffray.pipelines.runs import read_runs

from .conftest import Place, in_process
from .fake import FakeModels

START = {"place": 2.0, "imports": 3.0, "fetch": 1.0, "load": 4.0}
FACTS = EngineFacts(
    "a",
    "m",
    "finished",
    40.0,
    0.5,
    "n",
    "H100",
    START,
    Reading(images=7, busy=20.0, filled=80.0, slots=8, first_image=2.5),
)


def watched(*arguments: Any) -> Iterator[Any]:
    yield Pulse((FACTS, EngineFacts("b", "m", "lost", 6.0, 0.5)), 0, 1, ray=1.5)
    yield from in_process(*arguments)


def test_a_run_leaves_its_facts(place: Place) -> None:
    place.run(place.config(place.write("prompt,n\np,5\nPOISON,1\n")), generate=watched)
    [record] = read_runs(Store(str(place.path / "out")))
    assert (record["run"], record["outcome"], record["error"]) == (1, "finished", None)
    assert (record["images"], record["rejected"], record["shards"]) == (5, 1, 2)
    assert record["machine_seconds"] == 0.5 * 40 + 0.5 * 6
    assert (
        record["seconds"]["ray"],
        record["seconds"]["first_engine"],
        record["seconds"]["first_image"],
    ) == (
        1.5,
        10.0,
        12.5,
    )
    first, second = record["engines"]
    assert first["start"] == {**START, "first_image": 2.5}
    assert (first["busy_seconds"], first["occupancy"], first["images"]) == (20.0, 0.5, 7)
    assert (second["state"], second["accelerator"], second["share"]) == ("lost", "", 0.5)
    report = json.loads((place.path / "out/report.json").read_text())
    assert (report["machine_seconds"], report["workers"]) == (record["machine_seconds"], 2)


def test_text_encoders_are_paid_for_too(place: Place) -> None:
    def encoded(*arguments: Any) -> Iterator[Any]:
        time.sleep(0.05)
        yield Pulse((FACTS,), 0, 1, ray=0.01, texts=1000.0)
        yield from in_process(*arguments)

    place.run(place.config(place.write("prompt\np\n")), generate=encoded)
    [record] = read_runs(Store(str(place.path / "out")))
    expected = 0.5 * 40 + 1000 * (record["seconds"]["generate"] - record["seconds"]["ray"])
    assert record["machine_seconds"] == pytest.approx(expected, abs=2)  # a thousand times rounded figures
    assert record["machine_seconds"] > 20 + 1000 * 0.04


def test_a_run_says_how_it_was_spread_and_retries_go_on_like_it(place: Place) -> None:
    workers = {"actors": "2-4", "gpus": 0.25, "labels": {"zone": "a"}, "patience": 60.0, "address": "auto"}
    place.job(place.write("prompt\np\nPOISON\n"), workers={**workers, "price_per_hour": 7200.0})
    used = []

    def again(config: JobConfig, *arguments: Any) -> Iterator[Any]:
        used.append(config.workers)
        yield Pulse((FACTS,), 0, 1)
        yield from in_process(config, *arguments)

    retry_rejected(str(place.path / "out"), workers={"patience": 90.0}, models=FakeModels(), generate=again)
    assert used == [
        Workers(
            actors=Between(min=2, max=4),
            gpus=0.25,
            labels={"zone": "a"},
            patience=90.0,
            price_per_hour=7200.0,
        )
    ]
    report = json.loads((place.path / "out/report.json").read_text())
    first, second = read_runs(Store(str(place.path / "out")))
    assert second["machine_seconds"] == 20
    assert report["cost"]["total"] == pytest.approx(2 * report["machine_seconds"], abs=0.01)
    assert report["machine_seconds"] >= 20 + first["machine_seconds"]


def test_a_stopped_run_says_why_and_the_next_has_a_record_of_its_own(place: Place) -> None:
    config = place.config(place.write("prompt,n\np,5\n"))

    def broken(*_: Any) -> Iterator[Any]:
        yield Pulse((FACTS,), 2, 0)
        raise RuntimeError("no more power\nand so on")

    with pytest.raises(RuntimeError):
        place.run(config, generate=broken)
    place.run(config)
    stopped, finished = read_runs(Store(config.output))
    assert (stopped["outcome"], stopped["error"]) == ("stopped", "RuntimeError: no more power")
    assert (finished["run"], finished["outcome"], finished["images"]) == (2, "finished", 5)


def test_a_clock_that_is_set_back_takes_no_time_away(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    hours = itertools.count(1_800_000_000, -3600)
    clock = SimpleNamespace(time=lambda: next(hours), monotonic=time.monotonic)
    monkeypatch.setattr("diffray.pipelines.making.worker.time", clock)
    place.job(place.write("prompt\np\n"))
    report = json.loads((place.path / "out/report.json").read_text())
    assert 0 < report["seconds"] < 60
    assert report["images_per_second"] > 0
