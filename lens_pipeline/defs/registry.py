"""The registry: `registered_ensemble`, and the summary that closes a run."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from lens_pipeline.defs.gate import Candidate
from lens_pipeline.defs.resources import LensHome
from lens_pipeline.defs.scored import scored_source
from lens_pipeline.defs.shown import link, linked_table
from lens_pipeline.defs.stages import ENSEMBLE, EVALUATION, REGISTERED, Stage, begun, made, stage
from lens_pipeline.ensemble.description import read_description
from lens_pipeline.files import write_aside
from lens_pipeline.registry import (
    CHALLENGER,
    CHAMPION,
    GATE,
    MODEL,
    Registry,
    registry_key,
    version_tags,
)
from lens_pipeline.tracking import DAGSTER_RUN, DATASET_VERSION, Tracking, flat_metrics

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from lens_pipeline.evaluation.gates import GateDecision
    from lens_pipeline.evaluation.result import Evaluation

PYFUNC = "lens_pipeline.ensemble.pyfunc_model"
SHOWN = 10  # versions in a table


def registry_stage(published: bool) -> Stage:
    """published: there is no dataset that the shards were made from."""

    @stage(
        REGISTERED,
        modules=(PYFUNC,),
        by_chance=True,
        deps=[EVALUATION, ENSEMBLE],
        group_name="ensemble",
        kinds={"mlflow"},
        by_schedule=True,
    )
    def registered_ensemble(
        context: dg.AssetExecutionContext, lens: LensHome
    ) -> dg.MaterializeResult:
        """The lens finder that surveys are scored with: a version of `lens_ensemble` in MLflow.

        The newest is `challenger`. It becomes `champion` where it passes the gate: the first by
        thresholds alone, any other against the champion, scored anew on the same cutouts.
        """
        from lens_pipeline.evaluation.card import model_card
        from lens_pipeline.evaluation.result import FUSED, REPORT, SCORES, read_evaluation

        ended = begun(REGISTERED)
        settings, registry = lens.settings, lens.registry
        ensemble, folder = made(context, ENSEMBLE), made(context, EVALUATION).folder
        facts = read_description(ensemble.folder)
        evaluation = read_evaluation(folder)
        key = registry_key(ensemble.content)
        with registry.lock():
            version = registry.find_version(key)
            reused = version is not None
            if version is None:
                version = _register(
                    lens.tracking, registry, key, ensemble.folder, facts, evaluation, context.run_id
                )
            number = str(version.version)
            registry.describe(number, model_card(facts, evaluation))
            challenger = registry.aliased(CHALLENGER)
            if challenger is None or int(challenger.version) < int(number):
                registry.set_alias(CHALLENGER, number)
        source = scored_source(context, settings, published)
        candidate = Candidate(lens, key, ensemble.folder, folder, source)
        decision = _promoted_if_passed(registry, number, candidate.against)
        aliases = registry.all_aliases().get(number, [])
        seconds = ended(reused)
        stages = _stages(context) | {
            REGISTERED.to_user_string(): {"seconds": round(seconds, 3), "reused": reused}
        }
        summary = {
            "schema": 1,
            "dataset_version": facts["dataset_version"],
            "members": {n: m for n, m in evaluation.metrics.items() if n != FUSED},
            "ensemble": evaluation.metrics[FUSED],
            "origins": {name: of[FUSED] for name, of in evaluation.origins.items()},
            "kinds": evaluation.kinds,
            "surveys": {name: of[FUSED] for name, of in evaluation.surveys.items()},
            "model": {"name": MODEL, "version": number, "aliases": aliases},
            "gate": asdict(decision),
            "stages": stages,
            "report": str(folder / REPORT),
            "scores": str(folder / SCORES),
        }
        write_aside(settings.reports / "summary.json", json.dumps(summary, indent=1))
        page, report, run_id = lens.tracking.run_page, folder / REPORT, str(version.run_id)
        return dg.MaterializeResult(
            metadata={
                "model": MODEL,
                "version": number,
                "aliases": ", ".join(aliases),
                "gate": registry.version(number).tags[GATE],
                "seconds": round(seconds, 3),
                "reused": reused,
                "versions": _versions_table(registry),
                "MLflow run": link(page(run_id), run_id),
                "report": link(page(run_id, REPORT), dg.MetadataValue.path(report)),
                "AUROC": evaluation.metrics[FUSED]["auroc"]["value"],
            },
            data_version=dg.DataVersion(key),
        )

    return registered_ensemble


def _versions_table(registry: Registry) -> dg.MetadataValue:
    """The newest versions, with their pages: who they are, and what was decided on them."""
    import pandas as pd

    found = registry.versions()[:SHOWN]
    numbers = [str(version.version) for version in found]
    aliases = registry.all_aliases()
    rows = pd.DataFrame(
        {
            "version": numbers,
            "aliases": [", ".join(aliases.get(number, ())) for number in numbers],
            "AUROC": [version.tags.get("lens.auroc") for version in found],
            "dataset version": [version.tags.get(DATASET_VERSION, "")[:12] for version in found],
            "gate": [version.tags.get(GATE) for version in found],
        }
    )
    return linked_table(rows, {"version": {n: registry.version_page(n) for n in numbers}})


def _promoted_if_passed(
    registry: Registry,
    number: str,
    against: "Callable[[ModelVersion | None, ModelVersion], GateDecision]",
) -> "GateDecision":
    """The decision against the champion, which takes effect, and is written down, only where both
    are as they were: comparing takes a while, and another run may have promoted its own, or
    somebody rolled back, or promoted this one by hand."""
    while True:
        champion, version = registry.aliased(CHAMPION), registry.version(number)
        decision = against(champion, version)
        with registry.lock():
            now = registry.aliased(CHAMPION)
            same = (now and now.version) == (champion and champion.version)
            if same and registry.version(number).tags == version.tags:
                if decision.passed:
                    registry.promote(number)
                itself = champion is not None and champion.version == version.version
                if not itself or GATE not in version.tags:  # with which it is not compared
                    registry.judge(number, decision.reasons)
                return decision


def _register(
    tracking: Tracking,
    registry: Registry,
    key: str,
    folder: Path,
    facts: dict[str, Any],
    evaluation: "Evaluation",
    dagster_run: str,
) -> Any:
    from lens_pipeline.evaluation.result import FUSED

    figures = flat_metrics(evaluation.metrics[FUSED])
    for origin, of in evaluation.origins.items():
        figures |= flat_metrics(of[FUSED], f"{origin}/")
    steps, dataset_version = facts["member_steps"], facts["dataset_version"]
    runs = {name: tracking.find_run(step) for name, step in steps.items()}
    member_runs = {name: run.info.run_id for name, run in runs.items() if run is not None}
    run_id = tracking.start_run(
        MODEL, key, {DATASET_VERSION: dataset_version, DAGSTER_RUN: dagster_run}
    )
    tracking.finish_run(
        run_id,
        {"fusion": facts["fusion"]["strategy"], "members": ",".join(steps)},
        metrics={f"test/{name}": value for name, value in figures.items()},
        artifacts=evaluation.shown,
    )
    tags = version_tags(registry.settings, key, dataset_version, dagster_run, member_runs, figures)
    return registry.register(folder, run_id, tags)


def _stages(context: dg.AssetExecutionContext) -> dict[str, dict[str, Any]]:
    """{asset key: seconds and whether it was reused} of this run's other assets."""
    records = context.instance.get_records_for_run(
        context.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION
    ).records
    stages: dict[str, dict[str, Any]] = {}
    for record in records:
        event = record.event_log_entry.asset_materialization
        if event is not None and "seconds" in event.metadata:
            # One of several surveys is a part of it.
            of = stages.setdefault(event.asset_key.to_user_string(), {"seconds": 0, "reused": True})
            of["seconds"] = round(of["seconds"] + event.metadata["seconds"].value, 3)
            of["reused"] &= event.metadata["reused"].value
    return stages
