"""`gallery.html`: the sample as one page that opens from disk, without any outside resource.

Thumbnails are inside as data URIs. Texts of the dataset are JSON in an inert script element and reach the page
as text only; the page's policy forbids everything else than its own style and its own script, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from ..outputs.index import Index
from .account import Refusals
from .charts import histograms, is_flag

NAME = "gallery.html"
MAX_TEXT = 2000
"""Characters of a value that are shown; a prompt may have ten times as many."""


def gallery(
    index: Index,
    totals: Mapping[str, int],
    refused: Sequence[Refusals],
    duplicates: int | None,
    models: Sequence[str],
) -> bytes:
    """The page. Its size is bounded by the sample: about 10 kB for each image."""
    style, script = _file("gallery.css"), _file("gallery.js")
    policy = (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    )
    tiles = [("images", totals["images"]), ("rejected", totals["rejected"])]
    tiles += [("near duplicates", duplicates)] if duplicates is not None else []
    tiles += [(name, int(np.nansum(values))) for name, values in index.scores.items() if is_flag(values)]
    data = {
        "summary": f"{len(index.shown):,} of {totals['images']:,}, made by diffray with {', '.join(models)}",
        "tiles": [(name, f"{value:,}") for name, value in tiles],
        "refused": [(r.stage, r.field or "", f"{r.rows:,}", _cut(r.example)) for r in refused[:50]],
        "images": [
            {
                "id": one.id,
                "picture": base64.b64encode(one.thumbnail).decode(),
                "facts": {name: _cut(value) for name, value in one.facts.items()},
            }
            for one in index.shown
        ],
    }
    filled = {
        "policy": policy,
        "style": style,
        "charts": _charts(index) + _refused(refused),
        "data": _inert(data),
        "script": script,
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda place: filled[place[1]], _file("gallery.html"))
    return page.encode("utf-8", "replace")


def _charts(index: Index) -> str:
    charts = "".join(histograms(index.scores))
    if not charts:
        return ""
    return (
        f'<details open><summary>Scores of all images</summary><div class="charts">{charts}</div></details>'
    )


def _refused(refused: Sequence[Refusals]) -> str:
    if not refused:
        return ""
    head = "<tr><th>stage</th><th>field</th><th>rows</th><th>for example</th></tr>"
    table = f'<div class="wide"><table><thead>{head}</thead><tbody id="reasons"></tbody></table></div>'
    return f"<details><summary>Rejected rows</summary>{table}</details>"


def _inert(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _cut(value: Any) -> Any:
    """A value as the page can hold it: long texts cut, integers that scripts would round as text."""
    if isinstance(value, int) and abs(value) > 2**53:
        return str(value)
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return value[:MAX_TEXT] + "…"
    return value


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
