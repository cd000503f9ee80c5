"""Batches: all of a split, in an order that (seed, epoch) decides."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lens_pipeline import LensDataModule
from lens_pipeline.catalogue.dataset import Dataset
from lens_pipeline.errors import InputError
from lens_pipeline.shards import open_shards
from lens_pipeline_tests.conftest import as_in


def _epoch(data: LensDataModule, epoch: int) -> tuple[torch.Tensor, list[dict]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # as Lightning does
    batches = list(loader)
    return torch.cat([batch["index"] for batch in batches]), batches


def test_an_epoch_holds_every_cutout_once(shards_folder: Path, dataset: Dataset) -> None:
    order, batches = _epoch(LensDataModule(shards_folder, batch_size=16), 0)
    assert sorted(order.tolist()) == list(range(len(dataset.table("train"))))
    images = torch.cat([batch["image"] for batch in batches]).numpy()
    wanted, table = as_in(open_shards(shards_folder).split("train"), dataset, "train")
    np.testing.assert_array_equal(images, wanted[order].astype(np.float16))
    labels = torch.cat([batch["label"] for batch in batches]).tolist()
    assert labels == table["label"].to_numpy()[order].tolist()


def test_order_follows_from_seed_and_epoch(shards_folder: Path) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return _epoch(LensDataModule(shards_folder, seed=seed), epoch)[0].tolist()

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


def test_workers_change_nothing(shards_folder: Path) -> None:
    alone, _ = _epoch(LensDataModule(shards_folder, batch_size=16), 0)
    helped, _ = _epoch(LensDataModule(shards_folder, batch_size=16, num_workers=1), 0)
    assert torch.equal(alone, helped)


def test_a_processed_dataset_gives_the_same(shards_folder: Path, dataset: Dataset) -> None:
    from_shards, _ = _epoch(LensDataModule(shards_folder, batch_size=16), 1)
    data = LensDataModule(dataset.folder, batch_size=16)
    order, batches = _epoch(data, 1)
    assert torch.equal(order, from_shards)
    images = torch.cat([batch["image"] for batch in batches]).numpy()
    np.testing.assert_array_equal(images, dataset.images("train")[order])
    assert data.class_counts("train") == LensDataModule(shards_folder).class_counts("train")


def test_a_catalogue_is_read_once(
    simulated_catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LENS_HOME", str(tmp_path / "home"))
    data = LensDataModule(simulated_catalogue, image_size=24)
    n = sum(len(data.split(split)) for split in ("train", "val", "test"))
    assert n == 200
    assert next(iter(data.train_dataloader()))["image"].shape == (64, 3, 24, 24)
    kept = list((tmp_path / "home" / "cache").glob("*/dataset.json"))
    assert len(kept) == 1
    time = kept[0].stat().st_mtime_ns
    assert LensDataModule(simulated_catalogue, image_size=24).split("val").ids.tolist()
    assert [p.stat().st_mtime_ns for p in tmp_path.glob("home/cache/*/dataset.json")] == [time]


def test_a_size_that_was_not_asked_for_is_named(
    simulated_catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LENS_HOME", str(tmp_path / "home"))
    with pytest.raises(InputError, match="image_size 64; row 1, .*: 32 x 32 pixels; at least 64"):
        LensDataModule(simulated_catalogue).split("train")


def test_a_folder_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENS_HOME", str(tmp_path / "home"))
    random = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for kind in ("lens", "nonlens"):
            folder = tmp_path / "processed" / split / kind
            folder.mkdir(parents=True)
            for number in range(3):
                picture = random.integers(0, 256, (70, 70, 3), np.uint8)
                Image.fromarray(picture).save(folder / f"{number}.png")
    data = LensDataModule(tmp_path / "processed")
    assert (data.units, data.image_size, data.class_counts("val")) == ("composite", 64, (3, 3))


def test_a_smaller_size_is_cut_out_of_the_middle(shards_folder: Path, dataset: Dataset) -> None:
    data = LensDataModule(shards_folder, image_size=20)
    assert data.image_size == 20
    batch = next(iter(data.val_dataloader()))
    images, _ = as_in(open_shards(shards_folder).split("val"), dataset, "val")
    middle = images[: len(batch["image"]), :, 6:26, 6:26]
    np.testing.assert_array_equal(batch["image"], middle.astype(np.float16))
    with pytest.raises(InputError, match="image_size 33: .* have 32 pixels"):
        LensDataModule(shards_folder, image_size=33).train_dataloader()


def test_without_a_place_the_newest_shards_of_the_home_are_read(
    shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LENS_HOME", str(tmp_path))
    with pytest.raises(InputError, match=f"{tmp_path}: holds no shards; name a data_root"):
        LensDataModule().train_dataloader()
    shutil.copytree(shards_folder, tmp_path / "shards" / "one")
    assert len(LensDataModule().split("train")) == len(LensDataModule(shards_folder).split("train"))


def test_the_loaders_arguments(shards_folder: Path) -> None:
    data = LensDataModule(
        shards_folder, num_workers=1, pin_memory=False, persistent_workers=False, prefetch_factor=3
    )
    loader = data.train_dataloader()
    assert (loader.num_workers, loader.pin_memory, loader.persistent_workers) == (1, False, False)
    assert loader.prefetch_factor == 3
    alone = LensDataModule(shards_folder, persistent_workers=True, prefetch_factor=3)
    assert len(list(alone.train_dataloader())) == len(list(loader))
    with pytest.raises(InputError, match="batch_size 1: at least 2"):
        LensDataModule(shards_folder, batch_size=1)


def test_no_batch_of_one(shards_folder: Path, dataset: Dataset) -> None:
    """Batch normalisation fails on it."""
    size = len(dataset.table("train")) - 1
    _, batches = _epoch(LensDataModule(shards_folder, batch_size=size), 0)
    assert [len(batch["label"]) for batch in batches] == [size]


def test_facts(shards_folder: Path, dataset: Dataset) -> None:
    data = LensDataModule(shards_folder)
    label = dataset.table("val")["label"]
    assert data.class_counts("val") == ((label == 0).sum(), (label == 1).sum())
    assert (data.bands, data.image_size, data.units) == (("g", "r", "i"), 32, "background_sigma")
    batch = next(iter(data.val_dataloader()))
    assert data.on_after_batch_transfer(batch, 0)["image"].dtype == torch.float32


def test_bagging_trains_each_seed_on_groups_of_its_own(
    shards_folder: Path, dataset: Dataset
) -> None:
    _, table = as_in(open_shards(shards_folder).split("train"), dataset, "train")

    def drawn(seed: int, bagging: float = 0.6) -> set[int]:
        data = LensDataModule(shards_folder, batch_size=8, seed=seed, bagging=bagging)
        first, second = (set(_epoch(data, number)[0].tolist()) for number in (0, 1))
        taking_part = set(np.flatnonzero(data.taking_part("train")).tolist())
        assert first | second <= taking_part
        assert len(taking_part - first) < 2  # one that is left over waits for another epoch
        lens = int((table["label"].to_numpy()[sorted(taking_part)] == 1).sum())
        assert data.class_counts("train") == (len(taking_part) - lens, lens)
        assert data.taking_part("val").all()
        return taking_part

    by_seed = [drawn(seed) for seed in range(6)]
    for one in by_seed:
        groups = table["group"].iloc[sorted(one)]
        others = table["group"].drop(index=groups.index)
        assert not set(groups) & set(others)  # a lens and its pair: both or neither
    assert np.mean([len(one) / len(table) for one in by_seed]) == pytest.approx(0.6, abs=0.1)
    assert len({frozenset(one) for one in by_seed}) == 6
    assert drawn(0) == by_seed[0]
    # The same groups from the dataset that the shards were written from.
    taking_part = LensDataModule(dataset.folder, bagging=0.6).taking_part("train")
    groups = table["group"].iloc[sorted(by_seed[0])]
    assert set(dataset.table("train")["group"][taking_part]) == set(groups)
    assert drawn(0, bagging=1.0) == set(range(len(table)))
    with pytest.raises(InputError, match=r"bagging 0: must be above 0"):
        LensDataModule(shards_folder, bagging=0)


def test_a_path_that_cannot_be_is_an_error_at_once() -> None:
    begun = time.monotonic()
    with pytest.raises(InputError, match="xxx.*File name too long.*correct the path"):
        LensDataModule("x" * 300).train_dataloader()
    assert time.monotonic() - begun < 20
