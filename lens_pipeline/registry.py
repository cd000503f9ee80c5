"""MLflow's registry: the versions of the ensemble, and who of them is champion.

MLflow itself is imported where it is used: loading this module is light.
"""

import importlib.metadata
import io
import json
import logging
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from lens_pipeline.commit import code_commit
from lens_pipeline.errors import InputError, NoAnswerError
from lens_pipeline.files import digest
from lens_pipeline.settings import Settings
from lens_pipeline.steps import LOCKS, locked
from lens_pipeline.tracking import (
    DAGSTER_RUN,
    DATASET_VERSION,
    STEP_KEY,
    Tracking,
    page_address,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.exceptions import MlflowException

MODEL = "lens_ensemble"
ABOUT = (
    "Ensembles that find strong gravitational lenses in cutouts of galaxies. `champion` is the one "
    "that `lens-pipeline predict` uses, `challenger` the newest; the description of each version "
    "is its model card."
)
CHAMPION = "champion"
CHALLENGER = "challenger"
REPLACED = "lens.replaced"  # the champion before this one
ROLLED_BACK = "lens.rolled_back"  # when; such a version is promoted by hand alone
GATE = "lens.gate"  # what the last decision on a version was
PASSED = "passed"
LOGGED = "models:/m-"  # a source that is a model itself, and no other version
log = logging.getLogger(__name__)


def registry_key(ensemble: str) -> str:
    """What a version is found by, of an ensemble by its content: the same members in the same
    fusion are the same model, whatever made them again."""
    return digest([MODEL, ensemble])[:32]


@dataclass(frozen=True)
class Registry:
    """The registry of the tracking server that the settings name."""

    settings: Settings

    @cached_property
    def client(self) -> "MlflowClient":
        """See `Tracking.client`."""
        return Tracking(self.settings).client

    def lock(self) -> AbstractContextManager[None]:
        """One process of this home at a time looks for a version, registers one, moves aliases.

        MLflow itself has no lock: of homes that share a server, let one promote.
        """
        return locked(self.settings.home / LOCKS / "registry.lock")

    def versions(self) -> list["ModelVersion"]:
        """Every version of the registered model, newest first; none where there is no model."""
        found = self.client.search_model_versions(f"name = '{MODEL}'")
        return sorted(found, key=lambda version: -int(version.version))

    def dataset_versions(self) -> dict[str, str]:
        """{dataset version: the registered versions that refer to it}, of all models.

        Raises NoAnswerError where the registry cannot be asked.
        """
        self.require()
        import mlflow

        referring: dict[str, list[str]] = {}
        with answering(
            f"MLFLOW_TRACKING_URI: the registry at {self.settings.mlflow_uri} cannot be asked "
            "which dataset versions its models refer to"
        ):
            _ = self.client  # sets MLflow's URIs
            for version in mlflow.search_model_versions():
                if DATASET_VERSION in version.tags:
                    name = f"{version.name} version {version.version}"
                    referring.setdefault(version.tags[DATASET_VERSION], []).append(name)
        return {dataset: ", ".join(names) for dataset, names in referring.items()}

    def find_version(self, step_key: str) -> "ModelVersion | None":
        return next((v for v in self.versions() if v.tags.get(STEP_KEY) == step_key), None)

    def _numbers(self) -> dict[str, str]:
        """{alias: the version that has it}; a server's errors are raised."""
        models = self.client.search_registered_models(f"name = '{MODEL}'")
        return {a: str(number) for a, number in models[0].aliases.items()} if models else {}

    def aliased(self, alias: str) -> "ModelVersion | None":
        """The version with an alias, None where there is none. Raises InputError where the alias
        points to a version that is gone."""
        from mlflow.exceptions import MlflowException

        number = self._numbers().get(alias)
        try:
            return self.client.get_model_version(MODEL, number) if number else None
        except MlflowException as problem:
            if not _is_absent(problem):
                raise
            way_out = f"on the page of {MODEL} in MLflow give {alias} to another, or remove it"
            if alias == CHAMPION:
                way_out = "`lens-pipeline promote` makes another version champion"
            raise InputError(
                f"{MODEL}: the alias {alias} points to version {number}, which is not there; "
                f"{way_out}"
            ) from None

    def all_aliases(self) -> dict[str, list[str]]:
        """{version: its aliases} of the versions that have any."""
        found: dict[str, list[str]] = {}
        for alias, number in sorted(self._numbers().items()):
            found.setdefault(number, []).append(alias)
        return found

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
        _ = self.client  # sets MLflow's URIs
        with (
            TemporaryDirectory() as folder,
            mlflow.start_run(run_id=run_id),
            import_path_kept(),
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
            version = mlflow.register_model(model.model_uri, MODEL, tags=tags)
        if not self.client.get_registered_model(MODEL).description:
            self.client.update_registered_model(MODEL, description=ABOUT)
        return version

    def describe(self, version: str, card: str) -> None:
        """Write the description of a version, where it has none yet."""
        if not self.version(version).description:
            self.client.update_model_version(MODEL, version, description=card)

    def set_alias(self, alias: str, version: str) -> None:
        self.client.set_registered_model_alias(MODEL, alias, version)

    def version(self, number: str) -> "ModelVersion":
        """A version as it is in the registry now."""
        return self.client.get_model_version(MODEL, number)

    def version_page(self, number: str) -> str | None:
        """The address of a version's page; None where MLflow serves none."""
        pages = self.settings.mlflow_pages
        return pages and page_address(pages, f"models/{MODEL}/versions/{number}")

    def judge(self, version: str, reasons: Sequence[str]) -> None:
        """Write down on a version what keeps it from becoming champion; nothing does: it passed."""
        verdict = "; ".join(reasons) or PASSED
        if self.version(version).tags.get(GATE) != verdict:
            self.client.set_model_version_tag(MODEL, version, GATE, verdict)

    def promote(self, version: str) -> None:
        """Make a version champion, and write down whose place it takes. The caller holds the lock.

        One that was rolled back, or nearly, is so no more. The alias is moved last, at once:
        whatever fails before leaves the champion that was.
        """
        if ROLLED_BACK in self.version(version).tags:
            self.client.delete_model_version_tag(MODEL, version, ROLLED_BACK)
        champion = self._numbers().get(CHAMPION)  # which may be gone
        if champion == version:
            return
        if champion is not None:
            self.client.set_model_version_tag(MODEL, version, REPLACED, champion)
        self.set_alias(CHAMPION, version)

    def roll_back(self) -> tuple[str, str]:
        """Make the champion before this one champion again: (that, this).

        Raises InputError where there is no champion, or none before it.
        """
        with self.lock():
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

    def needed(self, keep: int) -> dict[str, str]:
        """{version: why it stays}: the `keep` newest, those with an alias, the one that a rollback
        would make champion, and those that were rolled back, which would come back by themselves
        where nothing tells of it. Raises InputError for keep < 1."""
        if keep < 1:
            raise InputError(f"keep {keep}: at least 1 is needed")
        reasons = self.all_aliases()
        champion, versions = self.aliased(CHAMPION), self.versions()
        if champion is not None and REPLACED in champion.tags:
            before = champion.tags[REPLACED]
            reasons.setdefault(before, []).append("a rollback would make it champion")
        for place, version in enumerate(versions):
            number = str(version.version)
            if ROLLED_BACK in version.tags:
                reasons.setdefault(number, []).append("was rolled back")
            if place < keep:
                reasons.setdefault(number, []).append(f"of the newest {keep}")
        return {number: "; ".join(why) for number, why in reasons.items()}

    def retire(self, numbers: Collection[str]) -> None:
        """Remove versions, each with its model and MLflow run, unless a version that stays, of any
        model, is of them. The caller holds the lock. Stopped anywhere, it can be done again.

        MLflow lists these no more, and keeps their files until `mlflow gc`.
        """
        import mlflow
        from mlflow.exceptions import MlflowException

        _ = self.client  # sets MLflow's URIs
        staying = [
            one
            for one in mlflow.search_model_versions()
            if one.name != MODEL or str(one.version) not in numbers
        ]
        # Copies of a version have its files, and each a source of its own.
        copies = [one for one in staying if one.name == MODEL or _source(one).startswith("models:")]
        files = {*map(_source, staying), *map(self._files, copies)}
        runs = {one.run_id for one in staying}
        for number in numbers:
            version = self.version(number)
            model = _source(version)
            left: list[Callable[[], None]] = []
            if model.startswith(LOGGED) and self._files(version) not in files:
                name = model.removeprefix("models:/")
                left.append(partial(self.client.delete_logged_model, name))
            if version.run_id and version.run_id not in runs:
                left.append(partial(self.client.delete_run, version.run_id))
            for delete in left:  # the version last, which alone leads to them
                try:
                    delete()
                except MlflowException as problem:  # it may be gone, by hand
                    if not _is_absent(problem):
                        raise
            self.client.delete_model_version(MODEL, number)

    def _files(self, version: "ModelVersion") -> str:
        """Where they lie."""
        return self.client.get_model_version_download_uri(version.name, version.version)

    def require(self) -> None:
        """Raises InputError, naming the home or the setting, where there is no registry yet: MLflow
        would make an empty one, which refers to nothing that is to be kept."""
        file = self.settings.mlflow_file
        if file is None or (file.is_file() and file.stat().st_size):
            return
        if self.settings.tracking_uri is not None:
            raise InputError(f"MLFLOW_TRACKING_URI: there is no model registry at {file}")
        raise InputError(
            f"{self.settings.home}: this home has no model registry; "
            "name another with --home or LENS_HOME, or make one with `lens-pipeline run`"
        )


def _source(version: "ModelVersion") -> str:
    return version.source or ""


def _is_absent(problem: "MlflowException") -> bool:
    """Whether MLflow has not got what it was asked for."""
    from mlflow.exceptions import ErrorCode
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

    return bool(problem.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST))


@contextmanager
def answering(what: str) -> Iterator[None]:
    """Around what asks the registry: its errors come out as InputError, NoAnswerError where it
    gives none, both with what could not be done."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as problem:
        raise _told(what, problem) from None


def _told(what: str, problem: Exception) -> InputError:
    """What to raise where the registry gives an error; NoAnswerError for a server, database or
    store that is gone or unwell, also in the middle of a file."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    unanswered = any(
        isinstance(one, ConnectionError | TimeoutError)
        or (isinstance(one, RequestException) and one.response is None)
        for one in (problem, problem.__context__)
    )
    status = getattr(getattr(problem, "response", None), "status_code", 0)
    if isinstance(problem, MlflowException):
        status = problem.get_http_status_code()  # 500 also where a file did not come whole
    unanswered = unanswered or status == 429 or status >= 500
    kind = NoAnswerError if unanswered else InputError
    return kind(f"{what} ({' '.join(str(problem).split())})")


@contextmanager
def import_path_kept() -> Iterator[None]:
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
    figures: Mapping[str, float],
) -> dict[str, str]:
    """What a registered version carries: its dataset, code, settings, its members' runs, its
    figures on the test split, of real and of simulated cutouts as `lens.real/auroc`, too."""
    commit = code_commit()
    return {
        STEP_KEY: step_key,
        DATASET_VERSION: dataset_version,
        DAGSTER_RUN: dagster_run,
        "lens.code_version": importlib.metadata.version("lens-pipeline"),
        **({"lens.git_commit": commit} if commit else {}),
        "lens.settings": json.dumps(settings.decisive, sort_keys=True),
        "lens.member_runs": json.dumps(dict(member_runs), sort_keys=True),
        **{f"lens.{name}": f"{value:.6g}" for name, value in figures.items()},
    }
