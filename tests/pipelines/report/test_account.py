"""`report.json` and `throughput.svg` from commit records whose times are known."""

from __future__ import annotations

import json
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from diffray.pipelines import JobConfig
from diffray.pipelines.outputs.commit import Commit, Origin
from diffray.pipelines.outputs.index import Index
from diffray.pipelines.report.account import Times, account, throughput

from ..conftest import Place


def commit(shard: int, worker: str, born: float, began: float, ended: float, images: int = 10) -> Commit:
    origin = Origin(
        worker,
        2 if worker == "c" else 1,
        born,
        {"fetch": 1.0, "load": 3.0 if worker == "a" else 5.0},
        began,
        ended,
    )
    timings = {"denoise": 2.0, "encode": 0.5, "shard_seconds": 99.0}
    return Commit(shard, images, images, 0, (), {}, {}, timings, origin)


COMMITS = [
    commit(0, "a", 100, 104, 110),
    commit(1, "b", 100, 106, 114),
    commit(2, "a", 100, 110, 116),
    commit(3, "c", 1000, 1006, 1008, images=40),  # another run, much later
]


def reported(price: float | None, images: int = 70, values: Any = None) -> dict[str, Any]:
    config = JobConfig.checked({"input": "a", "output": "b", "workers": {"price_per_hour": price}})
    totals = {"planned": 80, "images": images, "rejected": 10, "shards": 4}
    index = Index(scores={} if values is None else {"score": np.asarray(values, dtype=np.float64)})
    result: dict[str, Any] = json.loads(
        account(config, totals, [], index, None, 12345, Times.of(COMMITS if images else []))
    )
    return result


def test_times_are_added_up() -> None:
    found = reported(None)
    assert found["seconds"] == (116 - 104) + (1008 - 1006)  # pauses do not count
    assert found["images_per_second"] == 70 / 14
    assert found["machine_seconds"] == (116 - 100) + (114 - 100) + (1008 - 1000)
    assert found["workers"] == 3
    assert found["start_seconds"] == {"fetch": 1.0, "load": pytest.approx(13 / 3, abs=1e-3)}
    assert found["stage_seconds"] == {"denoise": 8.0, "encode": 2.0}
    assert (found["planned"], found["images"], found["rejected"], found["bytes"]) == (80, 70, 10, 12345)
    assert "cost" not in found


def record(run: int, machine_seconds: float, *shares: float) -> dict[str, Any]:
    engines = [{"share": share} for share in shares]
    return {"run": run, "machine_seconds": machine_seconds, "engines": engines}


def test_machine_seconds_are_those_of_the_runs_records() -> None:
    """Four quarters of a GPU, one of which never committed anything; then a run of one engine."""
    found = Times.of(COMMITS, [record(1, 21.5, 0.25, 0.25, 0.25, 0.25), record(2, 11.0, 1.0)])
    assert (found.machine_seconds, found.workers) == (32.5, 5)


def test_a_run_whose_driver_was_killed_counts_for_what_is_known_of_it() -> None:
    late, absent = 0.25 * (16 + 14), 8
    found = Times.of(COMMITS, [record(1, 2.0, 0.25, 0.25), record(3, 5.0, 1.0)])
    assert (found.machine_seconds, found.workers) == (late + absent + 5.0, 4)


def test_costs_need_a_price() -> None:
    cost = reported(36.0)["cost"]
    assert cost == {
        "price_per_hour": 36.0,
        "total": 0.38,
        "per_1000_images": pytest.approx(0.38 / 0.07, abs=1e-5),
    }


def test_a_job_without_images_has_a_report() -> None:
    found = reported(2.0, images=0)
    assert (found["images_per_second"], found["cost"]["per_1000_images"]) == (None, None)


def test_scores_are_summed_up_without_missing_ones() -> None:
    spread = reported(None, values=[0.0, 1.0, float("nan"), 3.0, 2.0])["scores"]["score"]
    assert (spread["values"], spread["missing"]) == (4, 1)
    assert (spread["least"], spread["mean"], spread["median"], spread["most"]) == (0.0, 1.5, 1.5, 3.0)
    assert reported(None, values=[float("nan")])["scores"]["score"] == {"values": 0, "missing": 1}


def test_the_throughput_chart_holds_every_image() -> None:
    text = throughput(Times.of(COMMITS), bins=14).decode()
    tree = ElementTree.fromstring(text)
    bars = [float(node.attrib["height"]) for node in tree.iter("{http://www.w3.org/2000/svg}rect")]
    # images per second in each of 14 seconds: shards 0 to 2 first, then 40 images in the last two
    rates = np.zeros(14)
    for began, ended, images in [(0, 6, 10), (2, 10, 10), (6, 12, 10), (12, 14, 40)]:
        rates[began:ended] += images / (ended - began)
    assert bars == pytest.approx((rates / rates.max() * max(bars)).tolist(), abs=0.02)
    assert "mean 5/s, peak 20/s, 2 runs" in text
    assert "14 s" in text
    assert b"no shard was timed" in throughput(Times.of([]))


def test_a_job_reports_what_it_did(place: Place) -> None:
    table = place.write("prompt,n,seed\nx,5,\nPOISON,2,\nbad,1,-1\nfox,1,\n")
    place.job(table, workers={"price_per_hour": 1.0}, checks={"measures": True, "block": ["fox"]})
    found = json.loads((place.path / "out/report.json").read_text())
    assert [(r["stage"], r["field"], r["rows"]) for r in found["rejected_by"]] == [
        ("generate", None, 2),
        ("guard", "prompt", 1),
        ("plan", "seed", 1),
    ]
    assert "-1" in found["rejected_by"][2]["example"]
    assert found["seconds"] > 0
    assert found["machine_seconds"] >= found["seconds"]
    assert {"denoise", "check", "encode"} <= found["stage_seconds"].keys()
    assert found["scores"]["brightness"]["values"] == 5
    assert found["cost"]["total"] == pytest.approx(found["machine_seconds"] / 3600, abs=1e-5)
    assert re.match(r"<svg xmlns=", (place.path / "out/throughput.svg").read_text())


def test_a_price_may_change_between_runs(place: Place) -> None:
    table = place.write("prompt\nx\n")
    place.job(table, workers={"price_per_hour": 1.0})
    place.job(table, workers={"price_per_hour": 2.0})
