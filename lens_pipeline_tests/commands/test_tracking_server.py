"""A tracking server that is gone, where somebody waits for what a command says."""

import os
from pathlib import Path

import pytest

from lens_pipeline.cli import main
from lens_pipeline.tracking import short_waits


@pytest.mark.parametrize("command", ["show", "train", "tune"])
def test_it_is_named_at_once(
    command: str,
    uneven_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not asked for the four minutes that MLflow asks by itself: for seconds, here for none."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    of_training = ["--data-root", str(uneven_shards), "--arch", "lastro", "--loggers", "mlflow"]
    arguments = [] if command == "show" else of_training
    assert main([command, *arguments, "--home", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: MLFLOW_TRACKING_URI (API request to http://127.0.0.1:9")


def test_what_lasts_for_hours_waits_for_it_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    for stated in (None, "7"):
        if stated is not None:
            monkeypatch.setenv(name, stated)
        with short_waits():
            assert os.environ[name] == (stated or "3")
        assert os.environ.get(name) == stated
