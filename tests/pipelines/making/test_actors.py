"""What each engine takes of a cluster, and how many there may be."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from diffray.model.errors import JobConflict, JobError
from diffray.pipelines import JobConfig, Store, Workers
from diffray.pipelines.config import Between, InvalidJob
from diffray.pipelines.making import actors
from diffray.pipelines.making.actors import Size
from diffray.pipelines.making.models import Models
from diffray.pipelines.making.worker import Share

GPUS = {"GPU": 4.0, "CPU": 64.0}
CPUS = {"CPU": 16.0}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda resources: monkeypatch.setattr(actors, "_resources", lambda: resources)


@pytest.mark.parametrize(
    ("resources", "workers", "device", "taken", "engines"),
    [
        (GPUS, Workers(), "auto", (1.0, None), (1, 4, 4)),
        (GPUS, Workers(gpus=0.5), "auto", (0.5, None), (1, 8, 8)),
        (GPUS, Workers(gpus=1, cpus=4, actors=2), "auto", (1.0, 4.0), (1, 2, 2)),
        (GPUS, Workers(actors=Between(min=2, max=50)), "auto", (1.0, None), (2, 4, 50)),
        (GPUS, Workers(actors=Between(min=6, max=8)), "auto", (1.0, None), (6, 6, 8)),
        (GPUS, Workers(), "cpu", (None, 8.0), (1, 8, 8)),
        (CPUS, Workers(), "auto", (None, 8.0), (1, 2, 2)),
        (CPUS, Workers(cpus=2), "auto", (None, 2.0), (1, 8, 8)),
        (CPUS, Workers(gpus=1, actors=3), "auto", (1.0, None), (1, 1, 3)),
    ],
)
def test_sizes(cluster: Any, resources: Any, workers: Workers, device: str, taken: Any, engines: Any) -> None:
    cluster(resources)
    size = Size(workers, device)
    assert (size.options["num_gpus"], size.options["num_cpus"]) == taken
    assert size.engines(1000) == engines
    assert max(size.engines(1)) == 1, "never more than shards"


def test_where_engines_may_be(cluster: Any) -> None:
    cluster(GPUS)
    options = Size(Workers(accelerator="H100", labels={"zone": "in(a,b)"}), "auto").options
    assert (options["accelerator_type"], options["label_selector"]) == ("H100", {"zone": "in(a,b)"})
    assert "accelerator_type" not in Size(Workers(), "auto").options


def test_what_a_cluster_does_not_have_is_said_at_once_unless_it_may_come(cluster: Any) -> None:
    cluster(CPUS)
    with pytest.raises(JobError, match="each engine asks for 1 GPU, the cluster has 0"):
        Size(Workers(gpus=1), "auto")
    with pytest.raises(JobError, match="device cuda asked for"):
        Size(Workers(), "cuda")
    Size(Workers(gpus=1, actors=2), "auto")


def test_text_encoders_take_their_part_of_the_engines_kind_of_device(cluster: Any) -> None:
    cluster(GPUS)
    size = Size(Workers(text_encoders=1, accelerator="H100"), "auto")
    assert size.text_options == {"num_cpus": 0, "num_gpus": 1.0, "accelerator_type": "H100"}
    assert (size.engines(1000), size.texts) == ((1, 3, 3), 1.0)
    shared = Size(Workers(text_encoders=4, text_share=0.25, gpus=0.75), "auto")
    assert (shared.text_options["num_gpus"], shared.engines(1000)) == (0.25, (1, 4, 4))
    with pytest.raises(JobError, match="asks for 1 GPU, the cluster has 0 beside its 4 text encoders"):
        Size(Workers(text_encoders=4), "auto")
    cluster(CPUS)
    size = Size(Workers(text_encoders=2, text_share=4), "auto")
    assert size.text_options == {"num_cpus": 4.0}
    assert (size.options["num_cpus"], size.threads, size.engines(1000)) == (8.0, 8, (1, 1, 1))
    assert size.texts == 1.0, "8 cores are what one engine has"


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


def test_a_range_of_actors_in_a_job_file() -> None:
    def workers(actors: Any) -> Workers:
        return JobConfig.checked({"input": "a", "output": "b", "workers": {"actors": actors}}).workers

    assert (workers("2-16").least, workers("2-16").most) == (2, 16)
    assert workers({"min": 2, "max": 16}) == workers("2-16")
    assert (workers(5).least, workers(5).most, workers(None).most) == (1, 5, None)
    for wrong in ("16-2", "many", 0, {"min": 2}):
        with pytest.raises(InvalidJob, match=r"workers\.actors"):
            workers(wrong)


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
