"""Boxes of the source, moved by what the row says, lie on the same thing in the image."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffray.pipelines.inputs.sources import Sources
from diffray.pipelines.terms.image import PlannedImage
from diffray.pipelines.terms.tasks import KINDS

from .. import fake
from ..conftest import Place

OBJECT = (40, 16, 64, 40)
"""Of a white square on the black source: left, top, right, bottom."""


def seen(image: Image.Image) -> tuple[float, ...]:
    """The box around all that is brighter than half."""
    rows, columns = np.nonzero(np.asarray(image.convert("L")) > 127)
    return (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def moved(box: tuple[int, ...], row: dict[str, Any]) -> tuple[float, ...]:
    """A box of the source in the image's pixels, as the README says it."""
    left, top, right, bottom = row["source_box"]
    across, down = (right - left) / row["source_width"], (bottom - top) / row["source_height"]
    return tuple(
        start + edge * by for start, edge, by in zip((left, top) * 2, box, (across, down) * 2, strict=True)
    )


CASES = {
    "as it is": {},
    "stretched": {"defaults": {"width": 64, "height": 64}},
    "cut at the sides": {"defaults": {"width": 64, "height": 64}, "pictures": {"fit": "crop"}},
    "cut at the top": {"defaults": {"width": 96, "height": 32}, "pictures": {"fit": "crop"}},
    "made smaller": {"pictures": {"max_side": 48}},
    "continued": {"task": "outpaint", "defaults": {"left": 32, "top": 8, "bottom": 16}},
    "centred": {"task": "outpaint", "defaults": {"width": 160, "height": 96}},
    "smaller and continued": {"task": "outpaint", "defaults": {"left": 16}, "pictures": {"max_side": 48}},
    "enlarged": {"task": "upscale", "defaults": {"scale": 2}},
    "cut, smaller": {
        "defaults": {"width": 64, "height": 64},
        "pictures": {"fit": "crop", "max_side": 32},
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_box_moves_with_the_picture(place: Place, name: str) -> None:
    source = Image.new("RGB", (96, 64))
    source.paste("white", OBJECT)
    source.save(place.path / "a.png")
    values = {"task": "augment", "defaults": {}, **CASES[name]}
    defaults = {"prompt": "x", **values.pop("defaults")}
    config = place.config(place.write("image\na.png\n"), defaults=defaults, **values)
    place.run(config)
    [row] = place.rows()
    assert (row["source_width"], row["source_height"]) == (96, 64)
    # The fake engine draws something else: the picture that it was given, brought to the image's size as engines do.
    size = {name: value for name, value in defaults.items() if name in ("width", "height")}
    user = {"init_image": "a.png", **{k: v for k, v in defaults.items() if k in KINDS[config.task].fields}}
    planned = PlannedImage("i", "r", None, 0, "in.csv", 2, "", "x", None, 1, json.dumps(size), user=user)
    ready = Sources(config, fake.CONFIG).ready(planned)
    given = ready.request.init_image
    assert given is not None
    image = given.resize((row["width"], row["height"]), Image.Resampling.LANCZOS)
    assert np.abs(np.subtract(moved(OBJECT, row), seen(image))).max() <= 1.01
