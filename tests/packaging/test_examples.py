"""The examples in Python do what they say, run as a user runs them."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffray.pipelines import Store, verify
from diffray.serve.config import ServeConfig
from tests.serve.live import live
from tests.serve.paced import paced

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = 3


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with the examples in it, their input cut to a few rows."""
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    prompts = tmp_path / "examples/prompts.csv"
    prompts.write_text("".join(prompts.read_text().splitlines(keepends=True)[: ROWS + 1]))
    return tmp_path


def run(work: Path, script: str, *arguments: str) -> str:
    """What a script prints; it has to succeed."""
    logs = tempfile.mkdtemp(prefix="dr", dir="/tmp")  # Ray's socket paths have to be short
    try:
        done = subprocess.run(
            [sys.executable, f"examples/{script}", *arguments],
            cwd=work,
            env={**os.environ, "RAY_TMPDIR": logs},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        shutil.rmtree(logs, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_job_from_python(work: Path) -> None:
    said = run(work, "python_job.py").splitlines()
    assert said[-1].startswith(f"{2 * ROWS} images, 0 rejected rows in ")
    found = verify(Store(str(work / "out/python_job")))
    assert (found.images, found.rejected, found.faults) == (2 * ROWS, 0, ())


@pytest.mark.slow
def test_a_stage_of_a_ray_dataset(work: Path) -> None:
    run(work, "ray_dataset.py")
    rows = pq.read_table(work / "out/ray_dataset").to_pylist()
    assert sorted((row["prompt"], row["label"]) for row in rows) == sorted(
        (f"a large {colour} {shape}", shape) for colour in ("red", "blue") for shape in ("circle", "star")
    )
    for row in rows:
        assert not row["__inference_error__"]
        assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (64, 64)


@pytest.mark.slow
def test_clients_of_a_service(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with live(ServeConfig(log="off")) as running:
        paced(monkeypatch, running)
        said = run(work, "clients.py", running.url).splitlines()
    assert [line.split()[0] for line in said[:3]] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert said[3] == "a large red circle on a blue background", "an infotext begins with its prompt"
    assert said[-1] == "7 SUCCESS"
    for name in ("openai-0.webp", "openai-1.webp", "webui.png", "stability.png"):
        assert Image.open(work / name).size == (64, 64), name
