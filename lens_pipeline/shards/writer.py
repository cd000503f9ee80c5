"""A processed dataset -> WebDataset tars, an index for random access, a manifest."""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import webdataset as wds
from numpy.lib import format as npy
from numpy.typing import NDArray
from tqdm import tqdm

from lens_pipeline.catalogue.dataset import PARTS, Dataset, open_dataset
from lens_pipeline.errors import InputError
from lens_pipeline.shards.manifest import INDEX, MANIFEST, Listed, Manifest, Shard
from lens_pipeline.steps import file_sha256

DTYPES = ("float16", "float32")


def write_shards(
    dataset: str | Path, out: Path, *, shard_size: int = 1000, dtype: str = "float16"
) -> Manifest:
    """Write the processed dataset in a folder as shards into `out`, an empty folder.

    `{split}-{number:06d}.tar` with `shard_size` cutouts each: per sample `.npy` (`dtype`), `.cls`
    (1 lens, 0 not; absent for unlabelled), `.json` (its `id`); `index.parquet`; `manifest.json`,
    last. The same dataset gives the same bytes. Raises InputError for settings out of range.
    """
    if shard_size < 1:
        raise InputError(f"shard_size {shard_size}: at least 1 is needed")
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    source = open_dataset(dataset)
    shards, tables = [], []
    total = sum(counts["n"] for counts in source.facts["splits"].values())
    with tqdm(total=total, desc="writing shards", unit="cutout", disable=None) as progress:
        for name, split, images, table in _portions(source, shard_size):
            _write_tar(out / name, images, table, np.dtype(dtype).newbyteorder("<"))
            shards.append(_listed(out / name, split, table))
            tables.append(_index(out / name, table).assign(split=split, shard=name))
            progress.update(len(table))
    pd.concat(tables, ignore_index=True).to_parquet(out / INDEX, index=False)
    manifest = Manifest(
        format=asdict(source.format),
        dtype=np.dtype(dtype).newbyteorder("<").str,
        index=Listed(INDEX, file_sha256(out / INDEX), (out / INDEX).stat().st_size),
        shards=tuple(shards),
    )
    (out / MANIFEST).write_text(manifest.text)
    return manifest


def _portions(
    dataset: Dataset, shard_size: int
) -> Iterator[tuple[str, str, NDArray[np.float32], pd.DataFrame]]:
    """(tar's name, split, images, their table) of each shard."""
    for split in PARTS:
        images, table = dataset.images(split), dataset.table(split)
        for number, first in enumerate(range(0, len(table), shard_size)):
            part = slice(first, first + shard_size)
            yield f"{split}-{number:06d}.tar", split, images[part], table[part]


def _write_tar(
    path: Path, images: NDArray[np.float32], table: pd.DataFrame, dtype: np.dtype[Any]
) -> None:
    # A fixed time and owner: the same samples give the same bytes.
    with path.open("wb") as file, wds.TarWriter(file, mtime=0, user="", group="") as tar:
        labels = table["label"].map({1: b"1", 0: b"0"})
        for key, image, name, label in zip(table.index, images, table["id"], labels, strict=True):
            array = io.BytesIO()
            np.save(array, image.astype(dtype), allow_pickle=False)
            sample = {
                "__key__": f"{key:08d}",
                "npy": array.getvalue(),
                "json": json.dumps({"id": name}).encode(),
            }
            if isinstance(label, bytes):
                sample["cls"] = label
            tar.write(sample)


def _listed(path: Path, split: str, table: pd.DataFrame) -> Shard:
    return Shard(
        name=path.name,
        sha256=file_sha256(path),
        bytes=path.stat().st_size,
        split=split,
        samples=len(table),
        n_lens=int((table["label"] == 1).sum()),
        n_nonlens=int((table["label"] == 0).sum()),
    )


def _index(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Where in the tar each sample's pixels lie: after the .npy file's own header."""
    rows = []
    with tarfile.open(path) as tar, path.open("rb") as file:
        for entry in tar:
            if entry.name.endswith(".npy"):
                file.seek(entry.offset_data)
                npy.read_magic(file)
                shape, _, dtype = npy.read_array_header_1_0(file)
                rows.append((file.tell(), dtype.itemsize * int(np.prod(shape)), dtype.str, shape))
    index = pd.DataFrame(rows, columns=["offset", "bytes", "dtype", "shape"])
    index.insert(0, "id", table["id"].to_numpy())
    index.insert(1, "label", table["label"].array)
    return index
