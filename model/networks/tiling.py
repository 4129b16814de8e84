"""Run a spatial function on overlapping tiles and blend the results.

Tiles bound the memory of encoding and decoding large images. GroupNorm and attention then see a tile instead
of the image, so the result differs slightly from the untiled one; overlaps are blended linearly to hide it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OVERLAP = 0.25
"""Share of a tile that it has in common with its neighbour, as in diffusers."""


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, *, tile: int | None, scale: float) -> Tensor:
    """`function(x)` for x [N, C, H, W], in tiles of side `tile` when a side of x is larger.

    Args:
        function: maps [N, C, h, w] to [N, C', h*scale, w*scale].
        tile: side of a tile in pixels of x; None never tiles.
        scale: output pixels per input pixel; `tile` and the image must stay whole numbers under it.
    """
    height, width = x.shape[-2:]
    if tile is None or max(height, width) <= tile:
        return function(x)
    grain = max(round(1 / scale), 1)
    tile = max(tile // grain, 2) * grain
    total: Tensor | None = None
    weights: Tensor | None = None
    for top in _starts(height, tile, grain):
        for left in _starts(width, tile, grain):
            part = function(x[..., top : top + tile, left : left + tile]).float()
            if total is None or weights is None:
                size = (*part.shape[:2], round(height * scale), round(width * scale))
                total = torch.zeros(size, device=x.device)
                weights = torch.zeros((1, 1, *size[2:]), device=x.device)
            window = _ramp(part.shape[-2], x.device)[:, None] * _ramp(part.shape[-1], x.device)
            rows = slice(round(top * scale), round(top * scale) + part.shape[-2])
            columns = slice(round(left * scale), round(left * scale) + part.shape[-1])
            total[..., rows, columns] += part * window
            weights[..., rows, columns] += window
    assert total is not None
    assert weights is not None
    return (total / weights).to(x.dtype)


def _starts(length: int, tile: int, grain: int) -> list[int]:
    """Tile offsets that cover `length`; the last tile is moved back so that every tile is whole."""
    if length <= tile:
        return [0]
    stride = max(int(tile * (1 - OVERLAP)) // grain, 1) * grain
    starts = list(range(0, length - tile, stride))
    return [*starts, length - tile]


def _ramp(length: int, device: torch.device) -> Tensor:
    """Blend weights along one side: linear over the overlap, 1 in the middle, never 0."""
    edge = max(int(length * OVERLAP), 1)
    distance = torch.arange(length, device=device, dtype=torch.float32)
    distance = torch.minimum(distance, distance.flip(0)) + 1
    return (distance / edge).clamp(max=1.0)
