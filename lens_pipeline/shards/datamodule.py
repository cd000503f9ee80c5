"""Lightning's view of the shards: shuffled batches, gathered from mapped memory."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lens_pipeline.shards.reader import Shards, ShardSplit, open_shards
from lens_pipeline.shards.sampling import EpochBatches, ShardLoader

Batch = dict[str, Tensor]


class SplitDataset(Dataset[Batch]):
    """A split, gathered a batch at a time: `image` (n, bands, height, width) as stored, `label`
    float32 (n,), `index` int64 (n,), the places in the split."""

    def __init__(self, split: ShardSplit) -> None:
        self.split = split
        self.label = torch.from_numpy(split.labels.astype(np.float32))

    def __getitem__(self, indices: list[int]) -> Batch:
        index = torch.tensor(indices)
        image = torch.from_numpy(self.split.gather(indices))
        return {"image": image, "label": self.label[index], "index": index}


class LensDataModule(pl.LightningDataModule):
    """Train, validation and test batches of the shards in a folder or at a URL.

    Batches: dict of `image` float32 (n, bands, height, width) in the units of the stored cutouts,
    `label` float32 (n,), `index` int64 (n,). The order of an epoch depends on (seed, epoch) alone;
    see `EpochBatches` for how ranks share it.

    data_root: a folder or fsspec URL with a manifest; cache_dir: where remote shards are copied;
    num_workers: 0 gathers in the training process. Raises InputError where the shards are not
    whole.
    """

    def __init__(
        self,
        data_root: str | Path,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: Path | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.data_root = str(data_root)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.cache_dir = cache_dir
        self.storage_options = dict(storage_options or {})

    @cached_property
    def shards(self) -> Shards:
        return open_shards(
            self.data_root, cache=self.cache_dir, storage_options=self.storage_options
        )

    @property
    def bands(self) -> tuple[str, ...]:
        return self.shards.format.bands

    @property
    def image_size(self) -> int:
        return self.shards.format.image_size

    @property
    def units(self) -> str:
        return self.shards.format.units

    def class_counts(self, split: str) -> tuple[int, int]:
        """(non-lenses, lenses) of a split."""
        shards = [shard for shard in self.shards.manifest.shards if shard.split == split]
        return sum(shard.n_nonlens for shard in shards), sum(shard.n_lens for shard in shards)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        # On the device: half as many bytes cross the bus.
        return batch | {"image": batch["image"].float()}

    def _loader(self, name: str, shuffle: bool) -> ShardLoader:
        data = SplitDataset(self.shards.split(name))
        n = len(data.split)
        return ShardLoader(
            data,
            batch_size=None,  # the sampler gives whole batches
            sampler=EpochBatches(n, self.batch_size, shuffle=shuffle, seed=self.seed),
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def train_dataloader(self) -> ShardLoader:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> ShardLoader:
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> ShardLoader:
        return self._loader("test", shuffle=False)
