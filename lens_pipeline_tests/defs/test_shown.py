"""What the main job checks and shows of networks, ensembles and versions."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from sklearn.metrics import roc_auc_score

from lens_pipeline.cli import main
from lens_pipeline.defs.shown import table
from lens_pipeline.registry import Registry
from lens_pipeline.runner import open_instance
from lens_pipeline.settings import Settings
from lens_pipeline.tracking import Tracking
from lens_pipeline_tests.conftest import summary_of

PAGES = "http://mlflow.example:5000"
MODE = "?workflowType=machine_learning"  # else MLflow shows an experiment as one of language models


def checks_of(home: Path) -> dict[tuple[str, str], dg.AssetCheckEvaluation]:
    """The checks of the home's last run, by asset and name."""
    with open_instance(Settings.load(home=home)) as instance:
        (run_id,) = instance.get_run_ids(limit=1)
        kind = dg.DagsterEventType.ASSET_CHECK_EVALUATION
        records = instance.get_records_for_run(run_id, of_type=kind).records
    events = [record.event_log_entry.dagster_event for record in records]
    found = [event.asset_check_evaluation_data for event in events if event is not None]
    return {(check.asset_key.to_user_string(), check.check_name): check for check in found}


def shown_of(home: Path, asset: str) -> Mapping[str, dg.MetadataValue]:
    """The metadata of an asset's last materialisation."""
    with open_instance(Settings.load(home=home)) as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey(asset.split("/")))
    assert event is not None
    assert event.asset_materialization is not None
    return event.asset_materialization.metadata


def markdown_rows(value: dg.MetadataValue) -> list[dict[str, str]]:
    lines = [line.strip("| ").split(" | ") for line in str(value.value).splitlines()]
    return [dict(zip(lines[0], line, strict=False)) for line in lines[2:]]


def test_a_table_shows_nothing_where_there_is_nothing() -> None:
    """A label that is missing is neither true nor false."""
    rows = pd.DataFrame(
        {
            **{"label": pd.array([pd.NA, 1], "Int8"), "z": [np.nan, 0.5]},
            **{"corner": [[1, 2], None], "parquet": [np.array([1, 2]), None]},
        }
    )
    shown = [record.data for record in table(rows).records]
    assert shown == [
        {"label": "", "z": "", "corner": "[1, 2]", "parquet": "[1 2]"},
        {"label": "1", "z": "0.5", "corner": "", "parquet": ""},
    ]
    assert table(rows.head(0), "too few to tell").value == "too few to tell"


def test_a_network_is_judged_by_what_chance_leaves_of_its_auroc(home: Path) -> None:
    """On 16 cutouts hardly any AUROC is one."""
    check = checks_of(home)["checkpoints/lastro", "better_than_chance"]
    (scores,) = home.glob("checkpoints/lastro/*/val_scores.parquet")
    table = pd.read_parquet(scores)
    label, logit = table["label"].to_numpy(int), table["logit"].to_numpy()
    auroc = roc_auc_score(label, logit)
    random = np.random.default_rng(0)
    classes = [np.flatnonzero(label == value) for value in (0, 1)]
    others, lenses = (logit[random.choice(rows, (2000, len(rows)))] for rows in classes)
    above = lenses[:, :, None] - others[:, None, :]
    low = np.percentile(np.mean((above > 0) + (above == 0) / 2, axis=(1, 2)), 2.5)
    assert check.metadata["AUROC"].value == pytest.approx(auroc)
    assert check.metadata["lower 95 % bound"].value == pytest.approx(low, abs=0.04)
    assert check.metadata["must exceed"].value == 0.5
    assert low < 0.5
    assert not check.passed
    assert check.severity == dg.AssetCheckSeverity.WARN


def test_a_training_is_shown_by_its_curves_and_their_table(home: Path) -> None:
    shown = shown_of(home, "checkpoints/lastro")
    (folder,) = (path.parent for path in home.glob("checkpoints/lastro/*/curves.csv"))
    curves = pd.read_csv(folder / "curves.csv")
    records: Any = shown["epochs"].records  # type: ignore[attr-defined]
    rows = [record.data for record in records]
    assert [int(row["epoch"]) for row in rows] == [n + 1 for n in curves["epoch"]]
    for name in ("train/loss", "val/auroc"):
        told = [float(row[name]) for row in rows]
        assert told == pytest.approx(curves[name].tolist(), rel=1e-3)
        assert shown[f"last {name}"].value == pytest.approx(curves[name].iloc[-1])
    scores = pd.read_parquet(folder / "val_scores.parquet")
    auroc = roc_auc_score(scores["label"], scores["logit"])
    assert shown["validation AUROC"].value == pytest.approx(auroc)
    assert str(shown["learning curves"].value).startswith("![")


def test_calibration_is_judged_on_the_test_split(home: Path) -> None:
    check = checks_of(home)["ensemble_evaluation", "probabilities_are_calibrated"]
    metrics = summary_of(home)["ensemble"]
    error, by_chance = metrics["ece_balanced"], metrics["ece_balanced_by_chance"]
    assert check.metadata["calibration error"].value == error["value"]
    assert check.metadata["upper 95 % bound"].value == error["high"]
    assert check.metadata["of it by chance"].value == by_chance
    assert check.metadata["at most beside that"].value == 0.1
    assert error["value"] > 0.1  # of so few, chance makes most
    assert check.passed == (error["value"] - by_chance <= 0.1)
    assert check.severity == dg.AssetCheckSeverity.WARN


def test_what_is_run_links_to_where_the_homes_own_records_are_shown(home: Path) -> None:
    """`show` serves them there, unless it is told otherwise."""
    address = shown_of(home, "checkpoints/lastro")["MLflow run"].value
    place, run = re.fullmatch(rf"(.*)/runs/(\w+){re.escape(MODE)}", str(address)).groups()  # type: ignore[union-attr]
    assert place == "http://127.0.0.1:5000/#/experiments/1"
    assert MlflowClient(f"sqlite:///{home / 'mlflow.db'}").get_run(run).info.run_name == "lastro"


def test_without_pages_of_mlflow_places_are_shown(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the records are in a database of others, which nobody knows to be served."""
    records = f"sqlite:///{shutil.copy(own_home / 'mlflow.db', own_home.with_name('records.db'))}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", records)
    assert main(["run", "--preset", "tiny", "--home", str(own_home)]) == 0
    shown = shown_of(own_home, "registered_ensemble")
    assert shown["version"].value == "1"
    assert shown["report"].value == summary_of(own_home)["report"]
    assert [row["version"] for row in markdown_rows(shown["versions"])] == ["1"]
    run = shown_of(own_home, "checkpoints/lastro")["MLflow run"].value
    assert MlflowClient(records).get_run(str(run)).info.run_name == "lastro"


def test_with_pages_of_mlflow_there_are_links_to_them(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LENS_MLFLOW_PAGE", f"{PAGES}/")
    monkeypatch.setenv("LENS_GATE_MAX_ECE", "0.5")
    assert main(["run", "--preset", "tiny", "--home", str(own_home)]) == 0
    stages = summary_of(own_home)["stages"]
    assert all(stage["reused"] for stage in stages.values())
    client = MlflowClient(f"sqlite:///{own_home / 'mlflow.db'}")
    version = client.get_model_version("lens_ensemble", "1")
    run = client.get_run(version.run_id)
    page = f"{PAGES}/#/experiments/{run.info.experiment_id}/runs"

    shown = shown_of(own_home, "registered_ensemble")
    assert shown["MLflow run"].value == f"{page}/{version.run_id}{MODE}"
    assert shown["report"].value == f"{page}/{version.run_id}/artifacts/report.html{MODE}"
    assert "report.html" in [artifact.path for artifact in client.list_artifacts(version.run_id)]
    (row,) = markdown_rows(shown["versions"])
    assert row["version"] == f"[1]({PAGES}/#/models/lens_ensemble/versions/1{MODE})"
    assert row["aliases"] == "challenger"
    assert float(row["AUROC"]) == pytest.approx(shown["AUROC"].value, abs=1e-5)
    assert row["gate"] == version.tags["lens.gate"]
    assert "the test set has" in row["gate"]

    newest = client.search_runs([run.info.experiment_id], order_by=["attributes.start_time DESC"])
    members = {found.info.run_name: found.info.run_id for found in reversed(newest)}
    rows = markdown_rows(shown_of(own_home, "ensemble_evaluation")["members"])
    assert [row["member"] for row in rows] == [
        *(f"[{name}]({page}/{members[name]}{MODE})" for name in ("light_transformer", "lastro")),
        "ensemble",
    ]
    linked = shown_of(own_home, "checkpoints/lastro")["MLflow run"].value
    assert linked == f"{page}/{members['lastro']}{MODE}"

    # The bound is the setting's, and a place of pages decides nothing.
    check = checks_of(own_home)["ensemble_evaluation", "probabilities_are_calibrated"]
    assert check.passed
    assert check.metadata["at most beside that"].value == 0.5
    assert json.loads((own_home / "settings.json").read_text()) == {
        "gate_max_ece": 0.5,
        "preset": "tiny",
    }


def test_a_servers_address_is_that_of_its_pages(tmp_path: Path) -> None:
    settings = Settings.load(
        home=tmp_path, MLFLOW_TRACKING_URI="https://me:word@mlflow.example/base/"
    )
    assert settings.mlflow_pages == "https://mlflow.example/base"
    assert Registry(settings).version_page("3") == (
        f"https://mlflow.example/base/#/models/lens_ensemble/versions/3{MODE}"
    )
    elsewhere = Settings.load(home=tmp_path, MLFLOW_TRACKING_URI="postgresql://db/mlflow")
    assert Tracking(elsewhere).run_page("run") is None


def test_the_columns_of_the_scores_are_explained(home: Path) -> None:
    shown = shown_of(home, "ensemble_evaluation")
    scores = pd.read_parquet(summary_of(home)["scores"])
    columns = {c.name: c for c in shown["dagster/column_schema"].schema.columns}
    assert list(columns) == list(scores)
    assert "Epistemic" in (columns["std"].description or "")
    assert "lastro alone" in (columns["probability_lastro"].description or "")
    assert shown["dagster/row_count"].value == len(scores)


@pytest.mark.parametrize("asset", ["cutout_catalogue", "ensemble_evaluation"])
def test_no_column_of_the_simulator_is_without_a_description(home: Path, asset: str) -> None:
    schema = shown_of(home, asset)["dagster/column_schema"].schema
    assert [column.name for column in schema.columns if not column.description] == []
    kinds = {column.name: column.type for column in schema.columns}
    assert {kinds[name] for name in ("id", "path", "kind", "source_galaxy", "bands")} == {"text"}
    assert kinds["einstein_radius"] == "float64"


def test_where_nothing_is_forecast_or_rejected_no_empty_table_is_shown(home: Path) -> None:
    """After one epoch a non-lens may be the first of all, or not."""
    forecast = shown_of(home, "ensemble_evaluation")["forecast"]
    folder = Path(summary_of(home)["report"]).parent
    rows = json.loads((folder / "forecast.json").read_text())["rows"]
    assert ("No threshold finds a lens" in str(forecast.value)) == (not rows)
    assert shown_of(home, "processed_dataset")["first rejects"].value == "none"
