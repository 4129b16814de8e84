"""Load that does not wait for its answers, the ways of serving that are compared, and the command."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise, takewhile
from pathlib import Path
from statistics import mean, variance
from typing import Any

import pytest
from typer.testing import CliRunner

from diffray.cli.app import app
from diffray.model import ImageRequest
from diffray.serve.bench import measure_service, table
from diffray.serve.config import ServeConfig
from diffray.serve.engines import Engines
from diffray.serve.load import Answer, Load, Plan, Target, arrivals, offer, requests
from diffray.serve.refusal import Refusal
from diffray.serve.rivals import Batches
from diffray.serve.work import Event, Progress, Work

from .live import Live

PLAN = Plan(sizes=((64, 64), (64, 32)), steps=(2, 4), shares=(0.5,), seconds=1.0)


class Slow(Target):
    """A service that makes one picture at a time, each in `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__("http://nowhere")
        self._seconds, self._free = seconds, asyncio.Lock()
        self.unanswered = self.most = 0

    async def make(self, body: dict[str, Any]) -> int:
        self.unanswered += 1
        self.most = max(self.most, self.unanswered)
        async with self._free:
            await asyncio.sleep(self._seconds)
        self.unanswered -= 1
        return 200


def test_arrivals_are_poisson_and_always_the_same() -> None:
    times = arrivals(50.0, 200.0, seed=1)
    assert times == arrivals(50.0, 200.0, seed=1) != arrivals(50.0, 200.0, seed=2)
    assert times[0] == 0.0
    assert times[-1] < 200.0
    gaps = [after - before for before, after in pairwise(times)]
    assert mean(gaps) == pytest.approx(0.02, rel=0.05)
    counts = [sum(second <= time < second + 1 for time in times) for second in range(200)]
    assert variance(counts) == pytest.approx(mean(counts), rel=0.3)  # as only a Poisson process has it


def test_requests_draw_from_the_mix_and_always_the_same() -> None:
    first, again = (requests(PLAN, 3) for _ in range(2))
    bodies = [next(first) for _ in range(100)]
    assert bodies == [next(again) for _ in range(100)]
    assert {(body["width"], body["height"], body["steps"]) for body in bodies} == {
        (64, 64, 2), (64, 64, 4), (64, 32, 2), (64, 32, 4)
    }  # fmt: skip
    assert len({body["seed"] for body in bodies}) == 100


def test_a_slow_service_is_asked_no_less_and_its_queue_counts() -> None:
    """Twice the load that it can bear: the queue grows, and with it the latencies, up to half of the time."""
    due = [0.01 * i for i in range(60)]
    slow = Slow(0.02)
    answers = asyncio.run(offer(slow, PLAN, due, seed=0))
    assert sorted(answer.due for answer in answers) == due
    assert slow.most > 10
    last = max(answers, key=lambda answer: answer.due)
    assert last.latency >= 60 * 0.02 - due[-1] - 0.01


def test_latency_counts_from_when_a_request_was_due_even_if_it_was_sent_late() -> None:
    async def blocked() -> list[Answer]:
        loop = asyncio.get_running_loop()
        loop.call_later(0.12, lambda: __import__("time").sleep(0.5))  # this process is held up
        return await offer(Slow(0.0), PLAN, [0.0, 0.1], seed=0)

    late = max(asyncio.run(blocked()), key=lambda answer: answer.due)
    assert late.latency > 0.25


def test_figures_count_what_was_refused_against_goodput() -> None:
    answers = [Answer(0.0, 1.0, 200), Answer(0.0, 2.0, 200), Answer(1.0, 4.0, 200), Answer(1.0, 1.1, 429)]
    load = Load(way="x", share=0.5, rate=2.0, batch=8, answers=answers, seconds=4.0, steps=10.0, occupied=5.0)
    row = load.summary(deadline=2.0)
    assert row["p50"] == 2.0
    assert row["goodput"] == 0.5
    assert row["images_per_second"] == 0.75
    assert table([row]) == [
        ("50%, 2.00/s", "x", "2.00", "2.80", "2.98", "50%", "0.75", "4.0 of 8", "4", "1"),
    ]


# ---- the rivals -------------------------------------------------------------------------------------------


@contextmanager
def together(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """Replaces the engines by a stand-in whose works take as many turns as they have steps; notes who runs."""
    seen: list[list[str]] = []
    inside: list[str] = []

    async def run(self: Engines, work: Work) -> AsyncGenerator[Event, None]:
        name = work.request.prompt
        inside.append(name)
        seen.append(sorted(inside))
        try:
            for step in range(work.request.steps or 0):
                await asyncio.sleep(0.01)
                yield Progress(step, 0)
        finally:
            inside.remove(name)

    monkeypatch.setattr(Engines, "run", run)
    yield seen


async def ran(backend: Engines, works: dict[str, int], leaver: str = "") -> None:
    async def one(name: str, steps: int) -> None:
        async for _ in backend.run(Work(request=ImageRequest(prompt=name, steps=steps), model="embedded")):
            pass

    tasks = {name: asyncio.create_task(one(name, steps)) for name, steps in works.items()}
    if leaver:
        await asyncio.sleep(0.005)
        tasks[leaver].cancel()
    await asyncio.wait_for(asyncio.gather(*tasks.values(), return_exceptions=True), 10)


WORKS = {"a": 1, "b": 5, "c": 1, "d": 1, "e": 1}


def test_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with together(monkeypatch) as seen:
        asyncio.run(ran(Batches(ServeConfig(), 1), WORKS))
    assert seen == [["a"], ["b"], ["c"], ["d"], ["e"]]


def test_a_batch_runs_to_its_end_before_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    with together(monkeypatch) as seen:
        asyncio.run(ran(Batches(ServeConfig(), 2), WORKS))
    assert seen[0] == ["a"]  # who comes to an idle service waits for nobody
    assert seen[1:3] == [["b"], ["b", "c"]]
    assert seen[3:] == [["d"], ["d", "e"]]  # though c was done long before b


@pytest.mark.parametrize("leaver", ["a", "b", "c"])
def test_a_client_that_leaves_stops_nobody(monkeypatch: pytest.MonkeyPatch, leaver: str) -> None:
    with together(monkeypatch) as seen:
        asyncio.run(ran(Batches(ServeConfig(), 2), WORKS, leaver))
    assert {name for names in seen for name in names} >= set(WORKS) - {leaver}


# ---- against real services --------------------------------------------------------------------------------


def quiet(text: str) -> None:
    """Say nothing."""


@pytest.mark.slow
def test_a_running_service_is_measured_as_it_is(service_app: Live) -> None:
    outcome = asyncio.run(
        measure_service(service_app.url, replace(PLAN, seconds=3.0, shares=(0.2,)), say=quiet)
    )
    [row] = outcome.rows()
    assert row["made"] == row["requests"] > 0
    assert 0 < row["p50"] <= row["p90"] <= row["p99"]
    assert 0 < row["occupancy"] <= 1
    assert outcome.capacity > 0


def test_a_service_that_is_not_there_is_said_so() -> None:
    with pytest.raises(Refusal, match="does not answer"):
        asyncio.run(measure_service("http://127.0.0.1:9", PLAN, say=quiet))


@pytest.mark.slow
def test_the_command_compares_three_ways_under_the_same_requests(tmp_path: Path) -> None:
    arguments = ["bench", "serve", "--steps", "3,6", "--shares", "0.9", "--seconds", "3", "--turns", "1"]
    keys = {"DIFFRAY_API_KEYS": "of-another-service"}
    done = CliRunner(env=keys).invoke(app, [*arguments, "--json", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out.json").read_text())
    one, batches, steps = found["loads"]
    assert [load["way"] for load in (one, batches, steps)] == [
        "one at a time", "request-level batching", "step-level batching"
    ]  # fmt: skip
    assert len({tuple(sorted(load["due"])) for load in found["loads"]}) == 1
    assert all(load["made"] == load["requests"] > 3 for load in found["loads"])
    assert one["occupancy"] * one["batch"] == pytest.approx(1.0)
    assert steps["occupancy"] * steps["batch"] > 1.0
    lines = list(takewhile(bool, done.stdout.splitlines()))
    assert any(line.startswith("90%") and "step-level batching" in line for line in lines)


def test_the_command_refuses_what_makes_no_sense() -> None:
    for option, value in (("--sizes", "64"), ("--steps", "0"), ("--shares", "x")):
        done = CliRunner().invoke(app, ["bench", "serve", option, value])
        assert done.exit_code == 2
        assert option in done.output
