"""`lens-pipeline prune`: which versions stay, and that it removes nothing where it cannot know."""

import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest

from lens_pipeline.cli import main
from lens_pipeline.defs.stages import CLOUD
from lens_pipeline.runner import open_instance
from lens_pipeline.settings import Settings
from lens_pipeline.shards import publish_shards, read_manifest
from lens_pipeline_tests.conftest import LENS_PIPELINE

LONG_AGO = 1_500_000_000


@pytest.fixture
def cloud(own_home: Path, own_shards: Path) -> dict[str, str]:
    """{what: version} at the cloud of `own_home`, all published long ago: that of its model, one
    that nobody needs, the newest."""
    cloud = own_home / "cloud"
    (of_model,) = (path.name for path in cloud.iterdir() if path.is_dir())
    versions = {"of the model": of_model}
    for number, name in enumerate(("old", "newest")):
        manifest = replace(read_manifest(own_shards), dataset=name)
        (own_shards / "manifest.json").write_text(manifest.text)
        versions[name] = publish_shards(own_shards, str(cloud)).dataset_version
        for path in (cloud / versions[name]).iterdir():
            os.utime(path, (LONG_AGO + number, LONG_AGO + number))
    for path in (cloud / of_model).iterdir():
        os.utime(path, (LONG_AGO - 1, LONG_AGO - 1))
    return versions


def left(home: Path) -> set[str]:
    return {path.name for path in (home / "cloud").iterdir() if path.is_dir()}


def test_prune_keeps_what_a_registered_model_refers_to(
    own_home: Path, cloud: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prune", "--home", str(own_home), "--keep", "1"]
    assert main([*command, "--dry-run"]) == 0
    assert left(own_home) == set(cloud.values())
    would = capsys.readouterr().out
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert would.replace("would go", "removed").split() == printed.split()
    lines = {line.split()[0]: " ".join(line.split()[3:]) for line in printed.splitlines()[:3]}
    assert lines == {
        cloud["newest"]: "kept latest.json names it; of the newest 1",
        cloud["old"]: "removed is older",
        cloud["of the model"]: "kept lens_ensemble version 1 refers to it",
    }
    assert "1 of 3 versions removed" in printed.splitlines()[3]
    assert left(own_home) == {cloud["newest"], cloud["of the model"]}


def test_prune_keeps_what_runs_of_this_home_may_be_reading(
    own_home: Path, cloud: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    def reason(*more: str) -> str:
        assert main(["prune", "--home", str(own_home), "--keep", "1", *more]) == 0
        lines = capsys.readouterr().out.splitlines()
        return next(line for line in lines if line.startswith(cloud["old"])).split(" MB  ")[1]

    with open_instance(Settings.load(home=str(own_home))) as instance:

        def published(version: str) -> None:
            about = {"content": cloud[version]}
            instance.report_runless_asset_event(dg.AssetMaterialization(CLOUD, metadata=about))

        published("old")
        instance.report_runless_asset_event(dg.AssetMaterialization(CLOUD))  # on Dagster's pages
        assert reason() == "kept      cloud_shards of this home refers to it"
        time.sleep(1.1)
        training = dg.DagsterRun(job_name="all", status=dg.DagsterRunStatus.STARTED)
        instance.add_run(training)
        time.sleep(1.1)
        published("of the model")
        published("newest")
        assert reason() == "kept      a run under way refers to it"
        instance.report_run_failed(training)
        assert reason("--dry-run") == "would go  is older"
        again = dg.DagsterRun(
            job_name="all",
            status=dg.DagsterRunStatus.STARTING,
            parent_run_id=training.run_id,
            root_run_id=training.run_id,
            tags={"dagster/is_resume_retry": "true"},
        )
        instance.add_run(again)
        assert reason() == "kept      a run under way refers to it"
        instance.report_run_failed(again)
        assert reason() == "removed   is older"


def test_prune_needs_no_graph_and_no_setting_of_it(own_home: Path) -> None:
    command = [LENS_PIPELINE, "prune", "--home", str(own_home), "--keep", "1", "--dry-run"]
    environment = os.environ | {"LENS_ARCHS": "no_such_network"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_prune_removes_nothing_where_the_registry_cannot_be_asked(
    own_home: Path,
    cloud: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = ["--cloud-url", str(own_home / "cloud"), "--keep", "1"]
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:pa55word@127.0.0.1:9")
    assert main(["prune", "--home", str(own_home), *where]) == 2
    unreachable = capsys.readouterr().err.splitlines()[-1]
    assert unreachable.startswith("error: nothing is removed: MLFLOW_TRACKING_URI: the registry at")
    assert "pa55word" not in unreachable
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mistyped/mlflow.db")
    assert main(["prune", "--home", str(own_home), *where]) == 2
    assert f"no model registry at {tmp_path}/mistyped/mlflow.db" in capsys.readouterr().err
    assert not (tmp_path / "mistyped").exists()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert main(["prune", "--home", str(tmp_path / "another"), *where]) == 2
    assert "this home has no model registry" in capsys.readouterr().err
    assert main(["prune", "--home", str(own_home), "--keep", "0"]) == 2
    assert "keep 0: at least 1 is needed" in capsys.readouterr().err
    assert left(own_home) == set(cloud.values())
