"""Which training a folder holds: one that differs does not go on there, and the same is not begun
again."""

import json
import shutil
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lens_pipeline.catalogue.build import build_dataset
from lens_pipeline.catalogue.table import read_catalogue
from lens_pipeline.cli import main
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
from lens_pipeline_tests.training.killed import begun, exit_code, in_a_process, saving_config

all_of_one_epoch = partial(saving_config, epochs=1, limit_train_batches=1.0)


@pytest.fixture(scope="module")
def of_killed(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training leaves that was killed at its sixth step."""
    out = tmp_path_factory.mktemp("killed")
    assert in_a_process(saving_config(), shards_folder, out, 5) == -signal.SIGKILL
    return out


@pytest.fixture
def killed(of_killed: Path, tmp_path: Path) -> Path:
    """A copy of `of_killed`."""
    return Path(shutil.copytree(of_killed, tmp_path / "killed"))


@pytest.fixture(scope="module")
def of_ended(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training of one epoch leaves."""
    out = tmp_path_factory.mktemp("ended")
    train(all_of_one_epoch(), LensDataModule(shards_folder), out)
    return out


@pytest.fixture
def ended(of_ended: Path, tmp_path: Path) -> Path:
    """A copy of `of_ended`."""
    return Path(shutil.copytree(of_ended, tmp_path / "ended"))


def test_other_settings_do_not_go_on(shards_folder: Path, killed: Path) -> None:
    changed = saving_config(learning_rate=0.01, epochs=4)
    with pytest.raises(InputError, match=r"training\.epochs \(3, now 4\), training\.learning_rate"):
        train(changed, LensDataModule(shards_folder), killed)
    assert (killed / "last.ckpt").is_file()


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


def test_one_batch_is_not_all_of_them(shards_folder: Path, ended: Path) -> None:
    with pytest.raises(InputError, match=r"training\.limit_train_batches \(1\.0, now 1\)"):
        train(all_of_one_epoch(limit_train_batches=1), LensDataModule(shards_folder), ended)


def test_another_device_is_gone_on_with_and_told(
    shards_folder: Path, killed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = killed / "inputs.json"
    recorded = json.loads(inputs.read_text())
    assert recorded["device and precision"] == "cpu, 32-true"
    inputs.write_text(json.dumps(recorded | {"device and precision": "cuda, bf16-mixed"}))
    train(saving_config(), LensDataModule(shards_folder), killed)
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


def test_another_share_of_the_cutouts_does_not_go_on(shards_folder: Path, killed: Path) -> None:
    with pytest.raises(InputError, match="holds a training with other order or share of the"):
        train(saving_config(), LensDataModule(shards_folder, bagging=0.5), killed)


def test_cutouts_of_another_size_do_not_go_on(shards_folder: Path, ended: Path) -> None:
    with pytest.raises(InputError, match="holds a training with other cutouts"):
        train(all_of_one_epoch(), LensDataModule(shards_folder, image_size=24), ended)


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


def test_what_it_started_from_is_not_needed_to_go_on(shards_folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "start.ckpt"
    torch.save(LitLensSystem("lastro", image_size=32).backbone.network.state_dict(), weights)
    changes = {"model": {"pretrained": str(weights)}}
    config = saving_config(epochs=1).with_changes(changes, "test")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(config, LensDataModule(shards_folder), whole)
    assert in_a_process(config, shards_folder, stopped, 3) == -signal.SIGKILL
    weights.unlink()
    train(config, LensDataModule(shards_folder), stopped)
    ends = [torch.load(of / "best.ckpt", weights_only=True) for of in (whole, stopped)]
    for name, value in ends[0]["state_dict"].items():
        assert torch.equal(value, ends[1]["state_dict"][name])


def test_what_an_earlier_version_has_begun_does_not_go_on(
    shards_folder: Path, killed: Path
) -> None:
    (killed / "inputs.json").unlink()
    with pytest.raises(InputError, match=f"{killed}: an earlier version of lens_pipeline has"):
        train(saving_config(), LensDataModule(shards_folder), killed)


def test_a_training_that_has_ended_is_not_begun_again(shards_folder: Path, ended: Path) -> None:
    data = LensDataModule(shards_folder)
    before = {path: path.stat().st_mtime_ns for path in ended.glob("*.ckpt")}
    assert len(before) == 2
    train(all_of_one_epoch(), data, ended)
    assert before == {path: path.stat().st_mtime_ns for path in ended.glob("*.ckpt")}
    best = ended / "best.ckpt"
    with pytest.raises(InputError, match=rf"epochs \(1, now 2\); .* --pretrained {best}$"):
        train(all_of_one_epoch(epochs=2), data, ended)


def _command(arguments: list[str], said: Path, told: Path) -> None:
    with (
        said.open("w") as out,
        told.open("w") as error,
        redirect_stdout(out),
        redirect_stderr(error),
    ):
        code = main(arguments)
    sys.exit(code)


def test_the_same_command_twice_trains_once(shards_folder: Path, tmp_path: Path) -> None:
    """In two processes at once."""
    arguments = [
        *("train", "--arch", "lastro", "--epochs", "2", "--accelerator", "cpu"),
        *("--data-root", str(shards_folder), "--home", str(tmp_path / "home")),
    ]
    said, told = ([tmp_path / f"{what}-{n}" for n in range(2)] for what in ("said", "told"))
    both = [begun(_command, arguments, *files) for files in zip(said, told, strict=True)]
    codes = [exit_code(process) for process in both]
    errors = "".join(path.read_text() for path in told)
    assert codes == [0, 0], errors
    first, second = (path.read_text() for path in said)
    assert first == second != ""
    assert errors.count("nothing is trained again") == 1
