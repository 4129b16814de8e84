"""The engine's queue: every ticket once, clients served by cost."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from diffray.model import Cancelled, Engine, ImageRequest, load_model
from diffray.model.queue import Queue
from diffray.model.tickets import Ticket


def ticket(queue: Queue, client: str, steps: int = 10, weight: float = 1.0, side: int = 512) -> Ticket:
    request = ImageRequest(width=side, height=side, steps=steps)
    made = Ticket(request, steps=steps, client=client, weight=weight, _withdrawn=queue.withdrawn)
    made._bucket = (side,)
    return made


def served(queue: Queue, count: int) -> Counter[str]:
    """Cost taken by each client over the next `count` tickets."""
    costs: Counter[str] = Counter()
    for _ in range(count):
        taken = queue.take()
        assert taken is not None
        costs[taken.client] += taken.request.cost  # type: ignore[assignment]
    return costs


def test_one_client_is_served_in_order() -> None:
    queue = Queue()
    tickets = [ticket(queue, "", steps) for steps in (50, 1, 20, 3)]
    queue.enter(tickets)
    assert [queue.take() for _ in tickets] == tickets


def test_a_flood_does_not_delay_others() -> None:
    queue = Queue()
    queue.enter([ticket(queue, "flood") for _ in range(500)])
    queue.take()
    late = ticket(queue, "late")
    queue.enter([late])
    assert late in [queue.take() for _ in range(2)]


def test_shares_are_by_cost_and_not_by_count() -> None:
    queue = Queue()
    queue.enter(
        [ticket(queue, "dear", 50) for _ in range(100)] + [ticket(queue, "cheap", 5) for _ in range(1000)]
    )
    costs = served(queue, 220)
    assert costs["dear"] == pytest.approx(costs["cheap"], rel=0.1)


def test_weights_divide_the_engine() -> None:
    queue = Queue()
    for client, weight in (("a", 1.0), ("b", 3.0)):
        queue.enter([ticket(queue, client, weight=weight) for _ in range(400)])
    costs = served(queue, 200)
    assert costs["b"] == pytest.approx(3 * costs["a"], rel=0.05)


def test_silence_saves_up_nothing() -> None:
    """Who was away while others worked gets its share from now on, not what it missed."""
    queue = Queue()
    queue.enter([ticket(queue, "busy") for _ in range(300)])
    served(queue, 100)
    queue.enter([ticket(queue, "back") for _ in range(100)])
    costs = served(queue, 40)
    assert costs["back"] == pytest.approx(costs["busy"], rel=0.1)


def test_cancelled_tickets_cost_nothing_and_are_skipped() -> None:
    queue = Queue()
    mine = [ticket(queue, "a") for _ in range(50)]
    queue.enter(mine)
    queue.enter([ticket(queue, "b") for _ in range(50)])
    for one in mine[:49]:
        one.cancel()
    assert len(queue.leavers()) == 49
    assert queue.waiting == 51
    assert mine[49] in [queue.take() for _ in range(2)]


def test_what_does_not_fit_is_passed_over_and_keeps_its_turn() -> None:
    queue = Queue()
    large = [ticket(queue, "a", side=1024) for _ in range(3)]
    small = [ticket(queue, "a"), ticket(queue, "b")]
    queue.enter([*large, *small])
    assert [queue.take(lambda bucket: bucket == (512,)) for _ in range(3)] == [*small, None]
    assert [queue.take() for _ in range(4)] == [*large, None]
    assert queue.waiting == 0


def test_waiting_for_a_place_saves_up_nothing_against_newcomers() -> None:
    """A flood whose bucket is full falls behind others; who comes then waits for one of its images at most."""
    queue = Queue()
    queue.enter([ticket(queue, "flood", side=1024) for _ in range(50)])
    queue.enter([ticket(queue, "other") for _ in range(50)])
    for _ in range(40):
        queue.take(lambda bucket: bucket == (512,))
    newcomer = ticket(queue, "new", side=1024)
    queue.enter([newcomer])
    assert newcomer in [queue.take(lambda bucket: bucket == (1024,)) for _ in range(2)]


@pytest.mark.timeout(120)
def test_thousands_of_clients_are_served_quickly_and_forgotten() -> None:
    queue = Queue()
    rng = random.Random(1)
    queue.enter([ticket(queue, f"c{rng.randrange(5000)}") for _ in range(20_000)])
    taken = {id(queue.take()) for _ in range(20_000)}
    assert len(taken) == 20_000
    assert not queue._ends
    assert not queue._starts


def test_bytes_do_not_depend_on_who_else_asks() -> None:
    model = load_model()
    request = ImageRequest(prompt="a red circle", seed=3, steps=3)
    alone = Engine(model, batch_size=2).generate([request])[0].image
    assert alone is not None
    engine = Engine(model, batch_size=2)
    flood = [engine.submit(ImageRequest(prompt="x", seed=s, steps=4), client="flood") for s in range(6)]
    mine = engine.submit(request, client="me")
    while not mine.future.done():
        engine.step()
    image = mine.future.result().image
    unfinished = sum(not one.future.done() for one in flood)
    assert image is not None
    assert image.tobytes() == alone.tobytes()
    assert unfinished >= 2, "the flood was served first"


def test_steps_are_told_as_they_happen() -> None:
    heard: list[int] = []
    engine = Engine(load_model(), batch_size=1)
    told = engine.submit(ImageRequest(steps=5), listener=lambda: heard.append(told.step))
    with engine:
        told.future.result(120)
        waiting = engine.submit(ImageRequest(steps=900))
        waiting.cancel()
        with pytest.raises(Cancelled):
            waiting.future.result(60)
        assert engine.waiting == engine.running == 0
    assert heard == [1, 2, 3, 4, 5]
