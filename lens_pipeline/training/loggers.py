"""Where the metrics of a training go, by name."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from lens_pipeline.errors import InputError
from lens_pipeline.training.config import TrainConfig

FOLDER = "logs"
PROJECT = "lens-pipeline"


def file_loggers(config: TrainConfig, out: Path) -> list[Logger]:
    """The loggers that write into `out/logs`: CSV always, TensorBoard and Weights & Biases by
    choice (`WANDB_MODE=offline` needs no account).

    Raises InputError where a package is missing, or the account.
    """
    folder = out / FOLDER
    loggers: list[Logger] = [CSVLogger(folder, name="csv")]
    for name, make in (
        ("tensorboard", lambda: TensorBoardLogger(folder, name="tensorboard")),
        ("wandb", lambda: _wandb(folder)),
    ):
        if name in config.training.loggers:
            if find_spec(name) is None:
                raise InputError(
                    f"training.loggers: {name} needs its package; install lens-pipeline[{name}]"
                )
            folder.mkdir(parents=True, exist_ok=True)
            loggers.append(make())
    return loggers


def _wandb(folder: Path) -> WandbLogger:
    from wandb.errors import UsageError

    logger = WandbLogger(project=PROJECT, save_dir=folder)
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
