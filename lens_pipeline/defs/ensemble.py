"""The ensemble and what it is worth: `lens_ensemble`, `ensemble_evaluation`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from lens_pipeline.defs.checkpoints import network_libraries
from lens_pipeline.defs.gate import decide
from lens_pipeline.defs.resources import LensHome
from lens_pipeline.defs.scored import AS_DATASET, scored_source
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
from lens_pipeline.registry import CHAMPION, registry_key
from lens_pipeline.steps import Recipe

SYSTEM = "lens_pipeline.ensemble.system"
EVALUATE = "lens_pipeline.ensemble.evaluate"
# Of an evaluation, by their titles; those of the selection function only where truths are known.
PICTURES = {
    "ROC": "roc",
    "precision and recall": "precision_recall",
    "reliability": "reliability",
    "completeness": "completeness",
    "completeness map": "completeness_map",
    "purity": "purity",
}


def ensemble_asset(members: Sequence[Member]) -> dg.AssetsDefinition:
    keys = {member.name: checkpoint_key(member.name) for member in members}

    @dg.asset(
        key=ENSEMBLE,
        deps=[*keys.values(), CLOUD],
        group_name="ensemble",
        kinds={"pytorch"},
        code_version=code_version(SYSTEM, AS_DATASET),
    )
    def lens_ensemble(context: dg.AssetExecutionContext, lens: LensHome) -> dg.MaterializeResult:
        """The members, the calibration of each and of their fusion, in one folder."""
        import pandas as pd

        from lens_pipeline.catalogue.dataset import CutoutFormat
        from lens_pipeline.shards.as_dataset import read_rows
        from lens_pipeline.shards.manifest import read_manifest
        from lens_pipeline.training.member import TrainedMember

        settings = lens.settings
        chosen: dict[str, Any] = {
            "fusion": settings.fusion,
            "calibration": settings.calibration,
            "prevalence": settings.prevalence,
        }
        upstream = {name: made(context, key) for name, key in keys.items()}
        shards = made(context, CLOUD)
        recipe = Recipe(
            stage="lens_ensemble",
            modules=(SYSTEM, AS_DATASET),
            libraries=(*network_libraries(members), "numpy", "scipy"),
            inputs={name: part.content for name, part in upstream.items()},
            settings={"dataset_version": shards.content, **chosen},
        )

        def build(out: Path) -> None:
            from lens_pipeline.ensemble.system import assemble, groups_behind
            from lens_pipeline.evaluation.origins import SIMULATED, by_origin, described

            trained = {name: TrainedMember(part.folder) for name, part in upstream.items()}
            parts = {name: (t.checkpoint, t.val_scores) for name, t in trained.items()}
            manifest = read_manifest(shards.location, settings.storage_options)
            rows = read_rows(shards.location, manifest, settings.storage_options)
            learnt = rows[rows["split"].isin(["train", "val"])]
            seen = set(learnt["group"])
            for member in trained.values():
                seen |= groups_behind(member.config.model.pretrained)
            parts_of = by_origin(learnt, manifest.simulated)
            form = CutoutFormat.from_dict(manifest.format)
            steps = {name: part.folder.name for name, part in upstream.items()}
            facts = {
                "dataset": manifest.dataset,
                "dataset_version": manifest.dataset_version,
                "simulated": SIMULATED in parts_of,
                "learnt_from": "; ".join(described(p, o) for o, p in parts_of.items()),
                "member_steps": steps,
            }
            assemble(parts, form, out, facts, seen, **chosen)

        step = run_stage(ENSEMBLE, recipe, settings.home / "ensemble", build, settings)
        description = json.loads((step.folder / "ensemble.json").read_text())
        metadata: dict[str, Any] = {
            "ensemble": dg.MetadataValue.json(description),
            "fusion": description["fusion"]["strategy"],
        }
        if description["comparison"]:
            metadata["fusions"] = table(pd.DataFrame(description["comparison"]).round(4))
        return result(step, metadata)

    return lens_ensemble


def evaluation_asset(members: Sequence[Member], published: bool) -> dg.AssetsDefinition:
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
        source = scored_source(context, settings, published)
        recipe = Recipe(
            stage="ensemble_evaluation",
            modules=modules,
            libraries=(
                *network_libraries(members),
                *("numpy", "scipy", "pandas", "pyarrow", "matplotlib"),
            ),
            inputs={"ensemble": ensemble.content, **source.inputs},
            settings={"gate": settings.gate, "prevalence": settings.prevalence},
        )

        def build(out: Path) -> None:
            from lens_pipeline.ensemble.evaluate import evaluate_ensemble

            evaluate_ensemble(
                ensemble.folder,
                *source.opened(),
                out,
                gate=settings.gate,
                prevalence=settings.prevalence,
            )

        step = run_stage(EVALUATION, recipe, settings.reports, build, settings)
        evaluation = read_evaluation(step.folder)
        key = registry_key(ensemble.content)
        decision = decide(
            lens,
            key,
            ensemble.folder,
            step.folder,
            source,
            lens.registry.aliased(CHAMPION),
            lens.registry.find_version(key),
        )
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
                    metadata={
                        "reasons": "; ".join(decision.reasons),
                        **{name: n for name, n in decision.figures.items() if n is not None},
                    },
                ),
            ),
        )

    return ensemble_evaluation
