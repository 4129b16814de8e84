"""What is shown of a job: the arithmetic, the lines, the live display."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from diffray.pipelines import progress
from diffray.pipelines.making.pools import EngineFacts, Pulse
from diffray.pipelines.making.tally import Reading
from diffray.pipelines.progress import Lines, Terminal
from diffray.pipelines.standing import Standing

READING = Reading(
    images=14,
    rejected={"generate": 1},
    uncommitted={3: (4, 1)},
    inside={"engine": 8, "encode": 2, "store": 0},
    up=10.0,
    busy=9.0,
    filled=54.0,
    slots=8,
)
ENGINE = EngineFacts("a", "m", "running", 30.0, reading=READING)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_images_count_before_their_shard_is_committed_and_deaths_take_them_back(clock: list[float]) -> None:
    standing = Standing(100, 20, 2)
    clock[0] += 10
    standing.advance(9, 1)
    standing.see(Pulse((ENGINE, EngineFacts("b", "m", "starting")), 5, 1))
    assert (standing.committed, standing.rejected, standing.ended) == (30, 3, 35)
    assert (standing.rate, standing.left) == (1.5, pytest.approx(65 / 1.5))
    assert (standing.engines("running"), standing.engines("starting")) == (1, 1)
    assert (standing.busy, standing.filled) == (0.9, 0.75)
    standing.see(Pulse((replace(ENGINE, state="lost"),), 6, 0))
    assert standing.ended == 30


def test_a_shard_that_two_engines_have_in_hand_counts_once_and_never_beyond_the_total() -> None:
    standing = Standing(33, 30, 0)
    standing.see(Pulse((ENGINE, replace(ENGINE, name="b")), 0, 1))
    assert standing.ended == 33


def test_the_rate_is_that_of_the_last_minute(clock: list[float]) -> None:
    standing = Standing(10_000, 0, 0)
    for images in (1, 1, 1, 1, 100, 100, 100):
        clock[0] += 30
        standing.advance(images, 0)
    assert standing.rate == pytest.approx(200 / 60)


def test_lines_for_logs(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    lines.start(40, 0, 0)
    clock[0] += 20
    lines.pulse(Pulse((ENGINE,), 5, 1))
    lines.pulse(Pulse((ENGINE,), 5, 1))
    lines.advance(39, 1)
    first, second, last = capsys.readouterr().err.splitlines()
    assert first == "0/40 images, 0 rejected, 0.00/s"
    assert second == (
        "5/40 images, 0 rejected, 0.25/s, 2:20 left; 1 engine 90% busy, slots 75% full; engine 8, encode 2, store 0"
    )
    assert last.startswith("40/40 images, 1 rejected, 2.00/s; ")


def test_the_live_display_says_the_same() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    terminal = Terminal(console)
    terminal.start(40, 0, 0)
    terminal.pulse(Pulse((ENGINE, EngineFacts("b", "m", "starting")), 5, 1))
    terminal.stop()
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "5 of 40 images" in shown
    assert "0 rejected  ·  1 shard in work, 5 waiting" in shown
    assert "1 engine 90% busy, slots 75% full, 1 starting  ·  engine 8, encode 2, store 0" in shown
