"""A training that was killed goes on where it was, and ends as if nothing had happened."""

import json
import shutil
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
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint

from lens_pipeline.catalogue.build import build_dataset
from lens_pipeline.catalogue.table import read_catalogue
from lens_pipeline.errors import InputError
from lens_pipeline.models.system import LitLensSystem
from lens_pipeline.settings import Settings
from lens_pipeline.shards.datamodule import (
    CutoutModule,
    LensDataModule,
    LensWebDatasetDataModule,
)
from lens_pipeline.shards.prepare import prepare_shards
from lens_pipeline.tracking import Tracking
from lens_pipeline.training import TrainedMember, checkpoints, train
from lens_pipeline.training.callbacks import Patience
from lens_pipeline.training.checkpoints import BestCheckpoints
from lens_pipeline.training.config import TrainConfig
from lens_pipeline_tests.conftest import LENS_PIPELINE
from lens_pipeline_tests.training.killed import in_a_process


def _config(**training: Any) -> TrainConfig:
    return TrainConfig.parse(
        {
            "model": {"arch": "lastro"},
            "training": {"epochs": 3, "batch_size": 16, "save_every_n_steps": 3} | training,
        },
        "test",
    )


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
def test_killed_at_five_moments_the_weights_are_those_of_an_undisturbed_training(
    how: dict[str, Any], shards_folder: Path, tmp_path: Path
) -> None:
    config = _config(**how)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert in_a_process(config, shards_folder, undisturbed) == 0
    per_epoch = len(LensDataModule(shards_folder, batch_size=16).train_dataloader())
    random = np.random.default_rng(0)
    # In the first epoch, in the validation after it, in the last epoch, after it, and while it is
    # scored.
    first = int(random.integers(4, per_epoch))
    for at, when in (
        (first, "batch"),
        (per_epoch - 1, "validation"),
        (2 * per_epoch + 4, "batch"),
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
    config = _config(save_top_k=1, monitor="val/loss", **how)
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
    config = _config(save_top_k=before, epochs=5, monitor="val/loss")
    per_epoch = len(LensDataModule(shards_folder, batch_size=16).train_dataloader())
    assert in_a_process(config, shards_folder, tmp_path, 3 * per_epoch + 4, "batch") < 0
    going_on = _config(save_top_k=now, epochs=5, monitor="val/loss")
    trained = train(going_on, LensDataModule(shards_folder), tmp_path)
    best = trained.curves.sort_values("val/loss")["epoch"].tolist()
    assert torch.load(trained.checkpoint, weights_only=True)["epoch"] == best[0]
    others = sorted(path.name for path in (tmp_path / "top").glob("*"))
    # Of those that are one too many nothing is left; those since are kept.
    assert others == [] if now < before else 1 <= len(others) <= 2


def test_which_of_equally_good_epochs_was_the_better_one_is_not_forgotten(
    uneven_shards: Path, tmp_path: Path
) -> None:
    config = _config(epochs=4, monitor="val/auroc", save_top_k=2)
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
        def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
            written.append(trainer.global_step)
            time.sleep(0.3)

    config = _config(save_every_n_steps=per_epoch, epochs=3)
    train(config, LensDataModule(shards_folder), tmp_path, callbacks=[SlowDisk()])
    assert {per_epoch, 2 * per_epoch, 3 * per_epoch} <= set(written)


def test_what_lightnings_own_callbacks_have_written_is_understood() -> None:
    """Lightning finds the state of a callback by the name of its class."""
    assert Patience("val/loss").state_key == EarlyStopping("val/loss").state_key
    ours, theirs = (
        kind(dirpath="folder", monitor="val/loss", save_top_k=3)
        for kind in (BestCheckpoints, ModelCheckpoint)
    )
    assert ours.state_key == theirs.state_key
    theirs.best_k_models = {"folder/0.ckpt": torch.tensor(0.3), "folder/1.ckpt": torch.tensor(0.2)}
    theirs.best_model_path = "folder/1.ckpt"
    ours.load_state_dict(theirs.state_dict())
    assert ours.best_k_models.keys() == {
        str(Path("folder", name).absolute()) for name in ("0.ckpt", "1.ckpt")
    }
    assert Path(ours.best_model_path).name == "1.ckpt"


def test_a_training_that_has_stopped_early_does_not_go_on(
    shards_folder: Path, tmp_path: Path
) -> None:
    config = _config(epochs=9, patience=1, min_delta=1.0, monitor="val/auroc")
    assert in_a_process(config, shards_folder, tmp_path, 0, "end") == -signal.SIGKILL
    trained = train(config, LensDataModule(shards_folder), tmp_path)
    assert trained.curves["epoch"].tolist() == [0, 1]


def test_a_checkpoint_that_would_run_code_is_not_gone_on_from(
    shards_folder: Path, tmp_path: Path
) -> None:
    assert in_a_process(_config(), shards_folder, tmp_path, 5) == -signal.SIGKILL
    torch.save({"state_dict": Path(tmp_path)}, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=r"last\.ckpt: refused, as it could run code"):
        train(_config(), LensDataModule(shards_folder), tmp_path)


def test_an_optimiser_of_an_earlier_version_is_told(shards_folder: Path, tmp_path: Path) -> None:
    """Which let all parameters decay, in one group."""
    assert in_a_process(_config(), shards_folder, tmp_path, 5) == -signal.SIGKILL
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (optimiser,) = checkpoint["optimizer_states"]
    first, second = optimiser["param_groups"]
    optimiser["param_groups"] = [first | {"params": first["params"] + second["params"]}]
    torch.save(checkpoint, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match="the optimiser of an earlier version of lens_pipeline"):
        train(_config(), LensDataModule(shards_folder), tmp_path)


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


def test_other_settings_do_not_go_on(shards_folder: Path, tmp_path: Path) -> None:
    assert in_a_process(_config(), shards_folder, tmp_path, 5) == -signal.SIGKILL
    changed = _config(learning_rate=0.01, epochs=4)
    with pytest.raises(InputError, match=r"training\.epochs \(3, now 4\), training\.learning_rate"):
        train(changed, LensDataModule(shards_folder), tmp_path)
    assert (tmp_path / "last.ckpt").is_file()


def test_of_a_training_that_has_ended_only_the_same_is_taken_for_it(
    shards_folder: Path, tmp_path: Path
) -> None:
    data, start = LensDataModule(shards_folder), tmp_path / "start.ckpt"
    torch.save(LitLensSystem("lastro", image_size=32).state_dict(), start)
    config = _config(epochs=1).with_changes({"model": {"pretrained": str(start)}}, "test")
    out = tmp_path / "out"
    trained = train(config, data, out)
    settings = (out / "settings.yaml").read_text()
    (out / "last.ckpt").unlink()  # the largest file of a training that needs it no more
    start.unlink()
    assert train(config, data, out) == trained
    with pytest.raises(InputError, match=r"other settings: training\.seed"):
        train(config.with_changes({"training": {"seed": 9}}, "test"), data, out)
    assert (out / "settings.yaml").read_text() == settings
    (out / "best.ckpt").unlink()
    with pytest.raises(InputError, match=r"best\.ckpt: is not there any more"):
        train(config, data, out)


def test_another_device_is_gone_on_with_and_told(
    shards_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert in_a_process(_config(), shards_folder, tmp_path, 5) == -signal.SIGKILL
    inputs = tmp_path / "inputs.json"
    recorded = json.loads(inputs.read_text())
    assert recorded["device and precision"] == "cpu, 32-true"
    inputs.write_text(json.dumps(recorded | {"device and precision": "cuda, bf16-mixed"}))
    train(_config(), LensDataModule(shards_folder), tmp_path)
    assert "computed on cuda, bf16-mixed, and goes on on cpu, 32-true" in caplog.text


def _drawn_cutouts(folder: Path, kind: str, seed: int) -> CutoutModule:
    """Noise that follows from the seed, under ids and labels that do not, always in one place."""
    place = folder / kind
    shutil.rmtree(folder, ignore_errors=True)
    for path in (folder / "images", place):
        path.mkdir(parents=True)
    random = np.random.default_rng(seed)
    rows = []
    for split, n in (("train", 16), ("val", 8), ("test", 4)):
        for k in range(n):
            name = f"{split}{k}.npy"
            np.save(folder / "images" / name, random.normal(size=(1, 32, 32)).astype(np.float32))
            rows.append({"id": name, "path": f"images/{name}", "label": k % 2, "split": split})
    catalogue = folder / "catalogue.csv"
    pd.DataFrame(rows).to_csv(catalogue, index=False)
    if kind == "catalogue":
        return LensDataModule(catalogue, image_size=32, cache_dir=folder / "cache")
    if kind == "dataset":
        build_dataset(read_catalogue(catalogue), place, image_size=32)
        return LensDataModule(place)
    prepare_shards(str(catalogue), place, image_size=32)
    if kind == "shards":
        return LensDataModule(place)
    for path in place.glob("*.[jp]*"):  # the manifest and what stands beside it
        path.unlink()
    tars = (f"{place}/{split}-000000.tar" for split in ("train", "val", "test"))
    return LensWebDatasetDataModule(*tars)


@pytest.mark.parametrize("kind", ["catalogue", "dataset", "shards", "tars"])
def test_other_pixels_do_not_go_on(kind: str, tmp_path: Path) -> None:
    """Of the same ids and labels, in the same place: somebody has mended the sky's subtraction."""
    out, config = tmp_path / "out", _config(epochs=1, monitor="val/loss")
    train(config, _drawn_cutouts(tmp_path / "data", kind, 0), out)
    with pytest.raises(InputError, match=f"{out}: holds a training with other cutouts"):
        train(config, _drawn_cutouts(tmp_path / "data", kind, 1), out)


def test_a_folder_that_was_moved_keeps_its_best_epochs(shards_folder: Path, tmp_path: Path) -> None:
    config, data = _config(epochs=4, save_top_k=4), LensDataModule(shards_folder, batch_size=16)
    in_the_third = 2 * len(data.train_dataloader()) + 1
    folder = tmp_path / "here"
    assert in_a_process(config, shards_folder, folder, in_the_third) == -signal.SIGKILL
    trained = train(config, LensDataModule(shards_folder), folder.rename(tmp_path / "there"))
    epochs = [path.name for path in (trained.folder / "top").iterdir()]
    assert len(epochs) == 3  # and the best of the four
    assert (tmp_path / "there" / "best.ckpt").is_file()


def test_copies_of_tars_are_the_same_and_their_unit_counts(tmp_path: Path) -> None:
    def of(place: str, **more: Any) -> str:
        tars = [f"{tmp_path}/{place}/{split}-000000.tar" for split in ("train", "val", "test")]
        return LensWebDatasetDataModule(*tars, **more).content

    _drawn_cutouts(tmp_path, "tars", 0)
    shutil.copytree(tmp_path / "tars", tmp_path / "copied", copy_function=shutil.copyfile)
    assert of("copied") == of("tars")
    assert of("tars", flux_unit="background_sigma") != of("tars", flux_unit="linear")


def test_another_share_of_the_cutouts_does_not_go_on(shards_folder: Path, tmp_path: Path) -> None:
    assert in_a_process(_config(), shards_folder, tmp_path, 5) == -signal.SIGKILL
    with pytest.raises(InputError, match="holds a training with other order or share of the"):
        train(_config(), LensDataModule(shards_folder, bagging=0.5), tmp_path)


def test_cutouts_of_another_size_do_not_go_on(shards_folder: Path, tmp_path: Path) -> None:
    config = _config(epochs=1)
    train(config, LensDataModule(shards_folder), tmp_path)
    with pytest.raises(InputError, match="holds a training with other cutouts"):
        train(config, LensDataModule(shards_folder, image_size=24), tmp_path)


def test_first_weights_are_the_same_by_what_they_are(shards_folder: Path, tmp_path: Path) -> None:
    """Not by where they lie: a file may be moved, or be replaced by another."""
    data, out = LensDataModule(shards_folder), tmp_path / "out"

    def starting_from(weights: Path) -> TrainConfig:
        return _config(epochs=1).with_changes({"model": {"pretrained": str(weights)}}, "test")

    weights = tmp_path / "a.ckpt"
    torch.save(LitLensSystem("lastro", image_size=32).backbone.network.state_dict(), weights)
    train(starting_from(weights), data, out)
    moved = weights.rename(tmp_path / "b.ckpt")
    train(starting_from(moved), data, out)
    torch.save(LitLensSystem("lastro", image_size=32).backbone.network.state_dict(), moved)
    with pytest.raises(InputError, match="holds a training with other weights to start from"):
        train(starting_from(moved), data, out)


def test_what_an_earlier_version_has_begun_does_not_go_on(
    shards_folder: Path, tmp_path: Path
) -> None:
    assert in_a_process(_config(), shards_folder, tmp_path, 5) == -signal.SIGKILL
    (tmp_path / "inputs.json").unlink()
    with pytest.raises(InputError, match=f"{tmp_path}: an earlier version of lens_pipeline has"):
        train(_config(), LensDataModule(shards_folder), tmp_path)


def test_a_training_that_has_ended_is_not_begun_again(shards_folder: Path, tmp_path: Path) -> None:
    config = _config(epochs=1)
    data = LensDataModule(shards_folder)
    train(config, data, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.ckpt")}
    train(config, data, tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.ckpt")}
    best = tmp_path / "best.ckpt"
    with pytest.raises(InputError, match=rf"epochs \(1, now 2\); .* --pretrained {best}$"):
        train(_config(epochs=2), data, tmp_path)


def test_the_same_command_twice_trains_once(shards_folder: Path, tmp_path: Path) -> None:
    arguments = [
        *(LENS_PIPELINE, "train", "--arch", "lastro", "--epochs", "3", "--accelerator", "cpu"),
        *("--data-root", str(shards_folder), "--home", str(tmp_path / "home")),
    ]
    both = [
        subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    (first, told), (second, also_told) = (process.communicate(timeout=300) for process in both)
    assert [process.returncode for process in both] == [0, 0], told + also_told
    assert first == second
    assert (told + also_told).count("nothing is trained again") == 1
