"""What operators see: every figure moves when it should, and the dashboard asks for figures that exist."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from diffray.serve import metrics
from diffray.serve.config import ModelEntry, ServeConfig
from diffray.serve.engines import Engines

from .ask import ask, post
from .live import Live

DASHBOARD = Path(__file__).parents[2] / "cluster/grafana/diffray-serve.json"
SUFFIXES = re.compile("_(bucket|sum|count)$")


def until(condition: Callable[[], bool]) -> None:
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen")


def values(url: str) -> dict[str, float]:
    """Every sample of /metrics by its name and labels."""
    lines = ask(url + "/metrics").data.decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def test_figures_move_with_the_work(service_app: Live) -> None:
    url = service_app.url
    ask(url + "/v1/diffray/images", {"steps": 1})
    before = values(url)
    body = {"prompt": "x", "steps": 5, "n": 3}
    assert ask(url + "/v1/diffray/images", body, idempotency_key="metrics").status == 200
    assert ask(url + "/v1/diffray/images", body, idempotency_key="metrics").status == 200
    assert ask(url + "/v1/diffray/images", {"width": 63}).status == 422
    after = values(url)

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    assert grown('diffray_images_total{model="embedded"}') == 3
    assert grown('diffray_pixels_total{model="embedded"}') == 3 * 64 * 64
    assert grown('diffray_step_seconds_count{model="embedded"}') >= 5
    assert 0 < grown('diffray_batch_occupancy_sum{model="embedded"}') <= 15
    for phase in ("queue", "prepare", "denoise", "decode", "encode"):
        assert grown(f'diffray_phase_seconds_count{{phase="{phase}"}}') == 3
    assert grown("diffray_idempotent_replays_total") == 1
    assert grown('diffray_rejections_total{reason="invalid_value"}') == 1
    assert grown('diffray_requests_total{dialect="native",status="200"}') >= 2
    assert grown('diffray_requests_total{dialect="native",status="422"}') == 1
    assert after["diffray_admitted_images"] == 0
    running = 'diffray_running_images{model="embedded"}'
    with closing(post(url + "/v1/diffray/images", {"steps": 1000})):
        until(lambda: values(url)[running] == 1)
    until(lambda: values(url)[running] == 0)


def test_a_model_that_is_gone_has_nothing_waiting_or_running() -> None:
    async def served() -> None:
        engines = Engines(ServeConfig(models={"gone": ModelEntry()}))
        await engines.start()
        metrics.RUNNING_IMAGES.set(3, model="gone")
        metrics.QUEUED_IMAGES.set(4, model="gone")
        await engines.close()

    asyncio.run(served())
    lines = metrics.text()[0].decode().splitlines()
    shown = {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if "gone" in line)
    }
    for name in ("running_images", "queued_images", "model_bytes"):
        assert shown[f'diffray_{name}{{model="gone"}}'] == 0


def test_cancelled_work_is_counted(service_app: Live) -> None:
    before = values(service_app.url)
    name = 'diffray_cancelled_total{model="embedded"}'
    ask(service_app.url + "/v1/diffray/images", {"steps": 1000, "timeout": 0.2})
    until(lambda: values(service_app.url)[name] == before.get(name, 0.0) + 1)


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    known = {m.name for m in vars(metrics).values() if isinstance(m, metrics.Metric)}
    histograms = {
        m.name for m in vars(metrics).values() if isinstance(m, metrics.Metric) and m.kind == "histogram"
    }
    labels = {m.name: set(m.labels) for m in vars(metrics).values() if isinstance(m, metrics.Metric)}
    asked = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            names = re.findall(r"diffray_\w+", target["expr"])
            for name in names:
                base = SUFFIXES.sub("", name)
                assert base in known, f"{panel['title']}: {name}"
                assert (name != base) == (base in histograms), f"{panel['title']}: {name}"
                asked.add(base)
                grouped = re.search(r"by \(([\w, ]+)\)", target["expr"])
                wanted = set(grouped[1].split(", ")) - {"le"} if grouped else set()
                assert wanted <= labels[base], f"{panel['title']}: {name} has no label {wanted}"
    assert asked == known, "a metric that nobody looks at"


def test_names_are_stable() -> None:
    """People's dashboards and alerts hang on them: add, do not rename."""
    assert {m.name for m in vars(metrics).values() if isinstance(m, metrics.Metric)} >= {
        "diffray_requests_total",
        "diffray_request_seconds",
        "diffray_rejections_total",
        "diffray_admitted_images",
        "diffray_admitted_cost",
        "diffray_queued_images",
        "diffray_running_images",
        "diffray_batch_occupancy",
        "diffray_step_seconds",
        "diffray_phase_seconds",
        "diffray_images_total",
        "diffray_pixels_total",
        "diffray_model_bytes",
    }
