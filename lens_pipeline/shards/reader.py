"""Random access to shards: an index of byte offsets, and mapped files.

Nothing is mapped before it has been checked: reading past the end of a truncated file that is
mapped kills the process.
"""

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pandas as pd
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from lens_pipeline.catalogue.dataset import PARTS, CutoutFormat, CutoutRows
from lens_pipeline.errors import InputError
from lens_pipeline.shards.encoding import Encoding
from lens_pipeline.shards.manifest import (
    INDEX,
    MANIFEST,
    Listed,
    Manifest,
    difference,
    read_manifest,
)
from lens_pipeline.shards.store import Store, transfer
from lens_pipeline.steps import write_aside
from lens_pipeline.storage import locate

_LOCAL = LocalFileSystem()
_verified: set[tuple[int, ...]] = set()  # files whose sha256 has been checked by this process


@dataclass(frozen=True)
class ShardSplit(CutoutRows):
    """The cutouts of one split, in the order of the dataset.

    index: one row a cutout: id, label, shard, offset and bytes of its pixels; shape: (bands,
    height, width) of each.
    """

    folder: Path
    index: pd.DataFrame
    encoding: Encoding
    shape: tuple[int, int, int]

    @cached_property
    def _maps(self) -> list[memoryview]:
        end = (self.index["offset"] + self.index["bytes"]).groupby(self.index["shard"]).max()
        return [mapped(self.folder / name, end[name]) for name in self.index["shard"].unique()]

    @cached_property
    def _places(self) -> tuple[list[int], list[int]]:
        """For each cutout: which map, and where in it."""
        shard, _ = pd.factorize(self.index["shard"])
        return shard.tolist(), self.index["offset"].tolist()

    def gather(self, indices: NDArray[np.integer] | list[int]) -> NDArray[np.floating]:
        """The cutouts (n, bands, height, width) at these places of the split.

        As they are stored, float16 or float32; pictures are decoded to float32.
        """
        maps, (shard, offset) = self._maps, self._places
        if not self.encoding.is_raw:
            size = self.index["bytes"].to_numpy()
            return np.stack(
                [
                    self.encoding.decode(
                        bytes(maps[shard[i]][offset[i] : offset[i] + size[i]]), self.shape
                    )
                    for i in indices
                ]
            )
        n_bytes = int(np.prod(self.shape)) * self.encoding.dtype.itemsize
        # One copy of each cutout, all in one call: faster than assigning them to an array.
        whole = bytearray().join([maps[shard[i]][(o := offset[i]) : o + n_bytes] for i in indices])
        return np.frombuffer(whole, self.encoding.dtype).reshape(len(indices), *self.shape)


@dataclass(frozen=True)
class Shards:
    """Whole, checked shards in a local folder."""

    folder: Path
    manifest: Manifest

    @property
    def format(self) -> CutoutFormat:
        return CutoutFormat.from_dict(self.manifest.format)

    @property
    def encoding(self) -> Encoding:
        return Encoding(units=self.format.units, **self.manifest.encoding)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(bands, height, width) of a cutout."""
        return len(self.format.bands), self.format.image_size, self.format.image_size

    @cached_property
    def _index(self) -> pd.DataFrame:
        index = pd.read_parquet(self.folder / INDEX)
        self._check_index(index)
        return index

    @cached_property
    def _splits(self) -> dict[str, ShardSplit]:
        return {
            name: ShardSplit(
                self.folder,
                self._index[self._index["split"] == name].reset_index(drop=True),
                self.encoding,
                self.shape,
            )
            for name in PARTS
        }

    def split(self, name: str) -> ShardSplit:
        """`train`, `val`, `test` or `unlabelled`; its files stay mapped between uses."""
        return self._splits[name]

    def _check_index(self, index: pd.DataFrame) -> None:
        """Raises InputError where the index does not fit the shards that it points into."""
        encoding = self.encoding
        n_bytes = int(np.prod(self.shape)) * encoding.dtype.itemsize
        size = index["shard"].map({shard.name: shard.bytes for shard in self.manifest.shards})
        alike = (index["dtype"] == encoding.dtype.str) & (index["bytes"] > 0)
        alike &= index["shape"].map(lambda found: tuple(found) == self.shape)
        if encoding.is_raw:
            alike &= index["bytes"] == n_bytes
        inside = (index["offset"] >= 0) & (index["offset"] + index["bytes"] <= size)
        counts = index["shard"].value_counts()
        complete = all(counts.get(s.name, 0) == s.samples for s in self.manifest.shards)
        if not complete or not (alike & inside).all():
            path = self.folder / INDEX
            raise InputError(f"{path}: does not fit the shards of its manifest; write them again")


def open_shards(
    location: str | Path,
    *,
    cache: Path | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Shards:
    """Open the shards in a folder or at an fsspec URL, every file checked against the manifest.

    cache: a local folder to which remote shards are copied, under their version. Raises InputError,
    naming the file, where there is no manifest or a file is not what the manifest says.
    """
    options = dict(storage_options or {})
    filesystem, root = locate(str(location), options)
    manifest = read_manifest(location, options)
    if isinstance(filesystem, LocalFileSystem):
        folder = Path(root)
    else:
        if cache is None:
            raise InputError(f"{location}: remote shards need a cache folder; name one")
        folder = cache / manifest.dataset_version[:32]
        _fetch(Store(str(location), options), manifest, folder)
    for listed in manifest.files:
        wrong = _wrong(folder / listed.name, listed)
        if wrong:
            path = folder / listed.name
            raise InputError(f"{path}: {wrong}; write or fetch the shards again")
    return Shards(folder, manifest)


def _fetch(store: Store, manifest: Manifest, folder: Path) -> None:
    """Copy what is not there yet, several files at a time; of several processes one does, the
    others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / ".lock"):
        missing = [listed for listed in manifest.files if _wrong(folder / listed.name, listed)]
        transfer(missing, lambda listed: store.get_file(listed, folder / listed.name), "fetching")
        write_aside(folder / MANIFEST, manifest.text)


def _wrong(path: Path, listed: Listed) -> str | None:
    """How a local file differs from what the manifest lists.

    Size always; sha256 once a process for each (inode, size, time of change).
    """
    state: tuple[int, ...] = ()
    if path.is_file():
        stat = path.stat()
        state = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if state in _verified:
            return None
    wrong = difference(_LOCAL, str(path), listed)
    if wrong is None:
        _verified.add(state)
    return wrong


def mapped(path: Path, least: int) -> memoryview:
    """The bytes of a file. Raises InputError where there is none, or fewer bytes than `least`."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < max(least, 1):
                raise InputError(
                    f"{path}: was cut to {size} bytes; write or fetch the shards again"
                )
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as problem:
        raise InputError(f"{path}: cannot be read ({problem.strerror})") from None
