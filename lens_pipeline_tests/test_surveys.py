"""A source of several surveys: data made survey by survey, models of all, a report of each."""

import json
import os
from pathlib import Path

import dagster as dg
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from sklearn.metrics import roc_auc_score

from lens_pipeline.cli import main
from lens_pipeline.definitions import make_definitions
from lens_pipeline.defs.dataset_checks import FEW
from lens_pipeline.defs.surveys import every_survey
from lens_pipeline.ensemble.description import read_description
from lens_pipeline.errors import InputError
from lens_pipeline.runner import open_instance
from lens_pipeline.settings import Settings
from lens_pipeline.shards import open_shards, read_manifest
from lens_pipeline.shards.cutouts import newest_shards
from lens_pipeline_tests.conftest import summary_of

SURVEYS = ["des", "hsc"]
BY_SURVEY = {"processed_dataset", "lens_shards"}


@pytest.fixture
def source(two_surveys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The catalogue of both that is LENS_SOURCE, as if HSC's were real; one of these images cannot
    be used."""
    table = pd.read_parquet(two_surveys)
    table["simulated"] = table["survey"] == "des"
    spoilt = table.index[(table["survey"] == "hsc") & (table["label"] == 0)][0]
    np.save(tmp_path / "small.npy", np.zeros((3, 8, 8), np.float32))
    table.loc[spoilt, "path"] = str(tmp_path / "small.npy")
    table.to_parquet(two_surveys, index=False)
    monkeypatch.setenv("LENS_SOURCE", str(two_surveys))
    monkeypatch.setenv("LENS_SURVEY", "hsc, des")
    monkeypatch.setenv("LENS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LENS_PRESET", "tiny")
    monkeypatch.setenv("LENS_ARCHS", "lastro")
    return two_surveys


def made(key: str) -> list[dg.AssetMaterialization]:
    """What has been made of an asset, newest first."""
    with open_instance(Settings.load()) as instance:
        records = instance.fetch_materializations(dg.AssetKey(key), limit=100).records
    return [r.asset_materialization for r in records if r.asset_materialization is not None]


def check_of(key: str, name: str) -> dg.AssetCheckEvaluation:
    """What was judged last."""
    with open_instance(Settings.load()) as instance:
        checked = dg.AssetCheckKey(dg.AssetKey(key), name)
        (record,) = instance.event_log_storage.get_asset_check_execution_history(checked, limit=1)
    event = record.event.dagster_event if record.event else None
    assert event is not None
    return event.asset_check_evaluation_data


def of_partitions(key: str) -> dict[str, dg.AssetMaterialization]:
    """{survey: what has been made of it last}."""
    found = {str(event.partition): event for event in reversed(made(key))}
    assert sorted(found) == SURVEYS
    return found


def test_data_are_made_by_survey_and_models_of_all(source: Path, tmp_path: Path) -> None:
    home, catalogue = tmp_path / "home", pd.read_parquet(source)
    assert main(["run"]) == 0
    summary = summary_of(home)

    datasets = of_partitions("processed_dataset")
    for survey, event in datasets.items():
        n = (catalogue["survey"] == survey).sum()
        counts = json.loads(Path(str(event.metadata["location"].value), "dataset.json").read_text())
        assert counts["n_rows"] == n
        assert "cutouts" in event.metadata
        assert event.metadata["rejects"].value == (survey == "hsc")
    assert [event.partition for event in made("cloud_shards")] == [None]
    few, finite = (
        check_of("processed_dataset", name)
        for name in ("every_split_holds_both_classes", "all_pixels_are_finite")
    )
    assert finite.passed
    assert {"des: non-finite pixels", "hsc: non-finite pixels"} <= set(finite.metadata)
    fewest = {s: few.metadata[f"{s}: fewest of a class"].value for s in SURVEYS}
    assert few.passed == (min(fewest.values()) >= FEW)
    assert few.passed or few.severity == dg.AssetCheckSeverity.WARN

    shards = open_shards(home / "cloud" / summary["dataset_version"])
    learnt = [name for part in ("train", "val", "test") for name in shards.split(part).ids]
    usable = catalogue[~catalogue["path"].str.endswith("small.npy")]
    assert sorted(learnt) == sorted(usable["id"])

    scores = pd.read_parquet(summary["scores"])
    assert scores["id"].tolist() == catalogue["id"].tolist()  # in its order, the reject with them
    (rejected,) = scores[scores["probability"].isna()].itertuples()
    assert rejected.survey == "hsc"
    assert "8" in rejected.reject_reason
    test = scores[(scores["split"] == "test") & scores["probability"].notna()]
    assert list(summary["surveys"]) == SURVEYS
    for survey, metrics in summary["surveys"].items():
        rows = test[test["survey"] == survey]
        expected = roc_auc_score(rows["label"].astype(int), rows["probability"])
        assert metrics["auroc"]["value"] == pytest.approx(expected)
        assert metrics["n_lens"] == (rows["label"] == 1).sum()
    # Figures of real cutouts stand beside those of all, in MLflow too.
    (registered,) = made("registered_ensemble")
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    version = client.get_model_version("lens_ensemble", str(registered.metadata["version"].value))
    for origin, survey in (("real", "hsc"), ("simulated", "des")):
        expected = summary["surveys"][survey]["auroc"]["value"]
        assert summary["origins"][origin]["auroc"]["value"] == pytest.approx(expected)
        assert float(version.tags[f"lens.{origin}/auroc"]) == pytest.approx(expected, rel=1e-5)
        logged = client.get_run(version.run_id).data.metrics
        assert logged[f"test/{origin}/auroc"] == pytest.approx(expected)
    (ensemble,) = made("lens_ensemble")
    real = catalogue[catalogue["id"].isin(shards.split("val").ids) & (catalogue["survey"] == "hsc")]
    description = read_description(Path(str(ensemble.metadata["location"].value)))
    assert description["validation_of_real"] == {
        "n_lens": (real["label"] == 1).sum(),
        "n_nonlens": (real["label"] == 0).sum(),
    }
    report = Path(summary["report"]).read_text()
    assert "By survey" in report
    (evaluation,) = made("ensemble_evaluation")
    assert {"surveys", "ROC by survey"} <= set(evaluation.metadata)
    assert set(summary["stages"]) >= BY_SURVEY

    # What trainings of these shards read is theirs, however long ago it was made.
    merged = newest_shards(home)
    for file in home.glob("*/.locks/*"):
        os.utime(file, (0, 0))
    with open_instance(Settings.load()) as instance:
        cleaning = make_definitions(Settings.load()).resolve_job_def("cleaning")
        assert cleaning.execute_in_process(instance=instance).success
    assert newest_shards(home) == merged
    assert read_manifest(merged).dataset_version == summary["dataset_version"]

    # A row more of one survey: the other's data are as they were.
    more = catalogue[catalogue["survey"] == "hsc"].iloc[[0]].assign(id="one-more")
    pd.concat([catalogue, more]).to_parquet(source, index=False)
    assert materialised("data", **every_survey(Settings.load())).success
    for key in sorted(BY_SURVEY):
        again = of_partitions(key)
        assert {s: event.metadata["reused"].value for s, event in again.items()} == {
            "des": True,
            "hsc": False,
        }
    now = newest_shards(home)
    assert read_manifest(now).dataset_version != summary["dataset_version"]
    shards = open_shards(now)
    assert "one-more" in {
        one for part in ("train", "val", "test") for one in shards.split(part).ids
    }


def materialised(job: str, **tags: str) -> dg.ExecuteInProcessResult:
    """The result of `data`, or of its last stage alone, `cloud`."""
    definitions = make_definitions(Settings.load(), retries=False)
    last = dg.define_asset_job("cloud", dg.AssetSelection.assets("cloud_shards"))
    found = dg.Definitions.merge(definitions, dg.Definitions(jobs=[last])).resolve_job_def(job)
    with open_instance(Settings.load()) as instance:
        return found.execute_in_process(instance=instance, tags=tags, raise_on_error=False)


def test_surveys_are_made_one_by_one_and_join_the_others_or_stay_alone(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nameless = materialised("data")
    assert not nameless.success
    (failure,) = (event for event in nameless.all_events if event.is_step_failure)
    assert "processed_dataset: is made survey by survey" in str(failure.step_failure_data.error)

    def surveys_of(cloud: dg.AssetMaterialization) -> set[str]:
        names = open_shards(str(cloud.metadata["location"].value)).split("train").ids
        return {name.split("-")[0] for name in names}

    assert not materialised("data", **{"dagster/partition": "des"}).success  # hsc is not there
    assert [event.partition for event in made("lens_shards")] == ["des"]
    assert made("cloud_shards") == []
    assert materialised("data", **{"dagster/partition": "hsc"}).success
    assert [event.partition for event in made("lens_shards")] == ["hsc", "des"]
    (both,) = made("cloud_shards")
    assert surveys_of(both) == {"des", "hsc"}
    # What partitions leave is not taken for what is made without them, nor the reverse.
    monkeypatch.setenv("LENS_SURVEY", "hsc")
    assert materialised("data").success
    alone, _ = made("cloud_shards")
    assert surveys_of(alone) == {"hsc"}
    for surveys, before in (("des,hsc", both), ("hsc", alone)):
        monkeypatch.setenv("LENS_SURVEY", surveys)
        assert materialised("cloud").success
        assert made("cloud_shards")[0].metadata["content"] == before.metadata["content"]
    assert alone.metadata["content"] != both.metadata["content"]


def test_what_is_of_no_survey_takes_all_of_them_explicitly() -> None:
    graph = make_definitions(Settings.load(survey=SURVEYS)).resolve_asset_graph()
    partitioned = {
        key.to_user_string(): graph.get(key).partitions_def.get_partition_keys()  # type: ignore[union-attr]
        for key in graph.get_all_asset_keys()
        if graph.get(key).partitions_def is not None
    }
    assert partitioned == dict.fromkeys(BY_SURVEY, SURVEYS)
    for child, parent in (
        ("cloud_shards", "lens_shards"),
        ("ensemble_evaluation", "processed_dataset"),
    ):
        mapping = graph.get(dg.AssetKey(child)).partition_mappings[dg.AssetKey(parent)]
        assert isinstance(mapping, dg.AllPartitionMapping)
    alone = make_definitions(Settings.load(survey=["des"])).resolve_asset_graph()
    assert all(alone.get(key).partitions_def is None for key in alone.get_all_asset_keys())


def test_a_survey_that_is_not_there_is_an_error_in_a_line(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LENS_SURVEY", "des,lsst")
    assert main(["run"]) == 2
    assert "column survey: no row is of 'lsst'; it names 'des', 'hsc'" in capsys.readouterr().err


def test_published_shards_are_taken_whole(
    shards_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LENS_SOURCE", str(shards_folder))
    monkeypatch.setenv("LENS_SURVEY", "des")
    with pytest.raises(InputError, match="LENS_SURVEY: shards that are published"):
        make_definitions(Settings.load())
