"""A training in a process of its own, killed at a step."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.forkserver import _forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pandas as pd
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback

from lens_pipeline import LensDataModule
from lens_pipeline.training import train
from lens_pipeline.training.config import TrainConfig
from lens_pipeline_tests.training.small import small_config

# Installed: the server looks neither into the working directory, where PYTHONSAFEPATH is set, nor
# where this process does.
PRELOADED = "lens_pipeline.training.train"
# With something to go on from early on.
saving_config = partial(small_config, epochs=3, save_every_n_steps=3)


class KillAt(Callback):
    """kill -9 when a batch of all has been trained on, before a checkpoint is written; or in the
    validation after it; or when `last.ckpt` is to be written, behind the best one; or when all is
    fitted, and nothing is finished."""

    def __init__(self, batch: int, when: str = "batch") -> None:
        self.batch, self.when = batch, when

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: object, batch: object, n: int
    ) -> None:
        self._now("batch", trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: object) -> None:
        self._now("validation", trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._now("last", trainer)  # is not called for what holds weights alone, as the best does

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._now("end", trainer)

    def _now(self, when: str, trainer: Trainer) -> None:
        if when == self.when and trainer.fit_loop.total_batch_idx >= self.batch:
            time.sleep(1)  # by then what is being written is
            os.kill(os.getpid(), signal.SIGKILL)


def run(
    config: TrainConfig, shards: Path, out: Path, kill_at: int | None, when: str = "batch"
) -> None:
    data = LensDataModule(shards, num_workers=config.data.num_workers)
    if when == "finish":  # all is there but the scores
        pd.DataFrame.to_parquet = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign,assignment]
    train(config, data, out, callbacks=[KillAt(kill_at, when)] if kill_at is not None else [])


def in_a_process(
    config: TrainConfig,
    shards: Path,
    out: Path,
    kill_at: int | None = None,
    when: str = "batch",
) -> int:
    """The exit code."""
    return forked(run, config, shards, out, kill_at, when)


def forked(target: Callable[..., None], *arguments: Any) -> int:
    """The exit code of a process that runs a function."""
    return exit_code(begun(target, *arguments))


def begun(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process that runs a function."""
    # Forked from a server that has imported torch and never used it: its threads are unborn.
    context = multiprocessing.get_context("forkserver")
    if PRELOADED not in _forkserver._preload_modules:  # Dagster's may run, without torch
        _forkserver._stop()
        context.set_forkserver_preload([PRELOADED])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def exit_code(process: BaseProcess) -> int:
    process.join()
    assert process.exitcode is not None
    return process.exitcode
