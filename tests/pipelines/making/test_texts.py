"""Prompts encoded once for all engines of a job."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError

from diffray.model import load_model
from diffray.model.errors import CheckpointError, GenerationError, InvalidRequest, JobConflict, JobError
from diffray.model.networks.text import Encoded
from diffray.pipelines import InvalidJob, JobConfig, Store
from diffray.pipelines.making import texts
from diffray.pipelines.making.actors import generate_on_ray
from diffray.pipelines.making.pools import EngineFacts, Pulse
from diffray.pipelines.making.texts import Answer, TextActor, Texts
from diffray.pipelines.making.worker import Share, Task, Worker
from diffray.pipelines.models import Models, OpenTexts, TextFacts
from diffray.pipelines.options import ModelOptions
from diffray.pipelines.runs import prompts, read_runs

from ..conftest import Place, in_process

FACTS = TextFacts("sum", (), "cpu", "float32", 1)
PROMPT = "a large red circle on a blue background"
OTHER = "a green triangle left of a yellow star"


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Actors that live in this process have nothing to check and nobody to report to."""
    monkeypatch.setattr(texts, "check_versions", lambda store: None)
    monkeypatch.setattr(
        texts, "PromptMeter", lambda model: type("Silent", (), {"answered": lambda *_: None})()
    )


class Handle:
    """What a Ray handle offers, over a function that runs in a thread of its own as an actor's calls do."""

    def __init__(self, encode: Callable[[Any], Answer]) -> None:
        self._encode, self._thread, self.asked = encode, ThreadPoolExecutor(1), list[str]()
        self.encode = self

    def remote(self, key: Any) -> Call:
        self.asked.append(key[0])
        return Call(self._thread.submit(self._encode, key))


class Call:
    """A reference to an answer that is on its way."""

    def __init__(self, future: Future[Answer]) -> None:
        self._future = future

    def future(self) -> Future[Answer]:
        return self._future


def answer(key: Any) -> Answer:
    """Numbers that tell the prompt."""
    array = torch.full((2, 3), float(len(key[0])), dtype=torch.float16)
    return Answer(FACTS, False, "float16", texts._bytes(array), None, 1)


def pool(*encoders: Callable[[Any], Answer], patience: float = 60.0) -> tuple[Texts, list[Handle]]:
    handles = [Handle(encode) for encode in encoders]
    return Texts(handles, patience), handles


@pytest.mark.slow
def test_a_prompt_that_is_asked_for_twice_at_once_travels_once_and_has_one_owner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waiting, go_on = threading.Semaphore(0), threading.Event()

    class Seen(Future[Any]):
        def result(self, timeout: float | None = None) -> Any:
            waiting.release()
            return super().result(timeout)

    def slow(key: Any) -> Answer:
        go_on.wait(60)
        return answer(key)

    monkeypatch.setattr(texts, "Future", Seen)
    own, handles = pool(slow, slow, slow)
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(own, "ab" * (n % 2 + 1), 0, ()) for n in range(8)]
        for _ in range(6):  # all but the two that asked first
            assert waiting.acquire(timeout=60)
        go_on.set()
        found = [one.result() for one in asked]
    assert [float(one.context[0, 0]) for one in found] == [2.0, 4.0] * 4
    assert found[0].context.dtype == torch.float16
    assert sorted(prompt for handle in handles for prompt in handle.asked) == ["ab", "abab"]
    assert own.counts == {"encoded": 2, "shared": 0}
    twin = Texts(handles, 60.0)
    twin("ab", 0, ())
    [owner] = [handle for handle in handles if handle.asked.count("ab")]
    assert owner.asked.count("ab") == 2, "every engine asks the same one"
    many = [f"prompt {n}" for n in range(60)]
    for prompt in many:
        own(prompt, 0, ())
    assert min(len(handle.asked) for handle in handles) >= 10, "each has its share"


def test_a_lost_answer_is_asked_for_again() -> None:
    failures = [ActorUnavailableError("busy being born", b"0" * 16)]

    def once(key: Any) -> Answer:
        if failures:
            raise failures.pop()
        return answer(key)

    own, [handle] = pool(once)
    assert own("a", 0, ()).context[0, 0] == 1.0
    assert handle.asked == ["a", "a"]


def test_an_encoder_that_stays_away_is_left_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PATIENCE", 0.1)
    monkeypatch.setattr(texts, "LOOK", 0.02)
    back = threading.Event()

    def away(key: Any) -> Answer:
        back.wait(10)
        return answer(key)

    own, handles = pool(away, away)
    handles[1 - own._order(("a", 0, ()))[0]]._encode = answer
    assert own("a", 0, ()).context[0, 0] == 1.0
    assert [handle.asked for handle in handles] == [["a"], ["a"]]
    back.set()


def test_without_any_encoder_the_job_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "LOOK", 0.02)
    back, clock = threading.Event(), count(0.0, 0.05)

    def away(key: Any) -> Answer:
        back.wait(60)
        return answer(key)

    own, _ = pool(away, patience=0.2)
    with monkeypatch.context() as patch:
        patch.setattr(texts, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=time.sleep))
        with pytest.raises(JobError, match="no answer after 0 s from 1 of them"):
            own("a", 0, ())
    assert own.waits >= 3, "the watchdog saw that it was waiting"
    back.set()

    def dead(key: Any) -> Answer:
        raise ActorDiedError

    own, handles = pool(dead, dead)
    with pytest.raises(JobError, match="ActorDiedError"):
        own("a", 0, ())
    assert [handle.asked for handle in handles] == [["a"], ["a"]], "the other one at once"


def test_an_encoder_of_another_kind_is_refused() -> None:
    own, _ = pool(answer)
    own.expected = replace(FACTS, device="cuda", threads=None)
    with pytest.raises(JobConflict, match="device: cpu there, cuda here\n  threads: 1 there, None here"):
        own("a", 0, ())


def actor(models: Models | None = None) -> TextActor:
    return TextActor(models or Models(), ModelOptions(), Store("/nowhere"), 1, 60.0)


def test_an_encoder_answers_with_the_engines_own_bytes_and_remembers_them() -> None:
    own, text = actor(), load_model().text
    for prompt, skip in ((PROMPT, 0), (PROMPT, 1), ("a (star:1.4) " * 60, 0), ("", 0)):
        first, second = own.encode((prompt, skip, ())), own.encode((prompt, skip, ()))
        assert (first.known, second.known) == (False, True)
        for encoded in (first.encoded(), second.encoded()):
            wanted = text.encode(prompt, skip)
            assert torch.equal(encoded.context, wanted.context)
            assert (encoded.pooled, encoded.chunks) == (None, wanted.chunks)
    assert first.made_by is not None
    assert first.made_by == TextFacts.of(load_model())


def test_what_an_encoder_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    size = load_model().text.encode("").context.nbytes
    monkeypatch.setattr(texts, "MEMORY", 2 * size)
    own = actor()
    for prompt, known in (("a", False), ("b", False), ("a", True), ("c", False), ("b", False)):
        assert own.encode((prompt, 0, ())).known is known


def test_tensors_of_every_type_survive() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        context, pooled = torch.randn(77, 8).to(dtype), torch.randn(5).to(dtype)
        name = str(dtype).removeprefix("torch.")
        encoded = Answer(FACTS, False, name, texts._bytes(context), texts._bytes(pooled), 1).encoded()
        assert torch.equal(encoded.context, context)
        assert encoded.pooled is not None
        assert torch.equal(encoded.pooled, pooled)


class Unloadable(Models):
    def open_texts(self, options: ModelOptions, memory: int) -> OpenTexts:
        raise CheckpointError("text_encoder: incomplete file")


def test_an_encoder_that_does_not_start_says_why() -> None:
    own, _ = pool(actor(Unloadable()).encode)
    with pytest.raises(JobError, match="a text encoder does not start: text_encoder: incomplete file"):
        own(PROMPT, 0, ())


def test_a_refused_prompt_is_an_answer() -> None:
    own, _ = pool(actor().encode)
    with pytest.raises(InvalidRequest, match="clip_skip"):
        own(PROMPT, 99, ())
    assert own(PROMPT, 0, ()).chunks == 1


# Jobs ------------------------------------------------------------------------------------------------------

TABLE = f"prompt,negative_prompt,n\n{PROMPT},dark,4\n{OTHER},,3\n{PROMPT},,2\n"
TINY = {
    "model": {},
    "defaults": {"steps": 1, "width": 64, "height": 64},
    "shards": {"images": 2},
    "contact_sheet": 0,
    "gallery": 0,
}


def engines(encode: Callable[[Any], Answer], count: int = 1) -> tuple[Any, list[Texts]]:
    """A way to make shards with so many engines and one text encoder, in this process."""
    handle = Handle(encode)
    made = [Texts([handle], 60.0) for _ in range(count)]

    def generate(
        config: JobConfig, number: int, store: Store, models: Models, shares: Sequence[Share]
    ) -> Iterator[tuple[int, int] | Pulse]:
        async def every(workers: list[Worker], shards: Sequence[int]) -> list[tuple[int, int]]:
            commits = await asyncio.gather(
                *(workers[turn % count].make(shard) for turn, shard in enumerate(shards))
            )
            return [(commit.images, commit.rejected) for commit in commits if commit]

        for share in shares:
            task = Task(config, number, share.model)
            workers = [Worker(task, store, models, texts=own) for own in made]
            try:
                yield from asyncio.run(every(workers, share.shards))
                facts = [EngineFacts("", "", "finished", reading=one.tally.reading()) for one in workers]
                yield Pulse(tuple(facts), 0, 0)
            finally:
                for worker in workers:
                    worker.close()

    return generate, made


def test_two_engines_that_share_an_encoder_make_the_same_bytes_and_encode_nothing_twice(place: Place) -> None:
    config = place.config(place.write(TABLE), **TINY)
    place.run(place.config(place.write(TABLE), "alone", **TINY), models=Models())
    generate, made = engines(actor().encode, 2)
    assert place.run(config, models=Models(), generate=generate).images == 9
    assert place.bytes() == place.bytes("alone")
    assert all(sum(own.counts.values()) >= 3 for own in made), "both engines asked"
    asked = sum(sum(own.counts.values()) for own in made)
    report = json.loads((place.path / "out/report.json").read_text())
    assert report["prompts"] == {"encoded": 4, "shared": asked - 4}, (
        "two prompts, a negative and the empty one"
    )
    assert report["stage_seconds"]["text"] > 0
    assert "text" not in json.loads((place.path / "alone/report.json").read_text())["stage_seconds"]


def test_a_prompt_that_the_encoder_refuses_costs_its_own_row(place: Place) -> None:
    real = actor().encode

    def picky(key: Any) -> Answer:
        error: Any = {"RUDE": InvalidRequest("prompt", "got RUDE"), "ODD": GenerationError("text: odd")}.get(
            key[0]
        )
        return Answer(TextFacts.of(load_model()), error=error) if error else real(key)

    generate, _ = engines(picky)
    table = place.write(f"prompt\n{PROMPT}\nRUDE\n{OTHER}\nODD\n")
    result = place.run(place.config(table, **TINY), models=Models(), generate=generate)
    assert (result.images, result.rejected) == (2, 2)
    rejected = {
        row["prompt"]: (row["stage"], row["field"], row["reason"]) for row in place.rows(folder="rejected")
    }
    assert rejected == {
        "RUDE": ("generate", "prompt", "got RUDE"),
        "ODD": ("generate", None, "text: odd"),
    }


def test_a_job_without_encoders_stops_blames_no_row_and_goes_on_later(place: Place) -> None:
    def dead(key: Any) -> Answer:
        raise ActorDiedError

    config = place.config(place.write(TABLE), **TINY)
    for _ in range(3):
        with pytest.raises(JobError, match="text encoders: no answer"):
            place.run(config, models=Models(), generate=engines(dead)[0])
    attempts = [
        json.loads(path.read_text()) for path in (place.path / "out/_diffray/attempts").rglob("*.json")
    ]
    assert [one for one in attempts if not one.get("done") and "mode" in one and "error" in one] == []
    result = place.run(config, models=Models(), generate=in_process)
    assert (result.images, result.rejected) == (9, 0)


def test_a_job_file_asks_for_encoders_where_there_is_text() -> None:
    def workers(**values: Any) -> Any:
        return JobConfig.checked(
            {"input": "a", "output": "b", "workers": {"text_encoders": 2}, **values}
        ).workers

    assert (workers().text_encoders, workers().text_share) == (2, 1.0)
    with pytest.raises(InvalidJob, match="task decode has no text to encode"):
        workers(task="decode")


class Watched(Models):
    """Writes down which processes encode text; the first one dies of its sixth prompt."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self.log = log

    def open_texts(self, options: ModelOptions, memory: int) -> OpenTexts:
        first = not self.log.exists()
        with self.log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        opened = super().open_texts(options, memory)
        encode, calls = opened.encode, count(1)

        def dying(*key: Any) -> Encoded:
            if next(calls) == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(*key)

        if first:
            opened.encode = dying  # type: ignore[method-assign]
        return opened


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_an_encoder_is_killed_while_two_engines_use_it(place: Place) -> None:
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[Watched.__module__])
    table = place.write("prompt,n\n" + "".join(f"a red circle {n},2\n" for n in range(12)))
    values = {**TINY, "defaults": {"steps": 12, "width": 64, "height": 64}}
    place.run(place.config(table, "alone", **values), models=Models())
    models = Watched(place.path / "encoders")
    workers = {"actors": 2, "cpus": 0.5, "text_encoders": 1, "text_share": 0.5, "shards_in_flight": 1}
    config = place.config(table, workers=workers, **values)
    result = place.run(config, models=models, generate=generate_on_ray)
    assert (result.images, result.rejected) == (24, 0)
    assert place.bytes() == place.bytes("alone")
    born = models.log.read_text().split()
    assert len(born) == 2, "it was started again"
    report = json.loads((place.path / "out/report.json").read_text())
    assert report["prompts"] == prompts(read_runs(Store(config.output)))
    encoded, shared = report["prompts"]["encoded"], report["prompts"].get("shared", 0)
    [run] = read_runs(Store(config.output))
    asking = sum(bool(engine["images"]) for engine in run["engines"])
    # One engine asks for each prompt, each for the empty one; the last shard may have moved to another.
    assert encoded + shared - 12 - asking in (0, 1)
    assert encoded in (13, 14), "the empty one again if it was forgotten in between"
