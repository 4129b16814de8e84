"""The contact sheet: some images of the sample in a grid, each above its prompt, as one picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ..outputs.index import Shown

NAME = "contact_sheet.png"
CELL, MARGIN, CAPTION_LINES, LINE = 192, 8, 3, 14


def contact_sheet(shown: Sequence[Shown], count: int) -> bytes:
    """A PNG file of at most `count` images, evenly chosen from those given."""
    cells = [shown[i * len(shown) // count] for i in range(count)] if len(shown) > count else shown
    columns = min(6, len(cells))
    width, height = CELL + MARGIN, CELL + MARGIN + CAPTION_LINES * LINE
    sheet = Image.new("RGB", (columns * width + MARGIN, -(-len(cells) // columns) * height + MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, cell in enumerate(cells):
        left, top = MARGIN + i % columns * width, MARGIN + i // columns * height
        image = Image.open(io.BytesIO(cell.thumbnail)).convert("RGB")
        scale = CELL / max(image.size)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        thumb = image.resize(size, Image.Resampling.LANCZOS)
        sheet.paste(thumb, (left + (CELL - size[0]) // 2, top + (CELL - size[1]) // 2))
        for n, text in enumerate(_wrapped(str(cell.facts.get("prompt", "")), font)):
            pen.text((left, top + CELL + 2 + n * LINE), text, fill="black", font=font)
    sink = io.BytesIO()
    sheet.save(sink, "PNG")
    return sink.getvalue()


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """The first lines of a caption, broken at words, cut where one word is too long."""
    lines = [""]
    for word in text[:300].split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= CELL or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    for i in range(len(lines)):
        while font.getlength(lines[i]) > CELL:
            lines[i] = lines[i][:-1]
    return lines[:CAPTION_LINES]
