"""Where images go when there are several models, decided without a cluster."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from diffray.serve import routing
from diffray.serve.routing import ModelRouter


class Site:
    """A router with replicas by letter: what each says it holds, and how much each has to do."""

    def __init__(self, busy: float = 4, models: int = 1, **held: set[str]) -> None:
        self.router: Any = object.__new__(ModelRouter)
        self.router.initialize_state(busy=busy, models=models)
        self.load = dict.fromkeys(held, 0)
        self.router._replica_queue_len_cache = self.load
        self.replicas = [SimpleNamespace(replica_id=n, multiplexed_model_ids=h) for n, h in held.items()]

    def choice(self, model: str) -> set[str]:
        """The replicas that Serve would compare."""
        request = SimpleNamespace(metadata=SimpleNamespace(multiplexed_model_id=model))
        lists = asyncio.run(self.router.choose_replicas(self.replicas, request))
        return {replica.replica_id for replica in lists[0]}

    def send(self, model: str, replica: str) -> None:
        request = SimpleNamespace(metadata=SimpleNamespace(multiplexed_model_id=model))
        self.router.on_request_routed(request, replica, None)


def test_what_holds_the_model_is_asked() -> None:
    site = Site(a={"x"}, b={"y"}, c={"x"})
    assert site.choice("x") == {"a", "c"}
    assert site.choice("y") == {"b"}
    assert site.choice("") == {"a", "b", "c"}, "questions that are about no model"


def test_a_new_model_goes_where_there_is_room_and_stays_there() -> None:
    site = Site(models=2, a={"x", "y"}, b={"x"})
    assert site.choice("z") == {"b"}
    site.send("z", "b")  # which has not told yet
    assert site.choice("z") == {"b"}


def test_a_model_that_was_driven_out_is_not_looked_for_there() -> None:
    site = Site(models=1, a={"x"}, b={"x"})
    site.send("y", "a")
    assert site.choice("y") == {"a"}
    assert site.choice("x") == {"b"}


@pytest.mark.parametrize(("mine", "idle", "wanted"), [(3, 0, "a"), (4, 0, "b"), (40, 1, "a")])
def test_a_busy_model_spreads_to_idle_replicas_only_when_each_holds_one(
    mine: int, idle: int, wanted: str
) -> None:
    site = Site(busy=4, models=1, a={"x"}, b={"y"})
    site.load.update(a=mine, b=idle)
    assert site.choice("x") == {wanted}


def test_a_model_in_use_is_not_driven_out_between_two_images(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(routing, "time", SimpleNamespace(monotonic=lambda: now))
    site = Site(busy=4, models=1, a={"x"}, b={"y"})
    site.send("y", "b")
    site.load.update(a=8, b=0)
    assert site.choice("x") == {"a"}
    now += routing.UNUSED_SECONDS
    assert site.choice("x") == {"b"}


def test_a_busy_model_spreads_to_free_places() -> None:
    site = Site(busy=4, models=2, a={"x"}, b={"y"}, c={"y", "z"})
    site.load.update(a=8, b=4, c=4)
    assert site.choice("x") == {"b"}, "c would have to drop a model that is in use"
    site.load.update(b=5)
    assert site.choice("x") == {"a"}, "b has enough to do, too"


def test_a_lost_replica_is_forgotten() -> None:
    site = Site(models=1, a={"x"}, b={"x"})
    site.send("y", "a")
    site.router._replicas, site.router._replica_id_set = {}, set()
    site.router._queue_len_gauge_last_update = {}
    site.router._multiplexed_model_id_to_replica_ids = {}
    site.router.on_replica_actor_died("a")
    assert site.choice("x") == {"a", "b"}
