"""The same promises on a real Ray; `tests/chaos` kills its engines, drivers, raylets and nodes."""

from __future__ import annotations

import sys

import pytest

from diffray.model.errors import CheckpointError
from diffray.pipelines.making.actors import generate_on_ray
from diffray.pipelines.models import Models, OpenModel
from diffray.pipelines.options import ModelOptions

from .conftest import Place
from .fake import FakeModels


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_ray_makes_the_same_bytes_as_one_process(place: Place) -> None:
    table = place.write("prompt,n\np,4\nPOISON,1\nq,4\n")
    place.job(table, "one")
    result = place.run(place.config(table, workers={"actors": 1}), generate=generate_on_ray)
    assert (result.images, result.rejected) == (8, 1)
    assert place.bytes() == place.bytes("one")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_row_that_kills_its_worker_is_rejected(place: Place) -> None:
    good = "prompt\np\nq\nr\n"
    place.job(place.write(good, "good.csv"), "good")
    workers = {"actors": 1, "crashes": 2}
    config = place.config(place.write(good + "KILL\n"), shards={"images": 2}, workers=workers)
    result = place.run(config, generate=generate_on_ray)
    assert (result.images, result.rejected) == (3, 1)
    [row] = place.rows(folder="rejected")
    assert (row["prompt"], row["attempts"], row["reason"]) == ("KILL", 2, "crashed its worker 2 times")
    assert [r["sha256"] for r in place.rows()] == [r["sha256"] for r in place.rows("good")]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_engines_that_share_the_processors_go_on_with_as_many_threads(place: Place) -> None:
    """Two engines would have a thread each, and other last bits than the one that began."""
    rows = [f"a red circle number {n},{n}" for n in range(24)]

    def made(count: int, output: str, actors: int) -> dict[str, str]:
        table = place.write("\n".join(["prompt,seed", *rows[:count]]), f"{output}.csv")
        workers, shards = {"actors": actors}, {"images": 4}
        config = place.config(table, output, model={}, defaults={"steps": 4}, workers=workers, shards=shards)
        place.run(config, generate=generate_on_ray, models=Models())
        return {row["id"]: row["sha256"] for row in place.rows(output)}

    whole = made(24, "whole", 1)
    made(4, "grown", 1)
    assert made(24, "grown", 2) == whole


class Unloadable(FakeModels):
    def open(self, options: ModelOptions) -> OpenModel:
        raise CheckpointError("unet.safetensors: incomplete file")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_model_that_does_not_load_stops_the_job_with_its_own_error(place: Place) -> None:
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[Unloadable.__module__])
    config = place.config(place.write("prompt\np\n"), workers={"actors": 1})
    with pytest.raises(CheckpointError, match="incomplete file"):
        place.run(config, generate=generate_on_ray, models=Unloadable())
