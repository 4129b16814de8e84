"""The page at `/` in a real browser, on the embedded model; and what it is sent with."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from urllib.error import HTTPError

import pytest
from PIL import Image, ImageStat
from playwright.sync_api import Browser, Page, Route, expect

from diffray.serve import keys
from diffray.serve.config import ServeConfig

from . import browser as web
from .live import Live, live
from .paced import paced
from .scripted import Scripted

PAGE = files("diffray.serve").joinpath("static")
ROUTES = {"index.html": "/", "docs.html": "/docs"}
BLUE = (40, 80, 220)
PHONE = {
    "viewport": {"width": 390, "height": 780},
    "has_touch": True,
    "is_mobile": True,
    "device_scale_factor": 2,
}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with web.browser() as running:
        yield running


@pytest.fixture
def page(chromium: Browser, service_app: Live) -> Iterator[Page]:
    with web.visit(chromium, service_app.url) as opened:
        yield opened


# ---- how it is sent ---------------------------------------------------------------------------------------


def test_every_file_has_strict_headers_and_is_asked_for_only_once(service_app: Live) -> None:
    for entry in PAGE.iterdir():
        address = service_app.url + ROUTES.get(entry.name, f"/page/{entry.name}")
        with urllib.request.urlopen(address) as answer:
            assert answer.read() == entry.read_bytes()
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "://" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            again = urllib.request.Request(address, headers={"if-none-match": answer.headers["etag"]})
        with pytest.raises(HTTPError) as unchanged:
            urllib.request.urlopen(again)
        assert unchanged.value.code == 304


@pytest.mark.parametrize(
    "path", ["/page/", "/page/..%2fpage.py", "/page/%2e%2e/page.py", "/page/index.html/x"]
)
def test_nothing_else_is_sent(service_app: Live, path: str) -> None:
    with pytest.raises(HTTPError) as missing:
        urllib.request.urlopen(service_app.url + path)
    assert missing.value.code == 404


def test_files_are_small_and_name_no_other_place() -> None:
    for entry in PAGE.iterdir():
        text = entry.read_text()
        assert len(text.splitlines()) < 300, entry.name
        places = set(re.findall(r"https?://[\w.]+", text)) - {
            "http://www.w3.org"
        }  # the name of SVG, no address
        assert not places, entry.name
        assert "innerHTML" not in text, entry.name


def test_pages_that_are_not_wanted_are_not_there() -> None:
    for values, missing in (({"page": False}, "/"), ({"access": {"docs": False}}, "/docs")):
        with live(ServeConfig.checked({**values, "log": "off"}), Scripted) as service:
            with pytest.raises(HTTPError) as refused:
                urllib.request.urlopen(service.url + missing)
            assert refused.value.code == 404
            other = urllib.request.urlopen(service.url + ("/docs" if missing == "/" else "/")).read()
            assert b'href="docs"' not in other


# ---- making pictures --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_picture_forms_from_previews_and_shows_what_was_asked(
    page: Page, service_app: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    paced(monkeypatch, service_app)
    page.evaluate(
        """() => {
            window.previews = new Set();
            new MutationObserver(() => previews.add(document.querySelector(".tile img")?.src))
                .observe(document.querySelector("#tiles"), {subtree: true, attributes: true, attributeFilter: ["src"]});
        }"""
    )
    web.fill(page, prompt="a large red circle on a blue background", steps=40, seed=3)
    page.click("#generate")
    expect(page.locator("#generate")).to_have_attribute("aria-disabled", "true")
    shares = []
    while page.locator("#stage").get_attribute("aria-busy") == "true":
        shares.append(page.evaluate("() => document.querySelector('.tile progress')?.position"))
        time.sleep(0.02)
    previews = page.evaluate("() => [...previews]")
    assert len([address for address in previews if (address or "").startswith("data:image/")]) >= 3
    shares = [share for share in shares if share is not None]
    assert all(a <= b for a, b in pairwise(shares))
    image = web.finished(page)
    assert image.size == (64, 64)
    red, _, blue = image.resize((8, 8)).getpixel((3, 4))  # type: ignore[misc]
    assert red > 2 * blue
    expect(page.locator(".tile figcaption")).to_contain_text("64 × 64 · 40 steps · seed 3 · embedded")
    expect(page.locator("#status")).to_have_text("Finished.")


@pytest.mark.slow
def test_controls_wait_for_what_the_service_offers(chromium: Browser, service_app: Live) -> None:
    context = chromium.new_context()
    page, held = context.new_page(), list[Route]()
    page.route("**/v1/diffray/models", lambda route: held.append(route))
    with page.expect_request("**/v1/diffray/models"):
        page.goto(service_app.url)
    expect(page.locator("#generate")).to_be_disabled()
    expect(page.locator("#prompt")).to_be_disabled()
    held[0].continue_()
    web.generate(page, "a green star", steps=2)
    assert page.locator("#steps").input_value() == "2"
    context.close()


@pytest.mark.slow
def test_several_pictures_have_their_own_seeds(page: Page) -> None:
    web.generate(page, "a green star", steps=4, n=3, seed=10)
    captions = page.locator(".tile figcaption").all_inner_texts()
    assert [re.search(r"seed (\d+)", text)[1] for text in captions] == ["10", "11", "12"]  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["button", "Escape"])
def test_cancel_frees_the_engine(page: Page, service_app: Live, how: str) -> None:
    web.fill(page, prompt="a green star", steps=1000)
    page.click("#generate")
    expect(page.locator(".tile figcaption")).to_contain_text("Step")
    assert running(service_app)
    if how == "button":
        page.click("#cancel")
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".tile figcaption")).to_contain_text(re.compile(r"Cancelled after \d+ of 1000 steps"))
    expect(page.locator("#cancel")).to_be_hidden()
    deadline = time.monotonic() + 30
    while running(service_app):
        assert time.monotonic() < deadline, "the server goes on with a picture that nobody wants"
        time.sleep(0.05)


# ---- a picture to start from ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", ["drop", "paste", "choose"])
def test_a_picture_arrives_and_the_size_follows_its_shape(page: Page, tmp_path: Path, how: str) -> None:
    image = Image.new("RGB", (300, 150), BLUE)
    if how == "choose":
        image.save(tmp_path / "p.png")
        page.set_input_files("#source-file", tmp_path / "p.png")
    else:
        web.drop(page, image, how)
    expect(page.locator("#source-view")).to_have_attribute("aria-label", "The source picture, 300 × 150")
    width, height = (int(page.locator(f"#{side}").input_value()) for side in ("width", "height"))
    assert width == pytest.approx(2 * height, rel=0.1)
    assert page.locator("#shape").input_value() == "Like the picture"
    made = web.generate(page, "a yellow circle on a blue background", strength=0.3, steps=10)
    assert made.size == (width, height)
    assert ImageStat.Stat(made).mean[2] > 120  # weak change: the blue is still there
    page.click("#source-remove")
    expect(page.locator("#source-choose")).to_be_focused()
    assert page.locator("#width").input_value() == "64"


@pytest.mark.slow
def test_painting_repaints_only_there(page: Page) -> None:
    source = Image.new("RGB", (64, 64), BLUE)
    web.drop(page, source)
    page.click("#mask-open")
    box = page.locator("#easel").bounding_box()
    assert box
    page.locator("#brush").fill("50")
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] * 0.1)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] * 0.9, steps=5)
    page.mouse.up()
    page.click("#mask-done")
    expect(page.locator("#mask-open")).to_have_text("Edit mask")
    made = web.generate(page, "a large red circle on a blue background", strength=1, seed=5)
    left, right = (made.crop(side) for side in ((0, 0, 28, 64), (34, 4, 62, 60)))
    assert left.getcolors() == [(28 * 64, BLUE)]  # kept exactly
    assert len(set(right.getdata())) > 50


@pytest.mark.slow
def test_mask_tools(page: Page) -> None:
    web.drop(page, Image.new("RGB", (64, 64), BLUE))
    page.click("#mask-open")

    def painted() -> float:
        """Share of the mask that is painted, once the painter is closed; opens it again."""
        page.click("#mask-done")
        share = page.evaluate("""() => {
            const view = document.querySelector("#source-view");
            const data = view.getContext("2d").getImageData(0, 0, view.width, view.height).data;
            return data.filter((value, at) => at % 4 === 0 && value > 90).length / (view.width * view.height);
        }""")
        page.click("#mask-open")
        return float(share)

    easel = page.locator("#easel")
    easel.click()
    dab = painted()
    assert 0 < dab < 0.2
    page.click("#mask-invert")
    assert painted() == pytest.approx(1 - dab, abs=0.05)
    page.get_by_text("Erase").click()
    easel.click(position={"x": 20, "y": 20})
    erased = painted()
    assert erased < 1 - dab
    page.get_by_text("Brush").click()
    easel.click(position={"x": 20, "y": 20})
    assert painted() > erased
    page.click("#mask-undo")
    assert painted() == pytest.approx(erased, abs=0.01)
    page.click("#mask-clear")
    assert painted() == 0
    easel.focus()  # and without a pointer
    for press in ("ArrowLeft", "ArrowUp", "Space"):
        page.keyboard.press(press)
    assert 0 < painted() < 0.2


@pytest.mark.slow
def test_a_file_that_is_no_picture_is_refused_in_place(page: Page) -> None:
    web.drop_file(page, b"not a picture", "notes.png", "image/png")
    expect(page.locator("#source-problem")).to_contain_text("“notes.png” cannot be read")
    web.drop_file(page, b"text", "notes.txt", "text/plain")
    expect(page.locator("#source-problem")).to_have_text("This is not a picture.")
    web.drop(page, Image.new("RGB", (8, 8)))
    expect(page.locator("#source-problem")).to_be_hidden()


# ---- errors -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_error_is_shown_at_its_control_and_goes_when_it_is_mended(page: Page) -> None:
    web.fill(page, prompt="a green star", width=65, steps=3)
    page.click("#generate")
    width = page.locator("#width")
    expect(page.locator("#width-problem")).to_contain_text("got 65, allowed is a multiple of")
    expect(width).to_be_focused()
    expect(width).to_have_attribute("aria-invalid", "true")
    assert page.locator("#problem").is_hidden()
    width.fill("64")
    expect(page.locator("#width-problem")).to_have_count(0)
    page.click("#generate")
    web.finished(page)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("refuse 429", r"Try again in \d+ s\.$"),
        ("refuse 503", r"^\w.+\.$"),
        ("late", r"could not be made"),
        ("fail", r"could not be made"),
    ],
)
def test_refusals_and_failures_are_told_in_words(chromium: Browser, prompt: str, words: str) -> None:
    with live(ServeConfig(log="off"), Scripted) as service, web.visit(chromium, service.url) as page:
        page.fill("#prompt", prompt)
        page.click("#generate")
        expect(page.locator("#problem")).to_have_text(re.compile(words))
        expect(page.locator("#generate")).to_have_attribute("aria-disabled", "false")
        if prompt == "late":
            expect(page.locator(".tile figcaption")).to_contain_text("Stopped after")


@pytest.mark.slow
def test_a_service_that_went_away_is_told_in_words(chromium: Browser) -> None:
    with live(ServeConfig(log="off")) as gone, web.visit(chromium, gone.url) as page:
        page.route("**/v1/**", lambda route: route.abort())
        page.fill("#prompt", "a green star")
        page.click("#generate")
        expect(page.locator("#problem")).to_contain_text("The service does not answer.")
        expect(page.locator("#generate")).to_have_attribute("aria-disabled", "false")
        page.unroute("**/v1/**")
        page.click("#generate")
        web.finished(page)
        assert page.locator("#problem").is_hidden()


@pytest.mark.slow
def test_a_prompt_is_never_markup(page: Page) -> None:
    text = '<img src="x" onerror="document.title=1"><b>star</b>'
    web.generate(page, text, steps=2)
    expect(page.locator(".tile .said")).to_have_text(text)
    assert page.title() == "diffray"


# ---- history ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_history_outlives_a_reload_and_makes_the_same_picture_again(page: Page) -> None:
    settings = {
        "steps": 7,
        "guidance_scale": 4.5,
        "sampler": "euler",
        "schedule": "karras",
        "negative_prompt": "red",
    }
    first = web.generate(page, "a green triangle on a white background", **settings)
    web.generate(page, "a yellow star", steps=3, sampler="ddim")
    page.reload()
    expect(page.locator("#history-list button")).to_have_count(2)
    page.locator("#history-list button").nth(1).click()
    page.get_by_role("button", name="Reuse settings").click()
    assert page.locator("#prompt").input_value() == "a green triangle on a white background"
    for name, value in settings.items():
        assert page.locator(f"#{name}").input_value() == str(value)
    page.click("#generate")
    expect(page.locator("#history-list button")).to_have_count(3)
    assert web.finished(page).tobytes() == first.tobytes()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename.startswith("a-green-triangle-on-a-white-background-")
    assert Image.open(download.value.path()).convert("RGB").tobytes() == first.tobytes()
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("#history-list button")).to_have_count(2)
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#history-clear")
    expect(page.locator("#history")).to_be_hidden()


@pytest.mark.slow
def test_history_keeps_the_source_and_the_mask(page: Page) -> None:
    web.drop(page, Image.new("RGB", (64, 64), BLUE))
    page.click("#mask-open")
    page.locator("#easel").click()
    page.click("#mask-done")
    web.generate(page, "a red circle", steps=4, strength=0.9)
    page.reload()
    page.locator("#history-list button").first.click()
    page.get_by_role("button", name="Reuse settings").click()
    expect(page.locator("#mask-open")).to_have_text("Edit mask")
    assert page.locator("#strength").input_value() == "0.9"
    page.get_by_role("button", name="Use as source").click()
    expect(page.locator("#mask-open")).to_have_text("Paint mask")


@pytest.mark.slow
def test_history_is_bounded(page: Page) -> None:
    kept = page.evaluate("""async () => {
        const { History } = await import("/page/history.js");
        const history = await new History().open();
        for (let i = 0; i < 90; i++) await history.add({ at: i, parameters: {}, blob: new Blob(["x"]) });
        const large = new Blob([new Uint8Array(40 * 2 ** 20)]);
        const many = (await new History().open()).entries.map(entry => entry.at);
        for (let i = 100; i < 103; i++) await history.add({ at: i, parameters: {}, blob: large });
        const few = (await new History().open()).entries.map(entry => entry.at);
        await history.clear();
        return [many, few];
    }""")
    assert kept == [list(range(89, 9, -1)), [102, 101]]


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_the_calls_that_it_shows_make_the_same_picture(page: Page, tmp_path: Path, masked: bool) -> None:
    if masked:
        web.dab(page, BLUE)
    made = web.generate(page, 'a circle that isn\'t "red" $HOME', steps=5, negative_prompt="back\\slash")
    web.check_calls(page, tmp_path, made)
    page.click("#calls-close")


@pytest.mark.slow
def test_the_documentation_shows_every_operation(chromium: Browser, service_app: Live) -> None:
    with urllib.request.urlopen(service_app.url + "/openapi.json") as answer:
        paths = json.load(answer)["paths"]
    with web.visit(chromium, service_app.url) as page:
        page.get_by_role("link", name="API documentation").click()
        shown = page.locator(".operation h3")
        expect(shown).to_have_count(sum(len(operations) for operations in paths.values()))
        native = page.locator("#post-v1-diffray-images")
        expect(native.locator("tr", has_text="guidance_rescale")).to_contain_text("number, 0 to 1")
        page.get_by_role("link", name="Make pictures").click()
        expect(page.locator("#prompt")).to_be_visible()


# ---- people -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_key_is_asked_for_and_kept_in_this_tab_only(chromium: Browser, tmp_path: Path) -> None:
    token = keys.add(tmp_path / "keys.json", "somebody")
    config = ServeConfig.checked({"access": {"keys": str(tmp_path / "keys.json")}, "log": "off"})
    with live(config) as locked:
        context = chromium.new_context()
        page = context.new_page()
        page.goto(locked.url)
        page.fill("#key-value", "wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-problem")).to_have_text("This key is not accepted.")
        page.fill("#key-value", token)
        page.keyboard.press("Enter")
        web.generate(page, "a green star", steps=2)
        page.reload()
        expect(page.locator("#sampler option").first).to_be_attached()
        expect(page.locator("#key")).to_be_hidden()
        other = context.new_page()
        other.goto(locked.url)
        expect(other.locator("#key")).to_be_visible()
        other.keyboard.press("Escape")
        expect(other.locator("#problem")).to_contain_text("The service needs an API key.")
        context.close()


@pytest.mark.slow
def test_it_works_where_site_data_is_blocked(chromium: Browser, tmp_path: Path) -> None:
    token = keys.add(tmp_path / "keys.json", "somebody")
    config = ServeConfig.checked({"access": {"keys": str(tmp_path / "keys.json")}, "log": "off"})
    blocked = """for (const area of ["localStorage", "sessionStorage", "indexedDB"])
        Object.defineProperty(window, area, { get() { throw new DOMException("Access is denied", "SecurityError"); } });
    """
    with (
        live(config) as running,
        web.visit(chromium, running.url, before=blocked, ready="#key[open]") as page,
    ):
        page.fill("#key-value", token)
        page.keyboard.press("Enter")
        expect(page.locator("#key")).to_be_hidden()
        web.generate(page, "a large red circle on a blue background", steps=2)
        web.generate(page, "a green star", steps=2)
        expect(page.locator("#problem")).to_be_hidden()


@pytest.mark.slow
def test_everything_is_reached_by_keyboard_and_focus_is_seen(page: Page) -> None:
    page.locator(".skip").focus()
    reached: list[str] = []
    for _ in range(40):
        page.keyboard.press("Tab")
        found = page.evaluate("""() => {
            const e = document.activeElement, style = getComputedStyle(e);
            const seen = style.outlineStyle !== "none" && parseFloat(style.outlineWidth);
            return [e.id, e.matches(":focus-visible") && seen];
        }""")
        if found[0] == "" and reached[-1:] == ["generate"]:
            break
        assert found[1], f"focus on {found[0]} is not seen"
        reached.append(found[0])
    wanted = ["prompt", "negative_prompt", "source-choose", "model", "shape", "width", "height", "steps",
              "guidance_scale", "sampler", "schedule", "seed", "seed-clear", "n", "generate"]  # fmt: skip
    assert [name for name in reached if name in wanted] == wanted
    page.focus("#prompt")
    page.keyboard.type("a green star")
    page.keyboard.press("Control+Enter")
    web.finished(page)


@pytest.mark.slow
def test_controls_have_names(page: Page) -> None:
    web.generate(page, "a green star", steps=2)
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, input, select, textarea, canvas, dialog")]
        .filter(e => !e.closest("[aria-hidden=true]") && e.getAttribute("aria-hidden") !== "true")
        .filter(e => !(e.labels?.length || e.getAttribute("aria-label") || e.getAttribute("aria-labelledby")
            || e.textContent.trim())).map(e => e.outerHTML)""")
    assert nameless == []


@pytest.mark.slow
def test_it_fits_a_phone_and_is_painted_by_finger(chromium: Browser, service_app: Live) -> None:
    with web.visit(chromium, service_app.url, **PHONE) as page:
        assert page.locator("#settings").get_attribute("open") is None
        web.generate(page, "a large red circle on a blue background")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        small = page.evaluate("""() => [...document.querySelectorAll("button, select, input[type=number]")]
            .filter(e => e.checkVisibility() && e.getBoundingClientRect().height < 34)
            .map(e => e.id || e.textContent)""")
        assert small == []
        page.get_by_role("button", name="Use as source").tap()
        page.locator("#mask-open").tap()
        page.locator("#easel").tap()
        page.locator("#mask-done").tap()
        expect(page.locator("#mask-open")).to_have_text("Edit mask")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(chromium: Browser, service_app: Live, scheme: str) -> None:
    with web.visit(chromium, service_app.url, color_scheme=scheme, reduced_motion="reduce") as page:
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 384) == (scheme == "light")
        web.generate(page, "a green star", steps=2)
        web.fill(page, width=65)
        page.click("#generate")
        page.locator("#width-problem").wait_for()
        page.mouse.move(0, 0)
        assert page.evaluate(CONTRAST) == []


CONTRAST = """() => {
    const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = e => {
        for (; e; e = e.parentElement) {
            const found = numbers(getComputedStyle(e).backgroundColor);
            if (found.length < 4 || found[3] === 1) return found;
        }
        return [255, 255, 255];
    };
    const failing = [];
    for (const e of document.querySelectorAll("body *")) {
        const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
        if (!own || !e.checkVisibility() || e.closest("svg, kbd, .unseen")) continue;
        const [a, b] = [light(numbers(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
        if ((a + 0.05) / (b + 0.05) < 4.5) failing.push(`${e.tagName} ${e.textContent.trim().slice(0, 30)}`);
    }
    return failing;
}"""
"""Texts whose contrast with what is behind them is below WCAG AA."""


def running(service: Live) -> bool:
    """Whether the embedded model's engine has anything to do."""
    resident = service.service.backend.residents.get("embedded")  # type: ignore[attr-defined]
    return bool(resident.engine.running or resident.engine.waiting)
