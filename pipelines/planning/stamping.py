"""Stamps of the files that images are made from, taken when these are planned."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from ..config import JobConfig
from ..inputs.references import Reference, parsed_reference
from ..inputs.sources import source_columns
from ..inputs.stamps import Stamps
from ..terms.image import PlannedImage

BATCH = 1000
"""Images whose source files are looked at together."""


def stamped(images: Iterator[PlannedImage], config: JobConfig, stamps: Stamps) -> Iterator[PlannedImage]:
    """The images, each with the stamps of its source files as they are now.

    Raises:
        JobError: the storage does not answer.
    """
    columns = source_columns(config).values()
    while batch := list(islice(images, BATCH)):
        named = [_files(image.user, columns) if image.reason is None else {} for image in batch]
        found = stamps.of(path for paths in named for path in paths.values())
        for image, paths in zip(batch, named, strict=True):
            own = {column: known for column, path in paths.items() if (known := found[path])}
            yield replace(image, source_stamps=own) if own or image.source_stamps else image


def _files(values: Mapping[str, Any], columns: Collection[str]) -> dict[str, str]:
    """Column to path of what is a file of its own; cells and members belong to files of the input.

    A cell may name a file instead of holding its bytes (`{"bytes": null, "path": ...}`). Planning does not look into
    cells, so only the digest in the finished row tells what such a file was.
    """
    texts = {column: values.get(column) for column in columns}
    return {
        column: text
        for column, text in texts.items()
        if isinstance(text, str) and not isinstance(text, Reference) and parsed_reference(text) == text
    }
