"""Services under test: real HTTP on a free loopback port, on the embedded model or on a fake backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from diffray.serve.config import ServeConfig

from .live import Live, live


@pytest.fixture(scope="session")
def service_app() -> Iterator[Live]:
    """The embedded model, everything at its default."""
    with live(ServeConfig(log="off")) as running:
        yield running
