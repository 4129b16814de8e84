"""A dataset's whole life in random order: it is run, crashes, grows, is damaged, repaired, retried and cleaned.

Whatever happened, once its command has run to the end it holds the images of one large quiet job, each once.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from diffray.model.errors import StorageError
from diffray.pipelines import JobConfig, Store, collect, repair, retry_rejected, verify
from tests.pipelines.conftest import Place
from tests.pipelines.crashes import Crash, CrashingStore, in_turn
from tests.pipelines.fake import FakeModels

ROWS = ["p,1,", "q,2,", "POISON,1,", "bad,1,x", "r,3,", "p,1,"]


class Life:
    """One dataset, and what was done to it so far."""

    def __init__(self, place: Place, seed: int) -> None:
        self.place, self.dice = place, random.Random(seed)
        self.rows = [self.dice.choice(ROWS) for _ in range(3)]
        self.layout = self.dice.choice(["parquet", "files", "webdataset"])
        self.done: list[str] = []

    def config(self, name: str = "out") -> JobConfig:
        table = self.place.write("prompt,n,width\n" + "".join(f"{row}\n" for row in self.rows))
        quiet = {"contact_sheet": 0, "gallery": 0}
        return self.place.config(table, name, shards={"images": 2}, encoding={"layout": self.layout}, **quiet)

    @property
    def store(self) -> Store:
        return Store(self.config().output)

    def crashing(self) -> CrashingStore:
        at, after, error = self.dice.randint(1, 60), self.dice.random() < 0.5, self.dice.random() < 0.3
        self.done[-1] += f" at call {at} {'after' if after else 'before'}{' (error)' if error else ''}"
        return CrashingStore(self.config().output, at, after, error=error)

    def run(self) -> None:
        self.place.run(self.config(), generate=in_turn, take_over=True)

    def run_and_crash(self) -> None:
        try:
            self.place.run(self.config(), store=self.crashing(), generate=in_turn, take_over=True)
        except (Crash, StorageError):
            return

    def grow(self) -> None:
        self.rows.insert(self.dice.randint(0, len(self.rows)), self.dice.choice(ROWS))

    def retry(self) -> None:
        self.run()
        retry_rejected(self.config().output, models=FakeModels(), generate=in_turn, take_over=True)

    def retry_and_crash(self) -> None:
        self.run()
        try:
            retry_rejected(
                self.config().output,
                models=FakeModels(),
                store=self.crashing(),
                generate=in_turn,
                take_over=True,
            )
        except (Crash, StorageError):
            return

    def damage_and_repair(self) -> None:
        self.run()
        out = Path(self.config().output)
        candidates = [path for path in sorted(out.rglob("part-*")) if path.is_file()]
        candidates += sorted((out / "_diffray/commits").glob("*.json"))
        victim = self.dice.choice(candidates)
        self.done[-1] += f" {victim.relative_to(out)}"
        if self.dice.random() < 0.5 and victim.suffix != ".json":
            victim.unlink()
        else:
            victim.write_bytes(victim.read_bytes()[:-3])
        assert repair(self.store, take_over=True).damaged

    def clean(self) -> None:
        self.run()
        collect(self.store, 0, take_over=True)

    def prove(self) -> None:
        self.run()
        found = verify(self.store)
        assert found.faults == ()
        whole = self.place.run(self.config("whole"), generate=in_turn)
        assert (found.images, found.rejected) == (whole.images, whole.rejected)
        assert checksums(self.store) == checksums(Store(self.config("whole").output))


def checksums(store: Store) -> dict[str, str]:
    """Image id to the SHA-256 of its file, of the whole dataset."""
    from diffray.pipelines.outputs.commit import committed, read_commit

    shards = [read_commit(store, number) for number in sorted(committed(store))]
    return {image: digest for shard in shards for image, digest in shard.image_sha256.items()}


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(s, marks=pytest.mark.slow) for s in range(3, 15))]
)
def test_a_random_life(place: Place, seed: int) -> None:
    life = Life(place, seed)
    events = [
        life.run_and_crash,
        life.run_and_crash,
        life.grow,
        life.retry,
        life.retry_and_crash,
        life.damage_and_repair,
        life.clean,
    ]
    try:
        for _ in range(8):
            event = life.dice.choice(events)
            life.done.append(event.__name__)
            event()
        life.prove()
    except BaseException as error:
        error.add_note(f"seed {seed}, {life.layout}: {'; '.join(life.done)}")
        raise
