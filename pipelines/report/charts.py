"""Small charts as SVG text, readable in light and dark. No library: a bar chart is rectangles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

NAME = "scores.svg"
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 320, 120, 8, 18, 22
STYLE = (
    "<style>text{font:11px system-ui,sans-serif;fill:#57606a}.t{font-weight:600;fill:#24292f}"
    ".b{fill:#3b82f6}.l{stroke:#d0d7de}"
    "@media(prefers-color-scheme:dark){text{fill:#9198a1}.t{fill:#e6edf3}.b{fill:#60a5fa}.l{stroke:#3d444d}}</style>"
)
"""What a chart needs where no page gives its classes a style."""


def histogram(title: str, values: NDArray[np.float64], bins: int = 40) -> str:
    """How a column's values are spread; NaN counts as missing and is told below."""
    known = values[np.isfinite(values)]
    missing = len(values) - len(known)
    if not len(known):
        return _chart(title, [], "no values", "", "")
    low, high = float(known.min()), float(known.max())
    counts, _ = np.histogram(known, bins=bins if high > low else 1)
    middle = f"median {number(float(np.median(known)))}" + (f", {missing:,} missing" if missing else "")
    return _chart(title, counts.tolist(), number(low), middle, number(high))


def histograms(columns: Mapping[str, NDArray[np.float64]]) -> list[str]:
    """One for each column but those that say yes or no, where a count tells all."""
    return [histogram(name, values) for name, values in columns.items() if not is_flag(values)]


def is_flag(values: NDArray[np.float64]) -> bool:
    """Whether a column says yes or no."""
    return bool(np.isin(values[np.isfinite(values)], (0, 1)).all())


def stacked(charts: Sequence[str]) -> str:
    """Charts below each other, as a file of its own."""
    parts = [
        f'<svg y="{i * HEIGHT}" width="{WIDTH}" height="{HEIGHT}"{chart.removeprefix("<svg")}'
        for i, chart in enumerate(charts)
    ]
    size = f'viewBox="0 0 {WIDTH} {len(charts) * HEIGHT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{STYLE}{"".join(parts)}</svg>'


def bars(title: str, heights: Sequence[float], left: str, middle: str, right: str) -> str:
    """A row of bars over an axis with three captions, as a file of its own."""
    return _chart(title, heights, left, middle, right, alone=True)


def number(value: float) -> str:
    """A number as people write it: four digits, thousands with commas."""
    if not math.isfinite(value):
        return "none"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _chart(
    title: str, heights: Sequence[float], left: str, middle: str, right: str, *, alone: bool = False
) -> str:
    top, room = max(heights, default=0) or 1, HEIGHT - TOP - BOTTOM
    step = (WIDTH - 2 * LEFT) / max(1, len(heights))
    rectangles = "".join(
        f'<rect class="b" x="{LEFT + i * step:.2f}" y="{HEIGHT - BOTTOM - room * height / top:.2f}" '
        f'width="{max(step - 1, 0.5):.2f}" height="{room * height / top:.2f}"/>'
        for i, height in enumerate(heights)
        if height > 0
    )
    base, line = HEIGHT - BOTTOM, HEIGHT - 5
    xml = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
    return (
        f'<svg{xml} viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{STYLE if alone else ''}"
        f'<text class="t" x="{LEFT}" y="14">{escape(title)}</text>{rectangles}'
        f'<line class="l" x1="{LEFT}" y1="{base}" x2="{WIDTH - LEFT}" y2="{base}"/>'
        f'<text x="{LEFT}" y="{line}">{escape(left)}</text>'
        f'<text x="{WIDTH / 2:g}" y="{line}" text-anchor="middle">{escape(middle)}</text>'
        f'<text x="{WIDTH - LEFT}" y="{line}" text-anchor="end">{escape(right)}</text></svg>'
    )
