"""Lightning's view of labelled cutouts: shuffled batches, wherever the cutouts lie."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.trainer.states import TrainerStatus
from torch.utils.data import DataLoader, Dataset

from lens_pipeline.catalogue.dataset import CutoutFormat, Split
from lens_pipeline.catalogue.joined import joined_format
from lens_pipeline.catalogue.splits import SPLITS, check_part, drawn_groups
from lens_pipeline.errors import InputError
from lens_pipeline.files import digest
from lens_pipeline.settings import Settings
from lens_pipeline.shards.cutouts import (
    Cutouts,
    fetched,
    in_shards,
    newest_shards,
    open_cutouts,
)
from lens_pipeline.shards.prefetch import Batch
from lens_pipeline.shards.reader import FetchedSplit
from lens_pipeline.shards.sampling import EpochBatches, ShardLoader, Windows
from lens_pipeline.shards.store import read_manifest
from lens_pipeline.shards.streaming import StreamLoader, TarStream
from lens_pipeline.shards.urls import Tars, in_versions, open_tars

ALONE = {
    **{"num_workers": 0, "persistent_workers": False, "prefetch_factor": None},
    "multiprocessing_context": None,
}
MIXED = 8  # shards, while they arrive


class SplitDataset(Dataset[Batch]):
    """A split, gathered a batch at a time: `image` (n, bands, height, width) as stored, `label`
    float32 (n,), `index` int64 (n,), the places in the split; in pinned memory, if asked for."""

    def __init__(self, split: Split, pinned: bool) -> None:
        self.split, self.pinned = split, pinned
        self.label = torch.from_numpy(split.labels.astype(np.float32))

    def __getitem__(self, indices: list[int]) -> Batch:
        index = torch.from_numpy(np.array(indices))  # torch.tensor takes three times as long
        if not self.pinned:
            image = torch.from_numpy(self.split.gather(indices))
            return {"image": image, "label": self.label[index], "index": index}
        image = torch.from_numpy(self.split.gather(indices, _pinned))
        return {
            "image": image,
            "label": self.label[index].pin_memory(),
            "index": index.pin_memory(),
        }


def _pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    of_torch = torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.empty(shape, dtype=of_torch, pin_memory=True).numpy()


class CutoutModule(pl.LightningDataModule):
    """Train, validation and test batches of cutouts that can be had at their places.

    Batches: dict of `image` (n, bands, height, width) in the units of the stored cutouts, float32
    as a Trainer gives it to a step, of a loader alone as it is stored; `label` float32 (n,);
    `index` int64 (n,). The order of an epoch depends on (seed, epoch) alone;
    see `EpochBatches` for how ranks share it. bagging: the fraction of the training groups that
    batches are made of, drawn by the seed.
    """

    def __init__(
        self,
        batch_size: int,
        num_workers: int,
        seed: int,
        pin_memory: bool | None,
        persistent_workers: bool | None,
        prefetch_factor: int | None,
        bagging: float,
    ) -> None:
        super().__init__()
        if not 0 < bagging <= 1:
            raise InputError(f"bagging {bagging}: must be above 0 and at most 1")
        self.bagging = bagging
        for name, value, least in (("batch_size", batch_size, 2), ("num_workers", num_workers, 0)):
            if value < least:
                raise InputError(f"{name} {value}: at least {least} is needed")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        helped = num_workers > 0
        self.loading: dict[str, Any] = {
            "num_workers": num_workers,
            "pin_memory": torch.cuda.is_available() if pin_memory is None else pin_memory,
            "persistent_workers": helped if persistent_workers is None else persistent_workers,
            "prefetch_factor": prefetch_factor,
            # Of a step of Dagster's, which comes from a fork server, so would the workers: they
            # end with their parent, and that one lives on where the step is killed.
            "multiprocessing_context": "fork" if sys.platform == "linux" else None,
        }
        if not helped:  # torch refuses what only says how workers would work
            self.loading |= ALONE

    @property
    def format(self) -> CutoutFormat:
        """What all cutouts share."""
        raise NotImplementedError

    @property
    def content(self) -> str:
        """A hash of what the cutouts are: other pixels or labels, another hash."""
        raise NotImplementedError

    def split(self, name: str) -> Split:
        """The cutouts of `train`, `val` or `test`."""
        raise NotImplementedError

    @property
    def bands(self) -> tuple[str, ...]:
        return self.format.bands

    @property
    def image_size(self) -> int:
        return self.format.image_size

    @property
    def units(self) -> str:
        return self.format.units

    def class_counts(self, split: str) -> tuple[int, int]:
        """(non-lenses, lenses) of a split, as far as they take part."""
        labels = self.split(split).labels[self.taking_part(split)]
        return int((labels == 0).sum()), int((labels == 1).sum())

    def taking_part(self, split: str) -> NDArray[np.bool_]:
        """Which cutouts of a split batches are made of: of `train`, the groups that `bagging`
        draws by the seed; of others, all."""
        found = self.split(split)
        if split != "train" or self.bagging == 1:
            return np.ones(len(found), dtype=bool)
        return drawn_groups(found.groups, self.bagging, self.seed)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        # On the device: half as many bytes cross the bus.
        return batch | {"image": batch["image"].float()}

    def loader(self, name: str, shuffle: bool) -> DataLoader[Any]:
        """Raises InputError where a cutout of the split has no label."""
        split = self.split(name)
        unknown = np.flatnonzero(split.labels < 0)
        if len(unknown):
            raise InputError(f"{name}: cutout {split.ids[unknown[0]]} has no label")
        remote = fetched(split)
        own_memory = remote is not None and not remote.fetched.shared
        loading = self.loading | (ALONE if own_memory else {})
        pinned = loading["pin_memory"] and not loading["num_workers"] and torch.cuda.is_available()
        data = SplitDataset(split, pinned)
        sampler = EpochBatches(
            len(split),
            self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            windows=_windows(split),
            among=self.taking_part(name),
        )
        ahead = remote.ahead if remote else None
        return ShardLoader(data, sampler=sampler, ahead=ahead, device=self._gpu, **loading)

    @property
    def _gpu(self) -> torch.device | None:
        """Of the trainer that is at work: afterwards a module still knows it."""
        if self.trainer is None or self.trainer.state.status != TrainerStatus.RUNNING:
            return None
        device = self.trainer.strategy.root_device
        return device if device.type == "cuda" else None

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader("val", shuffle=False)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader("test", shuffle=False)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.test_dataloader()


def _windows(split: Split) -> Windows | None:
    """Half of what may be kept is for the shards that are mixed, half for those that come next."""
    shards = in_shards(split)
    if shards is None:
        return None
    if not isinstance(shards, FetchedSplit):
        return Windows(shards.shards[0], 0, always=False)
    whole = 2 * shards.fetched.largest.bytes
    size = max(1, min(MIXED, shards.fetched.bound // whole))
    return Windows(shards.shards[0], size, always=shards.n_bytes > shards.fetched.bound)


class LensDataModule(CutoutModule):
    """Batches of the cutouts in a folder or at a URL: shards, a processed dataset, a catalogue.

    data_root, image_size, cache_dir, cache_gb, storage_options: see `open_cutouts`; num_workers: 0
    gathers in the training process, for a GPU two batches ahead; pin_memory: by default where there
    is a GPU; persistent_workers, prefetch_factor: torch's, of workers. Raises InputError where the
    cutouts are not whole.

    Remote shards are fetched in the background, in the order in which the epoch needs them: the
    first one, or every one where the cache cannot hold the split, takes shards in an order that
    (seed, epoch) decides and mixes the cutouts of up to 8 of them; others mix all.
    """

    def __init__(
        self,
        data_root: str | Path | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        image_size: int | None = None,
        seed: int = 0,
        pin_memory: bool | None = None,
        persistent_workers: bool | None = None,
        prefetch_factor: int | None = None,
        cache_dir: str | Path | None = None,
        storage_options: Mapping[str, Any] | None = None,
        cache_gb: float | None = None,
        bagging: float = 1.0,
    ) -> None:
        super().__init__(
            batch_size,
            num_workers,
            seed,
            pin_memory,
            persistent_workers,
            prefetch_factor,
            bagging,
        )
        self.data_root = data_root
        self.size = image_size
        self.cache_dir = Path(cache_dir) if cache_dir is not None else None
        self.storage_options = storage_options
        self.cache_gb = cache_gb

    @cached_property
    def cutouts(self) -> Cutouts:
        return open_cutouts(
            self.data_root,
            image_size=self.size,
            cache=self.cache_dir,
            cache_gb=self.cache_gb,
            storage_options=self.storage_options,
        )

    @property
    def format(self) -> CutoutFormat:
        return self.cutouts.format

    @property
    def content(self) -> str:
        return self.cutouts.content

    def split(self, name: str) -> Split:
        return self.cutouts.split(name)


class LensWebDatasetDataModule(CutoutModule):
    """Batches of WebDataset tars, ours or others', at paths or fsspec URLs with braces.

    train_urls, val_urls, test_urls: `s3://bucket/lenses/train-{000000..000009}.tar`; without any,
    the newest shards of LENS_HOME. Tars with a manifest beside them are checked against it, and
    must be all of a split; it names those of the splits that are not given. Remote ones are fetched
    ahead into `cache_dir`, which holds up to `cache_gb` of them, or else into memory, for which
    there are no workers. Remote tars without a manifest are copied into `cache_dir` before they are
    read; without one they are streamed: shuffled within `shuffle_buffer` cutouts, their batches
    without `index`.
    image_size: the central square to keep, by default all; flux_unit: of NumPy files in tars
    without a manifest: `background_sigma`, or else linear flux, brought to that unit cutout by
    cutout. The rest: see `LensDataModule`. Raises InputError where a tar is not whole.
    """

    def __init__(
        self,
        train_urls: str | None = None,
        val_urls: str | None = None,
        test_urls: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        image_size: int | None = None,
        flux_unit: str | None = None,
        shuffle_buffer: int = 1000,
        seed: int = 0,
        pin_memory: bool | None = None,
        persistent_workers: bool | None = None,
        prefetch_factor: int | None = None,
        cache_dir: str | Path | None = None,
        storage_options: Mapping[str, Any] | None = None,
        cache_gb: float | None = None,
        bagging: float = 1.0,
    ) -> None:
        super().__init__(
            batch_size,
            num_workers,
            seed,
            pin_memory,
            persistent_workers,
            prefetch_factor,
            bagging,
        )
        self.urls = {"train_urls": train_urls, "val_urls": val_urls, "test_urls": test_urls}
        if storage_options is None:
            storage_options = Settings.load().storage_options
        self.how: dict[str, Any] = {
            "image_size": image_size,
            "flux_unit": flux_unit,
            "cache": Path(cache_dir) if cache_dir is not None else None,
            "cache_gb": cache_gb,
            "storage_options": dict(storage_options),
        }
        if shuffle_buffer < 1:
            raise InputError(f"shuffle_buffer {shuffle_buffer}: at least 1 is needed")
        self.shuffle_buffer = shuffle_buffer
        self.opened: dict[str, Tars] = {}

    def _tars(self, name: str) -> Tars:
        if name not in self.opened:
            tars = open_tars(self._url(name), f"{name}_urls", **self.how)
            for other, opened in self.opened.items():
                mine, theirs = tars.format, opened.format
                if not (mine.named_bands and theirs.named_bands) and mine.shape == theirs.shape:
                    mine = replace(mine, bands=theirs.bands)  # others' tars do not name theirs
                joined_format({f"{other}_urls": theirs, f"{name}_urls": mine})
            self.opened[name] = tars
        return self.opened[name]

    @cached_property
    def _named(self) -> dict[str, str]:
        """The URLs that were given, in the version that is the newest now; or else of LENS_HOME."""
        given = {name: url for name, url in self.urls.items() if url}
        if given:
            return in_versions(given, self.how["storage_options"])
        newest = newest_shards(Settings.load().home)
        patterns = read_manifest(newest).patterns(str(newest))
        return {f"{split}_urls": pattern for split, pattern in patterns.items()}

    def _url(self, name: str) -> str:
        """As named, or as the manifest beside those that are."""
        url = self._named.get(f"{name}_urls")
        if url is None and name != self._given:
            url = self._tars(self._given).patterns.get(name)
        if url is None:
            beside = self._named.get(f"{self._given}_urls")
            raise InputError(
                f"{name}_urls: not given, and no manifest beside {beside} names them; name the "
                "tars of that split"
            )
        return url

    @property
    def _given(self) -> str:
        """The first split whose tars were named, if any was."""
        return next((name for name in SPLITS if f"{name}_urls" in self._named), SPLITS[0])

    @property
    def format(self) -> CutoutFormat:
        return self._tars(self._given).format

    @property
    def content(self) -> str:
        """Of the tars that are trained and validated on, which are not streamed."""
        return digest([self._held(name).content for name in SPLITS[:2]])

    def split(self, name: str) -> Split:
        found = self._held(name).split
        assert found is not None
        return found

    def _held(self, name: str) -> Tars:
        check_part(name)
        tars = self._tars(name)
        if tars.split is None:
            raise InputError(f"{name}_urls: streamed; name a cache_dir to have cutouts at a place")
        return tars

    def loader(self, name: str, shuffle: bool) -> DataLoader[Any]:
        tars = self._tars(name)
        if tars.decoder is None:
            return super().loader(name, shuffle)
        if self.bagging < 1:
            raise InputError(
                f"bagging {self.bagging}: streamed tars are not drawn from; name a cache_dir"
            )
        stream = TarStream(
            tars.urls,
            tars.decoder,
            self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            buffer=self.shuffle_buffer,
            storage_options=self.how["storage_options"],
        )
        return StreamLoader(stream, **self.loading)
