"""The part of a job's config that says how prompts and pictures are checked; `scores.py` does it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from diffray.model.judges.checks import PromptFilter
from diffray.model.request import ImageRequest

from .strict import Strict

MEASURES = {
    "blank": "bool",
    "brightness": "float",
    "contrast": "float",
    "sharpness": "float",
    "phash": "text",
}
NETWORKS = {"clip_score": "float", "nsfw": "bool", "nsfw_score": "float"}
RESERVED = (
    "id",
    "row_id",
    "index",
    "image",
    "file_name",
    "sha256",
    "model",
    "model_checksum",
    "thumbnail",
    "shown",
)
"""Columns that a job's own scorers cannot have."""


def _terms(value: Any) -> Any:
    """A block-list, read from its file if it is a path."""
    if not isinstance(value, str):
        return value
    try:
        return PromptFilter.terms(value)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read: {error}") from None


def _usable(terms: tuple[str, ...]) -> tuple[str, ...]:
    PromptFilter(terms)
    return terms


Terms = Annotated[
    tuple[str, ...],
    BeforeValidator(_terms, json_schema_input_type=str | list[str]),
    AfterValidator(_usable),
]


class Scorer(Strict):
    """A scorer of one's own: code that looks at every picture and says something about it."""

    call: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")
    """"package.module:name" of a function `(image, request) -> mapping`, or of a class whose objects are called so.

    Workers import it, so it has to be installed, or on PYTHONPATH, where they run.
    """
    columns: dict[str, Literal["float", "int", "bool", "text"]] = Field(min_length=1)
    """What it answers: column names and types."""
    options: dict[str, Any] = Field(default={})
    """Keyword arguments of every call of a function; of a class, those that make its one object."""
    on_error: Literal["null", "reject"] = "null"
    """What becomes of an image on which it fails: its columns stay empty, or the image is rejected."""


class Checks(Strict):
    """What is looked at in every prompt and picture; answers become columns, what is refused is a rejected row."""

    block: Terms = ()
    """Words and phrases that no prompt may contain, or the path of a file with one per line."""
    blank: Literal["reject", "keep"] = "reject"
    """What becomes of a picture of one single colour. "keep" is for prompts that ask for it."""
    blank_tolerance: int = Field(default=0, ge=0, le=255)
    """Levels that each channel of a blank picture may still span."""
    measures: bool = False
    """Columns `blank`, `brightness`, `contrast`, `sharpness` and `phash`."""
    near_duplicates: int | None = Field(default=None, ge=0, le=10)
    """Column `phash`, and for images that differ by at most this many of its 64 bits from an earlier one the column
    `duplicate_of`. 4 finds re-encoded and slightly changed pictures, above 10 unlike ones appear. `duplicate_of` is in
    a file of its own, `duplicates.parquet`, with a row for every image: a shard's bytes must not depend on others."""
    clip: str | None = None
    """Path, URL or hub id of a CLIP model (a folder, safetensors): column `clip_score`, prompt against picture."""
    safety: str | None = None
    """The same for Stable Diffusion's safety checker: columns `nsfw` and `nsfw_score`. Pictures are never changed."""
    flagged: Literal["keep", "reject"] = "keep"
    """What becomes of a picture that the safety checker flags."""
    scorers: tuple[Scorer, ...] = ()
    """Scorers of one's own, in the order they are asked."""
    limits: dict[str, tuple[float | None, float | None]] = Field(default={})
    """Column to the least and the most that its value may be (null: any). A picture outside is rejected, one without
    a value passes."""

    @property
    def of_pictures(self) -> list[str]:
        """The keys that have every picture looked at, as far as they are switched on."""
        keys = ("measures", "near_duplicates", "clip", "safety", "scorers")
        return [key for key in keys if getattr(self, key) != type(self).model_fields[key].default]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        own = [name for scorer in self.scorers for name in scorer.columns]
        taken = {*MEASURES, *NETWORKS, *RESERVED, *ImageRequest.__dataclass_fields__}
        double = sorted({n for n in own if own.count(n) > 1 or n in taken})
        if double:
            raise ValueError(f"scorers: columns {', '.join(double)} are there already")
        numbers = {n for s in self.scorers for n, kind in s.columns.items() if kind in ("float", "int")}
        needs = {n: "measures: true" for n, kind in MEASURES.items() if kind == "float" and not self.measures}
        needs |= {} if self.clip else {"clip_score": "clip"}
        needs |= {} if self.safety else {"nsfw_score": "safety"}
        numbers |= {n for n, kind in (MEASURES | NETWORKS).items() if kind == "float"} - needs.keys()
        if off := sorted(needs.keys() & self.limits.keys() - numbers):
            raise ValueError(f"limits: {off[0]} needs {needs[off[0]]}")
        if unknown := sorted(self.limits.keys() - numbers):
            raise ValueError(
                f"limits: no number columns {', '.join(unknown)}, there are {', '.join(sorted(numbers)) or 'none'}"
            )
        if self.flagged == "reject" and not self.safety:
            raise ValueError("flagged: reject needs safety")
        return self
