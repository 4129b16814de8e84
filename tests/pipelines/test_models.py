"""What counts as a job's model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from diffray.model.errors import JobConflict, JobError
from diffray.model.weights.source import embedded
from diffray.pipelines import ModelOptions
from diffray.pipelines.models import Models

from .conftest import Place


def brighten(folder: Path) -> None:
    [weights] = folder.glob("*.safetensors")
    tensors = load_file(weights)
    name = next(name for name in tensors if name.startswith("decoder.conv_out") and name.endswith("bias"))
    save_file({**tensors, name: tensors[name] + 1}, weights)


def test_another_autoencoder_in_the_place_of_the_planned_one_is_refused(place: Place) -> None:
    vae = place.path / "vae"
    shutil.copytree(embedded() / "vae", vae)
    config = place.config(place.write("prompt\np\n"), model={"options": {"vae": str(vae)}})

    def stopped(*_: object) -> Iterator[tuple[int, int]]:
        raise JobError("stopped")

    def start() -> None:
        place.run(config, models=Models(), generate=stopped)

    for _ in range(2):
        with pytest.raises(JobError, match="stopped"):
            start()
    brighten(vae)
    with pytest.raises(JobConflict, match=r"model\.vae: "):
        start()


def test_workers_agree_on_the_autoencoder(place: Place) -> None:
    vae = place.path / "vae"
    shutil.copytree(embedded() / "vae", vae)

    def facts(options: dict[str, str]) -> dict[str, object]:
        model = Models().open(ModelOptions(options=options))
        model.engine.close()
        return model.facts()

    first = facts({"vae": str(vae)})
    brighten(vae)
    second = facts({"vae": str(vae)})
    assert {name for name in first if first[name] != second[name]} == {"vae"}
    assert "vae" not in facts({})
