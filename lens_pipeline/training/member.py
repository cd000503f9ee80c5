"""What training leaves in a member's folder. Reading it needs no torch."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from lens_pipeline.training.config import TrainConfig

BEST = "best.ckpt"
LAST = "last.ckpt"
CURVES = "curves.csv"
SETTINGS = "settings.yaml"
SCORES = "val_scores.parquet"


@dataclass(frozen=True)
class TrainedMember:
    """A trained network on disk.

    best.ckpt (weights), last.ckpt (all that training goes on from): Lightning checkpoints, loadable
    with `weights_only`; settings.yaml: the resolved configuration; curves.csv: metrics by epoch;
    val_scores.parquet: id, label, logit.
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
        """id, label and logit of the validation split, by the best checkpoint."""
        return pd.read_parquet(self.folder / SCORES)

    @property
    def config(self) -> TrainConfig:
        return TrainConfig(**yaml.safe_load((self.folder / SETTINGS).read_text()))
