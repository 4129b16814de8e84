"""Asynchronous jobs when the service stops: they are finished, or say why not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from diffray.serve.config import Limits, ServeConfig, Store
from diffray.serve.work import Event, Work

from .ask import ask
from .live import live
from .scripted import Scripted

JOBS = "/v1/diffray/jobs"


class Slow(Scripted):
    """Takes a second for a picture."""

    async def run(self, work: Work) -> AsyncGenerator[Event, None]:
        async for event in super().run(work):
            yield event
            await asyncio.sleep(0.1)


def stopped(config: ServeConfig, body: dict[str, Any]) -> dict[str, Any]:
    """The state of a job, asked of the service's successor."""
    with live(config, Slow) as first:
        identity = ask(first.url + JOBS, body).json["id"]
    with live(config, Scripted) as second:
        state: dict[str, Any] = ask(f"{second.url}{JOBS}/{identity}").json
    return state


def test_accepted_jobs_are_finished_when_the_service_stops(tmp_path: Path) -> None:
    config = ServeConfig(store=Store(url=str(tmp_path)), log="off")
    state = stopped(config, {"steps": 10})
    assert (state["status"], state["progress"], len(state["images"])) == ("done", 1.0, 1)


def test_a_job_that_does_not_end_with_the_service_says_why(tmp_path: Path) -> None:
    config = ServeConfig(store=Store(url=str(tmp_path)), limits=Limits(seconds=0.5), log="off")
    state = stopped(config, {"prompt": "wait", "steps": 10})
    assert (state["status"], state["error"]["code"]) == ("failed", "stopped")
    assert state["error"]["message"] == "the service was stopped"


def test_nobody_waits_for_results_that_go_with_the_service() -> None:
    with live(ServeConfig(log="off"), Scripted) as running:  # the leaving of the block would take 30 s
        ask(running.url + JOBS, {"prompt": "wait"})
        backend: Any = running.service.backend
    assert backend.cancelled == 1
