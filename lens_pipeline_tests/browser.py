"""Headless Chromium. Screenshots go to build/screenshots."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = shutil.which("chromium")
QUIET = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
SCREENSHOTS = Path(__file__).parents[1] / "build" / "screenshots"


@pytest.fixture
def page(request: pytest.FixtureRequest) -> "Iterator[Page]":
    """A page, photographed at the end of the test."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    from playwright.sync_api import expect, sync_playwright

    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        found = browser.new_page(viewport={"width": 1500, "height": 1000})
        found.set_default_timeout(90_000)
        expect.set_options(timeout=90_000)
        yield found
        found.screenshot(path=SCREENSHOTS / f"{request.node.name}.png")
        browser.close()
