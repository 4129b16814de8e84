"""What a job keeps from run to run of the machines it is on, and how it leaves Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffray.model.errors import JobConflict
from diffray.pipelines import JobConfig, Store
from diffray.pipelines.making import actors, size
from diffray.pipelines.making.size import Size
from diffray.pipelines.making.worker import Share
from diffray.pipelines.models import Models

GPUS = {"GPU": 4.0, "CPU": 64.0}
CPUS = {"CPU": 16.0}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda resources: monkeypatch.setattr(size, "_nodes", lambda: [(resources, {})])


def test_a_job_keeps_the_threads_and_the_kind_of_device_of_its_first_run(
    cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The bytes of its images depend on them."""
    used: list[int | None] = []

    class Asked:
        def __init__(self, *parts: Any) -> None:
            used.append(next(part.threads for part in parts if isinstance(part, Size)))

        def run(self) -> Iterator[Any]:
            return iter(())

    monkeypatch.setattr(actors, "_Cluster", lambda address: nullcontext())
    monkeypatch.setattr(actors, "_pool", Asked)

    def run(output: str, **workers: Any) -> int | None:
        config = JobConfig.checked({"input": "a", "output": output, "workers": workers})
        share = Share(config.model, [0])
        list(actors.generate_on_ray(config, 1, Store(output), Models(config.storage), [share]))
        return used[-1]

    first, other = str(tmp_path / "first"), str(tmp_path / "other")
    cluster(CPUS)
    assert [run(first), run(other, cpus=2)] == [8, 2]
    cluster({"CPU": 6.0})
    assert [run(first), run(first, cpus=1), run(other)] == [8, 8, 2]
    cluster(GPUS)
    with pytest.raises(JobConflict, match="the job began on a CPU, here the rest would be made on a GPU"):
        run(first)
    assert run(str(tmp_path / "third")) is None
    cluster(CPUS)
    with pytest.raises(JobConflict, match="began on a GPU, here the rest would be made on a CPU"):
        run(str(tmp_path / "third"))


def test_what_a_job_computes_on_does_not_depend_on_which_of_its_models_are_left(
    cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(actors, "_Cluster", lambda address: nullcontext())
    monkeypatch.setattr(actors, "_pool", lambda *_: SimpleNamespace(run=lambda: iter(())))
    cluster(GPUS)
    models = {"drawn": {"device": "cuda"}, "painted": {"device": "cpu"}}
    config = JobConfig.checked({"input": "a", "output": str(tmp_path), "models": models})
    shares = [Share(options, [number]) for number, options in enumerate(config.models.values())]
    for left in (shares, shares[1:]):
        list(actors.generate_on_ray(config, 1, Store(config.output), Models(config.storage), left))


def test_ray_goes_only_when_ray_data_is_done_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of Ray Data that calls Ray after its end would end the driver before it has written its report."""
    import ray

    order: list[str] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *_, **__: None)
    monkeypatch.setattr(ray, "shutdown", lambda: order.append("shutdown"))

    def late() -> None:
        time.sleep(0.3)
        order.append("thread")

    with actors._Cluster(None):
        threading.Thread(target=late, name="Prefetcher", daemon=True).start()
    assert order == ["thread", "shutdown"]
