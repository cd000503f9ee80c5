"""The pages in a real browser, and MLflow on a real PostgreSQL."""

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lens_pipeline.cli import main
from lens_pipeline_tests.conftest import LENS_PIPELINE
from lens_pipeline_tests.object_stores import free_ports
from lens_pipeline_tests.postgres import PASSWORD

CHROMIUM = shutil.which("chromium")
QUIET = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.fixture
def pages(own_home: Path, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Addresses of Dagster and MLflow, served by `lens-pipeline show`."""
    ports = free_ports(2)
    command = [LENS_PIPELINE, "show", "--home", str(own_home)]
    command += ["--dagster-port", str(ports[0]), "--mlflow-port", str(ports[1])]
    with (tmp_path / "show.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        begun = time.monotonic()
        while "Ctrl-C" not in (said := (tmp_path / "show.log").read_text()):
            assert server.poll() is None, said
            assert time.monotonic() - begun < 120, said
            time.sleep(0.2)
        dagster, mlflow = (f"http://127.0.0.1:{port}" for port in ports)
        assert f"Dagster  {dagster}" in said
        assert f"MLflow   {mlflow}" in said
        yield dagster, mlflow
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 0


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_pages_show_the_run_its_pictures_and_the_model(pages: tuple[str, str]) -> None:
    from playwright.sync_api import expect, sync_playwright

    dagster, mlflow = pages
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1500, "height": 1000})
        page.set_default_timeout(60_000)
        page.goto(f"{dagster}/assets/checkpoints/lastro")
        page.get_by_text("[Show Markdown]").first.click()
        picture = page.locator("img[src^='data:image/png']").first
        expect(picture).to_be_visible(timeout=60_000)
        assert picture.evaluate("image => image.naturalWidth") > 300
        page.goto(f"{dagster}/runs")
        expect(page.get_by_text("Success").first).to_be_visible(timeout=60_000)
        page.goto(f"{mlflow}/#/models/lens_ensemble/versions/1")
        expect(page.get_by_text("lens.dataset_version")).to_be_visible(timeout=60_000)
        expect(page.get_by_text("challenger").first).to_be_visible(timeout=60_000)
        browser.close()


def test_the_registry_may_be_on_postgresql_and_its_password_is_never_shown(
    own_home: Path,
    postgresql: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", postgresql)
    assert main(["run", "--preset", "tiny", "--home", str(own_home), "--verbose"]) == 0
    printed = capfd.readouterr()
    assert "lens_ensemble, version 1" in printed.out
    from mlflow import MlflowClient

    client = MlflowClient(postgresql)
    assert client.get_model_version_by_alias("lens_ensemble", "challenger").tags["lens.auroc"]
    runs = client.search_runs([client.get_experiment_by_name("lens_pipeline").experiment_id])
    assert {run.info.run_name for run in runs} == {"light_transformer", "lastro", "lens_ensemble"}
    assert PASSWORD not in printed.out + printed.err
    written = [path for path in own_home.rglob("*") if path.is_file()]
    assert not [path for path in written if PASSWORD.encode() in path.read_bytes()]
