"""One image as the plan has it: what a shard of the plan holds of it, and what its worker starts from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from diffray.model.request import ImageRequest


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """One image of the plan: what to make, or why it cannot be made (then `reason` is set)."""

    id: str
    row_id: str
    variant: str | None
    index: int
    file: str
    line: int
    model: str = ""
    """Name of its model among the job's `models`."""
    prompt: str | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    parameters: str | None = None
    """All other request fields, as JSON."""
    work: float = 0.0
    """Pixels times steps, as far as the plan can know."""
    field: str | None = None
    reason: str | None = None
    original: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    """The row's own request values as text; kept only for rejected rows, whose values fit no column."""
    user: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The task's own fields, references to source pictures, and the columns that diffray does not know."""
    source_stamps: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Column of `user` to the stamp of the file that it names by path, as it was when this was planned."""

    @property
    def request(self) -> ImageRequest | None:
        """What to make, but for its source pictures; None for a rejected row."""
        if self.parameters is None:
            return None
        own: dict[str, Any] = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "seed": self.seed,
        }
        return ImageRequest(**_decoded(self.parameters), **own)


@lru_cache(maxsize=1024)
def _decoded(parameters: str) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(parameters).items()}
