"""The job `tuning`: a study of trainings on the newest published shards."""

from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from lens_pipeline import presets
from lens_pipeline.defs.checkpoints import POOL
from lens_pipeline.defs.resources import LensHome
from lens_pipeline.defs.shown import picture, table
from lens_pipeline.defs.source import source_is_published
from lens_pipeline.defs.stages import in_a_process
from lens_pipeline.errors import InputError
from lens_pipeline.files import digest, write_aside
from lens_pipeline.models.names import parse_members
from lens_pipeline.registered import with_local_weights
from lens_pipeline.settings import Settings
from lens_pipeline.training.config import in_a_line
from lens_pipeline.training.launch import FAILURE, tune_argv
from lens_pipeline.training.space import DEFAULT_SPACE, Pruner, SearchSpace

SHOWN = 20  # trials in the table


class Tuning(dg.Config):
    """What is tuned, and how long."""

    member: str | None = Field(
        default=None, description="As in LENS_ARCHS; by default the first of this home's."
    )
    changes: dict[str, Any] = Field(
        default={},
        description="What all trials share: sections and settings of a training configuration, "
        "where they are not the member's, as {training: {epochs: 5}}.",
    )
    space: dict[str, Any] = Field(
        default={name: dict(fields) for name, fields in DEFAULT_SPACE.items()},
        description="What the trials change: sections and settings, each with its choices, "
        "[32, 64], or its range, {low: 1e-5, high: 1e-2, log: true}.",
    )
    # The command refuses what is out of bounds, in words; see `dagster_config`.
    trials: int = Field(default=20, description="Trials of the study in all; at least 1.")
    workers: int = Field(default=1, description="Trials at a time; at least 1.")
    pruner: Pruner = Field(default="median", description="What stops a trial early.")


def newest_shards_url(settings: Settings) -> str:
    """Where the newest version lies: of the source where it is published shards, else of what this
    deployment publishes. Raises InputError where there is none."""
    from lens_pipeline.shards.versions import published_version

    place = settings.source if source_is_published(settings) else settings.cloud
    return published_version(place, settings.storage_options)


@dg.op(
    pool=POOL,
    out=dg.Out(str, description="The file with the best settings, as `train --config` takes it."),
)
def tune_member(context: dg.OpExecutionContext, config: Tuning, lens: LensHome) -> str:
    """Trainings of a member that differ in their settings, in a process of their own.

    The same study goes on where it was stopped; a larger number of trials adds to it.
    """
    settings = lens.settings
    named = parse_members(config.member) if config.member else presets.chosen_members(settings)[:1]
    if len(named) > 1:
        raise InputError(f"member: {config.member}: one member is tuned at a time")
    member = named[0]
    base = presets.member_config(settings, member).with_changes(config.changes, "changes")
    base = base.with_changes({"data": {"data_root": newest_shards_url(settings)}}, "tuning")
    base = with_local_weights(lens.registry, base)
    space = SearchSpace.parse(config.space, base, "space")
    what = digest([base.deciding, base.data.data_root, space.as_values(), config.pruner])
    out = settings.home / "tuning" / f"{member.name}-{what[:8]}"
    out.mkdir(parents=True, exist_ok=True)
    given = {"config": out / ".config.yaml", "space": out / ".space.yaml"}
    write_aside(given["config"], base.yaml)
    write_aside(given["space"], space.yaml)
    how = config.model_dump(include={"trials", "workers", "pruner"})
    command = tune_argv(given["config"], given["space"], out, settings.home, **how)
    in_a_process(context, command, out / FAILURE)
    return _shown(context, out, member.name)


def _shown(context: dg.OpExecutionContext, out: Path, member: str) -> str:
    """The path of the best settings; the picture and the table become the output's metadata."""
    from lens_pipeline.training.study import BEST_CONFIG, PICTURE, TunedStudy

    study = TunedStudy(out)
    if study.best is None:
        raise InputError(f"{out}: none of {len(study.trials)} trials has been completed")
    context.add_output_metadata(
        {
            "trials": picture(out / PICTURE),
            "table": table(study.ranked.head(SHOWN)),
            f"best {study.base.training.monitor}": float(study.best["value"]),
            "best settings": dg.MetadataValue.path(out / BEST_CONFIG),
            "for LENS_TRAINING": in_a_line({member: study.found}),
            "study": dg.MetadataValue.path(out),
        }
    )
    return str(out / BEST_CONFIG)


@dg.job(
    description="Search the training settings of a member that rank the validation split best.",
    executor_def=dg.in_process_executor,
)
def tuning() -> None:
    tune_member()
