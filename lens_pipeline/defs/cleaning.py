"""The job `cleaning`: what Dagster keeps of runs that ended long ago is removed."""

import datetime

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
    kept = {
        entry.last_run_id
        for entry in (record.asset_entry for record in instance.get_asset_records())
    } | {
        entry.last_materialization_record.run_id
        for entry in (record.asset_entry for record in instance.get_asset_records())
        if entry.last_materialization_record is not None
    }
    before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days)
    old = dg.RunsFilter(statuses=ENDED, updated_before=before)
    removed = 0
    for run in instance.get_runs(old):
        if run.run_id not in kept:
            instance.delete_run(run.run_id)
            instance.compute_log_manager.delete_logs(prefix=[run.run_id])
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
