"""The figures that the benchmarks' page shows are those that are stored."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_the_page_shows_the_stored_results() -> None:
    from benchmarks.report import BEGIN, END, README, table

    shown = README.read_text().partition(BEGIN)[2].partition(END)[0]
    assert shown.strip() == table(), "python -m benchmarks.report --write"
