"""A preview says what a run would find, and refuses what a run would refuse."""

from __future__ import annotations

import pytest

from diffray.model.errors import JobConflict
from diffray.pipelines import InvalidJob, preview

from .. import fake
from ..conftest import Place


def test_it_says_what_the_output_holds(place: Place) -> None:
    table = place.write("prompt\na\nb\n")
    config, models = place.config(table, shards={"images": 1}), fake.FakeModels()
    assert preview(config, models=models).output == "new"
    place.run(config)
    before = place.bytes()
    assert preview(config, models=models).output == "2 of 2 shards are there"
    place.write("prompt\na\nb\nc\n")
    found = preview(config, models=models)
    assert (found.output, found.images) == (
        "2 of 2 shards are there; the input is not what was planned",
        3,
    )
    with pytest.raises(JobConflict, match="another job"):
        preview(place.config(table, shards={"images": 1}, seed=3), models=models)
    assert place.bytes() == before


def test_it_refuses_outputs_that_a_run_would_refuse(place: Place) -> None:
    table = place.write("prompt\na\n", "in/t.csv")
    place.write("mine", "other/thesis.doc")
    with pytest.raises(InvalidJob, match="holds the input"):
        preview(place.config(table, "in"), models=fake.FakeModels())
    with pytest.raises(InvalidJob, match="holds the input"):
        preview(place.config(table, "in/t.csv"), models=fake.FakeModels())
    with pytest.raises(JobConflict, match=r"thesis\.doc"):
        preview(place.config(table, "other"), models=fake.FakeModels())
