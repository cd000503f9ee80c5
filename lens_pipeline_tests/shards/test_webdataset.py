"""Our own tars by their URLs, read at random or streamed."""

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.data import _set_sampler_epoch

from lens_pipeline import LensDataModule, LensWebDatasetDataModule, LitLensSystem
from lens_pipeline.catalogue.dataset import Dataset
from lens_pipeline.catalogue.splits import drawn_groups
from lens_pipeline.errors import InputError
from lens_pipeline.shards import open_shards, streaming, write_shards
from lens_pipeline_tests.conftest import as_in
from lens_pipeline_tests.shards.tars import RNG, N, read, upload, write_tars


def test_our_own_shards_by_their_braces(shards_folder: Path, dataset: Dataset) -> None:
    patterns = {f"{s}_urls": str(shards_folder / f"{s}-{{000000..{n:06d}}}.tar")
                for s, n in (("train", 2), ("val", 0), ("test", 0))}  # fmt: skip
    by_url = LensWebDatasetDataModule(**patterns, batch_size=16)
    by_folder = LensDataModule(shards_folder, batch_size=16)
    assert by_url.format == by_folder.format
    assert by_url.class_counts("train") == by_folder.class_counts("train")
    for one, other in zip(by_url.train_dataloader(), by_folder.train_dataloader(), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("split", ["train", "val"])
def test_links_to_tars_are_what_lies_beside_them(
    shards_folder: Path, tmp_path: Path, split: str
) -> None:
    """As caches and stores of content leave them: what they lead to has no manifest beside it."""
    content, links = tmp_path / "blobs", tmp_path / "snapshot"
    content.mkdir()
    links.mkdir()
    for number, file in enumerate(sorted(shards_folder.iterdir())):
        shutil.copy(file, content / f"{number:040x}")
        (links / file.name).symlink_to(content / f"{number:040x}")
    names = {"train": "train-{000000..000002}.tar", "val": "val-000000.tar"}
    linked, own = (
        LensWebDatasetDataModule(*(str(folder / names[s]) for s in ("train", "val")))
        for folder in (links, shards_folder)
    )
    assert linked.format == own.format
    assert linked.class_counts(split) == own.class_counts(split)
    np.testing.assert_array_equal(read(linked, split)[0], read(own, split)[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_our_own_shards_streamed(
    shards_folder: Path, dataset: Dataset, remote: str, workers: int
) -> None:
    upload(shards_folder, remote)
    pattern = f"{remote}/train-{{000000..000002}}.tar"
    data = LensWebDatasetDataModule(
        pattern, pattern, batch_size=16, num_workers=workers, image_size=24
    )
    images, labels = read(data, "val")
    order = np.argsort(images[:, 0, 0, 0], kind="stable")
    wanted = dataset.images("train")[:, :, 4:28, 4:28].astype(np.float16)
    by_first = np.argsort(wanted[:, 0, 0, 0], kind="stable")
    np.testing.assert_array_equal(images[order], wanted[by_first])
    assert labels.sum() == (dataset.table("train")["label"] == 1).sum()
    first, second = (read(data, "train")[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)  # of a new loader, the first epoch
    loader, epochs = data.train_dataloader(), []
    for number in range(2):
        _set_sampler_epoch(loader, number)
        epochs.append([batch["index"] for batch in loader])
    assert [len(epoch) for epoch in epochs] == [len(loader)] * 2
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))


def test_bagging_needs_cutouts_at_their_places(remote: str, tmp_path: Path) -> None:
    pattern = write_tars(tmp_path / "tars", "npy")
    upload(tmp_path / "tars", remote)
    urls = pattern.replace(str(tmp_path / "tars"), remote)
    how: dict[str, Any] = {"flux_unit": "background_sigma", "bagging": 0.5}
    with pytest.raises(InputError, match="streamed tars are not drawn from; name a cache_dir"):
        LensWebDatasetDataModule(urls, urls, **how).train_dataloader()
    cached = LensWebDatasetDataModule(urls, urls, cache_dir=tmp_path / "cache", **how)
    drawn = drawn_groups(cached.split("train").ids, 0.5, seed=0)  # each by itself
    np.testing.assert_array_equal(cached.taking_part("train"), drawn)
    images, _ = read(cached, "train")
    assert set(images[:, 0, 0, 0].astype(int)) <= set(np.flatnonzero(drawn))
    assert 0 < len(images) <= drawn.sum() < N


@pytest.mark.parametrize("png16", [False, True])
def test_a_streamed_shard_that_is_not_as_listed(
    dataset: Dataset, tmp_path: Path, remote: str, png16: bool
) -> None:
    out = tmp_path / "shards"
    out.mkdir()
    write_shards(dataset.folder, out, encoding="png16" if png16 else "float16")
    upload(out, remote)
    data = LensWebDatasetDataModule(val_urls=f"{remote}/val-000000.tar", batch_size=16)
    images, _ = read(data, "val")
    wanted, _ = as_in(open_shards(out).split("val"), dataset, "val")
    np.testing.assert_allclose(images, wanted, atol=2e-3, rtol=1e-3)
    store = fsspec.filesystem("memory").store
    content = bytearray(store["/bucket/val-000000.tar"].getvalue())
    for place in RNG.integers(0, len(content), 15):
        spoilt = bytearray(content)
        spoilt[place] ^= 4
        with fsspec.open(f"{remote}/val-000000.tar", "wb") as file:
            file.write(spoilt)
        again = LensWebDatasetDataModule(val_urls=f"{remote}/val-000000.tar", batch_size=16)
        with pytest.raises(InputError, match=r"memory://bucket/val-000000\.tar"):
            next(iter(again.val_dataloader()))
    assert len(read(data, "val")[0]) == len(images)  # from memory


@pytest.mark.parametrize("where", ["local", "streamed"])
def test_our_own_png16_says_without_its_manifest_how_it_is_read(
    dataset: Dataset, tmp_path: Path, remote: str, where: str
) -> None:
    """Codes of asinh, the bands below each other: read as any picture they would be a tall grey
    one, of which the middle of one band is left."""
    out = tmp_path / "shards"
    out.mkdir()
    write_shards(dataset.folder, out, encoding="png16")
    wanted, rows = as_in(open_shards(out).split("val"), dataset, "val")
    (out / "manifest.json").unlink()
    upload(out, remote)
    data = LensWebDatasetDataModule(
        val_urls=f"{out if where == 'local' else remote}/val-000000.tar", batch_size=16
    )
    images, labels = read(data, "val")
    assert (data.bands, data.image_size, data.units) == (("g", "r", "i"), 32, "background_sigma")
    assert (np.abs(images - wanted) <= 4e-4 * np.hypot(1, wanted)).all()
    assert labels.tolist() == rows["label"].tolist()


def test_braces_that_are_not_the_shards_of_a_split(shards_folder: Path) -> None:
    for tars in ("train-{000000..000001}", "train-{000000..000003}", "{train,val}-000000"):
        data = LensWebDatasetDataModule(str(shards_folder / f"{tars}.tar"))
        with pytest.raises(InputError, match=r"train_urls: .* are .*train-\{000000\.\.000002\}"):
            data.train_dataloader()


@pytest.mark.parametrize(
    ("urls", "said"),
    [
        ("tars/{0..1.tar", "a brace is missing"),
        ("s3:/bucket/a.tar", "a URL has two slashes"),
        ("s3://me:secret@bucket/a.tar", "a URL must not carry a user or password"),
    ],
)
def test_urls_that_cannot_be_are_told_for_what_they_are(urls: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        LensWebDatasetDataModule(urls).train_dataloader()


@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (0, 3), (2, 2), (3, 2)])
def test_streamed_over_ranks(
    tmp_path: Path, remote: str, workers: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation sees each cutout once; every rank has as many training batches, none twice."""
    write_tars(tmp_path / "tars", "npy")
    upload(tmp_path / "tars", remote)
    pattern = f"{remote}/part-{{0000..0002}}.tar"
    seen: dict[str, list[list[torch.Tensor]]] = {"train": [], "val": []}
    for rank in range(ranks):
        monkeypatch.setattr(streaming, "rank_of_ranks", lambda rank=rank: (rank, ranks))
        data = LensWebDatasetDataModule(pattern, pattern, batch_size=4, num_workers=workers,
                                        flux_unit="background_sigma")  # fmt: skip
        for name, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
            seen[name].append([batch["image"][:, 0, 0, 0].int() for batch in loader])
    everything = torch.cat([batch for rank in seen["val"] for batch in rank]).tolist()
    assert sorted(everything) == list(range(N))
    assert len({len(batches) for batches in seen["train"]}) == 1
    trained = torch.cat([batch for rank in seen["train"] for batch in rank]).tolist()
    assert len(set(trained)) == len(trained) > N - 2 * ranks * max(1, workers) - 1


def test_a_stream_goes_on_at_the_batch_where_it_stopped(shards_folder: Path, remote: str) -> None:
    upload(shards_folder, remote)

    def loader() -> Any:
        pattern = f"{remote}/train-{{000000..000002}}.tar"
        return LensWebDatasetDataModule(pattern, batch_size=8).train_dataloader()

    def epoch_one() -> Any:
        found = loader()
        _set_sampler_epoch(found, 1)
        return found

    whole = [batch["image"] for batch in epoch_one()]
    stopped = epoch_one()
    batches = iter(stopped)
    for _ in range(5):
        next(batches)
    resumed = epoch_one()
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    rest = [batch["image"] for batch in resumed]
    assert len(rest) == len(whole) - 5
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[5:], strict=True))
    assert not torch.equal(next(iter(loader()))["image"], whole[0])


def test_lightning_says_which_epoch_of_a_stream_is_next(tmp_path: Path, remote: str) -> None:
    """Else a run that goes on after an epoch would see the first one's order again."""
    write_tars(tmp_path / "tars", "npy")
    upload(tmp_path / "tars", remote)
    pattern = f"{remote}/part-{{0000..0002}}.tar"
    first = LensWebDatasetDataModule(pattern, batch_size=4).train_dataloader()
    epochs = [torch.cat([batch["image"] for batch in first]) for _ in range(2)]
    fresh = LensWebDatasetDataModule(pattern, batch_size=4).train_dataloader()
    _set_sampler_epoch(fresh, 1)
    assert torch.equal(torch.cat([batch["image"] for batch in fresh]), epochs[1])
    assert not torch.equal(epochs[0], epochs[1])


def test_lightning_trains_on_a_stream(shards_folder: Path, remote: str, tmp_path: Path) -> None:
    upload(shards_folder, remote)
    data = LensWebDatasetDataModule(
        f"{remote}/train-{{000000..000002}}.tar", f"{remote}/val-000000.tar", batch_size=16
    )
    system = LitLensSystem("light_transformer", image_size=data.image_size)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(system, data)
    assert trainer.global_step == 2 * len(data.train_dataloader())
    assert 0 <= trainer.callback_metrics["val/auroc"] <= 1


def test_a_limit_above_what_a_stream_holds_is_refused_and_not_waited_for(
    tmp_path: Path, remote: str
) -> None:
    """Else nothing would be validated."""
    write_tars(tmp_path / "tars", "npy")
    upload(tmp_path / "tars", remote)
    pattern = f"{remote}/part-{{0000..0002}}.tar"
    data = LensWebDatasetDataModule(pattern, pattern, batch_size=4)
    n = len(list(data.train_dataloader()))
    for limit in (n, n + 3):
        system = LitLensSystem("light_transformer", image_size=data.image_size)
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            limit_train_batches=limit,
        )  # fmt: skip
        if limit == n:
            trainer.fit(system, data)
            assert "val/loss" in trainer.callback_metrics
            continue
        said = f"limit_train_batches {limit}: an epoch of the tars has {n} batches; give {n}"
        with pytest.raises(InputError, match=said):
            trainer.fit(system, data)


def test_a_buffer_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="shuffle_buffer 0: at least 1 is needed"):
        LensWebDatasetDataModule("train.tar", shuffle_buffer=0)
