"""What is watched: the source, the registry, runs that fail and checks that warn, and the watch."""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, TypeAlias

import dagster as dg
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.remote_origin import RemoteRepositoryOrigin
from dagster._core.scheduler.instigation import InstigatorState, TickStatus
from dagster._utils.error import SerializableErrorInfo

from lens_pipeline.alerts import alert, beat
from lens_pipeline.defs.automation import data, training
from lens_pipeline.defs.checks import said_of_checks
from lens_pipeline.defs.cleaning import UNDER_WAY
from lens_pipeline.defs.resources import LensHome
from lens_pipeline.defs.source import source_glance, source_state
from lens_pipeline.defs.stages import REGISTERED, newest_first
from lens_pipeline.defs.surveys import every_survey
from lens_pipeline.errors import InputError, first_of, masked
from lens_pipeline.files import digest
from lens_pipeline.registry import CHALLENGER, CHAMPION, MODEL, PASSED, answering
from lens_pipeline.settings import Settings
from lens_pipeline.tracking import keep_waits_short

WILL_RETRY = "dagster/will_retry"
RunEnd: TypeAlias = Literal[dg.DagsterEventType.RUN_FAILURE, dg.DagsterEventType.RUN_SUCCESS]
Tell: TypeAlias = Callable[[dg.DagsterRun, dg.EventLogEntry, dg.DagsterInstance, Settings], None]
Ask: TypeAlias = Callable[..., Iterable[dg.EventLogRecord]]
LOOK = 3600  # seconds between looks at all cutouts of a catalogue that has not changed
TRAINED_ON_SHARDS = dg.RunsFilter(
    job_name=training.name, statuses=[*UNDER_WAY, dg.DagsterRunStatus.QUEUED]
)
AT_ONCE = 20  # runs that a tick tells of
BY_CLICK = "__ASSET_JOB"  # Dagster's name for the job of what is materialised asset by asset


@dg.sensor(
    job=data,
    minimum_interval_seconds=60,
    description="Launches `data` when the catalogue, its cutouts or the published shards at "
    "LENS_SOURCE are new or have changed, and have then rested for a minute, and no run of "
    "`training` is under way. It looks at the "
    "catalogue and the published shards each minute; at the cutouts, for one that has changed in "
    "its place, each hour.",
)
def source_changed(
    context: dg.SensorEvaluationContext, lens: LensHome
) -> dg.SensorResult | dg.SkipReason:
    settings = lens.settings
    if settings.is_simulated:
        return dg.SkipReason("LENS_SOURCE is the simulation, which changes only with its settings")
    cursor = json.loads(context.cursor or "{}")
    try:
        glance = source_glance(settings)
        if glance is not None and _rests(cursor, glance):
            return dg.SkipReason(f"{settings.source} has not changed")
        if glance is not None and _waits(cursor, glance) and _is_trained(context.instance):
            return _waiting(settings)
        looked = {"glance": glance, "looked": time.time()}
        state = source_state(settings)
    except InputError as problem:
        if "handled" not in cursor:
            return dg.SkipReason(f"waits for a source: {problem}")
        return _unreadable(settings, problem, cursor)
    cursor.pop("problem", None)
    cursor |= looked
    if state == cursor.get("handled"):
        return dg.SensorResult(
            skip_reason=f"{settings.source} has not changed",
            cursor=json.dumps({**cursor, "seen": state}),
        )
    if state != cursor.get("seen"):
        return dg.SensorResult(
            skip_reason=f"{settings.source} has changed; if it rests, `data` is launched next time",
            cursor=json.dumps({**cursor, "seen": state}),
        )
    if _is_trained(context.instance):
        return _waiting(settings)
    changes = cursor.get("changes", 0) + 1
    return dg.SensorResult(
        # The key is of the change, not only of the state: what was here before may come back.
        run_requests=[dg.RunRequest(run_key=f"{changes}:{state}", tags=every_survey(settings))],
        cursor=json.dumps({**looked, "seen": state, "handled": state, "changes": changes}),
    )


def _rests(cursor: Mapping[str, Any], glance: str) -> bool:
    """Whether nothing has changed by a glance, and the last whole look is not long ago: in a survey
    of millions of cutouts one takes minutes."""
    return (
        glance == cursor.get("glance")
        and cursor.get("seen") == cursor.get("handled")
        and "problem" not in cursor
        and 0 <= time.time() - cursor["looked"] < LOOK
    )


def _waits(cursor: Mapping[str, Any], glance: str) -> bool:
    """Whether a change that was seen is still to be handled, and by a glance nothing else has
    changed since."""
    return (
        glance == cursor.get("glance")
        and cursor.get("seen") != cursor.get("handled")
        and "problem" not in cursor
    )


def _is_trained(instance: dg.DagsterInstance) -> bool:
    """Whether a run trains on shards, or will."""
    return bool(instance.get_runs(TRAINED_ON_SHARDS, limit=1))


def _waiting(settings: Settings) -> dg.SkipReason:
    return dg.SkipReason(
        f"{settings.source} has changed; `data` is launched once no run of `training` is under "
        "way: what it trains would be of shards that are not the newest any more"
    )


def _unreadable(settings: Settings, problem: InputError, cursor: dict[str, Any]) -> dg.SensorResult:
    """A source that could be read before: people are told of it once, at the second time in a row.

    What it was when it could be read is kept: if it comes back as it was, nothing has changed.
    """
    if cursor.get("problem") == "seen":
        alert(settings, f"the source can no longer be read: {problem}")
    cursor["problem"] = "told" if "problem" in cursor else "seen"
    return dg.SensorResult(skip_reason=str(problem), cursor=json.dumps(cursor))


@dg.sensor(
    minimum_interval_seconds=60,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Tells the log and LENS_WEBHOOK_URL of each new version in the registry, and of "
    "each change of the champion, by the gate, by `promote` or by `rollback`.",
)
def new_challenger(
    context: dg.SensorEvaluationContext, lens: LensHome
) -> dg.SensorResult | dg.SkipReason:
    told = json.loads(context.cursor or "{}")
    if isinstance(told, int):  # as former versions have left it
        told = {"version": told}
    registry = digest(masked(lens.settings.mlflow_uri))[:12]
    if told.get("registry", registry) != registry:  # its numbers are others
        told = {name: told[name] for name in ("record", "time") if name in told}

    def registered(**bound: Any) -> Iterator[dg.EventLogRecord]:
        which = dg.AssetRecordsFilter(REGISTERED, **bound)
        return newest_first(context.instance.fetch_materializations, which)

    # At first, and after a former version, the newest alone.
    first = "record" not in told
    records = [*islice(registered(), 1)] if first else _since(told, registered)
    new: dict[int, str] = {}  # what was decided on each version
    run = None
    for record in records:
        made = record.asset_materialization
        facts = {name: str(value.value) for name, value in made.metadata.items()} if made else {}
        version = int(facts.get("version", 0))
        # One that was told comes up again where its members are trained again, as after a change
        # taken back.
        if version > told.get("version", 0):
            new[version], run = facts["gate"], record.run_id
    try:
        champion = _aliased(lens, CHAMPION)
        challenger = _aliased(lens, CHALLENGER) if new else None
    except InputError as problem:
        return dg.SkipReason(str(problem))
    said = [_of_version(version, gate, champion, challenger) for version, gate in new.items()]
    if champion not in new and told.get("champion", champion) != champion:
        said.append(_of_champion(champion, told["champion"]))
    if said:
        about = str(max(new, default=champion or ""))
        alert(lens.settings, "; ".join(said), version=about, run=run)
    cursor = {
        "version": max(new, default=told.get("version", 0)),
        "champion": champion,
        **_up_to(records, told),
        "registry": registry,
    }
    return dg.SensorResult(
        cursor=json.dumps(cursor),
        skip_reason="; ".join(said) or "neither a new version nor another champion",
    )


def _of_version(version: int, gate: str, champion: int | None, challenger: int | None) -> str:
    """A new version, in words, by what was decided on it and who is what now."""
    # Where nothing was told before, it may be an older one that came up again.
    who = "it stays challenger" if challenger == version else "it is not champion"
    why = f"{who}: {gate}"
    if champion == version:
        why = "it has become champion"
    elif gate == PASSED:
        why = "it passed the gate, and is not champion now"
    return f"{MODEL} version {version} is registered; {why}"


def _aliased(lens: LensHome, alias: str) -> int | None:
    """The number of the version that is champion, or challenger, now. Raises InputError where the
    registry cannot be asked."""
    keep_waits_short()
    lens.registry.require()
    with answering(f"the registry cannot be asked who is {alias}"):
        found = lens.registry.aliased(alias)
    return None if found is None else int(found.version)


def _of_champion(champion: int | None, former: int | None) -> str:
    """A change of the champion, in words."""
    if champion is None:
        return f"{MODEL} has no champion any more; it was version {former}"
    place = "" if former is None else f", in the place of version {former}"
    return f"{MODEL} version {champion} is champion{place}"


@dg.sensor(
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Tells the log and LENS_WEBHOOK_URL of each run that failed, where and why.",
)
def failed_runs(
    context: dg.SensorEvaluationContext, lens: LensHome
) -> dg.SensorResult | dg.SkipReason:
    return _tell_of_runs(context, lens.settings, dg.DagsterEventType.RUN_FAILURE, _tell_of_failure)


@dg.sensor(
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Tells the log and LENS_WEBHOOK_URL of each run that came to its end with checks "
    "that warn: of bands that have changed, say, or of cutouts in two splits.",
)
def warning_checks(
    context: dg.SensorEvaluationContext, lens: LensHome
) -> dg.SensorResult | dg.SkipReason:
    return _tell_of_runs(context, lens.settings, dg.DagsterEventType.RUN_SUCCESS, _tell_of_checks)


@dg.sensor(
    minimum_interval_seconds=60,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Tells the log and LENS_WEBHOOK_URL of each schedule whose last tick failed, and "
    "of each sensor whose last two did, once until it works again.",
)
def failed_ticks(
    context: dg.SensorEvaluationContext, lens: LensHome
) -> dg.SensorResult | dg.SkipReason:
    told: list[str] = json.loads(context.cursor or "[]")
    reasons = {
        state.name: reason
        for state in context.instance.all_instigator_state()
        if _are_ours(state.origin.repository_origin, context)
        and state.is_running
        and (reason := _failing(state, context.instance))
    }
    new = sorted(reasons.keys() - set(told))
    accepted = [name for name in reasons if name in told]
    for name in new:
        try:
            alert(lens.settings, reasons[name])
        except InputError:
            if name == new[0]:
                raise
            break  # what has been told is not told again, and this one is at the next tick
        accepted.append(name)
    return dg.SensorResult(
        cursor=json.dumps(sorted(accepted)),
        skip_reason="; ".join(reasons.values()) or "all schedules and sensors work",
    )


@dg.sensor(
    minimum_interval_seconds=60,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Requests LENS_HEARTBEAT_URL while all parts of Dagster's daemon work, for a "
    "service that tells people when the requests stop: nobody here could.",
)
def heartbeat(context: dg.SensorEvaluationContext, lens: LensHome) -> dg.SkipReason:
    # Of all the daemon's own libraries; loaded in a second, which each step would take, too.
    from dagster._daemon.controller import get_daemon_statuses

    address = lens.settings.heartbeat_url
    if address is None:
        return dg.SkipReason("LENS_HEARTBEAT_URL is not set")
    needed = context.instance.get_required_daemon_types()
    found = get_daemon_statuses(context.instance, needed, ignore_errors=True)
    still = sorted(kind.lower() for kind, status in found.items() if not status.healthy)
    if still:
        return dg.SkipReason(f"LENS_HEARTBEAT_URL is not told: {', '.join(still)} has ended")
    beat(address)
    return dg.SkipReason("LENS_HEARTBEAT_URL is told that all is well")


def _failing(state: InstigatorState, instance: dg.DagsterInstance) -> str | None:
    """Why a schedule or a sensor does not work, in a line; None where it does. A sensor's next tick
    is soon: what has failed once may be by chance."""
    kind = state.instigator_type.value.lower()
    ticks = instance.get_ticks(
        state.instigator_origin_id,
        state.selector_id,
        limit=1 if state.instigator_type is InstigatorType.SCHEDULE else 2,
        statuses=[TickStatus.SUCCESS, TickStatus.SKIPPED, TickStatus.FAILURE],
    )
    if not ticks or any(tick.status is not TickStatus.FAILURE for tick in ticks):
        return None
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(ticks[0].timestamp))
    return f"the {kind} {state.name} failed at its tick of {when}: {_first_cause(ticks[0].error)}"


def _tell_of_runs(
    context: dg.SensorEvaluationContext, settings: Settings, ended: RunEnd, tell: Tell
) -> dg.SensorResult | dg.SkipReason:
    """Call `tell` of each run that has ended so since the last tick.

    Dagster's own sensors of runs would go on behind one that the webhook has not taken.
    """
    instance = context.instance
    if context.cursor is None:
        newest = instance.fetch_run_status_changes(ended, limit=1).records
        cursor = json.dumps(_up_to(newest, {}))
        return dg.SensorResult(cursor=cursor, skip_reason="tells of runs from now on")

    def ends(**bound: Any) -> Sequence[dg.EventLogRecord]:
        later = dg.RunStatusChangeRecordsFilter(ended, **bound)
        return instance.fetch_run_status_changes(later, AT_ONCE, ascending=True).records

    before = json.loads(context.cursor)
    if "record_id" in before:  # as former versions have left it
        before = {"record": before["record_id"]}
    told: list[dg.EventLogRecord] = []
    for end in _since(before, ends)[:AT_ONCE]:
        run = instance.get_run_by_id(end.run_id)
        try:
            if run is not None and _is_ours(run, context):
                tell(run, end.event_log_entry, instance, settings)
        except InputError:
            if not told:
                raise
            break  # what has been told is not told again, and this one is at the next tick
        told.append(end)
    if not told:
        return dg.SkipReason("no run has ended so since")
    return dg.SensorResult(cursor=json.dumps(_up_to(told, before)), skip_reason="told")


def _since(told: Mapping[str, Any], ask: Ask) -> list[dg.EventLogRecord]:
    """What `ask` finds that came after what was `told`, in its order: by its number in Dagster's
    database, and by its time, for SQLite gives the numbers of what is deleted to what comes
    next."""
    found = {record.storage_id: record for record in ask(after_storage_id=told["record"])}
    if "time" in told:
        later = ask(after_timestamp=told["time"])
        found |= {one.storage_id: one for one in later if one.timestamp > told["time"]}
    return [found[number] for number in sorted(found)]


def _up_to(records: Sequence[dg.EventLogRecord], told: Mapping[str, Any]) -> dict[str, Any]:
    """The last of these, or what was `told` before, for `_since`."""
    if not records:
        return {"record": 0, **{name: told[name] for name in ("record", "time") if name in told}}
    times = [told.get("time", 0.0), *(record.timestamp for record in records)]
    return {"record": records[-1].storage_id, "time": max(times)}


def _is_ours(run: dg.DagsterRun, context: dg.SensorEvaluationContext) -> bool:
    """Not of other code that the same Dagster serves."""
    theirs = run.remote_job_origin
    return theirs is None or _are_ours(theirs.repository_origin, context)


def _are_ours(definitions: RemoteRepositoryOrigin, context: dg.SensorEvaluationContext) -> bool:
    ours = context.code_location_origin
    return ours is None or definitions.code_location_origin.location_name == ours.location_name


def _tell_of_failure(
    run: dg.DagsterRun, failure: dg.EventLogEntry, instance: dg.DagsterInstance, settings: Settings
) -> None:
    failed = instance.get_records_for_run(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
    events = [record.event_log_entry.get_dagster_event() for record in failed.records]
    reason = "; ".join(_reason(event) for event in events)
    again = "; it is tried again" if run.tags.get(WILL_RETRY) == "true" else ""
    alert(
        settings,
        f"run {run.run_id[:8]} of {made_by(run)} failed{again}: "
        f"{reason or failure.get_dagster_event().message}",
        run=run.run_id,
        job=run.job_name,
    )


def _tell_of_checks(
    run: dg.DagsterRun, end: dg.EventLogEntry, instance: dg.DagsterInstance, settings: Settings
) -> None:
    found = instance.get_records_for_run(
        run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION
    )
    events = [record.event_log_entry.get_dagster_event() for record in found.records]
    said = said_of_checks(event.asset_check_evaluation_data for event in events)
    if said:
        text = f"run {run.run_id[:8]} of {made_by(run)}: {'; '.join(said)}"
        alert(settings, text, run=run.run_id, job=run.job_name)


def made_by(run: dg.DagsterRun) -> str:
    """The job of a run, in a message; of what was materialised by a click, the assets."""
    if not run.job_name.startswith(BY_CLICK) or not run.asset_selection:
        return run.job_name
    return first_of(sorted(key.to_user_string() for key in run.asset_selection), 3)


def _reason(event: dg.DagsterEvent) -> str:
    """What a step raised, in a line that begins with the step, or its asset, without Dagster's own
    wrapping."""
    where = (event.step_key or "").replace("__", "/")  # as in the key of the asset
    said = _first_cause(event.step_failure_data.error) or " ".join((event.message or "").split())
    return f"{where}: {said.removeprefix(f'{where}: ')}"


def _first_cause(error: SerializableErrorInfo | None) -> str:
    """What was raised first, in a line. Bad input says itself what it is, of another error its
    class does."""
    while error is not None and error.cause is not None:
        error = error.cause
    said = " ".join(error.message.split()) if error is not None else ""
    return re.sub(rf"^{re.escape(InputError.__module__)}\.\w+: ", "", said)
