"""Where a source picture lies in the image that is made from it, so that its boxes and masks can be moved along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..options import Pictures


@dataclass(frozen=True, slots=True)
class Frame:
    """The place of a whole source picture on a canvas, which is what the image shows, at whatever size.

    Attributes:
        source: its width and height in pixels, upright.
        box: left, top, right and bottom of it as shares of the canvas: 0 to 1, outside of that where it is cut off.
    """

    source: tuple[int, int]
    box: tuple[float, float, float, float]

    @classmethod
    def of(
        cls,
        source: tuple[int, int],
        kept: Sequence[int],
        size: tuple[int, int],
        offset: tuple[int, int],
        canvas: tuple[int, int],
    ) -> Frame:
        """The frame of a source of which the part `kept` (left, top, width, height) was brought to `size` and put
        at `offset` on a canvas."""
        edges = []
        for axis in (0, 1):
            scale = size[axis] / kept[2 + axis]
            begin = offset[axis] - kept[axis] * scale
            edges.append((begin / canvas[axis], (begin + source[axis] * scale) / canvas[axis]))
        (left, right), (top, bottom) = edges
        return cls(source, (left, top, right, bottom))

    def columns(self, width: int, height: int) -> dict[str, Any]:
        """What the rows of a dataset say about it, for an image of this size."""
        sides = (width, height, width, height)
        return {
            "source_width": self.source[0],
            "source_height": self.source[1],
            "source_box": [round(share * side, 3) for share, side in zip(self.box, sides, strict=True)],
        }


def kept(
    size: tuple[int, int], rules: Pictures, width: int | None, height: int | None
) -> tuple[int, int, int, int]:
    """Left, top, width and height of what is used of a picture for an image of `width` x `height`."""
    whole = (0, 0, *size)
    if rules.fit != "crop" or not (width and height):
        return whole
    shape = width / height
    if size[0] / size[1] > shape:
        wide = max(round(size[1] * shape), 1)
        return (size[0] - wide) // 2, 0, wide, size[1]
    high = max(round(size[0] / shape), 1)
    return 0, (size[1] - high) // 2, size[0], high
