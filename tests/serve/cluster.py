"""The Ray Serve application under test, on a Ray of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import ray
from ray import serve

from diffray.serve import app_builder, deployment

from .ask import Answer, ask

CONFIG: dict[str, Any] = {
    "access": {"anonymous": True},
    "log": "off",
    "limits": {"seconds": 120},
    "replicas": {"min": 2, "max": 2, "cpus": 0.4, "ingress_cpus": 0.1},
}
PNG = "/v1/diffray/images"


@contextmanager
def cluster(cpus: int = 2, host: str = "127.0.0.1") -> Iterator[str]:
    """Ray and an HTTP proxy, without an application; its URL."""
    mode = os.environ.get("RAY_AUTH_MODE")  # Ray sets it and leaves it behind
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault(
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1"
    )  # 10: autoscaling at leisure
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as the proxy has it: nobody else may
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        serve.start(http_options={"host": host, "port": port})
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
        if mode is None:
            os.environ.pop("RAY_AUTH_MODE", None)


def deploy(**changes: Any) -> None:
    """Bring the application up, or roll it over to another config."""
    with mock.patch.object(deployment, "HEALTH_SECONDS", 1.0):
        app = app_builder({**CONFIG, **changes})
    serve.run(app, name="diffray", route_prefix="/")


def replicas() -> list[int]:
    """The process ids of this cluster's engine replicas, in whatever state."""
    shown = subprocess.run(["ps", "axo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in shown.splitlines()[1:]]
    mine, grown = {os.getpid()}, True
    while grown:
        children = {int(pid) for pid, parent, _ in rows if int(parent) in mine}
        grown = not children <= mine
        mine |= children
    return [int(pid) for pid, _, args in rows if int(pid) in mine and "ServeReplica:diffray:engines" in args]


def running() -> int:
    """How many engine replicas are ready."""
    states = serve.status().applications["diffray"].deployments["engines"].replica_states
    return sum(count for state, count in states.items() if str(state).endswith("RUNNING"))


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used."""
    with open(f"/proc/{pid}/stat") as file:
        times = file.read().rpartition(")")[2].split()
    return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")


def until(condition: Callable[[], bool], seconds: float = 90) -> float:
    """Wait for it; how long it took."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds, "it did not happen"
        time.sleep(0.1)
    return time.monotonic() - begun


@dataclass
class Load:
    """Requests one after the other in some threads, until it is left."""

    url: str
    body: dict[str, Any]
    clients: int = 4
    answers: list[Answer] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._run) for _ in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.answers.append(ask(self.url + PNG, self.body, accept="image/png"))
            except OSError as error:
                self.errors.append(error)

    def statuses(self) -> set[int]:
        return {answer.status for answer in self.answers}
