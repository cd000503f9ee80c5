"""The main job with its shards in a bucket of a real object store."""

import json
import os
from pathlib import Path

import pytest

from lens_pipeline.cli import main
from lens_pipeline.shards import verify_shards
from lens_pipeline.shards.cloud import newest_version
from lens_pipeline_tests.object_stores import S3Server


def test_the_main_job_trains_from_the_cloud(
    s3_bucket: str,
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    options = s3_server.storage_options()
    url, home = f"{s3_bucket}/lenses", tmp_path / "home"
    monkeypatch.setenv("LENS_CLOUD_URL", url)
    monkeypatch.setenv("LENS_STORAGE_OPTIONS", json.dumps(options))
    assert main(["run", "--preset", "tiny", "--home", str(home)]) == 0
    summary = json.loads((home / "reports" / "summary.json").read_text())
    newest = newest_version(url, options)
    assert newest == f"{url}/{summary['dataset_version']}"
    assert verify_shards(newest, options) == []
    fetched = {path.name for path in (home / "cache").rglob("*.tar")}
    assert "train-000000.tar" in fetched
    assert not (home / "cloud").exists()

    assert main(["run", "--preset", "tiny", "--home", str(home)]) == 0
    summary = json.loads((home / "reports" / "summary.json").read_text())
    assert all(stage["reused"] for stage in summary["stages"].values())

    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    printed = capfd.readouterr()
    assert secret.decode() not in printed.out + printed.err
    told = [p for p in home.rglob("*") if p.is_file() and secret in p.read_bytes()]
    assert not told


def test_a_bucket_that_is_not_there_ends_the_run_with_one_line(
    s3_bucket: str,
    s3_server: S3Server,
    own_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LENS_CLOUD_URL", "s3://nowhere/lenses")
    monkeypatch.setenv("LENS_STORAGE_OPTIONS", json.dumps(s3_server.storage_options()))
    assert main(["run", "--preset", "tiny", "--home", str(own_home)]) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last == "error: LENS_CLOUD_URL: s3://nowhere/lenses: there is no bucket nowhere"
