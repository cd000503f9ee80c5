"""The one Dagster entry point: the graph, and how little it takes to load it."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import dagster as dg
import numpy as np
import pandas as pd
import pytest

from lens_pipeline.code_hashes import source_hashes
from lens_pipeline.definitions import make_definitions
from lens_pipeline.defs import catalogue, checkpoints, dataset, ensemble, shards
from lens_pipeline.defs.resources import LensHome
from lens_pipeline.settings import Settings
from lens_pipeline.shards import publish_shards
from lens_pipeline_tests.graph import MEMBERS, SHOWN, described

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


@pytest.mark.parametrize(("chosen", "spins"), [(None, "0"), ("ACTIVE", "30000000000")])
def test_threads_that_wait_leave_the_cores_to_others(
    chosen: str | None, spins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two trainings on the same cores are many times slower than one after the other."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_WAIT_POLICY", chosen)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")  # OpenMP says what it will do
    of_torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])  # type: ignore[union-attr,index]
    (library,) = of_torch.glob("lib/libgomp*.so*")  # which is all of it that matters here
    done = subprocess.run(
        [sys.executable, "-c", f"import lens_pipeline, ctypes; ctypes.CDLL({str(library)!r})"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


def test_all_that_the_library_offers_is_found_from_its_top() -> None:
    """In a process of its own, where nothing has imported a subpackage before."""
    program = (
        "import lens_pipeline\n"
        "assert set(lens_pipeline.__all__) <= set(dir(lens_pipeline))\n"
        "for part in [getattr(lens_pipeline, name) for name in lens_pipeline.__all__]:\n"
        "    for name in getattr(part, '__all__', []):\n"
        "        print(part.__name__, name, getattr(part, name).__doc__ is not None)\n"
        "print(lens_pipeline.__version__, lens_pipeline.InputError.__mro__[1].__name__)\n"
        "print(hasattr(lens_pipeline, 'registri'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    *found, versions, other = done.stdout.splitlines()
    offered = [line.split() for line in found]
    for subpackage, name in (
        *(("ensemble", "Mean"), ("ensemble", "fit_calibration"), ("models", "stretch")),
        *(("evaluation", "threshold_at_fpr"), ("evaluation", "roc_figure")),
        *(("models", "augment"), ("simulation", "simulate"), ("training", "train")),
        *(("catalogue", "read_catalogue"), ("shards", "write_shards")),
    ):
        assert [f"lens_pipeline.{subpackage}", name, "True"] in offered
    assert versions.split() == [importlib.metadata.version("lens-pipeline"), "ValueError"]
    assert other == "False"


def test_the_asset_graph_is_as_it_was() -> None:
    """Keys, origins, groups, owners, pools, retries, freshness and checks; see `graph.py`."""
    assert described(Settings.load(archs=MEMBERS)) + "\n" == SHOWN.read_text()


def test_dagster_accepts_the_project() -> None:
    """With the workspace as who clones the repository has it, in a process of its own."""
    workspace = Path(__file__).parents[1] / "workspace.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "dagster", "definitions", "validate", "-w", str(workspace)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All code locations passed validation" in done.stdout + done.stderr


def test_where_somebody_waits_nothing_is_tried_again() -> None:
    for retries in (True, False):
        graph = make_definitions(Settings.load(archs="resnet18"), retries).resolve_asset_graph()
        policies = {
            key.to_user_string(): graph.get(key).assets_def.op.retry_policy
            for key in graph.get_all_asset_keys()
        }
        again = {name for name, policy in policies.items() if policy is not None}
        here = {"lens_shards", "lens_ensemble"}  # they need no network
        assert again == (set(policies) - here if retries else set())


def test_the_ensemble_is_tried_again_where_its_shards_lie_in_a_store() -> None:
    settings = Settings.load(archs="resnet18", cloud_url="s3://bucket/lenses")
    node = make_definitions(settings).resolve_asset_graph().get(dg.AssetKey("lens_ensemble"))
    assert node.assets_def.op.retry_policy is not None


def test_published_shards_that_are_observed_are_described_as_all_else_is(
    shards_folder: Path, tmp_path: Path
) -> None:
    publish_shards(shards_folder, str(tmp_path))
    settings = Settings.load(archs="resnet18", source=str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error", dg.BetaWarning)  # the user could do nothing about it
        first, *_ = described(settings).split("\n\n")
    assert first.splitlines() == [
        "cloud_shards (observed)",
        "  group: data",
        "  kinds: webdataset",
        "  owners: team:lens-finding",
    ]


def test_a_members_run_config_takes_its_settings_as_the_files_do() -> None:
    """`1e-4` is text for YAML."""
    definitions = make_definitions(Settings.load(archs="resnet18"))
    job = definitions.resolve_job_def("full_pipeline")
    good = {"training": {"epochs": 2, "learning_rate": "1e-4"}, "model": {"dropout_rate": 0.1}}
    assert dg.validate_run_config(job, {"ops": {"checkpoints__resnet18": {"config": good}}})
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
        (source,) = node.metadata["dagster/code_references"].code_references
        lines = Path(source.file_path).read_text().splitlines()
        assert lines[source.line_number - 1].lstrip().startswith("@stage("), key


def test_a_change_of_a_plot_makes_no_data_and_no_network_again() -> None:
    for drawn in (checkpoints.PLOTS, dataset.SHEETS):
        assert drawn in source_hashes(["lens_pipeline.scoring.evaluate"])
        for stage in (dataset.BUILD, shards.WRITER, checkpoints.TRAIN, ensemble.ASSEMBLY):
            assert drawn not in source_hashes([stage])
    assert dataset.SHEETS not in source_hashes([checkpoints.PLOTS])


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
        [catalogue.cutout_catalogue.asset(), dataset.processed_dataset.asset()],
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


def test_a_run_has_as_many_steps_at_a_time_as_its_deployment_can_hold() -> None:
    def at_a_time(deployment: str, **chosen: int) -> int:
        job = make_definitions(Settings.load(deployment=deployment)).resolve_job_def("training")
        config = dg.validate_run_config(job, {"execution": {"config": chosen}})["execution"]
        assert "lens_pipeline.definitions" in str(config["multiprocess"]["start_method"])
        return int(config["multiprocess"]["max_concurrent"])

    assert at_a_time("local") < at_a_time("staging")
    assert at_a_time("production") == 0  # a core each
    assert at_a_time("staging", max_concurrent=1) == 1
    with pytest.raises(dg.DagsterInvalidConfigError, match="max_concurrnet"):
        at_a_time("local", max_concurrnet=1)


def test_whatever_is_launched_by_hand_or_by_itself_says_what_it_does() -> None:
    definitions = make_definitions(Settings.load(archs="resnet18"))
    listed = [*definitions.jobs, *definitions.schedules, *definitions.sensors]
    assert [one.name for one in listed if not one.description] == []
