"""Chaos for as long as one likes: `python -m tests.chaos.soak --rounds 100 --seed 1`, or with `--s3`.

Each round is a job of its own, killed several times at random moments; see `rounds.py`. The script stops at the
first round that breaks a promise, says its seed and keeps its folder.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from tests.chaos.rounds import VICTIMS, play
from tests.pipelines.conftest import Place
from tests.pipelines.s3 import S3, serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--kills", type=int, default=3, help="per round, at most")
    parser.add_argument("--images", type=int, default=40, help="per round")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=VICTIMS)
    parser.add_argument("--s3", action="store_true", help="datasets on the server that `s3.py` describes")
    given = parser.parse_args()
    with serve() if given.s3 else nullcontext() as s3:
        soak(given, s3)


def soak(given: argparse.Namespace, s3: S3 | None) -> None:
    """All rounds."""
    kills = drivers = 0
    for number in range(given.rounds):
        seed = given.seed + number
        dice, folder = random.Random(seed), Path(tempfile.mkdtemp(prefix="diffray-soak-"))
        played = play(
            Place(folder),
            seed,
            [dice.choice(given.victims) for _ in range(dice.randint(1, given.kills))],
            images=given.images,
            actors=given.actors,
            layout=dice.choice(["parquet", "files", "webdataset"]),
            s3=s3,
        )
        kills, drivers = kills + len(played.killings), drivers + played.drivers
        print(f"round {number + 1}/{given.rounds}: {played}", flush=True)
        shutil.rmtree(folder)
    print(
        f"{given.rounds} rounds, {kills} kills, {drivers} drivers: every dataset as if nothing had happened"
    )


if __name__ == "__main__":
    main()
