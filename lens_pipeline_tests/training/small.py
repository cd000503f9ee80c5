"""Trainings of seconds."""

from pathlib import Path
from typing import Any

import pandas as pd
from pytorch_lightning.callbacks import Callback

from lens_pipeline import LensDataModule
from lens_pipeline.training import TrainedMember, train
from lens_pipeline.training.config import TrainConfig


def small_config(arch: str = "lastro", **training: Any) -> TrainConfig:
    values = {"epochs": 2, "batch_size": 16} | training
    return TrainConfig.parse({"model": {"arch": arch}, "training": values}, "test")


def train_on(
    config: TrainConfig, shards: Path, out: Path, *callbacks: Callback, **how: Any
) -> TrainedMember:
    return train(config, LensDataModule(shards), out, callbacks=callbacks, **how)


def best_epochs(curves: pd.DataFrame, monitor: str) -> list[int]:
    """From the best to the worst: of equal ones that with the lower loss, then the later."""
    by = [monitor, "val/loss", "epoch"]
    return curves.sort_values(by, ascending=[False, True, False])["epoch"].tolist()
