"""What watches a training: its seeds, its losses, its memory, its curves, and when it ends."""

import logging
import math
import sys
import time
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    Callback,
    Checkpoint,
    EarlyStopping,
    TQDMProgressBar,
    WeightAveraging,
)
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from lens_pipeline.errors import InputError, first_of
from lens_pipeline.progress import progress_bar

REDRAWN = 0.2  # seconds after which a bar is drawn anew

log = logging.getLogger(__name__)


class StepSeeds(Callback):
    """Dropout and augmentation of a batch follow from (seed, batch, rank) alone.

    So a training that goes on after a kill draws what an undisturbed one would.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        drawn = [self.seed, trainer.fit_loop.total_batch_idx, trainer.global_rank]
        # 32 bits, spread over all three: a CPU's generator takes no more.
        seed = int(np.random.SeedSequence(drawn).generate_state(1)[0])
        # torch.manual_seed would keep a note for each device that has not been used yet, at every
        # step.
        torch.default_generator.manual_seed(seed)
        if pl_module.device.type == "cuda":
            torch.cuda.manual_seed(seed)


class MovingAverage(WeightAveraging):
    """An exponential moving average of weights and buffers, which is validated and kept in their
    place.

    After step t = 0, 1, ... average <- d average + (1 - d) weights, d = min(decay, (1 + t) /
    (10 + t)) as in TensorFlow's `ExponentialMovingAverage`: with `decay` from the first step on, an
    average over 1 / (1 - decay) steps would hold the untrained weights for as long.
    """

    def __init__(self, decay: float, device: str) -> None:
        super().__init__(device)
        self.decay = decay

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._average_model is not None
        kept = self._average_model.module
        averages = [*kept.parameters(), *kept.buffers()]
        pairs = [*zip(averages, [*pl_module.parameters(), *pl_module.buffers()], strict=True)]
        self.averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self.counts = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, n: int
    ) -> None:
        t = trainer.global_step - 1
        if t < self._latest_update_step:
            return  # between the batches of one step
        # Lightning's own asks a tensor of the device how many steps there were, and waits for it.
        decay = min(self.decay, (1 + t) / (10 + t))
        averages, weights = zip(*self.averaged, strict=True)
        torch._foreach_lerp_(averages, weights, 1 - decay)
        if self.counts:
            kept, now = zip(*self.counts, strict=True)
            torch._foreach_copy_(kept, now)
        self._latest_update_step = trainer.global_step

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        average = self._average_model
        if average is None or "averaging_state" not in checkpoint:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
            return
        # As the system loads them itself, for all its networks; Lightning's own does not.
        average.module.load_state_dict(checkpoint["state_dict"])
        average.n_averaged.copy_(checkpoint["averaging_state"]["n_averaged"])
        pl_module.load_state_dict(checkpoint["current_model_state"])


class FiniteLoss(Callback):
    """Ends a training whose loss or weights are no numbers, before a checkpoint can hold them, and
    before its validation; or whose `monitor` is none, by which no epoch could be chosen.

    The loss of a step leaves a GPU behind it, and is read when the next step has been given to the
    GPU, which so never waits for the reader. So it is at hand for people: `last`, and in the
    trainer's loggers, as often as it logs, as `train/loss_step`.
    """

    last: float | None = None

    def __init__(self, monitor: str | None) -> None:
        self.monitor = monitor
        self.waiting: tuple[Tensor, torch.cuda.Event | None, dict[str, Tensor], int] | None = None
        self._steps = self._step_ended = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps = trainer.global_step  # of a training that goes on

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, n: int
    ) -> None:
        self._look(trainer)
        # A step of the user's own may tell no other than what is followed.
        loss = outputs.get("mean_loss", outputs["loss"]).detach()
        arrived = None
        if loss.is_cuda:
            loss = loss.to("cpu", non_blocking=True)
            arrived = torch.cuda.current_stream().record_event()
        self.waiting = loss, arrived, batch, n
        self._step_ended = trainer.global_step if trainer.global_step > self._steps else 0
        self._steps = trainer.global_step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look_at_all(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor is None:
            return
        value, loss = (float(trainer.callback_metrics[n]) for n in (self.monitor, "val/loss"))
        if not math.isfinite(value) and self.monitor != "val/loss":
            raise InputError(
                f"epoch {trainer.current_epoch}: {self.monitor} is {value}, by which no epoch can "
                "be chosen; look for cutouts of the validation split whose pixels are no numbers, "
                "or set another training.monitor"
            )
        if not math.isfinite(loss):  # which a metric at a threshold does not show
            raise InputError(
                f"epoch {trainer.current_epoch}: val/loss is {loss}; look for cutouts of the "
                "validation split whose pixels are no numbers, or lower training.learning_rate"
            )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._look_at_all(trainer, pl_module)

    def _look_at_all(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer)
        # A rank whose own loss is a number has the weights of one whose loss is none; that one is
        # to tell, which knows the cutouts.
        trainer.strategy.barrier("losses")
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
        (loss, arrived, batch, number), self.waiting = self.waiting, None
        if arrived is not None:
            arrived.synchronize()
        if not bool(loss.isfinite()):
            raise InputError(
                f"epoch {trainer.current_epoch}, batch {number}: the loss is {float(loss)}; the "
                f"last good checkpoint is kept; look at {_cutouts(trainer, batch)}, or lower "
                "training.learning_rate"
            )
        self.last = float(loss)
        # Of the batch that ended a step, if several make one.
        step = self._step_ended
        if step and step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            _log(trainer, self.last, step)


@rank_zero_only
def _log(trainer: pl.Trainer, loss: float, step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics({"train/loss_step": loss}, step=step)


def _cutouts(trainer: pl.Trainer, batch: dict[str, Tensor]) -> str:
    if "index" not in batch:
        return "its cutouts"
    ids = trainer.datamodule.split("train").ids[batch["index"].cpu().numpy()]  # type: ignore[attr-defined]
    largest = batch["image"].abs().flatten(1).amax(dim=1)
    extreme = largest.nan_to_num(nan=torch.inf).argsort(descending=True, stable=True).cpu().numpy()
    return f"the cutouts {first_of(ids[extreme])} (those with the most extreme pixels first)"


class LossBar(TQDMProgressBar):
    """Lightning's, with the loss of the last step that was read; epochs count from 1, as elsewhere.

    Lightning's own `prog_bar` would wait for the GPU at every step, and draws on standard output,
    which may go into a file, at each.
    """

    def __init__(self, losses: FiniteLoss) -> None:
        super().__init__()
        self._losses = losses
        self._drawn = -math.inf

    def init_train_tqdm(self) -> Tqdm:
        with redirect_stdout(sys.stderr):  # where all others are
            return super().init_train_tqdm()

    def init_validation_tqdm(self) -> Tqdm:
        with redirect_stdout(sys.stderr):
            return super().init_validation_tqdm()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, n: int
    ) -> None:
        now = time.monotonic()
        if trainer.is_last_batch or now - self._drawn >= REDRAWN:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, n)
            self._drawn = now

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        epochs = f"{trainer.current_epoch + 1}/{trainer.max_epochs}"
        self.train_progress_bar.set_description(f"epoch {epochs}")

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        return shown if self._losses.last is None else shown | {"loss": f"{self._losses.last:.3f}"}


class LossLines(Callback):
    """Where no bar is drawn: lines in the log while a long epoch lasts; see `progress_bar`."""

    def __init__(self, losses: FiniteLoss) -> None:
        self._losses = losses
        self._lines: Any = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, n: int
    ) -> None:
        if self._lines is None:  # an epoch that goes on in its middle is not said to begin
            self._lines = progress_bar(
                total=trainer.num_training_batches,
                desc=f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}, batches",
                shown=trainer.is_global_zero,
            )
        if self._losses.last is not None:
            self._lines.set_postfix_str(f"loss {self._losses.last:.3f}", refresh=False)
        self._lines.update(n + 1 - self._lines.n)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._lines.close()
        self._lines = None


class PeakMemory(Callback):
    """`gpu/peak_memory`: the most memory (GB) that cutouts and network took in an epoch.

    Lightning's DeviceStatsMonitor tells each logger a hundred figures, and the GPU waits meanwhile.
    """

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("gpu/peak_memory", torch.cuda.max_memory_allocated(pl_module.device) / 1e9)


class Patience(EarlyStopping):
    """Early stopping that a training which goes on from its last checkpoint has not forgotten."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.wait_count >= self.patience:
            trainer.should_stop = True


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
