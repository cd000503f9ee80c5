"""A training that was killed goes on where it was, and ends as if nothing had happened."""

import secrets
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback

from lens_pipeline.errors import InputError
from lens_pipeline.models.system import LitLensSystem
from lens_pipeline.settings import Settings
from lens_pipeline.shards.datamodule import LensDataModule
from lens_pipeline.tracking import Tracking
from lens_pipeline.training import TrainedMember, checkpoints, train
from lens_pipeline.training.checkpoints import BestCheckpoints
from lens_pipeline_tests.conftest import LENS_PIPELINE
from lens_pipeline_tests.training.killed import in_a_process, saving_config


def _state(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / name, weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {"shift": 2.0, "noise": 0.3},
        {
            **{"ema": 0.9, "accumulate_grad_batches": 2, "augment": False},
            **{"schedule": "plateau", "decay_epochs": 1, "learning_rate": 0.02},
        },
    ],
    ids=["augmented", "averaged"],
)
def test_killed_at_six_moments_the_weights_are_those_of_an_undisturbed_training(
    how: dict[str, Any], shards_folder: Path, tmp_path: Path
) -> None:
    config = saving_config(**how)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert in_a_process(config, shards_folder, undisturbed) == 0
    per_epoch = len(LensDataModule(shards_folder, batch_size=16).train_dataloader())
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # which a failure shows
    first, second, third = np.random.default_rng(seed).integers(4, per_epoch, 3).tolist()
    # At a step of each epoch, in the validation after the first, after the last, and while it is
    # scored.
    for at, when in (
        (first, "batch"),
        (per_epoch - 1, "validation"),
        (per_epoch + second, "batch"),
        (2 * per_epoch + third, "batch"),
        (3 * per_epoch - 1, "end"),
        (0, "finish"),
    ):
        code = in_a_process(config, shards_folder, killed, at, when)
        assert code == -signal.SIGKILL
    assert in_a_process(config, shards_folder, killed) == 0
    for name in ("best.ckpt", "last.ckpt"):
        theirs, ours = _state(undisturbed, name), _state(killed, name)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    pd.testing.assert_frame_equal(TrainedMember(undisturbed).curves, TrainedMember(killed).curves)
    pd.testing.assert_frame_equal(
        TrainedMember(undisturbed).val_scores, TrainedMember(killed).val_scores
    )


@pytest.mark.slow
def test_mlflow_shows_a_training_that_was_killed_as_one(
    shards_folder: Path, tmp_path: Path
) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    command = [
        *(LENS_PIPELINE, "train", "--data-root", str(shards_folder), "--home", str(home)),
        *("--checkpoint-dir", str(out), "--arch", "lastro", "--epochs", "6"),
        *("--loggers", "csv,mlflow", "--save-every-n-steps", "1"),
    ]
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 120
        while not any((out / "top").glob("epoch_00[1-9].ckpt")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
    assert not (out / "val_scores.parquet").exists()
    subprocess.run(command, check=True)
    tracking = Tracking(Settings.load(home=str(home)))
    (run,) = tracking.client.search_runs([tracking.experiment_id])
    assert run.info.status == "FINISHED"
    history = tracking.client.get_metric_history(run.info.run_id, "val/auroc")
    # Those of the epoch in which it was killed may have been told twice.
    values = {point.step: point.value for point in history}
    assert list(values.values()) == pytest.approx(TrainedMember(out).curves["val/auroc"].tolist())


def test_the_best_epoch_is_kept_until_a_better_one_is_known(
    uneven_shards: Path, tmp_path: Path
) -> None:
    """A training that goes on may not find the better one again: a GPU rounds as it likes."""

    class Worse(Callback):
        def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
            for weights in module.parameters():
                weights.data.zero_()

    how = {"learning_rate": 3e-3, "seed": 2, "epochs": 2}  # of which the second epoch is better
    config = saving_config(save_top_k=1, monitor="val/loss", **how)
    per_epoch = len(LensDataModule(uneven_shards, batch_size=16).train_dataloader())
    assert in_a_process(config, uneven_shards, tmp_path, 2 * per_epoch - 1, "last") < 0
    (better,) = (tmp_path / "top").glob("*1.ckpt")  # the second epoch, of which last.ckpt knows not
    trained = train(config, LensDataModule(uneven_shards), tmp_path, callbacks=[Worse()])
    assert trained.curves["val/loss"].idxmin() == 0
    assert torch.load(trained.checkpoint, weights_only=True)["epoch"] == 0
    assert not better.exists()


@pytest.mark.parametrize(("before", "now"), [(3, 1), (1, 3)])
def test_another_number_of_best_epochs_is_kept(
    before: int, now: int, shards_folder: Path, tmp_path: Path
) -> None:
    config = saving_config(save_top_k=before, epochs=5, monitor="val/loss")
    per_epoch = len(LensDataModule(shards_folder, batch_size=16).train_dataloader())
    assert in_a_process(config, shards_folder, tmp_path, 3 * per_epoch + 4, "batch") < 0
    going_on = saving_config(save_top_k=now, epochs=5, monitor="val/loss")
    trained = train(going_on, LensDataModule(shards_folder), tmp_path)
    best = trained.curves.sort_values("val/loss")["epoch"].tolist()
    assert torch.load(trained.checkpoint, weights_only=True)["epoch"] == best[0]
    others = sorted(path.name for path in (tmp_path / "top").glob("*"))
    # Of those that are one too many nothing is left; those since are kept.
    assert others == [] if now < before else 1 <= len(others) <= 2


def test_which_of_equally_good_epochs_was_the_better_one_is_not_forgotten(
    uneven_shards: Path, tmp_path: Path
) -> None:
    config = saving_config(epochs=4, monitor="val/auroc", save_top_k=2)
    per_epoch = len(LensDataModule(uneven_shards, batch_size=16).train_dataloader())
    assert in_a_process(config, uneven_shards, tmp_path, 2 * per_epoch + 4, "batch") < 0
    trained = train(config, LensDataModule(uneven_shards), tmp_path)
    assert trained.curves["val/auroc"].nunique() == 1
    best, second, *_ = trained.curves.sort_values("val/loss")["epoch"]
    assert torch.load(trained.checkpoint, weights_only=True)["epoch"] == best
    assert [path.name for path in (tmp_path / "top").iterdir()] == [f"epoch_{second:03d}.ckpt"]


def test_a_checkpoint_is_due_after_a_step_of_several_batches_in_several_processes(
    uneven_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "MINUTE", 0.0)
    monkeypatch.setattr(Trainer, "world_size", 2)  # they ask each other at every tenth batch alone
    written = []

    class Written(Callback):
        def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
            written.append(trainer.global_step)

    data = LensDataModule(uneven_shards, batch_size=2)
    steps = -(-len(data.train_dataloader()) // 2)
    out = tmp_path / "out"
    files = checkpoints.RenamedCheckpoints()
    best = BestCheckpoints(monitor="val/loss", dirpath=out, save_weights_only=True)
    last = checkpoints.LastCheckpoint(out / "last.ckpt", 0, best, files)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=2,
        callbacks=[Written(), last],
        plugins=[files],
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(LitLensSystem("lastro", image_size=32), data)
    assert written == [*range(5, steps, 5), steps]


def test_a_checkpoint_that_is_due_at_the_end_of_an_epoch_is_written_after_it(
    shards_folder: Path, tmp_path: Path
) -> None:
    per_epoch = len(LensDataModule(shards_folder, batch_size=16).train_dataloader())
    written = []

    class SlowDisk(Callback):
        validated = 0

        def on_validation_end(self, *_: Any) -> None:
            self.validated += 1

        def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
            written.append((trainer.global_step, self.validated))
            time.sleep(0.3)

    config = saving_config(save_every_n_steps=per_epoch, epochs=3)
    train(config, LensDataModule(shards_folder), tmp_path, callbacks=[SlowDisk()])
    assert written == [(number * per_epoch, number) for number in (1, 2, 3)]


def test_a_training_that_has_stopped_early_does_not_go_on(
    shards_folder: Path, tmp_path: Path
) -> None:
    config = saving_config(epochs=9, patience=1, min_delta=1.0, monitor="val/auroc")
    assert in_a_process(config, shards_folder, tmp_path, 0, "end") == -signal.SIGKILL
    trained = train(config, LensDataModule(shards_folder), tmp_path)
    assert trained.curves["epoch"].tolist() == [0, 1]


def test_a_checkpoint_that_would_run_code_is_not_gone_on_from(
    shards_folder: Path, tmp_path: Path
) -> None:
    assert in_a_process(saving_config(), shards_folder, tmp_path, 5) == -signal.SIGKILL
    torch.save({"state_dict": Path(tmp_path)}, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=r"last\.ckpt: refused, as it could run code"):
        train(saving_config(), LensDataModule(shards_folder), tmp_path)


def test_an_optimiser_of_an_earlier_version_is_told(shards_folder: Path, tmp_path: Path) -> None:
    """Which let all parameters decay, in one group."""
    assert in_a_process(saving_config(), shards_folder, tmp_path, 5) == -signal.SIGKILL
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (optimiser,) = checkpoint["optimizer_states"]
    first, second = optimiser["param_groups"]
    optimiser["param_groups"] = [first | {"params": first["params"] + second["params"]}]
    torch.save(checkpoint, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match="the optimiser of an earlier version of lens_pipeline"):
        train(saving_config(), LensDataModule(shards_folder), tmp_path)


def test_optimisers_of_ones_own_are_gone_on_with(shards_folder: Path, tmp_path: Path) -> None:
    class Own(LitLensSystem):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    def trainer(steps: int) -> Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return Trainer(max_steps=steps, accelerator="cpu", default_root_dir=tmp_path, **quiet)

    data = LensDataModule(shards_folder, batch_size=16)
    first = trainer(2)
    first.fit(Own("lastro", image_size=32), data)
    first.save_checkpoint(tmp_path / "own.ckpt", weights_only=False)
    again = trainer(4)
    again.fit(Own("lastro", image_size=32), data, ckpt_path=tmp_path / "own.ckpt")
    assert again.global_step == 4
    again.validate(LitLensSystem("lastro", image_size=32), data, ckpt_path=tmp_path / "own.ckpt")


def test_a_folder_that_was_moved_keeps_its_best_epochs(shards_folder: Path, tmp_path: Path) -> None:
    config, data = (
        saving_config(epochs=4, save_top_k=4),
        LensDataModule(shards_folder, batch_size=16),
    )
    in_the_third = 2 * len(data.train_dataloader()) + 1
    folder = tmp_path / "here"
    assert in_a_process(config, shards_folder, folder, in_the_third) == -signal.SIGKILL
    trained = train(config, LensDataModule(shards_folder), folder.rename(tmp_path / "there"))
    epochs = [path.name for path in (trained.folder / "top").iterdir()]
    assert len(epochs) == 3  # and the best of the four
    assert (tmp_path / "there" / "best.ckpt").is_file()
