"""What every asset does: run its step, find its inputs, say what came out."""

import functools
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.storage.tags import ASSET_RESUME_RETRY_TAG
from dagster._utils.schedules import schedule_execution_time_iterator

from lens_pipeline.code_hashes import source_hashes
from lens_pipeline.defs.surveys import over_surveys, partitioned
from lens_pipeline.errors import InputError, NoAnswerError
from lens_pipeline.files import digest
from lens_pipeline.locations import protocol_of
from lens_pipeline.settings import Settings
from lens_pipeline.steps import Recipe, Step, run_step
from lens_pipeline.training.launch import TOLD, raise_told

log = logging.getLogger("lens_pipeline.stages")

CATALOGUE = dg.AssetKey("cutout_catalogue")
DATASET = dg.AssetKey("processed_dataset")
SHARDS = dg.AssetKey("lens_shards")
CLOUD = dg.AssetKey("cloud_shards")
ENSEMBLE = dg.AssetKey("lens_ensemble")
EVALUATION = dg.AssetKey("ensemble_evaluation")
REGISTERED = dg.AssetKey("registered_ensemble")

OWNERS = ("team:lens-finding",)
# What fails by chance: a store or server that is gone for a while, a worker that is killed. After
# 10 s, and once more 30 s later; stores have been asked for longer by then.
AGAIN = dg.RetryPolicy(max_retries=2, delay=10, backoff=dg.Backoff.EXPONENTIAL)
DAY = timedelta(days=1)
TICKS = 1000  # of a schedule that are looked at: a week, where they are ten minutes apart
# Of a materialisation: where what was made lies, and the folder that it was published from.
LOCATION, PUBLISHED_FROM = "location", "published from"
# Seconds that a process has to write down where it is: less than `cancel_timeout_seconds`.
LEAVE = 150


def checkpoint_key(member: str) -> dg.AssetKey:
    return dg.AssetKey(["checkpoints", member])


@dataclass(frozen=True)
class Stage:
    """An asset that is still to be told whether it is tried again, of which surveys it is, and when
    it is overdue: see `stage`."""

    body: Callable[..., dg.MaterializeResult]
    declared: Mapping[str, Any]
    by_chance: bool
    by_survey: bool
    by_schedule: bool

    def asset(
        self,
        retries: bool = True,
        surveys: Sequence[str] = (),
        freshness: dg.FreshnessPolicy | None = None,
    ) -> dg.AssetsDefinition:
        """retries: whether what failed by chance is tried again, as where nobody waits for it;
        surveys: the partitions of what is made survey by survey, none where all are made as one;
        freshness: of what is made by schedule."""
        again = self.by_chance and retries
        body = over_surveys(self.body) if self.by_survey else self.body
        with quiet():
            declare = dg.asset(
                **self.declared,
                retry_policy=AGAIN if again else None,
                freshness_policy=freshness if self.by_schedule else None,
                **(partitioned(surveys) if self.by_survey and surveys else {}),
            )
        return declare(bad_input_is_final(body) if again else body)


def source_of(body: Callable[..., Any]) -> dict[str, Any]:
    """The file and line of an asset's function, as metadata that the UI shows with the asset.

    `dagster.with_source_code_references` would name those of what is wrapped round it.
    """
    code = body.__code__
    with quiet():
        place = dg.LocalFileCodeReference(
            file_path=code.co_filename, line_number=code.co_firstlineno
        )
        references = dg.CodeReferencesMetadataValue(code_references=[place])
    return {"dagster/code_references": references}


@contextmanager
def quiet() -> Iterator[None]:
    """Of what of Dagster may still change: it would tell every user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        yield


def stage(
    key: dg.AssetKey,
    *,
    modules: tuple[str, ...],
    by_chance: bool,
    by_survey: bool = False,
    by_schedule: bool = False,
    **declared: Any,
) -> Callable[[Callable[..., dg.MaterializeResult]], Stage]:
    """Declares an asset of the pipeline; `declared` is what else `dagster.asset` takes.

    modules: the library modules that it runs; by_chance: whether it needs what may be gone for a
    while (a network, a server, a worker); by_survey: whether it is made survey by survey where
    there are several: its function is given the name of one, None where all are made as one;
    by_schedule: whether somebody should look where no retraining has made it for long.
    """

    def declare(body: Callable[..., dg.MaterializeResult]) -> Stage:
        common = {
            "key": key,
            "owners": OWNERS,
            "code_version": code_version(*modules),
            "metadata": source_of(body),
        }
        return Stage(body, common | declared, by_chance, by_survey, by_schedule)

    return declare


def freshness(settings: Settings) -> dg.FreshnessPolicy:
    """When what retrainings make is overdue, by LENS_RETRAIN_CRON, which is valid: a day after one
    was due, and in earnest after five times as long as there is ever between two.

    None is launched where nothing is new: the survey may have sent nothing, but not for ever.
    """
    ticks = schedule_execution_time_iterator(0, settings.retrain_cron, settings.time_zone)
    longest = max(after - before for before, after in pairwise(islice(ticks, TICKS)))
    longest = max(longest, DAY)  # for looking, it is no matter of minutes
    return dg.FreshnessPolicy.time_window(fail_window=5 * longest, warn_window=longest + DAY)


@dataclass(frozen=True)
class Made:
    """What an upstream asset left: where it is (a folder or URL), and a hash of its content."""

    location: str
    content: str

    @property
    def folder(self) -> Path:
        return Path(self.location)


def code_version(*modules: str) -> str:
    """The source of the library modules that an asset runs."""
    return digest(source_hashes(modules))[:12]


def made(context: dg.AssetExecutionContext, key: dg.AssetKey, survey: str | None = None) -> Made:
    """What an upstream asset left, of a survey where it is made by survey: in this run, or one that
    it goes on from, where it is part of it; else when it was last made before the first of them
    began (or observed, where it is made elsewhere), for all steps of a run take the same.

    Raises InputError where it had never been.
    """
    observed = context.job_def.asset_layer.asset_graph.get(key).is_observable
    kind = "OBSERVATION" if observed else "MATERIALIZATION"
    of_type = dg.DagsterEventType[f"ASSET_{kind}"]
    instance = context.instance
    tries = [*tries_of(instance, context.run_id)]
    in_tries = (
        record
        for one in tries
        for record in reversed(
            instance.get_records_for_run(one.dagster_run.run_id, of_type=of_type).records
        )
    )
    begun = min((one.start_time for one in tries if one.start_time is not None), default=None)
    before = dg.AssetRecordsFilter(key, before_timestamp=begun)
    fetch = instance.fetch_observations if observed else instance.fetch_materializations
    for record in chain(in_tries, newest_first(fetch, before)):
        entry = record.event_log_entry
        event = entry.asset_observation or entry.asset_materialization
        if event is None or LOCATION not in event.metadata:
            continue  # somebody has reported it by hand, on Dagster's pages
        if (event.asset_key, event.partition) == (key, survey):
            location, content = (str(event.metadata[name].value) for name in (LOCATION, "content"))
            return Made(_followed(location, context.resources.lens.settings), content)
    todo = "observed before this run; observe" if observed else "made before this run; materialise"
    of = f" of {survey}" if survey else ""
    raise InputError(f"{key.to_user_string()}{of} was not {todo} it, and launch another")


def _followed(location: str, settings: Settings) -> str:
    """Where a folder lies now that was made in a home which was moved, or copied, since."""
    stated = (str(settings.home), settings.cloud, settings.source)
    if protocol_of(location) or any(Path(location).is_relative_to(place) for place in stated):
        return location
    parts = Path(location).parts
    # As reports/KEY, checkpoints/NAME/KEY.
    inside = (settings.home.joinpath(*parts[-n:]) for n in (2, 3) if len(parts) > n)
    return next((str(folder) for folder in inside if folder.is_dir()), location)


def was_cancelled(instance: dg.DagsterInstance, key: dg.AssetKey) -> bool:
    """Whether the last run that was to make an asset was cancelled before it had."""
    planned = instance.event_log_storage.get_latest_planned_materialization_info(key)
    if planned is None:
        return False
    run = instance.get_run_by_id(planned.run_id)
    records = instance.fetch_materializations(key, limit=1).records
    return (
        run is not None
        and run.status is dg.DagsterRunStatus.CANCELED
        and all(record.storage_id < planned.storage_id for record in records)
    )


def tries_of(instance: dg.DagsterInstance, run_id: str | None) -> Iterator[dg.RunRecord]:
    """A run, and those that it goes on from, as where one has died: the first comes last. One that
    is launched anew with all its steps goes on from none."""
    while run_id is not None and (found := instance.get_run_record_by_id(run_id)) is not None:
        yield found
        run = found.dagster_run
        goes_on = run.is_resume_retry or ASSET_RESUME_RETRY_TAG in run.tags
        run_id = run.parent_run_id if goes_on else None


def newest_first(
    fetch: Callable[..., dg.EventRecordsResult],
    which: dg.AssetKey | dg.AssetRecordsFilter,
    at_a_time: int = 1,
) -> Iterator[dg.EventLogRecord]:
    """The events of an asset that `fetch`, of a Dagster instance, finds. Each carries its pictures:
    few are looked at together."""
    cursor, more = None, True
    while more:
        page = fetch(which, limit=at_a_time, cursor=cursor)
        yield from page.records
        cursor, more = page.cursor, page.has_more


def run_stage(
    key: dg.AssetKey,
    recipe: Recipe,
    root: Path,
    build: Callable[[Path], object],
    settings: Settings,
    goes_on: bool = False,
    survey: str | None = None,
) -> Step:
    """Run an asset's step, telling the terminal when it begins and how it ended."""
    ended = begun(key, survey)
    step = run_step(recipe, root, build, verify=settings.verify, goes_on=goes_on)
    ended(step.reused)
    return step


def begun(key: dg.AssetKey, survey: str | None = None) -> Callable[[bool], float]:
    """Tells the terminal that an asset is being made; and what it returns, given whether it was
    there already, that it is made, and in how many seconds, which it gives."""
    name, since = " of ".join(filter(None, (key.to_user_string(), survey))), time.perf_counter()
    log.info("%s ...", name)

    def ended(reused: bool) -> float:
        seconds = time.perf_counter() - since
        log.info("%s: %s in %.1f s", name, "reused" if reused else "made", seconds)
        return seconds

    return ended


def bad_input_is_final(
    body: Callable[..., dg.MaterializeResult],
) -> Callable[..., dg.MaterializeResult]:
    """Of a step that is tried again: not for bad input, which stays what it is."""

    @functools.wraps(body)
    def guarded(*arguments: Any, **named: Any) -> dg.MaterializeResult:
        try:
            return body(*arguments, **named)
        except NoAnswerError:
            raise
        except InputError as problem:
            raise dg.Failure(str(problem), allow_retries=False) from problem

    return guarded


def in_a_process(
    context: dg.OpExecutionContext | dg.AssetExecutionContext,
    command: list[str],
    failure: Path,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run a command of ours in a process that is not Dagster's; it tells the step's log.

    Raises the InputError that it has written into the file `failure`.
    """
    failure.unlink(missing_ok=True)
    try:
        dg.PipesSubprocessClient(termination_timeout_seconds=LEAVE).run(
            command=command,
            context=context,
            env={TOLD: str(failure), **(env or {})},
        )
    except Exception:
        raise_told(failure)
        raise


def result(
    step: Step,
    metadata: Mapping[str, Any],
    checks: tuple[dg.AssetCheckResult, ...] = (),
    location: str | None = None,
) -> dg.MaterializeResult:
    """What a step's asset returns; `location` where it is not the folder."""
    return dg.MaterializeResult(
        metadata={
            LOCATION: location or str(step.folder),
            "content": step.content,
            "seconds": round(step.seconds, 3),
            "reused": step.reused,
            **metadata,
        },
        data_version=dg.DataVersion(step.key),
        check_results=list(checks),
    )
