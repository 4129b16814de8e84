"""The page's list of adapters in a real browser, on the embedded model with LoRA files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from diffray.serve.config import ServeConfig

from . import browser as web
from .live import Live, live
from .loras import write_lora

pytestmark = pytest.mark.slow
PHONE = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    place = tmp_path_factory.mktemp("loras")
    names = ["ink 2.0", "watercolour", "a-name-so-long-that-it-needs-more-than-one-line_v1.5-000012"]
    sources = {name: str(write_lora(place / f"{i}.safetensors", i)) for i, name in enumerate(names)}
    some = {"watercolour": sources["watercolour"]}
    models = {"embedded": {"adapters": sources}, "some": {"adapters": some}, "bare": {}}
    with live(ServeConfig.checked({"models": models, "log": "off"})) as running:
        yield running


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with web.browser() as running:
        yield running


@pytest.fixture
def page(chromium: Browser, service: Live) -> Iterator[Page]:
    with web.visit(chromium, service.url) as opened:
        yield opened


def wear(page: Page, name: str, weight: str) -> None:
    page.get_by_role("checkbox", name=name).check()
    page.get_by_label(f"Weight of {name}").fill(weight)


def test_they_change_the_picture_and_are_kept_in_history(page: Page) -> None:
    plain = web.generate(page, "a red circle", steps=4, seed=3)
    wear(page, "watercolour", "-0.8")
    worn = web.generate(page, "a red circle")
    assert worn.tobytes() != plain.tobytes()
    expect(page.locator(".tile figcaption")).to_contain_text("embedded with watercolour -0.8")
    page.get_by_role("checkbox", name="watercolour").uncheck()
    expect(page.get_by_label("Weight of watercolour")).to_be_hidden()
    assert web.generate(page, "a red circle").tobytes() == plain.tobytes()
    page.reload()
    expect(page.locator("#history-list button")).to_have_count(3)
    page.locator("#history-list button").nth(1).click()
    page.get_by_role("button", name="Reuse settings").click()
    expect(page.get_by_role("checkbox", name="watercolour")).to_be_checked()
    assert page.get_by_label("Weight of watercolour").input_value() == "-0.8"
    page.click("#generate")
    expect(page.locator("#history-list button")).to_have_count(4)
    assert web.finished(page).tobytes() == worn.tobytes()
    page.reload()  # what was asked last is in the form again
    expect(page.get_by_role("checkbox", name="watercolour")).to_be_checked()
    page.locator("#history-list button").last.click()
    page.get_by_role("button", name="Reuse settings").click()
    expect(page.get_by_role("checkbox", name="watercolour")).not_to_be_checked()


def test_the_list_is_that_of_the_model(page: Page) -> None:
    wear(page, "watercolour", "0.5")
    wear(page, "ink", "0.5")
    web.fill(page, model="some")
    expect(page.locator("#adapter-list li")).to_have_count(1)
    assert page.get_by_label("Weight of watercolour").input_value() == "0.5"
    web.generate(page, "a star", steps=2)
    web.fill(page, model="bare")
    expect(page.locator("#adapters")).to_be_hidden()
    web.generate(page, "a star", steps=2)
    expect(page.locator(".tile figcaption")).not_to_contain_text("watercolour")


def test_mistakes_are_told_at_the_list(page: Page) -> None:
    wear(page, "watercolour", "")
    page.fill("#prompt", "a star")
    page.click("#generate")
    expect(page.locator("#adapters-problem")).to_have_text("The weight of watercolour is not a number.")
    page.get_by_label("Weight of watercolour").fill("11")
    expect(page.locator("#adapters-problem")).to_have_count(0)
    page.click("#generate")
    expect(page.locator("#adapters-problem")).to_contain_text("less than or equal to 10")
    page.get_by_label("Weight of watercolour").fill("1")
    web.generate(page, "a star", steps=2)
    page.route("**/v1/diffray/models", lambda route: route.fulfill(json=without(route.fetch().json())))
    page.reload()
    page.locator("#history-list button").first.click()
    page.get_by_role("button", name="Reuse settings").click()
    expect(page.locator("#adapters-problem")).to_have_text("This model does not have watercolour.")


def without(catalogue: dict[str, list[dict[str, object]]]) -> dict[str, list[dict[str, object]]]:
    """The catalogue of a service that has lost its adapters."""
    return catalogue | {"models": [model | {"adapters": []} for model in catalogue["models"]]}


@pytest.mark.parametrize("masked", [False, True])
def test_the_calls_that_it_shows_have_them(page: Page, tmp_path: Path, masked: bool) -> None:
    if masked:
        web.dab(page)
    wear(page, "watercolour", "0.8")
    wear(page, "ink", "-1")
    made = web.generate(page, "a circle", steps=4)
    web.check_calls(page, tmp_path, made)


def test_by_keyboard_alone(page: Page) -> None:
    page.focus("#model")
    for press in ("Tab", "Space", "Tab"):
        page.keyboard.press(press)
    page.keyboard.press("Control+A")
    page.keyboard.type("0.7")
    page.keyboard.press("Control+Enter")
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    web.finished(page)
    expect(page.locator(".tile figcaption")).to_contain_text("0.7")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(chromium: Browser, service: Live, scheme: str) -> None:
    with web.visit(chromium, service.url, **PHONE, color_scheme=scheme) as page:
        page.locator("#settings summary").tap()
        page.get_by_text("a-name-so-long").tap()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        outside = page.evaluate("""() => [...document.querySelectorAll("#adapter-list li")].filter(line => {
            const box = line.getBoundingClientRect();
            return [...line.querySelectorAll("span, input")].filter(e => e.checkVisibility()).some(e => {
                const own = e.getBoundingClientRect();
                return own.top < box.top || own.bottom > box.bottom || own.right > box.right;
            });
        }).length""")
        assert outside == 0
