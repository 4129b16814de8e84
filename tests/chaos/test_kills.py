"""Drivers, engines, raylets and nodes are killed at random moments; the dataset is the one of a quiet run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffray.pipelines import Store, verify
from tests.chaos.rounds import DRIVER, check_made_no_more, final, play, table
from tests.pipelines.conftest import Place


@pytest.mark.slow
def test_a_round_of_killings(place: Place) -> None:
    """`soak.py` plays as many more as one likes. This seed kills early enough for all three to come."""
    victims = ("engine", "driver", "raylet")
    played = play(place, 415, victims, images=40)
    assert tuple(victim for victim, *_ in played.killings) == victims
    print(played)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without work and three nodes with a core each, all on this machine."""
    from ray.cluster_utils import Cluster

    mode = os.environ.get("RAY_AUTH_MODE")
    head = {"num_cpus": 0, "include_dashboard": False, "wait": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = [cluster.add_node(num_cpus=1, wait=False) for _ in range(3)]
        cluster.wait_for_nodes(timeout=300)
        yield cluster, nodes
    finally:
        for node in list(
            cluster.worker_nodes
        ):  # draining them waits for answers that a busy machine gives late
            cluster.remove_node(node, allow_graceful=False)
        cluster.shutdown()
        if mode is None:
            os.environ.pop("RAY_AUTH_MODE", None)


@pytest.mark.slow
def test_a_driver_dies_and_then_a_node_on_a_cluster_that_lives_on(place: Place, cluster: Any) -> None:
    """No engine outlives its driver, so the next driver has room; when a node dies, the others take over."""
    cluster, nodes = cluster
    input = place.write(table(60))
    place.job(input, "clean")
    place.log.unlink()
    workers = {"actors": 3, "cpus": 1, "shards_in_flight": 1, "address": cluster.address}
    config = place.config(input, workers=workers)
    job = place.write(yaml.safe_dump(config.model_dump(mode="json")), "job.yaml")
    store, safe = Store(str(place.path / "out")), []

    def commits() -> int:
        return len(list((place.path / "out/_diffray/commits").glob("*")))

    def driver_until(count: int) -> subprocess.Popen[bytes]:
        """A driver that has brought the dataset to so many commits."""
        started = subprocess.Popen(
            [sys.executable, str(DRIVER), job], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while commits() < count:
            assert started.poll() is None
            time.sleep(0.05)
        return started

    driver = driver_until(2)
    driver.kill()
    driver.wait()
    engines = {int(line.split()[1]) for line in place.log.read_text().splitlines()}
    until = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in engines):
        assert time.monotonic() < until, "an engine outlives its driver"
        time.sleep(0.1)
    safe.append(final(place, store))
    driver = driver_until(commits() + 2)
    safe.append(final(place, store))
    cluster.remove_node(nodes[0], allow_graceful=False)
    assert driver.wait() == 0
    assert place.bytes() == place.bytes("clean")
    assert verify(store).faults == ()
    for seeds in safe:
        check_made_no_more(place, seeds)
