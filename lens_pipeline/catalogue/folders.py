"""Folders of cutouts that are catalogues: how they are laid out, and the table that they make."""

import io
import posixpath
from collections.abc import Iterable
from typing import NamedTuple

import fsspec
import numpy as np
import pandas as pd

from lens_pipeline.catalogue.columns import NUMBERS, as_text, numbers, refuse, zero_or_one
from lens_pipeline.catalogue.splits import SPLITS
from lens_pipeline.catalogue.table_files import read_csv
from lens_pipeline.errors import InputError

IMAGE_SUFFIXES = (
    *(".fits", ".fit", ".fz", ".fits.gz", ".fit.gz", ".npy", ".npz"),
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff"),
)
CLASS_FOLDERS = {"lens": "1", "nonlens": "0"}


class Layout(NamedTuple):
    """What of a folder is its catalogue, by the names below it; other things may lie there, a
    LENS_HOME among them.

    listings: {split: the file that lists it}; images: of the folders `split/class` of the other
    splits, or, where there is neither, of those of classes alone, or of the folder itself.
    """

    listings: dict[str, str]
    images: list[str]


def layout(filesystem: fsspec.AbstractFileSystem, inside: str) -> Layout:
    """Where a folder holds none of it, both are empty."""
    names = {split: f"{split}.csv" for split in SPLITS}
    listings = {s: n for s, n in names.items() if filesystem.exists(posixpath.join(inside, n))}
    unlisted = [split for split in SPLITS if split not in listings]
    images = _below(filesystem, inside, (f"{s}/{kind}" for s in unlisted for kind in CLASS_FOLDERS))
    if not listings and not images:
        images = _below(filesystem, inside, CLASS_FOLDERS) or images_in(filesystem, inside)
    return Layout(listings, images)


def read_folder(source: str, filesystem: fsspec.AbstractFileSystem, inside: str) -> pd.DataFrame:
    """A row for each image of a folder, and of its listings.

    Raises InputError where it has none, where two are of one path and without ids, and for a
    listing of other columns, an empty path, a label that is neither 0 nor 1 nor empty, or a
    position or scale that is no number.
    """
    listings, images = layout(filesystem, inside)
    if not listings:
        _check_no_other(source, filesystem, inside, images)
    tables = [
        _read_listing(filesystem, posixpath.join(inside, name)).assign(split=split)
        for split, name in listings.items()
    ]
    if images:
        tables.append(pd.DataFrame([_row(path) for path in images]))
    in_all = set.intersection(*map(set, tables))
    found = pd.concat(
        # Whole numbers as such where other splits have none.
        [t.astype(dict.fromkeys({*t.select_dtypes("int64")} - in_all, "Int64")) for t in tables],
        ignore_index=True,
    )
    # Of listings that number their rows each for itself, paths are the ids.
    if "id" in found:
        own = as_text(found["id"])
        if own.notna().all() and own.is_unique:
            return found.assign(id=own)
    again = found["path"][found["path"].duplicated()]
    if len(again):
        names = [*listings.values(), "the folders of classes"]
        places = [
            f"row {row} of {name}"
            for name, table in zip(names, tables, strict=False)
            for row in np.flatnonzero(table["path"] == again.iloc[0]) + 1
        ]
        raise InputError(
            f"{source}: {again.iloc[0]} is there twice, in {places[0]} and {places[1]}; leave one "
            "out, or give all rows a unique id"
        )
    return found.assign(id=found["path"])


def images_in(filesystem: fsspec.AbstractFileSystem, folder: str) -> list[str]:
    """Names of the images that lie in a folder, sorted."""
    names = (posixpath.basename(name) for name in filesystem.ls(folder, False))
    return sorted(name for name in names if name.lower().endswith(IMAGE_SUFFIXES))


def _below(filesystem: fsspec.AbstractFileSystem, inside: str, folders: Iterable[str]) -> list[str]:
    """The images of those folders that there are, `folder/name`."""
    places = {folder: posixpath.join(inside, folder) for folder in folders}
    there = {folder: place for folder, place in places.items() if filesystem.isdir(place)}
    return [f"{f}/{name}" for f, place in there.items() for name in images_in(filesystem, place)]


def _check_no_other(
    source: str, filesystem: fsspec.AbstractFileSystem, inside: str, images: list[str]
) -> None:
    """Raises InputError for a folder without listings that is no catalogue, or might be two, or
    holds images where they are not looked for."""
    depth = max((path.count("/") for path in images), default=0)  # 2: of splits, 1: of classes
    if depth < 2:
        for name in ("catalogue.parquet", "catalogue.csv"):
            if filesystem.exists(posixpath.join(inside, name)):
                raise InputError(f"{source}: is no catalogue, but holds one: name {source}/{name}")
    if not images:
        if any(name.endswith(".parquet") for name in filesystem.ls(inside, False)):
            raise InputError(f"{source}: is a folder of Parquet files; write them as one file")
        raise InputError(
            f"{source}: no cutouts; a folder holds images, or lens|nonlens/ with them, or "
            "train|val|test/lens|nonlens/, or train.csv ..."
        )
    beside = images_in(filesystem, inside) if depth else []
    if depth == 2:
        others = [name for name in _folders_in(filesystem, inside) if name not in SPLITS]
        classes = [f"{name}/{kind}" for name in others for kind in CLASS_FOLDERS]
        beside += _below(filesystem, inside, (*CLASS_FOLDERS, *classes))
    if beside:
        raise InputError(
            f"{source}: holds {images[0]}, and beside such folders {beside[0]}; move either"
        )
    for folder in sorted({posixpath.dirname(path) for path in images} if depth else ()):
        place = posixpath.join(inside, folder)
        for name in _folders_in(filesystem, place):
            if images_in(filesystem, posixpath.join(place, name)):
                raise InputError(
                    f"{source}: {folder}/{name} holds images; move them to {folder}, where those "
                    "of its class lie, or write a table of all"
                )


def _folders_in(filesystem: fsspec.AbstractFileSystem, folder: str) -> list[str]:
    entries = filesystem.ls(folder, True)
    folders = [entry["name"] for entry in entries if entry["type"] == "directory"]
    names = sorted(posixpath.basename(name.rstrip("/")) for name in folders)
    return [name for name in names if not name.startswith(".")]


def _read_listing(filesystem: fsspec.AbstractFileSystem, listing: str) -> pd.DataFrame:
    with filesystem.open(listing, "rb") as file:
        table = read_csv(io.BytesIO(file.read()), listing)
    missing = {"filepath", "label"} - set(table)
    if missing:
        raise InputError(f"{listing}: column {sorted(missing)[0]} is missing")
    paths = as_text(table["filepath"])
    refuse(listing, table, paths.isna(), "filepath", "is empty")
    labels = zero_or_one(table, "label", listing)
    for name in [name for name in NUMBERS if name in table]:
        numbers(table, name, listing, NUMBERS[name])
    return table.drop(columns="filepath").assign(path=paths, label=labels)


def _row(path: str) -> dict[str, str | None]:
    """Of an image: what the folders that it lies in say."""
    row: dict[str, str | None] = {"id": path, "path": path}
    *split, kind = path.split("/")[:-1] or [""]
    if kind:
        row |= {"label": CLASS_FOLDERS[kind], "split": split[0] if split else None}
    return row
