"""The job `cleaning`: what ended or was made long ago, and nothing needs, is removed."""

import datetime
import shutil
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import dagster as dg

from lens_pipeline.defs.resources import LensHome
from lens_pipeline.defs.stages import CLOUD, LOCATION, PUBLISHED_FROM, log, newest_first, tries_of
from lens_pipeline.steps import Removed, remove_unused

ENDED = [
    dg.DagsterRunStatus.SUCCESS,
    dg.DagsterRunStatus.FAILURE,
    dg.DagsterRunStatus.CANCELED,
]
# That may be reading what they have not made.
UNDER_WAY = [
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
# Of LENS_HOME. Of the others, small and looked at, what stopped steps have left goes alone.
MADE_AGAIN = ("cache", "catalogue", "checkpoints/*", "dataset", "shards")
STAY = ("ensemble", "pictures", "reports", "statistics")
MANY = 1000  # versions that were published while one run was under way


def _last_made(instance: dg.DagsterInstance) -> Iterator[dg.EventLogRecord]:
    """What was last made of each asset, and of each survey of it; and where that is only what
    somebody has reported on Dagster's pages, what the pipeline has left."""
    for record in instance.get_asset_records():
        key = record.asset_entry.asset_key
        for survey in (None, *instance.get_materialized_partitions(key)):
            surveys = None if survey is None else [survey]
            which = dg.AssetRecordsFilter(asset_key=key, asset_partitions=surveys)
            of_which = newest_first(instance.fetch_materializations, which)
            if (newest := next(of_which, None)) is not None:
                yield newest
                ours = (one for one in chain([newest], of_which) if _left(one) is not None)
                yield from islice(ours, 1)


def shards_in_use(instance: dg.DagsterInstance) -> dict[str, str]:
    """{version of the published shards: what uses it}, as far as this instance knows: the one that
    was made or seen last, and what was when the oldest run that is under way, or waits to be, was
    launched, or since. One that is tried again takes what it took at first."""
    now = datetime.datetime.now(datetime.UTC)
    begun = min([now, *(one.create_timestamp for one in _tries_under_way(instance))]).timestamp()
    since = dg.AssetRecordsFilter(asset_key=CLOUD, after_timestamp=begun)
    before = dg.AssetRecordsFilter(asset_key=CLOUD, before_timestamp=begun)
    used: dict[str, str] = {}
    for fetch in (instance.fetch_materializations, instance.fetch_observations):
        later = filter(None, map(_left, fetch(since, limit=MANY).records))
        earlier = filter(None, map(_left, newest_first(fetch, before)))
        contents = [*later, *islice(earlier, 1)]  # the newest first
        used = dict.fromkeys(contents[1:], "a run under way") | used
        used |= dict.fromkeys(contents[:1], f"{CLOUD.to_user_string()} of this home")
    return used


def _tries_under_way(instance: dg.DagsterInstance) -> Iterator[dg.RunRecord]:
    """The runs that are under way, or wait to be, and those that they go on from."""
    runs = instance.get_runs(dg.RunsFilter(statuses=[*UNDER_WAY, dg.DagsterRunStatus.QUEUED]))
    return (one for run in runs for one in tries_of(instance, run.run_id))


def _left(record: dg.EventLogRecord) -> str | None:
    """The content hash of what was made or seen; None of what was only reported to be."""
    about = record.asset_materialization or record.asset_observation
    content = about.metadata.get("content") if about is not None else None
    return None if content is None else str(content.value)


def _begin_of_days(lens: LensHome) -> datetime.datetime:
    """When LENS_KEEP_DAYS began."""
    return datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=lens.settings.keep_days)


@dg.op
def remove_old_runs(context: dg.OpExecutionContext, lens: LensHome) -> int:
    """Remove the runs, events and logs that are older than LENS_KEEP_DAYS. Returns how many runs.

    What was last made of an asset stays known: the runs that made it are kept. So are those that
    one under way goes on from, whose data it takes.
    """
    instance, days = context.instance, lens.settings.keep_days
    kept: set[str | None] = {record.run_id for record in _last_made(instance)}
    kept |= {one.dagster_run.run_id for one in _tries_under_way(instance)}
    for record in instance.get_asset_records():
        key = record.asset_entry.asset_key
        seen = instance.fetch_observations(key, limit=1).records
        kept |= {record.asset_entry.last_run_id, *(one.run_id for one in seen)}
    old = dg.RunsFilter(statuses=ENDED, updated_before=_begin_of_days(lens))
    removed = 0
    for run in instance.get_runs(old):
        if run.run_id not in kept:
            instance.delete_run(run.run_id)
            instance.compute_log_manager.delete_logs(prefix=[run.run_id])
            # In SQLite each run has a file, which Dagster empties and leaves; and a folder, where
            # its logs are kept elsewhere.
            for left in list(Path(instance.root_directory).rglob(f"{run.run_id}*")):
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)
            removed += 1
    context.add_output_metadata({"runs removed": removed, "older than (days)": days})
    log.info("cleaning: %d runs ended more than %d days ago are removed", removed, days)
    return removed


@dg.op
def remove_unused_folders(context: dg.OpExecutionContext, lens: LensHome) -> int:
    """Remove the folders of steps in LENS_HOME that no run has made or reused for LENS_KEEP_DAYS,
    and those of steps that were stopped then. Returns how many bytes that frees.

    What was last made of an asset stays, as do ensembles and reports. Nothing is removed while
    another run is under way, which may be reading it, nor where nothing is known to have been made:
    it is another Dagster instance than the one of this home.
    """
    instance, days = context.instance, lens.settings.keep_days
    others = [
        run.run_id[:8]
        for run in instance.get_runs(
            dg.RunsFilter(statuses=[*UNDER_WAY, dg.DagsterRunStatus.QUEUED])
        )
        if run.job_name != context.job_name
    ]
    kept = {
        Path(str(record.asset_materialization.metadata[place].value)).name
        for record in _last_made(instance)
        if record.asset_materialization
        for place in (LOCATION, PUBLISHED_FROM)
        if place in record.asset_materialization.metadata
    }
    removed: list[Removed] = []
    if others:
        said = f"no folder is removed while runs are under way: {', '.join(others)}"
    elif not kept:
        said = "no folder is removed: Dagster knows of nothing that was made"
    else:
        before = _begin_of_days(lens).timestamp()
        home = lens.settings.home
        for root in (root for pattern in MADE_AGAIN for root in home.glob(pattern)):
            removed += remove_unused(root, before, kept)
        for root in filter(Path.is_dir, map(home.joinpath, STAY)):
            removed += remove_unused(root, before, [folder.name for folder in root.iterdir()])
        said = f"{len(removed)} folders that nothing has used for {days} days are removed"
    freed = sum(one.bytes for one in removed)
    context.add_output_metadata(
        {
            "what was done": said,
            "removed": "\n".join(str(one.folder) for one in removed) or "nothing",
            "gigabytes": round(freed / 1e9, 3),
        }
    )
    log.info("cleaning: %s, %.1f GB", said, freed / 1e9)
    return freed


@dg.job(
    description="Remove what Dagster keeps of runs that ended more than LENS_KEEP_DAYS ago, and "
    "what their steps have made and nothing has used since.",
    executor_def=dg.in_process_executor,
)
def cleaning() -> None:
    remove_old_runs()
    remove_unused_folders()
