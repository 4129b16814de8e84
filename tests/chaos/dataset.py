"""A large dataset with the embedded model on S3, killed on the way: `python -m tests.chaos.dataset --images 10000`.

The real command in a process of its own, run again after every killing. In the end the dataset is verified, counted,
and a sample of its images is made again by a bare engine without Ray and compared byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffray.model import Engine, ImageRequest, load_model
from diffray.model.encoding import encode_image
from diffray.pipelines import Store, verify
from diffray.pipelines.outputs.commit import committed
from diffray.pipelines.planning.rows import REQUEST_COLUMNS
from tests.chaos.rounds import processes
from tests.pipelines.s3 import S3, serve
from training.scenes import random_scene

VICTIMS = ("driver", "engine", "terminate", "raylet", "everything")
SAMPLE = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, help="folder for report.json, gallery.html and the rest")
    given = parser.parse_args()
    with serve() as s3:
        url = s3.folder()
        began, dice = time.monotonic(), random.Random(given.seed)
        folder = Path(tempfile.mkdtemp(prefix="diffray-dataset-"))
        prompts = folder / "prompts.parquet"
        rng = np.random.default_rng(given.seed)
        pq.write_table(
            pa.table({"prompt": [random_scene(rng).caption for _ in range(given.images // 4)]}), prompts
        )
        command = [str(Path(sys.executable).with_name("diffray")), "generate", str(prompts), url, "-n", "4"]
        command += [
            "--steps",
            str(given.steps),
            "--measures",
            "--near-duplicates",
            "4",
            "--shard-images",
            "100",
        ]
        shards, kills = -(-given.images // 100), []
        moments = sorted(dice.sample(range(1, shards - 1), given.kills))
        drivers = 0
        while True:
            drivers += 1
            code = _drive(command, s3, Store(url, s3.options()), moments, kills, dice)
            print(
                f"driver {drivers} ended with {code} after {time.monotonic() - began:.0f} s; kills {kills}",
                flush=True,
            )
            if code == 0:
                break
        _prove(Store(url, s3.options()), given.images)
        print(
            f"{given.images} images, {drivers} drivers, {time.monotonic() - began:.0f} s: all promises kept"
        )
        if given.report is not None:
            _fetch(Store(url, s3.options()), given.report)


def _drive(
    command: list[str],
    s3: S3,
    store: Store,
    moments: list[int],
    kills: list[tuple[str, int]],
    dice: random.Random,
) -> int:
    logs = Path(tempfile.mkdtemp(prefix="dr", dir="/tmp"))  # Ray's socket paths have to be short
    keys = {"AWS_ACCESS_KEY_ID": s3.key, "AWS_SECRET_ACCESS_KEY": s3.secret, "AWS_ENDPOINT_URL": s3.endpoint}
    driver = subprocess.Popen(
        command,
        env={**os.environ, **keys, "RAY_TMPDIR": str(logs), "RAY_worker_niceness": "0"},
        start_new_session=True,
    )
    while driver.poll() is None:
        if moments and len(committed(store)) >= moments[0]:
            time.sleep(dice.uniform(0, 3))
            victim = VICTIMS[len(kills) % len(VICTIMS)]
            kills.append((victim, len(committed(store))))
            moments.pop(0)
            _kill(victim, driver, logs)
        time.sleep(0.5)
    if driver.returncode:
        time.sleep(5)
        for pid, _ in processes(logs):
            os.kill(pid, signal.SIGKILL)
    return driver.returncode


def _kill(victim: str, driver: subprocess.Popen[bytes], logs: Path) -> None:
    if victim in ("driver", "terminate"):
        driver.send_signal(signal.SIGKILL if victim == "driver" else signal.SIGTERM)
        return
    wanted = {"engine": "ShardActor", "raylet": "/raylet/raylet ", "everything": ""}[victim]
    for pid, line in processes(logs):
        if wanted in line:
            os.kill(pid, signal.SIGKILL)
    if victim == "everything":
        driver.kill()


def _prove(store: Store, images: int) -> None:
    """Nothing lost, nothing twice, nothing damaged, and every byte as a bare engine makes it."""
    found = verify(store)
    assert found.faults == (), found.faults
    rows = [row for part in store.list("data") for row in _rows(store, f"data/{part}")]
    assert len(rows) == images
    assert len({row["id"] for row in rows}) == images
    sample = random.Random(0).sample(rows, min(SAMPLE, images))
    model = load_model("embedded")
    requests = [ImageRequest(**{n: _plain(row[n]) for n in REQUEST_COLUMNS}) for row in sample]
    for row, result in zip(sample, Engine(model).generate(requests), strict=True):
        assert result.image is not None
        data = encode_image(result.image, result.request, model="embedded", model_checksum=model.checksum)
        assert data == row["image"]["bytes"], row["id"]
    print(f"verified: {images} images, {len(sample)} of them made again byte for byte without Ray")


def _rows(store: Store, name: str) -> list[dict[str, object]]:
    return pq.read_table(pa.BufferReader(store.read(name))).to_pylist()


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _fetch(store: Store, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in store.list():
        if "." in name and not name.startswith("."):
            (folder / name).write_bytes(store.read(name))
    print(json.dumps(json.loads((folder / "report.json").read_text()), indent=1)[:3000])


if __name__ == "__main__":
    main()
