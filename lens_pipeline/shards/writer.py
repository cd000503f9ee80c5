"""A processed dataset -> WebDataset tars, an index for random access, a manifest."""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from lens_pipeline.catalogue.dataset import PARTS, Dataset, open_dataset
from lens_pipeline.errors import InputError
from lens_pipeline.shards.encoding import Encoding
from lens_pipeline.shards.manifest import INDEX, MANIFEST, Listed, Manifest, Shard
from lens_pipeline.shards.tar import Member, build_tar
from lens_pipeline.steps import file_sha256


def write_shards(
    dataset: str | Path,
    out: Path,
    *,
    shard_size: int = 1000,
    encoding: str = "float16",
    quality: int | None = None,
) -> Manifest:
    """Write the processed dataset in a folder as shards into `out`, an empty folder.

    `{split}-{number:06d}.tar` with `shard_size` cutouts each: per sample `.npy` (or `.png`, `.jpg`:
    see `Encoding`), `.cls` (1 lens, 0 not; absent for unlabelled), `.json` (its `id`);
    `index.parquet`; `manifest.json`, last. Shards are written in parallel, a thread a core; each is
    held in memory. The same dataset gives the same bytes. Raises InputError for settings out of
    range.
    """
    if shard_size < 1:
        raise InputError(f"shard_size {shard_size}: at least 1 is needed")
    source = open_dataset(dataset)
    stored = Encoding(encoding, source.format.units, quality)
    total = sum(counts["n"] for counts in source.facts["splits"].values())
    shards, tables = [], []
    with (
        tqdm(total=total, desc="writing shards", unit="cutout", disable=None) as progress,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        portions = _portions(source, shard_size)
        for shard, table in pool.map(lambda portion: portion.write(out, stored), portions):
            shards.append(shard)
            tables.append(table)
            progress.update(shard.samples)
    pd.concat(tables, ignore_index=True).to_parquet(out / INDEX, index=False)
    manifest = Manifest(
        format=asdict(source.format),
        encoding={"name": stored.name, "quality": stored.quality},
        index=Listed(INDEX, file_sha256(out / INDEX), (out / INDEX).stat().st_size),
        shards=tuple(shards),
    )
    (out / MANIFEST).write_text(manifest.text)
    return manifest


@dataclass(frozen=True)
class _Portion:
    """The cutouts of one shard; `first` is the number of the first in its split."""

    name: str
    split: str
    first: int
    images: NDArray[np.float32]
    table: pd.DataFrame

    def write(self, folder: Path, encoding: Encoding) -> tuple[Shard, pd.DataFrame]:
        """Write the tar; returns what the manifest and the index say of it."""
        pixels = self._pixels(encoding)
        ids = [json.dumps({"id": name}).encode() for name in self.table["id"]]
        members = [pixels, Member("json", ids)]
        if self.table["label"].notna().all():
            members.append(Member("cls", [b"%d" % label for label in self.table["label"]]))
        tar, offsets = build_tar(self.first, members)
        with (folder / self.name).open("wb") as file:
            file.write(tar)
        shard = Shard(
            name=self.name,
            sha256=hashlib.sha256(tar).hexdigest(),
            bytes=len(tar),
            split=self.split,
            samples=len(self.table),
            n_lens=int((self.table["label"] == 1).sum()),
            n_nonlens=int((self.table["label"] == 0).sum()),
        )
        index = pd.DataFrame(
            {
                "id": self.table["id"].to_numpy(),
                "label": self.table["label"].array,
                "offset": offsets[encoding.extension],
                "bytes": [len(payload) for payload in pixels.payloads],
                "crc32": [zlib.crc32(payload) for payload in pixels.payloads],
                "dtype": encoding.dtype.str,
                "shape": [self.images.shape[1:]] * len(self.table),
                "split": self.split,
                "shard": self.name,
            }
        )
        return shard, index

    def _pixels(self, encoding: Encoding) -> Member:
        if not encoding.is_raw:
            return Member(encoding.extension, [encoding.encode(image) for image in self.images])
        stored = self.images.astype(encoding.dtype)
        raw = stored.reshape(len(stored), -1).view(np.uint8)
        return Member(encoding.extension, raw, encoding.npy_header(stored.shape[1:]))


def _portions(dataset: Dataset, shard_size: int) -> Iterator[_Portion]:
    for split in PARTS:
        images, table = dataset.images(split), dataset.table(split)
        for number, first in enumerate(range(0, len(table), shard_size)):
            part = slice(first, first + shard_size)
            yield _Portion(
                f"{split}-{number:06d}.tar", split, first, images[part], table.iloc[part]
            )
