"""What watches a training: its seeds, its losses, its curves, and how checkpoints are written."""

import errno
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Callback, Checkpoint
from torch import Tensor
from torch.utils.serialization import config as serialization

from lens_pipeline.errors import InputError, NoRoomError

NAMED = 5  # cutouts in a message
MINUTE = 60.0  # seconds
SHARE = 0.03  # of the time, for checkpoints after epochs
SELDOM = 10  # batches

log = logging.getLogger(__name__)


class StepSeeds(Callback):
    """Dropout and augmentation of a step follow from (seed, step, rank) alone.

    So a training that goes on after a kill draws what an undisturbed one would.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.fit_loop.total_batch_idx
        seed = ((self.seed << 32) + (step << 10) + trainer.global_rank) % 2**64
        # torch.manual_seed would keep a note for each device that has not been used yet, at every
        # step.
        torch.default_generator.manual_seed(seed)
        if pl_module.device.type == "cuda":
            torch.cuda.manual_seed(seed)


class FiniteLoss(Callback):
    """Ends a training whose loss or weights are no numbers, before a checkpoint can hold them, and
    before its validation.

    The loss of a step leaves a GPU behind it, and is read when the next step has been given to the
    GPU, which so never waits for the reader.
    """

    def __init__(self) -> None:
        self.waiting: tuple[Tensor, torch.cuda.Event | None, Any, int] | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, n: int
    ) -> None:
        self._look(trainer)
        loss = outputs["loss"].detach()
        arrived = None
        if loss.is_cuda:
            loss = loss.to("cpu", non_blocking=True)
            arrived = torch.cuda.current_stream().record_event()
        self.waiting = loss, arrived, batch.get("index"), n

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer)
        self._look_at_weights(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._look(trainer)
        self._look_at_weights(trainer, pl_module)

    def _look_at_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        finite = torch.stack([p.detach().isfinite().all() for p in pl_module.parameters()])
        if not finite.all():
            raise InputError(
                f"epoch {trainer.current_epoch}: the weights are no numbers any more; the last "
                "good checkpoint is kept; lower training.learning_rate, or set "
                "training.gradient_clip"
            )

    def _look(self, trainer: pl.Trainer) -> None:
        if self.waiting is None:
            return
        (loss, arrived, index, number), self.waiting = self.waiting, None
        if arrived is not None:
            arrived.synchronize()
        if not bool(loss.isfinite()):
            raise InputError(
                f"epoch {trainer.current_epoch}, batch {number}: the loss is {float(loss)}; the "
                f"last good checkpoint is kept; look at {_cutouts(trainer, index)}, or lower "
                "training.learning_rate"
            )


def _cutouts(trainer: pl.Trainer, index: Tensor | None) -> str:
    if index is None:
        return "its cutouts"
    ids = trainer.datamodule.split("train").ids[index.cpu().numpy()]  # type: ignore[attr-defined]
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    return f"the cutouts {', '.join(map(str, ids[:NAMED]))}{more}"


class Curves(Checkpoint):
    """`rows`: the metrics of each epoch, kept with every checkpoint; a line of them in the log.

    It is a checkpoint callback because those alone are called when the system has told its metrics.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        now = trainer.callback_metrics
        row = {
            name: float(now[name]) for name in sorted(now) if name.startswith(("train/", "val/"))
        }
        self.rows.append({"epoch": trainer.current_epoch, **row})
        log.info(
            "  epoch %d/%d: loss %.3f%s",
            trainer.current_epoch + 1,
            trainer.max_epochs,
            row["train/loss"],
            ", validation loss {val/loss:.3f}, AUROC {val/auroc:.3f}".format(**row)
            if "val/auroc" in row
            else "",
        )

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]


class LastCheckpoint(Checkpoint):
    """Writes `path`, from which a training goes on: every so many steps, or else every minute; when
    the training ends; and after an epoch beside which the time of writing is small.

    Not at an epoch's last batch, whose validation would never be made up for; nor between the
    batches of one step, whose gradients no checkpoint holds.
    """

    def __init__(self, path: Path, every_n_steps: int) -> None:
        self.path, self.every_n_steps = path, every_n_steps
        self.written, self.took = time.monotonic(), 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *about: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        if loop.batch_progress.is_last_batch or loop._should_accumulate():
            return
        if self.every_n_steps:
            due = trainer.global_step % self.every_n_steps == 0
        else:
            # Several processes have to agree, for which their GPUs would be waited for.
            asked = trainer.world_size == 1 or loop.batch_idx % SELDOM == 0
            due = asked and self._long_ago(trainer, MINUTE)
        if due:
            self._write(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        ends = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        if ends or self._long_ago(trainer, self.took / SHARE):
            self._write(trainer)

    def _long_ago(self, trainer: pl.Trainer, seconds: float) -> bool:
        """As the first process sees it."""
        return trainer.strategy.broadcast(time.monotonic() - self.written >= seconds)

    def _write(self, trainer: pl.Trainer) -> None:
        begun = time.monotonic()
        trainer.save_checkpoint(self.path, weights_only=False)
        self.written = time.monotonic()
        self.took = self.written - begun


class RenamedCheckpoints(TorchCheckpointIO):
    """Checkpoints written aside and renamed: a reader sees the old one or the new one."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        # Most of the time of writing; those that are kept are written once more, with it.
        with serialization.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
            save_aside(checkpoint, Path(path))


def save_aside(checkpoint: dict[str, Any], path: Path) -> None:
    """Raises NoRoomError where the disk is full; what was there stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NoRoomError(
            f"{path}: no room for a checkpoint; the last one that was written is kept; make room, "
            "and the same command goes on from it"
        ) from None
    finally:
        aside.unlink(missing_ok=True)
