"""The dataset card, README.md: metadata that the Hugging Face Hub and `datasets` read, and a page for people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import DatasetCardData

from ..config import JobConfig
from .account import Refusals
from .charts import NAME as CHARTS
from .duplicates import NAME as DUPLICATES

NAME = "README.md"
SIZES = {
    1_000: "n<1K",
    10_000: "1K<n<10K",
    100_000: "10K<n<100K",
    1_000_000: "100K<n<1M",
    10_000_000: "1M<n<10M",
    100_000_000: "10M<n<100M",
}
OPENING = {
    "parquet": "Every row has the image in the column `image`, and all parameters that make it again.",
    "files": "Images are files below `data/images/`, each folder with a table of all parameters that make them again.",
    "latents": "Every row has the latents of an image in the column `latents`, and their shape and type beside it.",
    "webdataset": "The tars in `data/` hold three files of each image: the picture, its parameters (`.json`) and its "
    "prompt (`.txt`).",
}
COLUMNS = {
    "blank": "all pixels are one colour",
    "brightness": "mean luma, 0 to 1",
    "contrast": "standard deviation of luma, 0 to 0.5",
    "sharpness": "variance of the Laplacian of luma",
    "phash": "perceptual hash, 64 bits in hex; alike pictures differ in few bits",
    "clip_score": "100 times the cosine between the CLIP embeddings of prompt and picture",
    "nsfw": "flagged by Stable Diffusion's safety checker",
    "nsfw_score": "its nearest concept's similarity above the threshold",
}


def card(
    config: JobConfig,
    models: Sequence[str],
    totals: Mapping[str, int],
    refused: Sequence[Refusals],
    scores: Sequence[str],
    duplicates: int | None,
    charts: bool = False,
) -> str:
    """The whole file. It holds no times and no places: the same dataset has the same card."""
    images = totals["images"]
    data = DatasetCardData(
        license=config.license,
        pretty_name="Generated images",
        task_categories=["text-to-image"],
        size_categories=[next((name for most, name in SIZES.items() if images < most), "n>1T")]
        if images
        else None,
        annotations_creators=["machine-generated"],
        tags=[
            "synthetic",
            "diffray",
            "image",
            *(["webdataset"] if config.encoding.layout == "webdataset" else []),
        ],
        configs=_configs(config, totals, duplicates) or None,
    )
    parts = [f"---\n{data.to_yaml()}\n---", "# Generated images", _summary(models, totals)]
    if images:
        pictures = ["![Some of the images](contact_sheet.png)"] if config.contact_sheet else []
        pages = ["[gallery.html](gallery.html) shows more; download it and open it in a browser."]
        shown = [*pictures, *(pages if config.gallery else [])] if config.task != "encode" else []
        parts += [*shown, OPENING["latents" if config.task == "encode" else config.encoding.layout]]
    if scores:
        lines = [f"| `{name}` | {COLUMNS.get(name, 'by a scorer of the job')} |" for name in scores]
        parts += ["## Scores", "\n".join(["| column | meaning |", "| --- | --- |", *lines])]
        parts += [f"![How they are spread]({CHARTS})"] if charts else []
    if duplicates is not None:
        bits = config.checks.near_duplicates
        parts.append(
            f"Near duplicates: {duplicates:,}. Their `phash` differs by at most {bits} bits from that of an earlier "
            f"image, which `{DUPLICATES}` names; leave them out by a join on `id`."
        )
    if refused:
        parts += ["## Rejected rows", _table(refused)]
        parts.append("`rejected/` says of every such row why it has no image, and can be fed back as input.")
    parts += ["## How it was made", _provenance(config)]
    return "\n\n".join(parts) + "\n"


def _configs(config: JobConfig, totals: Mapping[str, int], duplicates: int | None) -> list[dict[str, Any]]:
    place = {"files": "data/images/**", "webdataset": "data/*.tar", "parquet": "data/*.parquet"}
    tables = {"default": place[config.encoding.layout]} if totals["images"] else {}
    if totals["rejected"]:
        tables["rejected"] = "rejected/*.parquet"
    if duplicates:
        tables["duplicates"] = DUPLICATES
    return [
        {"config_name": name, "data_files": [{"split": "train", "path": path}]}
        for name, path in tables.items()
    ]


def _summary(models: Sequence[str], totals: Mapping[str, int]) -> str:
    names = ", ".join(f"`{_code(name)}`" for name in models)
    return (
        f"{totals['images']:,} synthetic images made by diffray with {names}; "
        f"{totals['rejected']:,} rows were rejected."
    )


def _table(refused: Sequence[Refusals]) -> str:
    lines = ["| stage | field | rows | for example |", "| --- | --- | ---: | --- |"]
    for one in refused[:20]:
        lines.append(f"| {one.stage} | {one.field or ''} | {one.rows:,} | {_cell(one.example)} |")
    return "\n".join(lines)


def _provenance(config: JobConfig) -> str:
    fields = ", ".join(f"`{_code(name)}` {_cell(str(value))}" for name, value in config.defaults.items())
    adapters = sorted({name for options in config.every_model.values() for name in options.adapters})
    names = ", ".join(f"`{_code(name)}`" for name in adapters)
    return (
        f"Task `{config.task}`, job seed {config.seed}"
        + (f", by default {fields}" if fields else "")
        + (f". Adapters that its column `adapters` may name: {names}" if names else "")
        + ". Every image file says itself how it was made and that it is synthetic (infotext, IPTC digital source "
        "type). `_diffray/` holds the plan, one commit record per shard and the checksums of all files."
    )


def _cell(text: str) -> str:
    """Any text as plain text in a cell of a Markdown table."""
    shown = " ".join(text[:200].split())
    for character in "\\`*_{}[]<>|#&!~":
        shown = shown.replace(character, f"&#{ord(character)};")
    return shown


def _code(text: str) -> str:
    """Any text between backticks."""
    return " ".join(re.sub(r"[`|<>]", "'", text[:200]).split())
