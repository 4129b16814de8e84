"""The columns of a job's tables that are diffray's own, with their types."""

from __future__ import annotations

import pyarrow as pa

from .tasks import LATENTS as LATENTS_FACTS
from .tasks import PICTURE_FIELDS
from .values import REQUEST_COLUMNS

Columns = dict[str, pa.DataType]

ID: Columns = {"id": pa.string(), "row_id": pa.string(), "variant": pa.string(), "index": pa.int64()}
"""Which image: its own id, that of its row, the combination of swept values (null without), its number."""
PLACE: Columns = {"file": pa.string(), "line": pa.int64()}
TEXTS: Columns = {"prompt": pa.string(), "negative_prompt": pa.string()}
PLAN: Columns = {
    **ID,
    **PLACE,
    "model": pa.string(),
    **TEXTS,
    "seed": pa.int64(),
    "parameters": pa.string(),
    "field": pa.string(),
    "reason": pa.string(),
    "original": pa.string(),
    "source_stamps": pa.string(),
}
"""`parameters` holds all other request fields as JSON: they are the same in most rows of a job; `source_stamps`
what the files that it is made from were like when it was planned."""
MADE: Columns = {"sha256": pa.string(), "model": pa.string(), "model_checksum": pa.string()}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
LATENTS: Columns = {"latents": pa.binary(), **LATENTS_FACTS}
"""Bytes in C order and little endian; as numpy: frombuffer(latents, latents_dtype).reshape(latents_shape).

They are in the scale of the denoising network: the autoencoder's own, minus its shift, times `latents_scale`.
"""
VERDICT: Columns = {"stage": pa.string(), "field": pa.string(), "reason": pa.string(), "attempts": pa.int64()}
SOURCE_COLUMN = {"latents": "source_latents"}
"""Columns of references that are not named like their field, because the job's output has one of that name."""


FRAME: Columns = {
    "source_width": pa.int64(),
    "source_height": pa.int64(),
    "source_box": pa.list_(pa.float64()),
}
"""The size of the source picture, and where the whole of it lies in the image: left, top, right, bottom in pixels."""


def digest_of(column: str) -> str:
    """The column with the SHA-256 of the sources that `column` refers to."""
    return f"{column}_sha256"


OWN_COLUMNS = frozenset(
    [
        *ID,
        *PLACE,
        *PLAN,
        *MADE,
        *LATENTS,
        *FRAME,
        *VERDICT,
        *REQUEST_COLUMNS,
        "image",
        "file_name",
        "image_bytes",
        *(digest_of(SOURCE_COLUMN.get(name, name)) for name in (*PICTURE_FIELDS, "latents")),
    ]
)
"""A user's column of such a name is carried as `input_...`; so is one of a field that the job reads."""
