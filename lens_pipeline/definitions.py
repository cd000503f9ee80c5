"""The one Dagster entry point."""

from typing import Any

import dagster as dg

from lens_pipeline.defs.automation import (
    data,
    evaluation_and_registration,
    follow_up,
    full_pipeline,
    schedules,
    training,
    with_follow_up,
)
from lens_pipeline.defs.catalogue import SIMULATE, cutout_catalogue
from lens_pipeline.defs.checkpoints import TRAIN, checkpoint_stages
from lens_pipeline.defs.cleaning import cleaning
from lens_pipeline.defs.dataset import BUILD, processed_dataset
from lens_pipeline.defs.ensemble import EVALUATE, ensemble_stage, evaluation_stage
from lens_pipeline.defs.registry import registry_stage
from lens_pipeline.defs.resources import LensHome
from lens_pipeline.defs.sensors import (
    failed_runs,
    failed_ticks,
    heartbeat,
    new_challenger,
    source_changed,
    warning_checks,
)
from lens_pipeline.defs.shards import cloud_shards, lens_shards, observed_shards
from lens_pipeline.defs.source import source_is_published
from lens_pipeline.defs.stages import freshness
from lens_pipeline.defs.tuning import tuning
from lens_pipeline.errors import InputError
from lens_pipeline.locations import protocol_of
from lens_pipeline.presets import chosen_members
from lens_pipeline.settings import Settings

# A step's process is forked from one that has loaded these: else each would for itself, which is
# most of what a small run takes.
PRELOADED = ("lens_pipeline.definitions", SIMULATE, BUILD, TRAIN, EVALUATE, "mlflow")
# Steps of one run at a time, each with the libraries in memory; 0: as many as there are cores.
AT_A_TIME = {"local": 2, "staging": 4, "production": 0}


def make_definitions(settings: Settings, retries: bool = True) -> dg.Definitions:
    """The asset graph with the members that the settings name.

    Where the source is published shards, they stand in the place of all stages that make them.
    retries: whether what fails by chance is tried again, as where nobody waits for it.
    """
    published = source_is_published(settings)
    if published and settings.survey:
        raise InputError(
            "LENS_SURVEY: shards that are published (LENS_SOURCE) are taken whole; unset it"
        )
    members = chosen_members(settings)
    remote = bool(protocol_of(settings.source if published else settings.cloud))
    stages = [
        *(() if published else (cutout_catalogue, processed_dataset, lens_shards, cloud_shards)),
        *checkpoint_stages(settings),
        ensemble_stage(members, remote),
        evaluation_stage(members, published),
        registry_stage(published),
    ]
    planned = schedules(settings)  # raises where there is no such time
    overdue = freshness(settings)
    made = [one.asset(retries, settings.surveys, overdue) for one in stages]
    return dg.Definitions(
        assets=[*([observed_shards(retries)] if published else []), *with_follow_up(made)],
        jobs=[full_pipeline, data, training, evaluation_and_registration, tuning, cleaning],
        schedules=planned,
        sensors=[
            *(source_changed, new_challenger, failed_runs, failed_ticks, warning_checks),
            *(heartbeat, follow_up),
        ],
        resources={"lens": LensHome()},
        executor=_executor(AT_A_TIME[settings.deployment]),
    )


def _executor(at_a_time: int) -> dg.ExecutorDefinition:
    """Each step in a process of its own; a run may be launched with another number at a time."""
    number = dg.Field(
        dg.Int,
        default_value=at_a_time,
        description="Steps of the run at a time; 0: as many as there are cores.",
    )

    def configuration(chosen: dict[str, Any]) -> dict[str, Any]:
        return {**chosen, "start_method": {"forkserver": {"preload_modules": [*PRELOADED]}}}

    return dg.multiprocess_executor.configured(
        configuration, name="multiprocess", config_schema={"max_concurrent": number}
    )


defs = make_definitions(Settings.load())
