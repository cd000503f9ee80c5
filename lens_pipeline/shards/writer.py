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
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from lens_pipeline.catalogue.dataset import PARTS, Dataset, open_dataset
from lens_pipeline.errors import InputError
from lens_pipeline.shards.encoding import Encoding
from lens_pipeline.shards.manifest import INDEX, MANIFEST, Listed, Manifest, Shard
from lens_pipeline.shards.tar import Member, tar_end, tar_part
from lens_pipeline.steps import file_sha256

PART = 256  # samples in memory at a time: few enough to stay in the processor's cache


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
    `index.parquet`; `manifest.json`, last. Shards are written in parallel, a thread a core. The
    same dataset gives the same bytes. Raises InputError for settings out of range.
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
        dataset=source.facts["content"],
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
        digest, size = hashlib.sha256(), 0
        offsets, payloads_bytes, crc32 = [], [], []
        with (folder / self.name).open("wb") as file:
            for start in range(0, len(self.table), PART):
                rows = slice(start, start + PART)
                pixels = _pixels(self.images[rows], encoding)
                part, places = tar_part(self.first + start, [pixels, *self._others(rows)])
                offsets.append(places[encoding.extension] + size)
                payloads_bytes += [len(payload) for payload in pixels.payloads]
                crc32 += [zlib.crc32(payload) for payload in pixels.payloads]
                size += file.write(part.data)
                digest.update(part.data)
            end = tar_end(size)
            size += file.write(end)
            digest.update(end)
        label = self.table["label"]
        index = {
            "id": self.table["id"].to_numpy(),
            "label": label.array,
            "offset": np.concatenate(offsets),
            "bytes": payloads_bytes,
            "crc32": crc32,
            "dtype": encoding.dtype.str,
            "shape": [self.images.shape[1:]] * len(self.table),
            "split": self.split,
            "shard": self.name,
        }
        n_lens, n_nonlens = int((label == 1).sum()), int((label == 0).sum())
        sha256 = digest.hexdigest()
        shard = Shard(self.name, sha256, size, self.split, len(label), n_lens, n_nonlens)
        return shard, pd.DataFrame(index)

    def _others(self, rows: slice) -> list[Member]:
        """What stands beside the pixels of some of the samples."""
        table = self.table.iloc[rows]
        members = [Member("json", [json.dumps({"id": name}).encode() for name in table["id"]])]
        if table["label"].notna().all():
            label = table["label"].to_numpy(np.uint8)[:, None]
            members.append(Member("cls", label + np.uint8(ord("0"))))
        return members


def _pixels(images: NDArray[np.float32], encoding: Encoding) -> Member:
    if not encoding.is_raw:
        return Member(encoding.extension, [encoding.encode(image) for image in images])
    # NumPy converts to float16 one number at a time, torch with the processor's instructions.
    stored = torch.from_numpy(images).to(getattr(torch, encoding.name)).numpy()
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
