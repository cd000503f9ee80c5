"""The ensemble and what it is worth: `lens_ensemble`, `ensemble_evaluation`."""

import json
from collections.abc import Sequence
from pathlib import Path

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
)
from lens_pipeline.models.names import Member
from lens_pipeline.steps import Recipe

SYSTEM = "lens_pipeline.ensemble.system"
EVALUATE = "lens_pipeline.ensemble.evaluate"


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


@dg.asset(
    key=EVALUATION,
    deps=[ENSEMBLE, DATASET, CATALOGUE],
    group_name="ensemble",
    kinds={"pandas"},
    code_version=code_version(EVALUATE),
    check_specs=[
        dg.AssetCheckSpec(
            "passes_the_gate",
            asset=EVALUATION,
            description="The ensemble may become champion: see the reasons.",
        )
    ],
)
def ensemble_evaluation(context: dg.AssetExecutionContext, lens: LensHome) -> dg.MaterializeResult:
    """What the ensemble is worth on the test split: metrics with intervals, scores, a report."""
    from lens_pipeline.catalogue.dataset import open_dataset
    from lens_pipeline.evaluation.result import read_evaluation

    settings = lens.settings
    ensemble, dataset, table = (made(context, key) for key in (ENSEMBLE, DATASET, CATALOGUE))
    recipe = Recipe(
        stage="ensemble_evaluation",
        modules=(EVALUATE,),
        libraries=("torch", "numpy", "scipy", "pandas", "pyarrow", "matplotlib"),
        inputs={"ensemble": ensemble.content, "dataset": dataset.content, "table": table.content},
        settings={"gate": settings.gate},
    )

    def build(out: Path) -> None:
        from lens_pipeline.ensemble.evaluate import evaluate_ensemble

        evaluate_ensemble(
            ensemble.folder,
            open_dataset(dataset.folder),
            catalogue_of(settings, table),
            out,
            gate=settings.gate,
        )

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
            "ROC": picture(step.folder / "roc.png"),
            "reliability": picture(step.folder / "reliability.png"),
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
