"""The job `cleaning`: what Dagster keeps of runs that ended long ago is removed."""

import datetime
from pathlib import Path

import dagster as dg

from lens_pipeline.defs.resources import LensHome
from lens_pipeline.defs.stages import log

ENDED = [
    dg.DagsterRunStatus.SUCCESS,
    dg.DagsterRunStatus.FAILURE,
    dg.DagsterRunStatus.CANCELED,
]
BATCH = 100


@dg.op
def remove_old_runs(context: dg.OpExecutionContext, lens: LensHome) -> int:
    """Remove the runs, events and logs that are older than LENS_KEEP_DAYS. Returns how many runs.

    What was last made of an asset stays known: the runs that made it are kept.
    """
    instance, days = context.instance, lens.settings.keep_days
    kept = set()
    for record in instance.get_asset_records():
        last = record.asset_entry.last_materialization_record
        kept |= {record.asset_entry.last_run_id, last and last.run_id}
        key = record.asset_entry.asset_key
        kept |= {one.run_id for one in instance.fetch_observations(key, limit=1).records}
        for survey in instance.get_materialized_partitions(key):
            of_survey = dg.AssetRecordsFilter(asset_key=key, asset_partitions=[survey])
            last_of = instance.fetch_materializations(of_survey, limit=1).records
            kept |= {one.run_id for one in last_of}
    before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days)
    old = dg.RunsFilter(statuses=ENDED, updated_before=before)
    removed = 0
    for run in instance.get_runs(old):
        if run.run_id not in kept:
            instance.delete_run(run.run_id)
            instance.compute_log_manager.delete_logs(prefix=[run.run_id])
            # In SQLite each run has a file, which Dagster empties and leaves.
            for file in Path(instance.root_directory).rglob(f"{run.run_id}*"):
                file.unlink()
            removed += 1
    context.add_output_metadata({"runs removed": removed, "older than (days)": days})
    log.info("cleaning: %d runs ended more than %d days ago are removed", removed, days)
    return removed


@dg.job(
    description="Remove what Dagster keeps of runs that ended more than LENS_KEEP_DAYS ago.",
    executor_def=dg.in_process_executor,
)
def cleaning() -> None:
    remove_old_runs()
