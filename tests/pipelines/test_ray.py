"""The same promises on a real Ray: workers and drivers are killed, the result stays the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from diffray.model.errors import CheckpointError
from diffray.pipelines.config import ModelOptions
from diffray.pipelines.making.actors import generate_on_ray
from diffray.pipelines.making.models import OpenModel
from diffray.pipelines.outputs.store import Store
from diffray.pipelines.planning.plan import read_shard

from .conftest import Place
from .fake import FakeModels

MANY = "prompt,n\n" + "".join(f"SLOW {i},4\n" for i in range(8)) + "POISON,1\n"


def wait_for(what: Callable[[], object], seconds: float = 280) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.05)


def commits(place: Place, output: str) -> list[Path]:
    return sorted((place.path / output / "_diffray/commits").glob("*.json"))


def committed_seeds(place: Place, output: str) -> set[int]:
    store = Store(str(place.path / output))
    shards = [read_shard(store, int(path.stem)) for path in commits(place, output)]
    return {image.request.seed for shard in shards for image in shard.images if image.request}


@pytest.mark.usefixtures("ray_session")
def test_ray_makes_the_same_bytes_as_one_process(place: Place) -> None:
    table = place.write("prompt,n\np,4\nPOISON,1\nq,4\n")
    place.job(table, "one")
    result = place.run(place.config(table, workers={"actors": 1}), generate=generate_on_ray)
    assert (result.images, result.rejected) == (8, 1)
    assert place.bytes() == place.bytes("one")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_worker_is_killed(place: Place) -> None:
    table = place.write(MANY)
    place.job(table, "clean")
    place.log.unlink()
    seen: list[set[int]] = []

    def kill() -> None:
        wait_for(lambda: len(commits(place, "out")) >= 2)
        done = committed_seeds(place, "out")
        os.kill(int(place.log.read_text().split()[-1]), signal.SIGKILL)
        seen.append(done)

    killer = threading.Thread(target=kill)
    killer.start()
    config = place.config(table, workers={"actors": 1, "shards_in_flight": 2})
    place.run(config, generate=generate_on_ray)
    killer.join()
    assert place.bytes() == place.bytes("clean")
    for seed in seen[0]:
        assert place.begun().count(seed) == 1, "a committed shard was made again"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_row_that_kills_its_worker_is_rejected(place: Place) -> None:
    good = "prompt\np\nq\nr\n"
    place.job(place.write(good, "good.csv"), "good")
    config = place.config(place.write(good + "KILL\n"), shards={"images": 2}, workers={"actors": 1})
    result = place.run(config, generate=generate_on_ray)
    assert (result.images, result.rejected) == (3, 1)
    [row] = place.rows(folder="rejected")
    assert (row["prompt"], row["attempts"], row["reason"]) == ("KILL", 3, "crashed its worker 3 times")
    assert [r["sha256"] for r in place.rows()] == [r["sha256"] for r in place.rows("good")]


class Unloadable(FakeModels):
    def open(self, options: ModelOptions) -> OpenModel:
        raise CheckpointError("unet.safetensors: incomplete file")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_model_that_does_not_load_stops_the_job_with_its_own_error(place: Place) -> None:
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[Unloadable.__module__])
    config = place.config(place.write(MANY), workers={"actors": 1})
    with pytest.raises(CheckpointError, match="incomplete file"):
        place.run(config, generate=generate_on_ray, models=Unloadable())


@pytest.mark.slow
def test_the_driver_is_killed(place: Place) -> None:
    table = place.write(MANY)
    place.job(table, "clean")
    place.log.unlink()
    config = place.config(table, workers={"actors": 1, "shards_in_flight": 2})
    job = place.write(yaml.safe_dump(config.model_dump(mode="json")), "job.yaml")
    command = [sys.executable, str(Path(__file__).with_name("driver.py")), job]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(commits(place, "out")) >= 2)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    worker = int(place.log.read_text().split()[-1])
    wait_for(lambda: not Path(f"/proc/{worker}").exists(), 60)
    done = committed_seeds(place, "out")
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert place.bytes() == place.bytes("clean")
    for seed in done:
        assert place.begun().count(seed) == 1, "a committed shard was made again"
    locks = sorted((place.path / "out/_diffray/locks").glob("*.json"))
    assert json.loads(locks[-1].read_text()) == {"released": True}
    assert len(locks) == 2
