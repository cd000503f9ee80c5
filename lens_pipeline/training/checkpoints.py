"""How checkpoints of a training are written: which, when, and so that none is half there."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from torch import Tensor
from torch.utils.serialization import config as serialization

from lens_pipeline.errors import FULL, NoRoomError
from lens_pipeline.files import file_aside
from lens_pipeline.models.pretrained import read_checkpoint

MINUTE = 60.0  # seconds
SHARE = 0.03  # of the time, for checkpoints after epochs
SELDOM = 10  # batches
DISK = 1e9  # bytes a second, before it is known
LOSS = "val/loss"
AT_A_TIME = 2  # checkpoints in memory that are still to be written: the best one, and the last


class BestCheckpoints(ModelCheckpoint):
    """Those of the best epochs: of several that the monitor finds equal, those with the lowest
    `val/loss`, then the latest. Metrics of ranks move in steps, and may be 1 or 0 for many epochs.

    What is no longer among them stays until `last.ckpt` knows of the better one, which a training
    that goes on from there may not find again.
    """

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.surpassed: list[str] = []
        self.losses: dict[str, float] = {}  # of those that are kept

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"losses": self.losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Where fewer are kept than before, the best of them. The folder may be elsewhere by now:
        Lightning would forget what lies in it."""

        def here(path: str) -> str:
            return str(Path(str(self.dirpath), Path(path).name)) if path else path

        paths = {
            name: here(state_dict[name]) for name in ("best_model_path", "kth_best_model_path")
        }
        best = {here(path): value for path, value in state_dict["best_k_models"].items()}
        kept = {"best_k_models": best, "dirpath": self.dirpath}
        super().load_state_dict({**state_dict, **paths, **kept})
        self.losses = {here(path): loss for path, loss in state_dict["losses"].items()}
        surpassed = self._ranked()[self.save_top_k :]
        self.surpassed += surpassed
        for path in surpassed:
            del self.best_k_models[path]
        self._name_first_and_last()

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        if current is None or len(self.best_k_models) < self.save_top_k:
            return super().check_monitor_top_k(trainer, current)
        loss = float(trainer.callback_metrics[LOSS])
        last = self.kth_best_model_path
        # It is the latest: as good as the last of those that are kept, it is better.
        better = self._goodness(current, loss) >= self._goodness(
            self.best_k_models[last], self.losses[last]
        )
        return trainer.strategy.reduce_boolean_decision(better)

    def _update_best_and_save(
        self, current: Tensor, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]
    ) -> None:
        super()._update_best_and_save(current, trainer, monitor_candidates)
        self.losses[next(reversed(self.best_k_models))] = float(monitor_candidates[LOSS])
        self._name_first_and_last()

    def _goodness(self, value: Tensor, loss: float) -> tuple[float, float]:
        up = 1 if self.mode == "max" else -1
        return up * float(value), -math.inf if math.isnan(loss) else -loss

    def _ranked(self) -> list[str]:
        """The paths that are kept, the best first; a dict has them in the order of their epochs."""
        latest_first = reversed(self.best_k_models.items())
        goodness = {path: self._goodness(v, self.losses[path]) for path, v in latest_first}
        return sorted(goodness, key=lambda path: goodness[path], reverse=True)

    def _name_first_and_last(self) -> None:
        """As Lightning does, which does not look further where values are equal."""
        ranked = self._ranked()
        if not ranked:
            return  # before the end of the first epoch
        self.losses = {path: self.losses[path] for path in ranked}
        self.best_model_path = ranked[0]
        self.best_model_score = self.best_k_models[ranked[0]]
        if len(ranked) == self.save_top_k:
            self.kth_best_model_path = ranked[-1]
            self.kth_value = self.best_k_models[ranked[-1]]

    def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        self.surpassed.append(filepath)

    def remove_surpassed(self, trainer: pl.Trainer) -> None:
        for path in self.surpassed:
            trainer.strategy.remove_checkpoint(path)
        self.surpassed.clear()


class LastCheckpoint(Checkpoint):
    """Writes `path`, from which a training goes on: every so many steps, or else every minute; when
    the training ends; and after an epoch beside which the time of writing is small.

    Not at an epoch's last batch, whose validation would never be made up for; nor between the
    batches of one step, whose gradients no checkpoint holds.
    """

    def __init__(
        self, path: Path, every_n_steps: int, best: BestCheckpoints, files: "RenamedCheckpoints"
    ) -> None:
        self.path, self.every_n_steps, self.best, self.files = path, every_n_steps, best, files
        self.written, self.took = time.monotonic(), 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Until one has been written: the weights, and AdamW's two moments of each.
        size = 3 * sum(parameter.nbytes for parameter in pl_module.parameters())
        self.written, self.took = time.monotonic(), size / DISK

    def on_train_batch_end(self, trainer: pl.Trainer, *about: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        if loop.batch_progress.is_last_batch or loop._should_accumulate():
            return
        if self.every_n_steps:
            due = trainer.global_step % self.every_n_steps == 0
        else:
            # Several processes have to agree, for which their GPUs would be waited for.
            seldom = max(1, SELDOM // trainer.accumulate_grad_batches)
            asked = trainer.world_size == 1 or trainer.global_step % seldom == 0
            due = asked and self._long_ago(trainer, MINUTE)
        if due:
            self._write(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        ends = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        due = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        if ends or due or self._long_ago(trainer, (self.took + self.files.took) / SHARE):
            self._write(trainer)

    def _long_ago(self, trainer: pl.Trainer, seconds: float) -> bool:
        """As the first process sees it."""
        return trainer.strategy.broadcast(time.monotonic() - self.written >= seconds)

    def _write(self, trainer: pl.Trainer) -> None:
        begun = time.monotonic()
        trainer.save_checkpoint(self.path, weights_only=False)
        self.best.remove_surpassed(trainer)
        self.written = time.monotonic()
        self.took = self.written - begun

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # It is in the file. Lightning would bring it to the CPU, for nobody.
        trainer.strategy.optimizers = []


class RenamedCheckpoints(TorchCheckpointIO):
    """Checkpoints written aside and renamed: a reader sees the old one or the new one. Reading one
    executes no code of it.

    A thread writes them, and removes others, in the order in which it is asked to, while the
    training goes on; after one that cannot be written it does nothing more, and who asks next, or
    ends the training, is told.
    """

    took = 0.0  # seconds that the thread has needed for the last one

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._asked: deque[Future[None]] = deque()

    def teardown(self) -> None:
        try:
            self._wait_for_all_but(0)
        finally:
            self._asked.clear()  # what has failed has for all that follow, and is told once

    def remove_checkpoint(self, path: Any) -> None:
        self._ask(super().remove_checkpoint, path)

    def _ask(self, task: Callable[..., None], *arguments: Any) -> None:
        before = self._asked[-1] if self._asked else None

        def run() -> None:
            if before is not None:
                before.result()  # has ended, for there is one thread
            task(*arguments)

        self._asked.append(self._thread.submit(run))

    def _wait_for_all_but(self, n: int) -> None:
        while len(self._asked) > n:
            self._asked.popleft().result()

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        found = read_checkpoint(Path(path))
        assert isinstance(found, dict)
        return found

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        self._wait_for_all_but(AT_A_TIME - 1)
        where = None if _fits_beside_training(checkpoint) else "cpu"
        now = apply_to_collection(
            checkpoint, Tensor, lambda t: t.detach().to(where or t.device, copy=True)
        )
        if torch.cuda.is_initialized():
            self._beside_training.wait_stream(torch.cuda.current_stream())
        self._ask(self._write, now, Path(path))

    @cached_property
    def _beside_training(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        begun = time.monotonic()
        if torch.cuda.is_initialized():
            # From a GPU a gigabyte takes half a second.
            with torch.cuda.stream(self._beside_training):
                checkpoint = apply_to_collection(checkpoint, Tensor, Tensor.cpu)
        # Most of the time of writing; those that are kept are written once more, with it.
        with serialization.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
            save_aside(checkpoint, path)
        self.took = time.monotonic() - begun


def _fits_beside_training(checkpoint: dict[str, Any]) -> bool:
    """Whether copies of what a checkpoint holds of the GPU have room on it, beside the most that a
    step has needed so far."""
    if not torch.cuda.is_initialized():
        return True
    tensors: list[Tensor] = []
    apply_to_collection(checkpoint, Tensor, tensors.append)
    copies = AT_A_TIME * sum(tensor.nbytes for tensor in tensors if tensor.is_cuda)
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    return copies <= free - torch.cuda.max_memory_allocated()


def save_aside(checkpoint: dict[str, Any], path: Path) -> None:
    """Raises NoRoomError where the disk is full; what was there stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with telling_of_a_full_disk(path), file_aside(path) as file:
        torch.save(checkpoint, file)


@contextmanager
def telling_of_a_full_disk(path: Path) -> Iterator[None]:
    """Raises NoRoomError in the place of what a full disk under `path` raises."""
    try:
        yield
    except OSError as problem:
        if problem.errno not in FULL:
            raise
        raise NoRoomError(
            f"{path}: there is no room on its disk; the last checkpoint that was written is kept; "
            "make room, and the same command goes on from it"
        ) from None
