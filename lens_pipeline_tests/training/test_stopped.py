"""Trainings that cannot go on: what they say, and what they keep."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback

from lens_pipeline import LitLensSystem
from lens_pipeline.errors import InputError, NoAnswerError, NoRoomError
from lens_pipeline_tests.disks import small_disk
from lens_pipeline_tests.training.small import small_config, train_on


class _Spoil(Callback):
    """A cutout's pixels are no numbers, at one batch."""

    def __init__(self, at: int) -> None:
        self.at, self.ids = at, np.array([])

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, number: int
    ) -> None:
        if trainer.fit_loop.total_batch_idx == self.at:
            batch["image"][11, 0, 3, 4] = torch.nan
            self.ids = trainer.datamodule.split("train").ids[batch["index"]]  # type: ignore[attr-defined]


def test_a_loss_that_is_no_number_names_the_cutouts(uneven_shards: Path, tmp_path: Path) -> None:
    config = small_config(save_every_n_steps=1)
    spoil = _Spoil(6)
    with pytest.raises(InputError, match=r"epoch 1, batch 1: the loss is nan") as said:
        train_on(config, uneven_shards, tmp_path, spoil)
    assert f"the cutouts {spoil.ids[11]}, " in str(said.value)
    assert f" and {len(spoil.ids) - 5} more" in str(said.value)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6  # the last good one
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    # With good pixels it goes on from there.
    assert len(train_on(config, uneven_shards, tmp_path).curves) == 2


@pytest.mark.parametrize("monitor", ["val/accuracy", "val/auroc"])
def test_a_validation_whose_pixels_are_no_numbers_ends_it(
    monitor: str, uneven_shards: Path, tmp_path: Path
) -> None:
    """Of a metric at a threshold it does not show: a score that is no number is below it."""

    class Break(Callback):
        def on_validation_batch_start(
            self, trainer: Trainer, module: LightningModule, batch: Any, *_: Any
        ) -> None:
            batch["image"][0] = torch.nan

    with pytest.raises(InputError, match="epoch 0: val/.* is nan"):
        train_on(small_config(monitor=monitor), uneven_shards, tmp_path, Break())


def test_weights_that_are_no_numbers_are_not_kept(uneven_shards: Path, tmp_path: Path) -> None:
    class Break(Callback):
        def on_before_zero_grad(self, trainer: Trainer, module: LightningModule, _: Any) -> None:
            if trainer.global_step == 3:
                next(module.parameters()).data[0] = torch.inf

    with pytest.raises(InputError, match=r"the (weights are no numbers|loss is nan)"):
        train_on(small_config(save_every_n_steps=1), uneven_shards, tmp_path, Break())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


class _SmallMemory(Callback):
    """A GPU that has room for so many cutouts, from an epoch on."""

    def __init__(self, room: int, epoch: int = 0, problem: RuntimeError | None = None) -> None:
        self.room, self.epoch = room, epoch
        self.problem = problem or torch.OutOfMemoryError("CUDA out of memory")

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, number: int
    ) -> None:
        if len(batch["image"]) > self.room and trainer.current_epoch >= self.epoch:
            raise self.problem


@pytest.mark.parametrize(
    "problem",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["of torch", "of CUDA", "of cuBLAS"],
)
def test_too_little_memory_is_told_with_the_way_out(
    problem: RuntimeError, uneven_shards: Path, tmp_path: Path
) -> None:
    """Whichever library asked for it."""
    with pytest.raises(InputError, match=r"training\.batch_size 16: .*accumulate_grad_batches"):
        train_on(small_config(), uneven_shards, tmp_path, _SmallMemory(5, problem=problem))


def test_another_error_of_a_step_is_not_one_of_memory(uneven_shards: Path, tmp_path: Path) -> None:
    problem = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        train_on(small_config(), uneven_shards, tmp_path, _SmallMemory(5, problem=problem))


@pytest.mark.slow
def test_a_batch_size_that_fits_is_found(uneven_shards: Path, tmp_path: Path) -> None:
    trained = train_on(small_config(find_batch_size=True), uneven_shards, tmp_path, _SmallMemory(5))
    assert trained.config.training.batch_size == 4
    assert len(trained.curves) == 2


def test_what_a_killed_training_has_left_is_not_gone_on_with(
    uneven_shards: Path, tmp_path: Path
) -> None:
    """It was killed after its first epoch, before there was a last.ckpt, in a smaller batch."""
    config = small_config(find_batch_size=True, epochs=1)
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "epoch_000.ckpt").write_bytes(b"of another batch size")
    trained = train_on(config, uneven_shards, tmp_path, _SmallMemory(9))
    assert trained.config.training.batch_size == 8


@pytest.mark.parametrize(("of", "n"), [("train", 5), ("val", 3)])
def test_a_limit_that_leaves_no_batch_is_told(
    of: str, n: int, uneven_shards: Path, tmp_path: Path
) -> None:
    config = small_config(**{f"limit_{of}_batches": 0.1})
    with pytest.raises(InputError, match=rf"limit_{of}_batches 0\.1: of {n} batches that is none"):
        train_on(config, uneven_shards, tmp_path)


@pytest.mark.parametrize("find", [True, False])
def test_what_was_trained_is_kept_where_memory_runs_out_later(
    find: bool, uneven_shards: Path, tmp_path: Path
) -> None:
    """It is not the batch that is too large."""
    config = small_config(find_batch_size=find, epochs=3)
    said = rf"too little memory for it now, and {tmp_path} holds a training .+ the same goes on"
    with pytest.raises(NoAnswerError, match=said):  # which a step tries again
        train_on(config, uneven_shards, tmp_path, _SmallMemory(5, epoch=2))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] in (0, 1)
    trained = train_on(config, uneven_shards, tmp_path)
    assert trained.config.training.batch_size == 16
    assert trained.curves["epoch"].tolist() == [0, 1, 2]


def test_too_little_memory_for_the_scores_ends_with_a_way_to_go_on(
    uneven_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []

    def none_left(system: LitLensSystem, images: torch.Tensor) -> Any:
        batches.append(len(images))
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as others:
        others.setattr(LitLensSystem, "drawn_logits", none_left)
        with pytest.raises(InputError, match=f"{tmp_path}: the training has ended, .+ goes on"):
            train_on(small_config(), uneven_shards, tmp_path)
    assert batches == [16]  # no more than a step had room for
    steps: list[int] = []

    class Steps(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            steps.append(trainer.global_step)

    assert len(train_on(small_config(), uneven_shards, tmp_path, Steps()).val_scores) == 40
    assert not steps


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 100) as folder:
        yield folder


def test_a_full_disk_keeps_the_last_checkpoint(uneven_shards: Path, disk: Path) -> None:
    out = disk / "out"
    config = small_config(save_every_n_steps=1, epochs=1)

    class Fill(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                with pytest.raises(OSError, match="No space"):
                    (disk / "others").write_bytes(bytes(110_000_000))

    with pytest.raises(InputError, match=rf"{out}\S*: there is no room on its disk"):
        train_on(config, uneven_shards, out, Fill())
    kept = torch.load(out / "last.ckpt", weights_only=True)
    assert kept["global_step"] in (2, 3)
    (disk / "others").unlink()
    assert len(train_on(config, uneven_shards, out).curves) == 1


def test_a_disk_that_is_full_before_the_training_begins(uneven_shards: Path, disk: Path) -> None:
    with pytest.raises(OSError, match="No space"):
        (disk / "others").write_bytes(bytes(110_000_000))
    with pytest.raises(NoRoomError, match=rf"{disk / 'out'}\S*: there is no room on its disk"):
        train_on(small_config(), uneven_shards, disk / "out")


def test_ctrl_c_is_heard_after_one_met_a_full_disk(uneven_shards: Path, disk: Path) -> None:
    """Lightning ignores further ones while it ends, and would for ever where that fails."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    interrupted = []

    class Interrupt(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                with pytest.raises(OSError, match="No space"):
                    (disk / "others").write_bytes(bytes(110_000_000))
                trainer.save_checkpoint(disk / "out" / "more.ckpt")
                interrupted.append(trainer.global_step)
                raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, InputError)):
        train_on(small_config(), uneven_shards, disk / "out", Interrupt())
    assert interrupted == [2]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_disk_that_is_full_when_the_training_has_ended_is_told_too(
    uneven_shards: Path, disk: Path
) -> None:
    out = disk / "out"
    config = small_config(epochs=1)

    class Fill(Callback):
        def on_fit_end(self, trainer: Trainer, *_: Any) -> None:
            with pytest.raises(OSError, match="No space"):
                (disk / "others").write_bytes(bytes(110_000_000))

    with pytest.raises(NoRoomError, match=rf"{out}\S*: there is no room on its disk"):
        train_on(config, uneven_shards, out, Fill())
    (disk / "others").unlink()
    assert len(train_on(config, uneven_shards, out).curves) == 1
