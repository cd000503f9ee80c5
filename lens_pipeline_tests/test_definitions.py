"""The one Dagster entry point: the graph, and how little it takes to load it."""

import subprocess
import sys
from pathlib import Path

import dagster as dg
import numpy as np
import pandas as pd
import pytest

from lens_pipeline.definitions import make_definitions
from lens_pipeline.defs import checkpoints, dataset, ensemble, shards
from lens_pipeline.defs.resources import LensHome
from lens_pipeline.settings import Settings
from lens_pipeline.steps import source_hashes

HEAVY = [
    *("torch", "pytorch_lightning", "mlflow", "pandas", "astropy", "matplotlib", "skimage"),
    *("boto3", "dagster_aws", "dagster_gcp"),
]


def test_loading_pulls_in_nothing_heavy() -> None:
    program = (
        "import sys; import lens_pipeline.definitions; "
        f"print(*[name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_the_library_imports_in_an_instant() -> None:
    program = "import sys; import lens_pipeline; print(len(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 300


def graph(archs: str) -> dict[str, set[str]]:
    """{asset: what it is made from}."""
    definitions = make_definitions(Settings.load(archs=archs))
    resolved = definitions.resolve_asset_graph()
    return {
        key.to_user_string(): {parent.to_user_string() for parent in resolved.get(key).parent_keys}
        for key in resolved.get_all_asset_keys()
    }


def test_the_asset_graph_is_that_of_the_design() -> None:
    members = {"checkpoints/a", "checkpoints/timm_convnext_atto"}
    found = graph("a=resnet18@3,timm:convnext_atto")
    assert set(found) == {
        *("cutout_catalogue", "processed_dataset", "lens_shards", "cloud_shards"),
        *members,
        *("lens_ensemble", "ensemble_evaluation", "registered_ensemble"),
    }
    assert found["processed_dataset"] == {"cutout_catalogue"}
    assert found["lens_shards"] == {"processed_dataset"}
    assert found["cloud_shards"] == {"lens_shards"}
    for member in members:
        assert found[member] == {"cloud_shards"}
    assert members <= found["lens_ensemble"]
    assert "lens_ensemble" in found["ensemble_evaluation"]
    assert "ensemble_evaluation" in found["registered_ensemble"]


def test_a_members_run_config_has_the_bounds_and_help_of_its_settings() -> None:
    definitions = make_definitions(Settings.load(archs="resnet18"))
    job = definitions.resolve_job_def("full_pipeline")
    good = {"ops": {"checkpoints__resnet18": {"config": {"training": {"epochs": 2}}}}}
    assert dg.validate_run_config(job, good)
    for bad in ({"training": {"epoch": 2}}, {"training": {"epochs": "two"}}):
        config = {"ops": {"checkpoints__resnet18": {"config": bad}}}
        with pytest.raises(dg.DagsterInvalidConfigError):
            dg.validate_run_config(job, config)


def test_every_asset_says_what_it_is() -> None:
    definitions = make_definitions(Settings.load(archs="resnet18"))
    resolved = definitions.resolve_asset_graph()
    for key in resolved.get_all_asset_keys():
        node = resolved.get(key)
        assert node.description, key
        assert node.code_version, key


def test_a_change_of_a_plot_makes_no_data_and_no_network_again() -> None:
    plots = "lens_pipeline.evaluation.plots"
    assert plots in source_hashes(["lens_pipeline.ensemble.evaluate"])
    for stage in (dataset.BUILD, shards.WRITER, checkpoints.TRAIN, ensemble.SYSTEM):
        assert plots not in source_hashes([stage])


def test_near_duplicates_are_warned_of_and_stop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 60
    noise = np.random.default_rng(3).normal(size=(n, 1, 32, 32)).astype(np.float32)
    noise[1] = noise[0]
    np.save(tmp_path / "stack.npy", noise)
    table = pd.DataFrame({"id": [f"c{i}" for i in range(n)], "label": np.arange(n) // 3 % 2})
    table["path"] = [f"stack.npy#{i}" for i in range(n)]
    table["split"] = np.array(["train", "val", "test"])[np.arange(n) % 3]
    table.to_csv(tmp_path / "table.csv", index=False)
    monkeypatch.setenv("LENS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LENS_SOURCE", str(tmp_path / "table.csv"))
    monkeypatch.setenv("LENS_IMAGE_SIZE", "32")
    done = dg.materialize(
        [dataset.cutout_catalogue.asset(), dataset.processed_dataset.asset()],
        resources={"lens": LensHome()},
    )
    assert done.success
    checks = {check.check_name: check for check in done.get_asset_check_evaluations()}
    assert checks["no_group_spans_two_splits"].passed
    found = checks["no_near_duplicates_across_splits"]
    assert not found.passed
    assert found.severity == dg.AssetCheckSeverity.WARN
    assert not found.blocking
    assert found.metadata["pairs"].value == 1
    (first,) = found.metadata["first"].records
    assert (first.data["id"], first.data["other_id"]) == ("c0", "c1")
