"""Train one member on shards: from a configuration to a folder with its checkpoint."""

import logging
import shutil
import sys
import warnings
from collections.abc import Sequence
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
from lens_pipeline.models.system import LitLensSystem, load_system
from lens_pipeline.shards.datamodule import CutoutModule
from lens_pipeline.training.config import TrainConfig
from lens_pipeline.training.member import (
    BEST,
    CURVES,
    LAST,
    SCORES,
    SETTINGS,
    TrainedMember,
)

log = logging.getLogger(__name__)


def resolved_precision(config: TrainConfig) -> Any:
    """`auto`: bf16 where the GPU computes in it; a CPU without the instructions is far slower."""
    if config.hardware.precision != "auto":
        return config.hardware.precision
    on_gpu = config.hardware.accelerator != "cpu" and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported(False) else "32-true"


class _EpochLines(Callback):
    """A line an epoch, for logs; where there is a terminal the progress bar tells the rest."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        now = trainer.callback_metrics
        log.info(
            "  epoch %d/%d: loss %.3f, validation loss %.3f, AUROC %.3f",
            trainer.current_epoch + 1,
            trainer.max_epochs,
            *(now[name] for name in ("train/loss", "val/loss", "val/auroc")),
        )


def train(
    config: TrainConfig,
    data: CutoutModule,
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
        shift=config.training.shift,
        noise=config.training.noise,
    )
    best = ModelCheckpoint(
        dirpath=out,
        filename=Path(BEST).stem,
        monitor=config.training.monitor,
        mode="max",
        save_weights_only=True,
        enable_version_counter=False,
    )
    last = ModelCheckpoint(dirpath=out, filename=Path(LAST).stem, enable_version_counter=False)
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
            callbacks=[best, last, _EpochLines(), *callbacks],
            deterministic="warn",
            enable_model_summary=False,
            num_sanity_val_steps=0,
            enable_progress_bar=sys.stderr.isatty(),
            log_every_n_steps=1,
        )
        try:
            trainer.fit(system, data)
        except SystemExit:
            raise KeyboardInterrupt from None
    return _finish(config, data, out)


def _finish(config: TrainConfig, data: CutoutModule, out: Path) -> TrainedMember:
    """Curves, validation scores and settings, beside the checkpoints."""
    steps = pd.read_csv(out / "csv" / "metrics.csv")
    curves = steps.drop(columns="step").groupby("epoch").first().reset_index()
    curves.to_csv(out / CURVES, index=False)
    shutil.rmtree(out / "csv")
    split = data.split("val")
    system = load_system(out / BEST)
    logits = [
        member_logits(system, split.gather(np.arange(start, min(start + 256, len(split)))))[0]
        for start in range(0, len(split), 256)
    ]
    scores = pd.DataFrame({"id": split.ids, "label": split.labels, "logit": np.concatenate(logits)})
    scores.to_parquet(out / SCORES, index=False)
    # Where this was trained is no part of what was: the same training leaves the same bytes.
    checkpoint = torch.load(out / LAST, weights_only=True)
    torch.save(checkpoint | {"callbacks": {}}, out / LAST)
    (out / SETTINGS).write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
    return TrainedMember(out)
