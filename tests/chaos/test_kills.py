"""Drivers, engines, raylets and nodes are killed at random moments; the dataset is the one of a quiet run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffray.pipelines import Store, verify
from diffray.pipelines.making.actors import generate_on_ray
from tests.chaos.rounds import DRIVER, committed_seeds, play, table
from tests.pipelines import fake
from tests.pipelines.conftest import Place


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "victims"),
    [(2, ("driver", "engine")), (3, ("raylet",))],  # `soak.py` plays as many as one likes, with signals too
)
def test_a_round_of_killings(place: Place, seed: int, victims: tuple[str, ...]) -> None:
    played = play(place, seed, len(victims), victims, images=24)
    assert len(played.killings) == len(victims)
    print(played)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without work and three nodes with a core each, all on this machine."""
    import ray
    import ray.cloudpickle
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(fake)
    mode = os.environ.get("RAY_AUTH_MODE")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
    cluster.wait_for_nodes()
    try:
        yield cluster, nodes
    finally:
        ray.shutdown()
        cluster.shutdown()
        if mode is None:
            os.environ.pop("RAY_AUTH_MODE", None)


@pytest.mark.slow
def test_a_node_dies_and_the_others_take_over(place: Place, cluster: Any) -> None:
    cluster, nodes = cluster
    input = place.write(table(30))
    place.job(input, "clean")
    place.log.unlink()
    workers = {"actors": 3, "cpus": 1, "shards_in_flight": 2, "address": cluster.address}
    safe: list[set[int]] = []

    def kill() -> None:
        while len(list((place.path / "out/_diffray/commits").glob("*"))) < 2:
            time.sleep(0.05)
        safe.append(committed_seeds(Store(str(place.path / "out"))))
        cluster.remove_node(nodes[0], allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    place.run(place.config(input, workers=workers), generate=generate_on_ray)
    killer.join(60)
    assert safe, "the node was not killed in time"
    assert place.bytes() == place.bytes("clean")
    assert verify(Store(str(place.path / "out"))).faults == ()
    for seed in safe[0]:
        assert place.begun().count(seed) == 1, "a committed shard was made again"


@pytest.mark.slow
def test_a_killed_driver_leaves_no_engine_on_the_cluster(place: Place, cluster: Any) -> None:
    """The cluster lives on; what the driver had asked for is free again, and the next driver uses it."""
    cluster, _ = cluster
    input = place.write(table(30))
    place.job(input, "clean")
    place.log.unlink()
    workers = {"actors": 2, "cpus": 1, "address": cluster.address}
    config = place.config(input, workers=workers)
    job = place.write(yaml.safe_dump(config.model_dump(mode="json")), "job.yaml")
    command = [sys.executable, str(DRIVER), job]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list((place.path / "out/_diffray/commits").glob("*"))) < 2:
        assert driver.poll() is None
        time.sleep(0.05)
    engines = {int(line.split()[1]) for line in place.log.read_text().splitlines()}
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    until = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in engines):
        assert time.monotonic() < until, "an engine outlives its driver"
        time.sleep(0.1)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert place.bytes() == place.bytes("clean")
