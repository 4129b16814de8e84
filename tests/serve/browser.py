"""The page in a real, headless Chromium; what it says on its console and asks of the network is watched."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
REFUSED = re.compile(r"Failed to load resource: the server responded with a status of [45]\d\d|net::ERR_")
"""What Chromium itself notes about a refused request; the page shows those."""
SLOW = 60_000
expect.set_options(timeout=SLOW)


def executable() -> str:
    """The installed browser; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    return found


@contextmanager
def browser() -> Iterator[Browser]:
    """A headless browser."""
    path = executable()
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=FLAGS.split())
        try:
            yield running
        finally:
            running.close()


@contextmanager
def visit(
    running: Browser, url: str, before: str = "", ready: str = "#sampler option", **context: Any
) -> Iterator[Page]:
    """The page in a fresh profile, once something is there. At the end: nothing on its console, no request to
    anywhere else. `before` is a script that runs before its own.
    """
    where = (
        running.new_context(viewport={"width": 1280, "height": 900}, **context)
        if ("viewport" not in context)
        else running.new_context(**context)
    )
    where.set_default_timeout(SLOW)
    page = where.new_page()
    said: list[str] = []
    outside: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"exception: {error}"))
    page.on("request", lambda r: None if r.url.startswith((url, "blob:", "data:")) else outside.append(r.url))
    try:
        page.add_init_script(before)
        page.goto(url)
        page.locator(ready).first.wait_for(state="attached")
        yield page
        assert [text for text in said if not REFUSED.search(text)] == []
        assert outside == []
    finally:
        where.close()


def generate(page: Page, prompt: str, **fields: object) -> Image.Image:
    """Fill the form, press the button, wait for the finished picture."""
    fill(page, prompt=prompt, **fields)
    page.click("#generate")
    return finished(page)


def fill(page: Page, **fields: object) -> None:
    """Type into the form's controls."""
    for name, value in fields.items():
        control = page.locator(f"#{name}")
        if control.evaluate("e => e.tagName") == "SELECT":
            control.select_option(str(value))
        else:
            control.fill(str(value))


def finished(page: Page) -> Image.Image:
    """The picture on the stage, once it is finished, as the browser shows it."""
    page.locator("#stage[aria-busy=false] .tile .tools").first.wait_for()
    script = """async image => {
        await image.decode();
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        canvas.getContext("2d").drawImage(image, 0, 0);
        return canvas.toDataURL("image/png");
    }"""
    address = page.locator(".tile img").first.evaluate(script)
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB")


def drop(page: Page, image: Image.Image, how: str = "drop", name: str = "picture.png") -> None:
    """Drop or paste a picture onto the page, as a hand would."""
    sink = io.BytesIO()
    image.save(sink, "PNG")
    drop_file(page, sink.getvalue(), name, "image/png", how)


def drop_file(page: Page, data: bytes, name: str, media: str, how: str = "drop") -> None:
    """Drop or paste any file."""
    script = """([text, name, type, how]) => {
        const carried = new DataTransfer();
        const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
        carried.items.add(new File([bytes], name, { type }));
        const event = how === "drop"
            ? new DragEvent("drop", { dataTransfer: carried, bubbles: true, cancelable: true })
            : new ClipboardEvent("paste", { clipboardData: carried, bubbles: true, cancelable: true });
        document.querySelector("#source-choose").dispatchEvent(event);
    }"""
    page.evaluate(script, [base64.b64encode(data).decode(), name, media, how])


def dab(page: Page, colour: Any = "blue") -> None:
    """A source picture of one colour, with a dab of mask on it."""
    drop(page, Image.new("RGB", (64, 64), colour))
    page.click("#mask-open")
    page.locator("#easel").click()
    page.click("#mask-done")


def check_calls(page: Page, folder: Path, made: Image.Image) -> None:
    """Every call that the page shows for its picture `made` makes the same one, run as it stands in `folder`."""
    page.get_by_role("button", name="API call").click()
    for offered in page.locator("#calls-files button").all():
        with page.expect_download() as download:
            offered.click()
        download.value.save_as(folder / download.value.suggested_filename)
    for kind in page.locator("#calls-kinds label").all():
        kind.click()
        code = page.locator("#calls-code").inner_text()
        program = [sys.executable, "-c"] if "Python" in kind.inner_text() else ["bash", "-c"]
        done = subprocess.run([*program, code], cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{code}\n{done.stderr}"
        assert Image.open(folder / "picture.png").convert("RGB").tobytes() == made.tobytes(), code
        (folder / "picture.png").unlink()
