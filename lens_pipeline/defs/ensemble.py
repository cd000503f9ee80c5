"""The ensemble and what it is worth: `lens_ensemble`, `ensemble_evaluation`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

from lens_pipeline.defs.checkpoints import network_libraries
from lens_pipeline.defs.dataset import catalogue_of
from lens_pipeline.defs.resources import LensHome
from lens_pipeline.defs.stages import (
    CATALOGUE,
    CLOUD,
    DATASET,
    ENSEMBLE,
    EVALUATION,
    checkpoint_key,
    code_version,
    made,
    picture,
    result,
    run_stage,
    table,
)
from lens_pipeline.models.names import Member
from lens_pipeline.settings import Settings
from lens_pipeline.steps import Recipe

if TYPE_CHECKING:
    from lens_pipeline.catalogue.table import Catalogue
    from lens_pipeline.ensemble.predictor import ScoredDataset

SYSTEM = "lens_pipeline.ensemble.system"
EVALUATE = "lens_pipeline.ensemble.evaluate"
AS_DATASET = "lens_pipeline.shards.as_dataset"
# Of an evaluation, by their titles; those of the selection function only where truths are known.
PICTURES = {
    "ROC": "roc",
    "precision and recall": "precision_recall",
    "reliability": "reliability",
    "completeness": "completeness",
    "completeness map": "completeness_map",
    "purity": "purity",
}
# What decides on what is scored, by content, and what opens it.
Source = tuple[dict[str, str], Callable[[], "tuple[ScoredDataset, Catalogue]"]]


def ensemble_asset(members: Sequence[Member]) -> dg.AssetsDefinition:
    keys = {member.name: checkpoint_key(member.name) for member in members}

    @dg.asset(
        key=ENSEMBLE,
        deps=[*keys.values(), CLOUD],
        group_name="ensemble",
        kinds={"pytorch"},
        code_version=code_version(SYSTEM),
    )
    def lens_ensemble(context: dg.AssetExecutionContext, lens: LensHome) -> dg.MaterializeResult:
        """The members, the calibration of each and of their fusion, in one folder."""
        from lens_pipeline.catalogue.dataset import CutoutFormat
        from lens_pipeline.shards.manifest import read_manifest
        from lens_pipeline.training.member import TrainedMember

        upstream = {name: made(context, key) for name, key in keys.items()}
        shards = made(context, CLOUD)
        recipe = Recipe(
            stage="lens_ensemble",
            modules=(SYSTEM,),
            libraries=(*network_libraries(members), "numpy", "scipy"),
            inputs={name: part.content for name, part in upstream.items()},
            settings={"dataset_version": shards.content},
        )

        def build(out: Path) -> None:
            from lens_pipeline.ensemble.system import assemble

            trained = {name: TrainedMember(part.folder) for name, part in upstream.items()}
            parts = {name: (t.checkpoint, t.val_scores) for name, t in trained.items()}
            manifest = read_manifest(shards.location, lens.settings.storage_options)
            form = CutoutFormat.from_dict(manifest.format)
            steps = {name: part.folder.name for name, part in upstream.items()}
            facts = {
                "dataset": manifest.dataset,
                "dataset_version": manifest.dataset_version,
                "member_steps": steps,
            }
            assemble(parts, form, out, facts)

        step = run_stage(ENSEMBLE, recipe, lens.settings.home / "ensemble", build, lens.settings)
        description = json.loads((step.folder / "ensemble.json").read_text())
        return result(step, {"ensemble": dg.MetadataValue.json(description)})

    return lens_ensemble


def evaluation_asset(published: bool) -> dg.AssetsDefinition:
    """published: score what the shards hold, for there is no dataset that they were made from."""
    modules = (EVALUATE, AS_DATASET) if published else (EVALUATE,)

    @dg.asset(
        key=EVALUATION,
        deps=[ENSEMBLE, CLOUD] if published else [ENSEMBLE, DATASET, CATALOGUE],
        group_name="ensemble",
        kinds={"pandas"},
        code_version=code_version(*modules),
        check_specs=[
            dg.AssetCheckSpec(
                "passes_the_gate",
                asset=EVALUATION,
                description="The ensemble may become champion: see the reasons.",
            )
        ],
    )
    def ensemble_evaluation(
        context: dg.AssetExecutionContext, lens: LensHome
    ) -> dg.MaterializeResult:
        """What the ensemble is worth on the test split: metrics, intervals, scores, a report."""
        from lens_pipeline.evaluation.report import forecast_table, kinds_table
        from lens_pipeline.evaluation.result import read_evaluation

        settings = lens.settings
        ensemble = made(context, ENSEMBLE)
        source = _published_source if published else _dataset_source
        inputs, opened = source(context, settings)
        recipe = Recipe(
            stage="ensemble_evaluation",
            modules=modules,
            libraries=("torch", "numpy", "scipy", "pandas", "pyarrow", "matplotlib"),
            inputs={"ensemble": ensemble.content, **inputs},
            settings={"gate": settings.gate},
        )

        def build(out: Path) -> None:
            from lens_pipeline.ensemble.evaluate import evaluate_ensemble

            evaluate_ensemble(ensemble.folder, *opened(), out, gate=settings.gate)

        step = run_stage(EVALUATION, recipe, settings.reports, build, settings)
        evaluation = read_evaluation(step.folder)
        decision = evaluation.gate(settings.gate)
        figures = {
            name: value["value"]
            for name, value in evaluation.metrics["ensemble"].items()
            if isinstance(value, dict) and value["value"] is not None
        }
        return result(
            step,
            {
                **{
                    title: picture(step.folder / f"{name}.png")
                    for title, name in PICTURES.items()
                    if (step.folder / f"{name}.png").is_file()
                },
                "forecast": table(forecast_table(evaluation.forecast)),
                **({"kinds": table(kinds_table(evaluation.kinds))} if evaluation.kinds else {}),
                **figures,
                "report": dg.MetadataValue.path(str(step.folder / "report.html")),
            },
            checks=(
                dg.AssetCheckResult(
                    check_name="passes_the_gate",
                    passed=decision.passed,
                    severity=dg.AssetCheckSeverity.WARN,
                    metadata={"reasons": "; ".join(decision.reasons), **decision.figures},
                ),
            ),
        )

    return ensemble_evaluation


def _dataset_source(context: dg.AssetExecutionContext, settings: Settings) -> Source:
    dataset, listed = made(context, DATASET), made(context, CATALOGUE)

    def opened() -> "tuple[ScoredDataset, Catalogue]":
        from lens_pipeline.catalogue.dataset import open_dataset

        return open_dataset(dataset.folder), catalogue_of(settings, listed)

    return {"dataset": dataset.content, "table": listed.content}, opened


def _published_source(context: dg.AssetExecutionContext, settings: Settings) -> Source:
    shards = made(context, CLOUD)

    def opened() -> "tuple[ScoredDataset, Catalogue]":
        from lens_pipeline.shards.as_dataset import shards_as_dataset

        dataset = shards_as_dataset(
            shards.location, cache=settings.home / "cache", storage_options=settings.storage_options
        )
        return dataset, dataset.catalogue

    return {"shards": shards.content}, opened
