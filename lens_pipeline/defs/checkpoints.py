"""One asset per member, `checkpoints/<member>`, made by a factory."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import BaseModel, Field, create_model

from lens_pipeline import presets
from lens_pipeline.defs.resources import LensHome
from lens_pipeline.defs.shown import drawn, link, picture, table
from lens_pipeline.defs.stages import (
    CLOUD,
    Made,
    Stage,
    checkpoint_key,
    in_a_process,
    made,
    result,
    run_stage,
    stage,
)
from lens_pipeline.files import write_aside
from lens_pipeline.models.names import Member, network_libraries
from lens_pipeline.registered import with_local_weights
from lens_pipeline.settings import Settings
from lens_pipeline.steps import Recipe, Step
from lens_pipeline.tracking import DAGSTER_RUN, DATASET_VERSION, Tracking
from lens_pipeline.training.config import Limit, TrainConfig
from lens_pipeline.training.launch import FAILURE, train_argv

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

    from lens_pipeline.training.member import TrainedMember

TRAIN = "lens_pipeline.training.train"
PLOTS = "lens_pipeline.evaluation.plots"
POOL = "gpu"
EPOCHS_SHOWN = 100


def dagster_config(defaults: BaseModel, without: Iterable[str] = ()) -> type[dg.Config]:
    """The Dagster config of a pydantic model: its fields with their help and these defaults.

    Without their bounds: what Dagster makes of a config before a step begins is tried again like
    all that fails by chance. The model itself refuses what is out of them, and takes for numbers
    what YAML takes for text, as `1e-3`, which Dagster's own Float does not let through.
    """
    fields: dict[str, Any] = {}
    for name, info in type(defaults).model_fields.items():
        value = getattr(defaults, name)
        if name in without:
            continue
        if isinstance(value, BaseModel):
            section = dagster_config(value, presets.DECIDED.get(name, ()))
            fields[name] = (section, section())
        else:
            kind = Any if info.annotation in (float, Limit) else info.annotation
            fields[name] = (kind, Field(default=value, description=info.description))
    return create_model(type(defaults).__name__, __base__=(dg.Config,), **fields)


def checkpoint_stage(member: Member, defaults: TrainConfig) -> Stage:
    """The asset of one member; `defaults` is what it is trained with unless its run config says
    otherwise."""
    key = checkpoint_key(member.name)

    @stage(
        key,
        modules=(TRAIN,),
        by_chance=True,  # a training that was killed goes on where it was
        deps=[CLOUD],
        group_name="training",
        kinds={"pytorch"},
        pool=POOL,
        description=f"The network {member.name}, a {member.architecture} that has learnt from the "
        "training split to tell lenses from what looks like them: its best and its last epoch, its "
        "settings, curves by epoch, and its scores of the validation split.",
        check_specs=[
            dg.AssetCheckSpec(
                "better_than_chance",
                asset=key,
                description="The lower 95 % bound of AUROC on the validation split is above 0.5.",
            )
        ],
    )
    def checkpoint(
        context: dg.AssetExecutionContext,
        config: dagster_config(defaults),  # type: ignore[valid-type]
        lens: LensHome,
    ) -> dg.MaterializeResult:
        from lens_pipeline.evaluation.standing import CHANCE

        settings = lens.settings
        upstream = made(context, CLOUD)
        trained_with = defaults.with_changes(config.model_dump(), key.to_user_string())
        trained_with = with_local_weights(lens.registry, trained_with)
        recipe = Recipe(
            stage=f"checkpoints/{member.name}",
            modules=(TRAIN,),
            libraries=training_libraries([member]),
            inputs={"shards": upstream.content},
            settings=trained_with.deciding,
        )

        def build(out: Path) -> None:
            _train(context, settings, upstream, member, trained_with, recipe, out)

        root = settings.home / "checkpoints" / member.name
        step = run_stage(key, recipe, root, build, settings, goes_on=True)
        trained = _trained(step)
        curves = drawn("curves.png", step, lambda: draw_curves(trained), PLOTS, settings)
        run_id = _record(lens.tracking, member, step, trained, curves, upstream, context.run_id)
        auroc = trained.val_metrics["auroc"]
        epochs = trained.curves.tail(EPOCHS_SHOWN)
        last = epochs.iloc[-1].dropna()
        return result(
            step,
            {
                "learning curves": picture(curves),
                # The first one is 1, as in the log and in the picture.
                "epochs": table(epochs.assign(epoch=epochs["epoch"] + 1)),
                "validation AUROC": auroc["value"],
                **{f"last {name}": float(v) for name, v in last.items() if "/" in str(name)},
                "MLflow run": link(lens.tracking.run_page(run_id), run_id),
            },
            checks=(
                dg.AssetCheckResult(
                    check_name="better_than_chance",
                    passed=auroc["low"] > CHANCE,
                    severity=dg.AssetCheckSeverity.WARN,
                    metadata={
                        "AUROC": auroc["value"],
                        "lower 95 % bound": auroc["low"],
                        "must exceed": CHANCE,
                    },
                ),
            ),
        )

    return checkpoint


def member_libraries(members: Iterable[Member]) -> tuple[str, ...]:
    """The distributions that build these members' networks."""
    return ("torch", "torchvision", *network_libraries(member.architecture for member in members))


def training_libraries(members: Iterable[Member]) -> tuple[str, ...]:
    """The distributions that decide what these members learn."""
    return (*member_libraries(members), "pytorch-lightning", "torchmetrics", "numpy")


def _trained(step: Step) -> "TrainedMember":
    from lens_pipeline.training.member import TrainedMember

    return TrainedMember(step.folder)


def draw_curves(trained: "TrainedMember") -> bytes:
    from lens_pipeline.evaluation.plots import learning_curves_figure, png_bytes

    return png_bytes(learning_curves_figure(trained.curves))


def _train(
    context: dg.AssetExecutionContext,
    settings: Settings,
    upstream: Made,
    member: Member,
    config: TrainConfig,
    recipe: Recipe,
    out: Path,
) -> None:
    from lens_pipeline.training.member import LAST

    config = config.with_changes({"data": {"data_root": upstream.location}}, "training")
    tracking = Tracking(settings)
    tags = _tags(upstream, member, context.run_id)
    run_id = tracking.start_run(member.name, recipe.key, tags, goes_on=(out / LAST).exists())
    with tracking.recorded(run_id, config.known_before) as logger:  # for who looks on
        if config.hardware.devices > 1:
            _train_in_processes(context, settings, config, out, run_id)
        else:
            _train_here(settings, config, out, logger)


def _train_here(settings: Settings, config: TrainConfig, out: Path, logger: "Logger") -> None:
    from lens_pipeline.training.data import data_module
    from lens_pipeline.training.devices import gpus_claimed
    from lens_pipeline.training.train import train

    data = data_module(config, settings)
    with gpus_claimed(config.hardware):
        train(config, data, out, loggers=[logger])


def _train_in_processes(
    context: dg.AssetExecutionContext,
    settings: Settings,
    config: TrainConfig,
    out: Path,
    run_id: str,
) -> None:
    """One process a device, started by one that is not Dagster's: Lightning runs `__main__` again
    in each. Its first tells the log of this step."""
    changes = {"training": {"loggers": ("csv", "mlflow")}}
    settings_file = out / "config.yaml"
    write_aside(settings_file, config.with_changes(changes, "training").yaml)
    command = train_argv(settings_file, out, settings.home)
    in_a_process(context, command, out / FAILURE, {"MLFLOW_RUN_ID": run_id})
    settings_file.unlink(missing_ok=True)


def _tags(upstream: Made, member: Member, dagster_run: str) -> dict[str, str]:
    return {
        DATASET_VERSION: upstream.content,
        DAGSTER_RUN: dagster_run,
        "lens.member": member.name,
    }


def _record(
    tracking: Tracking,
    member: Member,
    step: Step,
    trained: "TrainedMember",
    picture: Path,
    upstream: Made,
    dagster_run: str,
) -> str:
    """The finished MLflow run of a checkpoint: that of its training, or one made from its files."""
    from lens_pipeline.training.member import SETTINGS

    run = tracking.find_run(step.key)
    tags = _tags(upstream, member, dagster_run)
    run_id = run.info.run_id if run else tracking.start_run(member.name, step.key, tags)
    tracking.finish_run(
        run_id,
        trained.config.model_dump(),
        curves=trained.curves,
        artifacts=(picture, trained.folder / SETTINGS),
    )
    return run_id


def checkpoint_stages(settings: Settings) -> list[Stage]:
    """The assets of the members that the settings name."""
    return [
        checkpoint_stage(member, presets.member_config(settings, member))
        for member in presets.chosen_members(settings)
    ]
