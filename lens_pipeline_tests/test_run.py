"""The main job: what it leaves, what it reuses, what it says."""

import html
import json
import os
import re
from pathlib import Path

import dagster as dg
import numpy as np
import pandas as pd
import pytest
from dagster._core.storage.tags import AUTOMATION_CONDITION_TAG
from sklearn.metrics import roc_auc_score

from lens_pipeline.catalogue import read_catalogue
from lens_pipeline.catalogue.dataset import Dataset
from lens_pipeline.cli import main
from lens_pipeline.definitions import make_definitions
from lens_pipeline.defs.resources import LensHome
from lens_pipeline.defs.stages import made
from lens_pipeline.ensemble.description import read_description
from lens_pipeline.ensemble.system import load_ensemble
from lens_pipeline.errors import InputError
from lens_pipeline.evaluation import standing
from lens_pipeline.models.system import load_system
from lens_pipeline.runner import open_instance
from lens_pipeline.scoring.evaluate import evaluate_ensemble
from lens_pipeline.settings import Settings
from lens_pipeline.shards import open_shards
from lens_pipeline.training import TrainedMember
from lens_pipeline_tests.conftest import client_of, summary_of

MEMBERS = ["light_transformer", "lastro"]
ASSETS = [
    "cutout_catalogue",
    "processed_dataset",
    "lens_shards",
    "cloud_shards",
    *(f"checkpoints/{name}" for name in MEMBERS),
    "lens_ensemble",
    "ensemble_evaluation",
    "registered_ensemble",
]


def run(home: Path, *more: str) -> int:
    return main(["run", "--preset", "tiny", "--home", str(home), *more])


def test_the_summary_tells_what_was_made(home: Path) -> None:
    summary = summary_of(home)
    assert summary["schema"] == 1
    assert set(summary["stages"]) == set(ASSETS)
    assert all(stage["reused"] is False for stage in summary["stages"].values())
    assert list(summary["members"]) == MEMBERS
    for metrics in (*summary["members"].values(), summary["ensemble"]):
        assert metrics["n_lens"] + metrics["n_nonlens"] > 20
        assert set(metrics["auroc"]) == {"value", "low", "high"}
    assert summary["model"]["name"] == "lens_ensemble"
    assert summary["model"]["version"] == "1"
    assert "challenger" in summary["model"]["aliases"]
    assert Path(summary["report"]).is_file()
    manifest = next((home / "cloud").glob("*/manifest.json"))
    assert summary["dataset_version"] == manifest.parent.name


def test_every_cutout_is_scored_in_the_catalogues_order(home: Path) -> None:
    scores = pd.read_parquet(summary_of(home)["scores"])
    catalogue = pd.read_parquet(next((home / "catalogue").glob("*/catalogue.parquet")))
    assert scores["id"].tolist() == catalogue["id"].tolist()
    assert list(scores)[:6] == ["id", "label", "probability", "logit", "std", "entropy"]
    assert {f"probability_{name}" for name in MEMBERS} <= set(scores)
    assert scores["probability"].between(0, 1).all()
    assert scores["einstein_radius"].notna().sum() == 100


def test_dagster_shows_the_run_with_its_pictures_and_checks(home: Path) -> None:
    with open_instance(Settings.load(home=home)) as instance:
        (found,) = instance.get_runs()
        assert found.status == dg.DagsterRunStatus.SUCCESS
        for name in ASSETS:
            event = instance.get_latest_materialization_event(dg.AssetKey(name.split("/")))
            assert event is not None, name
            materialization = event.asset_materialization
            assert materialization is not None
            if name.startswith("checkpoints/"):
                assert "learning curves" in materialization.metadata
            if name == "ensemble_evaluation":
                shown = materialization.metadata
                assert {"ROC", "precision and recall", "completeness", "purity"} <= set(shown)
                assert "forecast" in shown
            assert (materialization.tags or {})["dagster/data_version"]
        checks = instance.get_records_for_run(
            found.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION
        ).records
        names = {r.event_log_entry.dagster_event.event_specific_data.check_name for r in checks}  # type: ignore[union-attr]
        assert {
            "no_group_spans_two_splits",
            "no_near_duplicates_across_splits",
            "better_than_chance",
        } <= names


def test_mlflow_holds_a_run_per_member_and_a_version_that_names_them(home: Path) -> None:
    client, summary = client_of(home), summary_of(home)
    (experiment,) = client.search_experiments(filter_string="name != 'Default'")
    assert experiment.artifact_location == (home / "mlartifacts").as_uri()
    assert "each training" in experiment.tags["mlflow.note.content"]
    assert "strong gravitational lenses" in client.get_registered_model("lens_ensemble").description
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {*MEMBERS, "lens_ensemble"}
    for name in MEMBERS:
        found = runs[name]
        assert found.info.status == "FINISHED"
        assert found.data.params["model.arch"] == name
        assert summary["dataset_version"] in found.data.params["data.data_root"]
        assert found.data.tags["lens.dataset_version"] == summary["dataset_version"]
        assert found.data.tags["lens.dagster_run_id"]
        assert len(client.get_metric_history(found.info.run_id, "val/auroc")) == 1
    auroc = summary["ensemble"]["auroc"]["value"]
    assert runs["lens_ensemble"].data.metrics["test/auroc"] == auroc
    version = client.get_model_version_by_alias("lens_ensemble", "challenger")
    assert version.tags["lens.dataset_version"] == summary["dataset_version"]
    assert json.loads(version.tags["lens.member_runs"]) == {
        name: runs[name].info.run_id for name in MEMBERS
    }
    assert float(version.tags["lens.auroc"]) == pytest.approx(auroc, rel=1e-5)
    assert version.tags["lens.dagster_run_id"] == runs["lastro"].data.tags["lens.dagster_run_id"]
    assert json.loads(version.tags["lens.settings"]) == {"preset": "tiny"}
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", version.tags["lens.git_commit"])
    assert summary["dataset_version"] in version.description
    for part in ("validated on simulated cutouts: ", "32 x 32 pixels of 0.263 arcsec", "## Limits"):
        assert part in version.description


def test_a_second_run_does_nothing_again_and_tells_the_same(
    own_home: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a member that hardly counts, too; here all are taken to count too little."""
    monkeypatch.setattr(standing, "LITTLE", 2.0)
    before = summary_of(own_home)
    assert run(own_home) == 0
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ  # hours outlive a server's restart
    after = summary_of(own_home)
    assert all(stage["reused"] for stage in after["stages"].values())
    for name in ("ensemble", "members", "dataset_version", "model"):
        assert after[name] == before[name]
    assert len(client_of(own_home).search_model_versions("name = 'lens_ensemble'")) == 1
    printed = capsys.readouterr().out
    assert "lens_ensemble, version 1 (before this run); aliases" in printed
    assert f"lens-pipeline show --home {own_home}" in printed
    for name in (*MEMBERS, "ensemble", "AUROC", "calibration error", "report.html"):
        assert name in printed
    assert "AUROC against each kind: " in printed
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    told = [message for message in said if "hardly counts" in message]
    for name, message in zip(MEMBERS, told, strict=True):
        assert re.search(rf"\b{name} .*hardly counts: its share in the score is \d+%", message)


def test_the_report_says_when_and_by_which_code_it_was_made(home: Path) -> None:
    page = Path(summary_of(home)["report"]).read_text()
    made = r"\d{4}-\d\d-\d\d \d\d:\d\d UTC, lens-pipeline \S+, commit [0-9a-f]{40}(-dirty)?<"
    assert re.search(made, page)


def test_the_summary_breaks_down_by_kind_of_non_lens(home: Path) -> None:
    summary = summary_of(home)
    scores = pd.read_parquet(summary["scores"])
    test = scores[scores["split"] == "test"]
    kinds = test.loc[test["label"] == 0, "kind"].value_counts()
    assert {kind: of["n"] for kind, of in summary["kinds"].items()} == kinds.to_dict()
    for kind, of_kind in summary["kinds"].items():
        shown = test[test["kind"].isin(["lens", kind])]
        auroc = roc_auc_score(shown["label"].astype(int), shown["probability"])
        assert of_kind["auroc"] == pytest.approx(auroc, abs=1e-9)


def test_settings_of_one_member_train_that_one_alone_and_test_time_augmentation_none(
    own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pd.read_parquet(summary_of(own_home)["scores"])
    trained = set(own_home.glob("checkpoints/*/[!.]*"))
    file = tmp_path / "training.yaml"
    file.write_text("lastro: {training: {learning_rate: 2e-3, epochs: 3}}")
    monkeypatch.setenv("LENS_TRAINING", str(file))
    monkeypatch.setenv("LENS_TEST_TIME_AUGMENTATION", "true")
    monkeypatch.setenv("LENS_FUSION", "stacking")
    monkeypatch.setenv("LENS_CALIBRATION", "temperature")
    assert run(own_home, "--set", "lastro.training.epochs=2") == 0
    summary = summary_of(own_home)
    made = {name for name, stage in summary["stages"].items() if not stage["reused"]}
    assert made == {
        "checkpoints/lastro",
        "lens_ensemble",
        "ensemble_evaluation",
        "registered_ensemble",
    }
    (new,) = set(own_home.glob("checkpoints/*/[!.]*")) - trained
    config = TrainedMember(new).config.training
    assert (new.parent.name, config.learning_rate, config.epochs) == ("lastro", 2e-3, 2)
    assert len(client_of(own_home).search_model_versions("name = 'lens_ensemble'")) == 2
    version = client_of(own_home).get_model_version_by_alias("lens_ensemble", "challenger")
    assert str(version.version) == "2"
    for text in (version.description, Path(summary["report"]).read_text()):
        assert "mean of those of a cutout's eight turns and flips" in html.unescape(text)
    after = pd.read_parquet(summary["scores"])
    assert not np.allclose(after["logit"], before["logit"])
    described = [path.parent for path in (own_home / "ensemble").glob("[!.]*/ensemble.json")]
    (folder,) = (one for one in described if read_description(one)["test_time_augmentation"])
    facts = read_description(folder)
    assert facts["fusion"]["strategy"] == "stacking"
    assert [of["intercept"] for of in facts["members"].values()] == [0, 0]  # of a temperature
    shards = open_shards(next((own_home / "cloud").glob("*/manifest.json")).parent)
    # The scores are those of the cutouts however they are turned.
    test, model = shards.split("test"), load_ensemble(folder)
    images = test.gather(np.arange(len(test)))
    found = model.predict(np.rot90(images, axes=(2, 3))[..., ::-1])["probability"]
    np.testing.assert_allclose(found, model.predict(images)["probability"], atol=1e-5)
    expected = after.set_index("id").loc[list(test.ids), "probability"]
    np.testing.assert_allclose(found, expected, atol=2e-3)  # shards hold 16 bits
    # And what it was calibrated and compared by.
    val = shards.split("val")
    images = val.gather(np.arange(len(val)))
    views = [np.rot90(one, k, (2, 3)) for one in (images, images[..., ::-1]) for k in range(4)]
    standing_of = read_description(folder)["standing"]
    for name in MEMBERS:
        system = load_system(folder / "members" / f"{name}.ckpt")
        logit = np.mean([system.scored(one)[0] for one in views], axis=0)
        by_hand = roc_auc_score(val.labels, logit)
        assert standing_of[name]["auroc"]["value"] == pytest.approx(by_hand, abs=1e-3)
    # The augmentation alone makes another ensemble, of the same members.
    monkeypatch.delenv("LENS_TEST_TIME_AUGMENTATION")
    settings = Settings.load(home=own_home)
    job = make_definitions(settings, retries=False).resolve_job_def("evaluation_and_registration")
    with open_instance(settings) as instance:
        done = job.execute_in_process(
            instance=instance, asset_selection=[dg.AssetKey("lens_ensemble")]
        )
    (made_again,) = done.asset_materializations_for_node("lens_ensemble")
    assert made_again.metadata["reused"].value is False
    described = (own_home / "ensemble").glob("[!.]*/ensemble.json")
    of_members = [read_description(one.parent) for one in described]
    assert sorted(one["test_time_augmentation"] for one in of_members) == [False, False, True]


def test_a_damaged_step_is_made_again(own_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Sizes are checked at every reuse, sha256 with --verify."""
    checkpoint = next((own_home / "checkpoints" / "lastro").glob("*/best.ckpt"))
    content = bytearray(checkpoint.read_bytes())
    content[1000] ^= 1
    checkpoint.chmod(0o644)
    checkpoint.write_bytes(content)
    assert run(own_home, "--verify") == 0
    stages = summary_of(own_home)["stages"]
    assert stages["checkpoints/lastro"]["reused"] is False
    assert stages["checkpoints/light_transformer"]["reused"] is True
    # The same weights again: what follows is as it was.
    assert stages["registered_ensemble"]["reused"] is True


def test_an_ensemble_is_never_scored_on_another_datasets_test_split(
    home: Path, dataset: Dataset, simulated_catalogue: Path, tmp_path: Path
) -> None:
    """With another split seed it would have been trained on what it is tested on."""
    ensemble = next((home / "ensemble").glob("*/ensemble.json")).parent
    gate = Settings.load(home=home).gate
    with pytest.raises(InputError, match="is not the dataset that the ensemble"):
        evaluate_ensemble(
            ensemble, dataset, read_catalogue(simulated_catalogue), tmp_path, gate=gate
        )


def test_a_home_that_was_copied_goes_on_from_its_own_folders(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dagster's records name those of the home where they were made."""
    monkeypatch.setenv("LENS_HOME", str(own_home))
    keys = [dg.AssetKey(name.split("/")) for name in ASSETS if name != "registered_ensemble"]

    @dg.asset(deps=keys, required_resource_keys={"lens"})
    def looks(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        folders = [str(made(context, key).folder) for key in keys]
        return dg.MaterializeResult(metadata={"folders": folders})

    settings = Settings.load(preset="tiny")
    with open_instance(settings) as instance:
        ran = dg.materialize(
            [*(make_definitions(settings).assets or ()), looks],  # type: ignore[list-item]
            selection=[looks],
            instance=instance,
            resources={"lens": LensHome()},
        )
    (event,) = ran.asset_materializations_for_node("looks")
    folders = [Path(name) for name in event.metadata["folders"].value]
    assert all(folder.is_dir() and folder.is_relative_to(own_home) for folder in folders)


def test_no_ensemble_is_made_of_members_of_older_shards(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where new data are published while members are trained: what they were trained on would be
    taken for unseen."""
    monkeypatch.setenv("LENS_PRESET", "tiny")
    monkeypatch.setenv("LENS_SEED", "1")
    settings = Settings.load(home=own_home)
    settings.export()
    definitions = make_definitions(settings, retries=False)
    with open_instance(settings) as instance:
        assert definitions.resolve_job_def("data").execute_in_process(instance=instance).success
        job = definitions.resolve_job_def("evaluation_and_registration")
        with pytest.raises(InputError, match="checkpoints/.* was trained on the dataset"):
            job.execute_in_process(instance=instance)


def test_a_cancelled_training_is_followed_by_no_ensemble_of_new_and_old_members(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dagster, which knows of those that failed, takes no notice of it."""
    monkeypatch.setenv("LENS_PRESET", "tiny")
    settings = Settings.load(home=own_home)
    settings.export()
    definitions = make_definitions(settings, retries=False)
    by_itself = {AUTOMATION_CONDITION_TAG: "true"}
    with open_instance(settings) as instance:
        cancelled = instance.create_run_for_job(definitions.resolve_job_def("training"))
        instance.report_run_canceled(cancelled)
        job = definitions.resolve_job_def("evaluation_and_registration")
        with pytest.raises(InputError, match="checkpoints/.*: its training was cancelled"):
            job.execute_in_process(instance=instance, tags=by_itself)
        for name in ("lastro", "light_transformer"):  # trained by somebody since
            key = dg.AssetKey(["checkpoints", name])
            instance.report_runless_asset_event(dg.AssetMaterialization(key))
        assert job.execute_in_process(instance=instance, tags=by_itself).success


@pytest.mark.slow
@pytest.mark.timeout(3000)  # of three trainings, also on a machine that others use
def test_the_default_job_finds_lenses(tmp_path: Path) -> None:
    """What `make run` promises: enough of a test split, and an ensemble that beats its members."""
    assert main(["run", "--home", str(tmp_path / "home")]) == 0
    summary = summary_of(tmp_path / "home")
    ensemble = summary["ensemble"]
    assert min(ensemble["n_lens"], ensemble["n_nonlens"]) >= 400
    assert ensemble["auroc"]["value"] >= 0.90
    best = max(metrics["auroc"]["value"] for metrics in summary["members"].values())
    assert ensemble["auroc"]["value"] >= best - 0.005
    assert summary["model"]["aliases"] == ["challenger", "champion"]
