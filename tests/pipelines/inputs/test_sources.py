"""What the readers of one worker share is opened once, and completely before any of them uses it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError

from diffray.model.errors import JobError
from diffray.pipelines import Store
from diffray.pipelines.inputs import sources as sources_module
from diffray.pipelines.inputs.sources import Sources
from diffray.pipelines.outputs.plan import read_plans, read_shard

from .. import fake
from ..conftest import Place, in_process
from ..pictures import png


@pytest.fixture
def planned(place: Place) -> tuple[Any, list[Any]]:
    """A job on two rows with a picture each, and its images."""
    (place.path / "old").mkdir()
    for name in "ab":
        (place.path / f"old/{name}.png").write_bytes(png("red"))
    table = place.write("prompt,image\nx,a.png\ny,b.png\n", "old/t.csv")
    config = place.config(table, task="augment")
    place.run(config)
    store = Store(config.output)
    return config, [*read_shard(store, 0).images]


def test_a_second_reader_waits_until_the_first_one_knows_what_stamps_are_worth(
    place: Place, planned: Any
) -> None:
    """In a folder that was moved only sizes count: the times of its files are new."""
    config, images = planned
    shutil.copytree(place.path / "old", place.path / "new", copy_function=shutil.copyfile)
    moved = place.config(str(place.path / "new/t.csv"), task="augment")
    ended: list[Any] = []

    def second() -> None:
        try:
            ended.append(sources.ready(images[1]))
        except JobError as error:
            ended.append(error)

    thread = Thread(target=second)

    class Folders(frozenset[str]):
        def __iter__(self) -> Iterator[str]:
            thread.start()
            thread.join(0.2)
            return super().__iter__()

    plans = read_plans(Store(config.output))
    folders = Folders(plan.pictures for plan in plans)
    model = fake.FakeModels().config(config.model)
    sources = Sources(moved, model, plans[-1].input, folders)
    assert sources.ready(images[0]).request.init_image is not None
    thread.join()
    assert ended[0].request.init_image is not None


def test_a_storage_that_fails_when_it_is_opened_costs_no_row(
    place: Place, planned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = planned

    def later(*arguments: Any) -> Any:
        def root(*_: Any) -> str:
            raise EndpointConnectionError(endpoint_url="http://127.0.0.1:9")

        monkeypatch.setattr(sources_module, "input_root", root)
        return in_process(*arguments)

    with pytest.raises(JobError, match=r"t\.csv: Could not connect to the endpoint"):
        place.run(place.config(config.inputs[0], "other", task="augment"), generate=later)
    assert place.rows("other", "rejected") == []
