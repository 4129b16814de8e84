"""One round of chaos: a job in a process of its own, with drivers, engines and raylets killed at random moments.

Nothing here trusts the job: whatever is left when a driver ends without success is run again by the same
command, and in the end the dataset is compared with the one of an uninterrupted run.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from diffray.pipelines import Store, verify
from diffray.pipelines.outputs.commit import committed
from diffray.pipelines.outputs.plan import read_shard
from diffray.pipelines.report import TIMED_FILES
from tests.pipelines.conftest import Place
from tests.pipelines.s3 import S3

DRIVER = Path(__file__).parent.parent / "pipelines" / "driver.py"
VICTIMS = ("driver", "terminate", "interrupt", "engine", "raylet")
PATIENCE = 240.0


@dataclass
class Round:
    """What happened: each killing as (victim, seconds after its driver's start, shards committed by then)."""

    seed: int
    killings: list[tuple[str, float, int]] = field(default_factory=list)
    drivers: int = 0
    seconds: float = 0.0
    redone: int = 0
    """Images begun more than once: what the killings cost."""

    def __str__(self) -> str:
        kills = ", ".join(f"{victim} at {after:.1f} s ({done} done)" for victim, after, done in self.killings)
        return (
            f"seed {self.seed}: {len(self.killings)} kills ({kills}); {self.drivers} drivers, "
            f"{self.redone} images made again, {self.seconds:.0f} s"
        )


def table(images: int) -> str:
    """Slow prompts, with some rows that are rejected among them."""
    rows = [f"SLOW {i},1" for i in range(images - 2)] + ["POISON,1", ",0"]
    dice = random.Random(images)
    dice.shuffle(rows)
    return "prompt,n\n" + "\n".join(rows) + "\n"


def play(
    place: Place,
    seed: int,
    victims: Sequence[str],
    *,
    images: int = 40,
    actors: int = 1,
    layout: str = "parquet",
    s3: S3 | None = None,
) -> Round:
    """Run one round in `place`, with the dataset on S3 if one is given, and prove its end.

    Args:
        seed: of the moments of the killings.
        victims: who is killed, in this order.

    Raises:
        AssertionError: the dataset differs, a committed shard was made again, or something was left running.
    """
    dice, began = random.Random(seed), time.monotonic()
    played = Round(seed)
    place.write(table(images))
    common = {"shards": {"images": 4}, "encoding": {"layout": layout}}
    place.job(str(place.path / "prompts.csv"), "clean", **common)
    place.log.unlink()
    workers = {"actors": actors, "shards_in_flight": 2, "cpus": 1}
    config = place.config(str(place.path / "prompts.csv"), "out", workers=workers, **common)
    values = {**config.model_dump(mode="json"), "storage": {"s3": s3.options()} if s3 else {}}
    if s3 is not None:
        values["output"] = s3.folder()
    store = Store(values["output"], s3.options() if s3 else None)
    job = place.write(yaml.safe_dump(values), "job.yaml")
    until, plan = time.monotonic() + PATIENCE, list(victims)
    safe: dict[int, int] = {}
    while True:
        assert time.monotonic() < until, f"not finished after {PATIENCE} s; {played}"
        played.drivers += 1
        if _drive(place, store, job, plan, dice, played) == 0:
            break
        check_made_no_more(place, safe, str(played))
        safe = final(place, store)
    played.redone = len(place.begun()) - len(set(place.begun()))
    played.seconds = time.monotonic() - began
    check_made_no_more(place, safe, str(played))
    clean = Store(str(place.path / "clean"))
    assert contents(store) == contents(clean), f"the dataset is another one; {played}"
    assert verify(store).faults == (), str(played)
    last = max(store.list("_diffray/locks"))
    assert json.loads(store.read(f"_diffray/locks/{last}")) == {"released": True}, str(played)
    return played


def _drive(place: Place, store: Store, job: str, plan: list[str], dice: random.Random, played: Round) -> int:
    """One driver process until it ends, with killings on the way; its exit code."""
    logs = Path(tempfile.mkdtemp(prefix="dr", dir="/tmp"))  # Ray's socket paths have to be short
    before, began = len(place.begun()), time.monotonic()
    driver = subprocess.Popen(
        [sys.executable, str(DRIVER), job],
        stdout=subprocess.DEVNULL,
        stderr=(place.path / "stderr").open("a"),
        env={**os.environ, "RAY_TMPDIR": str(logs), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"},
        start_new_session=True,
    )
    try:
        # The next killing comes after so many more images were begun; sometimes already while Ray starts.
        at = before + dice.choice([0, *range(1, 12)])
        pause = dice.uniform(0, 1.5)
        while driver.poll() is None:
            assert time.monotonic() - began < PATIENCE, f"the driver hangs; {played}"
            if plan and len(place.begun()) >= at:
                time.sleep(pause)
                victim = plan[0]
                if _kill(victim, driver, place, logs, before):
                    plan.pop(0)
                    done = len(committed(store))
                    played.killings.append((victim, time.monotonic() - began, done))
                    at, pause = len(place.begun()) + dice.randrange(1, 8), dice.uniform(0, 1.5)
            time.sleep(0.05)
        return driver.returncode
    finally:
        if driver.poll() is None:
            driver.kill()
        driver.wait()
        _none_left(logs, played)
        shutil.rmtree(logs, ignore_errors=True)


def _kill(victim: str, driver: subprocess.Popen[bytes], place: Place, logs: Path, before: int) -> bool:
    """Whether there was such a victim."""
    if victim in ("driver", "terminate", "interrupt"):
        if victim == "interrupt":
            os.killpg(driver.pid, signal.SIGINT)  # Ctrl-C in a terminal reaches every process there
        else:
            driver.send_signal(signal.SIGKILL if victim == "driver" else signal.SIGTERM)
        driver.wait(PATIENCE)
        return True
    if victim == "engine":
        lines = place.log.read_text().splitlines()[before:] if place.log.exists() else []
        found = [int(lines[-1].split()[1])] if lines else []
    else:
        found = [pid for pid, command in processes(logs) if "/raylet/raylet " in command]
    for pid in found[:1]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
    return bool(found)


def processes(logs: Path) -> list[tuple[int, str]]:
    """Processes that were started for the Ray session in `logs`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            mine = f"RAY_TMPDIR={logs}".encode() in environment
            if mine and command and int(entry.name) != os.getpid():
                found.append((int(entry.name), command))
    return found


def _none_left(logs: Path, played: Round, seconds: float = 60.0) -> None:
    """A driver's end, whichever, is the end of all that holds the machine: engines, raylet, object store.

    Ray's small agents may take longer after the death of their raylet; they are ended here.
    """
    until = time.monotonic() + seconds
    while left := [command for _, command in processes(logs) if "Agent" not in command]:
        if time.monotonic() > until:
            break
        time.sleep(0.2)
    for pid, _ in processes(logs):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left, f"left running: {[command[:100] for command in left]}; {played}"


def final(place: Place, store: Store) -> dict[int, int]:
    """The seeds of all images that are final, and how often each was begun until then."""
    images = [image for number in committed(store) for image in read_shard(store, number).images]
    seeds = [image.request.seed for image in images if image.request and image.request.seed is not None]
    begun = Counter(place.begun())
    return {seed: begun[seed] for seed in seeds}


def check_made_no_more(place: Place, safe: dict[int, int], played: str = "") -> None:
    """Images that were `final` were not begun again since."""
    begun = Counter(place.begun())
    again = {seed for seed, times in safe.items() if begun[seed] != times}
    assert not again, f"committed shards were made again: {again}; {played}"


def contents(store: Store, folder: str = "") -> dict[str, str]:
    """Path to checksum of everything a user sees, but for the files that hold times."""
    found = {}
    for name, age in store.ages(folder).items():
        path = f"{folder}/{name}" if folder else name
        if path == "_diffray" or name in TIMED_FILES:
            continue
        found |= (
            contents(store, path) if age is None else {path: hashlib.sha256(store.read(path)).hexdigest()}
        )
    return found
