"""Labelled cutouts by split, wherever they lie: shards, a processed dataset, a catalogue."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from lens_pipeline.catalogue.build import LIBRARIES, build_dataset
from lens_pipeline.catalogue.cutout import central
from lens_pipeline.catalogue.dataset import (
    REJECTS,
    CutoutFormat,
    Dataset,
    Empty,
    Split,
    open_dataset,
    rejects_in_words,
)
from lens_pipeline.catalogue.images import files_fingerprint
from lens_pipeline.catalogue.table import read_catalogue, source_fingerprint
from lens_pipeline.errors import InputError
from lens_pipeline.locations import absolute
from lens_pipeline.settings import Settings
from lens_pipeline.shards.manifest import MANIFEST
from lens_pipeline.shards.prepare import IMAGE_SIZE
from lens_pipeline.shards.reader import FetchedSplit, ShardSplit, shards_at
from lens_pipeline.shards.store import Store
from lens_pipeline.shards.versions import version_at
from lens_pipeline.steps import Recipe, check_unchanged, last_used, run_step

log = logging.getLogger(__name__)


class Cutouts(Protocol):
    """`split`: `train`, `val`, `test` or `unlabelled`; content: a hash of what lies there."""

    @property
    def format(self) -> CutoutFormat: ...

    @property
    def content(self) -> str: ...

    def split(self, name: str, /) -> Split: ...


@dataclass(frozen=True)
class Cropped:
    """The central `size` x `size` pixels of others."""

    whole: Cutouts
    size: int

    @property
    def format(self) -> CutoutFormat:
        return replace(self.whole.format, image_size=self.size)

    @property
    def content(self) -> str:
        return self.whole.content

    def split(self, name: str, /) -> "CroppedSplit":
        whole = self.whole.split(name)
        return CroppedSplit(whole.index, whole, self.size)


@dataclass(frozen=True)
class CroppedSplit(Split):
    index: pd.DataFrame
    whole: Split
    size: int

    def gather(self, indices: ArrayLike, empty: Empty = np.empty) -> NDArray[np.floating]:
        pixels = central(self.whole.gather(indices), self.size)
        out = empty(pixels.shape, pixels.dtype)
        out[...] = pixels
        return out


def in_shards(split: Split) -> ShardSplit | None:
    """What is behind a split that lies in shards."""
    whole = split.whole if isinstance(split, CroppedSplit) else split
    return whole if isinstance(whole, ShardSplit) else None


def fetched(split: Split) -> FetchedSplit | None:
    """What is behind a split whose shards are fetched when they are needed."""
    whole = in_shards(split)
    return whole if isinstance(whole, FetchedSplit) else None


def cropped(cutouts: Cutouts, size: int | None, name: str) -> Cutouts:
    """The cutouts, cut to `size` if one is asked for. Raises InputError where they are smaller."""
    own = cutouts.format.image_size
    if size is None or size == own:
        return cutouts
    if size < 1:
        raise InputError(f"image_size {size}: at least 1 is needed")
    if size > own:
        raise InputError(
            f"image_size {size}: the cutouts of {name} have {own} pixels; leave it out "
            "(a network resizes them for itself), or make them larger: LENS_IMAGE_SIZE"
        )
    return Cropped(cutouts, size)


def open_cutouts(
    location: str | Path | None = None,
    *,
    image_size: int | None = None,
    cache: Path | None = None,
    cache_gb: float | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Cutouts:
    """The cutouts in a folder or at an fsspec URL, of whatever kind they are there.

    location: shards with their manifest, or the newest version of those that are published there;
    a processed dataset; a catalogue, or a folder of cutouts, which are read once, with LENS_BANDS,
    LENS_PAD, LENS_SURVEY, LENS_SEED and LENS_MAX_REJECT_FRACTION, and kept as a processed dataset;
    by default the newest shards of LENS_HOME.
    image_size: the central square to keep, by default all, and 64 pixels of a catalogue. cache:
    where remote shards and read cutouts are kept, by default in LENS_HOME; cache_gb: how much of
    the shards, LENS_CACHE_GB by default. Raises InputError where there is nothing of the kind.
    """
    settings = Settings.load()
    cache = cache or settings.cache
    options = dict(storage_options if storage_options is not None else settings.storage_options)
    named = absolute(str(location)) if location is not None else str(newest_shards(settings.home))
    place = version_at(named, options)
    store = Store(place, options)
    shards = shards_at(store, cache, cache_gb)
    if shards is not None:
        return cropped(shards, image_size, place)
    if store.is_local and Path(store.root, "dataset.json").is_file():
        return cropped(open_dataset(store.root), image_size, place)
    return _processed(place, image_size or IMAGE_SIZE, cache, options, settings)


def newest_shards(home: Path) -> Path:
    """Those that were last made, or reused: who goes back to former settings means the shards of
    these. Raises InputError where the home has none."""
    whole = (home / "shards").glob(f"[!.]*/{MANIFEST}")  # of a hidden one, not all may be there
    found = sorted(whole, key=lambda path: (last_used(path.parent), path.stat().st_mtime))
    if not found:
        raise InputError(
            f"{home}: holds no shards; name a data_root, or make some: lens-pipeline run"
        )
    return found[-1].parent


def _processed(
    source: str, image_size: int, cache: Path, options: dict[str, Any], settings: Settings
) -> Dataset:
    """The processed dataset of a catalogue, of the rows that LENS_SURVEY names, if any; made unless
    it is there already."""
    catalogue = read_catalogue(source, options)
    if settings.survey:
        catalogue = catalogue.of_surveys(settings.survey, settings.seed)

    def inputs() -> dict[str, str]:
        return {
            "source": source_fingerprint(source, options),
            "images": files_fingerprint(catalogue.references, options),
            **({"surveys": ",".join(settings.survey)} if settings.survey else {}),
        }

    recipe = Recipe(
        stage="processed_dataset",
        modules=(build_dataset.__module__,),
        libraries=LIBRARIES,
        inputs=inputs(),
        settings={
            "image_size": image_size,
            "bands": settings.bands,
            "pad": settings.pad,
            "split_seed": settings.seed,
            "max_reject_fraction": settings.max_reject_fraction,
            "origin": source,
        },
    )

    def build(out: Path) -> None:
        build_dataset(catalogue, out, options=options, **recipe.settings)
        check_unchanged(source, recipe.inputs, inputs())

    step = run_step(recipe, cache, build)
    dataset = open_dataset(step.folder)
    if not step.reused and len(rejects := dataset.rejects()):
        file = dataset.folder / REJECTS
        log.warning("%s", rejects_in_words(rejects, dataset.facts["n_rows"], file))
    return dataset
