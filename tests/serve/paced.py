"""An engine that waits for those who listen to it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from diffray.model import flight

from .live import Live


def paced(monkeypatch: pytest.MonkeyPatch, running: Live) -> None:
    """No step is made before the last one was told and read: a service leaves out what a busy machine is late for."""
    original = flight.advance

    def advance(bucket: Any, *more: Any) -> None:
        made, end = sum(slot.ticket.step for slot in bucket.slots), time.monotonic() + 60
        while time.monotonic() < end:
            views = [view for mine in list(running.service._running.values()) for view in list(mine)]
            if not views or (sum(view.step for view in views) >= made and not any(v.unread for v in views)):
                break
            time.sleep(0.001)
        original(bucket, *more)

    monkeypatch.setattr(flight, "advance", advance)
