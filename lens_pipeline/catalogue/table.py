"""Catalogues of cutouts: reading, schema and validation.

A catalogue is a CSV, Parquet, FITS or VOTable file, or a folder laid out `{split}/{lens,nonlens}/`,
or `{lens,nonlens}/`, or with `{split}.csv` (columns `filepath,label`), or of images alone, which
have no label.
"""

import hashlib
import logging
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lens_pipeline.catalogue.columns import (
    NUMBERS,
    as_text,
    image_columns,
    is_ours,
    numbers,
    parquet_schema,
    refuse,
    stripped,
    zero_or_one,
)
from lens_pipeline.catalogue.folders import CLASS_FOLDERS, layout, read_folder
from lens_pipeline.catalogue.splits import SPLITS, assign_splits
from lens_pipeline.catalogue.table_files import named, read_table, reading
from lens_pipeline.errors import InputError, first_of
from lens_pipeline.locations import names_table, protocol_of, without_query
from lens_pipeline.storage import asking, locate, states_of

COARSEST = 10.0  # arcsec/pixel: in coarser ones nobody looks for lenses, and milliarcsec look so
FINEST = 1e-3  # arcsec/pixel: no camera of the sky has finer pixels, and in degrees most have
WHOLE = re.compile(r"^([+-]?\d+)\.0+$")  # a number, with decimals
DOTS = re.compile(r"(^|/)\.\.?/")
FRAME = "the DataFrame"  # what messages call one

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Catalogue:
    """A validated table, one row a cutout, in the user's order; `read_catalogue` makes one.

    table: its index the number of the row at its source, from 0; `id` (text, unique), the image
    columns (`path`, or `path_<band>` for each band; paths or URLs), `label` (nullable
    Int8: 1 lens, 0 not, missing unknown), `group` (text), `split` (text or missing), `survey` where
    it is given (text or missing), `simulated` likewise (nullable boolean: missing is not), and the
    user's further columns as they were.
    """

    table: pd.DataFrame
    source: str

    @property
    def image_columns(self) -> list[str]:
        return image_columns(self.table)

    @property
    def references(self) -> list[str]:
        """Every image path, in row order."""
        return [str(path) for path in self.table[self.image_columns].to_numpy().ravel()]

    @property
    def bands(self) -> list[str] | None:
        """Names of the bands where the columns tell them, else None.

        By `path_<band>`, or by one value of a column `bands`, as `g,r,i`.
        """
        columns = self.image_columns
        if columns != ["path"]:
            return [name.removeprefix("path_") for name in columns]
        stated = set(self.table["bands"].dropna()) if "bands" in self.table else set()
        return _split_names(stated.pop()) if len(stated) == 1 else None

    def bands_of(self, rows: NDArray[np.integer]) -> list[list[str] | None]:
        """Those of each of some rows (from 0), which need not be the same, nor in one order; where
        a row says nothing, those that all others say, and none ([]) where these differ."""
        common = self.bands
        if self.image_columns != ["path"] or "bands" not in self.table:
            return [common] * len(rows)
        stated = self.table["bands"].iloc[rows]
        if common is None and self.table["bands"].notna().any():
            common = []
        return [common if pd.isna(names) else _split_names(names) for names in stated]

    def of_surveys(self, names: Sequence[str], split_seed: int) -> "Catalogue":
        """The rows of these surveys, each in the split that it has among all: a group may show one
        galaxy in several surveys.

        Raises InputError where a survey has no rows.
        """
        if "survey" not in self.table:
            raise InputError(
                f"{self.source}: column survey is missing, which would tell the rows of "
                f"{', '.join(names)}"
            )
        survey = self.table["survey"]
        for name in names:
            if not (survey == name).any():
                known = ", ".join(map(repr, sorted(survey.dropna().unique()))) or "nothing"
                raise InputError(
                    f"{self.source}: column survey: no row is of {name!r}; it names {known}"
                )
        split = assign_splits(self.table, split_seed)
        whole = self.table.assign(split=split.where(self.table["label"].notna(), None))
        chosen = whole[survey.isin(names)]
        # What other surveys' rows hold decides on the kinds of whole columns.
        kinds = chosen.select_dtypes(["number", "bool", "object"])
        kinds = kinds.drop(columns=[column for column in kinds if is_ours(column)])
        kinds = kinds.convert_dtypes(convert_string=False)
        return Catalogue(chosen.assign(**kinds), f"{self.source} ({', '.join(names)})")


def _split_names(text: Any) -> list[str]:
    return [name.strip() for name in str(text).split(",")]


def read_catalogue(
    source: str | Path | pd.DataFrame,
    storage_options: Mapping[str, Any] | None = None,
    *,
    folder: str | Path | None = None,
) -> Catalogue:
    """Read and validate a catalogue from a local path or an fsspec URL, or validate a DataFrame.

    folder: a path or URL that the images of a DataFrame are relative to, the working directory
    unless one is given; those of a file are relative to the file. A named index is a column.

    Raises InputError, naming file, row and column, for: a missing or unreadable source, an empty
    table, no `id` or image column, a duplicate or missing id, a missing path, a label other than 1,
    0 or empty, an unknown split, a group with two splits, a `simulated` that is neither true nor
    false; NoAnswerError where its store fails.
    """
    if isinstance(source, pd.DataFrame):
        return Catalogue(_validated(named(source, FRAME), FRAME, str(folder or ".")), FRAME)
    if not isinstance(source, str | Path):
        raise InputError(
            f"a catalogue is a path, a URL or a pandas DataFrame, not a {type(source).__name__}; "
            "an astropy Table gives one: table.to_pandas()"
        )
    if folder is not None:
        raise InputError(f"folder {folder}: is of a DataFrame; images are relative to {source}")
    return _read(str(source), storage_options)


def _read(source: str, storage_options: Mapping[str, Any] | None) -> Catalogue:
    options = dict(storage_options or {})
    with reading(source, "a catalogue"):
        filesystem, inside = locate(source, options)
        with asking(source):
            is_folder = filesystem.isdir(inside)
        if is_folder:
            with asking(source):
                table, folder = read_folder(source, filesystem, inside), source
        else:
            if not names_table(source) and not filesystem.exists(inside):
                raise FileNotFoundError(source)
            table = read_table(source, options)
            folder = posixpath.dirname(without_query(source))
    return Catalogue(_validated(table, source, folder or "."), source)


def source_fingerprint(source: str, storage_options: Mapping[str, Any] | None = None) -> str:
    """sha256 of a catalogue file; of the listing and the split tables where it is a folder.

    Raises InputError where there is no such file or folder, NoAnswerError where its store fails.
    """
    with reading(source, "a catalogue"), asking(source):
        return _fingerprint(source, storage_options)


def source_glance(source: str, storage_options: Mapping[str, Any] | None = None) -> str | None:
    """What tells, without reading it, that a catalogue may have changed: the size and time (or the
    ETag) of the file; of a local folder those of the folders and split tables in it.

    None where nothing tells it: there is no such file, or the folder lies in a store. Raises
    NoAnswerError where a store fails.
    """
    places = [source]
    if not protocol_of(source) and Path(source).is_dir():
        splits = [Path(source, split) for split in SPLITS]
        classes = [folder / kind for folder in (Path(source), *splits) for kind in CLASS_FOLDERS]
        tables = [Path(source, f"{split}.csv") for split in SPLITS]
        inside = [*splits, *classes, *tables]
        places += [str(place) for place in inside if place.exists()]
    states = dict(states_of(places, storage_options))
    if states[source] is None:
        return None
    return hashlib.sha256(
        "\0".join(f"{place} {states[place]}" for place in places).encode()
    ).hexdigest()


def _fingerprint(source: str, storage_options: Mapping[str, Any] | None) -> str:
    filesystem, inside = locate(source, storage_options)
    if not filesystem.isdir(inside):
        return hashlib.sha256(filesystem.cat_file(inside)).hexdigest()
    listings, images = layout(filesystem, inside)
    tables = [filesystem.cat_file(posixpath.join(inside, name)) for name in listings.values()]
    names = [name.encode() for name in (*images, *listings)]
    return hashlib.sha256(b"\0".join([*names, *tables])).hexdigest()


def _validated(table: pd.DataFrame, source: str, folder: str) -> pd.DataFrame:
    if table.empty:
        raise InputError(f"{source}: the table has no rows")
    images = image_columns(table)
    for name, there in (("id", "id" in table), ("path (or path_<band> for each band)", images)):
        if not there:
            has = ", ".join(map(str, table))
            raise InputError(f"{source}: column {name} is missing; it has {has}")
    table = table.reset_index(drop=True)
    for name in ("id", *images):
        table[name] = as_text(table[name])
        refuse(source, table, table[name].isna(), name, "is empty")
    _check_unique(table, source)
    if "label" in table:
        table["label"] = zero_or_one(table, "label", source)
    else:
        table["label"] = pd.Series(pd.array([pd.NA] * len(table), dtype="Int8"))
    for name in {"survey", "bands", "flux_unit"} & {*table}:
        table[name] = stripped(table[name])
    if "simulated" in table:
        table["simulated"] = zero_or_one(table, "simulated", source).astype("boolean")
    for name in [name for name in NUMBERS if name in table]:
        table[name] = numbers(table, name, source, NUMBERS[name])
    if "pixel_scale" in table:
        scale = table["pixel_scale"]
        refuse(source, table, scale <= 0, "pixel_scale", "must be above 0")
        refuse(source, table, scale < FINEST, "pixel_scale", "must be in arcsec, not degrees")
        refuse(source, table, scale > COARSEST, "pixel_scale", "must be in arcsec, not milliarcsec")
    for name in images:
        table[name] = [_join(folder, path) for path in table[name]]
    table["split"] = stripped(table["split"]) if "split" in table else pd.array([None] * len(table))
    unknown = table["split"].notna() & ~table["split"].isin(SPLITS)
    refuse(source, table, unknown, "split", "must be train, val, test or empty")
    for name in map(str, table.select_dtypes("object")):
        if table[name].map(lambda value: isinstance(value, str)).any():
            table[name] = as_text(table[name])  # beside numbers: a file's columns are of one kind
    table["group"] = _groups(table, source)
    given = table[table["split"].notna() & table["label"].notna()]
    split_of_group = given.groupby("group")["split"].transform("first")
    torn = (given["split"] != split_of_group).reindex(table.index, fill_value=False)
    if torn.any():
        group = table["group"][torn].iloc[0]
        what = f"differs from that of another row of its group, {group}"
        refuse(source, table, torn, "split", what)
    parquet_schema(table, source)  # before the images are read for it
    return table


def _groups(table: pd.DataFrame, source: str) -> pd.Series:
    """Of each row its group. One of no group is a group of its own, called by its id, or one with
    the other rows of its images: their split must be one, unless others are stated.

    Warns where the labels, splits or groups of rows of one image differ.
    """
    group = stripped(table.get("group", pd.Series(None, table.index, dtype="object")))
    # As pandas writes them beside a missing one: what else a column holds must change no group.
    group = group.map(
        lambda name: WHOLE.sub(r"\1", name) if name[-1] == "0" else name, na_action="ignore"
    ).astype("object")
    first = table["id"].copy()
    images = image_columns(table)
    again = table.duplicated(images, keep=False)
    if again.any():
        of_images = table[again].assign(group=group).groupby(images, sort=False)
        _warn_of_different(of_images, again, source)
        one = (of_images["split"].transform("nunique") <= 1).reindex(table.index, fill_value=False)
        first[one] = of_images["id"].transform("first")[one]
        group = group.mask(one & group.isna(), of_images["group"].transform("first"))
    first = first.where(~first.isin(group), "id " + first)  # a group that is called like it
    return group.fillna(first)


def _warn_of_different(of_images: Any, again: pd.Series, source: str) -> None:
    """again: which rows are of an image that others are of, too; of_images: those, by images."""
    number = pd.Series(again.index + 1, again.index)
    for column in ("label", "split", "group"):
        values = of_images[column].transform("nunique") > 1
        if column == "group":  # which decides where no split is stated
            values &= of_images["split"].transform("count") < of_images["split"].transform("size")
        if values.any():
            image = of_images.ngroup()
            one = image == image[values].iloc[0]
            others = values.sum() - one.sum()
            log.warning(
                "%s: rows %s are of one image, and differ in column %s%s; a network learns nothing "
                "from them, or its test is of what it has seen",
                source, first_of(number[again][one].tolist()), column,
                f", as {others} rows of other images do" if others else "",
            )  # fmt: skip


def _check_unique(table: pd.DataFrame, source: str) -> None:
    again = table["id"].duplicated()
    if again.any():
        first = int(np.argmax(table["id"] == table["id"][again].iloc[0])) + 1
        what = f"is there twice, first in row {first}; ids must be unique"
        refuse(source, table, again, "id", what)


def _join(folder: str, path: str) -> str:
    if protocol_of(path):
        return path
    joined = posixpath.join(folder, path)
    if DOTS.search(path) and protocol_of(joined):  # which are names like any other to a store
        protocol, _, inside = joined.partition("://")
        return f"{protocol}://{posixpath.normpath(inside)}"
    return joined
