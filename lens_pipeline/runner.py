"""The main job in one process: the home's Dagster instance, dead runs, the run itself."""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import filelock
from dagster._core.instance.ref import InstanceRef
from dagster._core.storage.tags import REPOSITORY_LABEL_TAG

from lens_pipeline.defs.checkpoints import POOL
from lens_pipeline.defs.checks import said_of_checks
from lens_pipeline.defs.sensors import made_by
from lens_pipeline.defs.surveys import every_survey
from lens_pipeline.errors import InputError, masked, told_of, words_of
from lens_pipeline.files import write_aside
from lens_pipeline.launcher import CANCELED, DEPLOYMENT, GONE, forget_ended_runs
from lens_pipeline.processes import (
    HOST,
    PID,
    check_locks,
    end_rest,
    is_dead,
    is_free,
    is_here,
    process_tags,
    sign_of_life,
)
from lens_pipeline.settings import SERVED, SIMULATION, Settings

UNFINISHED = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
KEPT = "settings.json"
LOCATION = "lens_pipeline"  # as workspace.yaml calls it
REPOSITORY = f"__repository__@{LOCATION}"  # whose pages list the runs of a job
# sha256 of dagster.yaml as former versions have made it.
FORMER = {
    "1b0cdfd38018393efc1344a32a054f39703b3127a75fba6ba292f5ef6a06999c",
    "7251d0e403223a43f1b3e9e1923dc7bcbc1c0f1c2bc5f84a8189c3fac3a7ac47",
    "59045419ec5290be587670029148bbe82f980ab20d4f09a3a1ea8b73c52a7bd1",
    "9d8f19626ababa3b6a08abcfd431509f965fedf3b83663852c46bb08256cc0f7",
    "ff068861abc9859b77e92598efeef480d85bd3b16e368ea48526ab120e4132c0",
}
PATIENCE = 10  # seconds of waiting before the holder is named
log = logging.getLogger(__name__)


def prepare_home(settings: Settings) -> None:
    """Make LENS_HOME/dagster with the settings of one machine, where it is not there yet; those of
    a former version give way to them unless somebody has edited them.

    Raises InputError where the home cannot be made, or written into, or knows no locks.
    """
    home = settings.dagster_home
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise InputError(f"LENS_HOME: {home} cannot be made ({problem.strerror})") from None
    for folder in (settings.home, home):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(
                f"LENS_HOME: {folder} is not writable by you; name another home with --home, or "
                "ask whom it belongs to"
            )
    check_locks(home)
    file = home / "dagster.yaml"
    if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() in FORMER:
        write_aside(file, Path(__file__).with_name("dagster.yaml").read_text())


@contextmanager
def _settings_kept(settings: Settings, instance: dg.DagsterInstance, run_id: str) -> Iterator[None]:
    """Write down in LENS_HOME what decides its graph, for who only looks at it later; where it is
    refused before anything is made, as a source that cannot be read, what was there before is put
    back."""
    file = settings.home / KEPT
    before = file.read_text() if file.is_file() else None
    now = json.dumps(settings.kept, indent=1, sort_keys=True) + "\n"
    write_aside(file, now)
    try:
        yield
    except InputError:
        # Another run may have begun meanwhile, or been refused, too.
        mine = file.is_file() and file.read_text() == now
        if mine and not instance.get_run_stats(run_id).steps_succeeded:
            if before is None:
                file.unlink()
            else:
                write_aside(file, before)
        raise


def settings_of_home(home: str | None) -> Settings:
    """The settings; what the environment leaves open is as in the home's last run."""
    settings = Settings.load(home=home)
    stated = settings.model_fields_set
    left_open = {name: v for name, v in _kept(settings).items() if name not in stated}
    try:
        return Settings.load(home=home, **left_open)
    except InputError as problem:
        raise told_of(f"{settings.home / KEPT}, of the last run", problem) from None


def _kept(settings: Settings) -> dict[str, Any]:
    """What the last run of a home has left of its settings; nothing where there was none, and of
    another version's those that this one has."""
    file = settings.home / KEPT
    try:
        kept = dict(json.loads(file.read_text())) if file.is_file() else {}
        return {name: value for name, value in kept.items() if name in Settings.model_fields}
    except (ValueError, TypeError):
        raise InputError(f"{file}: is damaged; remove it") from None


@contextmanager
def open_instance(settings: Settings) -> Iterator[dg.DagsterInstance]:
    """The home's Dagster instance, for a run in this process."""
    prepare_home(settings)
    # The terminal is this run's own; capturing its output would take it away from the user.
    quiet = {"module": "dagster._core.storage.noop_compute_log_manager"}
    overrides: Any = {"compute_logs": quiet | {"class": "NoOpComputeLogManager"}}
    # Two processes that create the SQLite files at once would trip over each other.
    with filelock.FileLock(settings.dagster_home / ".lock"):
        reference = InstanceRef.from_dir(str(settings.dagster_home), overrides=overrides)
        instance = dg.DagsterInstance.from_ref(reference)
        instance.get_runs_count()
    with instance:
        yield instance


def release_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Mark runs whose process has died as failed (as cancelled, where that was asked for), end what
    they have left running, and free the pool slots that whoever has ended holds or waits for.

    Returns the ids of the dead.
    """
    gone = [
        run.run_id
        for run in instance.get_runs(dg.RunsFilter(statuses=UNFINISHED))
        if is_dead(run.run_id, run.tags, Path(instance.root_directory))
    ]
    # One may have ended in order since it was listed.
    dead = instance.get_runs(dg.RunsFilter(run_ids=gone, statuses=UNFINISHED)) if gone else []
    for run in dead:
        end_rest(run.tags)
        if run.status == dg.DagsterRunStatus.CANCELING or run.tags.get(CANCELED) == run.run_id:
            instance.report_run_canceled(run, GONE)
            continue
        log.warning("run %s has died: marking it failed", run.run_id[:8])
        instance.report_run_failed(run, "The process of this run has died.")
    for run_id in instance.event_log_storage.get_concurrency_run_ids():
        holder = instance.get_run_by_id(run_id)
        if holder is None or holder.is_finished:
            instance.event_log_storage.free_concurrency_slots_for_run(run_id)
    forget_ended_runs(instance)
    return [run.run_id for run in dead]


def end_launched_runs(instance: dg.DagsterInstance) -> None:
    """Ask the runs that a daemon has launched on this host to end, which they do by themselves."""
    for run in instance.get_runs(dg.RunsFilter(statuses=UNFINISHED)):
        if is_here(run.run_id, run.tags) and run.remote_job_origin is not None:
            log.warning("ending run %s of %s", run.run_id[:8], made_by(run))
            instance.run_launcher.terminate(run.run_id)


def run_config(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Dagster's run config from {member: {section: {field: value}}}."""
    ops = {f"checkpoints__{member}": {"config": dict(c)} for member, c in changes.items()}
    return {"ops": ops, "loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


def run_pipeline(settings: Settings, changes: Mapping[str, Any], verbose: bool = False) -> str:
    """Materialise the whole graph in this process and return the run's id.

    changes: training settings by member, as in `run_config`. What a step raises comes out as it is;
    a signal that Dagster has caught comes out as KeyboardInterrupt.
    """
    # Here, for it makes the graph of the environment's settings, which other commands do not need.
    from lens_pipeline.definitions import make_definitions

    definitions = make_definitions(settings, retries=False)
    if settings.is_simulated:
        from lens_pipeline.simulation import load_configs

        load_configs(settings.survey, settings.simulation)  # before the home remembers them
    config = run_config(changes)
    if verbose:
        del config["loggers"]
    with open_instance(settings) as instance:
        _tell_of_settings(settings)
        _tell_of_pages(settings)
        release_dead_runs(instance)
        run_id = dg._core.utils.make_new_run_id()
        with (
            _settings_kept(settings, instance, run_id),
            _giving_a_sign(instance, run_id),
            _naming_the_holder(instance, run_id),
        ):
            try:
                done = definitions.resolve_job_def("full_pipeline").execute_in_process(
                    run_config=config,
                    instance=instance,
                    run_id=run_id,
                    tags={
                        **process_tags(run_id),
                        **every_survey(settings),
                        DEPLOYMENT: settings.deployment,
                        REPOSITORY_LABEL_TAG: REPOSITORY,
                        "dagster/max_retries": "0",  # who launched it sees that it failed
                    },
                )
            except dg.DagsterExecutionInterruptedError:
                raise KeyboardInterrupt from None
        for said in said_of_checks(done.get_asset_check_evaluations()):
            log.warning("  %s", said)
    return run_id


def _tell_of_settings(settings: Settings) -> None:
    """Says what is read, and which settings are others than in the home's last run.

    Raises InputError where the source was forgotten: the last run was of a catalogue, and a model
    of simulated cutouts would stand beside that survey's.
    """
    log.info("source: %s", masked(settings.source))
    if not (settings.home / KEPT).is_file():
        return
    before, now = _kept(settings), settings.kept
    was, _ = (one.pop("source", SIMULATION) for one in (before, now))
    if was != SIMULATION and "source" not in settings.model_fields_set:
        raise InputError(
            f"LENS_SOURCE: the last run of {settings.home} was of {was}: name it again, or say "
            f"--source {SIMULATION}"
        )
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            log.info(
                "%s: %s; in the last run here: %s", Settings.variable(name),
                *(_shown(of.get(name)) for of in (now, before)),
            )  # fmt: skip


def _shown(value: Any) -> str:
    """The value of a setting as variables hold it."""
    if value is None:
        return "not set"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return masked(value if isinstance(value, str) else json.dumps(value))


def _tell_of_pages(settings: Settings) -> None:
    """Warns where pages are open that would launch runs with other settings than these."""
    other = settings.shown.get("settings", settings.kept) != settings.kept
    if other and not is_free(settings.dagster_home / SERVED):
        log.warning(
            "LENS_HOME: the pages of lens-pipeline show are open with the settings of when it was "
            "begun, and these are others; end it and begin it again to launch runs with them"
        )


@contextmanager
def _giving_a_sign(instance: dg.DagsterInstance, run_id: str) -> Iterator[None]:
    """While a run goes on: let other hosts see that it does."""
    sign = sign_of_life(Path(instance.root_directory), run_id)
    try:
        yield
    finally:
        os.close(sign)
        forget_ended_runs(instance)


def _holders(instance: dg.DagsterInstance, run_id: str) -> list[str] | None:
    """Who has the pool that a run waits for; None where it waits for none, or for one that has died
    and gives it back."""
    info = instance.event_log_storage.get_concurrency_info(POOL)
    if run_id not in info.pending_run_ids or release_dead_runs(instance):
        return None
    holders = [instance.get_run_by_id(slot) for slot in info.assigned_run_ids]
    return [
        f"run {run.run_id[:8]} (process {run.tags.get(PID)} on {run.tags.get(HOST)})"
        for run in holders
        if run is not None
    ]


@contextmanager
def _naming_the_holder(instance: dg.DagsterInstance, run_id: str) -> Iterator[None]:
    """While a run goes on: say who holds the pool that it has been waiting for, unless that has
    died and gives it back."""
    done = threading.Event()

    def watch() -> None:
        told = None
        while not done.wait(PATIENCE):
            try:
                named = _holders(instance, run_id)
            except Exception as problem:  # noqa: BLE001  (a database that is away for a while)
                log.warning("who holds pool %s is not known now: %s", POOL, words_of(problem))
                continue
            if named not in (None, told):
                told = named
                log.warning(
                    "waiting for pool %s, held by %s; should that be gone, force its termination "
                    "on its page (lens-pipeline show)", POOL, ", ".join(named or ()) or "no run",
                )  # fmt: skip

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
