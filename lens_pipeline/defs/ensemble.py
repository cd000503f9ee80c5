"""The ensemble and what it is worth: `lens_ensemble`, `ensemble_evaluation`."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.storage.tags import AUTOMATION_CONDITION_TAG

from lens_pipeline.catalogue.column_help import COLUMNS as CATALOGUE_COLUMNS
from lens_pipeline.commit import code_commit
from lens_pipeline.defs.checkpoints import member_libraries
from lens_pipeline.defs.dataset_checks import PIXEL_LIBRARIES
from lens_pipeline.defs.gate import GATE_CHECK, Candidate
from lens_pipeline.defs.resources import LensHome
from lens_pipeline.defs.scored import AS_DATASET, scored_source
from lens_pipeline.defs.shown import column_schema, linked_table, picture, table
from lens_pipeline.defs.stages import (
    CATALOGUE,
    CLOUD,
    DATASET,
    ENSEMBLE,
    EVALUATION,
    Stage,
    checkpoint_key,
    log,
    made,
    result,
    run_stage,
    stage,
    was_cancelled,
)
from lens_pipeline.defs.surveys import of_every_survey
from lens_pipeline.ensemble.description import groups_behind, read_description
from lens_pipeline.errors import InputError
from lens_pipeline.models.names import Member
from lens_pipeline.registry import CHAMPION, registry_key
from lens_pipeline.steps import Recipe, inputs_of
from lens_pipeline.tracking import Tracking

ASSEMBLY = "lens_pipeline.ensemble.assembly"
LEARNT = "lens_pipeline.ensemble.learnt"
EVALUATE = "lens_pipeline.scoring.evaluate"
# Of an evaluation, by their titles; those of the selection function only where truths are known.
PICTURES = {
    "ROC": "roc",
    "ROC by survey": "surveys",
    "precision and recall": "precision_recall",
    "reliability": "reliability",
    "completeness": "completeness",
    "completeness map": "completeness_map",
    "purity": "purity",
}
COLUMNS = CATALOGUE_COLUMNS | {
    "probability": "That it is a lens, where lenses are as frequent as in the validation split.",
    "sky_probability": "The same where they are as frequent as LENS_PREVALENCE says.",
    "logit": "Of `probability`.",
    "std": "Epistemic: how much members and dropout draws differ.",
    "entropy": "Aleatoric, in nats.",
    "reject_reason": "Why the image could not be used, and has no scores.",
    "learnt_from": "Whether members were trained or validated on its group.",
    "split": "Where it was used; `unlabelled` is scored alone.",
}


def ensemble_stage(members: Sequence[Member], remote: bool) -> Stage:
    """remote: whether the shards, of which it reads the manifest, lie in a store."""
    keys = {member.name: checkpoint_key(member.name) for member in members}

    @stage(
        ENSEMBLE,
        modules=(ASSEMBLY, LEARNT, AS_DATASET),
        by_chance=remote,
        deps=[*keys.values(), CLOUD],
        group_name="ensemble",
        kinds={"pytorch"},
    )
    def lens_ensemble(context: dg.AssetExecutionContext, lens: LensHome) -> dg.MaterializeResult:
        """The lens finder: all members together, which give a galaxy one probability.

        The networks, the calibration of each on the validation split, their fusion and its own
        calibration, in one folder.
        """
        import pandas as pd

        from lens_pipeline.evaluation.standing import idle_members, members_table
        from lens_pipeline.training.member import TrainedMember

        settings = lens.settings
        chosen: dict[str, Any] = {
            "fusion": settings.fusion,
            "calibration": settings.calibration,
            "prevalence": settings.prevalence,
        }
        # Launched by `follow_up`, which sees trainings that failed, and none that were cancelled.
        if AUTOMATION_CONDITION_TAG in context.run.tags:
            for name, key in keys.items():
                if was_cancelled(context.instance, key):
                    raise InputError(
                        f"checkpoints/{name}: its training was cancelled, and no ensemble of new "
                        "and old members is made by itself; train it, or materialise lens_ensemble"
                    )
        upstream = {name: made(context, key) for name, key in keys.items()}
        shards = made(context, CLOUD)
        for name, part in upstream.items():
            if (learnt := inputs_of(part.folder)["shards"]) != shards.content:
                raise InputError(
                    f"checkpoints/{name} was trained on the dataset {learnt[:8]}, and the shards "
                    f"are those of {shards.content[:8]} now: materialise it first"
                )
        recipe = Recipe(
            stage="lens_ensemble",
            modules=(ASSEMBLY, LEARNT, AS_DATASET),
            libraries=(*member_libraries(members), *PIXEL_LIBRARIES, "scipy"),
            inputs={name: part.content for name, part in upstream.items()},
            settings={
                "dataset_version": shards.content,
                "test_time_augmentation": settings.test_time_augmentation,
                **chosen,
            },
        )

        def build(out: Path) -> None:
            from lens_pipeline.ensemble.assembly import assemble, classes
            from lens_pipeline.ensemble.learnt import LEARNT_PIXELS, learnt_pixels
            from lens_pipeline.evaluation.origins import REAL, SIMULATED, by_origin, described
            from lens_pipeline.shards.as_dataset import shards_as_dataset

            trained = {name: TrainedMember(part.folder) for name, part in upstream.items()}
            parts = {name: (t.checkpoint, t.val_scores) for name, t in trained.items()}
            dataset = shards_as_dataset(
                shards.location, cache=settings.cache, storage_options=settings.storage_options
            )
            manifest, rows = dataset.shards.manifest, dataset.rows
            learnt = rows[rows["split"].isin(["train", "val"])]
            seen = set(learnt["group"])
            for member in trained.values():
                if member.config.starts_from_a_file:
                    seen |= groups_behind(member.config.model.pretrained)
            parts_of = by_origin(learnt, manifest.simulated)
            validated = by_origin(rows[rows["split"] == "val"], manifest.simulated)
            of_real = {}
            if len(validated) > 1 and validated[REAL]["label"].nunique() > 1:
                of_real = {"validation_of_real": classes(validated[REAL]["label"])}
            steps = {name: part.folder.name for name, part in upstream.items()}
            facts = {
                "dataset": manifest.dataset,
                "dataset_version": manifest.dataset_version,
                "simulated": SIMULATED in parts_of,
                "learnt_from": "; ".join(described(p, o) for o, p in parts_of.items()),
                LEARNT_PIXELS: learnt_pixels(
                    dataset.split("train"),
                    dataset.table("train"),
                    dataset.format,
                    manifest.simulated,
                ),
                "member_steps": steps,
                **of_real,
            }
            augmented = dataset.split("val") if settings.test_time_augmentation else None
            assemble(parts, dataset.format, out, facts, seen, **chosen, augmented=augmented)

        step = run_stage(ENSEMBLE, recipe, settings.home / "ensemble", build, settings)
        description = read_description(step.folder)
        for sentence in idle_members(description):
            log.warning("  %s", sentence)
        metadata: dict[str, Any] = {
            "ensemble": dg.MetadataValue.json(description),
            "fusion": description["fusion"]["strategy"],
            "members": table(members_table(description)),
        }
        if description["comparison"]:
            metadata["fusions"] = table(pd.DataFrame(description["comparison"]).round(4))
        return result(step, metadata)

    return lens_ensemble


def evaluation_stage(members: Sequence[Member], published: bool) -> Stage:
    """published: score what the shards hold, for there is no dataset that they were made from."""
    modules = (EVALUATE, AS_DATASET) if published else (EVALUATE,)

    @stage(
        EVALUATION,
        modules=modules,
        by_chance=True,  # it asks the registry who is champion
        deps=[ENSEMBLE, CLOUD] if published else [ENSEMBLE, of_every_survey(DATASET), CATALOGUE],
        group_name="ensemble",
        kinds={"pandas"},
        check_specs=[
            dg.AssetCheckSpec(
                GATE_CHECK,
                asset=EVALUATION,
                description="The ensemble may become champion: see the reasons.",
            ),
            dg.AssetCheckSpec(
                "probabilities_are_calibrated",
                asset=EVALUATION,
                description="The expected calibration error on the test split, both classes "
                "weighing the same, is beside what chance makes at most LENS_GATE_MAX_ECE: of "
                "cutouts with a probability of 0.8, some 80 % are lenses.",
            ),
        ],
    )
    def ensemble_evaluation(
        context: dg.AssetExecutionContext, lens: LensHome
    ) -> dg.MaterializeResult:
        """What the lens finder is worth on galaxies that it has not seen, the test split's.

        Metrics with 95 % intervals, completeness and purity, what a survey may expect of it, a
        report; and the scores of every cutout.
        """
        import pyarrow.parquet as pq

        from lens_pipeline.evaluation.result import FUSED, REPORT, SCORES, read_evaluation
        from lens_pipeline.evaluation.tables import (
            NOTHING_TO_EXPECT,
            forecast_table,
            kinds_table,
            surveys_table,
        )

        settings = lens.settings
        ensemble = made(context, ENSEMBLE)
        source = scored_source(context, settings, published)
        recipe = Recipe(
            stage="ensemble_evaluation",
            modules=modules,
            libraries=(
                *member_libraries(members),
                *("numpy", "scipy", "pandas", "pyarrow", "matplotlib"),
            ),
            inputs={"ensemble": ensemble.content, **source.inputs},
            settings={"gate": settings.gate, "prevalence": settings.prevalence},
        )

        def build(out: Path) -> None:
            from lens_pipeline.scoring.evaluate import evaluate_ensemble

            evaluate_ensemble(
                ensemble.folder,
                *source.opened(),
                out,
                gate=settings.gate,
                prevalence=settings.prevalence,
                made=_now(),
            )

        step = run_stage(EVALUATION, recipe, settings.reports, build, settings)
        evaluation = read_evaluation(step.folder)
        key = registry_key(ensemble.content)
        decision = Candidate(lens, key, ensemble.folder, step.folder, source).against(
            lens.registry.aliased(CHAMPION), lens.registry.find_version(key)
        )
        scores = pq.ParquetFile(step.folder / SCORES)
        columns = scores.schema_arrow.empty_table().to_pandas()
        of_members = {
            f"probability_{member.name}": f"That of {member.name} alone, by its own calibration."
            for member in members
        }
        metrics = evaluation.metrics[FUSED]
        surveys = {name: of[FUSED] for name, of in evaluation.surveys.items()}
        figures = {
            name: value["value"]
            for name, value in metrics.items()
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
                "members": _members_table(lens.tracking, ensemble.folder, evaluation.metrics),
                "forecast": table(forecast_table(evaluation.forecast), NOTHING_TO_EXPECT),
                **({"surveys": table(surveys_table(surveys))} if surveys else {}),
                **({"kinds": table(kinds_table(evaluation.kinds))} if evaluation.kinds else {}),
                **figures,
                "report": dg.MetadataValue.path(str(step.folder / REPORT)),
                "dagster/row_count": scores.metadata.num_rows,
                "dagster/column_schema": column_schema(columns, COLUMNS | of_members),
            },
            checks=(
                dg.AssetCheckResult(
                    check_name=GATE_CHECK,
                    passed=decision.passed,
                    severity=dg.AssetCheckSeverity.WARN,
                    metadata={
                        "reasons": "; ".join(decision.reasons) or "none, it passed",
                        **{name: n for name, n in decision.figures.items() if n is not None},
                    },
                ),
                _probabilities_are_calibrated(
                    evaluation.judged(settings.gate)[FUSED], settings.gate_max_ece
                ),
            ),
        )

    return ensemble_evaluation


def _now() -> str:
    """When and by which code a report is made. Neither decides on what it says, so it is no part of
    its recipe: a report that is reused names the code that made it."""
    version = importlib.metadata.version("lens-pipeline")
    commit = code_commit() or "not known"
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, lens-pipeline {version}, commit {commit}"


def _probabilities_are_calibrated(metrics: Mapping[str, Any], most: float) -> dg.AssetCheckResult:
    """Judged as the gate does: by the error beside what chance makes."""
    error, by_chance = metrics["ece_balanced"], metrics["ece_balanced_by_chance"]
    return dg.AssetCheckResult(
        check_name="probabilities_are_calibrated",
        passed=error["value"] - by_chance <= most,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={
            "calibration error": error["value"],
            "of it by chance": by_chance,
            "at most beside that": most,
            "lower 95 % bound": error["low"],
            "upper 95 % bound": error["high"],
        },
    )


def _members_table(
    tracking: Tracking, ensemble: Path, metrics: Mapping[str, Mapping[str, Any]]
) -> dg.MetadataValue:
    """The members and the ensemble on the test split, each member with the page of its run."""
    import pandas as pd

    from lens_pipeline.evaluation.tables import COLUMNS as FIGURES
    from lens_pipeline.evaluation.tables import metric_text

    steps = read_description(ensemble)["member_steps"]
    runs = {name: tracking.find_run(step) for name, step in steps.items()}
    rows = [
        {"member": name} | {title: metric_text(of[figure]) for figure, title in FIGURES.items()}
        for name, of in metrics.items()
    ]
    pages = {name: tracking.run_page(run.info.run_id) for name, run in runs.items() if run}
    return linked_table(pd.DataFrame(rows), {"member": pages})
