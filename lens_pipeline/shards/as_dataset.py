"""Whole shards, seen as the dataset that they were written from: it can be scored without it."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from lens_pipeline.catalogue.dataset import REJECT_COLUMNS, CutoutFormat
from lens_pipeline.catalogue.splits import PARTS, check_part
from lens_pipeline.catalogue.table import Catalogue
from lens_pipeline.shards.manifest import Manifest
from lens_pipeline.shards.reader import Shards, ShardSplit, open_shards
from lens_pipeline.shards.store import Store


@dataclass(frozen=True)
class ShardsAsDataset:
    """See `Dataset`. Its pixels are those of the shards; its rejects, which shards do not hold, are
    none.

    folder: where the shards lie, a path or a URL; rows: their `catalogue.parquet`.
    """

    folder: str
    shards: Shards
    rows: pd.DataFrame

    @property
    def format(self) -> CutoutFormat:
        return self.shards.format

    @cached_property
    def facts(self) -> dict[str, Any]:
        manifest = self.shards.manifest
        counts = {part: {"n": int((self.rows["split"] == part).sum())} for part in PARTS}
        origin = "simulation" if manifest.simulated else self.folder
        return {"content": manifest.dataset, "origin": origin, "splits": counts}

    def split(self, part: str) -> ShardSplit:
        return self.shards.split(part)

    def table(self, part: str) -> pd.DataFrame:
        check_part(part)
        return self.rows[self.rows["split"] == part].reset_index(drop=True)

    def rejects(self) -> pd.DataFrame:
        return pd.DataFrame(columns=REJECT_COLUMNS)

    @property
    def catalogue(self) -> Catalogue:
        """The rows of the catalogue that became cutouts, in its order, by their number there."""
        table = self.rows.set_index("row").sort_index()
        return Catalogue(table.drop(columns="split"), self.folder)


def shards_as_dataset(
    location: str, *, cache: str | Path, storage_options: Mapping[str, Any] | None = None
) -> ShardsAsDataset:
    """The shards in a folder or at a URL; cache: see `open_shards`, whose errors it raises."""
    shards = open_shards(location, cache=cache, storage_options=storage_options)
    rows = read_rows(location, shards.manifest, storage_options)
    return ShardsAsDataset(location, shards, rows)


def read_rows(
    location: str, manifest: Manifest, storage_options: Mapping[str, Any] | None = None
) -> pd.DataFrame:
    """The catalogue of the shards' cutouts, with `split` and `group`, one row each."""
    content = Store(location, storage_options).listed(manifest.catalogue)
    return pd.read_parquet(io.BytesIO(content))
