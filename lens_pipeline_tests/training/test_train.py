"""Training from a configuration: what it leaves, and what it says when it cannot go on."""

import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback
from sklearn.metrics import roc_auc_score
from torch.utils._python_dispatch import TorchDispatchMode

from lens_pipeline import LensDataModule, LitEnsembleSystem, LitLensSystem
from lens_pipeline.cli import main
from lens_pipeline.ensemble import assemble, open_cutout_source, score_to_file
from lens_pipeline.errors import InputError, NoRoomError
from lens_pipeline.models.system import load_system
from lens_pipeline.shards import open_shards, publish_shards
from lens_pipeline.training import TrainedMember, train
from lens_pipeline.training.config import TrainConfig
from lens_pipeline_tests.conftest import LENS_PIPELINE


def _config(arch: str = "lastro", **training: Any) -> TrainConfig:
    values = {"epochs": 2, "batch_size": 16} | training
    return TrainConfig.parse({"model": {"arch": arch}, "training": values}, "test")


def _train(
    config: TrainConfig, shards: Path, out: Path, *callbacks: Callback, **how: Any
) -> TrainedMember:
    return train(config, LensDataModule(shards), out, callbacks=callbacks, **how)


def _best_epochs(curves: pd.DataFrame, monitor: str) -> list[int]:
    by = [monitor, "val/loss", "epoch"]
    return curves.sort_values(by, ascending=[False, True, False])["epoch"].tolist()


def test_a_ring_is_learnt_and_its_files_are_left(uneven_shards: Path, tmp_path: Path) -> None:
    config = _config(epochs=8, save_top_k=2, monitor="val/auroc")
    trained = _train(config, uneven_shards, tmp_path)
    assert trained.config == config
    curves = trained.curves
    assert curves["epoch"].tolist() == list(range(8))
    assert curves["val/auroc"].max() > 0.9
    assert {"train/loss", "train/f1", "val/tpr0", "val/tpr10", "val/average_precision"} < set(
        curves
    )
    scores = trained.val_scores
    assert len(scores) == 40
    # The best checkpoint is of the epoch with the highest figure, and its scores are its own.
    checkpoint = torch.load(trained.checkpoint, weights_only=True)
    assert checkpoint["epoch"] == _best_epochs(curves, "val/auroc")[0]
    assert "optimizer_states" not in checkpoint
    auroc = roc_auc_score(scores["label"], scores["logit"])
    assert curves["val/auroc"].max() == pytest.approx(auroc, abs=1e-6)
    # Over cutouts, of which the last batch has fewer.
    n_nonlens, n_lens = LensDataModule(uneven_shards).class_counts("train")
    sign = np.where(scores["label"] == 1, -1, 1)
    weight = np.where(scores["label"] == 1, n_nonlens / n_lens, 1)
    loss = (weight * np.logaddexp(0, sign * scores["logit"])).mean()
    assert curves["val/loss"][checkpoint["epoch"]] == pytest.approx(loss, rel=1e-5)
    split = LensDataModule(uneven_shards).split("val")
    images = torch.from_numpy(split.gather(list(range(40))).astype(np.float32))
    with torch.inference_mode():
        logit = load_system(trained.checkpoint)(images)
    np.testing.assert_allclose(scores["logit"], logit, rtol=1e-5, atol=1e-5)
    assert [path.name for path in (tmp_path / "top").iterdir()] != []


def test_accelerators_that_are_not_supported_are_not_taken(
    uneven_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Apple's, which knows no float64."""
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("platform.processor", lambda: "arm")
    config = _config(fast_dev_run=True)
    assert config.hardware.accelerator == "auto"
    seen: list[str] = []

    class Device(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append(pl_module.device.type)

    _train(config, uneven_shards, tmp_path, Device())
    assert seen == ["cuda" if torch.cuda.is_available() else "cpu"]


def test_the_same_settings_file_gives_the_same_weights(uneven_shards: Path, tmp_path: Path) -> None:
    """`lens-pipeline train --config` on what a run has saved repeats it to the last bit."""
    first, second = tmp_path / "first", tmp_path / "second"
    place = ["--data-root", str(uneven_shards)]
    flags = ["--arch", "lastro", "--epochs", "2", "--batch-size", "16", "--shift", "1"]
    assert main(["train", *place, *flags, "--checkpoint-dir", str(first)]) == 0
    settings = str(first / "settings.yaml")
    assert main(["train", "--config", settings, "--checkpoint-dir", str(second)]) == 0
    one, two = (torch.load(f / "best.ckpt", weights_only=True) for f in (first, second))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name])


def test_other_pixels_in_the_same_place_are_trained_on_by_the_same_command(
    uneven_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And the same pixels are not: it says that nothing was trained."""
    folder = tmp_path / "cutouts"
    shutil.copytree(uneven_shards.parent, folder, ignore=shutil.ignore_patterns("shards"))
    flags = ["--arch", "lastro", "--epochs", "1", "--image-size", "32", "--home", str(tmp_path)]

    def trainings() -> set[Path]:
        caplog.clear()
        assert main(["train", "--data-root", str(folder / "catalogue.csv"), *flags]) == 0
        return set((tmp_path / "trainings").iterdir())

    (first,) = trainings()
    assert "nothing is trained again" not in caplog.text
    assert trainings() == {first}
    assert f"{first} holds this training with its scores: nothing is trained again" in caplog.text
    for path in folder.glob("*.npy"):
        np.save(path, np.load(path)[::-1])
    assert len(trainings()) == 2
    assert "nothing is trained again" not in caplog.text


class _Spoil(Callback):
    """A cutout's pixels are no numbers, at one batch."""

    def __init__(self, at: int) -> None:
        self.at, self.ids = at, np.array([])

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, number: int
    ) -> None:
        if trainer.fit_loop.total_batch_idx == self.at:
            batch["image"][0] = torch.nan
            self.ids = trainer.datamodule.split("train").ids[batch["index"]]  # type: ignore[attr-defined]


def test_a_loss_that_is_no_number_names_the_cutouts(uneven_shards: Path, tmp_path: Path) -> None:
    config = _config(save_every_n_steps=1)
    spoil = _Spoil(6)
    with pytest.raises(InputError, match=r"epoch 1, batch 1: the loss is nan") as said:
        _train(config, uneven_shards, tmp_path, spoil)
    assert spoil.ids[0] in str(said.value)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6  # the last good one
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    # With good pixels it goes on from there.
    assert len(_train(config, uneven_shards, tmp_path).curves) == 2


def test_weights_that_are_no_numbers_are_not_kept(uneven_shards: Path, tmp_path: Path) -> None:
    class Break(Callback):
        def on_before_zero_grad(self, trainer: Trainer, module: LightningModule, _: Any) -> None:
            if trainer.global_step == 3:
                next(module.parameters()).data[0] = torch.inf

    with pytest.raises(InputError, match=r"the (weights are no numbers|loss is nan)"):
        _train(_config(save_every_n_steps=1), uneven_shards, tmp_path, Break())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


class _SmallMemory(Callback):
    """A GPU that has room for so many cutouts, from an epoch on."""

    def __init__(self, room: int, epoch: int = 0) -> None:
        self.room, self.epoch = room, epoch

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, number: int
    ) -> None:
        if len(batch["image"]) > self.room and trainer.current_epoch >= self.epoch:
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_more_processes_than_cores_are_not_begun(uneven_shards: Path, tmp_path: Path) -> None:
    many = {"hardware": {"devices": 1024, "accelerator": "cpu"}}
    with pytest.raises(InputError, match=r"hardware\.devices 1024: this machine has \d+ cores"):
        _train(_config().with_changes(many, "test"), uneven_shards, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_told_with_the_way_out(uneven_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training\.batch_size 16: .*accumulate_grad_batches"):
        _train(_config(), uneven_shards, tmp_path, _SmallMemory(5))


@pytest.mark.slow
def test_a_batch_size_that_fits_is_found(uneven_shards: Path, tmp_path: Path) -> None:
    trained = _train(_config(find_batch_size=True), uneven_shards, tmp_path, _SmallMemory(5))
    assert trained.config.training.batch_size == 4
    assert len(trained.curves) == 2


def test_what_was_trained_is_kept_where_memory_runs_out_later(
    uneven_shards: Path, tmp_path: Path
) -> None:
    """It is not the batch that is too large."""
    config = _config(find_batch_size=True, epochs=3)
    said = rf"too little memory for it now, and {tmp_path} holds a training .+ the same goes on"
    with pytest.raises(InputError, match=said):
        _train(config, uneven_shards, tmp_path, _SmallMemory(5, epoch=2))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] in (0, 1)
    trained = _train(config, uneven_shards, tmp_path)
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
            _train(_config(), uneven_shards, tmp_path)
    assert batches == [16]  # no more than a step had room for
    steps: list[int] = []

    class Steps(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            steps.append(trainer.global_step)

    assert len(_train(_config(), uneven_shards, tmp_path, Steps()).val_scores) == 40
    assert not steps


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a hundred megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(folder)], check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_last_checkpoint(uneven_shards: Path, small_disk: Path) -> None:
    out = small_disk / "out"
    config = _config(save_every_n_steps=1, epochs=1)

    class Fill(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                with pytest.raises(OSError, match="No space"):
                    (small_disk / "others").write_bytes(bytes(110_000_000))

    with pytest.raises(InputError, match=rf"{out}\S*: there is no room on its disk"):
        _train(config, uneven_shards, out, Fill())
    kept = torch.load(out / "last.ckpt", weights_only=True)
    assert kept["global_step"] in (2, 3)
    (small_disk / "others").unlink()
    assert len(_train(config, uneven_shards, out).curves) == 1


def test_a_disk_that_is_full_when_the_training_has_ended_is_told_too(
    uneven_shards: Path, small_disk: Path
) -> None:
    out = small_disk / "out"
    config = _config(epochs=1)

    class Fill(Callback):
        def on_fit_end(self, trainer: Trainer, *_: Any) -> None:
            with pytest.raises(OSError, match="No space"):
                (small_disk / "others").write_bytes(bytes(110_000_000))

    with pytest.raises(NoRoomError, match=rf"{out}\S*: there is no room on its disk"):
        _train(config, uneven_shards, out, Fill())
    (small_disk / "others").unlink()
    assert len(_train(config, uneven_shards, out).curves) == 1


def test_checkpoints_take_little_of_the_time_of_short_epochs(
    uneven_shards: Path, tmp_path: Path
) -> None:
    """Where writing is slow they are of the first epoch, whose cost tells, and of the end."""

    class SlowDisk(Callback):
        written: ClassVar[list[int]] = []

        def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
            self.written.append(trainer.current_epoch)
            time.sleep(0.5)

    _train(_config(epochs=5), uneven_shards, tmp_path, SlowDisk())
    assert SlowDisk.written == [0, 4]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 4


def test_twenty_non_lenses_do_not_choose_by_one_false_positive_in_a_hundred(
    uneven_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = _config()
    assert config.training.monitor == "val/tpr_at_fpr_1e-2"
    with caplog.at_level("INFO", logger="lens_pipeline"):
        trained = _train(config, uneven_shards, tmp_path)
    assert "20 non-lenses of the validation set cannot resolve" in caplog.text
    assert trained.curves["val/tpr_at_fpr_1e-2"].isna().all()
    epoch = torch.load(trained.checkpoint, weights_only=True)["epoch"]
    assert epoch == _best_epochs(trained.curves, "val/auroc")[0]


@pytest.mark.parametrize("equal_losses", [True, False])
def test_of_epochs_that_are_equally_good_the_one_with_the_lowest_loss_is_best(
    equal_losses: bool, uneven_shards: Path, tmp_path: Path
) -> None:
    """Then the latest: it has learnt most. These rings are easy to tell from the first epoch on."""

    class Forget(Callback):
        def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
            for value in module.state_dict().values() if equal_losses else ():
                value.zero_()

    config = _config(epochs=4, monitor="val/auroc")
    trained = _train(config, uneven_shards, tmp_path, Forget())
    curves = trained.curves
    assert curves["val/auroc"].nunique() == 1
    assert curves["val/loss"].nunique() == (1 if equal_losses else 4)
    first, *others, _ = _best_epochs(curves, "val/auroc")
    assert first != 0
    assert torch.load(trained.checkpoint, weights_only=True)["epoch"] == first
    kept = sorted(path.name for path in (tmp_path / "top").iterdir())
    assert kept == sorted(f"epoch_{epoch:03d}.ckpt" for epoch in others)


class _Weights(Callback):
    """Those before the first step and after each."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._look(module)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == len(self.seen):
            self._look(module)

    def _look(self, module: LightningModule) -> None:
        self.seen.append({name: v.double().clone() for name, v in module.state_dict().items()})


def test_an_average_of_the_weights_soon_forgets_the_untrained_ones(
    uneven_shards: Path, tmp_path: Path
) -> None:
    """By the formula of TensorFlow's ExponentialMovingAverage with its `num_updates`."""
    weights = _Weights()
    config = _config(epochs=2, ema=0.999, accumulate_grad_batches=2)
    trained = _train(config, uneven_shards, tmp_path, weights)
    average, *steps = weights.seen
    assert len(steps) == 2 * 3
    for t, now in enumerate(steps):
        decay = min(0.999, (1 + t) / (10 + t))
        average = {name: decay * average[name] + (1 - decay) * now[name] for name in now}
    kept = torch.load(trained.folder / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in kept.items():
        expected = average[name] if value.is_floating_point() else steps[-1][name]
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)


def test_an_average_of_the_weights_asks_for_no_number(uneven_shards: Path, tmp_path: Path) -> None:
    """For which the host would wait until a GPU has done all it was given."""

    class Asked(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            self.n += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    class Watch(Callback):
        def __init__(self) -> None:
            self.asked = Asked()

        def on_train_start(self, *_: Any) -> None:
            self.asked.__enter__()

        def on_train_epoch_end(self, *_: Any) -> None:
            self.asked.__exit__(None, None, None)

    found = []
    for ema in (0.0, 0.9):
        watch = Watch()
        config = _config(epochs=1, ema=ema, limit_val_batches=1, monitor="val/loss")
        _train(config, uneven_shards, tmp_path / str(ema), watch)
        found.append(watch.asked.n)
    assert found[0] == found[1] > 0


def test_a_training_leaves_its_process_as_it_was(
    uneven_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bootstrap round it draws something else each time."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    def seed() -> None:
        random.seed(1)
        np.random.seed(2)
        torch.manual_seed(3)

    seed()
    expected = draws()
    before = dict(os.environ)
    seed()
    _train(_config(epochs=1), uneven_shards, tmp_path)
    assert draws() == expected
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert not torch.backends.cudnn.benchmark
    assert dict(os.environ) == before


def test_a_validation_of_one_class_is_told_before_anything_is_trained(
    uneven_shards: Path, tmp_path: Path
) -> None:
    """As that of a folder's first batches is, whose lenses come first."""
    table = pd.read_csv(uneven_shards.parent / "catalogue.csv").sort_values("label", kind="stable")
    table["path"] = [str(uneven_shards.parent / path) for path in table["path"]]
    table.to_csv(tmp_path / "catalogue.csv", index=False)
    data = LensDataModule(tmp_path / "catalogue.csv", image_size=32, cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match="limit_val_batches 1, has cutouts of one class only"):
        train(_config(limit_val_batches=1), data, tmp_path / "out")
    train(_config(limit_val_batches=1, monitor="val/loss"), data, tmp_path / "other")


def test_a_metric_that_is_no_number_chooses_no_epoch(uneven_shards: Path, tmp_path: Path) -> None:
    class Spoil(Callback):
        def on_validation_batch_start(
            self, trainer: Trainer, module: LightningModule, batch: Any, number: int, _: int = 0
        ) -> None:
            batch["image"][0] = torch.nan

    with pytest.raises(InputError, match=r"epoch 0: val/auroc is nan, .* the validation split"):
        _train(_config(), uneven_shards, tmp_path, Spoil())
    assert not (tmp_path / "best.ckpt").exists()


@pytest.mark.slow
def test_the_rate_falls_at_the_plateaus_of_the_validation_loss(
    uneven_shards: Path, tmp_path: Path
) -> None:
    """As torch's scheduler does, which waits for one epoch more than its patience."""
    how = {"schedule": "plateau", "decay_epochs": 1, "learning_rate": 0.1, "warmup": 0.0}
    trained = _train(_config(epochs=16, **how), uneven_shards, tmp_path)
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.1, patience=0)
    for loss in trained.curves["val/loss"]:
        scheduler.step(loss)
    expected = optimiser.param_groups[0]["lr"]
    assert expected < 0.1
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer_states"][0]
    assert state["param_groups"][0]["lr"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"training": {"epoch": 3}}, "training.epoch: .*did you mean training.epochs"),
        ({"epochs": 3}, "file: epochs: .*did you mean training.epochs"),
        ({"training": {"lr": 3}}, "training.lr: .*did you mean training.learning_rate"),
        ({"model": {"batchsize": 3}}, "model.batchsize: .*did you mean training.batch_size"),
        ({"trainings": {}}, "file: trainings: .*did you mean training?"),
        ({"training": {"learning_rate": 2}}, "training.learning_rate: .*less than or equal to 1"),
        ({"model": {"pretrained": 3}}, "model.pretrained: .*valid string"),
        (
            {"training": {"find_batch_size": True}, "hardware": {"devices": 2}},
            "file: training.find_batch_size: goes with one device alone",
        ),
        (
            {"model": {"model_type": "ensemble", "pretrained": "models:/lens_ensemble@champion"}},
            "file: model.pretrained: a registered member is the start of one network",
        ),
        (
            {"model": {"architectures": ["resnet18", "lastro"]}},
            "file: model.architectures: is for model.model_type ensemble; one network is",
        ),
        (
            {"model": {"model_type": "ensemble", "arch": "lastro"}},
            "file: model.arch: is for model.model_type single; an ensemble's are",
        ),
        ({"model": {"arch": "resnet81"}}, "file: model.arch: 'resnet81' is not .*resnet18"),
        (
            {"model": {"model_type": "ensemble", "architectures": ["lastr"]}},
            "file: model.architectures: 'lastr' is not an architecture; did you mean lastro",
        ),
    ],
)
def test_settings_that_cannot_be_are_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        TrainConfig.parse(values, "file")


def test_each_bound_is_said_where_its_setting_is_described() -> None:
    bounded = 0
    for section in TrainConfig.model_fields.values():
        for name, field in section.annotation.model_fields.items():  # type: ignore[union-attr]
            for bound in field.metadata:
                for value in (getattr(bound, side, None) for side in ("ge", "gt", "le", "lt")):
                    bounded += value is not None
                    assert value is None or f"{value:,}" in str(field.description), name
    assert bounded > 40


def test_what_decides_nothing_makes_no_other_training() -> None:
    config = _config()
    same = {"data": {"num_workers": 3}, "hardware": {"exclusive": False}}
    assert config.with_changes(same, "test").deciding == config.deciding
    assert config.differences(config.with_changes(same, "test")) == []
    other = config.with_changes({"training": {"save_top_k": 5}}, "test")
    assert other.deciding != config.deciding  # other files
    assert config.differences(other) == []  # and the same weights


def test_weights_to_start_from_decide_by_what_they_are(tmp_path: Path) -> None:
    """Not by where they lie: a file may be moved, or be replaced by another."""
    deciding = []
    for name, content in (("a.ckpt", b"one"), ("b.ckpt", b"one"), ("a.ckpt", b"other")):
        (tmp_path / name).write_bytes(content)
        start = {"model": {"pretrained": str(tmp_path / name)}}
        deciding.append(_config().with_changes(start, "test").deciding)
    assert deciding[0] == deciding[1]
    assert deciding[0] != deciding[2]


@pytest.mark.parametrize(("said", "meant"), [("true", "published"), (False, "none"), ("w", "w")])
def test_pretrained_may_be_said_as_yaml_or_a_flag_says_it(said: object, meant: str) -> None:
    assert TrainConfig.parse({"model": {"pretrained": said}}, "test").model.pretrained == meant


def test_stops_early_when_nothing_is_gained(uneven_shards: Path, tmp_path: Path) -> None:
    config = _config(epochs=50, patience=2, min_delta=1.0, monitor="val/auroc")
    assert len(_train(config, uneven_shards, tmp_path).curves) == 3


def test_every_logger_is_told(
    uneven_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = _config(epochs=1, loggers=("csv", "tensorboard", "wandb"))
    for name in ("one", "another of the same process"):
        _train(config, uneven_shards, tmp_path / name)
        logs = tmp_path / name / "logs"
        table = pd.read_csv(next(logs.glob("csv/*/metrics.csv")))
        assert table["val/auroc"].notna().any()
        assert list(logs.glob("tensorboard/*/events*"))
        assert len(list(logs.glob("wandb/offline-run-*/*.wandb"))) == 1
        for kind in ("csv", "tensorboard"):
            (settings,) = logs.glob(f"{kind}/*/hparams.yaml")
            assert "learning_rate: 0.001" in settings.read_text()


def test_wandb_shows_a_training_that_goes_on_as_one_run(
    uneven_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = _config(epochs=1, loggers=("csv", "wandb"), save_every_n_steps=1)

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                raise InputError("stopped")

    with pytest.raises(InputError, match="stopped"):
        _train(config, uneven_shards, tmp_path, Stop())
    _train(config, uneven_shards, tmp_path)
    files = list((tmp_path / "logs").glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1  # by the run's id


def test_wandb_without_an_account_is_one_line(
    uneven_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where a key may lie
    out = tmp_path / "out"
    command = [
        *(LENS_PIPELINE, "train", "--data-root", str(uneven_shards), "--arch", "lastro"),
        *("--checkpoint-dir", str(out), "--loggers", "csv,wandb", "--home", str(tmp_path / "home")),
    ]
    refused = subprocess.run(
        command, capture_output=True, stdin=subprocess.DEVNULL, text=True, check=False
    )
    assert refused.returncode == 2
    last = refused.stderr.strip().splitlines()[-1]
    assert re.match("error: training.loggers: wandb: .*WANDB_API_KEY, or WANDB_MODE=offline", last)
    shutil.rmtree(out)
    assert main([*command[1:], "--fast-dev-run"]) == 0
    assert not any(out.iterdir())  # no training was, which files could tell of


def test_what_this_machine_cannot_do_is_said_before_training(
    uneven_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    place = ["--data-root", str(uneven_shards), "--home", str(tmp_path / "home")]
    for flags, said in (
        (["--precision", "16-mixed", "--accelerator", "cpu"], "hardware.precision 16-mixed: needs"),
        (
            ["--checkpoint-dir", str(tmp_path / "file")],
            "--checkpoint-dir: .*file is a file; name a",
        ),
        (["--model-type", "ensemble", "--archs", "lastr"], "architectures: 'lastr' is not"),
        (["--model-type", "ensemble", "--archs", "pop=lastro"], "no member may be called pop"),
        (["--archs", "lastro,resnet18"], "model.architectures: is for model.model_type ensemble"),
    ):
        assert main(["train", *place, "--epochs", "1", *flags]) == 2
        assert re.search(f"^error: .*{said}", capsys.readouterr().err, re.MULTILINE)


def test_a_plateau_without_a_validation_and_steps_without_epochs(uneven_shards: Path) -> None:
    """As a Trainer of the user's own may ask for."""
    quiet: dict[str, Any] = {
        **{"accelerator": "cpu", "logger": False, "enable_checkpointing": False},
        **{"enable_progress_bar": False, "enable_model_summary": False},
    }
    data = LensDataModule(uneven_shards, batch_size=16)
    system = LitLensSystem("lastro", image_size=32, schedule="plateau")
    with pytest.raises(InputError, match="schedule plateau: follows val/loss"):
        Trainer(**quiet, max_epochs=1, limit_val_batches=0).fit(system, data)
    system = LitLensSystem(
        "lastro", image_size=32, schedule="step", decay_epochs=1, decay=0.5, warmup=0, lr=1e-3
    )
    steps = 3 * len(data.train_dataloader()) - 1  # in the third epoch
    Trainer(**quiet, max_epochs=-1, max_steps=steps).fit(system, data)
    for group in system.optimizers().optimizer.param_groups:  # type: ignore[union-attr]
        assert group["lr"] == pytest.approx(1e-3 * 0.5**2)


def test_mlflow_is_told_of_a_training(uneven_shards: Path, tmp_path: Path) -> None:
    from lens_pipeline.settings import Settings
    from lens_pipeline.tracking import Tracking

    home = str(tmp_path / "home")
    flags = ["--arch", "lastro", "--epochs", "2", "--batch-size", "16", "--loggers", "csv,mlflow"]
    assert main(["train", "--data-root", str(uneven_shards), "--home", home, *flags]) == 0
    tracking = Tracking(Settings.load(home=home))
    (run,) = tracking.client.search_runs([tracking.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.arch"] == "lastro"
    history = tracking.client.get_metric_history(run.info.run_id, "val/auroc")
    assert len(history) == 2


@pytest.mark.slow
def test_an_ensemble_learns_together_and_predicts(uneven_shards: Path, tmp_path: Path) -> None:
    config = TrainConfig.parse(
        {
            "model": {"model_type": "ensemble", "architectures": ["lastro", "b=lastro@1"]},
            "training": {"epochs": 8, "batch_size": 16},
        },
        "test",
    )
    trained = _train(config, uneven_shards, tmp_path, system_type=LitEnsembleSystem)
    assert trained.curves["val/auroc"].max() > 0.9
    system = LitEnsembleSystem.load_from_checkpoint(trained.checkpoint)
    data = LensDataModule(uneven_shards)
    table = system.predict(data.test_dataloader())
    assert len(table) == 20
    assert list(table)[-2:] == ["probability_lastro", "probability_b"]
    assert table["probability"].between(0, 1).all()
    assert (table["std"] > 0).all()


def test_the_library_takes_paths_as_text(uneven_shards: Path, tmp_path: Path) -> None:
    here = f"{tmp_path}/new"
    trained = train(_config(epochs=1), LensDataModule(uneven_shards), f"{here}/member")
    assert TrainConfig.read(f"{here}/member/settings.yaml") == trained.config
    published = publish_shards(str(uneven_shards), "memory://text/lenses")
    shards = open_shards(published.url, cache=f"{here}/cache")
    assert len(shards.split("val").gather([0])) == 1
    members = {"lastro": (str(trained.checkpoint), trained.val_scores)}
    facts = {"dataset_version": published.dataset_version}
    model = assemble(members, shards.format, f"{here}/ensemble", facts, groups=[])
    source = open_cutout_source(str(uneven_shards), cache=f"{here}/cache")
    scored = score_to_file(model, source, f"{here}/scores.csv", model="mine")
    assert scored.n_scored == len(pd.read_csv(f"{here}/scores.csv")) == 131


def test_settings_are_plain_yaml(tmp_path: Path) -> None:
    config = _config(learning_rate=3e-4)
    assert TrainConfig.parse(yaml.safe_load(config.yaml), "test") == config
