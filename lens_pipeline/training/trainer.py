"""Lightning's trainer, and what watches it, as a configuration has them."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, ProgressBar
from pytorch_lightning.plugins.environments import LightningEnvironment

from lens_pipeline.progress import shows_progress
from lens_pipeline.shards.datamodule import CutoutModule
from lens_pipeline.training.callbacks import (
    Curves,
    FiniteLoss,
    LossBar,
    LossLines,
    MovingAverage,
    Patience,
    PeakMemory,
    StepSeeds,
)
from lens_pipeline.training.config import TrainConfig, limited
from lens_pipeline.training.devices import device, on_gpu, resolved_precision

NO_NEWS = (  # of Lightning and torch, by patterns
    ".*does not have many workers.*",  # few are meant: batches are gathered from mapped memory
    ".*exists and is not empty.*",
    ".*LeafSpec.*",
    ".*recommended to use `self.log.*",  # each rank has computed them over all
    ".*smaller than the logging interval.*",
)


@contextmanager
def no_news() -> Iterator[None]:
    """Without the warnings that tell nobody anything."""
    with warnings.catch_warnings():
        for message in NO_NEWS:
            warnings.filterwarnings("ignore", message=message)
        yield


def chosen_callbacks(
    config: TrainConfig, monitor: str, mode: str, given: Sequence[Callback], curves: Curves
) -> list[Callback]:
    """Those of a training, and among them the ones that were given, but for its checkpoints."""
    how = config.training
    finite = FiniteLoss(None if how.fast_dev_run else monitor)
    chosen: list[Callback] = [StepSeeds(how.seed), finite, *given, curves]
    if how.ema:
        # It is asked for before the network is on its device.
        chosen.append(MovingAverage(how.ema, device(config)))
    if how.patience:
        chosen.append(Patience(monitor, how.min_delta, how.patience, mode=mode))
    if not how.fast_dev_run:
        chosen.append(LearningRateMonitor("step"))
    if on_gpu(config):
        chosen.append(PeakMemory())
    if not _has_bar(given):
        chosen.append(LossBar(finite) if shows_progress() else LossLines(finite))
    return chosen


def _has_bar(callbacks: Sequence[Callback]) -> bool:
    return any(isinstance(one, ProgressBar) for one in callbacks)


def make_trainer(
    config: TrainConfig,
    data: CutoutModule,
    out: Path,
    *,
    callbacks: list[Callback],
    plugins: Sequence[Any],
    **more: Any,
) -> pl.Trainer:
    """Lightning's, as the configuration has it; more: of its arguments."""
    how, hardware = config.training, config.hardware
    batches = int(data.taking_part("train").sum()) // (how.batch_size * hardware.devices)
    steps = limited(batches, how.limit_train_batches) // how.accumulate_grad_batches
    repeats = hardware.deterministic or not on_gpu(config)
    if hardware.devices == 1:  # though Slurm may have started others beside it
        plugins = [*plugins, LightningEnvironment()]
    trainer = pl.Trainer(
        max_epochs=how.epochs,
        # Lightning's `auto` takes others, too, which have no float64.
        accelerator="gpu" if on_gpu(config) else "cpu",
        devices=hardware.devices,
        strategy="ddp" if hardware.devices > 1 else hardware.strategy,
        precision=resolved_precision(config),
        callbacks=callbacks,
        plugins=[*plugins],
        # Where it looks for a checkpoint of a job that Slurm has stopped, unasked.
        default_root_dir=out,
        gradient_clip_val=how.gradient_clip or None,
        accumulate_grad_batches=how.accumulate_grad_batches,
        fast_dev_run=how.fast_dev_run,
        limit_train_batches=how.limit_train_batches,
        limit_val_batches=how.limit_val_batches,
        sync_batchnorm=hardware.devices > 1 and on_gpu(config),
        deterministic="warn" if repeats else False,
        # cuDNN's fastest convolutions for these sizes, which it finds by trying.
        benchmark=not repeats,
        # A step of a GPU takes milliseconds; a line in MLflow, some ten. Once an epoch at least.
        log_every_n_steps=max(1, min(200 if on_gpu(config) else 50, steps)),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        enable_progress_bar=_has_bar(callbacks),
        **more,
    )
    if hardware.devices > 1:
        _ask_no_others_at_each_step(trainer)
    return trainer


def _ask_no_others_at_each_step(trainer: pl.Trainer) -> None:
    """Before each batch Lightning asks the first process whether it has had SIGTERM, and waits for
    its GPU to say so: none could be given a step while it works on the last. All processes get the
    signal here, from torchrun, and each goes by its own."""
    signals = trainer._signal_connector

    def note(*_: Any) -> None:
        signals.received_sigterm = True

    signals._sigterm_notifier_fn = note  # type: ignore[method-assign, assignment]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
