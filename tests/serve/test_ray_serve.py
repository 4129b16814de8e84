"""The service on Ray Serve: the same pictures, whatever happens to the replicas meanwhile.

One Ray and one application for all, which the tests change as they go: their order counts.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from safetensors.torch import load_file, save_file

from diffray.model import Engine, ImageRequest, load_model
from diffray.model.encoding import encode_image
from diffray.model.weights.source import CACHE_VARIABLE, embedded
from diffray.serve import app_builder
from diffray.serve.config import InvalidConfig
from diffray.serve.routing import UNUSED_SECONDS
from tests.pipelines import s3

from . import witness
from .ask import ask, post
from .cluster import CONFIG, PNG, Load, cluster, cpu_seconds, deploy, replicas, running, until
from .loras import write_lora

pytestmark = pytest.mark.slow
long = pytest.mark.skipif(
    "DIFFRAY_TEST_LONG" not in os.environ, reason="takes minutes; DIFFRAY_TEST_LONG=1 runs it"
)
EXAMPLES = Path(__file__).parents[2] / "examples"
ATTENDED = {"image": ["tests.serve.witness:attend"]}
BODY: dict[str, Any] = {"prompt": "a large red circle on a blue background", "seed": 11, "steps": 8}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of another model."""
    folder = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(embedded(), folder)
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 0.97 for name, value in load_file(unet).items()}, unet)
    return folder


@pytest.fixture(scope="module")
def store(other: Path) -> Iterator[str]:
    """The other model's URL, in a store that this process and its children know."""
    with s3.serve() as storage, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", storage.endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", storage.key)
        patch.setenv("AWS_SECRET_ACCESS_KEY", storage.secret)
        storage.filesystem().put(str(other), f"{storage.bucket}/other", recursive=True)
        yield f"s3://{storage.bucket}/other"


@pytest.fixture(scope="module")
def url(store: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        for variable in (witness.FOLDER, CACHE_VARIABLE):
            patch.setenv(variable, str(tmp_path_factory.mktemp(variable.lower())))
        address = stack.enter_context(cluster())
        deploy(guardrails=ATTENDED)
        yield address


@pytest.fixture(scope="module")
def expected() -> bytes:
    return picture("embedded", "embedded")


def picture(name: str, source: str, **adapters: Path) -> bytes:
    """What a bare engine makes of BODY, wearing the adapters."""
    model = load_model(source, adapters={name: str(path) for name, path in adapters.items()})
    worn = [{"name": name, "weight": 1.0} for name in adapters]
    request = ImageRequest(prompt=BODY["prompt"], seed=BODY["seed"], steps=BODY["steps"], adapters=worn)
    result = Engine(model).generate([request])[0]
    assert result.image is not None
    return encode_image(
        result.image,
        result.request,
        model=name,
        model_checksum=model.checksum,
        adapter_checksums=model.adapters.checksums(),
    )


def fetched() -> dict[str, int]:
    """The files of weights that were fetched; a file that is fetched again has another number."""
    found = Path(os.environ[CACHE_VARIABLE]).rglob("*.safetensors")
    files = {str(path): path.stat().st_ino for path in found}
    assert len(files) == 3
    return files


@contextmanager
def unharmed(url: str, body: dict[str, Any], clients: int = 4) -> Iterator[Load]:
    """Load during the block, of which no answer may fail."""
    with Load(url, body, clients) as load:
        until(lambda: len(load.answers) > 2)
        yield load
        count = len(load.answers)
        until(lambda: len(load.answers) > count + 2)
    assert not load.errors
    assert load.statuses() == {200}, [a.data for a in load.answers if a.status != 200][:3]


def test_the_same_file_as_without_ray(url: str, expected: bytes) -> None:
    assert ask(url + "/readyz").status == 200
    assert ask(url + PNG, BODY, accept="image/png").data == expected


def test_refusals_come_through_from_the_engines(url: str) -> None:
    assert ask(url + PNG, {"sampler": "nope"}).json["error"]["field"] == "sampler"
    assert ask(url + PNG, {"model": "nope"}).code == "model_not_found"
    assert ask(url + PNG, {"steps": 1000, "width": 128, "height": 128, "timeout": 5.0}).code == "timeout"
    assert ask(url + "/nowhere").code == "not_found"


def test_anonymous_on_a_loopback_address_means_local_names_only(url: str) -> None:
    assert ask(url + "/v1/diffray/models", host="evil.example").status == 403
    assert ask(url + PNG, {"steps": 1}, origin="http://evil.example").status == 403


def test_a_client_that_leaves_frees_the_engine(url: str) -> None:
    def spent() -> float:
        return sum(map(cpu_seconds, pids))

    def rests() -> bool:
        before = spent()
        time.sleep(1)
        return spent() - before < 0.15

    for more in ({}, {"stream": True}):
        pids = replicas()
        before = spent()
        with closing(post(url + PNG, {"prompt": "left", "steps": 1000, "n": 4, **more})):
            until(lambda before=before: spent() - before > 0.8)  # it works on it
        until(rests)
    assert not witness.images("left"), "it went on"


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


@pytest.fixture(scope="module")
def ink(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA file."""
    return write_lora(tmp_path_factory.mktemp("loras") / "ink.safetensors", seed=3)


@pytest.fixture(scope="module")
def several(url: str, store: str, ink: Path, expected: bytes) -> str:
    """A new version under load: two models, of which a replica holds one, and an adapter."""
    old = set(replicas())
    with unharmed(url, BODY) as load:
        deploy(
            models={"embedded": {"adapters": str(ink.parent)}, "other": {"source": store}},
            memory={"models": 1},
            replicas={**CONFIG["replicas"], "target": 4},
            limits={"seconds": 48},
            guardrails=ATTENDED,
        )
        until(lambda: not old & set(replicas()))
    assert {answer.data for answer in load.answers} == {expected}
    return url


def test_a_new_version_under_load(several: str) -> None:
    assert [model["id"] for model in ask(several + "/v1/models").json["data"]] == ["embedded", "other"]


def test_an_adapter_is_worn_by_those_who_ask_for_it(several: str, ink: Path, expected: bytes) -> None:
    wanted = {(): expected, ("ink",): picture("embedded", "embedded", ink=ink)}
    assert len({*wanted.values()}) == 2

    def made(names: tuple[str, ...]) -> bytes:
        body = {**BODY, "adapters": [{"name": name, "weight": 1.0} for name in names]}
        return ask(several + PNG, body, accept="image/png").data

    choices = [(), ("ink",)] * 6
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(made, choices)) == [wanted[names] for names in choices]
    refused = ask(several + PNG, {**BODY, "adapters": [{"name": "nope"}]})
    assert (refused.status, refused.json["error"]["field"]) == (422, "adapters")


def test_each_model_stays_where_it_was_loaded(several: str, other: Path, expected: bytes) -> None:
    wanted = {"embedded": expected, "other": picture("other", str(other))}
    assert wanted["embedded"] != wanted["other"]

    def made(name: str) -> bytes:
        return ask(several + PNG, {**BODY, "model": name}, accept="image/png").data

    for name in ("embedded", "other", "embedded", "other"):
        assert made(name) == wanted[name]
    names = ["embedded", "other", "other"] * 8
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(made, names)) == [wanted[name] for name in names]
    seen = {pid: counts for pid, counts in witness.loads().items() if pid in replicas()}
    assert sorted(map(sorted, seen.values())) == [["embedded"], ["embedded", "other"]], (
        "each began with the default"
    )
    assert {count for counts in seen.values() for count in counts.values()} == {1}, "a model was loaded again"


def test_a_busy_model_gets_the_idle_replica_too(several: str) -> None:
    """And its weights, which are on the node already, are not fetched again."""
    before = fetched()
    time.sleep(UNUSED_SECONDS)  # for so long the other replica's model does not give way
    body = {**BODY, "model": "other", "prompt": "spread", "steps": 20}
    with unharmed(several, body, clients=12) as load:
        until(lambda: len(witness.images("spread")) == 2)
    assert len({answer.data for answer in load.answers}) == 1
    assert fetched() == before


def test_a_long_generation_is_not_ill(several: str) -> None:
    pids = set(replicas())
    begun = time.monotonic()
    while time.monotonic() - begun < 3:  # time for three health checks
        assert ask(several + PNG, {"prompt": "long", "steps": 400}).status == 200
    assert set(replicas()) == pids


@pytest.mark.parametrize("fault", ["break", pytest.param("hang", marks=long)])
def test_a_replica_whose_device_fails_is_replaced(several: str, expected: bytes, fault: str) -> None:
    assert ask(several + PNG, {"prompt": fault, "steps": 1}).status == 200
    (victim,) = witness.images(fault)
    with unharmed(several, BODY) as load:
        until(lambda: victim not in replicas() and running() == 2)
    assert {answer.data for answer in load.answers} == {expected}


def test_a_version_that_cannot_load_changes_nothing(several: str, expected: bytes) -> None:
    pids = set(replicas())
    with unharmed(several, BODY) as load, pytest.raises(RuntimeError, match="engines"):
        deploy(models={"new": {"source": "/nowhere/model.safetensors"}})
    assert {answer.data for answer in load.answers} == {expected}
    assert pids <= set(replicas())
    assert ask(several + "/readyz").status == 200


@long
def test_load_brings_replicas_and_idleness_takes_them_away(several: str, expected: bytes) -> None:
    scale = {"min": 0, "max": 2, "target": 2, "upscale_seconds": 0, "downscale_seconds": 3}
    deploy(
        replicas={**CONFIG["replicas"], **scale},
        limits={"seconds": 100},
        guardrails={"image": ["tests.serve.witness:attend"]},
    )
    url = several
    with unharmed(url, {**BODY, "prompt": "many"}, clients=8):
        until(lambda: running() == 2)
        until(lambda: len(witness.images("many")) == 2)
    with unharmed(url, {**BODY, "steps": 500}, clients=2):  # both replicas are at work when one is to stop
        until(lambda: running() == 1)
    until(lambda: not running() and not replicas())
    assert ask(url + "/readyz").status == 200
    assert ask(url + PNG, BODY, accept="image/png").data == expected  # waits for the replica to start


def test_the_example_file_is_a_config_of_serve(url: str, expected: bytes) -> None:
    serve.delete("diffray")
    config = ServeDeploySchema.model_validate(yaml.safe_load((EXAMPLES / "serve.yaml").read_text()))
    _get_global_client().deploy_apps(config)  # what `serve deploy` has the cluster do
    until(lambda: serve.status().applications["diffray"].status == "RUNNING")
    assert ask(url + PNG, BODY, accept="image/png").data == expected


def test_a_config_that_leaves_the_door_open_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="keys"):
        app_builder({})
    with pytest.raises(InvalidConfig, match="colour"):
        app_builder({"access": {"anonymous": True}, "colour": "red"})
    assert isinstance(app_builder({"access": {"keys": "/etc/diffray/keys.json"}}), serve.Application)
