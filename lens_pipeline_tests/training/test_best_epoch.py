"""Which epoch's weights a training ends with."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback

from lens_pipeline import LensDataModule
from lens_pipeline.catalogue.dataset import DatasetSplit
from lens_pipeline.errors import InputError
from lens_pipeline.shards.datamodule import CutoutModule
from lens_pipeline.training import train
from lens_pipeline.training.train import deciding_metric
from lens_pipeline_tests.training.small import best_epochs, small_config, train_on


def test_twenty_non_lenses_do_not_choose_by_one_false_positive_in_a_hundred(
    uneven_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config()
    assert config.training.monitor == "val/tpr_at_fpr_1e-2"
    with caplog.at_level("INFO", logger="lens_pipeline"):
        trained = train_on(config, uneven_shards, tmp_path)
    assert "20 non-lenses of the validation set cannot resolve" in caplog.text
    assert trained.curves["val/tpr_at_fpr_1e-2"].isna().all()
    epoch = torch.load(trained.checkpoint, weights_only=True)["epoch"]
    assert epoch == best_epochs(trained.curves, "val/auroc")[0]


class Many(CutoutModule):
    """So many black lenses and non-lenses in each split."""

    def __init__(self, n: int) -> None:
        super().__init__(16, 0, 0, None, None, None, 1.0)
        index = pd.DataFrame({"id": range(2 * n), "label": np.arange(2 * n) % 2})
        self.cutouts = DatasetSplit(index, np.zeros((2 * n, 1, 8, 8), np.float32))

    def split(self, name: str) -> DatasetSplit:
        return self.cutouts


@pytest.mark.parametrize(
    ("wanted", "n", "chosen"),
    [
        ("tpr_at_fpr_1e-4", 10_000, "tpr_at_fpr_1e-4"),
        ("tpr_at_fpr_1e-4", 9_999, "tpr_at_fpr_1e-2"),  # of which ten false positives are allowed
        ("tpr_at_fpr_1e-3", 200, "tpr_at_fpr_1e-2"),
        ("tpr_at_fpr_1e-3", 99, "auroc"),
        ("tpr10", 9, "auroc"),
        ("tpr10", 10, "tpr10"),
        ("loss", 9, "loss"),
    ],
)
def test_what_so_many_non_lenses_cannot_resolve_gives_way_to_what_they_can(
    wanted: str, n: int, chosen: str
) -> None:
    config = small_config(monitor=f"val/{wanted}")
    assert deciding_metric(config, Many(n)) == f"val/{chosen}"


@pytest.mark.parametrize("equal_losses", [True, False])
def test_of_epochs_that_are_equally_good_the_one_with_the_lowest_loss_is_best(
    equal_losses: bool, uneven_shards: Path, tmp_path: Path
) -> None:
    """Then the latest: it has learnt most. These rings are easy to tell from the first epoch on."""

    class Forget(Callback):
        def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
            for value in module.state_dict().values() if equal_losses else ():
                value.zero_()

    config = small_config(epochs=4, monitor="val/auroc")
    trained = train_on(config, uneven_shards, tmp_path, Forget())
    curves = trained.curves
    assert curves["val/auroc"].nunique() == 1
    assert curves["val/loss"].nunique() == (1 if equal_losses else 4)
    first, *others, _ = best_epochs(curves, "val/auroc")
    assert first != 0
    assert torch.load(trained.checkpoint, weights_only=True)["epoch"] == first
    kept = sorted(path.name for path in (tmp_path / "top").iterdir())
    assert kept == sorted(f"epoch_{epoch:03d}.ckpt" for epoch in others)


def test_a_validation_of_one_class_is_told_before_anything_is_trained(
    uneven_shards: Path, tmp_path: Path
) -> None:
    """As that of a folder's first batches is, whose lenses come first."""
    table = pd.read_csv(uneven_shards.parent / "catalogue.csv").sort_values("label", kind="stable")
    table["path"] = [str(uneven_shards.parent / path) for path in table["path"]]
    table.to_csv(tmp_path / "catalogue.csv", index=False)
    data = LensDataModule(tmp_path / "catalogue.csv", image_size=32, cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match="limit_val_batches 1, has cutouts of one class only"):
        train(small_config(limit_val_batches=1), data, tmp_path / "out")
    train(small_config(limit_val_batches=1, monitor="val/loss"), data, tmp_path / "other")


def test_a_metric_that_is_no_number_chooses_no_epoch(uneven_shards: Path, tmp_path: Path) -> None:
    class Spoil(Callback):
        def on_validation_batch_start(
            self, trainer: Trainer, module: LightningModule, batch: Any, number: int, _: int = 0
        ) -> None:
            batch["image"][0] = torch.nan

    with pytest.raises(InputError, match=r"epoch 0: val/auroc is nan, .* the validation split"):
        train_on(small_config(), uneven_shards, tmp_path, Spoil())
    assert not (tmp_path / "best.ckpt").exists()


def test_stops_early_when_nothing_is_gained(uneven_shards: Path, tmp_path: Path) -> None:
    config = small_config(epochs=50, patience=2, min_delta=1.0, monitor="val/auroc")
    assert len(train_on(config, uneven_shards, tmp_path).curves) == 3
