"""What a machine or a schedule cannot do is told before anything is trained."""

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback

from lens_pipeline import LensDataModule, LitLensSystem
from lens_pipeline.cli import main
from lens_pipeline.errors import InputError
from lens_pipeline_tests.training.small import small_config, train_on


def test_accelerators_that_are_not_supported_are_not_taken(
    uneven_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Apple's, which knows no float64."""
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("platform.processor", lambda: "arm")
    config = small_config(fast_dev_run=True)
    assert config.hardware.accelerator == "auto"
    seen: list[str] = []

    class Device(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append(pl_module.device.type)

    train_on(config, uneven_shards, tmp_path, Device())
    assert seen == ["cuda" if torch.cuda.is_available() else "cpu"]


def test_more_processes_than_cores_are_not_begun(uneven_shards: Path, tmp_path: Path) -> None:
    many = {"hardware": {"devices": 1024, "accelerator": "cpu"}}
    with pytest.raises(InputError, match=r"hardware\.devices 1024: this process has \d+ cores"):
        train_on(small_config().with_changes(many, "test"), uneven_shards, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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


def test_what_a_schedule_must_know_is_asked_for(uneven_shards: Path) -> None:
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
    for name, warmup in (("cosine", 0.0), ("constant", 0.1), ("plateau", 0.1)):
        system = LitLensSystem("lastro", image_size=32, schedule=name, warmup=warmup)
        with pytest.raises(InputError, match="how many epochs .*give max_epochs or max_steps"):
            Trainer(**quiet, max_epochs=-1, max_time=timedelta(seconds=0.1)).fit(system, data)
    for name in ("constant", "plateau", "step"):
        system = LitLensSystem("lastro", image_size=32, schedule=name, warmup=0)
        trainer = Trainer(**quiet, max_epochs=-1, max_time=timedelta(seconds=0.1))
        trainer.fit(system, data)
        assert trainer.global_step > 0
