"""What each engine takes of a cluster, and how many there may be."""

from __future__ import annotations

from typing import Any

import pytest

from diffray.model.errors import JobError
from diffray.pipelines import JobConfig, Workers
from diffray.pipelines.config import InvalidJob
from diffray.pipelines.making import size as sizes
from diffray.pipelines.making.size import Size
from diffray.pipelines.options import Between

GPUS = {"GPU": 4.0, "CPU": 64.0}
CPUS = {"CPU": 16.0}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cluster of these nodes: resources, or (resources, labels)."""

    def of(*nodes: Any) -> None:
        known = [node if isinstance(node, tuple) else (node, {}) for node in nodes]
        monkeypatch.setattr(sizes, "_nodes", lambda: known)

    return of


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


def card(name: str, gpus: int, cpus: int = 64, **labels: str) -> Any:
    """A node with these, as Ray describes it."""
    return {"GPU": float(gpus), "CPU": float(cpus), f"accelerator_type:{name}": 1.0}, labels


@pytest.mark.parametrize(
    ("workers", "engines"),
    [
        (Workers(accelerator="H100"), 2),
        (Workers(accelerator="L4"), 8),
        (Workers(), 10),
        (Workers(labels={"zone": "a"}), 6),
        (Workers(labels={"zone": "!a"}), 4),  # the node without the label too
        (Workers(labels={"zone": "in(a, b)"}), 8),
        (Workers(labels={"zone": "!in(a,b)"}), 2),
        (Workers(labels={"zone": "in(a,b)"}, accelerator="L4"), 8),
        (Workers(labels={"zone": "a", "spot": "yes"}), 4),
    ],
)
def test_only_nodes_where_engines_may_run_count(cluster: Any, workers: Workers, engines: int) -> None:
    nodes = [card("L4", 4, zone="a", spot="yes"), card("L4", 2, zone="a"), card("L4", 2, zone="b")]
    cluster(*nodes, card("H100", 2))
    assert Size(workers, "auto").engines(1000) == (1, engines, engines)


@pytest.mark.parametrize(
    ("nodes", "workers", "engines"),
    [
        ([card("L4", 2)], Workers(gpus=0.6), 2),  # not 2 / 0.6 = 3
        ([card("L4", 1), card("L4", 1)], Workers(gpus=0.1), 20),
        ([card("L4", 3), card("L4", 3)], Workers(gpus=2), 2),
        ([card("L4", 8, cpus=8), card("L4", 1, cpus=64)], Workers(gpus=1, cpus=4), 3),
        ([card("L4", 1), card("L4", 1)], Workers(gpus=0.6, text_encoders=2, text_share=0.4), 2),
        ([card("L4", 1), card("L4", 1)], Workers(gpus=0.5, text_encoders=2, text_share=0.5), 2),
        ([card("L4", 1), card("L4", 2)], Workers(gpus=2, text_encoders=1), 1),
    ],
)
def test_what_does_not_fit_on_one_gpu_or_one_node_is_no_room(
    cluster: Any, nodes: Any, workers: Workers, engines: int
) -> None:
    cluster(*nodes)
    assert Size(workers, "auto").engines(1000) == (1, engines, engines)


@pytest.mark.parametrize(
    ("workers", "cores", "engines"),
    [
        (Workers(), 12, (1, 2, 2)),
        (Workers(cpus=8), 8, (1, 2, 2)),
        (Workers(cpus=5), 5, (1, 4, 4)),
        (Workers(actors=3), 6, (1, 3, 3)),
        (Workers(actors=100), 1, (1, 24, 100)),
        (Workers(text_encoders=1, text_share=8), 12, (1, 1, 1)),
    ],
)
def test_cores_of_two_nodes_are_no_engines(cluster: Any, workers: Workers, cores: int, engines: Any) -> None:
    cluster({"CPU": 12.0}, {"CPU": 12.0})
    size = Size(workers, "auto")
    assert (size.options["num_cpus"], size.threads, size.engines(1000)) == (cores, cores, engines)


def test_nodes_that_are_still_to_come_are_asked_for_their_gpus(cluster: Any) -> None:
    cluster(CPUS)
    size = Size(Workers(accelerator="H100", actors=4), "auto")
    assert (size.kind, size.options["num_gpus"], size.engines(9)) == ("GPU", 1.0, (1, 1, 4))
    cluster(CPUS, card("L4", 1, zone="a"))
    assert Size(Workers(labels={"zone": "b"}, actors=4), "auto").kind == "GPU"
    with pytest.raises(JobError, match="no node has room: there are 0 GPU on 0 nodes with accelerator H100"):
        Size(Workers(accelerator="H100"), "auto")
    with pytest.raises(
        JobError, match="2 GPU and 4 CPU, for which no node has room: there are 1 GPU on 1 node with labels"
    ):
        Size(Workers(labels={"zone": "a"}, gpus=2, cpus=4), "auto")


def test_where_engines_may_be(cluster: Any) -> None:
    cluster(card("H100", 4, zone="b"))
    options = Size(Workers(accelerator="H100", labels={"zone": "in(a,b)"}), "auto").options
    assert (options["accelerator_type"], options["label_selector"]) == ("H100", {"zone": "in(a,b)"})
    assert "accelerator_type" not in Size(Workers(), "auto").options


def test_what_a_cluster_does_not_have_is_said_at_once_unless_it_may_come(cluster: Any) -> None:
    cluster(CPUS)
    with pytest.raises(
        JobError, match="each engine asks for 1 GPU, for which no node has room: there are 0 GPU on 1 node;"
    ):
        Size(Workers(gpus=1), "auto")
    with pytest.raises(JobError, match="device cuda asked for"):
        Size(Workers(), "cuda")
    Size(Workers(gpus=1, actors=2), "auto")


def test_text_encoders_take_their_part_of_the_engines_kind_of_device(cluster: Any) -> None:
    cluster(card("H100", 4))
    size = Size(Workers(text_encoders=1, accelerator="H100"), "auto")
    assert size.text_options == {"num_cpus": 0, "num_gpus": 1.0, "accelerator_type": "H100"}
    assert size.engines(1000) == (1, 3, 3)
    assert size.texts == 1.0
    shared = Size(Workers(text_encoders=4, text_share=0.25, gpus=0.75), "auto")
    assert (shared.text_options["num_gpus"], shared.engines(1000)) == (0.25, (1, 4, 4))
    with pytest.raises(JobError, match="1 GPU, for which no node has room beside 4 text encoders"):
        Size(Workers(text_encoders=4), "auto")
    cluster(CPUS)
    size = Size(Workers(text_encoders=2, text_share=4), "auto")
    assert (size.text_options, size.texts) == ({"num_cpus": 4.0}, 1.0)  # 8 cores, as one engine
    assert (size.options["num_cpus"], size.threads, size.engines(1000)) == (8.0, 8, (1, 1, 1))


def test_a_range_of_actors_in_a_job_file() -> None:
    def workers(actors: Any) -> Workers:
        return JobConfig.checked({"input": "a", "output": "b", "workers": {"actors": actors}}).workers

    assert (workers("2-16").least, workers("2-16").most) == (2, 16)
    assert workers({"min": 2, "max": 16}) == workers("2-16")
    assert (workers(5).least, workers(5).most, workers(None).most) == (1, 5, None)
    for wrong in ("16-2", "many", 0, {"min": 2}):
        with pytest.raises(InvalidJob, match=r"workers\.actors"):
            workers(wrong)
