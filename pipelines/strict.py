"""The base of every config value."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from diffray.model.errors import DiffrayError


class InvalidJob(DiffrayError, ValueError):
    """A job config or an input table is wrong as a whole; nothing was started."""


class Strict(BaseModel):
    """Values that never change and have no unknown names."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
