"""What each engine takes of the cluster, and how many there may be: counted on the nodes where they may run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffray.model.errors import JobError

from ..options import Workers

CORES_PER_ENGINE = 8
"""On CPU one engine gains little from more cores than this."""


class Size:
    """The size of a job's engines and text encoders.

    Attributes:
        options: of `map_batches`: what an actor takes and where it may be.
        text_options: of the actors that are text encoders: the same kind of device, as the bytes depend on it.
        texts: what all text encoders together take, in GPUs, or on CPU in engines.
        kind: what an engine computes on, "CPU" or "GPU".
        threads: torch threads of an engine on CPU, or None.

    Raises:
        JobError: no node has what each engine is to take, and none was asked to come.
    """

    def __init__(self, workers: Workers, device: str) -> None:
        self._workers = workers
        every = _nodes()
        self._nodes = [resources for resources, labels in every if _allowed(workers, resources, labels)]
        # Where no node matches yet, the others tell what kind of cluster this is.
        gpus = sum(resources.get("GPU", 0.0) for resources in self._nodes or (r for r, _ in every))
        expected = gpus > 0 or (workers.accelerator is not None and not self._nodes)
        wants_gpu = device != "cpu" and expected if workers.gpus is None else workers.gpus > 0
        if device.startswith("cuda") and not wants_gpu:
            raise JobError(f"device {device} asked for, but the cluster has no GPU")
        self.kind = "GPU" if wants_gpu else "CPU"
        each = (workers.gpus or 1.0) if wants_gpu else self._cores()
        self.threads = None if wants_gpu else max(1, int(each))
        texts = (workers.text_encoders or 0) * workers.text_share
        self.texts = texts if wants_gpu else texts / each
        fit = self._room(each)
        if not fit and not workers.most:
            raise JobError(
                f"each engine asks for {self._asked(each)}; with workers.actors the job waits for a cluster that grows"
            )
        self._fit = max(1, fit)
        self.options: dict[str, Any] = {
            "num_gpus": each if wants_gpu else None,
            "num_cpus": (workers.cpus or None) if wants_gpu else each,
        }
        share = "num_gpus" if wants_gpu else "num_cpus"
        self.text_options: dict[str, Any] = {"num_cpus": 0, share: workers.text_share}
        for options in (self.options, self.text_options):
            if workers.accelerator:
                options["accelerator_type"] = workers.accelerator
            if workers.labels:
                options["label_selector"] = workers.labels

    def engines(self, shards: int) -> tuple[int, int, int]:
        """Engines at least, at first and at most; never more than shards, and at first as many as fit now."""
        most = min(self._workers.most or self._fit, shards)
        least = min(self._workers.least, most)
        return least, max(least, min(most, self._fit)), most

    def _cores(self) -> float:
        """Cores of an engine on CPU: as asked, else the most with which as many engines fit as are wanted."""
        if self._workers.cpus:
            return self._workers.cpus
        wanted = self._workers.most or max(1, self._room(CORES_PER_ENGINE))
        largest = int(max((node.get("CPU", 0.0) for node in self._nodes), default=0.0))
        return float(next((cores for cores in range(largest, 1, -1) if self._room(cores) >= wanted), 1))

    def _room(self, each: float) -> int:
        """Engines of this size that fit, the text encoders being where they take the least room from them."""
        workers = self._workers
        # What takes a part of a GPU takes it of a single one.
        whole = self.kind == "CPU" or max(each, workers.text_share) > 1
        free = [list(_parts(node.get(self.kind, 0.0), whole)) for node in self._nodes]
        for _ in range(workers.text_encoders or 0):
            share = workers.text_share
            places = [
                (_times(each, left) - _times(each, left - share), number, part)
                for number, parts in enumerate(free)
                for part, left in enumerate(parts)
                if _times(share, left)
            ]
            if not places:
                return 0
            _, number, part = min(places)
            free[number][part] -= share
        room = [sum(_times(each, left) for left in parts) for parts in free]
        if self.kind == "GPU" and workers.cpus:
            cores = [_times(workers.cpus, node.get("CPU", 0.0)) for node in self._nodes]
            room = list(map(min, room, cores))
        return sum(room)

    def _asked(self, each: float) -> str:
        """What an engine asks for, and that no node has it."""
        workers = self._workers
        also = f" and {workers.cpus:g} CPU" if self.kind == "GPU" and workers.cpus else ""
        where = f" with accelerator {workers.accelerator}" if workers.accelerator else ""
        where += f" with labels {workers.labels}" if workers.labels else ""
        beside = f" beside {workers.text_encoders} text encoders" if workers.text_encoders else ""
        total = sum(node.get(self.kind, 0.0) for node in self._nodes)
        count = len(self._nodes)
        has = f"there are {total:g} {self.kind} on {count} node{'s' * (count != 1)}{where}"
        return f"{each:g} {self.kind}{also}, for which no node has room{beside}: {has}"


def _nodes() -> Sequence[tuple[Mapping[str, float], Mapping[str, str]]]:
    """Resources and labels of each living node."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [(node["Resources"], node["Labels"]) for node in nodes if node["Alive"]]


def _allowed(workers: Workers, resources: Mapping[str, float], labels: Mapping[str, str]) -> bool:
    """Whether engines may run on a node, by Ray's rules for accelerators and labels."""
    name = workers.accelerator
    fits = (_meets(labels.get(label), condition) for label, condition in workers.labels.items())
    return (name is None or f"accelerator_type:{name}" in resources) and all(fits)


def _meets(value: str | None, condition: str) -> bool:
    """Whether a label's value, None where there is no such label, meets `a`, `!a`, `in(a, b)` or `!in(a, b)`."""
    listed = condition.removeprefix("!")
    if listed.startswith("in(") and listed.endswith(")"):
        listed = listed[3:-1]
    return (value in [one.strip() for one in listed.split(",")]) != condition.startswith("!")


def _parts(amount: float, whole: bool) -> Iterator[float]:
    """What a node has, in one piece or one by one."""
    return iter([amount] if whole else [1.0] * int(amount))


def _times(each: float, room: float) -> int:
    """How often `each` goes into `room`, give or take what floats lose."""
    return max(0, int(room / each + 1e-9))
