"""What GPUs would be asked for, as far as it can be told without any."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lens_pipeline import LensDataModule
from lens_pipeline.training import trainer
from lens_pipeline.training.config import TrainConfig
from lens_pipeline.training.devices import resolved_precision


def config(**hardware: Any) -> TrainConfig:
    return TrainConfig.parse({"hardware": hardware}, "test")


@pytest.mark.parametrize(
    ("available", "bf16", "precision"),
    [(True, True, "bf16-mixed"), (True, False, "16-mixed"), (False, True, "32-true")],
)
def test_the_precision_is_that_of_the_device(
    available: bool, bf16: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated=True: bf16)
    assert resolved_precision(config()) == precision
    assert resolved_precision(config(precision="32-true")) == "32-true"


@pytest.mark.parametrize(
    ("on_gpu", "devices", "together"), [(True, 2, True), (True, 1, False), (False, 2, False)]
)
def test_batch_statistics_are_those_of_all_gpus(
    on_gpu: bool,
    devices: int,
    together: bool,
    uneven_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A CPU refuses to bring them together."""
    asked: dict[str, Any] = {}
    loop = SimpleNamespace(epoch_loop=SimpleNamespace())
    made = SimpleNamespace(_signal_connector=SimpleNamespace(), fit_loop=loop)
    monkeypatch.setattr(trainer, "on_gpu", lambda config: on_gpu)
    monkeypatch.setattr(trainer.pl, "Trainer", lambda **how: asked.update(how) or made)
    data = LensDataModule(uneven_shards, batch_size=4)
    chosen = config(devices=devices, precision="32-true")
    trainer.make_trainer(chosen, data, tmp_path, callbacks=[], plugins=[])
    assert asked["sync_batchnorm"] == together
