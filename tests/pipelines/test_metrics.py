"""The figures that Prometheus reads, at the endpoint of a real Ray."""

from __future__ import annotations

import re
import time
import urllib.request

import pytest

from diffray.pipelines import metrics
from diffray.pipelines.making.actors import generate_on_ray

from .conftest import Place

POOL = {"diffray_prompts_total"}
"""Of jobs with a pool of text encoders."""
NAMES = set(re.findall(r"^    (diffray_\w+)", metrics.__doc__ or "", re.MULTILINE)) - POOL


def exported(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_every_documented_figure_is_exported(place: Place) -> None:
    import ray

    table = place.write("prompt,n\nSLOW p,20\nPOISON,1\n")
    place.run(place.config(table, workers={"actors": 1}), generate=generate_on_ray)
    port = ray.nodes()[0]["MetricsExportPort"]
    until = time.monotonic() + 60
    found: set[str] = set()
    while not found >= NAMES and time.monotonic() < until:
        text = exported(port)
        found |= {name for name in NAMES if re.search(rf"^ray_{name}(_bucket)?\{{", text, re.MULTILINE)}
        time.sleep(1)
    assert found == NAMES
    rejected = re.search(r'^ray_diffray_rejected_total\{.*stage="generate".*\} (\d+)', text, re.MULTILINE)
    assert rejected is not None
    assert rejected[1] == "1"
