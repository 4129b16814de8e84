"""README.md: metadata that the Hub takes, and a page that no value can break."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from huggingface_hub import DatasetCard, DatasetCardData
from huggingface_hub.repocard_data import DatasetCardData as Parsed

from diffray.pipelines import JobConfig
from diffray.pipelines.config import Task
from diffray.pipelines.report.account import Refusals
from diffray.pipelines.report.card import card

from ..conftest import Place


@pytest.mark.parametrize("layout", ["parquet", "files", "webdataset"])
def test_the_hub_reads_the_metadata(place: Place, layout: str) -> None:
    place.job(
        place.write("prompt,n\nx,5\nPOISON,1\n"),
        encoding={"layout": layout},
        checks={"measures": True, "near_duplicates": 64 // 8},
        license="cc0-1.0",
    )
    path = place.path / "out/README.md"
    found: DatasetCardData | Parsed = DatasetCard.load(path).data
    assert found.license == "cc0-1.0"
    assert found.task_categories == ["text-to-image"]
    assert found.size_categories == ["n<1K"]
    assert found.annotations_creators == ["machine-generated"]
    assert {"synthetic", "diffray"} <= set(found.tags)
    configs = {c["config_name"]: c["data_files"][0]["path"] for c in found.configs}
    tables = {"rejected", "duplicates"} if layout == "parquet" else set()  # all configs are files of one kind
    assert configs.keys() == {"default"} | tables
    for pattern in configs.values():
        assert list((place.path / "out").glob(pattern.replace("**", "**/*"))), pattern


@pytest.mark.parametrize(
    ("images", "size"), [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (2_500_000, "1M<n<10M")]
)
def test_size_categories(images: int, size: str) -> None:
    config = JobConfig.checked({"input": "a", "output": "b"})
    text = card(config, ["m"], {"images": images, "rejected": 0}, [], {}, None)
    assert DatasetCard(text).data.size_categories == [size]


def of_task(task: Task, **values: Any) -> str:
    config = JobConfig.checked({"input": "a", "output": "b", "task": task, **values})
    return card(config, ["m"], {"images": 3, "rejected": 0}, [], {}, None)


@pytest.mark.parametrize("task", get_args(Task))
def test_a_card_says_of_its_task_what_is_true(task: Task) -> None:
    text = of_task(task)
    found = DatasetCard(text).data
    known: dict[Task, list[str] | None] = {
        "generate": ["text-to-image"],
        "encode": None,
        "decode": None,
    }
    assert found.task_categories == known.get(task, ["image-to-image"])
    latents = task == "encode"
    assert ("synthetic" in text) == (not latents), "latents of somebody's pictures are not"
    assert ("machine-generated" in text) == (not latents)
    assert ("Every image file says itself" in text) == (not latents)
    assert ("job seed" in text) == (task not in ("encode", "decode")), "what takes no noise has none"
    assert text.count(found.pretty_name) == 2, "as the title too"
    assert f"Task `{task}`" in text


def test_no_two_tasks_read_alike() -> None:
    pages = [of_task(task).split("\n---\n")[1] for task in get_args(Task)]
    assert len({page.partition("## How")[0] for page in pages}) == len(pages)


def test_the_card_says_how_rows_became_images() -> None:
    plain = of_task("generate")
    for word in ("emplate", "weep", "per prompt"):
        assert word not in plain
    strengths = {"from": 0.3, "to": 0.7, "step": 0.2}
    text = of_task(
        "augment",
        templates={"prompt": "a photo of {label}, {weather}"},
        sweep={"weather": ["rain", "deep snow"], "strength": strengths, "seed": list(range(50))},
        images_per_prompt=3,
    )
    for said in (
        "3 images per prompt",
        "`prompt` comes from the template `a photo of {label}, {weather}`",
        "every combination of `weather` rain, deep snow; `strength` 0.3, 0.5, 0.7; `seed` 0, 1, 2, ",
        "... (50 values)",
    ):
        assert said in text


def test_an_empty_dataset_has_a_valid_card(place: Place) -> None:
    place.job(place.write("prompt\nPOISON\n"))
    found = DatasetCard.load(place.path / "out/README.md").data
    assert [c["config_name"] for c in found.configs] == ["rejected"]
    assert not (place.path / "out/gallery.html").exists()
    assert not (place.path / "out/contact_sheet.png").exists()


def test_no_value_breaks_the_page() -> None:
    evil = "a | b ` c\n---\n# title <script>x</script> [l](http://x) ![i](y) *b* _i_ &amp; ~~s~~"
    names = {"defaults": {"prompt": evil}, "templates": {"prompt": evil}, "sweep": {evil: [evil]}}
    config = JobConfig.checked({"input": "a", "output": "b", **names})
    refused = [Refusals("plan", "prompt", 3, evil)]
    text = card(config, [evil], {"images": 1, "rejected": 3}, refused, {"score": "score"}, None)
    assert text.count("\n---\n") == 1  # the end of the header
    body = re.sub(r"`[^`\n]*`", "", text.split("\n---\n")[1])  # what stands between backticks is plain text
    assert "<script" not in body
    assert "](http" not in body
    row = next(line for line in body.splitlines() if line.startswith("| plan"))
    assert row.count("|") == 5
    assert yaml.safe_load(text.split("---\n")[1])["tags"]


def test_the_card_says_what_the_columns_mean(place: Place) -> None:
    place.job(place.write("prompt,seed\nx,1\ny,1\n"), checks={"measures": True, "near_duplicates": 4})
    text = Path(place.path / "out/README.md").read_text()
    for column in ("brightness", "contrast", "sharpness", "phash"):
        assert f"| `{column}` |" in text
    assert "Near duplicates: 1." in text
