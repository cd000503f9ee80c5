"""The pages as people use them, in a real browser."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import Page, expect

from lens_pipeline.cli import main
from lens_pipeline_tests.object_stores import free_ports
from lens_pipeline_tests.served import Served, until

GROUPS = {
    "data": ["cutout_catalogue", "processed_dataset", "lens_shards", "cloud_shards"],
    "training": ["checkpoints/light_transformer", "checkpoints/lastro"],
    "ensemble": ["lens_ensemble", "ensemble_evaluation", "registered_ensemble"],
}
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def served(
    home: Path, of_all_workers: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A home that the main job has filled, with `lens-pipeline show`."""
    folder = tmp_path_factory.mktemp("browser")
    own = Path(shutil.copytree(of_all_workers / "untouched", folder / "home"))
    with Served(own, folder / "log") as found:
        assert f"Dagster  {found.dagster}" in found.log
        assert f"MLflow   {found.mlflow}" in found.log
        yield found


def test_a_home_is_served_once(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """Two daemons would launch each run twice."""
    ports = [str(port) for port in free_ports(2)]
    command = ["show", "--home", str(served.home)]
    assert main([*command, "--dagster-port", ports[0], "--mlflow-port", ports[1]]) == 2
    assert f"{served.home} is served already, at {served.dagster}; " in capsys.readouterr().err
    assert served.answers()


def test_every_asset_is_in_the_graph_in_its_group(served: Served, page: Page) -> None:
    for group, assets in GROUPS.items():
        page.goto(f"{served.dagster}/locations/lens_pipeline/asset-groups/{group}")
        page.get_by_text("List").first.click()
        for asset in assets:
            expect(page.locator(f"a[href*='/assets/{asset}']").first).to_be_visible()
        for other in GROUPS.keys() - {group}:
            for asset in GROUPS[other]:
                expect(page.locator(f"a[href*='/assets/{asset}']")).to_have_count(0)
    everything = ",".join(f"global@global:{group}" for group in GROUPS)
    page.set_viewport_size({"width": 1750, "height": 640})  # what is outside is not drawn
    page.goto(f"{served.dagster}/asset-groups/?expanded={quote(everything)}")
    for assets in GROUPS.values():
        for asset in assets:
            name = asset.rpartition("/")[2]
            whole_or_shortened = re.compile(f"^({name}|{name[:6]}.*{name[-6:]})$")
            expect(page.get_by_text(whole_or_shortened).first).to_be_visible()


def test_an_asset_is_made_by_a_click_and_shows_its_picture_and_its_table(
    served: Served, page: Page
) -> None:
    before = {run["runId"] for run in served.runs()}
    page.goto(f"{served.dagster}/assets/processed_dataset")
    page.get_by_role("button", name="Materialize").first.click()
    (run,) = until(
        lambda: [run for run in served.runs() if run["runId"] not in before], 60, "a run"
    )
    assert served.ended(run["runId"], 180)["status"] == "SUCCESS", served.messages(run["runId"])
    page.reload()
    expect(page.locator(f"a[href*='{run['runId']}']").first).to_be_visible()
    page.get_by_text("[Show Markdown]").first.click()
    picture = page.locator("img[src^='data:image/']").first
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.naturalWidth") > 300


def test_learning_curves_are_shown_with_their_table(served: Served, page: Page) -> None:
    page.goto(f"{served.dagster}/assets/checkpoints/lastro")
    page.get_by_text("[Show Markdown]").first.click()
    picture = page.locator("img[src^='data:image/png']").first
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.naturalWidth") > 300


def test_a_failed_check_is_seen_with_its_reason(served: Served, page: Page) -> None:
    page.goto(f"{served.dagster}/assets/ensemble_evaluation?view=checks")
    page.get_by_text("passes_the_gate").first.click()
    expect(page.get_by_text("Failed").first).to_be_visible()
    expect(page.get_by_text("at least 50 are needed").first).to_be_visible()


def test_the_schedule_is_switched_on_by_a_click(served: Served, page: Page) -> None:
    status = """query ($on: ScheduleSelector!) { scheduleOrError(scheduleSelector: $on) {
        ... on Schedule { scheduleState { status } } } }"""
    on = {
        **{"repositoryName": "__repository__", "repositoryLocationName": "lens_pipeline"},
        "scheduleName": "weekly_retraining",
    }

    def is_on() -> bool:
        state = served.ask(status, on=on)["scheduleOrError"]["scheduleState"]["status"]
        return bool(state == "RUNNING")

    assert not is_on()
    page.goto(f"{served.dagster}/locations/lens_pipeline/schedules/weekly_retraining")
    page.locator("label:has(input[type=checkbox])").first.click()
    until(is_on, 30, "the schedule is on")
    expect(page.get_by_text("At 03:00 AM").first).to_be_visible()


def test_mlflow_shows_the_version_with_its_alias(served: Served, page: Page) -> None:
    page.goto(f"{served.mlflow}/#/models/lens_ensemble/versions/1")
    expect(page.get_by_text("lens.dataset_version")).to_be_visible()
    expect(page.get_by_text("challenger").first).to_be_visible()


def test_a_report_fits_on_paper_and_on_a_telephone(home: Path, page: Page) -> None:
    (report,) = home.glob("reports/*/report.html")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 698, "height": 1000})  # A4 between its margins
    page.goto(report.as_uri())
    cut = "() => [...document.querySelectorAll('*')].filter(e => e.scrollWidth > innerWidth).length"
    assert page.evaluate(cut) == 0
    assert page.context.browser is not None
    with page.context.browser.new_context(
        is_mobile=True, viewport={"width": 400, "height": 800}
    ) as telephone:
        held = telephone.new_page()
        held.goto(report.as_uri())
        assert held.evaluate("innerWidth") == 400
