"""Random access to shards: an index of byte offsets, and mapped files.

Nothing is mapped before it has been checked: reading past the end of a truncated file that is
mapped kills the process.
"""

import io
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from lens_pipeline.catalogue.dataset import CutoutFormat, Empty, Split, places_of
from lens_pipeline.catalogue.splits import check_part
from lens_pipeline.errors import InputError
from lens_pipeline.settings import Settings
from lens_pipeline.shards.cache import CacheFolder, mapped
from lens_pipeline.shards.checked import CheckedFolder
from lens_pipeline.shards.encoding import Encoding
from lens_pipeline.shards.fetched import Ahead, Fetched, ShardCache, ShardMemory
from lens_pipeline.shards.manifest import INDEX, Manifest
from lens_pipeline.shards.memory import ShardContent, copy_from, stacked
from lens_pipeline.shards.store import Store, no_manifest

MAPS = 10_000  # of a split: Linux lets a process have 65,530 by default (vm.max_map_count)


@dataclass(frozen=True)
class ShardSplit(Split):
    """The cutouts of one split, in the order of the shards.

    index: one row a cutout: id, label, shard, offset and bytes of its pixels; shape: (bands,
    height, width) of each.
    """

    index: pd.DataFrame
    encoding: Encoding
    shape: tuple[int, int, int]

    @abstractmethod
    def _contents(self, names: list[str]) -> Mapping[str, ShardContent]:
        """Of these shards, and maybe of others."""

    @cached_property
    def shards(self) -> tuple[NDArray[np.intp], list[str]]:
        """For each cutout the number of its shard; the names of the shards."""
        number, names = pd.factorize(self.index["shard"])
        return number, list(names)

    @cached_property
    def _offset(self) -> NDArray[np.int64]:
        return self.index["offset"].to_numpy(dtype=np.int64)

    def gather(self, indices: ArrayLike, empty: Empty = np.empty) -> NDArray[np.floating]:
        """The cutouts (n, bands, height, width) at these places of the split.

        As they are stored, float16 or float32; pictures are decoded to float32. indices: see
        `places_of`; empty: makes the array that they are put into.
        """
        places = places_of(indices, len(self))
        number, names = self.shards
        used = np.unique(number[places])
        contents = self._contents([names[one] for one in used])
        if not self.encoding.is_raw:
            size = self.index["bytes"].to_numpy()
            views = [contents[names[number[i]]].view for i in places]
            ends = zip(views, self._offset[places], size[places], strict=True)
            cutouts = [self.encoding.decode(bytes(v[o : o + n]), self.shape) for v, o, n in ends]
            return stacked(cutouts, self.shape, empty)
        begin = np.zeros(len(names), np.int64)
        begin[used] = [contents[names[one]].address for one in used]
        out = empty((len(places), *self.shape), self.encoding.dtype)
        copy_from(begin[number[places]] + self._offset[places], out)
        return out


@dataclass(frozen=True)
class LocalSplit(ShardSplit):
    """In files of a folder, mapped when a cutout of them is asked for; MAPS stay so."""

    folder: Path

    def _contents(self, names: list[str]) -> Mapping[str, ShardContent]:
        wanted = {name: self._mapped.get(name) or self._map(name) for name in names}
        # Threads may share it: each holds what it reads, which is unmapped when no one does.
        self._mapped.update(wanted)
        for name in list(self._mapped)[: max(0, len(self._mapped) - MAPS)]:
            self._mapped.pop(name, None)
        return wanted

    def __getstate__(self) -> dict[str, Any]:
        """Without the maps, which another process makes for itself."""
        return {name: value for name, value in vars(self).items() if name != "_mapped"}

    def _map(self, name: str) -> ShardContent:
        return ShardContent(mapped(self.folder / name, self._least[name]))

    @cached_property
    def _mapped(self) -> dict[str, ShardContent]:
        return {}

    @cached_property
    def _least(self) -> dict[str, int]:
        """Bytes that each file has at least."""
        end = (self.index["offset"] + self.index["bytes"]).groupby(self.index["shard"]).max()
        return {str(name): int(least) for name, least in end.items()}


@dataclass(frozen=True)
class FetchedSplit(ShardSplit):
    """In remote shards, each of which is fetched when a cutout of it is asked for, or `ahead`."""

    fetched: Fetched

    def _contents(self, names: list[str]) -> Mapping[str, ShardContent]:
        return self.fetched.contents(names)

    @property
    def n_bytes(self) -> int:
        return sum(self.fetched.listed[name].bytes for name in self.shards[1])

    def ahead(self, places: NDArray[np.integer]) -> Ahead:
        """Fetches the shards of these cutouts in the order of their use while its block runs, which
        tells it how many of the cutouts have been read."""
        number, names = self.shards
        used = number[places]
        last = np.zeros(len(names), int)
        last[used] = np.arange(1, len(used) + 1)
        return Ahead(self.fetched, {names[one]: int(last[one]) for one in pd.unique(used)})


@dataclass(frozen=True)
class Shards:
    """The shards of a manifest: `at` a local folder, where they are whole and checked, or fetched
    when they are needed."""

    at: Path | Fetched
    manifest: Manifest

    @property
    def format(self) -> CutoutFormat:
        return CutoutFormat.from_dict(self.manifest.format)

    @property
    def content(self) -> str:
        """The manifest's sha256."""
        return self.manifest.dataset_version

    @property
    def encoding(self) -> Encoding:
        return Encoding(units=self.format.units, **self.manifest.encoding)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(bands, height, width) of a cutout."""
        return self.format.shape

    @cached_property
    def _index(self) -> pd.DataFrame:
        if isinstance(self.at, Fetched):
            table = pq.read_table(io.BytesIO(self.at.contents([INDEX])[INDEX].view))
        else:
            table = pq.read_table(self.at / INDEX)
        # As lists of pandas the shapes took as long as all else.
        shapes = table["shape"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        index = table.drop_columns("shape").to_pandas()
        self._check_index(index, shapes)
        return index

    @cached_property
    def _splits(self) -> dict[str, ShardSplit]:
        return {}

    def _split(self, name: str) -> ShardSplit:
        rows = self._index[self._index["split"] == name].reset_index(drop=True)
        if isinstance(self.at, Fetched):
            return FetchedSplit(rows, self.encoding, self.shape, self.at)
        return LocalSplit(rows, self.encoding, self.shape, self.at)

    def split(self, name: str) -> ShardSplit:
        """`train`, `val`, `test` or `unlabelled`; its files stay mapped between uses. Raises
        InputError for another name."""
        check_part(name)
        if name not in self._splits:
            self._splits[name] = self._split(name)
        return self._splits[name]

    def _check_index(self, index: pd.DataFrame, shapes: NDArray[np.integer]) -> None:
        """Raises InputError where the index does not fit the shards that it points into.

        shapes: those of all cutouts, one after the other.
        """
        encoding, shape = self.encoding, self.shape
        n_bytes = int(np.prod(shape)) * encoding.dtype.itemsize
        number, names = pd.factorize(index["shard"])
        sizes = {shard.name: shard.bytes for shard in self.manifest.shards}
        size = np.array([sizes.get(name, 0) for name in names], dtype=np.int64)[number]
        alike = (index["dtype"] == encoding.dtype.str) & (index["bytes"] > 0)
        alike &= np.array_equal(shapes, shape * len(index))
        if encoding.is_raw:
            alike &= index["bytes"] == n_bytes
            alike &= index["offset"] % encoding.dtype.itemsize == 0
        inside = (number >= 0) & (index["offset"] >= 0) & (index["offset"] + index["bytes"] <= size)
        counts = index["shard"].value_counts()
        complete = all(counts.get(s.name, 0) == s.samples for s in self.manifest.shards)
        if not complete or not (alike & inside).all():
            where = self.at.url if isinstance(self.at, Fetched) else self.at
            raise InputError(
                f"{where}/{INDEX}: does not fit the shards of its manifest; write them again"
            )


def open_shards(
    location: str | Path,
    *,
    cache: str | Path | None = None,
    cache_gb: float | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Shards:
    """Open the shards in a folder or at an fsspec URL.

    In a folder every file is checked against the manifest: what has not changed since it was last
    read by its size and times alone, unless LENS_VERIFY is set. Remote ones are fetched when they
    are needed, and checked then: into `cache`, a folder that holds up to `cache_gb` of shards
    (LENS_CACHE_GB by default), or else into memory. Raises InputError, naming the file, where there
    is no manifest or a file is not what the manifest says.
    """
    kept_in = None if cache is None else Path(cache)
    found = shards_at(Store(str(location), storage_options), kept_in, cache_gb)
    if found is None:
        raise no_manifest(location)
    return found


def shards_at(store: Store, cache: Path | None, cache_gb: float | None) -> Shards | None:
    """See `open_shards`; None where there is no manifest."""
    manifest = store.manifest()
    if manifest is None:
        return None
    if store.is_local:
        folder = Path(store.root)
        with CheckedFolder(folder, every_byte=Settings.load().verify) as checked:
            for listed in manifest.files:
                checked.require(listed)
        return Shards(folder, manifest)
    if cache is None:
        return Shards(ShardMemory(store.url, manifest, store.storage_options), manifest)
    kept = CacheFolder.of(cache, cache_gb)
    return Shards(ShardCache(store.url, manifest, kept, store.storage_options), manifest)
