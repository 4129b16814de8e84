"""What a worker counts of its images and of its engine's time."""

from __future__ import annotations

import pytest

from diffray.pipelines.making import tally as tally_module
from diffray.pipelines.making.tally import Tally


def test_a_tally_integrates_how_full_the_engine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(tally_module.time, "monotonic", lambda: clock[0])
    tally = Tally(slots=4)
    clock[0] += 5  # idle
    tally.begin(7)
    with tally.inside("engine"), tally.inside("engine"):
        clock[0] += 3
    tally.made(7, {})
    tally.rejected(7, "generate")
    with tally.inside("engine", 9):
        clock[0] += 1
        reading = tally.reading()
    assert (reading.up, reading.busy, reading.filled) == (9.0, 4.0, 3 * 2 + 1 * 4)
    assert reading.occupancy == pytest.approx(10 / 16)
    assert (reading.images, reading.rejected, reading.uncommitted) == (1, {"generate": 1}, {7: (1, 1)})
    assert reading.inside == {"engine": 9}
    assert reading.first_image == 3.0
    tally.end(7)
    assert tally.reading().uncommitted == {}
