"""An automatic judge: which colours and shapes are where in a picture, and does that answer the caption?

It looks at pixels only: the background is the border's median colour, objects are connected regions that
differ from it, a region's colour is the nearest named one and its shape the best-overlapping template.
On pictures drawn by `scenes.draw` it is right almost always (tested), so what it says of generated pictures
is about the pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .scenes import COLOURS, RELATIONS, SHAPES, SIDE, SIZES, Scene, polygon

TEMPLATE = 32
MIN_AREA = 40
DIFFERENCE = 45.0
"""RGB distance from the background above which a pixel belongs to an object."""
LARGE = (SIZES["small"][1] + SIZES["large"][0]) / 2


@dataclass(frozen=True, slots=True)
class Found:
    """One object seen in a picture; `extent` is half of its larger side in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    extent: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What of a caption a picture answers; None where the caption asks nothing."""

    count: bool
    colour: bool
    shape: bool
    relation: bool | None
    size: bool | None
    background: bool | None

    @property
    def right(self) -> bool:
        """Colour, shape and, for two objects, relation are as asked."""
        return self.count and self.colour and self.shape and self.relation is not False


def look(image: Image.Image) -> tuple[str, list[Found]]:
    """The background's colour and the objects of a picture, largest first."""
    pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
    border = np.concatenate(
        [pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)]
    )
    background = np.median(border, axis=0)
    regions = _regions(np.linalg.norm(pixels - background, axis=-1) > DIFFERENCE)
    found = []
    for region in sorted(regions, key=lambda r: -int(r.sum())):
        colour = np.median(pixels[_eroded(region)], axis=0)
        # Half-way between object and background is the true edge of an antialiased object.
        edge = np.linalg.norm(colour - background) / 2
        mask = region & (np.linalg.norm(pixels - background, axis=-1) > edge)
        if mask.sum() < MIN_AREA:
            continue
        rows, columns = np.nonzero(mask)
        extent = max(np.ptp(rows), np.ptp(columns)) / 2 + 0.5
        centre = ((columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2)
        found.append(Found(_nearest(colour), _shape(mask), float(centre[0]), float(centre[1]), float(extent)))
    return _nearest(background), found


def judge(scene: Scene, image: Image.Image) -> Verdict:
    """Compare a picture with the scene that its caption asked for."""
    background, found = look(image)
    wanted = list(scene.things)
    count = len(found) == len(wanted)
    named = (background == scene.background) if scene.background_named else None
    if not count:
        asked = [None if value is None else False for value in (scene.relation, scene.size)]
        return Verdict(False, False, False, asked[0], asked[1], named)
    if scene.relation:
        dx, dy = RELATIONS[scene.relation]
        found.sort(key=lambda f: -(f.x * dx + f.y * dy))
        swapped = found[::-1]
        # The relation is right when the objects match the caption better in this order than in the other.
        relation = _matches(wanted, found) >= _matches(wanted, swapped) and _apart(found, dx, dy)
        if not relation:
            found = swapped
    else:
        relation = None
    size = None if scene.size is None else (found[0].extent > LARGE) == (scene.size == "large")
    return Verdict(
        True,
        all(w.colour == f.colour for w, f in zip(wanted, found, strict=True)),
        all(w.shape == f.shape for w, f in zip(wanted, found, strict=True)),
        relation,
        size,
        named,
    )


def _matches(wanted: list, found: list[Found]) -> int:  # type: ignore[type-arg]
    return sum((w.colour == f.colour) + (w.shape == f.shape) for w, f in zip(wanted, found, strict=True))


def _apart(found: list[Found], dx: int, dy: int) -> bool:
    """The objects lie along the asked axis rather than across it."""
    x, y = abs(found[0].x - found[1].x), abs(found[0].y - found[1].y)
    return x > y if dx else y > x


def _nearest(colour: NDArray[np.float32]) -> str:
    return min(COLOURS, key=lambda name: float(np.linalg.norm(colour - np.array(COLOURS[name]))))


def _regions(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """4-connected regions of at least MIN_AREA pixels."""
    left = mask.copy()
    regions = []
    for start in zip(*np.nonzero(mask), strict=True):
        if not left[start]:
            continue
        region = np.zeros_like(mask)
        stack = [start]
        left[start] = False
        while stack:
            row, column = stack.pop()
            region[row, column] = True
            for r, c in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if 0 <= r < mask.shape[0] and 0 <= c < mask.shape[1] and left[r, c]:
                    left[r, c] = False
                    stack.append((r, c))
        if region.sum() >= MIN_AREA:
            regions.append(region)
    return regions


def _eroded(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    inner = region.copy()
    inner[1:] &= region[:-1]
    inner[:-1] &= region[1:]
    inner[:, 1:] &= region[:, :-1]
    inner[:, :-1] &= region[:, 1:]
    return inner if inner.any() else region


def _shape(mask: NDArray[np.bool_]) -> str:
    """The template with the largest overlap (intersection over union) after scaling to the bounding box."""
    rows, columns = np.nonzero(mask)
    box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    scaled = np.asarray(Image.fromarray(box).resize((TEMPLATE, TEMPLATE), Image.Resampling.BILINEAR)) > 0
    return max(SHAPES, key=lambda shape: _overlap(scaled, _template(shape)))


def _overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float((a & b).sum() / (a | b).sum())


@cache
def _template(shape: str) -> NDArray[np.bool_]:
    points = np.array(polygon(shape, 0.0, 0.0, 1.0))
    low, high = points.min(axis=0), points.max(axis=0)
    scaled = (points - low) / (high - low) * (TEMPLATE - 1)
    canvas = Image.new("1", (TEMPLATE, TEMPLATE))
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in scaled], fill=1)
    return np.asarray(canvas, dtype=bool)
