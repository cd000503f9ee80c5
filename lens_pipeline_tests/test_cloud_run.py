"""The main job with its shards in a bucket of a real object store."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pandas as pd
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest

from lens_pipeline.catalogue import read_catalogue
from lens_pipeline.catalogue.dataset import open_dataset
from lens_pipeline.cli import main
from lens_pipeline.definitions import make_definitions
from lens_pipeline.defs.stages import CLOUD, checkpoint_key
from lens_pipeline.ensemble.system import load_ensemble
from lens_pipeline.errors import NoAnswerError
from lens_pipeline.runner import open_instance, settings_of_home
from lens_pipeline.scoring.predictor import score_dataset
from lens_pipeline.settings import Settings
from lens_pipeline.shards import patience, publish_shards, read_manifest, verify_shards
from lens_pipeline.shards.versions import newest_version
from lens_pipeline_tests.conftest import summary_of
from lens_pipeline_tests.object_stores import S3Server, sign_in


def test_the_main_job_trains_from_the_cloud(
    s3_bucket: str,
    s3_server: S3Server,
    own_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    options = s3_server.storage_options()
    url, home = f"{s3_bucket}/lenses", own_home
    shutil.rmtree(home / "cloud")  # its shards are there, and in no cloud
    assert not (home / "cache").exists()
    monkeypatch.setenv("LENS_CLOUD_URL", url)
    monkeypatch.setenv("LENS_STORAGE_OPTIONS", json.dumps(options))
    run = ["run", "--preset", "tiny", "--archs", "lastro", "--home", str(home)]
    run += ["--set", "lastro.training.learning_rate=5e-4"]
    assert main(run) == 0
    summary = summary_of(home)
    newest = newest_version(url, options)
    assert newest == f"{url}/{summary['dataset_version']}"
    assert verify_shards(newest, options) == []
    fetched = {path.name for path in (home / "cache").rglob("*.tar")}
    assert "train-000000.tar" in fetched
    assert not (home / "cloud").exists()
    assert not summary["stages"]["checkpoints/lastro"]["reused"]

    assert main(run) == 0
    summary = summary_of(home)
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


def own_copy(shards: Path, out: Path, **changes: str) -> Path:
    """Shards in another folder, with another manifest where `changes` ask for it."""
    out.mkdir()
    for path in shards.iterdir():
        (out / path.name).hardlink_to(path)
    manifest = replace(read_manifest(shards), **changes)
    (out / "manifest.json").unlink()
    (out / "manifest.json").write_text(manifest.text)
    return out


def scores_of(home: Path) -> pd.DataFrame:
    summary = summary_of(home)
    return pd.read_parquet(summary["scores"])


def test_another_deployment_trains_from_the_cloud_alone(
    home: Path,
    s3_bucket: str,
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What one home has published another trains on, evaluates and registers; and it sees when
    there is something newer."""
    options, url = s3_server.storage_options(), f"{s3_bucket}/lenses"
    shards = next(home.glob("shards/*/manifest.json")).parent
    published = publish_shards(shards, url, storage_options=options)
    monkeypatch.setenv("LENS_STORAGE_OPTIONS", json.dumps(options))
    other = tmp_path / "other"
    run = ["run", "--preset", "tiny", "--archs", "lastro", "--home", str(other)]
    assert main([*run, "--source", url]) == 0

    summary = summary_of(other)
    assert summary["dataset_version"] == published.dataset_version
    assert summary["model"]["version"] == "1"
    assert set(summary["stages"]) == {
        *("checkpoints/lastro", "lens_ensemble", "ensemble_evaluation", "registered_ensemble"),
    }
    first, second = scores_of(home), scores_of(other)
    for column in ("id", "label", "split", "kind", "einstein_radius", "group"):
        pd.testing.assert_series_equal(first[column], second[column], check_index=False)
    ensemble = load_ensemble(next(other.glob("ensemble/*/ensemble.json")).parent)
    dataset = open_dataset(next(home.glob("dataset/*/dataset.json")).parent)
    catalogue = read_catalogue(next(home.glob("catalogue/*/catalogue.parquet")))
    of_the_dataset = score_dataset(ensemble, dataset, catalogue)["probability"]
    # What is published are the same pixels, as float16.
    assert (of_the_dataset - second["probability"]).abs().max() < 0.001
    assert "simulated" in Path(summary["report"]).read_text()
    made_there = {path.name for path in other.iterdir()}
    assert made_there.isdisjoint({"catalogue", "dataset", "shards", "cloud"})

    assert settings_of_home(str(other)).source == url
    settings = Settings.load(home=other, source=url, archs="lastro", preset="tiny")
    settings.export()
    definitions = make_definitions(settings)
    graph = definitions.resolve_asset_graph()
    assert graph.get(CLOUD).is_observable
    newer = own_copy(shards, tmp_path / "newer", dataset="another")
    with open_instance(settings) as instance:

        def status() -> StaleStatus:
            resolver = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
            return resolver.get_status(checkpoint_key("lastro"))

        def observe() -> str:
            job = definitions.resolve_implicit_global_asset_job_def()
            assert job.execute_in_process(instance=instance, asset_selection=[CLOUD]).success
            (record,) = instance.fetch_observations(CLOUD, limit=1).records
            observation = record.event_log_entry.asset_observation
            assert observation is not None
            return str(observation.metadata["location"].value)

        assert observe() == published.url
        assert status() == StaleStatus.FRESH
        newest = publish_shards(newer, url, storage_options=options)
        assert observe() == newest.url
        assert status() == StaleStatus.STALE


def test_a_source_in_a_bucket_that_may_not_be_read_is_named(
    s3_bucket: str,
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LENS_STORAGE_OPTIONS", json.dumps(s3_server.storage_options()))
    run = ["run", "--preset", "tiny", "--home", str(tmp_path / "home"), "--source"]
    assert main([*run, f"{s3_bucket}/nothing"]) == 2
    assert f"error: {s3_bucket}/nothing" in capfd.readouterr().err
    sign_in(monkeypatch, s3_server.environment(wrong=True))
    assert main([*run, f"{s3_bucket}/lenses"]) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"error: LENS_SOURCE: {s3_bucket}/lenses/latest.json: may not be read")


def test_a_source_that_is_one_version_of_published_shards(
    shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is observed as it is, whatever is published beside it later."""
    old = publish_shards(shards_folder, str(tmp_path / "cloud"))
    new = own_copy(shards_folder, tmp_path / "new", dataset="new")
    publish_shards(new, str(tmp_path / "cloud"))
    monkeypatch.setenv("LENS_SOURCE", old.url)
    definitions = make_definitions(Settings.load(home=tmp_path / "home"))
    done = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
        asset_selection=[CLOUD], instance=dg.DagsterInstance.ephemeral()
    )
    (event,) = done.get_asset_observation_events()
    assert event.asset_observation_data.asset_observation.metadata["location"].value == old.url


def test_assets_are_defined_while_the_disk_of_the_source_is_away(
    shards_folder: Path, tmp_path: Path
) -> None:
    """Where one is mounted there is an empty folder; it may come back as it was."""
    published = tmp_path / "disk" / "published"
    publish_shards(shards_folder, str(published))
    (tmp_path / "home").mkdir()

    def assets() -> set[dg.AssetKey]:
        settings = Settings.load(home=tmp_path / "home", source=str(published))
        return set(make_definitions(settings).resolve_asset_graph().get_all_asset_keys())

    of_shards = assets()
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    assert assets() == of_shards
    published.mkdir(parents=True)
    assert assets() == of_shards
    shutil.rmtree(tmp_path / "disk")
    (tmp_path / "unmounted").rename(tmp_path / "disk")
    assert assets() == of_shards
    shutil.rmtree(published)
    (published / "lens").mkdir(parents=True)  # it is another source now
    assert assets() > of_shards


def test_assets_are_defined_while_the_store_of_the_source_is_away(
    s3_bucket: str,
    s3_server: S3Server,
    shards_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As it was when it last answered."""
    options = s3_server.storage_options()
    publish_shards(shards_folder, f"{s3_bucket}/shards", storage_options=options)
    monkeypatch.setenv("LENS_STORAGE_OPTIONS", json.dumps(options))

    def assets(folder: str, home: str) -> set[dg.AssetKey]:
        (tmp_path / home).mkdir(exist_ok=True)
        settings = Settings.load(home=tmp_path / home, source=f"{s3_bucket}/{folder}")
        return set(make_definitions(settings).resolve_asset_graph().get_all_asset_keys())

    of_shards, of_cutouts = assets("shards", "one"), assets("cutouts", "other")
    assert of_shards < of_cutouts
    s3_server.kill()
    monkeypatch.setattr(patience, "PATIENCE", 0.1)
    assert assets("shards", "one") == of_shards
    assert assets("cutouts", "other") == of_cutouts
    with pytest.raises(NoAnswerError, match="LENS_SOURCE: "):
        assets("shards", "other")  # where it was never asked
