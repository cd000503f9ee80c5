"""What training leaves in a member's folder. Reading it needs no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.special import expit

from lens_pipeline.evaluation.metrics import lens_metrics
from lens_pipeline.training.config import TrainConfig

BEST = "best.ckpt"
LAST = "last.ckpt"
CURVES = "curves.csv"
SETTINGS = "settings.yaml"
SCORES = "val_scores.parquet"  # written last
FITTED = ".fitted"  # names the best checkpoint, from the end of the fit to that of all
TOP = "top"  # other checkpoints of good epochs
INPUTS = "inputs.json"  # hashes of cutouts and first weights: a training goes on with the same


@dataclass(frozen=True)
class TrainedMember:
    """A trained network on disk.

    best.ckpt and, where more are kept, top/*.ckpt (weights), last.ckpt (all that training goes on
    from): Lightning checkpoints, loadable with `weights_only`; settings.yaml: the resolved
    configuration; curves.csv: metrics by epoch; logs/: those of the loggers; val_scores.parquet:
    id, label, group, logit, logit_std.
    """

    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / BEST

    @property
    def curves(self) -> pd.DataFrame:
        """One row an epoch: `epoch` and the metrics."""
        return pd.read_csv(self.folder / CURVES)

    @property
    def val_scores(self) -> pd.DataFrame:
        """id, label, group, logit of the validation split, by the best checkpoint, and logit_std
        under dropout."""
        return pd.read_parquet(self.folder / SCORES)

    @property
    def val_metrics(self) -> dict[str, Any]:
        """What `lens_metrics` gives on the validation split."""
        return metrics_of(self.val_scores)

    @property
    def config(self) -> TrainConfig:
        return TrainConfig.read(self.folder / SETTINGS)


def metrics_of(scores: pd.DataFrame) -> dict[str, Any]:
    """What `lens_metrics` gives on the scores of a split, see `split_scores`."""
    return lens_metrics(scores["label"], expit(scores["logit"]), group=scores.get("group"))
