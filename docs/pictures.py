"""Make the README's pictures from a home that a run has filled: `python -m docs.pictures`.

Needs Chromium and the development dependencies.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from playwright.sync_api import Page, sync_playwright

from lens_pipeline.cli import main
from lens_pipeline.runner import settings_of_home
from lens_pipeline.serve import pages
from lens_pipeline.settings import Settings

FOLDER = Path(__file__).with_name("pictures")
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
GROUPS = ("data", "training", "ensemble")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def contact_sheet(settings: Settings) -> None:
    """The newest dataset's contact sheet."""
    found = settings.home.glob("pictures/*/cutouts.jpg")
    newest = max(found, key=lambda path: path.stat().st_mtime)
    shutil.copyfile(newest, FOLDER / "cutouts.jpg")


def kinds() -> None:
    """What is simulated, as LSST would see it."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name, "simulated")
        main(
            ["simulate", "--survey", "lsst", "--n", "600", "--image-size", "64", "--out", str(out)]
        )
        shutil.copyfile(out / "kinds.jpg", FOLDER / "kinds.jpg")


def trials(settings: Settings) -> None:
    """A small study on the newest shards."""
    with tempfile.TemporaryDirectory() as name:
        short = ["--arch", "lastro", "--epochs", "3", "--trials", "12"]
        main(["tune", "--home", str(settings.home), "--out", name, *short])
        shutil.copyfile(Path(name, "trials.png"), FOLDER / "trials.png")


def candidates(settings: Settings) -> None:
    """The page of the best of a simulated field, with some grades."""
    with tempfile.TemporaryDirectory() as name:
        field, scores = Path(name, "field"), Path(name, "scores.parquet")
        main(["simulate", "--n", "300", "--seed", "9", "--out", str(field)])
        of_field = ["--catalogue", str(field / "catalogue.parquet"), "--out", str(scores)]
        main(["predict", "--home", str(settings.home), *of_field, "--top", "60"])
        with browser(1300, 640) as page:
            page.goto(Path(name, "scores.top.html").as_uri())
            for grade in "ABAXC":
                page.keyboard.press(grade)
            page.wait_for_timeout(1000)  # until all is drawn
            page.screenshot(path=FOLDER / "inspection.png")


@contextmanager
def browser(width: int, height: int) -> Iterator[Page]:
    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, CHROMIUM)))
        opened = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield opened.new_page(viewport={"width": width, "height": height})
        opened.close()


def asset_graph(address: str) -> None:
    """The whole graph, every group open, as Dagster's lineage page shows it."""
    groups = ",".join(f"global@global:{name}" for name in GROUPS)
    with browser(1750, 640) as page:
        page.goto(f"{address}/asset-groups/?expanded={quote(groups)}")
        page.get_by_text("cutout_catalogue").first.wait_for(timeout=60_000)
        page.get_by_text("Hide navigation").click()
        page.wait_for_timeout(3000)  # it moves into place
        page.screenshot(path=FOLDER / "asset_graph.png")


def checks(address: str) -> None:
    """The gate's check, with the figures that it judged; after a run of the preset for tests, with
    why no champion comes of it."""
    with browser(1500, 800) as page:
        page.goto(f"{address}/assets/ensemble_evaluation?view=checks")
        page.get_by_text("passes_the_gate").first.click(timeout=60_000)
        page.get_by_text("Hide navigation").click()
        page.wait_for_timeout(3000)
        page.screenshot(path=FOLDER / "checks.png")


if __name__ == "__main__":
    settings = settings_of_home(None)
    settings.export()
    FOLDER.mkdir(exist_ok=True)
    contact_sheet(settings)
    kinds()
    trials(settings)
    candidates(settings)
    with pages(settings, 3000, 5000) as served:
        asset_graph(served.addresses["Dagster"])
        checks(served.addresses["Dagster"])
