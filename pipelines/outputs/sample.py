"""The sample of a dataset that people look at: about as many images as the job asks for, evenly drawn.

Whether an image is in it depends on its id and the size of the whole alone. A job that grew draws again, and
the images of the smaller sample are among those of the larger one, so their thumbnails are there already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from ..config import JobConfig
from ..hashing import text_hash
from .plan import Plan


@dataclass(frozen=True, slots=True)
class Sample:
    """The ids whose hash is below `share` of all hashes."""

    share: float

    @classmethod
    def of(cls, config: JobConfig, plan: Plan | None) -> Self:
        """The sample for gallery and contact sheet, drawn over what the plan does not itself reject."""
        images = plan.images - plan.rejected if plan else 0
        return cls(max(config.gallery, 2 * config.contact_sheet) / max(1, images))

    def __contains__(self, image_id: object) -> bool:
        return text_hash(str(image_id)) < self.share * 2**64
