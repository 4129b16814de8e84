"""What tests see of replicas and do to them, by an image hook (`guardrails.image`), which runs in their processes."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import prometheus_client
from PIL import Image

from diffray.model import ImageRequest, flight

FOLDER = "DIFFRAY_TEST_WITNESS"
"""Variable that names a folder for what was seen."""


def attend(image: Image.Image, request: ImageRequest) -> None:
    """Write down which process made an image and which models it has read so far; the prompts "break" and "hang"
    do that to its engines, which the next image finds out.
    """
    loads = {
        sample.labels["model"]: sample.value
        for metric in prometheus_client.REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "diffray_model_loads_total"
    }
    line = json.dumps({"pid": os.getpid(), "prompt": request.prompt, "loads": loads})
    with (Path(os.environ[FOLDER]) / f"{os.getpid()}.jsonl").open("a") as file:
        file.write(line + "\n")
    if request.prompt in ("break", "hang"):
        flight.advance = _broken if request.prompt == "break" else _hanging


def _broken(*_: object) -> NoReturn:
    raise RuntimeError("CUDA error: device-side assert triggered")


def _hanging(*_: object) -> NoReturn:
    while True:
        time.sleep(3600)


def images(prompt: str = "") -> Counter[int]:
    """How many images with such a prompt each process made."""
    return Counter(line["pid"] for line in _lines() if prompt in line["prompt"])


def loads() -> dict[int, dict[str, float]]:
    """How often each process has read each model, as of its last image."""
    return {line["pid"]: line["loads"] for line in _lines()}


def _lines() -> list[dict[str, Any]]:
    files = sorted(Path(os.environ[FOLDER]).glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]
