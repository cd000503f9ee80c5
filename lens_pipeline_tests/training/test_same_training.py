"""Which training a folder holds: one that differs does not go on there, and the same is not begun
again."""

import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lens_pipeline.catalogue.build import build_dataset
from lens_pipeline.catalogue.table import read_catalogue
from lens_pipeline.errors import InputError
from lens_pipeline.models.system import LitLensSystem
from lens_pipeline.shards.datamodule import (
    CutoutModule,
    LensDataModule,
    LensWebDatasetDataModule,
)
from lens_pipeline.shards.prepare import prepare_shards
from lens_pipeline.training import train
from lens_pipeline.training.config import TrainConfig
from lens_pipeline_tests.conftest import LENS_PIPELINE
from lens_pipeline_tests.training.killed import in_a_process, saving_config


def test_other_settings_do_not_go_on(shards_folder: Path, tmp_path: Path) -> None:
    assert in_a_process(saving_config(), shards_folder, tmp_path, 5) == -signal.SIGKILL
    changed = saving_config(learning_rate=0.01, epochs=4)
    with pytest.raises(InputError, match=r"training\.epochs \(3, now 4\), training\.learning_rate"):
        train(changed, LensDataModule(shards_folder), tmp_path)
    assert (tmp_path / "last.ckpt").is_file()


def test_of_a_training_that_has_ended_only_the_same_is_taken_for_it(
    shards_folder: Path, tmp_path: Path
) -> None:
    data, start = LensDataModule(shards_folder), tmp_path / "start.ckpt"
    torch.save(LitLensSystem("lastro", image_size=32).state_dict(), start)
    config = saving_config(epochs=1).with_changes({"model": {"pretrained": str(start)}}, "test")
    out = tmp_path / "out"
    trained = train(config, data, out)
    settings = (out / "settings.yaml").read_text()
    (out / "last.ckpt").unlink()  # the largest file of a training that needs it no more
    start.unlink()
    assert train(config, data, out) == trained
    # What decides no weights may be another, and is not taken for what was done.
    assert train(config.with_changes({"training": {"save_top_k": 9}}, "test"), data, out) == trained
    assert (out / "settings.yaml").read_text() == settings
    with pytest.raises(InputError, match=r"other settings: training\.seed"):
        train(config.with_changes({"training": {"seed": 9}}, "test"), data, out)
    assert (out / "settings.yaml").read_text() == settings
    (out / "best.ckpt").unlink()
    with pytest.raises(InputError, match=r"best\.ckpt: is not there any more"):
        train(config, data, out)


def test_one_batch_is_not_all_of_them(shards_folder: Path, tmp_path: Path) -> None:
    data = LensDataModule(shards_folder)
    train(saving_config(epochs=1, limit_train_batches=1.0), data, tmp_path)
    with pytest.raises(InputError, match=r"training\.limit_train_batches \(1\.0, now 1\)"):
        train(saving_config(epochs=1, limit_train_batches=1), data, tmp_path)


def test_another_device_is_gone_on_with_and_told(
    shards_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert in_a_process(saving_config(), shards_folder, tmp_path, 5) == -signal.SIGKILL
    inputs = tmp_path / "inputs.json"
    recorded = json.loads(inputs.read_text())
    assert recorded["device and precision"] == "cpu, 32-true"
    inputs.write_text(json.dumps(recorded | {"device and precision": "cuda, bf16-mixed"}))
    train(saving_config(), LensDataModule(shards_folder), tmp_path)
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
    out, config = tmp_path / "out", saving_config(epochs=1, monitor="val/loss")
    train(config, _drawn_cutouts(tmp_path / "data", kind, 0), out)
    with pytest.raises(InputError, match=f"{out}: holds a training with other cutouts"):
        train(config, _drawn_cutouts(tmp_path / "data", kind, 1), out)


def test_copies_of_tars_are_the_same_and_their_unit_counts(tmp_path: Path) -> None:
    def of(place: str, **more: Any) -> str:
        tars = [f"{tmp_path}/{place}/{split}-000000.tar" for split in ("train", "val", "test")]
        return LensWebDatasetDataModule(*tars, **more).content

    _drawn_cutouts(tmp_path, "tars", 0)
    shutil.copytree(tmp_path / "tars", tmp_path / "copied", copy_function=shutil.copyfile)
    assert of("copied") == of("tars")
    assert of("tars", flux_unit="background_sigma") != of("tars", flux_unit="linear")


def test_another_share_of_the_cutouts_does_not_go_on(shards_folder: Path, tmp_path: Path) -> None:
    assert in_a_process(saving_config(), shards_folder, tmp_path, 5) == -signal.SIGKILL
    with pytest.raises(InputError, match="holds a training with other order or share of the"):
        train(saving_config(), LensDataModule(shards_folder, bagging=0.5), tmp_path)


def test_cutouts_of_another_size_do_not_go_on(shards_folder: Path, tmp_path: Path) -> None:
    config = saving_config(epochs=1)
    train(config, LensDataModule(shards_folder), tmp_path)
    with pytest.raises(InputError, match="holds a training with other cutouts"):
        train(config, LensDataModule(shards_folder, image_size=24), tmp_path)


def test_first_weights_are_the_same_by_what_they_are(shards_folder: Path, tmp_path: Path) -> None:
    """Not by where they lie: a file may be moved, or be replaced by another."""
    data, out = LensDataModule(shards_folder), tmp_path / "out"

    def starting_from(weights: Path) -> TrainConfig:
        return saving_config(epochs=1).with_changes({"model": {"pretrained": str(weights)}}, "test")

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
    assert in_a_process(saving_config(), shards_folder, tmp_path, 5) == -signal.SIGKILL
    (tmp_path / "inputs.json").unlink()
    with pytest.raises(InputError, match=f"{tmp_path}: an earlier version of lens_pipeline has"):
        train(saving_config(), LensDataModule(shards_folder), tmp_path)


def test_a_training_that_has_ended_is_not_begun_again(shards_folder: Path, tmp_path: Path) -> None:
    config = saving_config(epochs=1)
    data = LensDataModule(shards_folder)
    train(config, data, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.ckpt")}
    train(config, data, tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.ckpt")}
    best = tmp_path / "best.ckpt"
    with pytest.raises(InputError, match=rf"epochs \(1, now 2\); .* --pretrained {best}$"):
        train(saving_config(epochs=2), data, tmp_path)


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
