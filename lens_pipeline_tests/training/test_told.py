"""What a training tells while it goes on: losses, rates, the bar."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger

from lens_pipeline import LitLensSystem
from lens_pipeline_tests.training.small import small_config, train_on


@pytest.mark.parametrize(
    ("how", "steps"),
    [
        ({"batch_size": 16}, [4, 8]),  # the last of five steps is of another kind
        ({"batch_size": 8, "accumulate_grad_batches": 4}, [2, 4, 6]),
        ({"batch_size": 4, "limit_train_batches": 3}, [3, 6]),
    ],
)
def test_an_epoch_of_a_few_steps_tells_its_loss_and_rate(
    how: dict[str, int], steps: list[int], uneven_shards: Path, tmp_path: Path
) -> None:
    """Far fewer than lie between two lines of a long training."""
    train_on(small_config(**how), uneven_shards, tmp_path)
    (file,) = tmp_path.rglob("metrics.csv")
    told = pd.read_csv(file)
    assert told.loc[told["train/loss_step"].notna(), "step"].tolist() == steps
    rates = told.filter(like="lr-").stack().dropna()
    assert len(rates) >= 2
    assert rates.between(0, 1e-3).all()


def test_the_bar_shows_the_epoch_and_the_loss(
    uneven_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    train_on(small_config(), uneven_shards, tmp_path)
    shown = "".join(capsys.readouterr())
    assert re.search(r"epoch 1/2: .*5/5 .*loss=0\.\d{3}", shown)
    assert "epoch 2/2: " in shown


def test_the_loss_of_a_step_is_that_of_its_cutouts_however_many_batches_make_one(
    uneven_shards: Path, tmp_path: Path
) -> None:
    """Lightning divides it among them. The 71 cutouts are 8 batches of 8 and one of 7."""
    losses: list[float] = []

    class Losses(LitLensSystem):
        def loss(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            found = super().loss(logits, label)
            if self.training:
                losses.append(float(found))
            return found

    config = small_config(epochs=1, batch_size=8, accumulate_grad_batches=4)
    train_on(config, uneven_shards, tmp_path, system_type=Losses)
    (file,) = tmp_path.rglob("metrics.csv")
    told = pd.read_csv(file).set_index("step")["train/loss_step"].dropna()
    assert told.index.tolist() == [2]
    assert told[2] == pytest.approx(losses[7])


def test_a_training_that_goes_on_tells_no_step_twice(uneven_shards: Path, tmp_path: Path) -> None:
    """It goes on in the middle of an epoch, whose first batch is half of a step."""

    class Often(Callback):
        def on_fit_start(self, trainer: Trainer, *_: Any) -> None:
            trainer.log_every_n_steps = 1  # type: ignore[attr-defined]

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 2 and not trainer.fit_loop.epoch_loop._should_accumulate():
                raise KeyboardInterrupt

    config = small_config(epochs=1, batch_size=8, accumulate_grad_batches=2, save_every_n_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train_on(config, uneven_shards, tmp_path, Stop())
    told: list[int] = []

    class Told(Logger):
        name, version = "told", "0"

        def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if "train/loss_step" in metrics and step is not None:
                told.append(step)

    train_on(config, uneven_shards, tmp_path, Often(), loggers=[Told()])
    assert told == [2, 3, 4, 5]  # the second step was not kept


def test_a_step_of_the_users_own_may_tell_its_loss_alone(
    uneven_shards: Path, tmp_path: Path
) -> None:
    class Own(LitLensSystem):
        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx)["loss"]

    config = small_config(epochs=1)
    trained = train_on(config, uneven_shards, tmp_path, system_type=Own)
    assert len(trained.curves) == 1
