"""`train`: repeated from its settings, on other pixels, tested on tars that are named."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from lens_pipeline import LensDataModule
from lens_pipeline.cli import main
from lens_pipeline.models.system import load_system
from lens_pipeline.shards import publish_shards
from lens_pipeline.training.config import TrainConfig


def test_the_same_settings_file_gives_the_same_weights(uneven_shards: Path, tmp_path: Path) -> None:
    """`lens-pipeline train --config` on what a run has saved repeats it to the last bit."""
    first, second = tmp_path / "first", tmp_path / "second"
    place = ["--data-root", str(uneven_shards)]
    flags = ["--arch", "lastro", "--epochs", "1", "--batch-size", "16", "--shift", "1"]
    assert main(["train", *place, *flags, "--checkpoint-dir", str(first)]) == 0
    settings = str(first / "settings.yaml")
    assert main(["train", "--config", settings, "--checkpoint-dir", str(second)]) == 0
    one, two = (torch.load(f / "best.ckpt", weights_only=True) for f in (first, second))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name])


def test_flags_override_the_file_that_is_named(uneven_shards: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked.yaml"
    asked.write_text(
        "model: {arch: resnet18, dropout_rate: 0.5}\n"
        "training: {epochs: 7, learning_rate: 3e-4, batch_size: 16, limit_train_batches: 1}\n"
        "data: {train_urls: nowhere.tar, val_urls: nowhere.tar, use_webdataset: true}\n"
    )
    flags = ["--arch", "lastro", "--epochs", "1", "--learning-rate", "1e-4"]
    flags += ["--limit-train-batches", "none"]
    place = ["--no-use-webdataset", "--train-urls", "none", "--val-urls", "none"]
    place += ["--data-root", str(uneven_shards), "--checkpoint-dir", str(tmp_path / "out")]
    assert main(["train", "--config", str(asked), *flags, *place]) == 0
    used = TrainConfig.read(tmp_path / "out" / "settings.yaml")
    assert (used.model.arch, used.model.dropout_rate) == ("lastro", 0.5)
    assert (used.training.epochs, used.training.learning_rate) == (1, 1e-4)
    assert (used.training.batch_size, used.training.limit_train_batches) == (16, None)
    assert (used.data.train_urls, used.data.data_root) == (None, str(uneven_shards))


def test_a_tar_that_is_not_as_it_was_written_is_named_before_training(
    uneven_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = Path(shutil.copytree(uneven_shards, tmp_path / "shards"))
    spoiled = shards / "train-000001.tar"
    content = bytearray(spoiled.read_bytes())
    content[len(content) // 2] ^= 1
    spoiled.write_bytes(content)
    place = ["--data-root", str(shards), "--checkpoint-dir", str(tmp_path / "out")]
    assert main(["train", *place, "--arch", "lastro", "--epochs", "1"]) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "train-000001.tar" in told
    assert not (tmp_path / "out" / "last.ckpt").exists()


def test_a_training_is_repeated_on_the_version_that_it_had(
    uneven_shards: Path, tmp_path: Path
) -> None:
    """Whatever is published meanwhile."""
    shards, cloud = tmp_path / "shards", str(tmp_path / "cloud")
    shutil.copytree(uneven_shards, shards)
    version = publish_shards(shards, cloud).url
    flags = ["--arch", "lastro", "--epochs", "1", "--home", str(tmp_path)]
    tars = ["--train-urls", f"{cloud}/train-{{000000..000002}}.tar"]
    by_url = ["--use-webdataset", *tars, "--val-urls", f"{cloud}/val-{{000000..000001}}.tar"]
    for place, out in ((["--data-root", cloud], "root"), (by_url, "urls")):
        folder = tmp_path / out
        assert main(["train", *place, *flags, "--checkpoint-dir", str(folder)]) == 0
        named = TrainConfig.read(folder / "settings.yaml").data
        if out == "root":
            assert named.data_root == version
        else:
            assert named.train_urls == f"{version}/train-{{000000..000002}}.tar"
            assert named.val_urls == f"{version}/val-{{000000..000001}}.tar"


def test_what_was_trained_is_tested_on_tars_that_are_named(
    uneven_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"train": 3, "val": 2, "test": 1}
    place = {
        name: f"{uneven_shards}/{name}-{{000000..{n - 1:06d}}}.tar" for name, n in names.items()
    }
    arguments = [
        *("train", "--use-webdataset", "--arch", "lastro", "--epochs", "1"),
        *("--train-urls", place["train"], "--val-urls", place["val"], "--home", str(tmp_path)),
        *("--checkpoint-dir", str(tmp_path / "out")),
    ]
    assert main([*arguments, "--test-urls", f"{tmp_path}/absent-000000.tar"]) == 2
    assert "absent-000000.tar" in capsys.readouterr().err
    assert not (tmp_path / "out" / "last.ckpt").exists()  # before anything was trained
    assert main([*arguments, "--test-urls", place["test"]]) == 0
    _, _, said = capsys.readouterr().out.partition("Validation")
    split = LensDataModule(uneven_shards).split("test")
    images = torch.from_numpy(split.gather(np.arange(20)).astype(np.float32))
    with torch.inference_mode():
        logit = load_system(tmp_path / "out" / "best.ckpt")(images)
    assert f"{roc_auc_score(split.labels, logit):.3f}" in said
    assert "Test split: 10 lenses, 10 non-lenses" in said


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
        return set((tmp_path / "trainings").glob("[!.]*"))

    (first,) = trainings()
    assert "nothing is trained again" not in caplog.text
    assert trainings() == {first}
    assert f"{first} holds this training with its scores: nothing is trained again" in caplog.text
    for path in folder.glob("*.npy"):
        np.save(path, np.load(path)[::-1])
    assert len(trainings()) == 2
    assert "nothing is trained again" not in caplog.text
