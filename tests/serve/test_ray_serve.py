"""The service on Ray Serve: the same pictures, whatever happens to the replicas meanwhile."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from ray import serve

from diffray.model import Engine, ImageRequest, load_model
from diffray.model.encoding import encode_image
from diffray.serve import app_builder
from diffray.serve.config import InvalidConfig

from .ask import ask, post
from .cluster import CONFIG, PNG, Load, cluster, cpu_seconds, deploy, replicas, running, until

pytestmark = pytest.mark.slow
BODY = {"prompt": "a large red circle on a blue background", "seed": 11, "steps": 8}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with cluster() as address:
        deploy()
        yield address


@pytest.fixture(scope="module")
def expected() -> bytes:
    model = load_model()
    result = Engine(model).generate([ImageRequest(prompt=str(BODY["prompt"]), seed=11, steps=8)])[0]
    assert result.image is not None
    return encode_image(result.image, result.request, model="embedded", model_checksum=model.checksum)


def test_the_same_file_as_without_ray(url: str, expected: bytes) -> None:
    assert ask(url + "/readyz").status == 200
    assert ask(url + PNG, BODY, accept="image/png").data == expected


def test_refusals_come_through_from_the_engines(url: str) -> None:
    assert ask(url + PNG, {"sampler": "nope"}).json["error"]["field"] == "sampler"
    assert ask(url + PNG, {"model": "nope"}).code == "model_not_found"
    assert ask(url + PNG, {"steps": 1000, "timeout": 1.0}).code == "timeout"
    assert ask(url + "/nowhere").code == "not_found"


def test_a_client_that_leaves_frees_the_engine(url: str) -> None:
    for body in ({"steps": 1000}, {"steps": 1000, "stream": True}):
        pids = replicas()
        with closing(post(url + PNG, body)):
            time.sleep(1.5)
            busy = [cpu_seconds(pid) for pid in pids]
            time.sleep(1)
            assert sum(map(cpu_seconds, pids)) - sum(busy) > 0.3, "it does not work on it"
        time.sleep(1.5)
        left = [cpu_seconds(pid) for pid in pids]
        time.sleep(1)
        assert sum(map(cpu_seconds, pids)) - sum(left) < 0.15, "it still works on it"


def test_a_killed_replica_costs_nobody_an_answer(url: str, expected: bytes) -> None:
    victims = replicas()
    with Load(url, BODY) as load:
        until(lambda: len(load.answers) > 4)
        os.kill(victims[0], signal.SIGKILL)
        count = len(load.answers)
        until(lambda: len(load.answers) > count + 8)
    assert not load.errors
    assert {answer.data for answer in load.answers} == {expected}
    until(lambda: running() == 2 and victims[0] not in replicas())


def test_a_new_version_under_load(url: str, expected: bytes) -> None:
    old = set(replicas())
    with Load(url, BODY) as load:
        until(lambda: len(load.answers) > 2)
        deploy(limits={"seconds": 90})
        until(lambda: not old & set(replicas()))
        count = len(load.answers)
        until(lambda: len(load.answers) > count + 2)
    assert not load.errors
    assert load.statuses() == {200}, [a.data for a in load.answers if a.status != 200][:3]
    assert {answer.data for answer in load.answers} == {expected}


def test_scale_to_zero_and_back(url: str, expected: bytes) -> None:
    scale = {**CONFIG["replicas"], "min": 0, "max": 1, "upscale_seconds": 0, "downscale_seconds": 2}
    deploy(replicas=scale, limits={"seconds": 100})
    assert ask(url + PNG, BODY, accept="image/png").data == expected
    until(lambda: not running() and not replicas())
    assert ask(url + "/readyz").status == 200
    assert ask(url + PNG, BODY, accept="image/png").data == expected  # waits for the replica to start


def test_a_config_that_leaves_the_door_open_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="keys"):
        app_builder({})
    with pytest.raises(InvalidConfig, match="colour"):
        app_builder({"access": {"anonymous": True}, "colour": "red"})
    assert isinstance(app_builder({"access": {"keys": "/etc/diffray/keys.json"}}), serve.Application)
