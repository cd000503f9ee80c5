"""What every asset does: run its step, find its inputs, say what came out."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from lens_pipeline.errors import InputError
from lens_pipeline.settings import Settings
from lens_pipeline.steps import Recipe, Step, digest, run_step, source_hashes

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("lens_pipeline.stages")

CATALOGUE = dg.AssetKey("cutout_catalogue")
DATASET = dg.AssetKey("processed_dataset")
SHARDS = dg.AssetKey("lens_shards")
CLOUD = dg.AssetKey("cloud_shards")
ENSEMBLE = dg.AssetKey("lens_ensemble")
EVALUATION = dg.AssetKey("ensemble_evaluation")
REGISTERED = dg.AssetKey("registered_ensemble")


def checkpoint_key(member: str) -> dg.AssetKey:
    return dg.AssetKey(["checkpoints", member])


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


def made(context: dg.AssetExecutionContext, key: dg.AssetKey) -> Made:
    """What an upstream asset left: in this run where it is part of it, else when it was last made
    (or observed, where it is made elsewhere).

    Raises InputError where it has never been.
    """
    observed = context.job_def.asset_layer.asset_graph.get(key).is_observable
    kind = "OBSERVATION" if observed else "MATERIALIZATION"
    of_type = dg.DagsterEventType[f"ASSET_{kind}"]
    instance = context.instance
    in_run = instance.get_records_for_run(context.run_id, of_type=of_type).records
    fetch = instance.fetch_observations if observed else instance.fetch_materializations
    for record in (*reversed(in_run), *fetch(key, limit=1).records):
        entry = record.event_log_entry
        event = entry.asset_observation or entry.asset_materialization
        if event is not None and event.asset_key == key:
            return Made(*(str(event.metadata[name].value) for name in ("location", "content")))
    todo = "observed yet; observe" if observed else "made yet; materialise"
    raise InputError(f"{key.to_user_string()} has not been {todo} it first")


def run_stage(
    key: dg.AssetKey,
    recipe: Recipe,
    root: Path,
    build: Callable[[Path], object],
    settings: Settings,
    goes_on: bool = False,
) -> Step:
    """Run an asset's step, telling the terminal when it begins and how it ended."""
    name = key.to_user_string()
    log.info("%s ...", name)
    step = run_step(recipe, root, build, verify=settings.verify, goes_on=goes_on)
    log.info("%s: %s in %.1f s", name, "reused" if step.reused else "made", step.seconds)
    return step


@contextmanager
def bad_input_is_final() -> Iterator[None]:
    """Of a step that is tried again: not for bad input, which stays what it is."""
    try:
        yield
    except InputError as problem:
        raise dg.Failure(str(problem), allow_retries=False) from problem


def in_a_process(
    context: dg.OpExecutionContext | dg.AssetExecutionContext,
    command: list[str],
    settings: Settings,
    failure: Path,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run a command of ours in a process that is not Dagster's; it tells the step's log.

    Raises InputError with what it has written into the file `failure`.
    """
    failure.unlink(missing_ok=True)
    try:
        dg.PipesSubprocessClient().run(
            command=command,
            context=context,
            env={"MLFLOW_TRACKING_URI": settings.mlflow_uri, **(env or {})},
        )
    except Exception:
        if failure.exists():
            raise InputError(failure.read_text()) from None
        raise


def table(rows: "pd.DataFrame") -> dg.TableMetadataValue:
    """A data frame as metadata that the UI shows as a table."""
    return dg.MetadataValue.table(
        [
            dg.TableRecord({str(name): _shown(value) for name, value in row.items()})
            for _, row in rows.iterrows()
        ]
    )


def _shown(value: Any) -> str:
    """A cell of a table: three digits, and nothing where there is nothing."""
    if value is None or value != value:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def result(
    step: Step,
    metadata: Mapping[str, Any],
    checks: tuple[dg.AssetCheckResult, ...] = (),
    location: str | None = None,
    content: str | None = None,
) -> dg.MaterializeResult:
    """What a step's asset returns; `location` and `content` where they are not the folder's."""
    return dg.MaterializeResult(
        metadata={
            "location": location or str(step.folder),
            "content": content or step.content,
            "seconds": round(step.seconds, 3),
            "reused": step.reused,
            **metadata,
        },
        data_version=dg.DataVersion(step.key),
        check_results=list(checks),
    )


def drawn(name: str, of: Step, draw: Callable[[], bytes], settings: Settings) -> Path:
    """The PNG or JPEG file `name`, drawn from what a step made by a function of `plots`.

    It is a step of its own: with another colour it is drawn again, and no network trained again.
    """
    recipe = Recipe(
        stage=f"picture/{name}",
        modules=("lens_pipeline.evaluation.plots",),
        libraries=("matplotlib",),
        inputs={"step": of.content},
    )
    root = settings.home / "pictures"
    step = run_step(recipe, root, lambda out: (out / name).write_bytes(draw()))
    return step.folder / name


def picture(path: Path) -> dg.MetadataValue:
    """A PNG or JPEG file as metadata that the UI shows in place."""
    import base64
    import mimetypes

    encoded = base64.b64encode(path.read_bytes()).decode()
    kind, _ = mimetypes.guess_type(path.name)
    return dg.MetadataValue.md(f"![{path.stem}](data:{kind};base64,{encoded})")
