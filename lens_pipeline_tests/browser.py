"""Headless Chromium. Screenshots go to build/screenshots."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium")
QUIET = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
SCREENSHOTS = Path(__file__).parents[1] / "build" / "screenshots"


@contextmanager
def chromium() -> "Iterator[Browser]":
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        expect.set_options(timeout=90_000)
        yield browser
        browser.close()


@contextmanager
def photographed(browser: "Browser", name: str) -> "Iterator[Page]":
    """A page that knows nothing of others, photographed at the end."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    found = browser.new_page(viewport={"width": 1500, "height": 1000})
    found.set_default_timeout(90_000)
    yield found
    found.screenshot(path=SCREENSHOTS / f"{name}.png")
    found.close()


@pytest.fixture
def page(request: pytest.FixtureRequest) -> "Iterator[Page]":
    """A page, photographed at the end of the test."""
    with chromium() as browser, photographed(browser, request.node.name) as found:
        yield found
