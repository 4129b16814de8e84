"""The dataset card, README.md: metadata that the Hugging Face Hub and `datasets` read, and a page for people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
from huggingface_hub import DatasetCardData

from ..config import JobConfig, Task
from ..options import Range
from .account import Refusals
from .charts import NAME as CHARTS
from .duplicates import NAME as DUPLICATES

NAME = "README.md"
SHOWN = 12
"""Values of a sweep."""
SIZES = {
    1_000: "n<1K",
    10_000: "1K<n<10K",
    100_000: "10K<n<100K",
    1_000_000: "100K<n<1M",
    10_000_000: "1M<n<10M",
    100_000_000: "10M<n<100M",
}


class About(NamedTuple):
    """What a card says of a task: its title, its name on the Hub if it has one there, and what was made."""

    title: str
    category: str | None
    made: str


ABOUT: dict[Task, About] = {
    "generate": About(
        "Generated images", "text-to-image", "{images} synthetic images made by diffray with {models}"
    ),
    "augment": About(
        "Varied images",
        "image-to-image",
        "{images} variants of given pictures, made by diffray with {models}",
    ),
    "inpaint": About(
        "Inpainted images", "image-to-image", "{images} pictures partly painted anew by diffray with {models}"
    ),
    "outpaint": About(
        "Outpainted images", "image-to-image", "{images} pictures continued by diffray with {models}"
    ),
    "edit": About("Edited images", "image-to-image", "{images} pictures changed by diffray with {models}"),
    "upscale": About(
        "Upscaled images", "image-to-image", "{images} pictures enlarged by diffray with {models}"
    ),
    "encode": About(
        "Latents of images",
        None,
        "Latents of {images} pictures, made by diffray with the autoencoder of {models}",
    ),
    "decode": About(
        "Decoded images",
        None,
        "{images} pictures made of latents by diffray with the autoencoder of {models}",
    ),
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
    "phash": "perceptual hash, 64 bits in hex; similar pictures differ in few bits",
    "clip_score": "100 times the cosine between the CLIP embeddings of prompt and picture",
    "nsfw": "flagged by Stable Diffusion's safety checker",
    "nsfw_score": "similarity to the checker's nearest concept less its threshold; above 0 is flagged",
}


def card(
    config: JobConfig,
    models: Sequence[str],
    totals: Mapping[str, int],
    refused: Sequence[Refusals],
    scores: Mapping[str, str],
    duplicates: int | None,
    charts: bool = False,
    members: pa.Schema | None = None,
) -> str:
    """The whole file. It holds no times and no places: the same dataset has the same card.

    Args:
        scores: name to column, which may have another name where the input has one of that name.
        members: what the JSON in tars holds: `datasets` would guess it by the first images.
    """
    images, about, latents = totals["images"], ABOUT[config.task], config.task == "encode"
    info = {"features": _features(config, members)} if members is not None and images else None
    data = DatasetCardData(
        license=config.license,
        pretty_name=about.title,
        task_categories=[about.category] if about.category else None,
        size_categories=[next((name for most, name in SIZES.items() if images < most), "n>1T")]
        if images
        else None,
        annotations_creators=None if latents else ["machine-generated"],
        tags=[
            *(["diffray", "latents"] if latents else ["synthetic", "diffray", "image"]),
            *(["webdataset"] if config.encoding.layout == "webdataset" else []),
        ],
        configs=_configs(config, totals, duplicates) or None,
        dataset_info=info,
    )
    parts = [f"---\n{data.to_yaml()}\n---", f"# {about.title}", _summary(about, models, totals)]
    if images:
        pictures = ["![Some of the images](contact_sheet.png)"] if config.contact_sheet else []
        pages = ["[gallery.html](gallery.html) shows more; download it and open it in a browser."]
        shown = [*pictures, *(pages if config.gallery else [])] if not latents else []
        parts += [*shown, OPENING["latents" if latents else config.encoding.layout]]
    if scores:
        lines = [
            f"| `{column}` | {COLUMNS.get(name, 'by a scorer of the job')} |"
            for name, column in scores.items()
        ]
        parts += ["## Scores", "\n".join(["| column | meaning |", "| --- | --- |", *lines])]
        parts += [f"![How they are spread]({CHARTS})"] if charts else []
    if duplicates is not None:
        bits, column = config.checks.near_duplicates, scores.get("phash", "phash")
        parts.append(
            f"Near duplicates: {duplicates:,}. Their `{column}` differs by at most {bits} bits from that of an earlier "
            f"image, whose `id` is in the column `duplicate_of` of `{DUPLICATES}`: it has a row for every image, in "
            "the order of the data files."
        )
    if refused:
        parts += ["## Rejected rows", _table(refused)]
        parts.append("`rejected/` says of every such row why it has no image, and can be fed back as input.")
    parts += ["## How it was made", _provenance(config)]
    return "\n\n".join(parts) + "\n"


def _configs(config: JobConfig, totals: Mapping[str, int], duplicates: int | None) -> list[dict[str, Any]]:
    """What `load_dataset` finds by name; it reads all of a dataset's configs as files of one kind."""
    layout, images = config.encoding.layout, totals["images"]
    place = {"files": "data/images/**", "webdataset": "data/*.tar", "parquet": "data/*.parquet"}
    tables = {"default": place[layout]} if images else {}
    if layout == "parquet" or not images:
        if totals["rejected"]:
            tables["rejected"] = "rejected/*.parquet"
        if duplicates is not None and images:
            tables["duplicates"] = DUPLICATES
    return [
        {"config_name": name, "data_files": [{"split": "train", "path": path}]}
        for name, path in tables.items()
    ]


def _features(config: JobConfig, members: pa.Schema) -> list[dict[str, Any]]:
    """The columns of tars by the names and types of `datasets`."""
    return [
        {"name": config.encoding.extension, "dtype": "image"},
        {"name": "json", "struct": [{"name": field.name, **_feature(field.type)} for field in members]},
        *({"name": name, "dtype": "string"} for name in ("txt", "__key__", "__url__")),
    ]


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """The type of a value that went through JSON, which has no times, decimals or bytes."""
    if isinstance(kind, pa.BaseExtensionType):
        return _feature(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _feature(kind.value_type)
    if pa.types.is_struct(kind):
        return {"struct": [{"name": field.name, **_feature(field.type)} for field in kind]}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return {"list": _feature(kind.value_type)}
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return {"dtype": str(kind)}
    return {"dtype": "float64" if pa.types.is_floating(kind) else "string"}


def _summary(about: About, models: Sequence[str], totals: Mapping[str, int]) -> str:
    names = ", ".join(f"`{_code(name)}`" for name in models)
    made = about.made.format(images=f"{totals['images']:,}", models=names)
    return f"{made}; {totals['rejected']:,} rows were rejected."


def _table(refused: Sequence[Refusals]) -> str:
    lines = ["| stage | field | rows | for example |", "| --- | --- | ---: | --- |"]
    for one in refused[:20]:
        lines.append(f"| {one.stage} | {one.field or ''} | {one.rows:,} | {_cell(one.example)} |")
    return "\n".join(lines)


def _provenance(config: JobConfig) -> str:
    said = [f"Task `{config.task}`"]
    if config.task not in ("encode", "decode"):  # they draw no noise
        said.append(f"job seed {config.seed}")
    if config.defaults:
        said.append("by default " + ", ".join(_named(n, [value]) for n, value in config.defaults.items()))
    sentences = [", ".join(said)]
    sentences += [
        f"`{_code(n)}` comes from the template `{_code(text)}`" for n, text in config.templates.items()
    ]
    if config.sweep:
        lists = "; ".join(_named(name, _values(swept)) for name, swept in config.sweep.items())
        sentences.append(f"Every row in every combination of {lists}")
    if config.images_per_prompt > 1:
        sentences.append(
            f"{config.images_per_prompt} images per prompt, unless a row's column `n` says otherwise"
        )
    if adapters := sorted({name for options in config.every_model.values() for name in options.adapters}):
        names = ", ".join(f"`{_code(name)}`" for name in adapters)
        sentences.append(f"Adapters that a row's column `adapters` may name: {names}")
    if config.task != "encode":
        sentences.append(
            "Every image file says itself how it was made and that it is synthetic (infotext, IPTC digital source type)"
        )
    sentences.append("`_diffray/` holds the plan, one commit record per shard and the checksums of all files")
    return ". ".join(sentences) + "."


def _named(name: str, values: Sequence[Any]) -> str:
    """The first values of a field, and their number where these are not all."""
    shown = ", ".join(_cell(str(value)) for value in values[:SHOWN])
    return f"`{_code(name)}` {shown}" + (f", ... ({len(values)} values)" if len(values) > SHOWN else "")


def _values(swept: Sequence[Any] | Range) -> Sequence[Any]:
    return swept.values() if isinstance(swept, Range) else swept


def _cell(text: str) -> str:
    """Any text as plain text in a cell of a Markdown table."""
    shown = " ".join(_cut(text).split())
    for character in "\\`*_{}[]<>|#&!~":
        shown = shown.replace(character, f"&#{ord(character)};")
    return shown


def _code(text: str) -> str:
    """Any text between backticks."""
    return " ".join(re.sub(r"[`|<>]", "'", _cut(text)).split())


def _cut(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."
