"""Every snippet and command of the training guide, with `lens_pipeline` in place of its `src`."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torchmetrics import Metric

from lens_pipeline import (
    LensDataModule,
    LensWebDatasetDataModule,
    LitEnsembleSystem,
    LitLensSystem,
    set_seed,
)
from lens_pipeline.cli import main
from lens_pipeline.errors import InputError
from lens_pipeline.shards import read_manifest
from lens_pipeline.training.config import TrainConfig
from lens_pipeline_tests.object_stores import S3Server

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL: dict[str, Any] = {
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "accelerator": "cpu",
}


@pytest.fixture(autouse=True)
def newest(uneven_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shards of a LENS_HOME, which modules without a place use; the working directory."""
    home = tmp_path / "home"
    shutil.copytree(uneven_shards, home / "shards" / "version")
    monkeypatch.setenv("LENS_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    return home / "shards" / "version"


def _command(*arguments: str) -> int:
    quick = ["--epochs", "1", "--limit-train-batches", "2", "--batch-size", "8"]
    return main(["train", *arguments, *quick, "--accelerator", "cpu"])


def test_guide_local_training(newest: Path) -> None:
    assert _command("--data-root", str(newest), "--arch", "resnet18") == 0


@pytest.mark.slow
def test_guide_two_devices(newest: Path) -> None:
    place = ["--data-root", str(newest)]
    two = ["--devices", "2", "--strategy", "ddp"]
    assert _command(*place, "--arch", "trans_enc_s", *two) == 0
    ensemble = ["--model-type", "ensemble", "--archs", "light_transformer,trans_enc_s"]
    assert _command(*place, *ensemble, "--devices", "2") == 0


@pytest.mark.slow
def test_guide_the_ensemble_of_its_three(newest: Path) -> None:
    assert _command("--data-root", str(newest), "--model-type", "ensemble") == 0
    names = ["--archs", "resnet18,resnet34,vit_b_16"]
    assert _command("--data-root", str(newest), "--model-type", "ensemble", *names) == 0


def test_guide_prepare_and_train_in_the_cloud(
    newest: Path, s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    monkeypatch.setenv("LENS_STORAGE_OPTIONS", json.dumps(s3_server.storage_options()))
    bucket = f"{s3_bucket}/lens-data"
    publish = ["--output-dir", str(newest), "--cloud-url", bucket, "--upload-only"]
    assert main(["prepare", *publish]) == 0
    patterns = read_manifest(newest).patterns(bucket)  # resolved by latest.json
    urls = ["--train-urls", patterns["train"], "--val-urls", patterns["val"]]
    assert _command("--use-webdataset", *urls, "--arch", "lastro", "--devices", "1") == 0
    data = LensWebDatasetDataModule(
        train_urls=patterns["train"],
        batch_size=64,
        num_workers=0,
        cache_dir="wds_cache",
        storage_options=s3_server.storage_options(),
    )
    assert sum(len(batch["label"]) for batch in data.train_dataloader()) == 71
    # The guide's jobs on EC2 and in the cloud name the training tars alone.
    assert _command("--use-webdataset", *urls[:2], "--arch", "lastro", "--devices", "1") == 0


def test_guide_tars_that_are_not_named(newest: Path, tmp_path: Path) -> None:
    data = LensWebDatasetDataModule(batch_size=64, cache_dir="wds_cache")
    Trainer(**SMALL).fit(LitLensSystem("lastro"), data)
    assert len(data.split("test")) == 20
    alone = tmp_path / "alone"
    alone.mkdir()
    for tar in newest.glob("train-*.tar"):
        shutil.copy(tar, alone)
    pattern = str(alone / Path(read_manifest(newest).patterns("")["train"]).name)
    with pytest.raises(InputError, match="val_urls: not given, and no manifest beside"):
        LensWebDatasetDataModule(train_urls=pattern, cache_dir="wds_cache").val_dataloader()


def test_guide_seeds() -> None:
    set_seed(42)
    first = torch.rand(3)
    set_seed(42)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.slow
def test_guide_a_compiled_model() -> None:
    model = LitLensSystem(arch="resnet18", compile_model=True)
    Trainer(**SMALL | {"num_sanity_val_steps": 2}, limit_train_batches=2).fit(
        model, LensDataModule(batch_size=16)
    )


def test_guide_four_gpus_are_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.device_count() >= 4:
        pytest.skip("this machine has four")
    assert main(["train", "--config", str(CONFIGS / "cloud.yaml")]) == 2
    assert "hardware.devices 4: this machine has" in capsys.readouterr().err
    with pytest.raises(MisconfigurationException, match="gpu"):
        Trainer(devices=4, accelerator="gpu", strategy="ddp", precision="bf16-mixed")


@pytest.mark.gpu
def test_guide_what_the_gpu_can() -> None:
    precision = "bf16-mixed" if torch.cuda.get_device_capability()[0] >= 8 else "16-mixed"
    batch_size = 128 if torch.cuda.get_device_properties(0).total_memory > 16e9 else 64
    trainer = Trainer(**SMALL | {"accelerator": "gpu"}, precision=precision, fast_dev_run=True)
    trainer.fit(LitLensSystem("lastro"), LensDataModule(batch_size=batch_size))


def test_guide_configurations_are_valid() -> None:
    local, cloud, ensemble = (
        TrainConfig.read(CONFIGS / f"{name}.yaml") for name in ("local", "cloud", "ensemble")
    )
    assert (local.model.arch, local.training.learning_rate) == ("resnet18", 3e-4)
    assert local.hardware.precision == "auto"
    assert (cloud.model.compile_model, cloud.hardware.strategy) == (True, "ddp")
    assert cloud.data.use_webdataset
    assert ensemble.model.architectures == ("resnet18", "resnet34", "vit_b_16")
    assert ensemble.model.ensemble_strategy == "uncertainty_weighted"


def test_guide_module_and_data_are_fitted() -> None:
    pl.seed_everything(42)
    model = LitLensSystem(arch="resnet18", lr=3e-4, weight_decay=1e-4, dropout_rate=0.5)
    datamodule = LensDataModule(batch_size=64, num_workers=0)
    trainer = Trainer(**SMALL, precision="32-true")
    trainer.fit(model, datamodule)
    logged = trainer.callback_metrics
    for name in ("loss", "accuracy", "precision", "recall", "f1"):
        assert f"train/{name}" in logged
        assert f"val/{name}" in logged
    assert {"val/auroc", "val/average_precision", "val/tpr0", "val/tpr10"} < set(logged)
    trainer.test(model, datamodule, verbose=False)
    assert "test/auroc" in trainer.callback_metrics


def test_guide_pretrained_without_a_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", "torch")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing answers there
    with pytest.raises(InputError, match="no network to fetch them.*set pretrained to a file"):
        LitLensSystem(arch="resnet18", pretrained=True)


def test_guide_without_shards_names_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LENS_HOME", str(tmp_path / "empty"))
    with pytest.raises(InputError, match=f"{tmp_path / 'empty'}: holds no shards"):
        Trainer(**SMALL).fit(LitLensSystem(image_size=32), LensDataModule())


def test_guide_other_bands_are_told() -> None:
    with pytest.raises(InputError, match="bands: the network was made for 5, and the cutouts"):
        Trainer(**SMALL).fit(LitLensSystem("lastro", bands=5), LensDataModule())


def test_guide_loggers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    loggers = [
        CSVLogger("logs", name="csv"),
        TensorBoardLogger("logs", name="tensorboard"),
        WandbLogger(project="lens-classification", save_dir="logs"),
    ]
    trainer = Trainer(**SMALL | {"logger": loggers}, limit_train_batches=1)
    trainer.fit(LitLensSystem("lastro"), LensDataModule())
    loggers[-1].experiment.finish()
    assert list(Path("logs").glob("csv/*/metrics.csv"))
    assert list(Path("logs").glob("tensorboard/*/events*"))


def test_guide_callbacks_and_checkpoints() -> None:
    seen = []

    class CustomCallback(Callback):
        def on_validation_epoch_end(self, trainer: Trainer, pl_module: pl.LightningModule) -> None:
            seen.append(trainer.current_epoch)

    checkpoint = ModelCheckpoint(
        dirpath="checkpoints",
        filename="{epoch:02d}-{val/auroc:.4f}",
        monitor="val/auroc",
        mode="max",
        save_top_k=3,
        save_last=True,
    )
    early = EarlyStopping(monitor="val/auroc", mode="max", patience=10, min_delta=1e-4)
    callbacks = [CustomCallback(), checkpoint, early]
    trainer = Trainer(
        **SMALL | {"max_epochs": 2, "enable_checkpointing": True}, callbacks=callbacks
    )
    trainer.fit(LitLensSystem("lastro"), LensDataModule())
    assert seen == [0, 1]
    assert len(list(Path("checkpoints").rglob("*auroc*.ckpt"))) == 2
    restored = LitLensSystem.load_from_checkpoint(checkpoint.best_model_path)
    assert restored.hparams["arch"] == "lastro"


def test_guide_ensemble_inference() -> None:
    how = ["--model-type", "ensemble", "--archs", "lastro,trans_enc_s"]
    assert _command(*how, "--checkpoint-dir", "checkpoints/ensemble") == 0
    ensemble = LitEnsembleSystem.load_from_checkpoint("checkpoints/ensemble/best.ckpt")
    predictions = ensemble.predict(LensDataModule().test_dataloader())
    assert len(predictions) == 20
    assert predictions["probability_trans_enc_s"].between(0, 1).all()


def test_guide_custom_metric() -> None:
    class CustomMetric(Metric):
        def __init__(self) -> None:
            super().__init__()
            self.add_state("correct", default=torch.tensor(0), dist_reduce_fx="sum")
            self.add_state("total", default=torch.tensor(0), dist_reduce_fx="sum")

        def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
            self.correct += ((preds > 0) == (target == 1)).sum()
            self.total += len(target)

        def compute(self) -> torch.Tensor:
            return self.correct.float() / self.total

    metric = CustomMetric()
    model = LitLensSystem("lastro").eval()
    for batch in LensDataModule().val_dataloader():
        metric.update(model(batch["image"].float()), batch["label"])
    assert 0 <= metric.compute() <= 1
    assert metric.total == 40


def test_guide_hyperparameters_with_optuna() -> None:
    optuna = pytest.importorskip("optuna")

    def objective(trial: Any) -> float:
        lr = trial.suggest_float("lr", 1e-5, 1e-2, log=True)
        batch_size = trial.suggest_categorical("batch_size", [32, 64])
        trainer = Trainer(**SMALL, limit_train_batches=1)
        trainer.fit(LitLensSystem("lastro", lr=lr), LensDataModule(batch_size=batch_size))
        return float(trainer.callback_metrics["val/auroc"])

    study = optuna.create_study(direction="maximize")
    study.optimize(objective, n_trials=2)
    assert 0 <= study.best_value <= 1


def test_guide_debug_mode_and_accumulation() -> None:
    Trainer(**SMALL, fast_dev_run=True).fit(LitLensSystem("lastro"), LensDataModule())
    limited = Trainer(
        **SMALL, limit_train_batches=10, limit_val_batches=5, accumulate_grad_batches=4
    )
    limited.fit(LitLensSystem("lastro"), LensDataModule(batch_size=8))
    assert limited.global_step == 3  # of nine batches
    assert main(["train", "--fast-dev-run", "--arch", "lastro", "--accelerator", "cpu"]) == 0


def test_guide_loader_arguments() -> None:
    data = LensDataModule(
        batch_size=16, num_workers=1, pin_memory=True, persistent_workers=True, image_size=24
    )
    assert data.image_size == 24
    assert next(iter(data.val_dataloader()))["image"].shape == (16, 3, 24, 24)
