"""Batches: all of a split, in an order that (seed, epoch) decides."""

from pathlib import Path

import numpy as np
import torch

from lens_pipeline import LensDataModule
from lens_pipeline.catalogue.dataset import Dataset


def _epoch(data: LensDataModule, epoch: int) -> tuple[torch.Tensor, list[dict]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # as Lightning does
    batches = list(loader)
    return torch.cat([batch["index"] for batch in batches]), batches


def test_an_epoch_holds_every_cutout_once(shards_folder: Path, dataset: Dataset) -> None:
    order, batches = _epoch(LensDataModule(shards_folder, batch_size=16), 0)
    assert sorted(order.tolist()) == list(range(len(dataset.table("train"))))
    images = torch.cat([batch["image"] for batch in batches]).numpy()
    np.testing.assert_array_equal(images, dataset.images("train")[order].astype(np.float16))
    labels = torch.cat([batch["label"] for batch in batches]).tolist()
    assert labels == dataset.table("train")["label"].to_numpy()[order].tolist()


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
