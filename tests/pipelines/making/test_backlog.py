"""Who gets which shard: simulated engines of different speeds, on a clock of their own."""

from __future__ import annotations

import heapq
from itertools import count

import pytest

from diffray.pipelines.making.backlog import Backlog


def simulated(
    shards: int, paces: list[float], *, in_flight: int = 4, deaths: dict[str, float] | None = None
) -> float:
    """Seconds until engines that need `paces` seconds per shard have made all; each shard exactly once.

    An engine works on one shard after the other. It looks for work, and looks up from its work, every tenth of a
    second, as real ones do every second.
    """
    backlog, made, order = Backlog(range(shards), in_flight), set[int](), count()
    names = [f"e{i}" for i in range(len(paces))]
    working: dict[str, tuple[int, float] | None] = dict.fromkeys(names)
    held: dict[str, list[int]] = {name: [] for name in names}
    events = [(0.0, next(order), name) for name in names]
    for name in names:
        backlog.join(name)
    while backlog.left:
        now, _, name = heapq.heappop(events)
        if deaths and now >= deaths.get(name, float("inf")):
            backlog.leave(name)
            continue
        if (work := working[name]) and now >= work[1] - 1e-9:
            assert work[0] not in made, "made twice"
            made.add(work[0])
            held[name].remove(work[0])
            backlog.done(name, work[0], now)
            working[name] = None
        while (shard := backlog.take(name, now)) is not None:
            held[name].append(shard)
        if (found := backlog.recall(name, now)) is not None:
            holder, shard = found
            held[holder].remove(shard)
            if (theirs := working[holder]) and theirs[0] == shard:
                working[holder] = None
            backlog.give_back(holder, shard)
        if working[name] is None and held[name]:
            working[name] = held[name][0], now + paces[names.index(name)]
        heapq.heappush(events, (now + 0.1, next(order), name))
    assert made == set(range(shards))
    return now


def test_equal_engines_end_together() -> None:
    assert simulated(40, [10.0] * 4) == pytest.approx(100, rel=0.03)


def test_no_straggling_shard_of_a_slow_engine() -> None:
    """Three engines and one at a fifth of their speed: 3.2 engines' worth of work, and at most a shard's time more."""
    ideal = 40 * 10 / 3.2
    assert simulated(40, [10.0, 10.0, 10.0, 50.0]) <= ideal + 10


def test_a_hanging_engine_does_not_hold_up_the_end() -> None:
    assert simulated(20, [10.0, 10.0, 1e9]) <= 20 * 10 / 2 + 3 * 10


def test_the_shards_of_a_dead_engine_go_first() -> None:
    assert simulated(30, [10.0, 10.0, 10.0], deaths={"e1": 55.0}) <= (30 - 5) * 10 / 2 + 2 * 10


def test_fewer_in_flight_towards_the_end() -> None:
    backlog = Backlog(range(10), 4)
    for name in "ab":
        backlog.join(name)
    assert [backlog.take("a", 0.0) for _ in range(5)] == [0, 1, 2, 3, None]
    assert [backlog.take("b", 0.0) for _ in range(3)] == [4, 5, None]
    backlog.done("b", 4, 1.0)
    assert [backlog.take("b", 1.0) for _ in range(2)] == [6, None]
    for shard in (0, 1, 2, 3):
        backlog.done("a", shard, 2.0)
    assert [backlog.take("a", 2.0) for _ in range(3)] == [7, None, None], (
        "one each when three are left for two"
    )


def test_what_cannot_gain_is_not_moved() -> None:
    backlog = Backlog(range(2), 1)
    for name in "ab":
        backlog.join(name)
        backlog.take(name, 0.0)
    backlog.done("a", 0, 10.0)
    assert backlog.recall("a", 10.0) is None, "b should be done at any moment"
    assert backlog.recall("a", 25.0) == ("b", 1), "b takes more than twice as long as a did"
    assert backlog.recall("a", 26.0) is None, "asked once"
    backlog.give_back("b", 1)
    assert backlog.take("b", 26.0) is None, "not back to the engine that gave it away"
    assert backlog.take("a", 26.0) == 1


@pytest.mark.parametrize("took", [True, False])
def test_what_was_given_back_for_an_engine_that_died_does_not_wait_for_the_next_one(took: bool) -> None:
    """Its new process may load a model for minutes, or for ever."""
    backlog = Backlog(range(3), 2)
    backlog.join("a")
    assert [backlog.take("a", 0.0) for _ in range(2)] == [0, 1]
    backlog.join("b")
    assert backlog.take("b", 0.0) == 2
    backlog.done("b", 2, 1.0)
    assert backlog.recall("b", 30.0) is not None
    backlog.give_back("a", 1)
    if took:
        assert backlog.take("b", 30.0) == 1
    backlog.leave("b")
    backlog.join("b again")
    backlog.done("a", 0, 31.0)
    assert backlog.take("a", 31.0) == 1
