"""The figures that Prometheus reads, at the endpoint of a real Ray."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from typing import ClassVar

import pytest

from diffray.pipelines import metrics
from diffray.pipelines.making.actors import generate_on_ray
from diffray.pipelines.making.pools import EngineFacts, Pulse
from diffray.pipelines.making.tally import STAGES, Reading
from diffray.pipelines.standing import Standing

from .conftest import Place

POOL = {"diffray_prompts_total"}
"""Of jobs with a pool of text encoders."""
NAMES = set(re.findall(r"^    (diffray_\w+)", metrics.__doc__ or "", re.MULTILINE)) - POOL


def exported(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def value(text: str, pattern: str) -> float:
    """The last exported value of a figure."""
    escaped = pattern.replace("{", r"\{").replace("}", r"\}")
    return float(re.findall(rf"^ray_diffray_{escaped} (\S+)", text, re.MULTILINE)[-1])


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_every_documented_figure_is_exported(place: Place) -> None:
    import ray

    table = place.write("prompt,n\nSLOW p,20\nPOISON,1\n")
    place.run(place.config(table, workers={"actors": 1}), generate=generate_on_ray)
    port = ray.nodes()[0]["MetricsExportPort"]
    until = time.monotonic() + 180
    last = re.compile(r"^ray_diffray_shards_committed_total\{.*\} 7\.0", re.MULTILINE)
    found: set[str] = set()
    text = ""
    while time.monotonic() < until and not (found >= NAMES and last.search(text)):
        time.sleep(1)
        with suppress(OSError):  # it is not up yet, or slow
            text = exported(port)
        found |= {name for name in NAMES if re.search(rf"^ray_{name}(_bucket)?\{{", text, re.MULTILINE)}
    assert found == NAMES
    assert value(text, 'rejected_total{.*stage="generate".*}') == 1
    images = [value(text, f'images{{.*state="{state}".*}}') for state in ("planned", "ended", "rejected")]
    assert images == [21, 21, 1]
    assert 0 < value(text, "busy_share{.*}") <= 1
    assert [value(text, f'stage_images{{.*stage="{stage}".*}}') for stage in STAGES] == [0, 0, 0]
    assert value(text, "shards_committed_total{.*}") == 7


class Figure:
    """Stands for Ray's gauges and counters."""

    shown: ClassVar[dict[str, float]] = {}

    def __init__(self, name: str, *_: object) -> None:
        self.name = name

    def set(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        self.shown[" ".join([self.name, *(tags or {}).values()])] = value

    def inc(self, value: float) -> None:
        self.shown[self.name] = self.shown.get(self.name, 0) + value


def test_the_drivers_figures_are_those_of_its_display(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("Gauge", "Counter"):
        monkeypatch.setattr(f"ray.util.metrics.{kind}", Figure)
    monkeypatch.setattr(Figure, "shown", {})
    meter = metrics.JobMeter(Standing(100, 20, 2))
    meter.advance(9, 1)
    assert Figure.shown == {}, "nothing but a pulse says that there is Ray"
    reading = Reading(uncommitted={3: (4, 1)}, inside={"engine": 8, "text": 3}, up=10.0, busy=9.0, slots=8)
    engine = EngineFacts("a", "m", "running", reading=reading)
    meter.pulse(Pulse((engine, EngineFacts("b", "m", "starting")), 5, 1))
    meter.pulse(Pulse((engine, EngineFacts("b", "m", "starting")), 5, 1))
    assert Figure.shown == {
        "diffray_images planned": 100,
        "diffray_images ended": 35,
        "diffray_images rejected": 3,
        "diffray_stage_images engine": 8,
        "diffray_stage_images encode": 0,
        "diffray_stage_images store": 0,
        "diffray_stage_images text": 3,
        "diffray_busy_share": 0.9,
        "diffray_engines starting": 1,
        "diffray_engines running": 1,
        "diffray_shards waiting": 5,
        "diffray_shards running": 1,
        "diffray_shards_committed_total": 1,
    }
