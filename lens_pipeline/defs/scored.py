"""What an ensemble is scored on: the processed dataset, or the shards where there is none."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import dagster as dg

from lens_pipeline.defs.catalogue import catalogue_of
from lens_pipeline.defs.stages import CATALOGUE, CLOUD, DATASET, made
from lens_pipeline.settings import Settings

if TYPE_CHECKING:
    from lens_pipeline.catalogue.table import Catalogue
    from lens_pipeline.scoring.sources import ScoredDataset

AS_DATASET = "lens_pipeline.shards.as_dataset"


@dataclass(frozen=True)
class Source:
    """inputs: what decides on it, by content; opened: the dataset, and the catalogue it is of;
    modules: that read it."""

    inputs: dict[str, str]
    opened: "Callable[[], tuple[ScoredDataset, Catalogue]]"
    modules: tuple[str, ...] = ()


def scored_source(context: dg.AssetExecutionContext, settings: Settings, published: bool) -> Source:
    """published: there is no dataset that the shards were made from."""
    return (_of_shards if published else _of_dataset)(context, settings)


def _of_dataset(context: dg.AssetExecutionContext, settings: Settings) -> Source:
    table = made(context, CATALOGUE)
    parts = {name: made(context, DATASET, name) for name in settings.surveys or (None,)}

    def opened() -> "tuple[ScoredDataset, Catalogue]":
        from lens_pipeline.catalogue.dataset import open_dataset
        from lens_pipeline.catalogue.joined import JoinedDataset

        datasets = {str(name): open_dataset(part.folder) for name, part in parts.items()}
        (first, *others) = datasets.values()
        return JoinedDataset(datasets) if others else first, catalogue_of(settings, table.folder)

    contents = {f"dataset of {name}": part.content for name, part in parts.items()}
    return Source(contents | {"table": table.content}, opened)


def _of_shards(context: dg.AssetExecutionContext, settings: Settings) -> Source:
    shards = made(context, CLOUD)

    def opened() -> "tuple[ScoredDataset, Catalogue]":
        from lens_pipeline.shards.as_dataset import shards_as_dataset

        dataset = shards_as_dataset(
            shards.location, cache=settings.cache, storage_options=settings.storage_options
        )
        return dataset, dataset.catalogue

    return Source({"shards": shards.content}, opened, (AS_DATASET,))
