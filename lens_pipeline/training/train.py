"""Train one member on shards: from a configuration to a folder with its checkpoint."""

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger

from lens_pipeline.ensemble.uncertainty import member_logits
from lens_pipeline.evaluation.plots import learning_curves_figure, png_bytes
from lens_pipeline.models.system import LitLensSystem, load_system
from lens_pipeline.shards.datamodule import LensDataModule
from lens_pipeline.training.config import TrainConfig

BEST = "best.ckpt"
CURVES = "curves.csv"
SETTINGS = "settings.yaml"
SCORES = "val_scores.parquet"


@dataclass(frozen=True)
class TrainedMember:
    """What `train` leaves in its folder.

    best.ckpt, last.ckpt: Lightning checkpoints, loadable with `weights_only`; settings.yaml: the
    resolved configuration; curves.csv: metrics by epoch; val_scores.parquet: id, label, logit.
    """

    folder: Path

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


def resolved_precision(config: TrainConfig) -> Any:
    """`auto`: bf16 where the GPU computes in it; a CPU without the instructions is far slower."""
    if config.hardware.precision != "auto":
        return config.hardware.precision
    on_gpu = config.hardware.accelerator != "cpu" and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported(False) else "32-true"


def train(
    config: TrainConfig,
    data: LensDataModule,
    out: Path,
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[Callback] = (),
) -> TrainedMember:
    """Train one network and leave its files in `out`, an empty folder.

    The same configuration and data give the same weights, bit for bit, on a CPU. Lightning ends the
    process on Ctrl-C; here it stays a KeyboardInterrupt.
    """
    pl.seed_everything(config.training.seed, workers=True, verbose=False)
    counts = data.class_counts("train")
    system = LitLensSystem(
        arch=config.model.arch,
        lr=config.training.learning_rate,
        weight_decay=config.training.weight_decay,
        dropout_rate=config.model.dropout_rate,
        bands=len(data.bands),
        image_size=data.image_size,
        units=data.units,
        pos_weight=counts[0] / counts[1] if config.training.balance else 1.0,
        warmup=config.training.warmup,
    )
    checkpoint = ModelCheckpoint(
        dirpath=out,
        filename=Path(BEST).stem,
        monitor=config.training.monitor,
        mode="max",
        save_last=True,
        enable_version_counter=False,
        auto_insert_metric_name=False,
    )
    with warnings.catch_warnings():
        # Few workers are meant: batches are gathered from mapped memory.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        trainer = pl.Trainer(
            max_epochs=config.training.epochs,
            accelerator=config.hardware.accelerator,
            devices=config.hardware.devices,
            precision=resolved_precision(config),
            logger=[CSVLogger(out, name="", version="csv"), *loggers],
            callbacks=[checkpoint, *callbacks],
            deterministic="warn",
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1_000_000_000,
        )
        try:
            trainer.fit(system, data)
        except SystemExit:
            raise KeyboardInterrupt from None
    return _finish(config, data, out)


def _finish(config: TrainConfig, data: LensDataModule, out: Path) -> TrainedMember:
    """Curves, validation scores and settings, beside the checkpoints."""
    steps = pd.read_csv(out / "csv" / "metrics.csv")
    curves = steps.drop(columns="step").groupby("epoch").first().reset_index()
    curves.to_csv(out / CURVES, index=False)
    shutil.rmtree(out / "csv")
    (out / "curves.png").write_bytes(png_bytes(learning_curves_figure(curves)))
    split = data.shards.split("val")
    system = load_system(out / BEST)
    logits = [
        member_logits(system, split.gather(np.arange(start, min(start + 256, len(split)))))[0]
        for start in range(0, len(split), 256)
    ]
    scores = pd.DataFrame({"id": split.ids, "label": split.labels, "logit": np.concatenate(logits)})
    scores.to_parquet(out / SCORES, index=False)
    (out / SETTINGS).write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
    return TrainedMember(out)
