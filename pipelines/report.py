"""What a finished job leaves for people: a contact sheet, a dataset card, and the proof of its totals."""

from __future__ import annotations

import io
import json

import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from .commit import archive_retried, proven_totals, read_commit, read_commits
from .config import JobConfig
from .models import shown_name
from .plan import Plan
from .store import SCRATCH, Store

SUCCESS = "_diffray/SUCCESS.json"
CELL, MARGIN, CAPTION_LINES, LINE = 192, 8, 3, 14


def finish(store: Store, config: JobConfig, plan: Plan) -> dict[str, int]:
    """Prove the totals and write what depends on the whole job; the success mark comes last.

    Raises:
        AccountingError: the job is not whole.
    """
    if plan.retried:
        archive_retried(store, plan, read_commits(store, range(plan.retried)))
    totals = proven_totals(store, plan)
    if config.contact_sheet and totals["images"]:
        store.write("contact_sheet.png", contact_sheet(store, plan, config.contact_sheet))
    for leftover in store.list(SCRATCH):
        store.remove(f"{SCRATCH}/{leftover}")
    store.write("README.md", card(config, totals).encode())
    store.write(SUCCESS, (json.dumps(totals, indent=2) + "\n").encode())
    return totals


def is_finished(store: Store, plan: Plan) -> bool:
    """Whether the success mark is there, and speaks of this plan rather than of one that grew since."""
    try:
        totals = json.loads(store.read(SUCCESS))
    except FileNotFoundError:
        return False
    except ValueError:
        return False  # proving the totals again costs little
    return bool(totals.get("planned") == plan.images and totals.get("shards") == plan.shards)


def contact_sheet(store: Store, plan: Plan, count: int) -> bytes:
    """The first `count` images of the job in a grid, each above its prompt."""
    cells = _first_images(store, plan, count)
    columns = min(6, len(cells))
    width, height = CELL + MARGIN, CELL + MARGIN + CAPTION_LINES * LINE
    sheet = Image.new("RGB", (columns * width + MARGIN, -(-len(cells) // columns) * height + MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, (image, prompt) in enumerate(cells):
        left, top = MARGIN + i % columns * width, MARGIN + i // columns * height
        scale = CELL / max(image.size)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        thumb = image.resize(size, Image.Resampling.LANCZOS)
        sheet.paste(thumb, (left + (CELL - size[0]) // 2, top + (CELL - size[1]) // 2))
        for n, text in enumerate(_wrapped(prompt, font)):
            pen.text((left, top + CELL + 2 + n * LINE), text, fill="black", font=font)
    sink = io.BytesIO()
    sheet.save(sink, "PNG")
    return sink.getvalue()


def card(config: JobConfig, totals: dict[str, int]) -> str:
    """The README.md of the dataset; its header tells `datasets` where the images and the rejected rows are."""
    tables = {"default": "data/images/**" if config.encoding.layout == "files" else "data/*.parquet"}
    if not totals["images"]:
        tables = {}
    if totals["rejected"]:
        tables["rejected"] = "rejected/*.parquet"
    configs = [
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {path}"
        for name, path in tables.items()
    ]
    header = "\n".join(["---", *(["configs:", *configs] if configs else []), "tags:", "- synthetic", "---"])
    return f"""{header}

# Generated images

{totals["images"]} synthetic images made by diffray with the model `{shown_name(config.model.source)}`;
{totals["rejected"]} rows were rejected.

Every row holds all parameters that make its image again. `rejected/` says why a row has no image, and can be
fed back as input. `_diffray/` holds the plan, the commit records and the checksums.
"""


def _first_images(store: Store, plan: Plan, count: int) -> list[tuple[Image.Image, str]]:
    found: list[tuple[Image.Image, str]] = []
    for shard in range(plan.shards):
        for file in read_commit(store, shard).files:
            path = str(file["path"])
            if not file["rows"] or path.startswith("rejected/"):
                continue
            for row in pq.read_table(io.BytesIO(store.read(path))).slice(0, count - len(found)).to_pylist():
                folder = path.rpartition("/")[0]
                data = row["image"]["bytes"] if "image" in row else store.read(f"{folder}/{row['file_name']}")
                found.append((Image.open(io.BytesIO(data)).convert("RGB"), row["prompt"]))
        if len(found) >= count:
            break
    return found


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
