"""Batches: all of a split, in an order that (seed, epoch) decides."""

import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from PIL import Image
from pytorch_lightning import Trainer

from lens_pipeline import LensDataModule, LitLensSystem
from lens_pipeline.catalogue.build import build_dataset
from lens_pipeline.catalogue.dataset import Dataset
from lens_pipeline.errors import InputError, NoAnswerError
from lens_pipeline.shards import cutouts, open_shards
from lens_pipeline.shards.cutouts import newest_shards
from lens_pipeline.steps import Recipe, run_step
from lens_pipeline_tests.conftest import as_in
from lens_pipeline_tests.served import until


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


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_trainer_predicts_what_the_system_gives_for_each_batch(
    num_workers: int, shards_folder: Path, tmp_path: Path
) -> None:
    """By a loader, or the test split of the module; and shards hold 16 bits."""
    data = LensDataModule(shards_folder, batch_size=16, num_workers=num_workers)
    system = LitLensSystem("lastro", image_size=32).eval()
    with torch.no_grad():
        logits = torch.cat([system(batch["image"]) for batch in data.test_dataloader()])
    assert len(logits) == len(data.split("test"))
    for source in ({"dataloaders": data.test_dataloader()}, {"datamodule": data}):
        trainer = Trainer(
            accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False
        )
        found = trainer.predict(system, **source)
        torch.testing.assert_close(torch.cat(found), logits)


def test_loaders_without_their_module_can_be_trained_on(
    shards_folder: Path, tmp_path: Path
) -> None:
    """As with it, though shards hold 16 bits, which shifts would round."""
    data = LensDataModule(shards_folder, batch_size=16)
    how: dict[str, Any] = {
        **{"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False},
        **{"enable_checkpointing": False, "default_root_dir": tmp_path},
    }
    losses = []
    for alone in (False, True):
        torch.manual_seed(0)
        system = LitLensSystem("lastro", image_size=32, shift=1.5)
        given = (data.train_dataloader(), data.val_dataloader()) if alone else (data,)
        trainer = Trainer(num_sanity_val_steps=0, **how)
        trainer.fit(system, *given)
        losses.append(trainer.callback_metrics["train/loss"].item())
    assert losses[0] == losses[1]
    with pytest.raises(InputError, match="overfit_batches: .+ take limit_train_batches"):
        Trainer(overfit_batches=2, **how).fit(system, data)


READS = """
import multiprocessing, sys, time
from pathlib import Path
from lens_pipeline import LensDataModule

def step():
    loader = LensDataModule(sys.argv[1], batch_size=16, num_workers=2).train_dataloader()
    for batch in loader:
        Path(sys.argv[2]).write_text("")
        time.sleep(600)

if __name__ == "__main__":
    step_of_dagster = multiprocessing.get_context("forkserver").Process(target=step)
    step_of_dagster.start()
    while not Path(sys.argv[2]).exists():
        time.sleep(0.1)
    step_of_dagster.kill()
    step_of_dagster.join()
"""


@pytest.mark.slow
def test_workers_end_with_a_step_that_is_killed(shards_folder: Path, tmp_path: Path) -> None:
    """Though it comes from a fork server, as those of Dagster do."""
    program = tmp_path / "reads.py"
    program.write_text(READS)
    begun = tmp_path / "begun"
    process = subprocess.Popen(
        [sys.executable, program, shards_folder, begun], start_new_session=True
    )
    assert process.wait(120) == 0

    def left() -> list[int]:
        found = []
        for one in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, ProcessLookupError):  # others end meanwhile
                ended = one.status() == psutil.STATUS_ZOMBIE
                if os.getsid(one.pid) == process.pid and not ended:
                    found.append(one.pid)
        return found

    until(lambda: not left(), 30, "all workers end")


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


def test_a_catalogue_that_changes_while_it_is_read_is_not_kept_as_what_it_was(
    simulated_catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pd.read_parquet(simulated_catalogue)
    table["path"] = [str(simulated_catalogue.parent / path) for path in table["path"]]
    table.to_parquet(tmp_path / "catalogue.parquet")

    def meanwhile(*given: Any, **named: Any) -> Dataset:
        table[:150].to_parquet(tmp_path / "catalogue.parquet")
        return build_dataset(*given, **named)

    how: dict[str, Any] = {"image_size": 32, "cache_dir": tmp_path / "cache"}
    with monkeypatch.context() as during:
        during.setattr(cutouts, "build_dataset", meanwhile)
        with pytest.raises(NoAnswerError, match=r"catalogue\.parquet: changed while it was read"):
            LensDataModule(tmp_path / "catalogue.parquet", **how).split("val")
    data = LensDataModule(tmp_path / "catalogue.parquet", **how)
    assert sum(len(data.split(split)) for split in ("train", "val", "test")) == 150


def test_of_a_catalogue_of_several_surveys_those_that_the_settings_name(
    simulated_surveys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LENS_HOME", str(tmp_path / "home"))

    def ids() -> set[str]:
        data = LensDataModule(simulated_surveys, image_size=32)
        return {name for split in ("train", "val", "test") for name in data.split(split).ids}

    table = pd.read_parquet(simulated_surveys)
    assert ids() == set(table["id"])
    monkeypatch.setenv("LENS_SURVEY", "hsc")
    assert ids() == set(table.loc[table["survey"] == "hsc", "id"])
    monkeypatch.setenv("LENS_SURVEY", "lsst")
    with pytest.raises(InputError, match="no row is of 'lsst'; it names 'des', 'hsc'"):
        LensDataModule(simulated_surveys, image_size=32).split("train")


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


def test_the_newest_shards_are_those_that_were_last_made_or_reused(tmp_path: Path) -> None:
    """Who goes back to former settings trains on the shards of these."""

    def used(n: int) -> Path:
        def build(out: Path) -> None:
            (out / "manifest.json").write_text(str(n))

        recipe = Recipe("lens_shards", modules=(), libraries=(), settings={"n": n})
        return run_step(recipe, tmp_path / "shards", build).folder

    one, other = used(1), used(2)
    assert newest_shards(tmp_path) == other
    assert used(1) == one == newest_shards(tmp_path)


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
