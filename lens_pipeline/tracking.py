"""MLflow's tracking: one experiment, a run per member and ensemble.

MLflow itself is imported where it is used: loading this module is light.
"""

import logging
import math
import os
import socket
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote
from uuid import uuid4

import filelock

from lens_pipeline.errors import InputError, NoAnswerError, masked
from lens_pipeline.files import write_aside
from lens_pipeline.settings import Settings
from lens_pipeline.steps import LOCKS

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from pytorch_lightning.loggers import MLFlowLogger

EXPERIMENT = "lens_pipeline"
ABOUT = (
    "A run for each training of a network, with its settings and curves, and for each registered "
    "ensemble, with its figures on the test split and its report. `lens.dagster_run_id` names the "
    "run of Dagster that made it."
)
STEP_KEY = "lens.step_key"
HOME, HOME_ID = "lens.home", "lens.home_id"  # for people, and by which a home knows its runs
ID = "id"  # in LENS_HOME
DATASET_VERSION = "lens.dataset_version"
DAGSTER_RUN = "lens.dagster_run_id"
PARENT = "mlflow.parentRunId"
FOLDERS = (  # tables of MLflow, and their columns that name folders
    *(("experiments", "artifact_location"), ("runs", "artifact_uri")),
    *(("logged_models", "artifact_location"), ("model_versions", "storage_location")),
    ("model_versions", "source"),
)
PATIENCE = 60.0  # seconds for others to end what they write into the database
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
CONNECT_WITHIN = 10  # seconds
LOCK = 1_819_634_291  # an advisory lock of PostgreSQL: any number that others do not take
FOR_A_WHILE = ("starting up", "shutting down", "recovery", "too many")  # of a server's words
RECORDED = "lens.recorded"  # a run that holds all it should
DAMAGED = ("SQLITE_NOTADB", "SQLITE_CORRUPT")
SHUT = ("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM")
log = logging.getLogger(__name__)


def _create_database(path: Path) -> None:
    """MLflow's SQLite file, created aside: it commits its migrations one by one, and does not go on
    with them where a process was killed between two."""
    if path.exists():
        return
    import mlflow

    aside = path.with_name(f".{path.name}.partial")
    for left in path.parent.glob(f"{aside.name}*"):
        left.unlink()
    mlflow.MlflowClient(f"sqlite:///{aside}").search_experiments(max_results=1)
    aside.replace(path)


@contextmanager
def _database_alone(uri: str) -> Iterator[None]:
    """Of a PostgreSQL server, around MLflow's first look at a database, which makes its tables
    where it is empty: one process at a time, for two would trip over each other.

    Raises InputError where the server does not let us in, and NoAnswerError where it gives no
    answer: MLflow would ask either for minutes, and then tell what its driver said.
    """
    if not uri.startswith("postgresql"):
        yield
        return
    import sqlalchemy

    url = sqlalchemy.make_url(uri)
    # Of libpq; another driver has names of its own, and the user may have said how long.
    asked = url.get_driver_name().startswith("psycopg") and "connect_timeout" not in url.query
    within = {"connect_timeout": CONNECT_WITHIN} if asked else {}
    engine = sqlalchemy.create_engine(url, connect_args=within, poolclass=sqlalchemy.NullPool)
    with ExitStack() as stack:
        try:
            connection = stack.enter_context(engine.begin())
            # It ends with the transaction, also where a pooler deals out the server's sessions.
            connection.execute(sqlalchemy.select(sqlalchemy.func.pg_advisory_xact_lock(LOCK)))
        except sqlalchemy.exc.OperationalError as problem:
            said = " ".join(str(problem.orig).split())
            if "FATAL:" in said and not any(words in said for words in FOR_A_WHILE):
                raise InputError(
                    f"MLFLOW_TRACKING_URI: {masked(uri)} does not let us in ({said})"
                ) from None
            raise NoAnswerError(
                f"MLFLOW_TRACKING_URI: {masked(uri)} gives no answer ({said})"
            ) from None
        yield


def flat(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"training": {"epochs": 3}} -> {"training.epochs": 3}."""
    found: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def page_address(pages: str, path: str) -> str:
    """The address of one of MLflow's pages, in the mode in which it shows curves and models: it
    opens in one for language models. pages: their address, without a slash at its end."""
    return f"{pages}/#/{path}?workflowType=machine_learning"


def experiment_page(pages: str, experiment_id: str) -> str:
    """The address of the page that lists an experiment's runs; see `page_address`."""
    return page_address(pages, f"experiments/{experiment_id}/runs")


def keep_waits_short() -> None:
    """Where somebody waits: MLflow would try a server that is gone for four minutes."""
    os.environ.setdefault(RETRIES, "3")


@contextmanager
def short_waits() -> Iterator[None]:
    """`keep_waits_short` within: what then lasts for hours is to outlive a server's restart."""
    stated = RETRIES in os.environ
    keep_waits_short()
    try:
        yield
    finally:
        if not stated:
            del os.environ[RETRIES]


def flat_metrics(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The values that the sample could resolve, of what `lens_metrics` returns."""
    found = {}
    for name, value in metrics.items():
        number = value["value"] if isinstance(value, Mapping) else value
        if number is not None:
            found[f"{prefix}{name}"] = float(number)
    return found


class _Whole:
    """A client whose calls are not cut short where this process is interrupted: each is made by a
    thread of its own, for Python raises interruptions in the first one alone.

    One that is cut short within a transaction of SQLite leaves its database locked, for all
    processes, for as long as this one lives.
    """

    def __init__(self, client: "MlflowClient") -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):  # of Python's protocols, which look for what is not there
            raise AttributeError(name)
        return partial(_uninterrupted, getattr(self._client, name))


def _uninterrupted(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    with ThreadPoolExecutor(1) as thread:  # whose end is waited for
        return thread.submit(call, *arguments, **named).result()


def _follow_home(database: Path, artifacts: str) -> None:
    """Have the records of a home that was moved, or copied, name its own folder: MLflow keeps
    absolute ones, and would write what is registered into that of the old home, and remove it
    there."""
    with closing(sqlite3.connect(database, timeout=PATIENCE)) as records, records:
        find = "SELECT artifact_location FROM experiments WHERE name = ?"
        found = records.execute(find, [EXPERIMENT]).fetchone()
        known = found is not None and found[0] != artifacts
        if not known or not found[0].startswith("file:") or not found[0].endswith("/mlartifacts"):
            return  # nor where somebody has told MLflow to keep them in a bucket
        former, n = found[0], len(found[0])
        for table, column in FOLDERS:
            records.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                [artifacts, n + 1, former, n + 1, f"{former}/"],
            )
    log.warning("MLflow's records name %s now, in the place of %s", artifacts, former)


@dataclass(frozen=True)
class Tracking:
    """The tracking server that the settings name."""

    settings: Settings

    @cached_property
    def client(self) -> "MlflowClient":
        """The client; MLflow's global URIs are set to the same server.

        Raises InputError where the driver of its database is not installed, or the database does
        not let us in, or is damaged; NoAnswerError where it gives no answer.
        """
        import mlflow
        import sqlalchemy

        uri = self.settings.mlflow_uri
        os.environ.update(self.settings.mlflow_credentials)
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        if self.settings.tracking_uri is None and not self.settings.mlflow_database.exists():
            # Two processes that create one SQLite file at once would trip over each other.
            locks = self.settings.home / LOCKS
            locks.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(locks / "mlflow.lock"):
                _create_database(self.settings.mlflow_database)
        try:
            if uri.startswith("sqlite"):
                named = sqlalchemy.make_url(uri).database
                if named and not named.startswith("file:"):  # MLflow would try for minutes, unsaid
                    with closing(sqlite3.connect(named, timeout=PATIENCE)) as file:
                        file.execute("PRAGMA schema_version")
            with _database_alone(uri):
                client = mlflow.MlflowClient(uri, uri)
                client.search_experiments(max_results=1)
                if self.settings.tracking_uri is None:
                    _follow_home(self.settings.mlflow_database, self.settings.artifact_location)
        except (sqlalchemy.exc.DatabaseError, sqlite3.DatabaseError) as problem:
            found = getattr(problem, "orig", problem)  # SQLAlchemy's has that of SQLite
            name = getattr(found, "sqlite_errorname", "")
            if name.startswith(SHUT):
                raise InputError(
                    f"{self._variable}: {self.settings.mlflow_file} cannot be opened, or written "
                    f"into ({found}); name another place, or ask whom it belongs to"
                ) from None
            if name not in DAMAGED:
                raise
            raise InputError(
                f"{self.settings.mlflow_file}: is no database of MLflow, or damaged ({found}); put "
                "a backup in its place"
            ) from None
        except sqlalchemy.exc.ArgumentError as problem:
            raise InputError(
                f"MLFLOW_TRACKING_URI: {masked(uri)} is none that MLflow takes ({problem})"
            ) from None
        except ModuleNotFoundError as problem:
            raise InputError(
                f"MLFLOW_TRACKING_URI: {masked(uri)} needs the package {problem.name}; for "
                "PostgreSQL install lens-pipeline[postgresql]"
            ) from None
        return cast("MlflowClient", _Whole(client))

    @property
    def _variable(self) -> str:
        """Which setting names where the records are."""
        return "LENS_HOME" if self.settings.tracking_uri is None else "MLFLOW_TRACKING_URI"

    @cached_property
    def experiment_id(self) -> str:
        """The experiment, created with an absolute artifact location."""
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(EXPERIMENT)
        if found is not None:
            return str(found.experiment_id)
        served = self.settings.mlflow_uri.startswith("http")
        location = None if served else self.settings.artifact_location
        tags = {"mlflow.note.content": ABOUT}  # its description
        try:
            return str(self.client.create_experiment(EXPERIMENT, location, tags))
        except MlflowException:  # another process, or another home, was faster
            found = self.client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
            return str(found.experiment_id)

    def run_page(self, run_id: str, artifact: str | None = None) -> str | None:
        """The address of a run's page, or of an artifact's on it; None where MLflow serves none."""
        pages = self.settings.mlflow_pages
        shown = f"/artifacts/{quote(artifact)}" if artifact else ""
        if pages is None:
            return None
        return page_address(pages, f"experiments/{self.experiment_id}/runs/{run_id}{shown}")

    @property
    def _home(self) -> str:
        return f"{socket.gethostname()}:{self.settings.home}"

    @cached_property
    def _home_id(self) -> str:
        """Which home a run is of: another may make the same step on the same server. Not by its
        path on this host: a shared file system has others on other hosts."""
        file, locks = self.settings.home / ID, self.settings.home / LOCKS
        locks.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(locks / "id.lock"):
            if not file.exists():
                write_aside(file, str(uuid4()))
        return file.read_text()

    def _find_runs(self, step_key: str, *also: str) -> "list[Run]":
        """This home's runs of a step, the newest first; also: further conditions."""
        wanted = " and ".join((f"tags.`{STEP_KEY}` = '{step_key}'", *also))
        found = self.client.search_runs([self.experiment_id], wanted)
        # Not asked for: a path, of a run that a former version has made, may hold what ends a text
        # there.
        return [
            run
            for run in found
            if run.data.tags.get(HOME_ID, run.data.tags.get(HOME)) in (self._home_id, self._home)
        ]

    def find_run(self, step_key: str) -> "Run | None":
        """This home's newest run of a step that has not failed."""
        return next(iter(self._find_runs(step_key, "attributes.status != 'FAILED'")), None)

    def start_run(
        self, name: str, step_key: str, tags: Mapping[str, str], goes_on: bool = False
    ) -> str:
        """A new run of a step; the caller holds the step's lock, so an unfinished one is dead.

        goes_on: with what another has left, and so in its run, the newest, if there is one.
        An experiment that somebody has deleted is restored.
        """
        if self.client.get_experiment(self.experiment_id).lifecycle_stage == "deleted":
            self.client.restore_experiment(self.experiment_id)
            log.warning(
                "MLflow: the experiment %s was deleted; it is restored, for its name can be given "
                "to no other", EXPERIMENT,
            )  # fmt: skip
        left = self._find_runs(step_key) if goes_on else []
        if left:
            run_id = str(left[0].info.run_id)
            self.client.update_run(run_id, "RUNNING")
            for tag, value in {HOME_ID: self._home_id, **tags}.items():
                self.client.set_tag(run_id, tag, value)
            return run_id
        for dead in self._find_runs(step_key, "attributes.status = 'RUNNING'"):
            self.client.set_terminated(dead.info.run_id, "FAILED")
        of = {STEP_KEY: step_key, HOME: self._home, HOME_ID: self._home_id}
        run = self.client.create_run(self.experiment_id, tags={**of, **tags}, run_name=name)
        return str(run.info.run_id)

    def reopened_run(self, name: str, key: str) -> str:
        """The run of something that goes on, or a new one; those with the tag PARENT are nested in
        it."""
        with filelock.FileLock(self.settings.home / LOCKS / f"run-{key[:32]}.lock"):
            return self.start_run(name, key, {}, goes_on=True)

    def logger(self, run_id: str | None) -> "MLFlowLogger":
        """Lightning's, of a run; without one, of a process that is not the first, which logs
        nothing."""
        from pytorch_lightning.loggers import MLFlowLogger

        found = MLFlowLogger(run_id=run_id, tracking_uri=self.settings.mlflow_uri, log_model=False)
        # Private, but all that it tells goes through it.
        found._mlflow_client = cast("MlflowClient", _Whole(found._mlflow_client))
        return found

    @contextmanager
    def recorded(self, run_id: str, parameters: Mapping[str, Any]) -> "Iterator[MLFlowLogger]":
        """The logger of a run that has these parameters, while it is open; then the run has
        FINISHED, or FAILED."""
        self.tell_parameters(run_id, parameters)
        ended = "FAILED"
        try:
            yield self.logger(run_id)
            ended = "FINISHED"
        finally:
            self.client.set_terminated(run_id, ended)

    def tell_parameters(self, run_id: str, parameters: Mapping[str, Any]) -> None:
        """Those that a run lacks; MLflow lets none be changed."""
        from mlflow.entities import Param

        known = self.client.get_run(run_id).data.params
        params = [Param(k, str(v)) for k, v in flat(parameters).items() if k not in known]
        self.client.log_batch(run_id, params=params)

    def finish_run(
        self,
        run_id: str,
        parameters: Mapping[str, Any],
        curves: "pd.DataFrame | None" = None,
        metrics: Mapping[str, float] | None = None,
        artifacts: tuple[Path, ...] = (),
        again: bool = False,
    ) -> None:
        """Fill in what a run lacks and mark it finished. Doing it twice changes nothing, unless
        `again`: the artifacts of a run that has gone on."""
        from mlflow.entities import Metric

        run = self.client.get_run(run_id)
        # Whether it has ended says nothing: loggers end runs, too.
        if RECORDED in run.data.tags and not again:
            return
        self.tell_parameters(run_id, parameters)
        when = run.info.start_time
        values = [Metric(name, value, when, 0) for name, value in (metrics or {}).items()]
        if curves is not None:
            values += [
                Metric(str(name), float(row[name]), when, int(row["epoch"]))
                for _, row in curves.iterrows()
                for name in curves.columns
                if name != "epoch" and name not in run.data.metrics and math.isfinite(row[name])
            ]
        self.client.log_batch(run_id, metrics=values)
        for path in artifacts:
            self.client.log_artifact(run_id, str(path))
        self.client.set_tag(run_id, RECORDED, "true")
        self.client.set_terminated(run_id, "FINISHED")
