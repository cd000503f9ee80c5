"""Jobs over the asset graph, when schedules launch them, and what follows by itself."""

import importlib.metadata
from collections.abc import Iterable

import dagster as dg

from lens_pipeline.code_hashes import source_hashes
from lens_pipeline.defs.checkpoints import training_libraries
from lens_pipeline.defs.cleaning import cleaning
from lens_pipeline.defs.resources import LensHome
from lens_pipeline.defs.source import source_state
from lens_pipeline.defs.stages import (
    CATALOGUE,
    CLOUD,
    DATASET,
    ENSEMBLE,
    EVALUATION,
    REGISTERED,
    SHARDS,
)
from lens_pipeline.defs.surveys import every_survey
from lens_pipeline.errors import InputError
from lens_pipeline.files import digest
from lens_pipeline.presets import chosen_members, member_config
from lens_pipeline.settings import Settings

INPUTS = "lens/inputs"
UNKNOWN = "unknown"  # what a run has read whose source could not be read when it was launched
MAY_SUCCEED = [
    status
    for status in dg.DagsterRunStatus
    if status not in (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)
]
# Retrainings wait for each other: see `tag_concurrency_limits` in dagster.yaml.
TRAINS = {"lens/queue": "training"}

full_pipeline = dg.define_asset_job(
    "full_pipeline",
    # Of what is made elsewhere and only observed here, Dagster takes what is named.
    selection=dg.AssetSelection.all() | dg.AssetSelection.assets(CLOUD),
    tags=TRAINS,
    description="From the source to a registered ensemble.",
)
data = dg.define_asset_job(
    "data",
    selection=dg.AssetSelection.assets(CLOUD).upstream(),
    description="From the source to published shards; where others publish them, the newest are "
    "observed.",
)
training = dg.define_asset_job(
    "training",
    selection=dg.AssetSelection.groups("training"),
    tags=TRAINS,
    description="Every member, on the newest published shards.",
)
evaluation_and_registration = dg.define_asset_job(
    "evaluation_and_registration",
    selection=dg.AssetSelection.groups("ensemble"),
    description="From the newest checkpoints to a registered ensemble.",
)

# What each cheap stage follows. What an ensemble was trained on is none of it: new data wait for
# new checkpoints, and are compared with old ones by nobody.
FOLLOWS = {
    DATASET: [CATALOGUE],
    SHARDS: [DATASET],
    CLOUD: [SHARDS],
    EVALUATION: [ENSEMBLE],
    REGISTERED: [EVALUATION],
}


def with_follow_up(assets: Iterable[dg.AssetsDefinition]) -> list[dg.AssetsDefinition]:
    """The assets, the cheap ones with the condition under which they are made by themselves: anew
    when what they follow was, unless a part of it failed and is still the old one, or a blocking
    check has refused it: beyond its own run that blocks nothing.

    Trainings have none: they are launched by the schedule, or by hand.
    """

    def conditioned(spec: dg.AssetSpec) -> dg.AssetSpec:
        deps = {dep.asset_key for dep in spec.deps}
        follows = FOLLOWS.get(spec.key, [])
        if spec.key == ENSEMBLE:
            follows = [key for key in deps if key != CLOUD]
        if not deps.intersection(follows):
            return spec
        ignored = dg.AssetSelection.assets(*(deps - {*follows}))
        when = dg.AutomationCondition
        refused = when.any_checks_match(when.check_failed(), blocking_only=True)
        spoilt = when.any_deps_match(when.execution_failed() | refused)
        condition = (when.eager() & ~spoilt).ignore(ignored).with_label("follow_up")
        return spec.replace_attributes(automation_condition=condition)

    return [asset.map_asset_specs(conditioned) for asset in assets]


follow_up = dg.AutomationConditionSensorDefinition(
    "follow_up",
    target=dg.AssetSelection.all(),
    minimum_interval_seconds=30,
    description="Makes the cheap stages anew when what they follow was: shards after cutouts, an "
    "ensemble, its evaluation and its version in the registry after trainings.",
)


def retraining_inputs(settings: Settings) -> str:
    """A hash of all that a retraining depends on: the source, the settings, the code, and the
    libraries that networks learn with. A registered model that networks start from counts by its
    name: each retraining from the champion would else be a reason for the next."""
    code = source_hashes(["lens_pipeline.definitions"])
    members = chosen_members(settings)
    configs = [member_config(settings, member).deciding for member in members]
    libraries = {name: importlib.metadata.version(name) for name in training_libraries(members)}
    return digest([source_state(settings), settings.decisive, configs, code, libraries])


def last_retraining(instance: dg.DagsterInstance) -> dg.DagsterRun | None:
    """The newest of all retrainings by schedule that have succeeded or are under way. They end one
    after another, so that what is left when all have ended is what it has made."""
    runs = instance.get_runs(dg.RunsFilter(job_name=full_pipeline.name, statuses=MAY_SUCCEED))
    return next((run for run in runs if INPUTS in run.tags), None)


def schedules(settings: Settings) -> list[dg.ScheduleDefinition]:
    """Weekly retraining and nightly cleaning, by LENS_RETRAIN_CRON and LENS_TIME_ZONE; both are
    off until somebody switches them on."""

    try:

        @dg.schedule(
            name="weekly_retraining",
            job=full_pipeline,
            cron_schedule=settings.retrain_cron,
            execution_timezone=settings.time_zone,
            description="Launches full_pipeline where the source, the settings, the code or the "
            "libraries are not those of the last retraining that has succeeded or is under way, or "
            "the source cannot be read, which the run then tells.",
        )
        def weekly_retraining(
            context: dg.ScheduleEvaluationContext, lens: LensHome
        ) -> dg.RunRequest | dg.SkipReason:
            settings = lens.settings
            try:
                tags = {INPUTS: retraining_inputs(settings)}
            except InputError:
                # The run asks again, some time later, and people are told where it fails, too.
                return dg.RunRequest(tags={INPUTS: UNKNOWN} | every_survey(settings))
            last = last_retraining(context.instance)
            if last is not None and last.tags[INPUTS] == tags[INPUTS]:
                return dg.SkipReason(
                    f"run {last.run_id[:8]} has the same source, settings, code and libraries: "
                    "nothing would be new"
                )
            return dg.RunRequest(tags=tags | every_survey(settings))

        nightly_cleaning = dg.ScheduleDefinition(
            name="nightly_cleaning",
            job=cleaning,
            cron_schedule="0 2 * * *",
            execution_timezone=settings.time_zone,
            description="Launches cleaning, which removes what LENS_KEEP_DAYS says.",
        )
    except dg.DagsterInvalidDefinitionError as problem:
        raise InputError(f"LENS_RETRAIN_CRON, LENS_TIME_ZONE: {problem}") from None
    return [weekly_retraining, nightly_cleaning]
