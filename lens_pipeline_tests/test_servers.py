"""MLflow on a real PostgreSQL."""

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
