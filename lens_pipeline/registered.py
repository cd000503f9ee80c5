"""Models of the registry, fetched: an ensemble to score with, weights to start from."""

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import filelock

from lens_pipeline.code_hashes import PACKAGE
from lens_pipeline.errors import InputError, first_of, masked, told_of
from lens_pipeline.files import digest, folder_aside
from lens_pipeline.registry import (
    CHALLENGER,
    CHAMPION,
    GATE,
    MODEL,
    PASSED,
    Registry,
    answering,
    import_path_kept,
)
from lens_pipeline.training.config import TrainConfig

if TYPE_CHECKING:
    from lens_pipeline.ensemble.system import LensEnsemble

log = logging.getLogger(__name__)


def load_registered(registry: Registry, uri: str | None = None) -> tuple["LensEnsemble", str]:
    """(the ensemble, `models:/name/version`) by a `models:/` URI of this registry.

    Without one: `champion`, else the newest `challenger`. Raises InputError where the home has
    no registry, and where the registry has no such model; NoAnswerError where it cannot be
    asked.
    """
    if uri is not None and not uri.startswith("models:/"):
        raise InputError(
            f"{uri!r} is no model of this registry, which are models:/{MODEL}@{CHAMPION}, say, and "
            f"models:/{MODEL}/3 (a model is code, so no other place is trusted)"
        )
    registry.require()
    with answering(f"{uri or MODEL} cannot be loaded"):
        _ = registry.client  # sets MLflow's URIs
        uri = _numbered(registry, uri or _default_uri(registry))
        if not uri.startswith(f"models:/{MODEL}/"):
            raise InputError(f"{uri} is another model; a lens finder is {MODEL}")
        # MLflow would leave what it fetches where it lies; the ensemble is in memory then.
        with import_path_kept(), TemporaryDirectory() as fetched:
            model = _loaded(uri, fetched)
            _tell_of_other_code(uri, Path(fetched))
    return model.unwrap_python_model().ensemble, uri


def with_local_weights(registry: Registry, config: TrainConfig) -> TrainConfig:
    """A configuration with a file in the place of a registered model to start from."""
    start = config.model.pretrained
    if not start.startswith("models:/"):
        return config
    weights = member_checkpoint(registry, start, config.model.arch)
    return config.with_changes({"model": {"pretrained": str(weights)}}, start)


def member_checkpoint(registry: Registry, uri: str, architecture: str) -> Path:
    """A local copy of the checkpoint of a registered ensemble's member of this architecture.

    Raises InputError where the registry has no such model, or the model no such member;
    NoAnswerError where it cannot be asked.
    """
    registry.require()
    import mlflow

    from lens_pipeline.models.pretrained import read_checkpoint

    with answering(f"model.pretrained: {uri} cannot be had"):
        _ = registry.client  # sets MLflow's URIs
        uri = _numbered(registry, uri)
        # The number alone would be that of another server's version, too.
        name, _, number = uri.removeprefix("models:/").partition("/")
        version = registry.client.get_model_version(name, number)
        which = digest([version.source, version.run_id])[:16]
        folder = registry.settings.cache / "models" / f"{version.name}-{which}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.exists():
                with folder_aside(folder) as aside:
                    mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(aside))
    members: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("members/*.ckpt")):
        members.setdefault(read_checkpoint(path)["hyper_parameters"]["arch"], []).append(path)
    if architecture not in members:
        raise InputError(
            f"model.pretrained: {uri} has no {architecture}; it has {', '.join(members)}"
        )
    first, *others = members[architecture]
    if others:
        log.info("  of %d members of %s: %s", 1 + len(others), architecture, first.stem)
    return first


def _numbered(registry: Registry, uri: str) -> str:
    """The URI of the version that an alias points to now: it may move meanwhile. Raises InputError,
    with those that there are, for what the registry has not got."""
    rest = uri.removeprefix("models:/")
    mark = next((mark for mark in "/@" if mark in rest), "")
    if not mark:
        raise InputError(f"{uri}: says no version; name one, as {uri}@champion or {uri}/3")
    name, _, which = rest.partition(mark)
    of_name = f"name = '{name}'"
    models = registry.client.search_registered_models(of_name) if "'" not in name else []
    if not models:
        raise InputError(f"{uri}: no model of this name is registered")
    if mark == "@":
        known = {alias: str(number) for alias, number in sorted(models[0].aliases.items())}
    else:
        found = registry.client.search_model_versions(of_name)
        numbers = sorted((int(one.version) for one in found), reverse=True)
        known = {str(number): str(number) for number in numbers}
        which = str(numbers[0]) if which == "latest" and numbers else which
    if which not in known:
        kind = "alias" if mark == "@" else "version"
        there = first_of([*known], 9) or "none"
        raise InputError(f"{uri}: there is no such {kind}; {name} has {there}")
    return f"models:/{name}/{known[which]}"


def _default_uri(registry: Registry) -> str:
    for alias in (CHAMPION, CHALLENGER):
        version = registry.aliased(alias)
        if version is not None:
            if alias == CHALLENGER:
                gate = version.tags.get(GATE, PASSED)
                refused = "" if gate == PASSED else f", which the gate has refused: {gate}"
                log.warning(
                    "no champion: using the challenger, version %s%s", version.version, refused
                )
            return f"models:/{MODEL}/{version.version}"
    known = ", ".join(str(version.version) for version in registry.versions())
    if known:
        raise InputError(
            f"{MODEL} has the versions {known}, and none is champion or challenger; name one "
            f"with --model models:/{MODEL}/..., or make one champion with `lens-pipeline "
            "promote`"
        )
    raise InputError(
        f"{masked(registry.settings.mlflow_uri)}: no version of {MODEL} is registered; "
        "make one with `lens-pipeline run`"
    )


def _loaded(uri: str, folder: str) -> Any:
    """MLflow's model, fetched into a folder; it names the version where that holds no ensemble."""
    import mlflow

    try:
        return mlflow.pyfunc.load_model(uri, dst_path=folder)
    except InputError as problem:
        raise told_of(uri, problem) from None


def _tell_of_other_code(uri: str, folder: Path) -> None:
    """Warns where the code that scores is not what a version was registered with, and carries for
    those who have not installed it."""
    installed = Path(__file__).parent
    for carried in folder.rglob(f"code/{PACKAGE}"):
        files = [file.relative_to(carried) for file in sorted(carried.rglob("*.py"))]
        other = [
            str(file)
            for file in files
            if not (installed / file).is_file()
            or (installed / file).read_bytes() != (carried / file).read_bytes()
        ]
        if other:
            log.warning(
                "%s was registered with other code (%d files differ, as %s); the code that is "
                "installed here scores", uri, len(other), other[0],
            )  # fmt: skip
