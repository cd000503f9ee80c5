"""What the loggers of a training are told."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback

from lens_pipeline import LitLensSystem
from lens_pipeline.cli import main
from lens_pipeline.errors import InputError
from lens_pipeline.settings import Settings
from lens_pipeline.tracking import Tracking
from lens_pipeline_tests.conftest import LENS_PIPELINE
from lens_pipeline_tests.training.small import small_config, train_on


def test_every_logger_is_told(
    uneven_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = small_config(epochs=1, loggers=("csv", "tensorboard", "wandb"))
    for name in ("one", "another of the same process"):
        train_on(config, uneven_shards, tmp_path / name)
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
    config = small_config(epochs=1, loggers=("csv", "wandb"), save_every_n_steps=1)

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                raise InputError("stopped")

    with pytest.raises(InputError, match="stopped"):
        train_on(config, uneven_shards, tmp_path, Stop())
    train_on(config, uneven_shards, tmp_path)
    files = list((tmp_path / "logs").glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1  # by the run's id


def test_a_home_may_have_any_name(tmp_path: Path) -> None:
    tracking = Tracking(Settings.load(home=str(tmp_path / 'o\'brien "x"')))
    run = tracking.start_run("a", "key", {})
    found = tracking.find_run("key")
    assert found is not None
    assert found.info.run_id == run
    assert Tracking(Settings.load(home=str(tmp_path / "other"))).find_run("key") is None


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


def test_mlflow_is_told_of_a_training(uneven_shards: Path, tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    flags = ["--arch", "lastro", "--epochs", "2", "--batch-size", "16", "--loggers", "csv,mlflow"]
    assert main(["train", "--data-root", str(uneven_shards), "--home", home, *flags]) == 0
    tracking = Tracking(Settings.load(home=home))
    (run,) = tracking.client.search_runs([tracking.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.arch"] == "lastro"
    history = tracking.client.get_metric_history(run.info.run_id, "val/auroc")
    assert len(history) == 2


def test_mlflow_is_told_of_the_batch_size_that_was_found(
    uneven_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = LitLensSystem.training_step

    def limited(system: LitLensSystem, batch: dict[str, torch.Tensor], number: int) -> Any:
        if len(batch["image"]) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(system, batch, number)

    monkeypatch.setattr(LitLensSystem, "training_step", limited)
    home = str(tmp_path / "home")
    flags = ["--arch", "lastro", "--epochs", "1", "--batch-size", "16", "--find-batch-size"]
    command = ["train", "--data-root", str(uneven_shards), "--home", home, *flags]
    assert main([*command, "--loggers", "csv,mlflow"]) == 0
    tracking = Tracking(Settings.load(home=home))
    (run,) = tracking.client.search_runs([tracking.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["training.batch_size"] == "8"
