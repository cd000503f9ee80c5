"""What tuning leaves in a folder. Reading it needs no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lens_pipeline.settings_files import read_yaml
from lens_pipeline.training.config import TrainConfig
from lens_pipeline.training.member import TrainedMember
from lens_pipeline.training.space import OF_THE_LOSS

DATABASE = "study.db"
CONFIG = "config.yaml"  # what the trials change
SPACE = "space.yaml"
PRUNER = "pruner.txt"
TRIALS = "trials"
TABLE = "trials.csv"
PICTURE = "trials.png"
BEST_CONFIG = "best.yaml"
LOSS = "validation_loss"  # in the epoch of a trial's value


@dataclass(frozen=True)
class TunedStudy:
    """A study on disk.

    study.db: Optuna's storage (SQLite); config.yaml, space.yaml, pruner.txt: what it is;
    trials/<number>: the training of each, weights of the best alone; trials.csv: one row a trial;
    trials.png: its picture; best.yaml: the settings of the best, as `train` takes them.
    """

    folder: Path

    @property
    def trials(self) -> pd.DataFrame:
        """number, state (complete, pruned, failed, running), value, validation_loss (in the
        epoch of the value), epochs, seconds, the settings by name, reason."""
        return pd.read_csv(self.folder / TABLE)

    @property
    def base(self) -> TrainConfig:
        """What the trials change; its monitor is what they are judged by."""
        return TrainConfig.read(self.folder / CONFIG)

    @property
    def ranked(self) -> pd.DataFrame:
        """The trials, the completed ones first, the best of them at the top; of equal values, that
        with the lower loss, or the earlier, where the trials may have losses of several kinds."""
        return ranked(self.trials, self.base.training.monitor == "val/loss")

    @property
    def best(self) -> "pd.Series[Any] | None":
        """The best trial's row; None where none has been completed."""
        first = self.ranked.iloc[0]
        return first if first["state"] == "complete" else None

    @property
    def found(self) -> dict[str, dict[str, Any]]:
        """The best trial's values of what the trials change, {section: {field: value}}, as
        LENS_TRAINING takes them: without the architecture, which LENS_ARCHS names. Nothing where
        no trial has been completed."""
        best = self.best
        if best is None:
            return {}
        values = self.trained(int(best["number"])).config.model_dump(mode="json")
        found = {
            section: {name: values[section][name] for name in fields if name != "arch"}
            for section, fields in read_yaml(self.folder / SPACE).items()
        }
        return {section: fields for section, fields in found.items() if fields}

    def trained(self, number: int) -> TrainedMember:
        """The training of a trial."""
        return TrainedMember(self.folder / TRIALS / f"{number:04d}")


def ranked(trials: pd.DataFrame, lowest: bool) -> pd.DataFrame:
    """See `TunedStudy.ranked`. lowest: whether a lower value is the better one."""
    by = {"value": lowest}
    # Whatever those so far have drawn: with another trial the best must not become one whose
    # weights are gone.
    if not trials.columns.isin(OF_THE_LOSS).any():
        by[LOSS] = True
    found = trials.sort_values([*by], ascending=[*by.values()], kind="stable")
    return found.sort_values("state", key=lambda s: s != "complete", kind="stable")
