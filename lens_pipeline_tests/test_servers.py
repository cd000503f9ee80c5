"""MLflow on a real PostgreSQL."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lens_pipeline.cli import main
from lens_pipeline_tests.postgres import PASSWORD


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


FIRST_USE = """
import sys
from lens_pipeline.settings import Settings
from lens_pipeline.tracking import Tracking

settings = Settings.load(home=sys.argv[1])
print(Tracking(settings).experiment_id)
"""


def test_homes_that_first_use_an_empty_database_together_share_it(
    tmp_path: Path, postgresql: str
) -> None:
    """Each would make its tables, and its experiment."""
    environment = os.environ | {"MLFLOW_TRACKING_URI": postgresql}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FIRST_USE, str(tmp_path / f"home{number}")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    said = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert len({printed.split()[-1] for printed, _ in said}) == 1
