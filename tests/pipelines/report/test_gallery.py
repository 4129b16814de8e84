"""`gallery.html`: what is in the file, and what a browser makes of it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.serve.browser import Browser, browser

from ..conftest import Place

EVIL = [
    "<script>document.title='owned'</script>",
    "</script><img src=x onerror=\"document.title='owned'\">",
    "<!-- --><svg onload=document.title='owned'>",
    "{{script}} {{data}} ${document.title='owned'}",
    "'\"><iframe src=https://example.com></iframe>\u2028\u2029",
    "]]> &lt;b&gt; \\u003cscript\\u003e",
]


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


@pytest.fixture
def page(place: Place) -> Path:
    """A finished job with ordinary and hostile prompts, a hostile column and rejected rows."""
    rows = [f"{quoted(prompt)},{quoted(prompt)},1,{2**62 + i},1" for i, prompt in enumerate(EVIL)]
    rows += [f"red circle {i},plain,{i},{i},1" for i in range(20)]
    rows += ['POISON <b>,"<i>",1,3,1', "many,plain,5,7,60"]
    place.job(
        place.write('prompt,"<b>column</b>",number,seed,n\n' + "\n".join(rows) + "\n"),
        checks={"measures": True, "near_duplicates": 2},
    )
    return place.path / "out/gallery.html"


class Elements(HTMLParser):
    """Start tags with their attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] in ("script", "style"):
            self.texts.append(data)


def data_of(page: Path) -> dict[str, Any]:
    match = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL
    )
    assert match
    loaded: dict[str, Any] = json.loads(match[1])
    return loaded


def test_prompts_are_data_and_never_markup(page: Path) -> None:
    elements = Elements(page.read_text())
    tags = [tag for tag, _ in elements.found]
    assert tags.count("script") == 2
    assert not {"iframe", "object", "embed", "link", "base"} & set(tags)
    assert tags.count("img") == 1
    for _, attributes in elements.found:
        assert not any(name.startswith("on") for name in attributes)
        assert not any(name in ("src", "href") for name in attributes)
    prompts = [image["facts"]["prompt"] for image in data_of(page)["images"]]
    assert prompts[: len(EVIL)] == EVIL


def test_nothing_but_its_own_script_and_style_may_run(page: Path) -> None:
    elements = Elements(page.read_text())
    policy = next(
        a["content"] for tag, a in elements.found if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    style, _, script = (text for text in elements.texts if text.strip())
    for name, text in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_pictures_and_numbers_survive(page: Path) -> None:
    images = data_of(page)["images"]
    for one in images:
        picture = Image.open(io.BytesIO(base64.b64decode(one["picture"])))
        assert (picture.format, picture.size) == ("WEBP", (16, 16))
    assert images[1]["facts"]["seed"] == str(2**62 + 1)  # a script would round the number
    assert images[6]["facts"]["seed"] == 0
    assert images[0]["facts"]["<b>column</b>"] == EVIL[0]
    assert "brightness" in images[0]["facts"]


def test_the_columns_shown_are_those_of_the_dataset_without_what_is_nothing_to_look_at(place: Place) -> None:
    rows = [
        {"prompt": "x", "brightness": "dim", "rating": 1.5, "few": [1, 2], "many": list(range(1000))},
        {"prompt": "y", "brightness": None, "rating": None, "few": None, "many": [1]},
    ]
    table = pa.Table.from_pylist(rows).append_column("files", pa.array([[b"abc"], [b""]]))
    pq.write_table(table, place.path / "t.parquet")
    place.job(str(place.path / "t.parquet"), checks={"measures": True})
    x, y = (image["facts"] for image in data_of(place.path / "out/gallery.html")["images"])
    assert (x["brightness"], x["rating"], x["few"]) == ("dim", 1.5, [1, 2])
    assert y["many"] == [1]
    assert not {"brightness", "rating", "few"} & y.keys(), "a number column with gaps stays one of numbers"
    assert not {"many", "files"} & x.keys()
    made = place.rows()
    assert [x["score_brightness"], y["score_brightness"]] == [row["score_brightness"] for row in made]
    card = (place.path / "out/README.md").read_text()
    assert "| `score_brightness` | mean luma" in card
    assert "| `brightness` |" not in card


def test_large_datasets_show_a_sample(place: Place) -> None:
    table = place.write("prompt,n\nx,120\n")
    place.job(table, gallery=40, contact_sheet=5, shards={"images": 100})
    place.job(table, "other", gallery=40, contact_sheet=5, shards={"images": 7})
    images = data_of(place.path / "out/gallery.html")["images"]
    assert 20 < len(images) < 60
    numbers = [int(one["id"].rpartition("-")[2]) for one in images]
    assert numbers == sorted(numbers)
    assert numbers[-1] > 80  # from all over the dataset
    assert [one["id"] for one in data_of(place.path / "other/gallery.html")["images"]] == [
        one["id"] for one in images
    ]
    assert place.job(table, "none", gallery=0).images == 120
    assert not (place.path / "none/gallery.html").exists()


def test_near_duplicates_are_marked(place: Place) -> None:
    place.job(place.write("id,prompt,seed\na,x,1\nb,x,2\nc,x,1\n"), checks={"near_duplicates": 0})
    facts = {one["id"]: one["facts"] for one in data_of(place.path / "out/gallery.html")["images"]}
    assert [facts[id]["near_duplicate"] for id in ("a-0", "b-0", "c-0")] == [False, False, True]
    assert [facts[id].get("duplicate_of") for id in facts] == [None, None, "a-0"]


def test_a_sample_is_drawn_over_the_images_that_can_be_made(place: Place) -> None:
    rows = [f"x,{0 if number % 10 else 4}\n" for number in range(100)]  # steps of 0 are not allowed
    table = place.write("prompt,steps\n" + "".join(rows))
    assert place.job(table, gallery=10, contact_sheet=0).images == 10
    assert len(data_of(place.path / "out/gallery.html")["images"]) == 10, (
        "those asked for are all that there are"
    )


def test_scores_are_plotted_without_a_gallery(place: Place) -> None:
    checks = {"measures": True}
    place.job(place.write("prompt,n\nx,9\n"), gallery=0, contact_sheet=0, checks=checks)
    tree = ElementTree.fromstring((place.path / "out/scores.svg").read_text())
    svg = "{http://www.w3.org/2000/svg}"
    charts = {one.attrib["aria-label"]: one for one in tree.iter(f"{svg}svg") if "aria-label" in one.attrib}
    assert list(charts) == ["brightness", "contrast", "sharpness"]  # blank says yes or no
    values = np.array([row["brightness"] for row in place.rows()])
    counts, _ = np.histogram(values, bins=40)
    heights = [float(bar.attrib["height"]) for bar in charts["brightness"].iter(f"{svg}rect")]
    top = max(heights)
    assert heights == pytest.approx([top * n / counts.max() for n in counts if n], abs=0.02)
    assert len({one.attrib["y"] for one in charts.values()}) == 3
    assert "(scores.svg)" in (place.path / "out/README.md").read_text()
    place.job(place.write("prompt\nx\n"), "plain")
    assert not (place.path / "plain/scores.svg").exists()
    assert "scores.svg" not in (place.path / "plain/README.md").read_text()


def test_a_job_that_grew_shows_the_same_as_one_from_the_start(place: Place) -> None:
    small = "id,prompt\n" + "".join(f"{i},x\n" for i in range(60))
    large = small + "".join(f"{i},x\n" for i in range(60, 150))
    for name, texts in (("grown", [small, large]), ("whole", [large])):
        for text in texts:
            place.job(place.write(text), name, gallery=30, contact_sheet=3, shards={"images": 30})
    assert place.bytes("grown") == place.bytes("whole")


# In a browser ----------------------------------------------------------------------------------------------


@pytest.fixture
def running(page: Path) -> Iterator[Browser]:
    """A browser, started after the job: its event loop and a job's do not go together."""
    with browser() as started:
        yield started


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_and_nothing_leaves_the_file(
    page: Path, running: Browser, scheme: str, width: int
) -> None:
    context = running.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    context.set_default_timeout(60_000)
    tab, said, asked = context.new_page(), [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: said.append(dialog.message) or dialog.dismiss())
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    cells = tab.locator("#grid .cell")
    assert cells.count() == 60
    assert tab.locator("#page").inner_text() == "page 1 of 2"
    assert tab.locator(".cell p").first.inner_text() == EVIL[0]
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 150) == (scheme == "dark")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    tab.keyboard.press("ArrowRight")
    assert cells.count() == 26
    tab.keyboard.press("/")
    tab.keyboard.type("red circle")
    assert tab.locator("#count").inner_text() == "20 of 86"
    tab.keyboard.press("Escape")
    tab.select_option("#column", "number")
    tab.locator("#filter input").first.fill("15")
    assert tab.locator("#count").inner_text() == "5 of 86"
    tab.select_option("#sort", "number")
    tab.click("#reverse")
    assert tab.locator(".cell p").first.inner_text() == "red circle 19"
    cells.first.click()
    assert tab.locator("#words").inner_text() == "red circle 19"
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#words").inner_text() == "red circle 18"
    tab.keyboard.press("Escape")
    assert not tab.locator("#view").is_visible()
    tab.fill("#search", "no such thing")
    tab.click("#clear")
    assert cells.count() == 60
    assert tab.title() == "Generated images"
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    context.close()
