"""Where the metrics of a training go, by name."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from lens_pipeline.errors import InputError
from lens_pipeline.files import write_aside
from lens_pipeline.training.config import TrainConfig

FOLDER = "logs"
PROJECT = "lens-pipeline"
WANDB_RUN = "wandb.id"


def file_loggers(config: TrainConfig, out: Path) -> list[Logger]:
    """The loggers that write into `out/logs`: CSV always, TensorBoard and Weights & Biases by
    choice (`WANDB_MODE=offline` needs no account). They are told the configuration.

    Raises InputError where a package is missing, or the account.
    """
    folder = out / FOLDER
    loggers: list[Logger] = [CSVLogger(folder, name="csv")]
    for name, make in (
        ("tensorboard", lambda: TensorBoardLogger(folder, name="tensorboard")),
        ("wandb", lambda: _wandb(folder, out.name)),
    ):
        if name in config.training.loggers:
            if find_spec(name) is None:
                raise InputError(
                    f"training.loggers: {name} needs its package; install lens-pipeline[{name}]"
                )
            folder.mkdir(parents=True, exist_ok=True)
            loggers.append(make())
    for logger in loggers:
        logger.log_hyperparams(config.model_dump())
    return loggers


def _wandb(folder: Path, name: str) -> WandbLogger:
    """Of one run for the training in a folder, however often it goes on."""
    from wandb.errors import UsageError

    kept = folder / WANDB_RUN
    if rank_zero_only.rank == 0 and not kept.exists():  # type: ignore[attr-defined]
        write_aside(kept, uuid4().hex[:8])
    run = kept.read_text() if kept.exists() else None
    logger = WandbLogger(name, folder, id=run, project=PROJECT, resume="allow")
    try:
        logger.experiment  # noqa: B018 -- begins its run
    except UsageError as problem:
        said = str(problem).splitlines()[0].rstrip(".")
        raise InputError(
            f"training.loggers: wandb: {said}; set WANDB_API_KEY, or WANDB_MODE=offline"
        ) from None
    return logger


def end(loggers: Sequence[Logger]) -> None:
    """Weights & Biases would go on with the same run in the next training of this process."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
