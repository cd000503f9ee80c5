"""MLflow: one experiment, a run per member, the registered ensemble and its aliases.

MLflow itself is imported where it is used: loading this module is light.
"""

import importlib.metadata
import io
import json
import logging
import math
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import filelock

from lens_pipeline.errors import InputError, masked
from lens_pipeline.settings import Settings
from lens_pipeline.steps import digest, folder_aside

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

    from lens_pipeline.ensemble.system import LensEnsemble

EXPERIMENT = "lens_pipeline"
MODEL = "lens_ensemble"
CHAMPION = "champion"
CHALLENGER = "challenger"
STEP_KEY = "lens.step_key"
HOME = "lens.home"
DATASET_VERSION = "lens.dataset_version"
DAGSTER_RUN = "lens.dagster_run_id"
PARENT = "mlflow.parentRunId"
REPLACED = "lens.replaced"  # the champion before this one
ROLLED_BACK = "lens.rolled_back"  # when; such a version is promoted by hand alone
RECORDED = "lens.recorded"  # a run that holds all it should
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


def registry_key(ensemble: str) -> str:
    """What a version is found by, of an ensemble by its content: the same members in the same
    fusion are the same model, whatever made them again."""
    return digest([MODEL, ensemble])[:32]


def flat(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"training": {"epochs": 3}} -> {"training.epochs": 3}."""
    found: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def flat_metrics(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The values that the sample could resolve, of what `lens_metrics` returns."""
    found = {}
    for name, value in metrics.items():
        number = value["value"] if isinstance(value, Mapping) else value
        if number is not None:
            found[f"{prefix}{name}"] = float(number)
    return found


@dataclass(frozen=True)
class Tracking:
    """The tracking server and registry that the settings name."""

    settings: Settings

    @cached_property
    def client(self) -> "MlflowClient":
        """The client; MLflow's global URIs are set to the same server.

        Raises InputError where the driver of its database is not installed.
        """
        import mlflow

        uri = self.settings.mlflow_uri
        os.environ.update(self.settings.mlflow_credentials)
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        # Two processes that create one SQLite file at once would trip over each other.
        lock = self.settings.home / ".locks" / "mlflow.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(lock):
            if self.settings.tracking_uri is None:
                _create_database(self.settings.mlflow_database)
            try:
                client = mlflow.MlflowClient(uri, uri)
                client.search_experiments(max_results=1)
            except ModuleNotFoundError as problem:
                raise InputError(
                    f"MLFLOW_TRACKING_URI: {masked(uri)} needs the package {problem.name}; for "
                    "PostgreSQL install lens-pipeline[postgresql]"
                ) from None
        return client

    @cached_property
    def experiment_id(self) -> str:
        """The experiment, created with an absolute artifact location."""
        with filelock.FileLock(self.settings.home / ".locks" / "experiment.lock"):
            found = self.client.get_experiment_by_name(EXPERIMENT)
            if found is not None:
                return str(found.experiment_id)
            served = self.settings.mlflow_uri.startswith("http")
            location = None if served else self.settings.artifact_location
            return str(self.client.create_experiment(EXPERIMENT, location))

    @property
    def _home(self) -> str:
        """Which home a run is of: another may make the same step on the same server."""
        return f"{socket.gethostname()}:{self.settings.home}"

    def _find_runs(self, step_key: str, status: str) -> "list[Run]":
        mine = f"tags.`{STEP_KEY}` = '{step_key}' and tags.`{HOME}` = '{self._home}'"
        return list(
            self.client.search_runs([self.experiment_id], f"{mine} and attributes.status {status}")
        )

    def find_run(self, step_key: str) -> "Run | None":
        """This home's newest run of a step that has not failed."""
        return next(iter(self._find_runs(step_key, "!= 'FAILED'")), None)

    def start_run(self, name: str, step_key: str, tags: Mapping[str, str]) -> str:
        """A new run of a step; the caller holds the step's lock, so an unfinished one is dead."""
        for dead in self._find_runs(step_key, "= 'RUNNING'"):
            self.client.set_terminated(dead.info.run_id, "FAILED")
        run = self.client.create_run(
            self.experiment_id, tags={STEP_KEY: step_key, HOME: self._home, **tags}, run_name=name
        )
        return str(run.info.run_id)

    def reopened_run(self, name: str, key: str) -> str:
        """The run of something that goes on, or a new one; those with the tag PARENT are nested in
        it."""
        with filelock.FileLock(self.settings.home / ".locks" / f"run-{key[:32]}.lock"):
            found = self.find_run(key)
            if found is None:
                return self.start_run(name, key, {})
            self.client.update_run(found.info.run_id, "RUNNING")
            return str(found.info.run_id)

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
        from mlflow.entities import Metric, Param

        run = self.client.get_run(run_id)
        # Whether it has ended says nothing: loggers end runs, too.
        if RECORDED in run.data.tags and not again:
            return
        known = run.data.params
        params = [Param(k, str(v)) for k, v in flat(parameters).items() if k not in known]
        when = run.info.start_time
        values = [Metric(name, value, when, 0) for name, value in (metrics or {}).items()]
        if curves is not None:
            values += [
                Metric(str(name), float(row[name]), when, int(row["epoch"]))
                for _, row in curves.iterrows()
                for name in curves.columns
                if name != "epoch" and name not in run.data.metrics and math.isfinite(row[name])
            ]
        self.client.log_batch(run_id, metrics=values, params=params)
        for path in artifacts:
            self.client.log_artifact(run_id, str(path))
        self.client.set_tag(run_id, RECORDED, "true")
        self.client.set_terminated(run_id, "FINISHED")

    # The registry

    def registry_lock(self) -> filelock.BaseFileLock:
        """One process of this home at a time looks for a version, registers one, moves aliases.

        MLflow itself has no lock: of homes that share a server, let one promote.
        """
        return filelock.FileLock(self.settings.home / ".locks" / "registry.lock")

    def versions(self) -> list["ModelVersion"]:
        """Every version of the registered model, newest first; none where there is no model."""
        found = self.client.search_model_versions(f"name = '{MODEL}'")
        return sorted(found, key=lambda version: -int(version.version))

    def dataset_versions(self) -> dict[str, str]:
        """{dataset version: the registered versions that refer to it}, of all models.

        Raises InputError where the registry cannot be asked.
        """
        self.require_registry()
        referring: dict[str, list[str]] = {}
        page: str | None = ""
        try:
            while page is not None:
                found = self.client.search_model_versions(page_token=page or None)
                for version in found:
                    if DATASET_VERSION in version.tags:
                        name = f"{version.name} version {version.version}"
                        referring.setdefault(version.tags[DATASET_VERSION], []).append(name)
                page = found.token or None
        except InputError:
            raise
        except Exception as problem:  # noqa: BLE001  (each kind of registry has errors of its own)
            reason = " ".join(str(problem).split())
            raise InputError(
                f"MLFLOW_TRACKING_URI: the registry at {self.settings.mlflow_uri} cannot be asked "
                f"which dataset versions its models refer to ({reason})"
            ) from None
        return {dataset: ", ".join(names) for dataset, names in referring.items()}

    def find_version(self, step_key: str) -> "ModelVersion | None":
        return next((v for v in self.versions() if v.tags.get(STEP_KEY) == step_key), None)

    def aliased(self, alias: str) -> "ModelVersion | None":
        """The version with an alias, None where there is none; a server's errors are raised."""
        models = self.client.search_registered_models(f"name = '{MODEL}'")
        number = models[0].aliases.get(alias) if models else None
        return self.client.get_model_version(MODEL, number) if number else None

    def register(self, ensemble: Path, run_id: str, tags: dict[str, str]) -> "ModelVersion":
        """Log the ensemble's folder as a model under a run, and make it the newest version."""
        import mlflow
        import numpy as np
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, Schema, TensorSpec

        from lens_pipeline.ensemble import carried
        from lens_pipeline.ensemble.system import load_ensemble

        loaded = load_ensemble(ensemble)
        example = carried.input_example(loaded.format)
        signature = ModelSignature(
            inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, *example.shape[1:]))]),
            outputs=Schema([ColSpec("double", name) for name in loaded.columns]),
        )
        assert self.client  # sets MLflow's URIs
        with (
            TemporaryDirectory() as folder,
            mlflow.start_run(run_id=run_id),
            _import_path_kept(),
            # It tells every user on stderr what our own caller says.
            redirect_stderr(io.StringIO()),
        ):
            model = mlflow.pyfunc.log_model(
                name=MODEL,
                python_model=str(carried.MODEL_FILE),
                artifacts={"ensemble": str(ensemble)},
                code_paths=[str(carried.copy_code(Path(folder)))],
                signature=signature,
                input_example=example,
                pip_requirements=carried.requirements(loaded),
                metadata=carried.facts(loaded),
            )
            return mlflow.register_model(model.model_uri, MODEL, tags=tags)

    def describe(self, version: str, card: str) -> None:
        """Write the description of a version, where it has none yet."""
        if not self.version(version).description:
            self.client.update_model_version(MODEL, version, description=card)

    def set_alias(self, alias: str, version: str) -> None:
        self.client.set_registered_model_alias(MODEL, alias, version)

    def version(self, number: str) -> "ModelVersion":
        """A version as it is in the registry now."""
        return self.client.get_model_version(MODEL, number)

    def promote(self, version: str, by_hand: bool = False) -> None:
        """Make a version champion, and write down whose place it takes. The caller holds the lock.

        by_hand: by somebody who knows; a version that was rolled back is so no more. The alias is
        moved last, at once: whatever fails before leaves the champion that was.
        """
        champion = self.aliased(CHAMPION)
        if champion is not None and str(champion.version) == version:
            return
        if by_hand and ROLLED_BACK in self.version(version).tags:
            self.client.delete_model_version_tag(MODEL, version, ROLLED_BACK)
        if champion is not None:
            self.client.set_model_version_tag(MODEL, version, REPLACED, str(champion.version))
        self.set_alias(CHAMPION, version)

    def roll_back(self) -> tuple[str, str]:
        """Make the champion before this one champion again: (that, this).

        Raises InputError where there is no champion, or none before it.
        """
        with self.registry_lock():
            champion = self.aliased(CHAMPION)
            if champion is None:
                raise InputError(f"{MODEL} has no champion; make one with `lens-pipeline promote`")
            number = str(champion.version)
            former = champion.tags.get(REPLACED)
            known = {str(version.version): version for version in self.versions()}
            if former not in known:
                raise InputError(
                    f"{MODEL} version {number} has replaced no champion that is still there; name "
                    "the one you want with `lens-pipeline promote`"
                )
            if ROLLED_BACK in known[former].tags:
                raise InputError(
                    f"{MODEL} version {former}, the champion before version {number}, was rolled "
                    "back itself; name the one you want with `lens-pipeline promote`"
                )
            when = datetime.now(UTC).isoformat(timespec="seconds")
            self.client.set_model_version_tag(MODEL, number, ROLLED_BACK, when)
            self.set_alias(CHAMPION, former)
        return former, number

    def aliases(self, version: str) -> list[str]:
        return sorted(self.client.get_model_version(MODEL, version).aliases)

    def load(self, uri: str | None = None) -> tuple["LensEnsemble", str]:
        """(the ensemble, `models:/name/version`) by a `models:/` URI of this registry.

        Without one: `champion`, else the newest `challenger`. Raises InputError where the home has
        no registry, and where the registry has no such model.
        """
        uri = uri or self._default_uri()
        if not uri.startswith("models:/"):
            raise InputError(
                f"--model: {uri!r} is not of this registry; it is models:/{MODEL}@alias or "
                f"models:/{MODEL}/version (a model is code, so no other place is trusted)"
            )
        self.require_registry()
        import mlflow
        from mlflow.exceptions import MlflowException

        assert self.client  # sets MLflow's URIs
        try:
            uri = self._numbered(uri)
            with _import_path_kept():
                model = mlflow.pyfunc.load_model(uri)
        except (MlflowException, OSError) as problem:
            reason = " ".join(str(problem).split())
            raise InputError(f"--model: {uri} cannot be loaded ({reason})") from None
        return model.unwrap_python_model().ensemble, uri

    def member_checkpoint(self, uri: str, architecture: str) -> Path:
        """A local copy of the checkpoint of a registered ensemble's member of this architecture.

        Raises InputError where the registry has no such model, or the model no such member.
        """
        self.require_registry()
        import mlflow
        from mlflow.exceptions import MlflowException

        from lens_pipeline.models.pretrained import read_checkpoint

        try:
            uri = self._numbered(uri)
            folder = self.settings.home / "cache" / uri.replace(":", "")
            folder.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(folder.with_name(f".{folder.name}.lock")):
                if not folder.exists():
                    with folder_aside(folder) as aside:
                        mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(aside))
        except MlflowException as problem:
            reason = " ".join(str(problem).split())
            raise InputError(f"model.pretrained: {uri} cannot be had ({reason})") from None
        members = {
            read_checkpoint(path)["hyper_parameters"]["arch"]: path
            for path in sorted(folder.rglob("members/*.ckpt"))
        }
        if architecture not in members:
            raise InputError(
                f"model.pretrained: {uri} has no {architecture}; it has {', '.join(members)}"
            )
        return members[architecture]

    def require_registry(self) -> None:
        """Raises InputError, naming the home, where there is no registry yet."""
        if self.settings.tracking_uri is None and not self.settings.mlflow_database.is_file():
            raise InputError(
                f"{self.settings.home}: this home has no model registry; "
                "name another with --home or LENS_HOME, or make one with `lens-pipeline run`"
            )

    def _numbered(self, uri: str) -> str:
        """The URI of the version that an alias points to now: it may move meanwhile."""
        name, at, alias = uri.removeprefix("models:/").partition("@")
        if not at:
            return uri
        return f"models:/{name}/{self.client.get_model_version_by_alias(name, alias).version}"

    def _default_uri(self) -> str:
        self.require_registry()
        for alias in (CHAMPION, CHALLENGER):
            version = self.aliased(alias)
            if version is not None:
                if alias == CHALLENGER:
                    log.warning("no champion: using the challenger, version %s", version.version)
                return f"models:/{MODEL}/{version.version}"
        raise InputError(
            f"{masked(self.settings.mlflow_uri)}: no version of {MODEL} is registered; "
            "make one with `lens-pipeline run`"
        )


@contextmanager
def _import_path_kept() -> Iterator[None]:
    """MLflow puts the code that a model carries before all else; here the installed code scores,
    and so it does in processes that are started later."""
    before = sys.path
    try:
        yield
    finally:
        sys.path = before


def version_tags(
    settings: Settings,
    step_key: str,
    dataset_version: str,
    dagster_run: str,
    member_runs: Mapping[str, str],
    metrics: Mapping[str, Any],
) -> dict[str, str]:
    """What a registered version carries: its dataset, code, settings, its members' runs, its
    metrics. The commit is that of the checkout that this runs from, where it is one."""
    from mlflow.utils.git_utils import get_git_commit

    commit = get_git_commit(str(Path(__file__).parent))
    return {
        STEP_KEY: step_key,
        DATASET_VERSION: dataset_version,
        DAGSTER_RUN: dagster_run,
        "lens.code_version": importlib.metadata.version("lens-pipeline"),
        **({"lens.git_commit": commit} if commit else {}),
        "lens.settings": json.dumps(settings.decisive, sort_keys=True),
        "lens.member_runs": json.dumps(dict(member_runs), sort_keys=True),
        **{f"lens.{name}": f"{value:.6g}" for name, value in flat_metrics(metrics).items()},
    }
