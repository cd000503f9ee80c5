"""Shards as something to score, and which kind a path or URL is of."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lens_pipeline.catalogue.cutout import Cutout, CutoutError, central
from lens_pipeline.catalogue.dataset import CutoutFormat
from lens_pipeline.catalogue.splits import PARTS
from lens_pipeline.catalogue.table import Catalogue, read_catalogue
from lens_pipeline.errors import InputError, masked
from lens_pipeline.locations import names_table
from lens_pipeline.models.system import BATCH
from lens_pipeline.scoring.sources import (
    CatalogueCutouts,
    CutoutSource,
    check_bands,
    check_pixel_scale,
    hashed,
)
from lens_pipeline.shards.as_dataset import ShardsAsDataset, shards_as_dataset
from lens_pipeline.shards.fetched import Ahead
from lens_pipeline.shards.reader import FetchedSplit
from lens_pipeline.shards.versions import published_at


@dataclass(frozen=True)
class ShardCutouts:
    """All splits of shards, in the order of the catalogue that they were made from."""

    dataset: ShardsAsDataset

    @cached_property
    def catalogue(self) -> Catalogue:
        found = self.dataset.catalogue
        return Catalogue(found.table.reset_index(drop=True), found.source)

    @property
    def identity(self) -> dict[str, Any]:
        version = self.dataset.shards.manifest.dataset_version
        return {"catalogue": {"source": masked(self.dataset.folder), "content": version}}

    def row_hashes(self) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        ids = self.catalogue.table["id"].to_numpy()
        version = self.dataset.shards.manifest.dataset_version  # what is in one never changes
        read = pd.DataFrame({"id": ids, "version": version})
        return hashed(read), np.ones(len(ids), dtype=bool)

    @cached_property
    def _places(self) -> tuple[NDArray[Any], NDArray[np.integer]]:
        """Of each row: its split, and its place in there."""
        rows = self.dataset.rows
        place = rows.groupby("split").cumcount()
        order = np.argsort(rows["row"].to_numpy(), kind="stable")
        return rows["split"].to_numpy(dtype=object)[order], place.to_numpy()[order]

    @cached_property
    def order(self) -> NDArray[np.integer]:
        # Shard by shard: rows that follow on each other lie in any of them, and where not all fit
        # into the cache each would be fetched again and again.
        split, place = self._places
        return np.lexsort((place, pd.factorize(split)[0]))

    def sample(self, rows: NDArray[np.integer], n: int) -> NDArray[np.integer]:
        # Of a split's that follow on each other, and so lie in a shard or two, and in their order:
        # these hold them in a random one.
        split, place = (values[rows] for values in self._places)
        names, sizes = np.unique(split.astype(str), return_counts=True)
        mine = np.flatnonzero(split == names[np.argmax(sizes)])
        return rows[mine[np.argsort(place[mine])][:n]]

    def check(self, form: CutoutFormat) -> None:
        mine, where = self.dataset.format, self.dataset.folder
        check_bands(form, mine.named_bands, where)
        check_pixel_scale(form, self.catalogue.table, where)
        for name, has, takes in (
            ("bands", len(mine.bands), len(form.bands)),
            ("units", mine.units, form.units),
        ):
            if has != takes and not (name == "bands" and mine.named_bands and form.named_bands):
                raise InputError(f"{where}: {name}: {has}; the model takes {takes}")
        if mine.image_size < form.image_size:
            raise InputError(
                f"{where}: the cutouts have {mine.image_size} pixels; the model takes "
                f"{form.image_size}"
            )

    def read(
        self, form: CutoutFormat, rows: NDArray[np.integer]
    ) -> Iterator[NDArray[np.float32] | CutoutError]:
        split, place = (values[rows] for values in self._places)
        with ExitStack() as stack:
            ahead: dict[str, Ahead] = {}
            read = dict.fromkeys(PARTS, 0)
            for start in range(0, len(split), BATCH):
                of, at = split[start : start + BATCH], place[start : start + BATCH]
                shape = (len(self.dataset.format.bands), form.image_size, form.image_size)
                block = np.empty((len(of), *shape), dtype=np.float32)
                for part in pd.unique(of):
                    mine, cutouts = of == part, self.dataset.split(part)
                    # Not before: in `order` splits follow on each other, and what is fetched for
                    # one would push out of the cache what another is about to read.
                    if part not in ahead and isinstance(cutouts, FetchedSplit):
                        coming = cutouts.ahead(place[split == part])
                        ahead[part] = stack.enter_context(coming)
                    block[mine] = central(cutouts.gather(at[mine]), form.image_size)
                    read[part] += int(mine.sum())
                    if part in ahead:
                        ahead[part].read(read[part])
                for pixels in block:
                    yield self._fitted(form, pixels)

    def _fitted(self, form: CutoutFormat, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        mine = self.dataset.format
        return form.fitted(Cutout(pixels, mine.units, mine.named_bands)).pixels


def open_cutout_source(
    location: str | Path,
    *,
    cache: str | Path,
    pad: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> CutoutSource:
    """The cutouts of a catalogue, of a folder of images, or of published shards.

    location: a path or an fsspec URL; cache: where remote shards are kept while they are read; pad:
    see `build_dataset`. Raises InputError where there is nothing of the kind.
    """
    location = str(location)
    version = None if names_table(location) else published_at(location, storage_options)
    if version is not None:
        return ShardCutouts(
            shards_as_dataset(version, cache=cache, storage_options=storage_options)
        )
    options = dict(storage_options or {})
    return CatalogueCutouts(read_catalogue(location, options), options, pad)
