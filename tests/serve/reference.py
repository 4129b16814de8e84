"""The embedded model without a service: what every dialect's pictures must be."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from diffray.model import Engine, ImageRequest, load_model


@cache
def engine() -> Engine:
    return Engine(load_model())


def made(**values: Any) -> Any:
    """Pixels [H, W, 3] of the request with these fields."""
    return np.asarray(engine().generate([ImageRequest(**values)])[0].image)
