"""What is removed as old, and what is not, for it is there or is needed."""

import os
import sqlite3
import time
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.storage.tags import RESUME_RETRY_TAG

from lens_pipeline.definitions import make_definitions
from lens_pipeline.defs.stages import result
from lens_pipeline.runner import open_instance
from lens_pipeline.settings import Settings
from lens_pipeline.steps import Recipe, Step, run_step
from lens_pipeline_tests.defs.ticks import SURVEYS

AGO = time.time() - 40 * 86400


def test_cleaning_removes_old_runs_but_none_that_made_what_is_there(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dg.asset
    def thing() -> None:
        print("a line of its log")

    @dg.op
    def looks(context: dg.OpExecutionContext) -> None:
        context.log_event(dg.AssetObservation("elsewhere"))

    @dg.job
    def looking() -> None:
        looks()

    monkeypatch.setenv("LENS_KEEP_DAYS", "30")
    definitions = dg.Definitions([thing], jobs=[dg.define_asset_job("all")])
    first, second, third = (
        definitions.resolve_job_def("all").execute_in_process(instance=instance).run_id
        for _ in range(3)
    )
    saw = looking.execute_in_process(instance=instance).run_id
    # `third` made what is there now, `saw` saw it.
    changed(instance, [first, third, saw], update_timestamp=stamp(AGO))
    cleaning = make_definitions(Settings.load()).resolve_job_def("cleaning")
    done = cleaning.execute_in_process(instance=instance)
    assert done.output_for_node("remove_old_runs") == 1
    assert {run.run_id for run in instance.get_runs()} == {second, third, saw, done.run_id}
    kept = {path.name for path in Path(instance.root_directory).rglob("*")}
    assert not [name for name in kept if first in name]
    assert [name for name in kept if second in name]
    latest = instance.get_latest_materialization_event(dg.AssetKey("thing"))
    assert latest is not None
    assert latest.run_id == third


def test_cleaning_keeps_what_a_run_under_way_goes_on_from(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its data are those that the first try began with, however long ago."""

    @dg.job
    def job() -> None: ...

    monkeypatch.setenv("LENS_KEEP_DAYS", "1")
    died, ended = (
        instance.create_run_for_job(job, status=status).run_id
        for status in (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.FAILURE)
    )
    again = instance.create_run_for_job(
        job,
        status=dg.DagsterRunStatus.STARTED,
        parent_run_id=died,
        root_run_id=died,
        tags={RESUME_RETRY_TAG: "true"},
    ).run_id
    changed(instance, [died, ended], update_timestamp=stamp(AGO))
    cleaning = make_definitions(Settings.load()).resolve_job_def("cleaning")
    done = cleaning.execute_in_process(instance=instance)
    assert {run.run_id for run in instance.get_runs()} == {died, again, done.run_id}


def test_cleaning_removes_the_folder_of_a_run_whose_logs_are_kept_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dg.op
    def nothing() -> None: ...

    @dg.job
    def idle() -> None:
        nothing()

    monkeypatch.setenv("LENS_KEEP_DAYS", "30")
    settings = Settings.load()
    with open_instance(settings) as instance:
        old = idle.execute_in_process(instance=instance).run_id
        changed(instance, [old], update_timestamp=stamp(AGO))
        folder = settings.dagster_home / "storage" / old / "nothing"
        folder.mkdir(parents=True)
        (folder / f"{old}.pickle").write_bytes(b"what an op returned")
        cleaning = make_definitions(settings).resolve_job_def("cleaning")
        done = cleaning.execute_in_process(instance=instance)
    assert done.output_for_node("remove_old_runs") == 1
    assert not [path for path in settings.dagster_home.rglob("*") if old in path.name]


def test_cleaning_keeps_what_made_each_survey_last(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dg.asset(partitions_def=dg.StaticPartitionsDefinition([*SURVEYS]))
    def thing() -> None: ...

    monkeypatch.setenv("LENS_KEEP_DAYS", "30")
    runs = [
        dg.materialize([thing], instance=instance, partition_key=survey).run_id
        for survey in ("des", "des", "hsc")
    ]
    changed(instance, runs, update_timestamp=stamp(AGO))
    cleaning = make_definitions(Settings.load()).resolve_job_def("cleaning")
    assert cleaning.execute_in_process(instance=instance).output_for_node("remove_old_runs") == 1
    records = instance.fetch_materializations(dg.AssetKey("thing"), limit=10).records
    assert [record.run_id for record in records] == [runs[2], runs[1]]


def test_cleaning_removes_folders_that_nothing_has_used_but_none_that_holds_what_is_there(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Settings.load().home / "dataset"

    def step(n: int) -> Step:
        recipe = Recipe("thing", (), settings={"n": n})
        return run_step(recipe, root, lambda out: (out / "pixels.npy").write_bytes(b"12345678"))

    class Wanted(dg.Config):
        n: int

    @dg.asset(partitions_def=dg.StaticPartitionsDefinition([*SURVEYS]))
    def thing(config: Wanted) -> dg.MaterializeResult:
        return result(step(config.n), {})

    for survey, n in (("des", 1), ("des", 2), ("hsc", 3)):
        chosen = dg.RunConfig({"thing": Wanted(n=n)})
        run = dg.materialize([thing], instance=instance, partition_key=survey, run_config=chosen)
    for file in root.rglob("*"):
        os.utime(file, (AGO, AGO))
    step(4)
    # As by "Report materialization" on Dagster's pages.
    instance.report_runless_asset_event(dg.AssetMaterialization("thing", partition="hsc"))
    monkeypatch.setenv("LENS_KEEP_DAYS", "30")
    cleaning = make_definitions(Settings.load()).resolve_job_def("cleaning")

    def n_bytes() -> int:
        done = cleaning.execute_in_process(instance=instance)
        return done.output_for_node("remove_unused_folders")

    changed(instance, [run.run_id], status="STARTED")
    assert n_bytes() == 0  # what is under way may be reading it
    changed(instance, [run.run_id], status="SUCCESS")
    with dg.DagsterInstance.ephemeral() as another:  # that knows nothing of this home
        done = cleaning.execute_in_process(instance=another)
        assert done.output_for_node("remove_unused_folders") == 0
    assert n_bytes() > 8
    # The first is made again, the others were kept.
    assert [step(n).reused for n in (1, 2, 3, 4)] == [False, True, True, True]


def stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def changed(instance: dg.DagsterInstance, run_ids: list[str], **columns: str) -> None:
    """Runs as if other things were known of them."""
    (database,) = Path(instance.root_directory).rglob("runs.db")
    with sqlite3.connect(database) as connection:
        wanted = ", ".join(f"{name} = ?" for name in columns)
        marks = ",".join("?" * len(run_ids))
        connection.execute(
            f"update runs set {wanted} where run_id in ({marks})", [*columns.values(), *run_ids]
        )
