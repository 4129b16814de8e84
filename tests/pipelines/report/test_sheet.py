"""The contact sheet: which images are on it, and where."""

from __future__ import annotations

import io

from PIL import Image

from diffray.pipelines.outputs.index import Shown, thumbnail
from diffray.pipelines.report.sheet import CAPTION_LINES, CELL, LINE, MARGIN, contact_sheet

from ..conftest import Place


def test_the_images_on_it_are_evenly_chosen_and_in_order() -> None:
    """Each image is a gray of its own, as bright as its number."""
    grays = [Image.new("L", (64, 32), 10 * number) for number in range(20)]
    shown = [Shown(str(i), thumbnail(gray), {"prompt": "p"}) for i, gray in enumerate(grays)]
    sheet = Image.open(io.BytesIO(contact_sheet(shown, 7)))
    assert sheet.size == (6 * 200 + 8, 2 * (200 + 3 * 14) + 8)
    found = []
    for cell in range(7):
        left, top = (
            MARGIN + cell % 6 * (CELL + MARGIN),
            MARGIN + cell // 6 * (CELL + MARGIN + CAPTION_LINES * LINE),
        )
        red, _, _ = sheet.getpixel((left + CELL // 2, top + CELL // 2))
        found.append(round(red / 10))
    assert found == [0, 2, 5, 8, 11, 14, 17]


def test_a_job_has_one_unless_it_wants_none(place: Place) -> None:
    table = place.write(f"prompt,n\n{'word ' * 100 + 'x' * 500},3\nq,20\n")
    place.job(table, contact_sheet=7)
    assert Image.open(place.path / "out/contact_sheet.png").size == (6 * 200 + 8, 2 * (200 + 3 * 14) + 8)
    place.job(table, "none", contact_sheet=0)
    assert not (place.path / "none/contact_sheet.png").exists()
