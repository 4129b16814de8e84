"""The record of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from diffray.pipelines.making.pools import EngineFacts, Pulse
from diffray.pipelines.making.tally import Reading
from diffray.pipelines.outputs.store import Store
from diffray.pipelines.runs import read_runs

from .conftest import Place, in_process

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
    assert (second["state"], second["accelerator"]) == ("lost", "")


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
